"""Examples to batches: padding, and the order in which batches come.

The order is a function of (seed, epoch) alone, from a generator of its own: global random state is neither read nor
advanced, so evaluation, dropout and data loading cannot disturb each other. A resumed run asks for the stream from batch k;
only the order of k's epoch is worked out, no batch is skipped one by one.

`group_by_length` is transformers' scheme: shuffle, cut into chunks of 50 batches, sort each by length, cut into batches.
Batches then come in shuffled order, except that the largest comes first: if memory does not suffice, it shows at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lownibble.data.template import Example

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""The label that takes no loss (Hugging Face's convention)."""

CHUNK_BATCHES = 50


@dataclass
class Batch:
    """Padded examples; each tensor is (B, T) int64.

    `labels` are unshifted and -100 where there is no loss, as transformers' models take them.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    @property
    def n_label_tokens(self) -> int:
        """Positions that take a loss: labels after the shift by one."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Examples as one batch (B, T), padded on the right to the longest.

    `pad_token_id` may be the end-of-sequence token: padding is told by the attention mask, and labels by `is_label`.
    """
    import torch

    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = ids.masked_fill(~torch.tensor(example.is_label), IGNORE)
    return Batch(input_ids, attention_mask, labels)


def n_batches(n_examples: int, batch_size: int) -> int:
    """Batches in one epoch; the last may be short."""
    return -(-n_examples // batch_size)


def epoch_batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int, group_by_length: bool = False
) -> list[list[int]]:
    """The batches of one epoch as lists of example indices; each example occurs once."""
    generator = random.Random(f"{seed}:{epoch}")
    order = list(range(len(examples)))
    generator.shuffle(order)
    if not group_by_length:
        return _cut(order, batch_size)
    lengths = [len(example.input_ids) for example in examples]
    by_length = [
        index
        for chunk in _cut(order, CHUNK_BATCHES * batch_size)
        for index in sorted(chunk, key=lengths.__getitem__, reverse=True)
    ]
    batches = _cut(by_length, batch_size)
    generator.shuffle(batches)
    largest = max(range(len(batches)), key=lambda i: len(batches[i]) * max(lengths[j] for j in batches[i]))
    batches[0], batches[largest] = batches[largest], batches[0]
    return batches


def stream(
    examples: Sequence[Example], batch_size: int, seed: int, group_by_length: bool = False, start_batch: int = 0
) -> Iterator[list[int]]:
    """Batches without end, epoch after epoch, from batch number `start_batch` on, as lists of example indices."""
    epoch, skip = divmod(start_batch, n_batches(len(examples), batch_size))
    while True:
        yield from epoch_batches(examples, batch_size, seed, epoch, group_by_length)[skip:]
        epoch, skip = epoch + 1, 0


def eval_batches(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """All examples once, longest first, as lists of indices; for sums, where the order does not matter."""
    return _cut(sorted(range(len(examples)), key=lambda index: -len(examples[index].input_ids)), batch_size)


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
