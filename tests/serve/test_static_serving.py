"""The server on a decoder as on CUDA: fixed shapes, tokens drawn where the logits are. Oracle: transformers' greedy loop."""

from types import SimpleNamespace

import pytest
import torch
from mixtures import folder_of
from test_engine import cancel_the_one_ahead
from test_serve_families import TARGETS
from test_serve_mixtures import PROMPTS, alone

import lownibble as ln
from lownibble.decoding import Drawer, most_bytes
from lownibble.decoding.modules import ModulesDecoder
from lownibble.decoding.static import StaticSteps
from lownibble.errors import ConfigError
from lownibble.kernels import proven
from lownibble.serve import engine as engines
from lownibble.serve.engine import DeviceLostError, Engine
from lownibble.serve.registry import Registry
from lownibble.serve.sampling import Sampling
from lownibble.serve.server import _report
from lownibble.serve.service import as_api


@pytest.fixture
def base(tokenizer, tmp_path):
    return folder_of("gemma3_text", tmp_path / "base", tokenizer)


@pytest.fixture
def calls(monkeypatch):
    """Rows of the static steps, and of the tokens that were drawn."""
    found = {StaticSteps: [], Drawer: []}
    step, draw = StaticSteps.__call__, Drawer.__call__
    monkeypatch.setattr(StaticSteps, "__call__", lambda self, a, *b: found[StaticSteps].append(len(a[0])) or step(self, a, *b))
    monkeypatch.setattr(Drawer, "__call__", lambda self, a, *b: found[Drawer].append(len(a)) or draw(self, a, *b))
    return found


@pytest.fixture
def serving():
    """`serving(base, adapters)`: an engine on such a decoder; closed in the end."""
    made = []

    def _serving(base, adapters):
        model, tokenizer = ln.load(str(base), quant="nf4")
        decoder = ModulesDecoder(model, "it is a test", static=True)
        registry = Registry(decoder, adapters, 10**7, dtype=torch.float32)
        made.append(Engine(decoder, tokenizer, registry, max_batch=3, max_context=64, max_queue=100, cache_budget=10**7))
        return made[-1]

    yield _serving
    for one in made:
        one.close(0)


def test_requests_with_and_without_adapters(base, adapters_of, serving, ask, calls):
    """Steps with a DoRA adapter are passes of any shape; others are static. Tokens are drawn on the device in both."""
    adapters = adapters_of(base, TARGETS)
    cases = [(prompt, name) for prompt in PROMPTS[1:] for name in (None, "one", "two", "dora")]
    expected = [alone(base, adapters, prompt, 6, name) for prompt, name in cases]
    made = serving(base, adapters)
    told = [ask(made, prompt, 6, adapter=name)[1] for prompt, name in cases]
    for one in told:
        one.wait()
    assert [one.tokens for one in told] == expected
    assert sum(calls[Drawer]) == 6 * len(cases)
    assert max(calls[StaticSteps]) > 1


def test_sampled_requests_and_those_whose_logits_the_host_needs(base, serving, ask, calls):
    made = serving(base, None)
    hot = Sampling(temperature=1.5, top_p=0.9, presence_penalty=0.3, seed=7)
    one = ask(made, PROMPTS[1], 6, sampling=hot)[1]
    one.wait()
    drawn = len(calls[Drawer])
    assert drawn == 6
    told = ask(made, PROMPTS[1], 6, sampling=hot._replace(logprobs=2))[1]
    told.wait()
    assert len(calls[Drawer]) == drawn
    assert all(len(piece.token.top) == 2 for piece in told.pieces)
    others = [ask(made, PROMPTS[2], 6, sampling=Sampling(temperature=2.0, top_k=9))[1] for _ in range(2)]
    again = ask(made, PROMPTS[1], 6, sampling=hot)[1]
    for each in (*others, again):
        each.wait()
    assert again.tokens == one.tokens, "whatever else is running"
    seeds = [ask(made, PROMPTS[1], 6, sampling=hot._replace(seed=seed))[1] for seed in range(5)]
    for each in seeds:
        each.wait()
    assert len({tuple(each.tokens) for each in seeds}) > 2


def test_logits_that_are_not_finite_fail_the_request(base, serving, ask, calls):
    made = serving(base, None)
    head = made.decoder.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, y: torch.full_like(y, float("nan")))
    assert "not finite" in str(ask(made, PROMPTS[1], 6)[1].wait().error)


def test_what_drawing_takes_is_counted_in_the_budget(base, serving):
    one = serving(base, None)
    vocabulary, a_slot = one.decoder.model.config.vocab_size, one.decoder.slot_bytes(64)
    assert (one.cache.slots, one.drawing_bytes) == (3, most_bytes(3, vocabulary))
    options = {"max_batch": 3, "max_context": 64, "max_queue": 1}
    less = Engine(one.decoder, one.tokenizer, one.registry, cache_budget=2 * a_slot + most_bytes(2, vocabulary), **options)
    less.close(0)
    assert less.cache.slots == 2
    with pytest.raises(ConfigError, match="to draw tokens"):
        Engine(one.decoder, one.tokenizer, one.registry, cache_budget=a_slot, **options)


def test_the_rest_goes_on_where_the_one_ahead_was_cancelled(base, serving, ask, monkeypatch):
    """Its slot is copied between steps, where tensors that a step has made may not be changed."""
    monkeypatch.setattr(engines, "PROMPT_TOKENS", 4)
    cancel_the_one_ahead(serving(base, None), ask, monkeypatch, alone(base, None, [*range(3, 40), 60], 8, None))


def test_a_step_that_fails_is_logged_and_a_lost_device_is_said_to_be_lost(base, serving, ask, monkeypatch, caplog):
    made = serving(base, None)

    def step(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(made.decoder, "step", step)
    assert "illegal memory access" in str(ask(made, PROMPTS[1], 6)[1].wait().error)
    assert "illegal memory access" in caplog.text
    monkeypatch.undo()
    assert ask(made, PROMPTS[1], 6)[1].wait().reason == "length", "the server goes on"
    monkeypatch.setattr(made.decoder, "step", step)
    monkeypatch.setattr(engines.proven, "is_lost", lambda device: True)
    error = ask(made, PROMPTS[1], 6)[1].wait().error
    assert (type(error), as_api(error).status) == (DeviceLostError, 503)
    made._thread.join(10)
    with pytest.raises(DeviceLostError, match="start the server again"):
        ask(made, PROMPTS[1], 6)


def test_steps_are_compiled_and_captured_before_the_first_request(base, serving, calls, monkeypatch):
    made = serving(base, None)
    assert calls[StaticSteps][-6:] == [1, 1, 2, 2, 3, 3]
    assert len(made.cache.layers) == 2
    monkeypatch.setattr(ModulesDecoder, "warm_up", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(ConfigError, match=r"no room for 3 sequences of 64 tokens.*--cache-budget"):
        serving(base, None)


def test_the_start_says_what_is_less_than_was_asked_for(base, serving, monkeypatch):
    made, lines = serving(base, None), []
    _report(SimpleNamespace(engine=made, registry=made.registry), lines.append)
    assert len(lines) == 1
    monkeypatch.setattr(made, "max_batch", 9)
    monkeypatch.setitem(proven.refused, "few_rows", "it failed: OutOfResources")
    _report(SimpleNamespace(engine=made, registry=made.registry), lines.append)
    assert lines[-2:] == [
        "at most 3 requests run at once: --cache-budget has no room for --max-batch 9",
        "plain torch in place of the kernel 'few_rows': it failed: OutOfResources",
    ]


def test_prompts_are_read_in_parts_as_large_as_the_decoder_may_as_well_have(base, serving, ask, monkeypatch):
    made, read = serving(base, None), []
    step = made.decoder.step
    monkeypatch.setattr(engines, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(made.decoder, "step", lambda tokens, *a, **k: read.append(len(tokens)) or step(tokens, *a, **k))
    for tokens, expected in ((0, [4, 4, 4, 1]), (10, [10, 3])):
        made.decoder.prompt_tokens = tokens
        read.clear()
        assert ask(made, [tokens + 5, *range(3, 15)], 1)[1].wait().reason == "length"
        assert read == expected
