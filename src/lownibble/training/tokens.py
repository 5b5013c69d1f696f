"""Count the tokens of a run over a data set with the model's tokenizer, for plans."""

from __future__ import annotations

from typing import Any

from lownibble.config import PlanConfig
from lownibble.data import encode_for, sequences_of
from lownibble.data import load as load_data
from lownibble.errors import ModelError
from lownibble.models import load_tokenizer, resolve
from lownibble.planning.models import hub_id


def count_tokens(config: PlanConfig) -> tuple[int, str]:
    """Tokens of `config.data`'s training rows (of pairs: of both sequences), truncated to `max_length`, times the epochs; and a
    note for the user, or "".

    Raises:
        DataError, ConfigError: the data cannot be used.
    """
    tokenizer, told = _tokenizer(config)
    examples = encode_for(load_data(config.data)[0], tokenizer, config.data, config.train).examples
    count = sum(len(ids) for example in examples for ids, _ in sequences_of(example))
    return max(1, round(count * config.train.num_train_epochs)), told


def _tokenizer(config: PlanConfig) -> tuple[Any, str]:
    try:
        return load_tokenizer(resolve(hub_id(config.model), config.revision)), ""
    except ModelError as error:
        told = f"The tokens are counted with the embedded model's tokenizer, for that of '{config.model}' cannot be had: {error}"
        return load_tokenizer(resolve("demo")), told
