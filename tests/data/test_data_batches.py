"""Batches. Oracles: torch's `pad_sequence` for padding; counting for orders; a stream from its start for a resumed one."""

import random
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from lownibble.data import Example, collate, cut, epoch_batches


def examples_of(lengths) -> list[Example]:
    return [Example(list(range(1, n + 1)), [False] + [True] * (n - 1), f"r:{n}") for n in lengths]


lengths_st = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5))
def test_collate(rows):
    pad = 7  # occurs as a real token too
    examples = [Example([t for t, _ in row], [flag for _, flag in row], "r:1") for row in rows]
    batch = collate(examples, pad)
    ids = [torch.tensor(e.input_ids) for e in examples]
    assert torch.equal(batch.input_ids, pad_sequence(ids, batch_first=True, padding_value=pad))
    assert torch.equal(batch.attention_mask, pad_sequence([torch.ones_like(i) for i in ids], batch_first=True))
    for row, example in enumerate(examples):
        expected = [t if flag else -100 for t, flag in zip(example.input_ids, example.is_label, strict=True)]
        assert batch.labels[row].tolist() == expected + [-100] * (batch.labels.shape[1] - len(expected))
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert batch.n_tokens == sum(len(row) for row in rows)
    assert batch.n_label_tokens == sum(flag for row in rows for _, flag in row[1:])


def test_batch_to_device():
    moved = collate(examples_of([3]), 0).to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.attention_mask, moved.labels)} == {"meta"}


@given(lengths_st, st.integers(1, 9), st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_each_example_once_an_epoch_in_an_order_of_seed_and_epoch(lengths, size, seed, epoch, grouped):
    examples = examples_of(lengths)
    batches = epoch_batches(examples, size, seed, epoch, grouped)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sorted(len(batch) for batch in batches)[1:] == [size] * (len(batches) - 1)
    assert batches == epoch_batches(examples, size, seed, epoch, grouped)


def test_seed_and_epoch_change_the_order_and_global_state_does_not_matter():
    examples = examples_of([5] * 40)
    random.seed(1)
    before = random.getstate()
    first = epoch_batches(examples, 4, 0, 0)
    assert random.getstate() == before
    assert first != epoch_batches(examples, 4, 0, 1)
    assert first != epoch_batches(examples, 4, 1, 0)


@given(lengths_st, st.integers(1, 9))
def test_grouping_puts_the_largest_batch_first_and_pads_no_more(lengths, size):
    examples = examples_of(lengths)
    batches = epoch_batches(examples, size, 0, 0, group_by_length=True)
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert padded[0] == max(padded)
    assert sum(padded) == sum(len(b) * max(lengths[i] for i in b) for b in cut(lengths, None, most=size))  # one chunk: sorted


def test_grouping_sorts_within_chunks_only():
    lengths = [random.Random(0).randint(1, 500) for _ in range(1000)] + list(range(1, 1001))
    examples = examples_of(lengths)
    grouped = epoch_batches(examples, 8, 0, 0, group_by_length=True)
    shuffled = epoch_batches(examples, 8, 0, 0)

    def padding(batches) -> int:
        return sum(max(lengths[i] for i in b) - lengths[j] for b in batches for j in b)

    assert padding(grouped) < padding(shuffled) / 10
    assert [max(lengths[i] for i in b) for b in grouped] != sorted((max(lengths[i] for i in b) for b in grouped), reverse=True)


@given(lengths_st, st.integers(1, 9), st.none() | st.integers(1, 200))
def test_cut_batches_hold_each_example_once_longest_first(lengths, size, tokens):
    batches = cut(lengths, tokens, most=size)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) <= size
        assert len(batch) == 1 or tokens is None or len(batch) * lengths[batch[0]] <= tokens


@given(lengths_st, st.integers(1, 200))
def test_cut_packs_hold_each_example_once(lengths, tokens):
    packs = cut(lengths, tokens, packed=True)
    assert sorted(index for rows in packs for index in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or sum(lengths[i] for i in rows) <= tokens for rows in packs)


def test_a_changed_copy_of_a_moved_batch_finds_its_labels_and_padding_again():
    moved = collate(examples_of([5, 3]), 0).to("cpu")
    places, labels = moved.label_places
    assert (places.tolist(), labels.tolist(), moved.is_padded) == ([0, 1, 2, 3, 5, 6], [2, 3, 4, 5, 2, 3], True)
    assert moved.mask is moved.attention_mask
    fewer = replace(moved, labels=moved.labels.masked_fill(moved.labels < 4, -100))
    assert fewer.label_places[1].tolist() == [4, 5]
    full = replace(moved, attention_mask=torch.ones_like(moved.attention_mask))
    assert full.mask is None
