"""int8 and int4: integers with one scale per group of a row's weights, and for int4 a zero point.

    int8   w = scale * code          code from -127 to 127, scale = max |w| / 127; a group is 32 to 4096 weights, or a row
    int4   w = scale * (code - zero) code and zero from 0 to 15, scale = (max - min) / 15; a group is 32, 64 or 128 weights

The range of an int4 group includes 0, so that zeros stay zeros. With double quantisation the scales are quantised to 8 bits
first (`nested.py`), and weights are rounded with the dequantised scales, which keeps the added error below one code.

There are no kernels for these codecs: matmuls dequantise and multiply (`packed.py`); dequantising runs in parts, so that its
temporaries stay small. Layouts of other tools (GPTQ's, AWQ's) store the same numbers in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.quant import layouts, nested
from lownibble.quant.layouts import Layout
from lownibble.quant.packed import Codec, PackedWeight, dtype_name

PART_ELEMENTS = 2**22
"""Weights dequantised at a time."""


@dataclass(frozen=True)
class IntegerWeight(PackedWeight):
    """A packed int8 or int4 weight.

    Attributes:
        codes: int8 of `shape`, or two 4-bit codes per byte, (n/2, 1) uint8, the first element in the high nibble.
        scale: (groups,) float32, or uint8 codes of it with double quantisation.
        zero: None (int8), or 4-bit zero points, two per byte, (ceil(groups/2),) uint8.
        nested_scale, offset: absmax and offset of double-quantised scales (see `nested.py`), else None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    nested_scale: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    block_size: int | str

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested_scale is not None

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales and zero points."""
        found = {
            "codes": self.codes, "scale": self.scale, "nested_scale": self.nested_scale, "offset": self.offset, "zero": self.zero
        }  # fmt: skip
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def facts(self) -> dict[str, Any]:
        """quant_type, shape, dtype, block size and whether double-quantised."""
        return {
            "quant_type": self.quant_type, "shape": list(self.shape), "dtype": dtype_name(self.dtype),
            "block_size": self.block_size, "double_quant": self.double_quant,
        }  # fmt: skip

    def decoded_scale(self) -> Tensor:
        """The scales in float32, (groups,)."""
        if self.nested_scale is None or self.offset is None:
            return self.scale
        return nested.decode(self.scale, self.nested_scale, self.offset)

    def decode(self, out: Tensor) -> Tensor:
        """Dequantise in torch, some groups at a time; computed in float32 and rounded once."""
        if not self.numel():
            return out
        scale = self.decoded_scale()
        groups, zero = scale.numel(), self.zero
        values, codes = out.view(groups, -1), self.codes.view(groups, -1)
        zeros = None if zero is None else _unpack(zero, torch.empty(2 * zero.numel(), dtype=torch.uint8, device=zero.device))
        step = max(1, PART_ELEMENTS // values.shape[1])
        for first in range(0, groups, step):
            part = slice(first, first + step)
            decoded = values[part] if zeros is None else _unpack(codes[part], values[part])
            if zeros is None:
                decoded.copy_(codes[part])
            else:
                decoded.sub_(zeros[:groups][part].unsqueeze(1))
            decoded.mul_(scale[part].unsqueeze(1))
        return out


def _unpack(packed: Tensor, out: Tensor) -> Tensor:
    """Unpack two codes per byte into `out`, one per element; returns `out`."""
    pairs = out.view(*packed.shape, 2)
    pairs[..., 0] = packed >> 4
    pairs[..., 1] = packed & 15
    return out


def _pack(codes: Tensor) -> Tensor:
    """Pack codes below 16, (n,), two per byte; odd n is padded with a zero."""
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.numel() % 2))
    return (padded[::2] << 4) | padded[1::2]


def _doubly(scale: Tensor, double_quant: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Stored scales, nested scales and offset (None without double quantisation), and the scales as dequantised."""
    if not double_quant:
        return scale, None, None, scale
    codes, nested_scale, offset = nested.encode(scale)
    return codes, nested_scale, offset, nested.decode(codes, nested_scale, offset)


def _steps(groups: Tensor, scale: Tensor) -> Tensor:
    """`groups / scale`; 0 where the scale is 0."""
    return torch.where(scale != 0, groups / scale, 0.0)


class _Int8(Codec):
    def layout(self, shape: Sequence[int], config: QuantConfig) -> Layout:
        return layouts.int8(shape, config)

    def quantize(self, tensor: Tensor, config: QuantConfig, statistics: Tensor | None = None) -> IntegerWeight:
        size = layouts.group_size(tensor.shape, config, layouts.INT8_GROUPS)
        groups = tensor.float().reshape(-1, max(1, size))
        scale = groups.abs().amax(dim=1) / 127 if groups.numel() else groups.new_zeros(len(groups))
        stored, nested_scale, offset, as_decoded = _doubly(scale, config.double_quant)
        codes = _steps(groups, as_decoded.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8).view(tensor.shape)
        return IntegerWeight(
            codes, stored, None, nested_scale, offset, tensor.shape, tensor.dtype, config.quant_type, config.block_size
        )

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IntegerWeight:
        return _restore(facts, tensors)


class _Int4(Codec):
    def layout(self, shape: Sequence[int], config: QuantConfig) -> Layout:
        return layouts.int4(shape, config)

    def quantize(self, tensor: Tensor, config: QuantConfig, statistics: Tensor | None = None) -> IntegerWeight:
        size = layouts.group_size(tensor.shape, config, layouts.INT4_GROUPS)
        groups = tensor.float().reshape(-1, size)
        if groups.numel():
            low, high = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
        else:
            low = high = groups.new_zeros(len(groups))
        stored, nested_scale, offset, as_decoded = _doubly((high - low) / 15, config.double_quant)
        zero = _steps(-low, as_decoded).round().clamp(0, 15)
        codes = (_steps(groups, as_decoded.unsqueeze(1)) + zero.unsqueeze(1)).round().clamp(0, 15)
        return IntegerWeight(
            _pack(codes.flatten()).view(-1, 1), stored, _pack(zero), nested_scale, offset, tensor.shape, tensor.dtype,
            config.quant_type, config.block_size,
        )  # fmt: skip

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IntegerWeight:
        return _restore(facts, tensors)


def _restore(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IntegerWeight:
    return IntegerWeight(
        tensors["codes"], tensors["scale"], tensors.get("zero"), tensors.get("nested_scale"), tensors.get("offset"),
        torch.Size(facts["shape"]), getattr(torch, facts["dtype"]), facts["quant_type"], facts["block_size"],
    )  # fmt: skip


INT8, INT4 = _Int8(), _Int4()
