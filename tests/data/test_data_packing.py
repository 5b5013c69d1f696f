"""Packing. Oracles: counting; the definition of best fit, by trying every pack; the stream from its start; a row's own labels."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lownibble.data import Example, collate, epoch_batches, flatten
from lownibble.data.packing import CHUNK_ROWS, pack

ROOM = 60


def examples_of(lengths) -> list[Example]:
    return [Example(list(range(1, n + 1)), [False] + [True] * (n - 1), f"r:{n}") for n in lengths]


lengths_st = st.lists(st.integers(1, ROOM), min_size=1, max_size=80)


@given(lengths_st)
def test_packs_are_those_of_best_fit_decreasing(lengths):
    packs = pack(range(len(lengths)), lengths, ROOM)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    expected: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [p for p in expected if sum(p) + length <= ROOM]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            expected.append([length])
    assert sorted(sorted(lengths[row] for row in rows) for rows in packs) == sorted(map(sorted, expected))


@given(lengths_st, st.integers(1, 5), st.integers(0, 5), st.integers(0, 3))
def test_each_row_once_an_epoch_in_packs_that_fit(lengths, size, seed, epoch):
    examples = examples_of(lengths)
    batches = epoch_batches(examples, size, seed, epoch, pack_to=ROOM)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in batch) for batch in batches]
    assert all(n <= size * ROOM for n in tokens)
    assert tokens[0] == max(tokens)
    for batch in batches:
        assert [lengths[row] for row in batch] == sorted((lengths[row] for row in batch), reverse=True)
        assert len(pack(batch, lengths, ROOM)) <= size  # what was packed can be packed again
    assert batches == epoch_batches(examples, size, seed, epoch, pack_to=ROOM)


def test_packs_are_well_filled_and_their_company_changes():
    generator = random.Random(0)
    lengths = [min(512, int(generator.lognormvariate(4.5, 0.8)) + 2) for _ in range(3 * CHUNK_ROWS)]
    examples = examples_of(lengths)
    batches = epoch_batches(examples, 1, 0, 0, pack_to=512)
    assert len(batches) <= sum(lengths) / 512 + 3 + 1, "half a pack a chunk, and a little"
    again = [epoch_batches(examples, 1, seed, epoch, pack_to=512) for seed, epoch in ((0, 1), (1, 0))]
    assert all(
        {frozenset(b) for b in other} & {frozenset(b) for b in batches} != {frozenset(b) for b in batches} for other in again
    )
    longest = [max(lengths[row] for row in batch) for batch in batches]
    rises = sum(a < b for a, b in pairwise(longest))
    assert rises > len(batches) / 4, "packs come in shuffled order; as packed, a rise comes only with a new chunk"


@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=5))
def test_flatten_has_every_row_as_it_is_alone(rows):
    examples = [Example([t for t, _ in row], [flag for _, flag in row], "r:1") for row in rows]
    batch = flatten(examples)
    assert batch.segments == tuple(map(len, rows))
    assert batch.n_rows == len(rows)
    assert batch.n_tokens == batch.input_ids.numel() == sum(map(len, rows))
    assert batch.n_label_tokens == collate(examples, 0).n_label_tokens, "no label is won or lost over a border"
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    parts = zip(*(t[0].split(batch.segments) for t in (batch.input_ids, batch.labels)), strict=True)
    for example, (ids, labels) in zip(examples, parts, strict=True):
        alone = collate([example], 0)
        assert ids.tolist() == example.input_ids
        assert labels[0] == -100
        assert labels[1:].tolist() == alone.labels[0, 1:].tolist()


def test_a_packed_batch_moves_with_its_borders():
    moved = flatten(examples_of([3, 2])).to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.attention_mask, moved.labels)} == {"meta"}
    assert moved.segments == (3, 2)


@pytest.mark.parametrize("pack_to", [None, ROOM])
def test_rows_of_a_batch(pack_to):
    examples = examples_of([30, 20, 10])
    [rows] = epoch_batches(examples, 3, 0, 0, pack_to=pack_to)
    batch = flatten([examples[i] for i in rows]) if pack_to else collate([examples[i] for i in rows], 0)
    assert batch.n_rows == 3
