"""Data pipeline: `load` a data set, `encode` it with a tokenizer, `collate` examples in the order of `epoch_batches`."""

from lownibble.data.batches import (
    IGNORE,
    Batch,
    collate,
    collate_pairs,
    cut,
    encoder_ids,
    epoch_batches,
    flatten,
    label_places,
    split_pair,
)
from lownibble.data.choices import Choice, choices
from lownibble.data.ends import end_tokens
from lownibble.data.forms import recipe_for
from lownibble.data.preference import (
    PreferenceBatch,
    check_rows,
    collate_preferences,
    encode_for,
    encode_preferences,
    sequences_of,
)
from lownibble.data.rows import Dataset, Row
from lownibble.data.sources import load, read, read_sides
from lownibble.data.template import Encoded, Example, digest_of, encode, prompts

__all__ = [
    "IGNORE",
    "Batch",
    "Choice",
    "Dataset",
    "Encoded",
    "Example",
    "PreferenceBatch",
    "Row",
    "check_rows",
    "choices",
    "collate",
    "collate_pairs",
    "collate_preferences",
    "cut",
    "digest_of",
    "encode",
    "encode_for",
    "encode_preferences",
    "encoder_ids",
    "end_tokens",
    "epoch_batches",
    "flatten",
    "label_places",
    "load",
    "prompts",
    "read",
    "read_sides",
    "recipe_for",
    "sequences_of",
    "split_pair",
]
