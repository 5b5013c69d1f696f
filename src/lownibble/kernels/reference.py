"""Plain torch version of every kernel operation: the oracle that fast backends are tested against.

Written for exactness, not speed. Follows bitsandbytes 0.50 (`backends/default/ops.py` and its CPU kernels) operation by
operation, because the bytes must be equal: full blocks are scaled by a reciprocal, the short last block is divided, and a
value on the boundary between two codes takes the lower one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lownibble.kernels import adamw, decoded, decoder, plain
from lownibble.kernels.attention import attention as attention
from lownibble.kernels.attention import attention_backward as attention_backward
from lownibble.kernels.decoded import matmul_dense as matmul_dense
from lownibble.kernels.decoder import Context, DecoderLayers, Segment, Step
from lownibble.kernels.plain import cross_entropy as cross_entropy
from lownibble.kernels.plain import gemv_bf16 as gemv_bf16
from lownibble.kernels.plain import low_rank as low_rank
from lownibble.kernels.plain import low_rank_backward as low_rank_backward
from lownibble.kernels.plain import outer as outer
from lownibble.kernels.plain import outer_experts as outer_experts
from lownibble.kernels.rows import add_low_rank_rows as add_low_rank_rows
from lownibble.kernels.rows import attend_slots as attend_slots
from lownibble.kernels.types import LARGEST_CODE, PART, Epilogue, FourBit, Grouped, Rows8bit, Scaled8bit, row_sizes

name = "reference"
device_types = None  # any
row_part: int | None = PART
experts_at_once = False

_TINY = 1e-38  # bitsandbytes' floor for the scale of an all-zero block


def quantize_4bit(x: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    x_32 = x.float()
    n_full = x_32.numel() // block_size * block_size
    blocks = x_32[:n_full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if n_full else x_32.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).clamp(-1, 1).view(-1)
    if n_full < x_32.numel():
        last = x_32[n_full:]
        last_absmax = last.abs().max().clamp(min=_TINY)
        absmax = torch.cat([absmax, last_absmax.view(1)])
        scaled = torch.cat([scaled, (last / last_absmax).clamp(-1, 1)])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    index = order[torch.bucketize(scaled, bounds)]
    return (index[::2] << 4) | index[1::2], absmax


def _block_constants(weight: FourBit) -> Tensor:
    absmax, nested = weight.absmax, weight.nested
    if nested is None:
        return absmax
    return dequantize_8bit(absmax, nested.absmax, nested.values, nested.block_size) + nested.offset


def _constants(weight: FourBit) -> Tensor:
    """The absmax of each element, in the weight's shape."""
    n = weight.shape.numel()
    return _block_constants(weight).repeat_interleave(weight.block_size)[:n].view(weight.shape)


def _values(weight: FourBit) -> Tensor:
    """The codebook value of each element, in the weight's shape."""
    index = torch.stack([weight.codes >> 4, weight.codes & 0xF], dim=1).view(-1).long()[: weight.shape.numel()]
    return weight.values[index].view(weight.shape)


def quantize_sum_4bit(
    base: Scaled8bit, low_Nr: Tensor, lora_A: Tensor, bounds: Tensor, order: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    return quantize_4bit(plain.sum_8bit(base, low_Nr, lora_A).view(-1), bounds, order, block_size)


def dequantize_4bit(weight: FourBit, out: Tensor) -> Tensor:
    out.view(weight.shape).copy_(_values(weight) * _constants(weight))
    return out


def quantize_8bit(x: Tensor, lookup: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = x.numel()
    n_blocks = -(-n // block_size)
    blocks = torch.nn.functional.pad(x, (0, n_blocks * block_size - n)).view(n_blocks, block_size)
    absmax = blocks.abs().amax(dim=1) if n else x.new_empty(0)
    scaled = (blocks * (1.0 / absmax).unsqueeze(1)).view(-1)[:n]  # an all-zero block gives NaN, whose code is 0
    index = ((scaled.clamp(-1, 1) + 1.0) * 32767.5 + 0.5).nan_to_num(nan=0.0).long().clamp(max=65535)
    return lookup[index], absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    return values[codes.long()] * absmax.repeat_interleave(block_size)[: codes.numel()]


def gemv_4bit(x_TK: Tensor, weight: FourBit) -> Tensor:
    weight_NK = dequantize_4bit(weight, x_TK.new_empty(weight.shape, dtype=torch.float32))
    return (x_TK.float() @ weight_NK.t()).to(x_TK.dtype)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes in bytes (m,), (m * 8 / bits,) uint8: a string of bits, the first code in the highest ones."""
    whole = math.lcm(bits, 8)  # bits of the smallest whole number of bytes and codes
    units = packed.view(-1, whole // 8)
    codes = packed.new_empty(len(units), whole // bits)
    for i in range(whole // bits):
        byte, start = divmod(bits * i, 8)
        after = 8 - start - bits  # bits of the byte below the code; negative: the code continues in the next byte
        code = units[:, byte] >> after if after >= 0 else units[:, byte] << -after
        if start:  # else the code has the highest bits
            code &= 2**bits - 1
        if after < 0:
            code |= units[:, byte + 1] >> (8 + after)
        codes[:, i] = code
    return codes.view(-1)


PART_ELEMENTS = 2**20
"""Elements of a grouped weight dequantised at a time, so that temporaries stay small."""


def _constants_of_groups(weight: Grouped) -> tuple[Tensor, Tensor | None]:
    """The scale and, or None, the zero point of each group, float32."""
    scale, nested = weight.scale, weight.nested
    if nested is not None:
        scale = dequantize_8bit(scale, nested.absmax, nested.values, nested.block_size) + nested.offset
    return scale, None if weight.zero is None else unpack(weight.zero, weight.bits)[: scale.numel()].float()


def dequantize_grouped(weight: Grouped, out: Tensor) -> Tensor:
    if not out.numel():
        return out
    K = weight.shape[-1]
    values, codes = out.view(-1, K), weight.codes
    scale, zero = _constants_of_groups(weight)
    per_row, row_bytes, step = K // weight.group_size, K * weight.bits // 8, max(1, PART_ELEMENTS // K)
    for first in range(0, len(values), step):
        last = min(first + step, len(values))
        part = codes[first * row_bytes : last * row_bytes]
        if weight.bits < 8:
            part = unpack(part, weight.bits)
        is_value = weight.bits == 8 or zero is not None  # faster than looking it up
        groups = (part.float() if is_value else weight.values[part.int()]).view(-1, weight.group_size)
        of_part = slice(first * per_row, last * per_row)
        if zero is not None:
            groups.sub_(zero[of_part].unsqueeze(1))
        decoded = groups.mul_(scale[of_part].unsqueeze(1)).view(-1, K)
        if weight.order is None:
            values[first:last] = decoded
        else:
            values[first:last, weight.order.long()] = decoded.to(out.dtype)
    return out


def gemv_grouped(x_TK: Tensor, weight: Grouped) -> Tensor:
    weight_NK = dequantize_grouped(weight, x_TK.new_empty(weight.shape, dtype=torch.float32))
    return (x_TK.float() @ weight_NK.t()).to(x_TK.dtype)


def matmul_grouped(x_TC: Tensor, weight: Grouped, transposed: bool, epilogue: Epilogue) -> Tensor:
    return decoded.matmul(partial(dequantize_grouped, weight), weight.shape, x_TC, transposed, epilogue)


def matmul_4bit(x_TC: Tensor, weight: FourBit, transposed: bool, epilogue: Epilogue) -> Tensor:
    return decoded.matmul(partial(dequantize_4bit, weight), weight.shape, x_TC, transposed, epilogue)


matmul_experts = partial(plain.matmul_experts, matmul_4bit, matmul_grouped)
"""As `ops.matmul_experts`."""


def _codes(scaled: Tensor, code_type: torch.dtype) -> Tensor:
    """Round to the nearest codes, ties to even. int8 saturates; float8 is torch's cast, which does not: values must not be much
    above 448."""
    return (scaled if code_type.is_floating_point else scaled.round().clamp(-128, 127)).to(code_type)


def row_scales(weight: FourBit, code_type: torch.dtype = torch.int8) -> Tensor:
    sizes = _constants(weight).abs()
    return (sizes.amax(dim=1) if sizes.numel() else sizes.new_zeros(weight.shape[0])) / LARGEST_CODE[code_type]


def quantize_rows(
    x_TC: Tensor, column_scale: Tensor | None = None, code_type: torch.dtype = torch.int8, part: int | None = PART
) -> Rows8bit:
    x_TC = x_TC.float()
    scaled = x_TC if column_scale is None else x_TC * column_scale
    (T, C), top, width = x_TC.shape, LARGEST_CODE[code_type], part or max(1, x_TC.shape[1])
    parts_TPG = torch.nn.functional.pad(scaled, (0, -C % width)).view(T, -(-C // width), width)
    largest = parts_TPG.abs().amax(dim=2)
    factor = torch.where(largest > 0, torch.full_like(largest, top) / largest, 0.0)  # a number / tensor would round twice
    scaled_TPG = (parts_TPG * factor.unsqueeze(2)).nan_to_num(nan=0.0).clamp(-top, top)  # the factor of a tiny part is infinite
    codes = _codes(scaled_TPG, code_type)
    n_codes, n_scales = row_sizes(T, C, part)
    padded = (n_codes - T * C, n_scales - largest.numel())
    flat_codes, flat_scale = codes.flatten(1)[:, :C].flatten(), (largest / top).flatten()
    return Rows8bit(
        torch.nn.functional.pad(flat_codes, (0, padded[0])), torch.nn.functional.pad(flat_scale, (0, padded[1])),
        flat_scale.new_zeros(n_scales if part else 0, dtype=torch.int32), T, C, part,
    )  # fmt: skip


def _steps(row_scale: Tensor) -> Tensor:
    return torch.where(row_scale > 0, 1 / row_scale, 0.0).unsqueeze(1)


def _multiply(x: Rows8bit, q_NK: Tensor, row_scale: Tensor, transposed: bool) -> Tensor:
    """Multiply 8-bit codes and apply the scales; float32."""
    width = x.part or max(1, x.columns)
    T, C, n_parts = x.rows, x.columns, -(-x.columns // width)
    codes_TC, scale_TP = x.codes[: T * C].view(T, C).double(), x.scale[: T * n_parts].view(T, n_parts)
    q_CM = (q_NK if transposed else q_NK.t()).double()  # sums of codes are exact in float64
    out = row_scale.new_zeros(T, q_CM.shape[1])
    for part in range(n_parts):
        terms = slice(part * width, (part + 1) * width)
        out += (codes_TC[:, terms] @ q_CM[terms]).float() * scale_TP[:, part : part + 1]
    return out if transposed else out * row_scale


def matmul_8bit(
    x: Rows8bit, weight: FourBit, row_scale: Tensor, transposed: bool, epilogue: Epilogue, dtype: torch.dtype = torch.float32
) -> Tensor:
    scaled = _values(weight) * (_constants(weight) * _steps(row_scale))
    out = _multiply(x, _codes(scaled, x.codes.dtype), row_scale, transposed)
    if epilogue.bias is not None:
        out = out + epilogue.bias.float()
    if epilogue.low is not None and epilogue.factor is not None:
        out = out + epilogue.low.float() @ (epilogue.factor.float() * epilogue.scale)
    return out.to(dtype)


def matmul_8bit_dense(x: Rows8bit, weight_NK: Tensor, row_scale: Tensor, transposed: bool, out: Tensor) -> Tensor:
    q_NK = _codes(weight_NK * _steps(row_scale), x.codes.dtype)
    return out.copy_(_multiply(x, q_NK, row_scale, transposed))


def decoder_layers(
    x_TH: Tensor, layers: DecoderLayers, contexts: Sequence[Context], step: Step, segments: Sequence[Segment]
) -> None:
    decoder.decoder_layers(gemv_4bit, x_TH, layers, contexts, step, segments)


adamw_8bit = partial(adamw.adamw_8bit, dequantize_8bit)
