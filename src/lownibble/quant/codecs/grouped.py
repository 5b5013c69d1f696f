"""Codes with one scale per group of a row's weights: int8, fp8, nf3, nf2, mxfp4, and int4, int3 and int2 with a zero point.

    int8              w = scale * code           code from -127 to 127, scale = max |w| / 127
    fp8               w = scale * code           code a float8 (e4m3fn), scale = max |w| / 448
    nf3, nf2          w = scale * value[code]    2^bits NormalFloat values from -1 to 1, scale = max |w|
    mxfp4             w = scale * value[code]    E2M1 values up to 6, scale = 2^(floor(log2(max |w|)) - 2), groups of 32
    int4, int3, int2  w = scale * (code - zero)  code and zero from 0 to 2^bits - 1, scale = (max - min) / (2^bits - 1)

A group is a power of two from 32 to 4096 of neighbouring weights in a row, or the row. The range of a group with a zero point
includes 0, so that zeros stay zeros. With double quantisation the scales are quantised to 8 bits first (`nested.py`), and
weights are rounded with the dequantised scales. Where such a scale is too small, the group's largest weights are cut, in int8 by
several codes; scales that are far below others of their block of 256 may decode to 0, and their weights are lost.

`int4_act` and its like are GPTQ's act-order: the groups are of columns that are alike in how strong their inputs are, not of
neighbours. `order` lists the columns as the codes hold them.

mxfp4 converts as OCP Microscaling Formats 1.0 says (section 6.3): rounded to nearest, ties to even, magnitudes above 6 to 6. Its
scales are bytes already (e8m0, the exponent plus 127) and are never quantised again. (compressed-tensors doubles the scale where
the largest magnitude is 7 or more, which decodes alike.)

These are the numbers that GPTQ, AWQ, compressed-tensors and FP8 checkpoints store in other orders; `models/formats/` brings
them here unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import QuantizationError
from lownibble.kernels import decoded, ops
from lownibble.kernels.reference import unpack
from lownibble.kernels.types import NO_EPILOGUE, Epilogue, Grouped, Nested, Scaled8bit
from lownibble.quant import bits, layouts, nested
from lownibble.quant.codebook import dynamic8, e8m0, levels, to_e2m1
from lownibble.quant.grid import Steps
from lownibble.quant.layouts import NESTED_BLOCK_SIZE, Layout
from lownibble.quant.packed import Codec, PackedWeight, dtype_name

_EXPONENTS_BLOCK = 4096
CODED_ELEMENTS = 2**17
"""Weights quantised at a time: half a second-level cache in float32."""


@dataclass(frozen=True)
class GroupedWeight(PackedWeight):
    """A packed weight with one scale per group.

    Attributes:
        codes: int8 of `shape`; the bytes of float8_e4m3fn, uint8 of `shape`; or codes of fewer bits, packed (see `bits.py`),
            (bytes, 1) uint8.
        scale: (groups,) float32, or uint8 codes of it with double quantisation, or exponents plus 127 in uint8.
        zero: None, or zero points packed as the codes are, (bytes,) uint8.
        order: None, or (K,) int32: the column that each column of the codes is.
        nested_scale, offset: absmax and offset of double-quantised scales (see `nested.py`), else None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
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
        """Codes, scales, zero points and the order of columns."""
        found = {
            "codes": self.codes, "scale": self.scale, "nested_scale": self.nested_scale, "offset": self.offset,
            "zero": self.zero, "order": self.order,
        }  # fmt: skip
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def facts(self) -> dict[str, Any]:
        """quant_type, shape, dtype, block size and whether double-quantised."""
        return {
            "quant_type": self.quant_type, "shape": list(self.shape), "dtype": dtype_name(self.dtype),
            "block_size": self.block_size, "double_quant": self.double_quant,
        }  # fmt: skip

    @cached_property
    def grouped(self) -> Grouped:
        """The weight in the kernels' format."""
        kind, device = layouts.GROUPED[self.quant_type], str(self.device)
        return Grouped(
            self.codes.view(torch.float8_e4m3fn if kind.is_float else self.codes.dtype).view(-1), kind.bits,
            levels(self.quant_type, device), self.scale, self.zero, self.order,
            self.block_size if isinstance(self.block_size, int) else self.shape[-1], self.shape, self._nested(kind, device),
        )  # fmt: skip

    def _nested(self, kind: layouts.Grouped, device: str) -> Nested | None:
        """What decodes the scales: exponents are codes of powers of two whose constants are 1."""
        if kind.exponents:
            *experts, n = self.scale.shape  # of a stack there are constants for each expert
            ones = torch.ones(*experts, -(-n // _EXPONENTS_BLOCK), dtype=torch.float32, device=device)
            return Nested(e8m0(device), ones, ones.new_zeros(*experts, 1), _EXPONENTS_BLOCK)
        if self.nested_scale is None or self.offset is None:
            return None
        return Nested(dynamic8(device), self.nested_scale, self.offset, NESTED_BLOCK_SIZE)

    def decoded_scale(self) -> Tensor:
        """The scales in float32, (groups,)."""
        found = self.grouped.nested
        if found is None:
            return self.scale
        return ops.dequantize_8bit(self.scale, found.absmax, found.values, found.block_size) + found.offset

    @property
    def scaled_8bit(self) -> Scaled8bit | None:
        """The weight as the kernels of merge-aware training take it, or None: it is not plain int8."""
        if self.quant_type != "int8" or not self.numel():
            return None
        scale = self.decoded_scale()
        return Scaled8bit(self.codes, scale, self.numel() // scale.numel())

    def decode(self, out: Tensor) -> Tensor:
        """Dequantise with the backend's kernel; computed in float32."""
        return ops.dequantize_grouped(self.grouped, out)

    def steps(self) -> Steps:
        """As `PackedWeight.steps`."""
        form, kind, scale = self.grouped, layouts.GROUPED[self.quant_type], self.decoded_scale()
        zero = None if self.zero is None else unpack(self.zero, kind.bits)[: scale.numel()].float()
        return Steps(form.values, scale, zero, form.group_size, self.order)

    def with_codes(self, codes_NK: Tensor) -> GroupedWeight:
        """As `PackedWeight.with_codes`."""
        kind = layouts.GROUPED[self.quant_type]
        codes = bits.pack(codes_NK.flatten(), kind.bits).view(-1, 1) if kind.packed else codes_NK.view(self.codes.dtype)
        return replace(self, codes=codes)

    def matmul(self, x_TC: Tensor, *, transposed: bool = False, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
        """As `PackedWeight.matmul`, with the backend's kernel. Act-order permutes columns of x or of the output."""
        weight, order = self.grouped._replace(order=None), self.order
        if order is None:
            return ops.matmul_grouped(x_TC.contiguous(), weight, transposed, epilogue)
        if not transposed:
            return ops.matmul_grouped(x_TC.index_select(1, order), weight, False, epilogue)
        out = ops.matmul_grouped(x_TC.contiguous(), weight, True, NO_EPILOGUE)
        out = torch.empty_like(out).index_copy_(1, order.long(), out)
        return decoded.add_low_rank(out if epilogue.bias is None else out.add_(epilogue.bias.to(out.dtype)), epilogue)

    def matvec(self, x_TK: Tensor) -> Tensor:
        """As `PackedWeight.matvec`, dequantised on the fly."""
        x = x_TK.contiguous() if self.order is None else x_TK.index_select(1, self.order)
        return ops.gemv_grouped(x, self.grouped._replace(order=None))


def _stored(scale: Tensor, double_quant: bool, held: Held | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Stored scales, nested scales and offset (None without double quantisation), and the scales as dequantised."""
    if held is not None:
        scale = held(scale)
        if not bool(torch.isfinite(scale).all()):
            raise QuantizationError("a scale is too large for the file format. Take --format lownibble, or skip the module.")
    if not double_quant:
        return scale, None, None, scale
    codes, nested_scale, offset = nested.encode(scale)
    return codes, nested_scale, offset, nested.decode(codes, nested_scale, offset)


def _exponents(largest: Tensor) -> Tensor:
    """Scales of MXFP4 as exponents plus 127, uint8: the largest power of two in a group over that in E2M1, which is 4."""
    exponent = torch.frexp(largest).exponent - 3
    return torch.where(largest > 0, exponent + 127, 0).clamp(0, 254).to(torch.uint8)


def _nearest(values: Tensor, quant_type: str) -> Tensor:
    """The codes of scaled values of a type without zero point."""
    if quant_type == "mxfp4":
        return to_e2m1(values)
    if quant_type == "fp8":
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    if quant_type.startswith("int"):
        return values.round().to(torch.int8)
    table = levels(quant_type, str(values.device))
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2, out_int32=True)


def _divisor(scale: Tensor) -> Tensor:
    """What to divide by so that 0 comes out where the scale is 0."""
    return torch.where(scale == 0, math.inf, scale)


def _codes(groups: Tensor, scale: Tensor, zeros: Tensor | None, quant_type: str) -> Tensor:
    """The codes (groups, size) of `groups`, flat if they are packed; made in parts that stay in the cache.

    scale, zeros: (groups, 1), as dequantised.
    """
    kind, (n, size) = layouts.GROUPED[quant_type], groups.shape
    if kind.packed:
        made = torch.empty(layouts.n_bytes_of(groups.numel(), kind.bits), dtype=torch.uint8, device=groups.device)
    else:
        made = torch.empty(n, size, dtype=torch.uint8 if kind.is_float else torch.int8, device=groups.device)
    step = max(1, CODED_ELEMENTS // max(1, size))
    divisor, buffer = _divisor(scale), groups.new_empty(min(n, step), size)
    for first in range(0, n, step):
        rows = slice(first, min(n, first + step))
        values = torch.div(groups[rows], divisor[rows], out=buffer[: rows.stop - first])
        if zeros is not None:
            codes = values.add_(zeros[rows]).round_().clamp_(0, 2**kind.bits - 1)
        else:
            codes = _nearest(values.clamp_(-kind.top, kind.top), quant_type)
        if kind.packed:
            begin, packed = layouts.n_bytes_of(first * size, kind.bits), bits.pack(codes.flatten(), kind.bits)
            made[begin : begin + len(packed)] = packed
        else:
            made[rows] = codes
    return made


class _Grouped(Codec):
    def layout(self, shape: Sequence[int], config: QuantConfig) -> Layout:
        return layouts.grouped(shape, config)

    def quantize(self, tensor: Tensor, config: QuantConfig, statistics: Tensor | None = None) -> GroupedWeight:
        return to_groups(tensor, config, statistics)

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GroupedWeight:
        return GroupedWeight(
            tensors["codes"], tensors["scale"], tensors.get("zero"), tensors.get("order"), tensors.get("nested_scale"),
            tensors.get("offset"), torch.Size(facts["shape"]), getattr(torch, facts["dtype"]), facts["quant_type"],
            facts["block_size"],
        )  # fmt: skip

    def below(self, config: QuantConfig, shapes: Sequence[Sequence[int]]) -> QuantConfig | None:
        """Doubly quantised scales are decoded."""
        return config.with_options(double_quant=False)

    def join(self, weights: Sequence[PackedWeight]) -> GroupedWeight:
        held = [weight for weight in weights if isinstance(weight, GroupedWeight)]
        first, kind = held[0], layouts.GROUPED[held[0].quant_type]
        zeros = [unpack(each.zero, kind.bits)[: each.scale.numel()] for each in held if each.zero is not None]
        return replace(
            first,
            codes=torch.cat([each.codes for each in held]),  # a row is whole bytes
            scale=torch.cat([each.scale if kind.exponents else each.decoded_scale() for each in held]),
            zero=bits.pack(torch.cat(zeros), kind.bits) if zeros else None,
            nested_scale=None,
            offset=None,
            shape=torch.Size((sum(each.shape[0] for each in held), first.shape[1])),
        )


GROUPED = _Grouped()


Held = Callable[[Tensor], Tensor]
"""Scales, float32 -> those of them that a file format holds, float32."""


def to_groups(tensor: Tensor, config: QuantConfig, statistics: Tensor | None = None, held: Held | None = None) -> GroupedWeight:
    """`Codec.quantize`; with `held`, scales are such as a file format holds, and codes are the nearest with them. Exponents of
    mxfp4 are held by every format as they are.

    Raises:
        QuantizationError: a scale is not finite as the format holds it.
    """
    size, kind = layouts.group_size(tensor.shape, config), layouts.GROUPED[config.quant_type]
    rows, order = tensor.float(), None
    if kind.act_order:
        n = tensor.shape[-1]
        order = torch.arange(n, device=tensor.device) if statistics is None else statistics.argsort(descending=True, stable=True)
        order = order.to(device=tensor.device, dtype=torch.int32)
        rows = rows[..., order.long()]
    groups = rows.reshape(-1, max(1, size))
    zeros = None
    if kind.zero:
        low, high = (groups.amin(dim=1), groups.amax(dim=1)) if groups.numel() else 2 * [groups.new_zeros(len(groups))]
        low, high, top = low.clamp(max=0), high.clamp(min=0), 2**kind.bits - 1
        stored, nested_scale, offset, scale = _stored((high - low) / top, config.double_quant, held)
        zeros = (-low / _divisor(scale)).round().clamp(0, top)
    else:
        largest = groups.abs().amax(dim=1) if groups.numel() else groups.new_zeros(len(groups))
        if kind.exponents:
            stored, nested_scale, offset = _exponents(largest), None, None
            scale = e8m0(str(tensor.device))[stored.long()]
        else:
            stored, nested_scale, offset, scale = _stored(largest / kind.top, config.double_quant, held)
    codes = _codes(groups, scale.unsqueeze(1), None if zeros is None else zeros.unsqueeze(1), config.quant_type)
    codes = codes.view(-1, 1) if kind.packed else codes.view(tensor.shape)
    return GroupedWeight(
        codes, stored, None if zeros is None else bits.pack(zeros, kind.bits), order, nested_scale, offset, tensor.shape,
        tensor.dtype, config.quant_type, config.block_size,
    )  # fmt: skip


def of_groups(
    codes: Tensor, scale: Tensor, zero: Tensor | None, order: Tensor | None, dtype: torch.dtype, config: QuantConfig
) -> GroupedWeight:
    """The packed weight with these numbers, unchanged.

    Args:
        codes: (N, K) with each group's columns side by side: integers from 0 for packed types, int8, or float8.
        scale: (N, groups of a row), any float type; exponents plus 127 in uint8 for mxfp4.
        zero: (N, groups of a row) of integers, or None for types without.
        order: (K,) the column that each column of `codes` is, for act-order types; else None.
        dtype: default dtype to dequantise to. config: quant_type and block size.
    """
    kind = layouts.GROUPED[config.quant_type]
    if kind.packed:
        held = bits.pack(codes.flatten(), kind.bits).view(-1, 1)
    else:
        held = codes.contiguous().view(torch.uint8) if kind.is_float else codes.contiguous()
    zeros = bits.pack(zero.flatten(), kind.bits) if zero is not None else None
    constants = scale.contiguous() if kind.exponents else scale.float()
    return GroupedWeight(
        held, constants.flatten(), zeros, None if order is None else order.to(torch.int32), None, None, codes.shape, dtype,
        config.quant_type, config.block_size,
    )  # fmt: skip


class Parts(NamedTuple):
    """The numbers of a grouped weight, as `of_groups` takes them.

    Attributes:
        codes: (N, K) in the order of the file: integers from 0 for packed types, int8, or float8.
        scale: (N, G) float32, or exponents plus 127 in uint8. zero: (N, G) uint8 or None. order: (K,) int32 or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None


def parts_of(weight: GroupedWeight) -> Parts:
    """The inverse of `of_groups`; scales that are doubly quantised are decoded."""
    kind, (n_out, n_in) = layouts.GROUPED[weight.quant_type], weight.shape
    codes = weight.codes.view(torch.float8_e4m3fn) if kind.is_float else weight.codes
    if kind.packed:
        codes = unpack(codes.view(-1), kind.bits)[: n_out * n_in].view(n_out, n_in)
    scale = (weight.scale if kind.exponents else weight.decoded_scale()).view(n_out, -1)
    zero = None if weight.zero is None else unpack(weight.zero, kind.bits)[: scale.numel()].view(scale.shape)
    return Parts(codes, scale, zero, weight.order)
