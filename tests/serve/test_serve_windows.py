"""Requests on a model whose layers have windows, shorter than the prompts. Oracle: transformers, a request alone."""

import pytest
import torch

import lownibble as ln
from lownibble.serve import engine as engines

WINDOW, ROOM = 8, 12
PREFIX = list(range(3, 63))


@pytest.fixture
def base(write):
    layers = ["sliding_attention", "full_attention"]
    return write("gemma3_text", head_dim=8, sliding_window=WINDOW, layer_types=layers, max_position_embeddings=256)


@pytest.fixture
def adapters(base, adapters_of):
    return adapters_of(base, {"one": {"target_modules": "all-linear"}, "two": {"target_modules": ["v_proj", "up_proj"]}})


@pytest.fixture
def made(base, adapters, serving, monkeypatch):
    monkeypatch.setattr("lownibble.decoding.spans.PROMPT_TOKENS", ROOM)
    monkeypatch.setattr(engines, "PROMPT_TOKENS", ROOM)
    return serving(base, adapters, max_context=128, max_batch=8)


def alone(base, adapters, prompt, n, name):
    model, _ = ln.load(str(base), quant="nf4")
    if name:
        ln.load_adapter(model, adapters / name)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, eos_token_id=None, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_prompts_that_begin_alike_are_read_once(base, adapters, made, ask):
    """Others wait for the first of their adapter, and copy what it has kept."""
    cases = [(PREFIX + end, name) for end in ([70], [71, 72]) for name in (None, "one", "two")]
    told = [ask(made, prompt, 4, adapter=name, submit=False) for prompt, name in cases]
    made.submit(*(request for request, _ in told))
    ends = [one.wait() for _, one in told]
    assert [one.tokens for _, one in told] == [alone(base, adapters, prompt, 4, name) for prompt, name in cases]
    assert [end.reused_tokens for end in ends] == [0] * 3 + [60] * 3


def test_where_the_window_is_lost_a_prompt_is_read_anew_once(base, adapters, made, ask):
    """It then is known that several begin so."""

    def reused(prompt, n):
        _, told = ask(made, prompt, n, adapter="one")
        found = told.wait().reused_tokens
        assert told.tokens == alone(base, adapters, prompt, n, "one")
        return found

    assert reused([*PREFIX, 70], 30) == 0
    assert reused([*PREFIX, 71], 31) == 0, "30 tokens back"
    assert reused([*PREFIX, 72, 73], 30) == 60
    assert reused([*PREFIX, 72, 74], 30) == 60, "of 61 in common"
    tokens = alone(base, adapters, [*PREFIX, 70], 30, "one")
    assert reused([*PREFIX, 70, *tokens, 73], 2) == 90, "the end of the first"


def test_a_budget_counts_what_is_kept(base, made, adapters, serving):
    a_place = 2 * 4 * 2 * 8  # keys and values, float32, key heads, head_dim
    assert made.decoder.slot_bytes(128) == a_place * (128 + 2 * (WINDOW - 1) + ROOM)
    for more, slots in ((0, 3), (-1, 2)):
        few = serving(base, adapters, max_context=128, max_batch=8, cache_budget=3 * made.decoder.slot_bytes(128) + more)
        assert few.cache.slots == slots
        assert few.cache.nbytes == slots * made.decoder.slot_bytes(128)
