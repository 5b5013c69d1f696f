"""What is minimised: rows to tokens, tokens to batches, batches to a loss, and how it is evaluated.

`Objective` is the next-token objective, and what others derive from: an objective from outside overrides what it does otherwise
and is put into `registry.OBJECTIVES`. The loop, checkpoints, memory budget and out-of-memory recovery work with any of them,
because a step's loss is a sum over its batches divided by their weight together (not a mean of means), however rows are dealt
to forward passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lownibble.config import DataConfig
from lownibble.data import Batch, Choice, Dataset, Encoded, Example, choices, encode, split_pair
from lownibble.errors import ConfigError
from lownibble.training.evaluate import Evaluator
from lownibble.training.loss import label_loss
from lownibble.training.microbatches import Collate, collator


class Objective:
    """Mean cross-entropy of the next token over label tokens."""

    def encode(self, dataset: Dataset, tokenizer: Any, data: DataConfig, max_length: int) -> Encoded:
        """Rows as tokens, and which of them are labels."""
        return encode(dataset, tokenizer, data, max_length)

    def check(self, model: Any, encoded: list[Encoded], data: DataConfig) -> None:
        """Raise unless the rows of both sides are what the model takes.

        Raises:
            ConfigError, DataError: an encoder-decoder model has no prompt to read, or a row has several answers.
        """
        if not model.config.is_encoder_decoder:
            return
        if encoded[0].form == "text" or not data.mask_prompt:
            raise ConfigError(
                f"{type(model).__name__} has an encoder, which reads the prompt; text alone and mask_prompt=False leave none. "
                "Give prompt and completion (or templates), and mask_prompt=True."
            )
        for side in encoded:
            for example in side.examples:
                split_pair(example)

    def choices(
        self, train: Dataset, evaluation: Dataset, tokenizer: Any, data: DataConfig, max_length: int
    ) -> list[Choice] | None:
        """The evaluation rows as multiple choice, where the data are labels; else None."""
        return choices(train, evaluation, tokenizer, data, max_length)

    def collate(self, model: Any, tokenizer: Any) -> Collate:
        """How rows become one forward pass."""
        return collator(model, tokenizer)

    def weight(self, batch: Batch) -> int:
        """What the batch counts for: a step's loss is divided by the sum of its batches' weights."""
        return batch.n_label_tokens

    def loss(self, model: Any, batch: Batch, total: int) -> Tensor:
        """The batch's losses, summed and divided by `total`: () float32, ready for backward. The batch is on the model's
        device."""
        return label_loss(model, batch.input_ids, batch.attention_mask, batch.labels, total, batch.segments, batch.source)

    def evaluator(
        self, examples: list[Example], choices: list[Choice] | None, collate: Collate, batch_size: int, device: torch.device
    ) -> Evaluator:
        """What evaluates the model on held-out rows."""
        return Evaluator(examples, choices, collate, batch_size, device)


NEXT_TOKEN = Objective()
