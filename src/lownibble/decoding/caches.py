"""The contexts of sequences that transformers' modules decode: keys and values in slots, or transformers' own caches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lownibble.decoding.spans import Copied, Part, Span
from lownibble.decoding.static import StaticSteps
from lownibble.errors import InputError
from lownibble.kernels.rows import Attending


@dataclass
class Layer:
    """Keys (slots, key heads, places, head_dim) and values of a layer, and which positions they are of."""

    keys: Tensor
    values: Tensor
    span: Span


class SlotCache:
    """Keys and values of all sequences, by layer; allocated when a layer first runs.

    Args:
        windows: of the layers; those of another window keep all positions.
    Attributes:
        spans: by window, which positions are kept.
        told: how each layer has asked to attend, when it first ran.
        steps: what runs steps of one token of each row, made by the first of them.
    """

    def __init__(self, slots: int, capacity: int, windows: Iterable[int | None] = (None,)) -> None:
        self.slots, self.capacity = slots, capacity
        self.spans = {window: Span(window, slots, capacity) for window in windows}
        self.layers: dict[int, Layer] = {}
        self.told: dict[int, Attending] = {}
        self.steps: StaticSteps | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers.values())

    def enter(self, parts: Sequence[Part]) -> None:
        """Make room for a step's tokens, before any layer writes them.

        Raises:
            InputError: it is not there, or earlier positions that the tokens see are lost.
        """
        for part in parts:
            if (end := part.position + part.end - part.begin) > self.capacity:
                raise InputError(f"A slot of the cache takes {self.capacity} tokens; the step needs {end}.")
            for span in self.spans.values():
                for copied in span.enter(part):
                    self._copy(span, part.slot, part.slot, copied)

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """(windows, T) int64: where tokens are in their slots, by window."""
        return positions - torch.tensor([span.first for span in self.spans.values()])[:, slots]

    def reach(self, slot: int, n: int) -> int:
        """As `Cache.reach`."""
        found = min(span.reach(slot, n) for span in self.spans.values())
        return found if all(span.keeps(slot, found) for span in self.spans.values()) else 0

    def resume(self, slot: int, n: int) -> int:
        """Later keys and values are written over."""
        return self.reach(slot, n)

    def mark(self, slot: int, n: int) -> None:
        """As `Forking.mark`."""
        for span in self.spans.values():
            span.mark[slot] = n

    def fork(self, source: int, target: int, n: int) -> None:
        """As `Forking.fork`."""
        for span in self.spans.values():
            self._copy(span, source, target, span.fork(source, target, n))

    def _copy(self, span: Span, source: int, target: int, copied: Copied) -> None:
        """Copy places of a slot to another, or within it."""
        begin, end, to = copied
        for layer in (layer for layer in self.layers.values() if layer.span is span):
            for held in (layer.keys, layer.values):
                piece = held[source, :, begin:end]
                held[target, :, to : to + end - begin] = piece.clone() if source == target else piece  # they may overlap


@dataclass
class PastCache:
    """transformers' own cache of each sequence, and how many tokens it has."""

    slots: int
    capacity: int
    past: dict[int, Any] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of what the sequences hold now."""
        return sum(map(self.slot_bytes, self.past))

    def slot_bytes(self, slot: int) -> int:
        """Bytes of what a sequence holds now."""
        return _bytes_within(self.past[slot])

    def reach(self, slot: int, n: int) -> int:
        """As `Cache.reach`: a cache of windows or recurrent states cannot be cut."""
        layers: Any = getattr(self.past.get(slot), "layers", None)
        can_cut = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
        return n if can_cut or n == self.lengths.get(slot, 0) else 0

    def resume(self, slot: int, n: int) -> int:
        """Cut what is beyond n tokens, or start anew."""
        n = self.reach(slot, n)
        if not n:
            self.past.pop(slot, None)
            self.lengths.pop(slot, None)
            return 0
        if n < self.lengths[slot]:
            for layer in self.past[slot].layers:
                layer.keys, layer.values = (t[..., :n, :] for t in (layer.keys, layer.values))
            self.lengths[slot] = n
        return n


def _bytes_within(value: Any) -> int:
    """Bytes of the tensors in transformers' cache."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes_within, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_within, value))
    return sum(map(_bytes_within, vars(value).values())) if type(value).__module__.startswith("transformers.") else 0
