"""Products of experts on CUDA: one launch for all experts, which decodes 4-bit and other packed weights tile by tile.

`matmul_experts`: a program computes a tile of the output, of rows of one expert. It finds expert and rows from the ends of all
experts' rows, which it reads on the device: the host never learns how many rows an expert has. The grid is what the rows can need
at most, S / ROWS tiles and one more for each expert; programs that are left over end at once. Rows after the last expert's count
as those of one more expert, whose product has no terms. Neighbouring programs have the same rows and other columns, so x is read
from memory once, and an expert's codes, a few MB, stay in the second-level cache for its other rows.

Weights are rounded to x's dtype, as where they are decoded into a buffer, and products are summed in float32; the low-rank branch
is added to the sum before it is rounded. A tile's constants are read once for each group of weights, unless groups cross the ends
of rows, in which case code and constant are found for each weight. Codes of 4 bits are read as pairs. Values are looked up by
`tl.gather`, which keeps the table in shared memory: a load would be taken for one that has to be prefetched, copy by copy.

`outer_experts`: a program computes a tile of one expert's gradient, over all of its rows, in order; no atomics.

torch's grouped product (`torch._grouped_mm`) takes dense weights alone. It is a kernel for all experts in bfloat16 on compute
capability 9 and 10, with strides of whole 16 bytes, so no ranks below 8; elsewhere it waits for the ends and loops. One mechanism
for every dtype, rank and device was preferred; `lownibble bench kernels` times it beside ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lownibble.errors import InputError
from lownibble.kernels.checks import check_float, check_stack, check_tensor
from lownibble.kernels.triton_programs import _code, _constants, _group_values
from lownibble.kernels.types import Epilogue, FourBit, Stack

SMALLEST = 16
"""Rows, columns and terms that a tensor core takes at least. A tile has as many rows as an expert has on average."""
LARGEST = {True: (128, 128, 64), False: (32, 64, 32)}
"""Rows and columns of a tile, and terms at a time, at most. False: for float32, and for weights whose codes are found one by
one; they need more registers and shared memory (ptxas spills no registers with these)."""
ROWS_AT_A_TIME, OUTER = {2: 64, 4: 32}, 64
"""`outer_experts`: bytes of an element -> rows that a program multiplies at a time; rows and columns of a tile at most."""


@triton.jit
def _decoded_tile(
    codes, values, scale, zero, nested_values, nested_absmax, offset, n, k_first, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile (ROWS, COLUMNS) of a packed weight, float32. WHOLE: rows are whole groups, of a power of two of weights."""
    k = k_first + tl.arange(0, COLUMNS)
    element = n[:, None] * K + k[None, :]
    inside = (n < N)[:, None] & (k < K)[None, :]
    if not WHOLE:
        return _group_values(
            codes, values, scale, zero, nested_values, nested_absmax, offset, element, inside, BITS, GROUP, ZERO, NESTED_BLOCK
        )
    SHARED: tl.constexpr = GROUP if GROUP < COLUMNS else COLUMNS
    k_group = k_first + tl.arange(0, COLUMNS // SHARED) * SHARED
    some = (n < N)[:, None] & (k_group < K)[None, :]
    group = (n[:, None] * K + k_group[None, :]) // GROUP
    constants = _constants(scale, group, some, nested_values, nested_absmax, offset, NESTED_BLOCK)
    if BITS == 4:
        k_pair = k_first // 2 + tl.arange(0, COLUMNS // 2)
        pair = n[:, None] * (K // 2) + k_pair[None, :]
        byte = tl.load(codes + pair, mask=(n < N)[:, None] & (k_pair < K // 2)[None, :], other=0).to(tl.int32)
        code = tl.interleave(byte >> 4, byte & 15)
    else:
        code = _code(codes, element, inside, BITS)
    table = tl.load(values + tl.arange(0, 1 << BITS))
    value = tl.gather(table, tl.reshape(code, (ROWS * COLUMNS,)), 0)
    value = tl.reshape(value, (ROWS, COLUMNS // SHARED, SHARED))
    if ZERO:
        value -= _code(zero, group, some, BITS).to(tl.float32)[:, :, None]
    return tl.reshape(value * constants[:, :, None], (ROWS, COLUMNS))


@triton.jit
def _ends_of(ends, expert, S, E):
    """The end of an expert's rows; of expert E, to which the rows after the last one's count, S."""
    return tl.minimum(tl.load(ends + expert, mask=(expert >= 0) & (expert < E), other=tl.where(expert < 0, 0, S)), S)


@triton.jit
def experts_product(
    x, ends, weight, values, scale, zero, nested_values, nested_absmax, offset, low, factor, out, S, E, N, K, R, alpha,
    weight_step, row_step, column_step, scale_step, zero_step, nested_step, offset_step,
    factor_step, factor_rank_step, factor_column_step,
    TRANSPOSED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr,
    RANKS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute a tile (ROWS, COLUMNS) of the output. Steps: elements from one expert, row, ... to the next. BITS 0: dense."""
    C = K if TRANSPOSED else N
    terms = N if TRANSPOSED else K
    column_tiles = tl.cdiv(C, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    each = tl.arange(0, EXPERTS)
    start, end = _ends_of(ends, each - 1, S, E), _ends_of(ends, each, S, E)
    tiles = tl.maximum(end - start + ROWS - 1, 0) // ROWS
    after = tl.cumsum(tiles, 0)
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    mine = each == expert
    first = tl.sum(tl.where(mine, start + (tile - after + tiles) * ROWS, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    if first >= last:
        return
    terms = tl.where(expert < E, terms, 0)
    ranks = tl.where(expert < E, R, 0)
    which = expert.to(tl.int64)
    row = first + tl.arange(0, ROWS)
    is_row = row < last
    wide_row = row.to(tl.int64)[:, None]
    c_first = (tl.program_id(0) % column_tiles) * COLUMNS
    c = c_first + tl.arange(0, COLUMNS)
    own_weight = weight + which * weight_step
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for t_first in range(0, terms, TERMS):
        t = t_first + tl.arange(0, TERMS)
        x_tile = tl.load(x + wide_row * terms + t[None, :], mask=is_row[:, None] & (t < terms)[None, :], other=0.0)
        n = t if TRANSPOSED else c
        if BITS == 0:
            k = c if TRANSPOSED else t
            place = n[:, None].to(tl.int64) * row_step + k[None, :].to(tl.int64) * column_step
            w_tile = tl.load(own_weight + place, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        else:
            w_tile = _decoded_tile(
                own_weight, values, scale + which * scale_step, zero + which * zero_step, nested_values,
                nested_absmax + which * nested_step, offset + which * offset_step, n, c_first if TRANSPOSED else t_first, N, K,
                TERMS if TRANSPOSED else COLUMNS, COLUMNS if TRANSPOSED else TERMS, BITS, GROUP, ZERO, NESTED_BLOCK, WHOLE,
            )  # fmt: skip
        w_tile = w_tile.to(x.dtype.element_ty)
        total = tl.dot(x_tile, w_tile if TRANSPOSED else tl.trans(w_tile), total, input_precision="ieee")
    if RANKS:
        branch = tl.zeros((ROWS, COLUMNS), tl.float32)
        for r_first in range(0, ranks, RANKS):
            r = r_first + tl.arange(0, RANKS)
            low_tile = tl.load(low + wide_row * R + r[None, :], mask=is_row[:, None] & (r < R)[None, :], other=0.0)
            place = which * factor_step + r[:, None].to(tl.int64) * factor_rank_step + c[None, :] * factor_column_step
            factor_tile = tl.load(factor + place, mask=(r < R)[:, None] & (c < C)[None, :], other=0.0)
            branch = tl.dot(low_tile, factor_tile.to(low.dtype.element_ty), branch, input_precision="ieee")
        total += branch * alpha
    tl.store(out + wide_row * C + c[None, :], total.to(out.dtype.element_ty), mask=is_row[:, None] & (c < C)[None, :])


@triton.jit
def experts_outer(
    a, b, ends, out, S, E, P, Q, alpha, PS: tl.constexpr, QS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute a tile (PS, QS) of an expert's sum over its rows."""
    q_tiles = tl.cdiv(Q, QS)
    tiles = tl.cdiv(P, PS) * q_tiles
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    p = (tile // q_tiles) * PS + tl.arange(0, PS)
    q = (tile % q_tiles) * QS + tl.arange(0, QS)
    start, end = _ends_of(ends, expert - 1, S, E), _ends_of(ends, expert, S, E)
    total = tl.zeros((PS, QS), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        wide_row = row.to(tl.int64)[:, None]
        a_tile = tl.load(a + wide_row * P + p[None, :], mask=(row < end)[:, None] & (p < P)[None, :], other=0.0)
        b_tile = tl.load(b + wide_row * Q + q[None, :], mask=(row < end)[:, None] & (q < Q)[None, :], other=0.0)
        total = tl.dot(tl.trans(a_tile), b_tile, total, input_precision="ieee")
    place = (expert.to(tl.int64) * P + p[:, None]) * Q + q[None, :]
    tl.store(out + place, (total * alpha).to(out.dtype.element_ty), mask=(p < P)[:, None] & (q < Q)[None, :])


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)


def _tile(count: int, largest: int) -> int:
    """The power of two for so many rows or columns, within a tile's bounds."""
    return int(min(max(triton.next_power_of_2(max(count, 1)), SMALLEST), largest))


class _Tensors(NamedTuple):
    """A stack's tensors (placeholders, never read, for those that it has not), their steps, and the kernel's constants."""

    tensors: tuple[Tensor, ...]
    steps: tuple[int, ...]
    constants: dict[str, int]


def _tensors(weights: Stack, x: Tensor) -> _Tensors:
    n_experts, _, K = weights.shape

    def step(tensor: Tensor) -> int:
        return tensor.numel() // n_experts

    if isinstance(weights, Tensor):
        constants = {"BITS": 0, "GROUP": 1, "ZERO": False, "NESTED_BLOCK": 0, "WHOLE": False}
        return _Tensors((weights, *(x,) * 6), (*weights.stride(), *(0,) * 4), constants)
    if isinstance(weights, FourBit):
        scale, zero, bits, group = weights.absmax, None, 4, weights.block_size
    else:
        scale, zero, bits, group = weights.scale, weights.zero, weights.bits, weights.group_size
    nested, own_zero = weights.nested, scale if zero is None else zero
    inner = (scale,) * 3 if nested is None else (nested.values, nested.absmax, nested.offset)
    codes = weights.codes.view(torch.uint8)
    whole = K % group == 0 and group >= SMALLEST and group & (group - 1) == 0
    constants = {
        "BITS": bits, "GROUP": group, "ZERO": zero is not None, "NESTED_BLOCK": 0 if nested is None else nested.block_size,
        "WHOLE": whole,
    }  # fmt: skip
    steps = (step(codes), 0, 0, step(scale), step(own_zero), step(inner[1]), step(inner[2]))
    return _Tensors((codes, weights.values, scale, own_zero, *inner), steps, constants)


def matmul_experts(x_SC: Tensor, weights: Stack, ends_E: Tensor, transposed: bool, epilogue: Epilogue) -> Tensor:
    """As `ops.matmul_experts`."""
    (n_experts, N, K), S, device, dtype = weights.shape, len(x_SC), x_SC.device, x_SC.dtype
    terms, columns = (N, K) if transposed else (K, N)
    check_float(x_SC, "x_SC")
    check_tensor(x_SC, "x_SC", dtype, S * terms, device)
    check_tensor(ends_E, "ends_E", torch.int32, n_experts, device)
    check_stack(weights, device)
    low, factor, rank = epilogue.low, epilogue.factor, 0
    steps: tuple[int, ...] = (0, 0, 0)
    if low is None or factor is None:
        low, factor = x_SC, x_SC
    else:
        rank, steps = low.shape[1], factor.stride()
        check_tensor(low, "low", dtype, S * rank, device)
        check_float(factor, "factor")
        if factor.shape != (n_experts, rank, columns) or factor.device != device:
            raise InputError(
                f"'factor' must be a tensor of {(n_experts, rank, columns)} on {device}. Got {tuple(factor.shape)} on "
                f"{factor.device}."
            )
    if epilogue.bias is not None:
        raise InputError("Products of experts add no bias. Add each row's own.")
    out_SC = torch.empty((S, columns), dtype=dtype, device=device)
    held = _tensors(weights, x_SC)
    in_pairs = bool(held.constants["WHOLE"]) and held.constants["BITS"] == 4
    narrow = weights.dtype.itemsize == 2 if isinstance(weights, Tensor) else in_pairs
    most_rows, most_columns, at_a_time = LARGEST[dtype.itemsize == 2 and narrow]
    rows, width = _tile(S // max(1, n_experts), most_rows), _tile(columns, most_columns)
    row_tiles = S // rows + min(S, n_experts + 1)
    _launch(
        experts_product, row_tiles * triton.cdiv(columns, width), x_SC, ends_E, *held.tensors, low, factor, out_SC,
        S, n_experts, N, K, rank, epilogue.scale, *held.steps, *steps, TRANSPOSED=transposed,
        EXPERTS=triton.next_power_of_2(n_experts + 1), ROWS=rows, COLUMNS=width, TERMS=at_a_time,
        RANKS=_tile(rank, at_a_time) if rank else 0, num_warps=8 if rows * width > 8192 else 4, **held.constants,
    )  # fmt: skip
    return out_SC


def outer_experts(a_SP: Tensor, b_SQ: Tensor, ends_E: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """As `ops.outer_experts`."""
    (S, P), Q, n_experts, device = a_SP.shape, b_SQ.shape[1], len(ends_E), a_SP.device
    check_float(a_SP, "a_SP")
    check_tensor(a_SP, "a_SP", a_SP.dtype, S * P, device)
    check_tensor(b_SQ, "b_SQ", a_SP.dtype, S * Q, device)
    check_tensor(ends_E, "ends_E", torch.int32, n_experts, device)
    out_EPQ = torch.empty((n_experts, P, Q), dtype=dtype, device=device)
    check_float(out_EPQ, "out")
    ps, qs = _tile(P, OUTER), _tile(Q, OUTER)
    _launch(
        experts_outer, n_experts * triton.cdiv(P, ps) * triton.cdiv(Q, qs), a_SP, b_SQ, ends_E, out_EPQ,
        S, n_experts, P, Q, scale, PS=ps, QS=qs, ROWS=ROWS_AT_A_TIME[a_SP.dtype.itemsize],
    )  # fmt: skip
    return out_EPQ
