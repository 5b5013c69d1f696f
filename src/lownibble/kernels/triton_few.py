"""Products of few rows with 4-bit weights on CUDA, bound by reading the codes: decoding of up to `MOST_ROWS` sequences at once.

**One row** (`one_row`): a program computes a few outputs. A thread reads 16 bytes of a row of W at a time, 32 codes that share a
constant, and multiplies them with 32 values of x, which it keeps for its other rows of W; the sum of the 32 products is scaled
once. x is read as 32-bit words, whose halves are the factors of a byte's two codes, so bytes and words lie alike in registers and
nothing is exchanged between threads before the end.

**More rows** (`few_rows`): a tile of W is decoded, rounded to x's dtype as where weights are decoded into a buffer, and
multiplied by tensor cores with all rows of x, padded to 16: high and low codes are two products, with the even and the odd
columns of x. So the work for a weight does not grow with the rows. With few outputs the columns are split among programs, and
their parts are added in a fixed order by a second launch (`add_parts`): results are the same from run to run.

Both decode what a row of W has in groups of whole 32 codes: NF4, FP4, MXFP4 and int4 with zero points, constants of single or
double quantisation. Values come from a table of 16 in shared memory, which has them in 16 banks: no conflicts whatever the codes.

Counted for 14336 x 4096 in NF4 with double quantisation: 29.4 MB of codes, 0.9 MB of constants, 0.03 MB of outputs, 0.52 bytes a
weight: 9 us at 3.35 TB/s, 6.3 us at 4.8 TB/s. INSTRUCTIONS
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lownibble.kernels.triton_programs import _code, _constants

MOST_ROWS = 64
"""Rows of x at most."""
CODES = 32
"""Codes that a thread of `one_row` reads at once, 16 bytes; groups are a multiple of it."""


class OneRow(NamedTuple):
    """Constants of `one_row`: outputs of a program, runs of 32 codes of each that it reads at a time, warps, stages."""

    rows: int = 4
    chunks: int = 64
    warps: int = 4
    stages: int = 1


class FewRows(NamedTuple):
    """Constants of `few_rows`: outputs and pairs of codes of a tile, warps, stages, and programs that fill the device."""

    rows: int = 64
    pairs: int = 64
    warps: int = 4
    stages: int = 3
    programs: int = 264


ONE_ROW, FEW_ROWS = OneRow(), FewRows()
"""Chosen by counting, not yet by measuring."""
WHOLE, WHOLE_BITS = tl.constexpr(2.0**23), tl.constexpr(0x4B000000)
"""The first float32 from which on neighbours differ by one, and its bits."""
ADDED = 1024
"""Outputs of a program of `add_parts`."""


class Codes(NamedTuple):
    """A packed weight (N, K) as the programs take it: tensors (placeholders, never read, for those it has not), and constants."""

    tensors: tuple[Tensor, ...]
    constants: dict[str, int]
    group: int


@triton.jit
def _values(values, code, SIZE: tl.constexpr):
    """The values of SIZE codes, of any shape, from the table."""
    found = tl.gather(tl.load(values + tl.arange(0, 16)), tl.reshape(code, (SIZE,)), 0)
    return tl.reshape(found, code.shape)


@triton.jit
def _decoded(values, zero, byte, group, inside, SIZE: tl.constexpr, ZERO: tl.constexpr):
    """The values of the high and the low codes of SIZE bytes, whose last dimension has one `group`, before they are scaled.

    With zero points the values are the codes themselves: as the low bits of 2^23 they are numbers without being converted.
    """
    if ZERO:
        point = _code(zero, group, inside, 4).to(tl.float32)[:, :, None] + WHOLE
        high = ((byte >> 4) | WHOLE_BITS).to(tl.float32, bitcast=True) - point
        low = ((byte & 15) | WHOLE_BITS).to(tl.float32, bitcast=True) - point
    else:
        high, low = _values(values, byte >> 4, SIZE), _values(values, byte & 15, SIZE)
    return high, low


@triton.jit
def _halves(word, KIND: tl.constexpr):
    """The two 16-bit numbers in each 32-bit word, the first in the low bits."""
    first, second = (word & 0xFFFF).to(tl.uint16), (word >> 16).to(tl.uint16)
    return first.to(KIND, bitcast=True), second.to(KIND, bitcast=True)


@triton.jit
def one_row(
    x, codes, values, scale, zero, nested_values, nested_absmax, offset, out, N, chunks, KIND: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, NESTED_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS outputs. `chunks`: runs of 32 codes in a row of W; `x`: words of two values."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, 16)
    total = tl.zeros((ROWS, CHUNKS), tl.float32)
    for first in tl.range(0, chunks, CHUNKS, num_stages=STAGES):
        chunk = first + tl.arange(0, CHUNKS)
        run = n.to(tl.int64)[:, None] * chunks + chunk[None, :]
        inside = (n < N)[:, None] & (chunk < chunks)[None, :]
        word = tl.load(x + chunk[:, None] * 16 + j[None, :], mask=(chunk < chunks)[:, None], other=0)
        byte = tl.load(codes + run[:, :, None] * 16 + j[None, None, :], mask=inside[:, :, None], other=0).to(tl.int32)
        group = run // (GROUP // 32)
        high, low = _decoded(values, zero, byte, group, inside, ROWS * CHUNKS * 16, ZERO)
        even, odd = _halves(word, KIND)
        # multiplied and added one by one, which are contracted, as all terms of a run are in one thread
        product = tl.sum(high * even.to(tl.float32)[None, :, :], axis=2) + tl.sum(low * odd.to(tl.float32)[None, :, :], axis=2)
        total += product * _constants(scale, group, inside, nested_values, nested_absmax, offset, NESTED_BLOCK)
    tl.store(out + n, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=n < N)


@triton.jit
def few_rows(
    x, codes, values, scale, zero, nested_values, nested_absmax, offset, out, T, N, pairs, per_part,
    KIND: tl.constexpr, TS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile (TS, ROWS) of the output, or of a part of its sums: `per_part` of the pairs of codes in a row of W."""
    SHARED: tl.constexpr = GROUP // 2 if GROUP // 2 < PAIRS else PAIRS
    tiles = tl.cdiv(N, ROWS)
    part = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TS)
    start = n.to(tl.int64)[:, None] * pairs
    total = tl.zeros((ROWS, TS), tl.float32)
    last = tl.minimum((part + 1) * per_part, pairs)
    for first in tl.range(part * per_part, last, PAIRS, num_stages=STAGES):
        pair = first + tl.arange(0, PAIRS)
        word = tl.load(x + t[:, None] * pairs + pair[None, :], mask=(t < T)[:, None] & (pair < last)[None, :], other=0)
        byte = tl.load(codes + start + pair[None, :], mask=(n < N)[:, None] & (pair < last)[None, :], other=0).to(tl.int32)
        of_groups = first + tl.arange(0, PAIRS // SHARED) * SHARED
        inside = (n < N)[:, None] & (of_groups < last)[None, :]
        group = (start + of_groups[None, :]) // (GROUP // 2)
        grouped = tl.reshape(byte, (ROWS, PAIRS // SHARED, SHARED))
        high, low = _decoded(values, zero, grouped, group, inside, ROWS * PAIRS, ZERO)
        constants = _constants(scale, group, inside, nested_values, nested_absmax, offset, NESTED_BLOCK)[:, :, None]
        even, odd = _halves(word, KIND)
        high = tl.reshape((high * constants).to(KIND), (ROWS, PAIRS))
        low = tl.reshape((low * constants).to(KIND), (ROWS, PAIRS))
        total = tl.dot(high, tl.trans(even), total)
        total = tl.dot(low, tl.trans(odd), total)
    place = (part * T + t)[None, :].to(tl.int64) * N + n[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(t < T)[None, :] & (n < N)[:, None])


@triton.jit
def add_parts(parts, out, count, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """SIZE of the outputs: the sum of their PARTS parts, in order."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * count + place, mask=place < count, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < count)


def takes(T: int, K: int, dtype: torch.dtype, group: int, bits: int = 4) -> bool:
    """Whether the programs multiply T rows of `dtype` with a weight of K columns in groups of `group` codes."""
    whole = group % CODES == 0 and group & (group - 1) == 0 and K % group == 0
    return dtype.itemsize == 2 and bits == 4 and whole and 0 < T <= MOST_ROWS


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants)


def product(x_TK: Tensor, weight: Codes, N: int) -> Tensor:
    """`x @ W.T`, (T, N) in x's dtype; `takes` is true, and arguments are checked."""
    (T, K), dtype = x_TK.shape, x_TK.dtype
    out_TN = torch.empty((T, N), dtype=dtype, device=x_TK.device)
    # bytes and words of x may lie anywhere in a larger tensor: 32-bit words need an address that is a multiple of 4
    words = (x_TK if x_TK.data_ptr() % 4 == 0 else x_TK.clone()).view(torch.int32)
    common: dict[str, Any] = {"KIND": _KINDS[dtype], "GROUP": weight.group, **weight.constants}
    if T == 1:
        how = ONE_ROW
        _launch(
            one_row, triton.cdiv(N, how.rows), words, *weight.tensors, out_TN, N, K // CODES, ROWS=how.rows, CHUNKS=how.chunks,
            STAGES=how.stages, num_warps=how.warps, **common,
        )  # fmt: skip
        return out_TN
    few, pairs = FEW_ROWS, K // 2
    tiles = triton.cdiv(N, few.rows)
    per_part = triton.cdiv(triton.cdiv(pairs, few.pairs), triton.cdiv(few.programs, tiles)) * few.pairs
    n_parts = triton.cdiv(pairs, per_part)
    to = out_TN if n_parts == 1 else torch.empty((n_parts, T, N), dtype=torch.float32, device=x_TK.device)
    _launch(
        few_rows, tiles * n_parts, words, *weight.tensors, to, T, N, pairs, per_part, TS=max(16, triton.next_power_of_2(T)),
        ROWS=few.rows, PAIRS=few.pairs, STAGES=few.stages, num_warps=few.warps, **common,
    )  # fmt: skip
    if n_parts > 1:
        _launch(add_parts, triton.cdiv(T * N, ADDED), to, out_TN, T * N, PARTS=n_parts, SIZE=ADDED)
    return out_TN


_KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
