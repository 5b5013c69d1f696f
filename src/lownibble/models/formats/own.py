"""bitsandbytes' 4-bit layers, and those that this package writes: their codecs read their own files (`models/packed.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.models import packed as packed_files
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.formats.layer import Found, Layer
from lownibble.quant import PackedWeight

METHOD = packed_files.OWN_METHOD


class OwnLayer(Layer):
    """A layer that its codec reads, or the weights of experts."""

    def __init__(self, checkpoint: Checkpoint, path: str, quant_type: str, keys: tuple[str, ...]) -> None:
        self._checkpoint, self._path = checkpoint, path
        of_experts = packed_files.is_of_experts(checkpoint, path, quant_type)
        self.name, self.keys, self.quant_type = path if of_experts else f"{path}.weight", keys, quant_type

    @cached_property
    def shape(self) -> torch.Size:
        """The shape of the weight; reads it."""
        return self.packed(torch.float32).shape

    @cached_property
    def options(self) -> QuantConfig:
        """Configuration of its codec."""
        assert self.quant_type is not None
        return packed_files.options(self._checkpoint, self._path, self.quant_type)

    def packed(self, dtype: torch.dtype) -> PackedWeight:
        """The weight in its codec."""
        assert self.quant_type is not None
        return packed_files.read(self._checkpoint, self._path, self.quant_type, dtype)

    def dense(self) -> Tensor:
        """The decoded weight."""
        return self.packed(torch.float32).dequantize(torch.float32)


def find(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """The layers whose codecs' markers are there."""
    kinds = packed_files.packed_modules(checkpoint.file_of)
    keys: dict[str, list[str]] = {path: [f"{path}.weight"] for path in kinds}
    for key in checkpoint.file_of:
        path, found, _ = key.partition(".weight.")
        if found and path in keys:
            keys[path].append(key)
    layers = (OwnLayer(checkpoint, path, kinds[path], tuple(keys[path])) for path in kinds)
    return Found({layer.name: layer for layer in layers})
