"""The programs of the Triton kernels; `triton.py` checks arguments and launches them.

Each program processes TILE elements: whole blocks, one per row of a two-dimensional tile, so that a block's absmax is loaded
(and, if double-quantised, dequantised) once and its largest magnitude is a reduction along the row. A byte's two codes are
dequantised side by side and interleaved, so that loads and stores stay contiguous. Tables are read through the L1 cache: 16
values are 64 bytes, one transaction per warp whatever the codes are.

Results are bit-identical to the reference's, but for the cross-entropy. Three things would break that and are ruled out:
- contraction of `a * b + c` into one rounding: every launch has `enable_fp_fusion=False` (LLVM does not fuse, ptxas gets
  `--fmad=false`), and the matrix-vector product requests its fused multiply-adds explicitly (`tl.fma`);
- division: `/` is the approximate `div.full.f32` on NVIDIA; `tl.div_rn` rounds correctly;
- subnormals: float32 multiplications and `div_rn` keep them (no `.ftz` in the PTX).
`tests/kernels/test_triton_compile.py` compiles every kernel for a GPU, without needing one, and checks this in the PTX.

Grouped weights: one element of the tile per code, whatever its bits; neighbours read the same constants from the cache. Codes of
8 bits are looked up in a table of 256 values, since devices before capability 8.9 cannot convert float8.

8-bit matmuls are the vendor's (`triton.py`); the programs here make their operands. Weights go from 4 to 8 bits through the same
table, each value times its block's constant over the row's scale, as rows or transposed, so that both directions have the summed
dimension last. Codes equal the reference's, except that on capability 8.9 Triton before 3.9 rounds to float8 through float16, so
a value next to a tie may get the other neighbour.

The cross-entropy reads a row of logits twice and writes it once, where torch's operations on a float32 copy take a dozen passes.
Its exponentials and logarithms are the device's, so it equals the reference to float32 rounding, not bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lownibble.kernels.types import IGNORED, PART

TINY = tl.constexpr(1e-38)  # as in reference.py
TERMS = tl.constexpr(PART)
NO_LABEL = tl.constexpr(IGNORED)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; unlike -inf it can be subtracted from -inf
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
def dequantize_4bit(
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
def quantize_4bit(x, bounds, order, codes, absmax, n, n_bytes, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
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
def quantize_8bit(x, lookup, codes, absmax, n, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
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
def dequantize_8bit(codes, absmax, values, out, n, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    code = tl.load(codes + element, mask=element < n, other=0).to(tl.int32)
    scale = tl.load(absmax + block, mask=block * BLOCK < n, other=0.0)
    tl.store(out + element, tl.load(values + code) * scale[:, None], mask=element < n)


@triton.jit
def gemv_4bit(
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
def dequantize_grouped(
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
def gemv_grouped(
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
def row_scales(
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
def quantize_rows(x, column_scale, codes, scale, C, TOP: tl.constexpr, SCALED: tl.constexpr, SIZE: tl.constexpr):
    """Quantise one row, SIZE columns at a time, in two passes; the second finds the row in the cache."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((1,), tl.int32)
    for first in range(0, C, SIZE):
        largest = tl.maximum(largest, _largest(_row_values(x, column_scale, row, first, C, SCALED, SIZE)[None, :]))
    size = largest.to(tl.float32, bitcast=True)
    factor = tl.div_rn(TOP, tl.where(size > 0, size, float("inf")))  # 0 for zeros and NaN
    for first in range(0, C, SIZE):
        scaled = _row_values(x, column_scale, row, first, C, SCALED, SIZE) * factor
        scaled = tl.where(scaled == scaled, scaled, 0.0)  # the row's scale shows the NaN
        scaled = tl.minimum(tl.maximum(scaled, -TOP), TOP)
        column = first + tl.arange(0, SIZE)
        tl.store(codes + row * C + column, _codes(scaled, codes.dtype.element_ty), mask=column < C)
    tl.store(scale + row + tl.arange(0, 1), tl.div_rn(size, TOP))


@triton.jit
def _row_values(x, column_scale, row, first, C, SCALED: tl.constexpr, SIZE: tl.constexpr):
    column = first + tl.arange(0, SIZE)
    value = tl.load(x + row * C + column, mask=column < C, other=0.0).to(tl.float32)
    if SCALED:
        value = value * tl.load(column_scale + column, mask=column < C, other=0.0)
    return value


@triton.jit
def decode_8bit(
    codes, absmax, values, nested_values, nested_absmax, offset, row_scale, out, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A tile (ROWS, COLUMNS) of the weight's 8-bit codes, written as (N, K) or, transposed, as (K, N).

    A group is what shares an absmax: a block, or 64 columns of a larger one.
    """
    GROUP: tl.constexpr = BLOCK if BLOCK < TERMS else TERMS
    tiles = tl.cdiv(K, COLUMNS)
    n = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k_first = (tl.program_id(0) % tiles) * COLUMNS
    k_group = k_first + tl.arange(0, COLUMNS // GROUP) * GROUP
    start = n[:, None] * K + k_group[None, :]
    inside = (n < N)[:, None] & (k_group < K)[None, :]
    constants = _constants(absmax, start // BLOCK, inside, nested_values, nested_absmax, offset, NESTED_BLOCK)
    size = tl.load(row_scale + n, mask=n < N, other=0.0)
    steps = constants * tl.div_rn(1.0, tl.where(size > 0, size, float("inf")))[:, None]
    pair = (start // 2)[:, :, None] + tl.arange(0, GROUP // 2)[None, None, :]
    byte = tl.load(codes + pair, mask=inside[:, :, None], other=0).to(tl.int32)
    value = tl.interleave(tl.load(values + (byte >> 4)), tl.load(values + (byte & 15)))
    tile = _codes(tl.reshape(value * steps[:, :, None], (ROWS, COLUMNS)), out.dtype.element_ty)
    k = k_first + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        tl.store(out + k.to(tl.int64)[:, None] * N + n[None, :], tl.trans(tile), mask=(k < K)[:, None] & (n < N)[None, :])
    else:
        tl.store(out + n[:, None] * K + k[None, :], tile, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def scale_sums(sums, row_scale, column_scale, bias, out, C, SCALED: tl.constexpr, BIAS: tl.constexpr, SIZE: tl.constexpr):
    """SIZE columns of a row: integer sums times the row's scale and the column's, plus a bias."""
    tiles = tl.cdiv(C, SIZE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * SIZE + tl.arange(0, SIZE)
    value = tl.load(sums + row * C + column, mask=column < C, other=0).to(tl.float32) * tl.load(row_scale + row)
    if SCALED:
        value = value * tl.load(column_scale + column, mask=column < C, other=0.0)
    if BIAS:
        value = value + tl.load(bias + column, mask=column < C, other=0.0)
    tl.store(out + row * C + column, value.to(out.dtype.element_ty), mask=column < C)


@triton.jit
def cross_entropy(
    logits, labels, scale, loss, V, ON_DEVICE: tl.constexpr, GRADIENT: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """A row's cross-entropy, SIZE logits at a time; a second pass replaces the logits by the gradient times `scale`.

    The first pass keeps the largest logit so far and the sum of exponentials relative to it.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * V
    # Before any store. A wrong label reads nothing.
    chosen = tl.load(logits + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    largest = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, V, SIZE):
        column = first + tl.arange(0, SIZE)
        value = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(value, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(value - largest), axis=0)
    tl.store(loss + row, tl.where(label == NO_LABEL, 0.0, largest + tl.log(total) - chosen))
    if GRADIENT:
        if ON_DEVICE:
            scale = tl.load(scale)
        factor = tl.div_rn(scale, total)
        for first in range(0, V, SIZE):
            column = first + tl.arange(0, SIZE)
            value = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
            value = tl.exp(value - largest) * factor
            value = tl.where(column == label, value - scale, value)
            value = tl.where(label == NO_LABEL, 0.0, value)
            tl.store(logits + column, value.to(logits.dtype.element_ty), mask=column < V)
