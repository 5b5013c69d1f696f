"""Continuous batching. Oracle: transformers' own greedy loop on the model with one adapter loaded, a request alone."""

import json
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import lownibble as ln
from lownibble.errors import AdapterError, ConfigError
from lownibble.serve import engine as engines
from lownibble.serve import request as requests
from lownibble.serve.engine import QueueFullError
from lownibble.serve.registry import PinnedError, UnknownAdapterError
from lownibble.serve.request import End, Failed
from lownibble.serve.sampling import Chosen, Sampler, Sampling

PROMPTS = [[5, 9, 40, 71], [8], [33, 21, 60, 4, 17, 90, 12], list(range(3, 40))]


def alone(base, adapters, prompt, n, name=None):
    """Greedy tokens by transformers."""
    model, _ = ln.load(str(base), quant="nf4")
    if name:
        ln.load_adapter(model, adapters / name)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_mixed_adapters_give_what_each_gives_alone(base, adapters, engine, ask):
    """More requests than slots, prompts of several steps, four adapters in one batch; twice, the second time from the cache."""
    made = engine(max_batch=3)
    cases = [(prompt, name) for prompt in PROMPTS for name in (None, "one", "two", "three")]
    expected = [alone(base, adapters, prompt, 8, name) for prompt, name in cases]
    assert len({tuple(tokens) for tokens in expected}) > 10  # the adapters make a difference
    for _ in range(2):
        told = [ask(made, prompt, adapter=name)[1] for prompt, name in cases]
        ends = [one.wait() for one in told]
        assert [one.tokens for one in told] == expected
        assert all(end.reason == "length" and end.completion_tokens == 8 for end in ends)
    assert made.registry.nbytes > 0
    assert all(one.users == 0 for one in made.registry.held.values())


def test_a_long_prompt_is_read_in_parts(base, adapters, engine, ask, monkeypatch):
    monkeypatch.setattr(engines, "PROMPT_TOKENS", 5)
    made = engine()
    told = [ask(made, prompt, adapter="one")[1] for prompt in PROMPTS]
    for one, prompt in zip(told, PROMPTS, strict=True):
        one.wait()
        assert one.tokens == alone(base, adapters, prompt, 8, "one")


def test_the_cache_is_used_for_the_same_contents_only(base, adapters, engine, ask):
    """A prompt that was read is not read again; by another adapter, another scale or a newer version under the name it is."""
    made = engine(max_batch=1)

    def reused(**options):
        _, told = ask(made, PROMPTS[3], **options)
        return told.wait().reused_tokens, told.tokens

    assert reused(adapter="one")[0] == 0
    again, tokens = reused(adapter="one")
    assert again == len(PROMPTS[3]) - 1
    assert reused(adapter="three")[0] == 0
    assert reused()[0] == 0
    assert reused(adapter="one")[0] == 0
    assert reused(adapter="one", scale=0.5)[0] == 0
    file = adapters / "one" / "adapter_model.safetensors"
    metadata = _metadata(file)
    save_file({key: -2 * tensor for key, tensor in load_file(file).items()}, file, metadata=metadata)
    ask(made, PROMPTS[3], adapter="one")[1].wait()
    fresh, other = reused(adapter="one")
    assert fresh == len(PROMPTS[3]) - 1
    assert other == alone(base, adapters, PROMPTS[3], 8, "one") != tokens


def test_prompts_that_begin_alike_are_read_once(base, adapters, engine, ask):
    """Submitted together: each adapter's others wait for the first, and copy what it has read. Also after it has ended."""
    made, prefix = engine(max_batch=8), list(range(3, 40))
    cases = [(prefix + end, name) for end in ([50], [60, 61], [50, 70]) for name in ("one", "three")]
    told = [ask(made, prompt, adapter=name, submit=False) for prompt, name in cases]
    made.submit(*(request for request, _ in told))
    ends = [one.wait() for _, one in told]
    assert [one.tokens for _, one in told] == [alone(base, adapters, prompt, 8, name) for prompt, name in cases]
    reused = [end.reused_tokens for end in ends]
    assert reused[:4] == [0, 0, 37, 37]
    assert {*reused[4:]} <= {37, 38}, "37 where the first has ended, and its slot gone to the second, before the third came"
    again = ask(made, [*prefix, 50, 70, 71], adapter="one")[1]
    assert again.wait().reused_tokens == 39


def cancel_the_one_ahead(made, ask, monkeypatch, expected):
    """Of two prompts that begin alike the first is cancelled halfway; the other goes on from there to its eight tokens."""
    first, gone = ask(made, [*range(3, 40), 50], 8, submit=False)
    other, told = ask(made, [*range(3, 40), 60], 8, submit=False)
    step, steps = made.decoder.step, []

    def counted(*arguments, **options):
        steps.append(1)
        if len(steps) == 5:
            made.cancel(first)
        return step(*arguments, **options)

    monkeypatch.setattr(made.decoder, "step", counted)
    made.submit(first, other)
    assert gone.wait().reason == "cancelled"
    assert told.wait().reused_tokens == 20
    assert told.tokens == expected


def test_the_rest_goes_on_where_the_one_ahead_was_cancelled(base, adapters, engine, ask, monkeypatch):
    monkeypatch.setattr(engines, "PROMPT_TOKENS", 4)
    cancel_the_one_ahead(engine(max_batch=3), ask, monkeypatch, alone(base, adapters, [*range(3, 40), 60], 8))


def test_without_the_prefix_cache_nothing_is_reused(engine, ask):
    made = engine(prefix_cache=False)
    told = [ask(made, PROMPTS[3])[1] for _ in range(3)]
    assert [one.wait().reused_tokens for one in told] == [0] * 3


def test_a_short_prompt_does_not_wait_for_long_ones(engine, ask, monkeypatch):
    monkeypatch.setattr(engines, "PROMPT_TOKENS", 8)
    made = engine()
    told = [ask(made, [n] * 48, 1, submit=False) for n in (5, 6)] + [ask(made, [7, 8, 9], 1, submit=False)]
    made.submit(*(request for request, _ in told))
    long, _, short = (one.wait() for _, one in told)
    assert short.s < long.s


def _metadata(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        return handle.metadata()


def test_a_changed_adapter_serves_new_requests_only(base, adapters, engine, ask):
    """The one in flight keeps the version it began with."""
    made = engine(max_batch=2)
    before = alone(base, adapters, PROMPTS[0], 50, "one")
    begun = threading.Event()
    request, told = ask(made, PROMPTS[0], 50, adapter="one", submit=False)
    put = request.tell
    request.tell = lambda event: (put(event), begun.set(), time.sleep(0.005))
    made.submit(request)
    begun.wait(30)
    file = adapters / "one" / "adapter_model.safetensors"
    save_file({key: -2 * tensor for key, tensor in load_file(file).items()}, file, metadata=_metadata(file))
    _, second = ask(made, PROMPTS[0], 8, adapter="one")
    assert second.wait().reason == "length"
    assert request in [one.request for one in made._running]  # it was there all the time
    told.wait()
    assert told.tokens == before
    assert second.tokens == alone(base, adapters, PROMPTS[0], 8, "one") != before[:8]
    assert not made.registry._old


def test_scale(base, adapters, engine, ask, adapt):
    made = engine()
    _, told = ask(made, PROMPTS[0], adapter="one", scale=0.0)
    told.wait()
    assert told.tokens == alone(base, adapters, PROMPTS[0], 8)


def test_a_popular_adapter_does_not_starve_the_rest(engine, ask):
    made = engine(max_batch=1)
    order, lock = [], threading.Lock()

    def noted(name, request):
        put = request.tell

        def tell(event):
            put(event)
            if isinstance(event, End):
                with lock:
                    order.append(name)

        request.tell = tell
        return request

    told = [ask(made, [5, 6], 4, adapter=name, submit=False) for name in ["one"] * 12 + ["two"]]
    made.submit(*(noted(request.adapter, request) for request, _ in told))
    for _, one in told:
        one.wait()
    assert order.index("two") <= 2


def test_cancelled_requests_free_their_slot(engine, ask):
    made = engine(max_batch=1, max_context=1024)
    first, told = ask(made, [5], 1000, adapter="one")
    waiting, also = ask(made, [5], 1000)
    told.events.get(timeout=30)
    made.cancel(waiting)
    made.cancel(first)
    assert told.wait().reason == also.wait().reason == "cancelled"
    _, last = ask(made, [5], 3)
    assert last.wait().reason == "length"
    assert made.registry.held["one"].users == 0


def test_seeds(engine, ask):
    """The same seed draws the same tokens, whatever runs beside it; without one they differ."""
    made = engine()
    sampling = Sampling(temperature=1.5, seed=7)
    _, first = ask(made, PROMPTS[0], 12, sampling=sampling)
    first.wait()
    beside = [ask(made, prompt, 20, sampling=Sampling(1.0), adapter="two")[1] for prompt in PROMPTS[:2]]
    _, second = ask(made, PROMPTS[0], 12, sampling=sampling)
    second.wait()
    assert first.tokens == second.tokens
    free = [ask(made, PROMPTS[0], 12, sampling=Sampling(1.5))[1] for _ in range(3)]
    assert [one.wait() for one in (*beside, *free)]
    assert len({tuple(one.tokens) for one in free}) > 1


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = {p: {Sampler(Sampling(1.0, p, seed))(logits).token for seed in range(200)} for p in (0.4, 0.5, 0.7, 0.9, 1.0)}
    assert drawn == {0.4: {0}, 0.5: {0}, 0.7: {0, 1}, 0.9: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    sampler = Sampler(Sampling(1.0, 1.0, 3))
    counts = torch.bincount(torch.tensor([sampler(logits).token for _ in range(4000)])) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.03)
    hot = Sampler(Sampling(2.0, 1.0, 3))
    flat = torch.bincount(torch.tensor([hot(logits).token for _ in range(4000)])) / 4000
    torch.testing.assert_close(flat, (logits / 2).softmax(0), rtol=0, atol=0.03)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.float16, 1e-2)], ids=str)
def test_logprobs_are_the_models(base, adapters, engine, ask, dtype, close):
    """The tiny model's adapters are as large as its weights; so is what rounding them does."""
    made = engine(dtype=dtype)
    _, told = ask(made, PROMPTS[0], 3, adapter="one", sampling=Sampling(logprobs=5))
    told.wait()
    model, _ = ln.load(str(base), quant="nf4")
    ln.load_adapter(model, adapters / "one")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0] + told.tokens])).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(1)
    for piece, row in zip(told.pieces, expected, strict=True):
        assert piece.token.logprob == pytest.approx(float(row[piece.token.token]), abs=close)
        values, ids = row.topk(5)
        assert [token for token, _ in piece.token.top] == ids.tolist()
        assert [value for _, value in piece.token.top] == pytest.approx(values.tolist(), abs=close)


def test_stop_strings_are_held_back_and_cut(engine, ask):
    made = engine()
    _, free = ask(made, PROMPTS[0], 8)
    free.wait()
    words = free.text.split(" ")
    stop = words[3] + " " + words[4][:1]
    _, told = ask(made, PROMPTS[0], 8, stop=(stop, "never"))
    assert told.wait().reason == "stop"
    assert told.text == free.text[: free.text.index(stop)]
    _, missed = ask(made, PROMPTS[0], 8, stop=(words[-1] + " and more",))
    assert missed.wait().reason == "length"
    assert missed.text == free.text


def test_the_end_token_ends(base, engine, ask):
    made = engine()
    _, free = ask(made, PROMPTS[0], 8)
    free.wait()
    made.eos = {free.tokens[3]}
    _, told = ask(made, PROMPTS[0], 8, ignore_eos=False)
    end = told.wait()
    cut = free.tokens.index(free.tokens[3])
    assert (end.reason, end.completion_tokens) == ("stop", cut + 1)
    assert told.tokens == free.tokens[:cut]


def test_a_full_queue_refuses(engine, ask):
    made = engine(max_batch=1, max_queue=2, max_context=1024)
    told = [ask(made, [5], 1000)]
    told[0][1].events.get(timeout=30)  # it runs
    told += [ask(made, [5], 1000) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        ask(made, [5], 1000)
    for request, _ in told:
        made.cancel(request)
    assert all(one.wait() for _, one in told)


@pytest.mark.parametrize("damage", ["NaN", "shape", "cut", "config"])
def test_a_bad_adapter_fails_its_own_request_only(adapters, engine, ask, damage):
    made = engine()
    file = adapters / "two" / "adapter_model.safetensors"
    tensors, metadata = load_file(file), _metadata(file)
    key = next(iter(tensors))
    if damage == "NaN":
        tensors[key][0, 0] = float("nan")
    elif damage == "shape":
        tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, file, metadata=metadata)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "config":
        (adapters / "two" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    good, bad = ask(made, [5], adapter="one")[1], ask(made, [5], adapter="two")[1]
    failed = bad.wait()
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, AdapterError)
    assert "two" in str(failed.error)
    assert good.wait().reason == "length"


def test_unknown_adapters_and_an_error_of_our_own(engine, ask, monkeypatch):
    made = engine()
    _, told = ask(made, [5], adapter="../one")
    assert isinstance(told.wait().error, UnknownAdapterError)
    step = made.decoder.step
    monkeypatch.setattr(made.decoder, "step", lambda *a, **k: 1 / 0)
    _, broken = ask(made, [5])
    assert isinstance(broken.wait().error, ZeroDivisionError)
    monkeypatch.setattr(made.decoder, "step", step)
    _, fine = ask(made, [5])
    assert fine.wait().reason == "length"


def test_closing_finishes_what_runs_and_refuses_the_rest(engine, ask):
    made = engine(max_batch=1)
    told = [ask(made, [5], 20)[1] for _ in range(3)]
    closing = threading.Thread(target=made.close, args=(60,))
    closing.start()
    time.sleep(0.05)
    with pytest.raises(QueueFullError, match="shutting down"):
        ask(made, [5])
    assert [one.wait().reason for one in told] == ["length"] * 3
    closing.join()


def test_a_budget_for_less_than_one_sequence_is_refused(engine):
    with pytest.raises(ConfigError, match=r"takes \d+ MB of keys and values, and --cache-budget is"):
        engine(cache_budget=100)


def test_a_long_prompt_is_read_though_shorter_ones_keep_coming(engine, ask, monkeypatch):
    monkeypatch.setattr("lownibble.serve.engine.PROMPT_TOKENS", 8)
    made = engine(max_batch=3)
    _, long = ask(made, list(range(1, 49)), 1)
    shorts = [ask(made, [n % 90 + 1] * 7, 1, ignore_eos=True)[1] for n in range(30)]
    end = long.wait()
    assert end.reason == "length"
    assert shorts[-1].wait().s > end.s


def test_a_request_that_cannot_begin_costs_no_slot(engine, ask, monkeypatch):
    made, sampler = engine(max_batch=1), requests.Sampler

    def fails(*_):
        raise OSError("no file descriptors")

    for adapter in (None, "one"):
        monkeypatch.setattr(requests, "Sampler", fails)
        _, told = ask(made, PROMPTS[0], 2, adapter=adapter)
        assert isinstance(told.wait().error, OSError)
        monkeypatch.setattr(requests, "Sampler", sampler)
        _, told = ask(made, PROMPTS[0], 2, adapter=adapter)
        assert told.wait().reason == "length"
    assert made.registry.held["one"].users == 0


def test_pinned_adapters_that_leave_no_room_are_said_at_once(engine, ask):
    made = engine()
    loaded = made.registry.load("one", pin=True)
    made.registry.budget = loaded.nbytes + 10
    _, busy = ask(made, PROMPTS[0], 40, adapter="one")
    lines = [ask(made, PROMPTS[0], 2, adapter="three")[1] for _ in range(3)]
    for told in lines:
        assert isinstance(told.wait().error, PinnedError)
    assert busy.wait().reason == "length"


def decoded(prompt, tokens):
    """What is told of these tokens after this prompt, with the embedded model's byte-level tokenizer."""
    _, tokenizer = ln.load("demo")
    told = []
    request = requests.Request(prompt, len(tokens), told.append, continues=True)
    running = requests.Running(request, None, tokenizer.backend_tokenizer)
    for token in tokens:
        running.take(Chosen(token), set())
    return "".join(piece.text for piece in told)


@pytest.mark.slow
def test_text_within_a_character():
    _, tokenizer = ln.load("demo")
    ids = tokenizer("so \U0001f9ff it is").input_ids
    text = tokenizer.decode(ids)
    whole = [n for n in range(1, len(ids)) if not tokenizer.decode(ids[:n]).endswith("\ufffd")]
    inside = [n for n in range(1, len(ids)) if n not in whole]
    assert inside
    for n in whole:
        assert decoded(ids[:n], ids[n:]) == text[len(tokenizer.decode(ids[:n])) :]
    for n in inside:  # the character comes whole with its last token
        assert decoded(ids[:n], ids[n:]) == "\U0001f9ff it is"
    # bytes that are no text are told, and do not end the answer
    assert decoded(ids[:1], [ids[inside[0] - 1], *ids[-2:]]).endswith(" it is")


def test_dora_shares_steps_with_others(base, adapters, adapt, engine, ask):
    """On the CPU's decoder. Its contribution has no scale."""
    shutil.move(adapt(base, "nf4", name="dora", size=4.0, target_modules="all-linear", use_dora=True)[1], adapters / "dora")
    made = engine()
    cases = [(prompt, name) for prompt in PROMPTS for name in (None, "one", "dora")]
    expected = [alone(base, adapters, prompt, 8, name) for prompt, name in cases]
    assert expected[2::3] != expected[::3]
    told = [ask(made, prompt, adapter=name)[1] for prompt, name in cases]
    for one in told:
        one.wait()
    assert [one.tokens for one in told] == expected
    refused = ask(made, PROMPTS[0], adapter="dora", scale=0.5)[1].wait()
    assert isinstance(refused, Failed)
    assert "no scale" in str(refused.error)
