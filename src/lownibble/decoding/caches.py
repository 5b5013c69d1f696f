"""The contexts of sequences that transformers' modules decode: keys and values in slots, or transformers' own caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lownibble.decoding.static import StaticSteps
from lownibble.kernels.rows import Attending


@dataclass
class Layer:
    """Keys (slots, key heads, capacity, head_dim) and values of a layer."""

    keys: Tensor
    values: Tensor


@dataclass
class SlotCache:
    """Keys and values of all sequences, by layer; allocated when a layer first runs."""

    slots: int
    capacity: int
    layers: dict[int, Layer] = field(default_factory=dict)
    told: dict[int, Attending] = field(default_factory=dict)
    """How each layer has asked to attend, when it first ran."""
    steps: StaticSteps | None = None
    """What runs steps of one token of each row, made by the first of them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers.values())

    def resume(self, slot: int, n: int) -> int:
        """Later keys and values are written over."""
        return n

    def fork(self, source: int, slot: int, n: int) -> None:
        """Copy the first n tokens of another slot."""
        for layer in self.layers.values():
            layer.keys[slot, :, :n] = layer.keys[source, :, :n]
            layer.values[slot, :, :n] = layer.values[source, :, :n]


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

    def resume(self, slot: int, n: int) -> int:
        """Cut what is beyond n tokens; a cache of windows or recurrent states cannot be cut, and starts anew."""
        if n and n == self.lengths.get(slot, 0):
            return n
        layers: Any = getattr(self.past.get(slot), "layers", None)
        if n and layers and all(type(layer) is DynamicLayer for layer in layers):
            for layer in layers:
                layer.keys, layer.values = (t[..., :n, :] for t in (layer.keys, layer.values))
            self.lengths[slot] = n
            return n
        self.past.pop(slot, None)
        self.lengths.pop(slot, None)
        return 0


def _bytes_within(value: Any) -> int:
    """Bytes of the tensors in transformers' cache."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes_within, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_within, value))
    return sum(map(_bytes_within, vars(value).values())) if type(value).__module__.startswith("transformers.") else 0
