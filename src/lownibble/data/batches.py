"""Collation (padding or packing) and deterministic batch order.

The order depends on (seed, epoch) only and comes from a private generator: global random state is neither read nor advanced,
so evaluation, dropout and data loading cannot affect each other. Resuming at batch k recomputes the orders of all epochs up to
that batch's (packed epochs differ in their number of batches) without building any batch.

`group_by_length` follows transformers: shuffle, split into chunks of 50 batches, sort each chunk by length, split into batches.
Packing (`packing.py`) concatenates rows without padding. Both shuffle the order of the batches, but put the largest first so
that running out of memory shows at once.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lownibble.data.packing import joined, pack, packed_batches
from lownibble.data.template import Example
from lownibble.errors import DataError
from lownibble.transfers import to_device

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label value excluded from the loss (Hugging Face's convention)."""

CHUNK_BATCHES = 50


@dataclass
class Batch:
    """Padded examples, or packed ones in a single row; each tensor is (B, T) int64.

    `labels` are unshifted, with -100 where there is no loss, as transformers' models expect. `segments` are the lengths of
    packed examples (then B is 1 and T their sum), or None. For an encoder-decoder model, `source_ids` and `source_mask` (B, S)
    are the encoder's input and the other tensors the decoder's, which begins with the decoder start token.

    `to` sets what only the host can know without waiting for the device: `padded`, whether there is padding, and `places`, the
    label places (see `label_places`). A changed copy (`dataclasses.replace`) finds out again; tensors are not changed in place.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    segments: tuple[int, ...] | None = None
    source_ids: torch.Tensor | None = None
    source_mask: torch.Tensor | None = None
    padded: bool | None = field(default=None, init=False)
    places: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False)

    @property
    def is_padded(self) -> bool:
        """Whether the batch has padding."""
        return not bool(self.attention_mask.all()) if self.padded is None else self.padded

    @property
    def mask(self) -> torch.Tensor | None:
        """The attention mask that the model needs: none for a decoder's rows without padding."""
        return self.attention_mask if self.is_padded or self.source_mask is not None else None

    @property
    def label_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's `label_places`."""
        return label_places(self.labels) if self.places is None else self.places

    @property
    def source(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Token ids and attention mask of the encoder input, or None."""
        return None if self.source_ids is None or self.source_mask is None else (self.source_ids, self.source_mask)

    @property
    def n_rows(self) -> int:
        """Number of examples in the batch."""
        return len(self.segments) if self.segments else len(self.input_ids)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, padding excluded."""
        return int(self.attention_mask.sum()) + (0 if self.source_mask is None else int(self.source_mask.sum()))

    @property
    def n_padded_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.input_ids.numel() + (0 if self.source_ids is None else self.source_ids.numel())

    @property
    def n_label_tokens(self) -> int:
        """Number of positions in the loss: labels after the shift by one."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Move the batch to a device, without waiting for it."""
        held = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "labels", "source_ids", "source_mask")}
        moved: dict[str, Any] = {name: to_device(tensor, device) for name, tensor in held.items() if tensor is not None}
        places, labels = self.label_places
        batch = replace(self, **moved)
        batch.padded, batch.places = self.is_padded, (to_device(places, device), to_device(labels, device))
        return batch


def label_places(labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(L,) indices into the flattened (B, T) of positions whose next token is a label, and (L,) those labels."""
    targets_BT = labels_BT[:, 1:]
    is_label_BT = targets_BT != IGNORE
    row_L, column_L = is_label_BT.nonzero(as_tuple=True)
    return row_L * labels_BT.shape[1] + column_L, targets_BT[is_label_BT]


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Collate examples into one batch (B, T), right-padded to the longest.

    `pad_token_id` may be the end-of-sequence token: the attention mask marks padding, and `is_label` marks labels.
    """
    import torch

    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids, is_label = _tensors(example.input_ids, example.is_label)
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = ids.masked_fill(~is_label, IGNORE)
    return Batch(input_ids, attention_mask, labels)


def _tensors(ids: Sequence[int], is_label: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 and bool tensors, through buffers: `torch.tensor` takes twenty times as long, while which a GPU would wait."""
    import torch

    if not len(ids):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    return torch.frombuffer(array("q", ids), dtype=torch.int64), torch.frombuffer(bytearray(is_label), dtype=torch.bool)


def split_pair(example: Example) -> tuple[list[int], list[int]]:
    """Split an example into encoder input (the tokens before the first label) and decoder output (the rest).

    Raises:
        DataError: no token precedes the labels, or the labels are not one contiguous span at the end.
    """
    first = example.is_label.index(True) if True in example.is_label else 0
    if first < 1 or not all(example.is_label[first:]):
        raise DataError(
            f"{example.origin}: an encoder-decoder model needs a prompt and one completion in each row. Give rows with both "
            "(prompt and completion, text and label, templates), and leave mask_prompt on."
        )
    return example.input_ids[:first], example.input_ids[first:]


def encoder_ids(prompt: Sequence[int], end: int) -> list[int]:
    """A prompt as encoder input: the end-of-sequence token is appended unless already there."""
    return [*prompt] if prompt and prompt[-1] == end else [*prompt, end]


def collate_pairs(examples: Sequence[Example], pad_token_id: int, start: int, end: int) -> Batch:
    """Collate examples for an encoder-decoder model: encoder input is the prompt and `end`, decoder input `start` + completion.

    Raises:
        DataError: a row is not a prompt and a completion.
    """
    pairs = [split_pair(example) for example in examples]
    sources = [encoder_ids(ids, end) for ids, _ in pairs]
    read = collate([Example(ids, [False] * len(ids), "") for ids in sources], pad_token_id)
    written = collate([Example([start, *ids], [False] + [True] * len(ids), "") for _, ids in pairs], pad_token_id)
    return replace(written, source_ids=read.input_ids, source_mask=read.attention_mask)


def flatten(examples: Sequence[Example]) -> Batch:
    """Pack examples into one row (1, sum of lengths) without padding; the first token of an example is never a label."""
    import torch

    segments = tuple(len(example.input_ids) for example in examples)
    ids, is_label = _tensors(
        [token for example in examples for token in example.input_ids],
        [flag for example in examples for flag in (False, *example.is_label[1:])],
    )
    input_ids = ids.unsqueeze(0)
    return Batch(input_ids, torch.ones_like(input_ids), input_ids.masked_fill(~is_label, IGNORE), segments)


def epoch_batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int, group_by_length: bool = False,
    pack_to: int | None = None, share: tuple[int, int] = (0, 1),
) -> list[list[int]]:  # fmt: skip
    """The batches of one epoch as lists of example indices; each example occurs once and one batch may be short.

    With `pack_to`, a batch is `batch_size` packs of at most `pack_to` tokens each. `share`, (i, n): only the i-th of n shares of
    each batch, as large as the others but for a short batch's.
    """
    first, step = share
    generator = random.Random(f"{seed}:{epoch}")
    order = list(range(len(examples)))
    generator.shuffle(order)
    if not group_by_length and pack_to is None:
        return [batch[first::step] for batch in _cut(order, batch_size)]
    lengths = [len(example.input_ids) for example in examples]
    if pack_to is not None:
        of_packs = packed_batches(order, lengths, batch_size, pack_to, generator)
        sizes = [sum(lengths[j] for pack in packs for j in pack) for packs in of_packs]
        batches = [joined(packs[first::step], lengths) for packs in of_packs]
    else:
        by_length = [
            index
            for chunk in _cut(order, CHUNK_BATCHES * batch_size)
            for index in sorted(chunk, key=lengths.__getitem__, reverse=True)
        ]
        batches = _cut(by_length, batch_size)
        generator.shuffle(batches)
        sizes = [len(batch) * max(lengths[j] for j in batch) for batch in batches]
        batches = [batch[first::step] for batch in batches]
    largest = sizes.index(max(sizes))
    batches[0], batches[largest] = batches[largest], batches[0]
    return batches


def cut(
    lengths: Sequence[int], max_tokens: int | None, *, most: int | None = None, packed: bool = False
) -> list[list[int]]:  # fmt: skip
    """Split examples, longest first, into batches (lists of indices) of at most `max_tokens` tokens, padding included, and at
    most `most` examples; a longer example gets its own batch. With `packed`, batches are packs and `most` is ignored."""
    max_tokens = sys.maxsize if max_tokens is None else max_tokens
    if packed:
        return pack(range(len(lengths)), lengths, max_tokens)
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        full = not batches or len(batches[-1]) == most
        if full or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
