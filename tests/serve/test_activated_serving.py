"""Adapters that are active from their invocation on, served together. Oracle: transformers' own greedy loop with one adapter
loaded, a request alone."""

import pytest
import torch
from test_engine import alone

import lownibble as ln
from lownibble.errors import AdapterError, InputError
from lownibble.serve import engine as engines
from lownibble.serve.request import NOTHING, Failed, Kept, in_common

PREFIX = list(range(10, 40))
CALL = {"red": [3, 4], "blue": [3, 4], "green": [5], "plain": [3, 4]}


@pytest.fixture
def adapters(base, adapters_of):
    """Three activated adapters, and one that is always on."""
    called = {name: {"alora_invocation_tokens": tokens} for name, tokens in CALL.items() if name != "plain"}
    return adapters_of(base, {**called, "plain": {}, "narrow": {"target_modules": ["v_proj"], "alora_invocation_tokens": [3, 4]}})


def test_a_prefix_is_read_once_for_all_of_them_and_the_base(base, adapters, engine, ask):
    """All read the base's keys of what comes before their invocation, in any order; an adapter that is always on does not."""
    made = engine(max_batch=8)
    names = ["red", "blue", "green", "narrow", None]
    prompts = {name: [*PREFIX, *CALL.get(name, [3, 4]), 50 + n] for n, name in enumerate(names)}
    expected = {name: alone(base, adapters, prompt, 8, name) for name, prompt in prompts.items()}
    assert len({tuple(tokens) for tokens in expected.values()}) == 5
    told = {name: ask(made, prompt, adapter=name, submit=False) for name, prompt in prompts.items()}
    made.submit(*(request for request, _ in told.values()))
    ends = {name: one.wait() for name, (_, one) in told.items()}
    assert {name: one.tokens for name, (_, one) in told.items()} == expected
    reused = sorted(end.reused_tokens for end in ends.values())
    assert reused[0] == 0, "one of them reads the prefix"
    assert min(reused[1:]) >= len(PREFIX), "the others do not"
    _, plain = ask(made, [*PREFIX, 3, 4, 60], adapter="plain")
    assert plain.wait().reused_tokens == 0
    assert plain.tokens == alone(base, adapters, [*PREFIX, 3, 4, 60], 8, "plain")
    for name in ("blue", "plain", None, "red"):
        prompt = [*PREFIX, 3, 4, 70, 71]
        _, again = ask(made, prompt, adapter=name)
        assert again.wait().reused_tokens >= len(PREFIX)
        assert again.tokens == alone(base, adapters, prompt, 8, name)


@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_prompts_in_parts_that_begin_before_and_end_after_the_invocation(at_once, base, adapters, engine, ask, monkeypatch):
    monkeypatch.setattr(engines, "PROMPT_TOKENS", at_once)
    made = engine(prefix_cache=False)
    cases = [
        (name, [*PREFIX[:n], *CALL.get(name, []), 60 + n]) for n, name in enumerate([*CALL, None, "narrow"]) if name != "narrow"
    ]
    told = [ask(made, prompt, adapter=name, submit=False) for name, prompt in cases]
    made.submit(*(request for request, _ in told))
    for (name, prompt), (_, one) in zip(cases, told, strict=True):
        one.wait()
        assert one.tokens == alone(base, adapters, prompt, 8, name)


def test_the_next_turn_is_read_again_from_the_first_invocation_on(base, adapters, engine, ask):
    """The last invocation counts, so what the adapter wrote in its first turn is the base's in the second; as the oracle's."""
    made = engine(max_batch=1)
    first = [*PREFIX, 3, 4, 60]
    _, one = ask(made, first, adapter="red")
    assert one.wait().reused_tokens == 0
    second = [*first, *one.tokens, 61, 3, 4, 62]
    _, two = ask(made, second, adapter="red")
    assert two.wait().reused_tokens == len(PREFIX)
    assert two.tokens == alone(base, adapters, second, 8, "red")
    third = [*second[:-1], 63]
    _, other = ask(made, third, adapter="blue")  # all before its invocation is the base's
    assert other.wait().reused_tokens == len(second) - 3
    assert other.tokens == alone(base, adapters, third, 8, "blue")


def test_another_scale_shares_the_prefix_too(base, adapters, engine, ask):
    made = engine(max_batch=1)
    prompt = [*PREFIX, 3, 4, 60]
    _, one = ask(made, prompt, adapter="red")
    one.wait()
    _, off = ask(made, prompt, adapter="red", scale=0.0)
    assert off.wait().reused_tokens == len(PREFIX)
    assert off.tokens == alone(base, adapters, prompt, 8) != one.tokens


def test_a_prompt_without_the_invocation_is_refused_and_the_engine_goes_on(base, adapters, engine, ask):
    made = engine(max_batch=1)
    for _ in range(3):
        _, told = ask(made, PREFIX, adapter="red")
        end = told.wait()
        assert isinstance(end, Failed)
        assert isinstance(end.error, InputError)
        assert r"[3, 4]" in str(end.error)
    assert all(held.users == 0 for held in made.registry.held.values())
    _, told = ask(made, [*PREFIX, 3, 4], adapter="red")
    told.wait()
    assert told.tokens == alone(base, adapters, [*PREFIX, 3, 4], 8, "red")


def test_scores_are_the_adapters_from_the_invocation_on(base, adapters, engine, ask):
    made, prompt = engine(), [*PREFIX, 3, 4, 60, 61]
    _, told = ask(made, prompt, 0, adapter="red", score=0)
    scored = told.events.get(timeout=60).tokens
    model, _ = ln.load(str(base), quant="nf4")
    ln.load_adapter(model, adapters / "red")
    with torch.no_grad():
        logps = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [float(logps[i - 1, token]) for i, token in enumerate(prompt) if i]
    assert [one.logprob for one in scored[1:]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*stay dense")
@pytest.mark.filterwarnings("ignore:.*get no adapter")
def test_models_that_run_one_sequence_after_another(write, tokenizer, adapters_of, serving, ask):
    """Mamba's states are of a whole sequence: nothing is shared, and the adapter is on where it is to be."""
    base = write("mamba", name="mamba", state_size=4)
    adapters = adapters_of(base, {"red": {"alora_invocation_tokens": [3, 4], "target_modules": ["in_proj", "out_proj"]}})
    made, prompt = serving(base, adapters), [*PREFIX[:9], 3, 4, 60]
    for name in ("red", None):
        _, told = ask(made, prompt, adapter=name)
        told.wait()
        assert told.tokens == alone(base, adapters, prompt, 8, name)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_families(family, write, adapters_of, serving, ask):
    base = write(family, name=family)
    adapters = adapters_of(base, {"red": {"alora_invocation_tokens": [3, 4]}, "blue": {"alora_invocation_tokens": [3, 4]}})
    made, prompt = serving(base, adapters), [*PREFIX[:20], 3, 4, 60]
    reused = []
    for name in ("red", "blue", None):
        _, told = ask(made, prompt, adapter=name)
        reused.append(told.wait().reused_tokens)
        assert told.tokens == alone(base, adapters, prompt, 8, name)
    assert reused[:2] == [0, 20]


def test_what_is_in_common():
    a, b, base = ("a", 1.0), ("b", 1.0), ("", 1.0)
    tokens = [1, 2, 3, 4, 5, 6]
    never = 2**62
    cases = [
        ((a, 0), (a, 0), 5), ((a, 0), (b, 0), 0), ((a, 3), (b, 2), 2), ((a, 3), (b, 4), 3), ((a, 3), (base, never), 3),
        ((base, never), (a, 3), 3), ((base, never), (base, never), 5), ((a, 2), (a, 4), 2), ((a, 4), (a, 4), 5),
        ((a, 0), (base, never), 0),
    ]  # fmt: skip
    for kept, wanted, n in cases:
        assert in_common(Kept(kept[0], tokens, kept[1]), Kept(wanted[0], tokens, wanted[1])) == n
    assert in_common(NOTHING, Kept(a, tokens, 3)) == 0


def test_a_text_in_the_file_is_refused(base, adapters, engine, ask):
    file = adapters / "red" / "adapter_config.json"
    file.write_text(
        file.read_text().replace('"alora_invocation_tokens": [\n    3,\n    4\n  ]', '"alora_invocation_tokens": "go"')
    )
    assert '"go"' in file.read_text()
    _, told = ask(engine(), [*PREFIX, 3, 4], adapter="red")
    end = told.wait()
    assert isinstance(end.error, AdapterError)
    assert "is the text 'go'" in str(end.error)
