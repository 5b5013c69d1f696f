"""Tokens of a data set for plans. Oracle: the tokenizer itself."""

import json

import pytest

from lownibble.config import DataConfig, PlanConfig, TrainConfig
from lownibble.errors import DataError
from lownibble.models import load_tokenizer, resolve
from lownibble.training.tokens import count_tokens


@pytest.fixture
def data(tmp_path):
    rows = [{"text": "the film was good"}, {"text": "the plot was very very bad " * 5}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, DataConfig(path=str(tmp_path / "rows.jsonl"), eval_path=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("epochs", [1.0, 2.5])
@pytest.mark.parametrize("max_length", [8, 512])
def test_the_rows_are_counted_as_they_are_trained_on(tiny_model, data, max_length, epochs):
    rows, config = data
    tokenizer = load_tokenizer(resolve(str(tiny_model)))
    expected = sum(min(len(tokenizer(row["text"])["input_ids"]) + 1, max_length) for row in rows)  # and the end
    asked = PlanConfig(model=str(tiny_model), data=config, train=TrainConfig(max_length=max_length, num_train_epochs=epochs))
    assert count_tokens(asked) == (round(epochs * expected), "")


def test_data_that_cannot_be_read_is_refused(tiny_model):
    with pytest.raises(DataError, match="nowhere"):
        count_tokens(PlanConfig(model=str(tiny_model), data="nowhere.jsonl"))
