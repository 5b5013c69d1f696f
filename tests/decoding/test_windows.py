"""Layers with a window keep it, and not the whole context. Oracle: transformers' own pass over each sequence alone."""

import random

import pytest
import torch
from families import build, louder, quiet
from torch import nn

import lownibble as ln
from lownibble.decoding import CpuDecoder, slots, spans
from lownibble.decoding.modules import ON_CUDA_TOKENS, ModulesDecoder, _prompt_tokens
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
    windows = [layer.span.places for layer in cache.layers.values()]
    assert sorted(windows) == ([78, 78] if family == "mistral" else [78, 128])
    assert cache.nbytes == 3 * decoder.slot_bytes(128)
    assert decoder.slot_bytes(1000) - decoder.slot_bytes(100) == 900 * (windows.count(128)) * 2 * 2 * 16 * 4


@pytest.mark.parametrize("kind", DECODERS)
def test_where_a_sequence_can_go_on(kind, little_room):
    """After what the window needs is there: here at most 15 tokens back from the end. Elsewhere it starts anew."""
    decoder = decoder_of(kind)
    cache, row = decoder.cache(2, 128), tokens_of(100)
    with torch.inference_mode():
        decoder.prompt(row, 0, cache)
        span = cache.spans[WINDOW]
        assert span.first[0] == 96 - (WINDOW - 1)
        assert [cache.reach(0, n) for n in range(101)] == [0] * 96 + [*range(96, 101)]
        assert cache.resume(0, 95) == 0
        with pytest.raises(InputError, match="position 95 sees"):
            decoder.step(row[95:96], torch.tensor([0]), torch.tensor([95]), cache)
        cache.fork(0, 1, 97)
        assert [cache.reach(1, n) for n in range(98)] == [0] * 96 + [96, 97]
        for slot, n in ((1, 97), (0, 96)):
            assert cache.resume(slot, n) == n
            other = torch.cat([row[:n], tokens_of(25, slot)])
            assert differs(decoder, decoder.prompt(other[n:], slot, cache, position=n), [other]) < 1e-3
        assert cache.reach(0, 95) == 0
        assert cache.reach(1, 100) == 97, "where it began as another"
        short = tokens_of(20, 3)
        assert cache.resume(0, 0) == 0
        assert differs(decoder, decoder.prompt(short, 0, cache), [short]) < 1e-3
        assert [cache.reach(0, n) for n in range(21)] == [*range(21)]
        with pytest.raises(InputError, match="takes 128 tokens; the step needs 129"):
            decoder.step(row[:1], torch.tensor([0]), torch.tensor([128]), cache)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("n", [9, 50])
def test_what_was_marked_is_kept_however_long_a_sequence_gets(kind, n, little_room):
    decoder = decoder_of(kind)
    cache, row = decoder.cache(3, 128), tokens_of(100)
    with torch.inference_mode():
        cache.mark(0, n)
        decoder.prompt(row, 0, cache)
        assert [cache.reach(0, end) for end in (n - 1, n, 95, 96)] == [0, n, n, 96]
        for slot, ends in ((1, (30, 70)), (0, (40, 60)), (2, (25, 70))):  # copied, in place, and copied of what was copied
            if slot:
                cache.fork(slot // 2, slot, n)
            for seed, end in enumerate(ends):
                assert cache.resume(slot, n) == n
                other = torch.cat([row[:n], tokens_of(end, seed)])
                assert differs(decoder, decoder.prompt(other[n:], slot, cache, position=n), [other]) < 1e-3
        short = tokens_of(n - 2)
        assert differs(decoder, decoder.prompt(short, 0, cache), [short]) < 1e-3
        assert cache.reach(0, n - 2) == n - 2
        assert cache.reach(2, 60) == n


def test_more_tokens_at_once_than_there_is_room_for():
    span = Span(300, 1, 2000)
    assert span.places == 299 + 256 + 299
    assert span.enter(Part(0, 0, 555, 0)) == []
    with pytest.raises(InputError, match=r"555 places\. Got 257 tokens at once, which see 299 others"):
        span.enter(Part(0, 0, 257, 555))
    assert span.enter(Part(0, 0, 256, 555)) == [(256, 555, 0)]


def test_short_contexts_are_kept_whole():
    span = Span(300, 1, 850)
    span.mark[0] = 100
    for position in range(0, 850, 50):
        assert span.enter(Part(0, 0, 50, position)) == []
    assert [span.reach(0, n) for n in range(851)] == [*range(851)]


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


def test_any_course_of_slots():
    """Sequences begin, go on after what is in reach, are copied and marked: each token finds its window, of its own sequence."""
    found = 0
    for seed in range(300):
        draw = random.Random(seed)
        window, slots = draw.choice([1, 2, 5, 9]), range(3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lownibble.decoding.spans.PROMPT_TOKENS", draw.choice([3, 8]))
            span, most = Span(window, 3, 60), spans.PROMPT_TOKENS
        held, known = [[None] * span.places for _ in slots], [[] for _ in slots]

        def copy(source, target, copied, held=held):
            begin, end, to = copied
            held[target][to : to + end - begin] = held[source][begin:end]

        for turn in range(60):
            slot, other = draw.sample(slots, 2)
            n = span.reach(slot, draw.randint(0, len(known[slot])))
            if n and draw.random() < 0.2:
                copy(slot, other, span.fork(slot, other, n))
                slot, known[other] = other, known[slot][:n]
            elif draw.random() < 0.4:
                known[slot] = known[slot][:n]
                span.mark[slot] = draw.randint(0, 60)
            found += 0 < len(known[slot]) < span.first[slot] + window - 1  # what is aside is needed
            begin = len(known[slot])
            new = [(turn, place) for place in range(min(draw.randint(1, most), 60 - begin))]
            for copied in span.enter(Part(slot, 0, len(new), begin)):
                copy(slot, slot, copied)
            known[slot] += new
            first = span.first[slot]
            held[slot][begin - first : len(known[slot]) - first] = new
            for end in range(begin + 1, len(known[slot]) + 1):
                seen = max(0, end - window)
                assert held[slot][seen - first : end - first] == known[slot][seen:end], (seed, turn)
    assert found > 100


def test_parts_of_prompts_fit_into_the_room_of_a_window():
    assert _prompt_tokens("cpu", [None, 8]) == 0
    assert _prompt_tokens("cuda", [None]) == ON_CUDA_TOKENS
    decoder = decoder_of("static")
    most = _prompt_tokens("cuda", decoder._slot_bytes.of_places)
    cache = decoder.cache(1, 4 * ON_CUDA_TOKENS)
    for begin in (0, most, 2 * most):
        decoder.step(torch.arange(most) % 90, torch.zeros(most, dtype=torch.int64), torch.arange(begin, begin + most), cache)


def test_scores_of_a_part_are_computed_a_few_tokens_at_once(monkeypatch):
    decoder, tokens = decoder_of("static"), torch.arange(3 * WINDOW) % 90
    whole = decoder.prompt(tokens, 0, decoder.cache(1, 4 * WINDOW))
    monkeypatch.setattr(slots, "SCORE_BYTES", 5000)
    torch.testing.assert_close(decoder.prompt(tokens, 0, decoder.cache(1, 4 * WINDOW)), whole)
