"""Training objectives: tokenisation, collation, loss and evaluation.

`Objective` is the next-token objective and the base class of others: an external objective overrides the methods that differ and
is added to `registry.OBJECTIVES`. The loop, checkpoints, memory budget and out-of-memory recovery work with any objective,
because a step's loss is a sum over its microbatches divided by their total weight (not a mean of means), however rows are split
into microbatches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lownibble.calibration.rows import positions
from lownibble.config import DataConfig, TrainConfig
from lownibble.data import Batch, Choice, Dataset, Encoded, Example, choices, encode, sequences_of, split_pair
from lownibble.errors import ConfigError, DataError
from lownibble.training.distributed import Ranks
from lownibble.training.evaluate import Evaluator
from lownibble.training.loss import loss_at
from lownibble.training.microbatches import Collate, collator
from lownibble.training.passes import Passes

COMPUTED_ONCE = ("embed_positions", "pos_encoding")
"""Names that transformers gives to tables of positions that are not learned (GPT-J, CodeGen, CTRL)."""

MOST_BEFORE = 2
"""Rows that a table of positions may have before the first (OPT, BART)."""


class Objective:
    """Mean cross-entropy of the next token over label tokens."""

    def of(self, config: TrainConfig) -> Objective:
        """The objective with the options of a run; this one has none."""
        return self

    def check_rows(self, dataset: Dataset, data: DataConfig) -> None:
        """Check what `load` does not, before a model is loaded.

        Raises:
            DataError: rows are bad. ConfigError: an option of `data` is not for this objective.
        """

    def encode(self, dataset: Dataset, tokenizer: Any, data: DataConfig, max_length: int) -> Encoded:
        """Tokenise the rows of a data set, with label flags."""
        return encode(dataset, tokenizer, data, max_length)

    def check(self, model: Any, encoded: list[Encoded], data: DataConfig) -> None:
        """Check that the rows of both splits suit the model.

        Raises:
            ConfigError, DataError: rows for an encoder-decoder model have no prompt, or several answers; a token has no row in
                the embeddings, or a position none in the model's table.
        """
        check_tokens(model, encoded)
        if not model.config.is_encoder_decoder:
            check_positions(model, encoded)
            return
        if encoded[0].form == "text" or not data.mask_prompt:
            raise ConfigError(
                f"{type(model).__name__} has an encoder, which reads the prompt; text alone and mask_prompt=False leave none. "
                "Give prompt and completion (or templates), and mask_prompt=True."
            )
        for side in encoded:
            for example in side.examples:
                split_pair(example)
        check_positions(model, encoded)

    def choices(
        self, train: Dataset, evaluation: Dataset, tokenizer: Any, data: DataConfig, max_length: int
    ) -> list[Choice] | None:
        """The evaluation rows as multiple choice for classification data, else None."""
        return choices(train, evaluation, tokenizer, data, max_length)

    def collate(self, model: Any, tokenizer: Any) -> Collate:
        """The function that collates rows into one batch."""
        return collator(model, tokenizer)

    def weight(self, batch: Batch) -> int:
        """The batch's weight: a step's loss is divided by the sum of its microbatches' weights."""
        return batch.n_label_tokens

    def prepare(self, batches: list[Batch], passes: Passes, ranks: Ranks) -> None:
        """Called with a step's microbatches before their passes; again where the step begins again with smaller ones."""

    def loss(self, model: Any, batch: Batch, total: int | Tensor) -> Tensor:
        """Sum of the batch's losses divided by `total`: () float32, ready for backward. The batch is on the model's device.

        `total` is a tensor, () float32, in passes that become CUDA graphs; only for this loss, not for an override.
        """
        return loss_at(model, batch.input_ids, batch.mask, *batch.label_places, total, batch.segments, batch.source)

    def evaluator(
        self, examples: list[Example], choices: list[Choice] | None, collate: Collate, batch_size: int, device: torch.device
    ) -> Evaluator:
        """The evaluator for held-out rows."""
        return Evaluator(examples, choices, collate, batch_size, device)


def check_tokens(model: Any, encoded: list[Encoded]) -> None:
    """Check that all tokens have embeddings.

    Raises:
        DataError: one has none.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    for side in encoded:
        for example in side.examples:
            largest = max(example.input_ids, default=0)
            if largest >= rows:
                raise DataError(
                    f"{example.origin}: token {largest} has no row in the embeddings, which have {rows}: the tokenizer knows "
                    "more tokens than the model. Use the model's own tokenizer, or, in Python, resize the embeddings "
                    f"(model.resize_token_embeddings({largest + 1}) or more) before add_lora, with modules_to_save naming them."
                )


def check_positions(model: Any, encoded: list[Encoded]) -> None:
    """Check that all positions of a model with a table of them are in it: on CUDA one that is not ends the process.

    Raises:
        DataError: a row is too long.
    """
    if (held := table_of_positions(model)) is None:
        return
    for side in encoded:
        for example in side.examples:
            if model.config.is_encoder_decoder:  # both of its inputs get one token more
                n_tokens = max(map(len, split_pair(example))) + 1
            else:
                others = [other] if (other := getattr(example.beside, "mismatched", None)) else []
                n_tokens = max(len(ids) for each in (example, *others) for ids, _ in sequences_of(each))
            if n_tokens > held:
                raise DataError(
                    f"{example.origin}: a row of {n_tokens} tokens, and {type(model).__name__} has {held} positions. Set "
                    f"max_length={held} (--max-length {held}), or less."
                )


def table_of_positions(model: Any) -> int | None:
    """The number of positions of a model that looks them up in a table (learned, or computed once for all), or None."""
    held, decoder = positions(model), model.get_decoder()
    n_tokens = model.get_input_embeddings().weight.shape[0]
    rows = {module.num_embeddings for module in decoder.modules() if isinstance(module, nn.Embedding)} - {n_tokens}
    rows |= {table.shape[0] for name, table in decoder.named_buffers() if name.rpartition(".")[2] in COMPUTED_ONCE}
    return held if held and any(0 <= n - held <= MOST_BEFORE for n in rows) else None


NEXT_TOKEN = Objective()
