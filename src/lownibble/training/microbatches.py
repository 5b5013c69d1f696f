"""Microbatches: the batches of each step, and how they are split to fit into memory.

A step is `gradient_accumulation_steps` batches of `batch_size` rows (with packing: packs). If a batch does not fit into memory,
all rows of the step are redistributed over microbatches of at most `max_tokens` tokens, padding included: rows of similar length
together, longest first. The step's rows stay the same, and so do its loss and gradient, which are sums over rows divided by the
label tokens of the whole step. The limit is in tokens because memory scales with tokens: a limit in rows that fits the longest
rows would leave most of the memory unused on all others.

Of preferences, tokens that sequences begin with alike may be computed once (`share_prefixes`). Then a row counts for the tokens
that are computed of it alone, and nothing is padded; what rows share with each other makes a microbatch smaller than its limit.

On several ranks each has its share of the same step's rows (`Ranks.deal`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from heapq import heappop, heappush
from typing import Any

from lownibble.config import TrainConfig
from lownibble.data import (
    IGNORE,
    Batch,
    Example,
    PreferenceBatch,
    collate,
    collate_pairs,
    cut,
    epoch_batches,
    flatten,
    sequences_of,
)
from lownibble.errors import ModelError
from lownibble.planning.step import Batch as Shape
from lownibble.training.distributed import ALONE, Ranks

Rows = list[list[Example]]
"""The rows of one step, by batch or microbatch."""


Collate = Callable[[list[Example]], Batch]
"""Collates rows into one padded batch."""


def padding(tokenizer: Any) -> int:
    """The token that rows are padded with: the tokenizer's, or the end-of-sequence token (padding is masked by position).

    Raises:
        ModelError: the tokenizer has neither.
    """
    if (token := tokenizer.pad_token_id) is not None or (token := tokenizer.eos_token_id) is not None:
        return int(token)
    raise ModelError("The tokenizer has neither a pad_token nor an eos_token to pad rows with. Set its pad_token.")


def collator(model: Any, tokenizer: Any) -> Collate:
    """The collate function for a model.

    Raises:
        ModelError: the tokenizer has no token to pad with; or an encoder-decoder model lacks its decoder start or
            end-of-sequence token.
    """
    pad = padding(tokenizer)
    if not model.config.is_encoder_decoder:
        return partial(collate, pad_token_id=pad)
    start, end = model.config.decoder_start_token_id, tokenizer.eos_token_id
    if start is None or end is None:
        what = "decoder_start_token_id in config.json" if start is None else "eos_token in tokenizer_config.json"
        raise ModelError(f"{type(model).__name__} cannot be trained: it lacks its {what}. Set it.")
    return partial(collate_pairs, pad_token_id=pad, start=int(start), end=int(end))


class MicroBatches:
    """The microbatches of a run over `rows`, on one of its ranks.

    Attributes:
        max_tokens: maximum tokens per microbatch, padding included (a longer row gets its own); None: batches as configured.
        shares: tokens that sequences begin with alike are computed once.
        ranks: the processes of the run.
        batch_size, n_batches: rows (packs) of a batch, and batches of a step, on this rank.
    """

    def __init__(self, rows: list[Example], config: TrainConfig, collate: Collate, ranks: Ranks = ALONE) -> None:
        self.rows, self.config, self.collate, self.ranks = rows, config, collate, ranks
        self.batch_size, self.n_batches = ranks.deal(config)
        self.pack_to = config.max_length if config.packing else None
        self.max_tokens: int | None = None
        self.shares = False
        self._sort()

    def _sort(self) -> None:
        self._by_length = sorted(self.rows, key=self.length, reverse=True)
        self._lengths = [self.length(row) for row in self._by_length]

    def share_prefixes(self) -> None:
        """Count tokens that sequences begin with alike once; before anything else is asked."""
        self.shares = True
        self._sort()

    def length(self, row: Example) -> int:
        """Tokens that are computed of a row."""
        return (self.shares and row.beside.n_computed) or len(row.input_ids)

    @property
    def _is_padded(self) -> bool:
        return self.pack_to is None and not self.shares

    def steps(self, first_step: int = 0) -> Iterator[Rows]:
        """This rank's rows of each step from `first_step` on, endlessly. An epoch's last step has the remaining batches; a short
        batch, or such a step, may leave a rank without rows."""
        count, (first, n_ranks) = self.config.gradient_accumulation_steps, self._share_of_batches
        for epoch in itertools.count():
            batches = self._of_epoch(epoch)
            starts = range(0, len(batches), count)
            for start in starts[first_step:]:
                yield [[self.rows[i] for i in batch] for batch in batches[start : start + count][first::n_ranks] if batch]
            first_step = max(0, first_step - len(starts))

    def _of_epoch(self, epoch: int) -> list[list[int]]:
        config = self.config
        share = (self.ranks.rank, self.ranks.world) if self._splits_batches else (0, 1)
        return epoch_batches(self.rows, config.batch_size, config.seed, epoch, config.group_by_length, self.pack_to, share)

    @property
    def _splits_batches(self) -> bool:
        """Whether ranks share each batch, rather than the batches of a step."""
        return self.batch_size < self.config.batch_size

    @property
    def _share_of_batches(self) -> tuple[int, int]:
        return (0, 1) if self._splits_batches else (self.ranks.rank, self.ranks.world)

    def batches(self, rows: Rows) -> list[Batch]:
        """The microbatches of a step."""
        return [self.batch(batch) for batch in self.dealt(rows)]

    def tokens(self, batch: list[Example]) -> int:
        """Number of tokens of a microbatch of these rows, padding included."""
        lengths = [self.length(row) for row in batch]
        return len(batch) * max(lengths) if self._is_padded else sum(lengths)

    def computed(self, batch: Batch) -> int:
        """Number of tokens that the layers see of a microbatch, padding included."""
        prefixes = batch.prefixes if self.shares and isinstance(batch, PreferenceBatch) else None
        return (batch if prefixes is None else prefixes).input_ids.numel()

    def shape(self, batch: list[Example]) -> Shape:
        """The shape of a microbatch of these rows, for the planner; what rows share with each other is not taken off."""
        padded = self.batch(batch)
        if padded.source_ids is not None:  # the planner takes labels / rows as the decoder's length
            return Shape(len(batch), padded.source_ids.shape[1], padded.input_ids.numel())
        labels, tokens = sum(sum(row.is_label[1:]) for row in batch), self.tokens(batch)
        if self.shares:
            return Shape(1, tokens, labels, padded.n_tokens / tokens)
        sequences, length = padded.input_ids.shape
        return Shape(sequences, length, labels)

    def dealt(self, rows: Rows) -> Rows:
        """The rows of each microbatch of a step."""
        if self.max_tokens is None:
            return rows
        flat = [row for batch in rows for row in batch]
        dealt = cut([self.length(row) for row in flat], self.max_tokens, packed=not self._is_padded)
        return [[flat[i] for i in batch] for batch in dealt]

    def batch(self, rows: list[Example]) -> Batch:
        """Collate or pack rows into one microbatch."""
        return self.collate(rows) if self.pack_to is None else flatten(rows)

    def empty(self) -> Batch:
        """A microbatch without labels, for a rank whose share of a step is used up while others still run passes."""
        return self.batch([Example(self.rows[0].input_ids[:2], [False] * len(self.rows[0].input_ids[:2]), "no row")])

    def steps_of_epochs(self, epochs: float) -> int:
        """Number of optimiser steps in `epochs` epochs; packed epochs differ in their number of batches."""
        whole, part = divmod(epochs, 1)
        count = self.config.gradient_accumulation_steps
        steps = [-(-len(self._of_epoch(epoch)) // count) for epoch in range(math.ceil(epochs))]
        last = math.ceil(round(steps[-1] * part, 6)) if part else 0
        return sum(steps[: int(whole)]) + last

    def planned_tokens(self, steps: int) -> int:
        """Approximate number of tokens of this rank in `steps` steps."""
        config = self.config
        mean = sum(self._lengths) / len(self._lengths)
        batch = self.batch_size * config.max_length if config.packing else min(self.batch_size, len(self.rows)) * mean
        return int(steps * self.n_batches * batch)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row, the lower limit for a microbatch."""
        return self._lengths[0]

    @property
    def whole(self) -> int:
        """Maximum tokens of a batch as configured, padding included."""
        if self._is_padded:
            return min(self.batch_size, len(self.rows)) * self.longest_row
        if self.pack_to is None:
            return sum(self._lengths[: self.batch_size])
        return min(self.batch_size * self.pack_to, sum(self._lengths))

    def size(self, tokens: int) -> int:
        """Tokens of the largest microbatch of at most `tokens` tokens, padding included."""
        rows = self._longest(tokens)
        packed = sum(len(row.input_ids) for row in rows)
        return len(rows) * len(rows[0].input_ids) if rows and self._is_padded else packed

    def largest(self, tokens: int) -> Batch:
        """The largest microbatch of at most `tokens` tokens that `batches` can make, with the maximum label tokens of any;
        if `tokens` is below the longest row's, the beginning of that row."""
        rows = [row.input_ids * self._sequences for row in self._longest(tokens)]
        batch = self.batch([Example(ids, [False] * len(ids), "dry run") for ids in rows])
        places = batch.attention_mask.clone()
        places[:, 0] = 0
        places = places.flatten().nonzero()[:, 0][: self._most_labels(tokens)]
        batch.labels.fill_(IGNORE).view(-1)[places] = batch.input_ids.view(-1)[places]
        return batch

    def _longest(self, tokens: int) -> list[Example]:
        """Rows of so many tokens, longest first; of pairs whose tokens are computed once, one sequence of as many for both, in
        pieces no longer than theirs: positions and masks go no further."""
        rows = self._by_length
        if not self._is_padded:
            chosen, left = [], tokens
            for row in rows:
                taken, most = min(left, self.length(row)), len(row.input_ids) // self._sequences
                pieces = [slice(start, min(start + most, taken)) for start in range(0, taken, most)]
                chosen += [Example(row.input_ids[piece], row.is_label[piece], row.origin) for piece in pieces]
                left -= taken
            return chosen
        if tokens < self.longest_row:
            return [Example(rows[0].input_ids[:tokens], rows[0].is_label[:tokens], rows[0].origin)]
        return max(
            (rows[first : first + min(tokens // n, self._rows_of_a_step)] for n, first in _firsts(self._lengths)),
            key=lambda found: len(found) * len(found[0].input_ids),
        )

    @property
    def _rows_of_a_step(self) -> int:
        return min(self.batch_size * self.n_batches, len(self.rows))

    def _most_labels(self, tokens: int) -> int:
        """Upper limit for the label tokens of a microbatch of `tokens` tokens."""
        labels = used = most = 0
        if not self._is_padded:
            for count, length in self._densest:
                labels, used = labels + count, used + length
                if used >= tokens:
                    break
            return min(labels, tokens * self._sequences)
        tokens = max(tokens, self.longest_row)
        kept: list[int] = []
        for count, length in reversed(self._label_counts):  # shortest first: the number that fits falls; keep the most labels
            heappush(kept, count)
            labels += count
            while len(kept) > min(tokens // length, self._rows_of_a_step):
                labels -= heappop(kept)
            most = max(most, labels)
        return most

    @property
    def _sequences(self) -> int:
        """Sequences of a row that share tokens."""
        return len(sequences_of(self.rows[0])) if self.shares else 1

    @cached_property
    def _label_counts(self) -> list[tuple[int, int]]:
        """(label tokens, tokens) of all rows, longest first."""
        return [(sum(row.is_label[1:]), self.length(row)) for row in self._by_length]

    @cached_property
    def _densest(self) -> list[tuple[int, int]]:
        """The same, largest fraction of label tokens first."""
        return sorted(self._label_counts, key=lambda row: row[0] / row[1], reverse=True)


def _firsts(lengths: list[int]) -> list[tuple[int, int]]:
    """(length, index of its first occurrence) for lengths in descending order."""
    return [(n, i) for i, n in enumerate(lengths) if i == 0 or n != lengths[i - 1]]
