"""The Triton kernels, for CUDA devices; on a CPU they run in Triton's interpreter, which tests them without a GPU.

Each program processes TILE elements: whole blocks, one per row of a two-dimensional tile, so that a block's absmax is loaded
(and, if double-quantised, dequantised) once and its largest magnitude is a reduction along the row. A byte's two codes are
dequantised side by side and interleaved, so that loads and stores stay contiguous. Tables are read through the L1 cache: 16
values are 64 bytes, one transaction per warp whatever the codes are.

Results are bit-identical to the reference's. Three things would break that and are ruled out:
- contraction of `a * b + c` into one rounding: every launch has `enable_fp_fusion=False` (LLVM does not fuse, ptxas gets
  `--fmad=false`), and the matrix-vector product requests its fused multiply-adds explicitly (`tl.fma`);
- division: `/` is the approximate `div.full.f32` on NVIDIA; `tl.div_rn` rounds correctly;
- subnormals: float32 multiplications and `div_rn` keep them (no `.ftz` in the PTX).
`tests/kernels/test_triton_compile.py` compiles every kernel for a GPU, without needing one, and checks this in the PTX.

Grouped weights: one element of the tile per code, whatever its bits; neighbours read the same constants from the cache. Codes of
8 bits are looked up in a table of 256 values, since devices before capability 8.9 cannot convert float8.

8-bit matmuls: a program computes a tile of the output, part by part (64 terms) along the summed dimension. It converts the 4-bit
weights to 8-bit codes in registers, multiplies on the 8-bit units (`tl.dot` of int8 to int32, or of float8 to float32), and
accumulates the part, times its scale, in float32. Tiles are tall, since each program converts the weights itself. A part's sum
starts from zero: int8's is exact, and float8's has at most 64 terms, because the units of capability 9.0 accumulate in fewer bits
than float32 (about 14 according to DeepSeek-V3's report, 2412.19437). Codes equal the reference's, except that on capability 8.9
float8 is rounded through float16, so a value next to a tie may get the other neighbour. Torch adds bias and low-rank branch
afterwards.

The interpreter is selected when triton is imported (TRITON_INTERPRET=1), not when a kernel runs. Launches go to the current
stream of the tensors' device and are asynchronous.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from lownibble.errors import BackendError, InputError
from lownibble.kernels import decoded, decoder, plain
from lownibble.kernels.attention import attention as attention
from lownibble.kernels.attention import attention_backward as attention_backward
from lownibble.kernels.checks import (
    check_block_size,
    check_float,
    check_grouped,
    check_tensor,
    check_unordered,
    check_weight,
    check_weight_8bit,
)
from lownibble.kernels.decoder import DecoderLayers, Segment, Step
from lownibble.kernels.plain import gemv_bf16 as gemv_bf16
from lownibble.kernels.plain import low_rank as low_rank
from lownibble.kernels.plain import low_rank_backward as low_rank_backward
from lownibble.kernels.plain import matmul_dense as matmul_dense
from lownibble.kernels.plain import softmax_rows as softmax_rows
from lownibble.kernels.types import LARGEST_CODE, PART, Epilogue, FourBit, Grouped, Rows8bit, Scaled8bit, row_sizes

name = "triton"

TILE = 4096
"""Elements per program: one block of the largest size."""
GROUPED_TILE = 1024
"""Codes of a grouped weight per program."""
GEMV_COLUMNS, GEMV_TILE, GEMV_ROWS = 512, 2048, 4
"""Matrix-vector product: columns per iteration, weight elements per iteration, and rows of x per program."""
MATMUL_ROWS, MATMUL_ROWS_A_WARP = 128, 16
"""8-bit matmul: rows of x per program (half as many if x has no more), and rows per warp."""
TINY = tl.constexpr(1e-38)  # as in reference.py
TERMS = tl.constexpr(PART)
ROUND = tl.constexpr(1.5 * 2**23)  # added to a small float32, it leaves the nearest integer in the lowest bits


@triton.jit
def _constants(absmax, block, inside, nested_values, nested_absmax, offset, NESTED_BLOCK: tl.constexpr):
    """The float32 absmax of the blocks `block`; NESTED_BLOCK is 0 without double quantisation."""
    if NESTED_BLOCK == 0:
        constants = tl.load(absmax + block, mask=inside, other=0.0)
    else:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside, other=0.0)
        constants = tl.load(nested_values + code) * outer + tl.load(offset)
    return constants


@triton.jit
def _dequantize_4bit(
    codes, absmax, values, nested_values, nested_absmax, offset, out, n, n_bytes,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = _constants(absmax, block, block * BLOCK < n, nested_values, nested_absmax, offset, NESTED_BLOCK)
    pair = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = tl.load(codes + pair, mask=pair < n_bytes, other=0).to(tl.int32)
    value = tl.interleave(tl.load(values + (byte >> 4)), tl.load(values + (byte & 15)))
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + element, (value * scale[:, None]).to(out.dtype.element_ty), mask=element < n)


@triton.jit
def _quantize_4bit(x, bounds, order, codes, absmax, n, n_bytes, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + element, mask=element < n, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=1)
    divisor = tl.maximum(largest, tl.full((), TINY, tl.float32))
    short = (block + 1) * BLOCK > n  # a partial last block: divided, and its absmax has the floor TINY
    reciprocal = tl.div_rn(1.0, divisor)
    scaled = tl.where(short[:, None], tl.div_rn(value, divisor[:, None]), value * reciprocal[:, None])
    tl.store(absmax + block, tl.where(short, divisor, largest), mask=block * BLOCK < n)
    rank = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for i in tl.static_range(15):
        rank += (scaled > tl.load(bounds + i)).to(tl.int32)
    high, low = tl.split(tl.reshape(tl.load(order + rank), (BLOCKS, BLOCK // 2, 2)))
    pair = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(codes + pair, (high << 4) | low, mask=pair < n_bytes)


@triton.jit
def _quantize_8bit(x, lookup, codes, absmax, n, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(x + element, mask=element < n, other=0.0)
    largest = tl.max(tl.abs(value), axis=1)
    tl.store(absmax + block, largest, mask=block * BLOCK < n)
    scaled = value * tl.div_rn(1.0, largest)[:, None]
    scaled = tl.where(scaled == scaled, scaled, -1.0)  # NaN (0 * inf in a block of zeros): the first grid point
    scaled = tl.minimum(tl.maximum(scaled, -1.0), 1.0)
    index = ((scaled + 1.0) * 32767.5 + 0.5).to(tl.int32)
    tl.store(codes + element, tl.load(lookup + index), mask=element < n)


@triton.jit
def _dequantize_8bit(codes, absmax, values, out, n, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    code = tl.load(codes + element, mask=element < n, other=0).to(tl.int32)
    scale = tl.load(absmax + block, mask=block * BLOCK < n, other=0.0)
    tl.store(out + element, tl.load(values + code) * scale[:, None], mask=element < n)


@triton.jit
def _gemv_4bit(
    x, codes, absmax, values, nested_values, nested_absmax, offset, out, T, N, K,
    TS: tl.constexpr, NS: tl.constexpr, KS: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute a tile (TS, NS) of the output. WHOLE: rows of W are whole blocks; else byte and block are found per element."""
    n_tiles = tl.cdiv(N, NS)
    n = (tl.program_id(0) % n_tiles).to(tl.int64) * NS + tl.arange(0, NS)
    t = (tl.program_id(0) // n_tiles).to(tl.int64) * TS + tl.arange(0, TS)
    total = tl.zeros((TS, NS, KS // BLOCK, BLOCK // 2) if WHOLE else (TS, NS, KS), tl.float32)
    for k_first in range(0, K, KS):
        k = k_first + tl.arange(0, KS)
        x_tile = tl.load(x + t[:, None] * K + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        if WHOLE:
            k_block = k_first // BLOCK + tl.arange(0, KS // BLOCK)
            block = n[:, None] * (K // BLOCK) + k_block[None, :]
            inside = (n < N)[:, None] & (k_block * BLOCK < K)[None, :]
            scale = _constants(absmax, block, inside, nested_values, nested_absmax, offset, NESTED_BLOCK)[:, :, None]
            pair = block[:, :, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, None, :]
            byte = tl.load(codes + pair, mask=inside[:, :, None], other=0).to(tl.int32)
            even, odd = tl.split(tl.reshape(x_tile, (TS, KS // BLOCK, BLOCK // 2, 2)))
            total = tl.fma((tl.load(values + (byte >> 4)) * scale)[None, :, :, :], even[:, None, :, :], total)
            total = tl.fma((tl.load(values + (byte & 15)) * scale)[None, :, :, :], odd[:, None, :, :], total)
        else:
            element = n[:, None] * K + k[None, :]
            inside = (n < N)[:, None] & (k < K)[None, :]
            scale = _constants(absmax, element // BLOCK, inside, nested_values, nested_absmax, offset, NESTED_BLOCK)
            byte = tl.load(codes + element // 2, mask=inside, other=0).to(tl.int32)
            code = tl.where(element % 2 == 0, byte >> 4, byte & 15)
            total = tl.fma((tl.load(values + code) * scale)[None, :, :], x_tile[:, None, :], total)
    if WHOLE:
        total = tl.reshape(total, (TS, NS, KS // 2))
    y = tl.sum(total, axis=2)
    tl.store(out + t[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit
def _code(codes, element, inside, BITS: tl.constexpr):
    """Code `element` of a string of bits, the first code in the highest bits; of 3 bits it may continue in the next byte."""
    byte, start = element * BITS // 8, (element * BITS % 8).to(tl.int32)
    found = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    if BITS == 3:
        following = tl.load(codes + byte + 1, mask=inside & (start > 8 - BITS), other=0).to(tl.int32)
        return ((found << 8 | following) >> (16 - BITS - start)) & 7
    return (found >> (8 - BITS - start)) & ((1 << BITS) - 1)


@triton.jit
def _group_values(
    codes, values, scale, zero, nested_values, nested_absmax, offset, element, inside,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """The float32 values of the codes `element` of a grouped weight."""
    value, group = tl.load(values + _code(codes, element, inside, BITS)), element // GROUP
    if ZERO:
        value -= _code(zero, group, inside, BITS).to(tl.float32)
    return value * _constants(scale, group, inside, nested_values, nested_absmax, offset, NESTED_BLOCK)


@triton.jit
def _dequantize_grouped(
    codes, values, scale, zero, nested_values, nested_absmax, offset, order, out, n, K: tl.constexpr, SIZE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, ORDERED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = element < n
    value = _group_values(
        codes, values, scale, zero, nested_values, nested_absmax, offset, element, inside, BITS, GROUP, ZERO, NESTED_BLOCK
    )
    if ORDERED:
        column = element % K
        to = tl.load(order + column, mask=inside, other=0)
        inside = inside & (to >= 0) & (to < K)  # a wrong order writes nothing outside of the row
        element = element - column + to
    tl.store(out + element, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gemv_grouped(
    x, codes, values, scale, zero, nested_values, nested_absmax, offset, out, T, N, K, TS: tl.constexpr, NS: tl.constexpr,
    KS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a tile (TS, NS) of the output."""
    n_tiles = tl.cdiv(N, NS)
    n = (tl.program_id(0) % n_tiles).to(tl.int64) * NS + tl.arange(0, NS)
    t = (tl.program_id(0) // n_tiles).to(tl.int64) * TS + tl.arange(0, TS)
    total = tl.zeros((TS, NS, KS), tl.float32)
    for k_first in range(0, K, KS):
        k = k_first + tl.arange(0, KS)
        x_tile = tl.load(x + t[:, None] * K + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        inside = (n < N)[:, None] & (k < K)[None, :]
        w_tile = _group_values(
            codes, values, scale, zero, nested_values, nested_absmax, offset, n[:, None] * K + k[None, :], inside,
            BITS, GROUP, ZERO, NESTED_BLOCK,
        )  # fmt: skip
        total = tl.fma(w_tile[None, :, :], x_tile[:, None, :], total)
    y = tl.sum(total, axis=2)
    tl.store(out + t[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit
def _largest(value):
    """The bits of the largest magnitude in each row; as integers they order like magnitudes, with NaN above all."""
    return tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _codes(value, code_type: tl.constexpr):
    """Round to the nearest codes, ties to even; values are below 2^22 (int8: wraps modulo 256) or not much above 448 (float8)."""
    return (value + ROUND).to(tl.int32, bitcast=True).to(tl.int8) if code_type == tl.int8 else value.to(code_type)


@triton.jit
def _row_scales(
    absmax, nested_values, nested_absmax, offset, out, N, K, TOP: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest = tl.zeros((ROWS,), tl.int32)
    for first in range(0, K // BLOCK + 2, BLOCKS):
        block = (n * K // BLOCK)[:, None] + first + tl.arange(0, BLOCKS)[None, :]
        inside = (n < N)[:, None] & (block * BLOCK < ((n + 1) * K)[:, None])
        constants = _constants(absmax, block, inside, nested_values, nested_absmax, offset, NESTED_BLOCK)
        largest = tl.maximum(largest, _largest(tl.where(inside, constants, 0.0)))
    tl.store(out + n, tl.div_rn(largest.to(tl.float32, bitcast=True), TOP), mask=n < N)


@triton.jit
def _quantize_rows(
    x, column_scale, codes, scale, n_parts, parts, C, TOP: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Quantise PARTS parts of 64 columns, one per row of the tile. A row of x has `parts` parts; the last may be short."""
    part = tl.program_id(0).to(tl.int64) * PARTS + tl.arange(0, PARTS)
    column = (part % parts)[:, None] * TERMS + tl.arange(0, TERMS)[None, :]
    element = (part // parts)[:, None] * C + column
    inside = (part < n_parts)[:, None] & (column < C)
    value = tl.load(x + element, mask=inside, other=0.0)
    if SCALED:
        value = value * tl.load(column_scale + column, mask=inside, other=0.0)
    largest = _largest(value).to(tl.float32, bitcast=True)
    factor = tl.div_rn(TOP, tl.where(largest > 0, largest, float("inf")))  # 0 for zeros and NaN
    scaled = value * factor[:, None]
    scaled = tl.where(scaled == scaled, scaled, 0.0)  # the part's scale shows the NaN
    scaled = tl.minimum(tl.maximum(scaled, -TOP), TOP)
    tl.store(codes + element, _codes(scaled, codes.dtype.element_ty), mask=inside)
    tl.store(scale + part, tl.div_rn(largest, TOP), mask=part < n_parts)


@triton.jit
def _weight_codes(
    codes, absmax, values, nested_values, nested_absmax, offset, row_scale, n, N, K, k_first,
    code_type: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """(rows `n`, 64): the weight's 8-bit codes from column `k_first`, a multiple of 64. A part has one absmax, or two of 32.

    The 16 values are scaled once per absmax and looked up by `tl.gather` within a warp: reads of a table in memory would be
    pipelined as four-byte copies (triton 3.7). Rounding comes last, otherwise its compiler rejects the transposed matmul.
    """
    GROUPS: tl.constexpr = 1 if BLOCK >= TERMS else TERMS // BLOCK
    element = n * K + k_first
    block = (element // BLOCK)[:, None] + tl.arange(0, GROUPS)[None, :]
    constants = _constants(absmax, block, (n < N)[:, None], nested_values, nested_absmax, offset, NESTED_BLOCK)
    size = tl.load(row_scale + n, mask=n < N, other=0.0)
    steps = constants * tl.div_rn(1.0, tl.where(size > 0, size, float("inf")))[:, None]
    pair = tl.arange(0, GROUPS)[:, None] * (TERMS // GROUPS // 2) + tl.arange(0, TERMS // GROUPS // 2)[None, :]
    byte = tl.load(codes + (element // 2)[:, None, None] + pair[None, :, :], mask=(n < N)[:, None, None], other=0).to(tl.int32)
    table = tl.load(values + tl.arange(0, 16))[None, None, :] * steps[:, :, None]
    scaled = tl.interleave(tl.gather(table, byte >> 4, 2), tl.gather(table, byte & 15, 2))
    return _codes(tl.reshape(scaled, (n.shape[0], TERMS)), code_type)


@triton.jit
def _matmul_8bit(
    x_codes, x_scale, codes, absmax, values, nested_values, nested_absmax, offset, row_scale, out, T, N, K,
    TS: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Compute a tile (TS, 64) of the output. Its columns are rows of W, scaled at the end; transposed, columns of W."""
    terms, columns = (N, K) if TRANSPOSED else (K, N)
    tiles, parts = tl.cdiv(columns, TERMS), tl.cdiv(terms, TERMS)
    tile = tl.program_id(0) % tiles
    column = tile.to(tl.int64) * TERMS + tl.arange(0, TERMS)
    t = (tl.program_id(0) // tiles).to(tl.int64) * TS + tl.arange(0, TS)
    total = tl.zeros((TS, TERMS), tl.float32)
    for part in range(0, parts):
        term = part * TERMS + tl.arange(0, TERMS)
        inside = (t < T)[:, None] & (term < terms)[None, :]
        x_tile = tl.load(x_codes + t[:, None] * terms + term[None, :], mask=inside, other=0.0)
        n = term.to(tl.int64) if TRANSPOSED else column
        k_first = (tile if TRANSPOSED else part) * TERMS
        w_tile = _weight_codes(
            codes, absmax, values, nested_values, nested_absmax, offset, row_scale, n, N, K, k_first,
            x_tile.dtype, BLOCK, NESTED_BLOCK,
        )  # fmt: skip
        sums = tl.dot(x_tile, w_tile if TRANSPOSED else tl.trans(w_tile)).to(tl.float32)
        scale = tl.load(x_scale + t * parts + part, mask=t < T, other=0.0)
        total = tl.fma(sums, scale[:, None], total)
    if not TRANSPOSED:
        total *= tl.load(row_scale + column, mask=column < N, other=0.0)[None, :]
    tl.store(out + t[:, None] * columns + column[None, :], total, mask=(t < T)[:, None] & (column < columns)[None, :])


_interpreted = isinstance(_dequantize_4bit, InterpretedFunction)
if _interpreted != isinstance(tl.interleave, InterpretedFunction):
    raise BackendError(
        "TRITON_INTERPRET was set or unset after triton had been imported. Set it before Python starts, or leave it unset."
    )
device_types = ("cpu", "cuda") if _interpreted else ("cuda",)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: float) -> None:
    """Launch `programs` programs on the device of the first argument, without FMA contraction; 0 launches nothing."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)


def _per_tile(n: int, block_size: int) -> tuple[int, dict[str, int]]:
    """Number of programs for `n` elements, and the kernels' block-size constants."""
    return triton.cdiv(n, TILE), {"BLOCKS": TILE // block_size, "BLOCK": block_size}


def _pointers(weight: FourBit) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    """Codes, absmax, values and nested tensors of a weight (placeholders, never read, if there are none), and its block sizes."""
    nested, absmax = weight.nested, weight.absmax
    inner = (absmax,) * 3 if nested is None else (nested.values, nested.absmax, nested.offset)
    sizes = {"BLOCK": weight.block_size, "NESTED_BLOCK": 0 if nested is None else nested.block_size}
    return (weight.codes, absmax, weight.values, *inner), sizes


def quantize_4bit(x: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_4bit`."""
    n, device = x.numel(), x.device
    check_block_size(block_size)
    check_float(x, "x")
    check_tensor(x, "x", x.dtype, n, device)
    check_tensor(bounds, "bounds", torch.float32, 15, device)
    check_tensor(order, "order", torch.uint8, 16, device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    programs, blocks = _per_tile(n, block_size)
    _launch(_quantize_4bit, programs, x, bounds, order, codes, absmax, n, codes.numel(), **blocks)
    return codes, absmax


def quantize_sum_4bit(
    base: Scaled8bit, low_Nr: Tensor, lora_A: Tensor, bounds: Tensor, order: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_sum_4bit`."""
    return quantize_4bit(plain.sum_8bit(base, low_Nr, lora_A).view(-1), bounds, order, block_size)


def dequantize_4bit(weight: FourBit, out: Tensor) -> Tensor:
    """As `ops.dequantize_4bit`."""
    n, device = weight.shape.numel(), out.device
    check_weight(weight, device)
    check_float(out, "out")
    check_tensor(out, "out", out.dtype, n, device)
    pointers, sizes = _pointers(weight)
    programs, blocks = _per_tile(n, weight.block_size)
    _launch(_dequantize_4bit, programs, *pointers, out, n, weight.codes.numel(), **{**sizes, **blocks})
    return out


def quantize_8bit(x: Tensor, lookup: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_8bit`."""
    n, device = x.numel(), x.device
    check_block_size(block_size)
    check_tensor(x, "x", torch.float32, n, device)
    check_tensor(lookup, "lookup", torch.uint8, 65536, device)
    codes = torch.empty(n, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    programs, blocks = _per_tile(n, block_size)
    _launch(_quantize_8bit, programs, x, lookup, codes, absmax, n, **blocks)
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    """As `ops.dequantize_8bit`."""
    n, device = codes.numel(), codes.device
    check_block_size(block_size)
    check_tensor(codes, "codes", torch.uint8, n, device)
    check_tensor(absmax, "absmax", torch.float32, -(-n // block_size), device)
    check_tensor(values, "values", torch.float32, 256, device)
    out = torch.empty(n, dtype=torch.float32, device=device)
    programs, blocks = _per_tile(n, block_size)
    _launch(_dequantize_8bit, programs, codes, absmax, values, out, n, **blocks)
    return out


def gemv_4bit(x_TK: Tensor, weight: FourBit) -> Tensor:
    """As `ops.gemv_4bit`."""
    (N, K), T, device, block_size = weight.shape, len(x_TK), x_TK.device, weight.block_size
    check_weight(weight, device)
    check_float(x_TK, "x_TK")
    check_tensor(x_TK, "x_TK", x_TK.dtype, T * K, device)
    out_TN = torch.empty((T, N), dtype=x_TK.dtype, device=device)
    whole = K % block_size == 0
    ts = min(triton.next_power_of_2(max(T, 1)), GEMV_ROWS)
    ks = max(GEMV_COLUMNS, block_size) if whole else GEMV_COLUMNS
    ns = max(1, GEMV_TILE // ks)
    pointers, sizes = _pointers(weight)
    programs = triton.cdiv(T, ts) * triton.cdiv(N, ns)
    _launch(_gemv_4bit, programs, x_TK, *pointers, out_TN, T, N, K, TS=ts, NS=ns, KS=ks, **sizes, WHOLE=whole)
    return out_TN


def _grouped_pointers(weight: Grouped) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    """Codes, values, scales, zero points and nested tensors (placeholders, never read, if there are none), and sizes."""
    scale, zero, nested = weight.scale, weight.zero, weight.nested
    inner = (scale,) * 3 if nested is None else (nested.values, nested.absmax, nested.offset)
    sizes = {"BITS": weight.bits, "GROUP": max(1, weight.group_size), "ZERO": zero is not None}
    sizes["NESTED_BLOCK"] = 0 if nested is None else nested.block_size
    return (weight.codes.view(torch.uint8), weight.values, scale, scale if zero is None else zero, *inner), sizes


def dequantize_grouped(weight: Grouped, out: Tensor) -> Tensor:
    """As `ops.dequantize_grouped`."""
    n, K, device, order = weight.shape.numel(), weight.shape[-1], out.device, weight.order
    check_grouped(weight, device)
    check_float(out, "out")
    check_tensor(out, "out", out.dtype, n, device)
    pointers, sizes = _grouped_pointers(weight)
    _launch(
        _dequantize_grouped, triton.cdiv(n, GROUPED_TILE), *pointers, weight.scale if order is None else order, out, n, K=K,
        SIZE=GROUPED_TILE, ORDERED=order is not None, **sizes,
    )  # fmt: skip
    return out


def gemv_grouped(x_TK: Tensor, weight: Grouped) -> Tensor:
    """As `ops.gemv_grouped`."""
    (N, K), T, device = weight.shape, len(x_TK), x_TK.device
    check_unordered(weight)
    check_grouped(weight, device)
    check_float(x_TK, "x_TK")
    check_tensor(x_TK, "x_TK", x_TK.dtype, T * K, device)
    out_TN = torch.empty((T, N), dtype=x_TK.dtype, device=device)
    ts, ns = min(triton.next_power_of_2(max(T, 1)), GEMV_ROWS), GEMV_TILE // GEMV_COLUMNS
    pointers, sizes = _grouped_pointers(weight)
    programs = triton.cdiv(T, ts) * triton.cdiv(N, ns)
    _launch(_gemv_grouped, programs, x_TK, *pointers, out_TN, T, N, K, TS=ts, NS=ns, KS=GEMV_COLUMNS, **sizes)
    return out_TN


def matmul_grouped(x_TC: Tensor, weight: Grouped, transposed: bool, epilogue: Epilogue) -> Tensor:
    """As `ops.matmul_grouped`: as `matmul_4bit`."""
    check_unordered(weight)
    return decoded.matmul(partial(dequantize_grouped, weight), weight.shape, x_TC, transposed, epilogue)


def matmul_4bit(x_TC: Tensor, weight: FourBit, transposed: bool, epilogue: Epilogue) -> Tensor:
    """As `ops.matmul_4bit`: dequantised into a reused buffer, then the vendor library's matmul."""
    return decoded.matmul(partial(dequantize_4bit, weight), weight.shape, x_TC, transposed, epilogue)


def row_scales(weight: FourBit, code_type: torch.dtype = torch.int8) -> Tensor:
    """As `ops.row_scales`."""
    (N, K), device = weight.shape, weight.codes.device
    check_weight(weight, device)
    out_N = torch.empty(N, dtype=torch.float32, device=device)
    (_, absmax, _, *nested), sizes = _pointers(weight)
    top = float(LARGEST_CODE[code_type])
    _launch(_row_scales, triton.cdiv(N, 16), absmax, *nested, out_N, N, K, TOP=top, ROWS=16, BLOCKS=64, **sizes)
    return out_N


def quantize_rows(x_TC: Tensor, column_scale: Tensor | None = None, code_type: torch.dtype = torch.int8) -> Rows8bit:
    """As `ops.quantize_rows`; codes and scales are row-major, `start` is unused."""
    (T, C), device = x_TC.shape, x_TC.device
    check_tensor(x_TC, "x_TC", torch.float32, T * C, device)
    if column_scale is not None:
        check_tensor(column_scale, "column_scale", torch.float32, C, device)
    n_codes, n_scales = row_sizes(T, C)
    codes = torch.empty(n_codes, dtype=code_type, device=device)
    scale, start = (torch.empty(n_scales, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32))
    parts = triton.cdiv(C, PART)
    sizes = {"TOP": float(LARGEST_CODE[code_type]), "SCALED": column_scale is not None, "PARTS": TILE // PART}
    arguments = x_TC, x_TC if column_scale is None else column_scale, codes, scale, T * parts, parts, C
    _launch(_quantize_rows, triton.cdiv(T * parts, TILE // PART), *arguments, **sizes)
    return Rows8bit(codes, scale, start, T, C)


def matmul_8bit(x: Rows8bit, weight: FourBit, row_scale: Tensor, transposed: bool, epilogue: Epilogue) -> Tensor:
    """As `ops.matmul_8bit`."""
    (N, K), T, device = weight.shape, x.rows, weight.codes.device
    check_weight_8bit(weight.shape, weight.block_size)
    check_weight(weight, device)
    terms, columns = (N, K) if transposed else (K, N)
    if x.columns != terms:
        raise InputError(f"'x' must have {terms} columns. Got {x.columns}.")
    n_codes, n_scales = row_sizes(T, terms)
    if x.codes.dtype not in LARGEST_CODE:
        raise InputError(f"The codes of 'x' must be {' or '.join(map(str, LARGEST_CODE))}. Got {x.codes.dtype}.")
    check_tensor(x.codes, "codes", x.codes.dtype, n_codes, device)
    check_tensor(x.scale, "scale", torch.float32, n_scales, device)
    check_tensor(row_scale, "row_scale", torch.float32, N, device)
    out = torch.empty((T, columns), dtype=torch.float32, device=device)
    ts = MATMUL_ROWS if T > MATMUL_ROWS // 2 else MATMUL_ROWS // 2
    pointers, sizes = _pointers(weight)
    _launch(
        _matmul_8bit, triton.cdiv(T, ts) * triton.cdiv(columns, PART), x.codes, x.scale, *pointers, row_scale, out, T, N, K,
        TS=ts, **sizes, TRANSPOSED=transposed, num_warps=ts // MATMUL_ROWS_A_WARP,
    )  # fmt: skip
    if epilogue.bias is not None:
        out += epilogue.bias
    if epilogue.low is not None and epilogue.factor is not None:
        out.addmm_(epilogue.low, epilogue.factor, alpha=epilogue.scale)
    return out


def matmul_8bit_dense(x: Rows8bit, weight_NK: Tensor, row_scale: Tensor, transposed: bool, out: Tensor) -> Tensor:
    """Not implemented: a 16-bit head already runs on tensor cores."""
    raise BackendError("The 'triton' kernels have no 8-bit product with a dense matrix. Use torch's, or the 'reference' backend.")


def decoder_layers(
    x_TH: Tensor, layers: DecoderLayers, keys: Tensor, values: Tensor, step: Step, segments: Sequence[Segment]
) -> None:
    """As `ops.decoder_layers`: in plain torch around the matrix-vector kernel."""
    decoder.decoder_layers(gemv_4bit, x_TH, layers, keys, values, step, segments)
