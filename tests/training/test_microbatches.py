"""Which rows go through the model together. Oracles: the rows themselves, counted; the same run with other padding."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lownibble as ln
from lownibble.config import TrainConfig
from lownibble.data import Example
from lownibble.errors import ModelError
from lownibble.registry import OBJECTIVES
from lownibble.training.microbatches import MicroBatches, padding

LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=20)
OPTIONS = st.sampled_from([{}, {"group_by_length": True}, {"packing": True}])


def micro_batches(lengths, batch_size, count, options):
    rows = [Example([number] * length, [True] * length, str(number)) for number, length in enumerate(lengths)]
    config = TrainConfig(batch_size=batch_size, gradient_accumulation_steps=count, max_length=16, **options)
    return MicroBatches(rows, config, lambda rows: rows)


def rows_of(step):
    return [row.input_ids[0] for batch in step for row in batch]


@given(lengths=LENGTHS, batch_size=st.integers(1, 5), count=st.integers(1, 4), options=OPTIONS)
def test_an_epoch_has_every_row_once_whatever_is_accumulated(lengths, batch_size, count, options):
    micro = micro_batches(lengths, batch_size, count, options)
    first, both = micro.steps_of_epochs(1), micro.steps_of_epochs(2)
    steps = list(islice(micro.steps(), both))
    for epoch in (steps[:first], steps[first:]):
        assert Counter(row for step in epoch for row in rows_of(step)) == Counter(range(len(lengths)))
        assert all(len(step) == count for step in epoch[:-1])
        assert 1 <= len(epoch[-1]) <= count


@given(lengths=LENGTHS, batch_size=st.integers(1, 3), count=st.integers(1, 3), start=st.integers(0, 30), options=OPTIONS)
def test_steps_can_start_anywhere(lengths, batch_size, count, start, options):
    micro = micro_batches(lengths, batch_size, count, options)
    whole = [rows_of(step) for step in islice(micro.steps(), start + 6)]
    assert [rows_of(step) for step in islice(micro.steps(start), 6)] == whole[start:]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 2), (0.5, 1), (2, 4), (1.5, 3)])
def test_steps_of_epochs(epochs, steps):
    assert micro_batches([3] * 5, 1, 3, {}).steps_of_epochs(epochs) == steps  # 5 batches: a step of 3 and one of 2


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(tiny_run, clone):
    model, tokenizer, data = tiny_run
    config = TrainConfig(batch_size=4, max_steps=2, max_length=24, eval_steps=None)
    padded = ln.train(clone(model), tokenizer, data, config).losses
    tokenizer.pad_token = None
    assert padding(tokenizer) == tokenizer.eos_token_id
    assert ln.train(clone(model), tokenizer, data, config).losses == padded
    tokenizer.eos_token = None
    for name in ("next-token", "dpo", "kto"):
        with pytest.raises(ModelError, match="neither a pad_token nor an eos_token"):
            OBJECTIVES[name].collate(model, tokenizer)
