"""Layers with a window keep it, and not the whole context. Oracle: transformers' own pass over each sequence alone."""

import pytest
import torch
from families import build, louder, quiet
from torch import nn

import lownibble as ln
from lownibble.decoding import CpuDecoder
from lownibble.decoding.modules import ModulesDecoder
from lownibble.decoding.spans import Part, Span
from lownibble.errors import InputError
from lownibble.quant import QuantLinear

WINDOW, ROOM = 32, 16
"""Of the tiny models; and tokens that a step takes of a sequence at most, here."""

DECODERS = {
    "cpu": CpuDecoder,
    "modules": lambda model: ModulesDecoder(model, "it is a test"),
    "static": lambda model: ModulesDecoder(model, "it is a test", static=True),
}


@pytest.fixture
def little_room(monkeypatch):
    monkeypatch.setattr("lownibble.decoding.spans.PROMPT_TOKENS", ROOM)
    monkeypatch.setattr("lownibble.decoding.decoder.PROMPT_TOKENS", ROOM)


def decoder_of(kind, family="gemma3_text"):
    model = louder(build(family, 96))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, QuantLinear.from_linear(module))
    with quiet():
        return DECODERS[kind](model)


def tokens_of(n, seed=1):
    return torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(seed))


def differs(decoder, found, rows):
    """The largest difference of log-probabilities of the next token from the model's own, after each of the rows."""
    expected = torch.stack([decoder.model(row.unsqueeze(0), use_cache=False).logits[0, -1] for row in rows])
    return float((found.log_softmax(-1) - expected.log_softmax(-1)).abs().max())


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("family", ["gemma3_text", "gemma3", "mistral"])
def test_contexts_far_longer_than_the_window(kind, family, little_room):
    """Sequences of unlike lengths, one of them new in a slot that had a longer one; 40 tokens more of each."""
    decoder = decoder_of(kind, family)
    cache = decoder.cache(3, 128)
    with torch.inference_mode():
        decoder.prompt(tokens_of(90), 1, cache)
        rows = [tokens_of(n, n) for n in (80, 5, 33)]
        found = torch.cat([decoder.prompt(row, slot, cache) for slot, row in enumerate(rows)])
        assert differs(decoder, found, rows) < 1e-3
        for turn in range(40):
            next_ones = found.argmax(-1)
            positions = torch.tensor([len(row) for row in rows])
            rows = [torch.cat([row, one[None]]) for row, one in zip(rows, next_ones, strict=True)]
            found = decoder.step(next_ones, torch.arange(3), positions, cache)
            assert turn % 8 or differs(decoder, found, rows) < 1e-3
    windows = [layer.span.length for layer in cache.layers.values()]
    assert sorted(windows) == ([47, 128] if "gemma3" in family else [47, 47])
    assert cache.nbytes == 3 * decoder.slot_bytes(128)
    assert decoder.slot_bytes(128) - decoder.slot_bytes(64) == 64 * (windows.count(128)) * 2 * 2 * 16 * 4


@pytest.mark.parametrize("kind", DECODERS)
def test_where_a_sequence_can_go_on(kind, little_room):
    """After what the window needs is there: here at most 15 tokens back from the end. Elsewhere it starts anew."""
    decoder = decoder_of(kind)
    cache, row = decoder.cache(2, 128), tokens_of(100)
    with torch.inference_mode():
        decoder.prompt(row, 0, cache)
        span = cache.spans[WINDOW]
        assert span.first[0] == 96 - (WINDOW - 1)
        assert [n for n in range(101) if cache.keeps(0, n)] == [0, *range(96, 101)]
        assert cache.resume(0, 95) == 0
        with pytest.raises(InputError, match="position 95 sees"):
            decoder.step(row[95:96], torch.tensor([0]), torch.tensor([95]), cache)
        cache.fork(0, 1, 97)
        assert [n for n in range(98) if cache.keeps(1, n)] == [0, 96, 97]
        for slot, n in ((1, 97), (0, 96)):
            assert cache.resume(slot, n) == n
            other = torch.cat([row[:n], tokens_of(25, slot)])
            assert differs(decoder, decoder.prompt(other[n:], slot, cache, position=n), [other]) < 1e-3
        assert not cache.keeps(1, 97), "written over since"
        short = tokens_of(20, 3)
        assert cache.resume(0, 0) == 0
        assert differs(decoder, decoder.prompt(short, 0, cache), [short]) < 1e-3
        assert all(cache.keeps(0, n) for n in range(21))
        with pytest.raises(InputError, match="takes 128 tokens; the step needs 129"):
            decoder.step(row[:1], torch.tensor([0]), torch.tensor([128]), cache)


def test_more_tokens_at_once_than_there_is_room_for():
    span = Span(300, 1, 2000)
    assert span.length == 299 + 256
    assert span.enter(Part(0, 0, 555, 0)) == (0, 0)
    with pytest.raises(InputError, match=r"555 places\. Got 257 tokens at once, which see 299 others"):
        span.enter(Part(0, 0, 257, 555))
    assert span.enter(Part(0, 0, 256, 555)) == (256, 555)


def test_short_contexts_are_kept_whole():
    span = Span(300, 1, 500)
    for position in range(0, 500, 50):
        assert span.enter(Part(0, 0, 50, position)) == (0, 0)
    assert all(span.keeps(0, n) for n in range(501))


def test_generation_after_prompts_of_several_parts():
    """With the room that there is. Oracle: transformers' `generate`, with its own cache of windows."""
    model = decoder_of("cpu").model
    ids, mask = tokens_of(2 * 620).view(2, -1), torch.ones(2, 620, dtype=torch.int64)
    mask[0, :333] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
             "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    expected, found = (model.generate(ids, **asked, **one) for one in ({}, {"custom_generate": ln.decode}))
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), rtol=0, atol=1e-3)
