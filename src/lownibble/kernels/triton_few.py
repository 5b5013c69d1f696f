"""Products of few rows with 4-bit weights on CUDA, bound by reading the codes: decoding of up to `MOST_ROWS` sequences at once.

**One row** (`one_row`): a program computes a few outputs. A thread has 16 bytes of a row of W at a time, 32 codes that share a
constant, and multiplies them with 32 values of x, which it keeps for its other rows of W; the sum of the 32 products is scaled
once. Threads exchange nothing before the end.

**More rows** (`few_rows`): a tile of W is decoded, rounded to x's dtype as where weights are decoded into a buffer, and
multiplied by tensor cores with all rows of x, padded to 16. So the work for a weight does not grow with the rows. With few
outputs the columns are split among programs, and their parts are added in a fixed order by a second launch (`add_parts`): results
are the same from run to run.

Both decode what a row of W has in groups of whole 32 codes: NF4, FP4, MXFP4 and int4 with zero points, constants of single or
double quantisation. Codes are read as 32-bit words, by copies of 16 bytes to shared memory that run ahead of the arithmetic, and
shifted apart in registers. Values come from a table of 16 in shared memory, which has them in 16 banks: no conflicts whatever the
codes are. int4 takes no table.

Counted for 14336 x 4096 in NF4 with double quantisation: 29.4 MB of codes and 0.9 MB of constants are 0.52 bytes a weight, 9 us
at 3.35 TB/s, 6.3 us at 4.8 TB/s. In the machine code for capability 9.0 (`nvdisasm`) one row takes 5.7 instructions a weight:
shift, mask, address, lookup, multiply-add, and 0.7 for x, copies and constants (half a one more since Triton 3.8, which adds the
products in pairs); few rows take 7.5, of which one scales and the rest rounds and moves to the tensor cores. At four instructions
a clock of 132 multiprocessors at 1.75 GHz that is 11 and 15 us.
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
    warps: int = 2
    stages: int = 2


class FewRows(NamedTuple):
    """Constants of `few_rows`: outputs and words of 8 codes of a tile, warps, stages, and programs that fill the device."""

    rows: int = 64
    words: int = 16
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
def _code_of(word, i: tl.constexpr):
    """Code i of the 8 in each word: two a byte, the first in the high bits."""
    return (word >> (4 * (i ^ 1))) & 15


@triton.jit
def _codes_of(word):
    """The 8 codes of each word, in order, as three more dimensions: bits of their number, which stay in the word's thread."""
    even = tl.join(tl.join(_code_of(word, 0), _code_of(word, 4)), tl.join(_code_of(word, 2), _code_of(word, 6)))
    odd = tl.join(tl.join(_code_of(word, 1), _code_of(word, 5)), tl.join(_code_of(word, 3), _code_of(word, 7)))
    return tl.join(even, odd)


@triton.jit
def _decoded(
    word, values, zero, group, inside, ROWS: tl.constexpr, GROUPS: tl.constexpr, TERMS: tl.constexpr, ZERO: tl.constexpr
):  # fmt: skip
    """The values (ROWS, GROUPS, TERMS) of the codes in words, before they are scaled. `group`: (ROWS, GROUPS).

    With zero points the values are the codes themselves: as the low bits of 2^23 they are numbers without being converted.
    """
    codes = _codes_of(word)
    if ZERO:
        point = _code(zero, group, inside, 4).to(tl.float32)[:, :, None] + WHOLE
        codes = tl.reshape(codes, (ROWS, GROUPS, TERMS))
        value = (codes | WHOLE_BITS).to(tl.float32, bitcast=True) - point
    else:
        table, flat = tl.load(values + tl.arange(0, 16)), tl.reshape(codes, (ROWS * GROUPS * TERMS,))
        value = tl.reshape(tl.gather(table, flat.to(tl.int32), 0), (ROWS, GROUPS, TERMS))
    return value


@triton.jit
def one_row(
    x, words, values, scale, zero, nested_values, nested_absmax, offset, out, N, chunks, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, NESTED_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS outputs. `chunks`: runs of 32 codes in a row of W."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w, k = tl.arange(0, 4), tl.arange(0, 32)
    total = tl.zeros((ROWS, CHUNKS), tl.float32)
    for first in tl.range(0, chunks, CHUNKS, num_stages=STAGES):
        chunk = first + tl.arange(0, CHUNKS)
        run = n.to(tl.int64)[:, None] * chunks + chunk[None, :]
        inside = (n < N)[:, None] & (chunk < chunks)[None, :]
        x_tile = tl.load(x + chunk[:, None] * 32 + k[None, :], mask=(chunk < chunks)[:, None], other=0.0).to(tl.float32)
        word = tl.load(words + run[:, :, None] * 4 + w[None, None, :], mask=inside[:, :, None], other=0)
        group = run // (GROUP // 32)
        value = _decoded(word.to(tl.uint32, bitcast=True), values, zero, group, inside, ROWS, CHUNKS, 32, ZERO)
        constants = _constants(scale, group, inside, nested_values, nested_absmax, offset, NESTED_BLOCK)
        # the terms of a run are in one thread, where products and their sum are contracted to multiply-adds
        total += tl.sum(value * x_tile[None, :, :], axis=2) * constants
    tl.store(out + n, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["T"])
def few_rows(
    x, words, values, scale, zero, nested_values, nested_absmax, offset, out, T, N, row_words, per_part,
    TS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile (TS, ROWS) of the output, or of a part of its sums: `per_part` of the `row_words` words in a row of W."""
    SHARED: tl.constexpr = GROUP // 8 if GROUP // 8 < WORDS else WORDS
    tiles = tl.cdiv(N, ROWS)
    part = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TS)
    start = n.to(tl.int64)[:, None] * row_words
    total = tl.zeros((ROWS, TS), tl.float32)
    last = tl.minimum((part + 1) * per_part, row_words)
    for first in tl.range(part * per_part, last, WORDS, num_stages=STAGES):
        k = first * 8 + tl.arange(0, WORDS * 8)
        place = first + tl.arange(0, WORDS)
        x_tile = tl.load(
            x + t[:, None] * (row_words * 8) + k[None, :], mask=(t < T)[:, None] & (k < last * 8)[None, :], other=0.0
        )
        word = tl.load(words + start + place[None, :], mask=(n < N)[:, None] & (place < last)[None, :], other=0)
        of_groups = first + tl.arange(0, WORDS // SHARED) * SHARED
        inside = (n < N)[:, None] & (of_groups < last)[None, :]
        group = (start + of_groups[None, :]) // (GROUP // 8)
        word = word.to(tl.uint32, bitcast=True)
        value = _decoded(word, values, zero, group, inside, ROWS, WORDS // SHARED, SHARED * 8, ZERO)
        constants = _constants(scale, group, inside, nested_values, nested_absmax, offset, NESTED_BLOCK)
        weight = tl.reshape((value * constants[:, :, None]).to(x.dtype.element_ty), (ROWS, WORDS * 8))
        total = tl.dot(weight, tl.trans(x_tile), total)
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
    whole = group > 0 and group % CODES == 0 and group & (group - 1) == 0 and K % group == 0  # so codes are whole words, too
    return dtype.itemsize == 2 and bits == 4 and whole and K > 0 and 0 < T <= MOST_ROWS


def kernel_of(T: int) -> tuple[str, int]:
    """The kernel for T rows, and the rows of its tile."""
    return ("one_row", 1) if T == 1 else ("few_rows", max(16, triton.next_power_of_2(T)))


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants)


def product(x_TK: Tensor, weight: Codes, N: int) -> Tensor:
    """`x @ W.T`, (T, N) in x's dtype; `takes` is true, and arguments are checked."""
    (T, K), dtype = x_TK.shape, x_TK.dtype
    out_TN = torch.empty((T, N), dtype=dtype, device=x_TK.device)
    codes, *others = weight.tensors
    tensors = (x_TK, codes.view(torch.int32), *others)
    common: dict[str, Any] = {"GROUP": weight.group, **weight.constants}
    if T == 1:
        how = ONE_ROW
        _launch(
            one_row, triton.cdiv(N, how.rows), *tensors, out_TN, N, K // CODES, ROWS=how.rows, CHUNKS=how.chunks,
            STAGES=how.stages, num_warps=how.warps, **common,
        )  # fmt: skip
        return out_TN
    few, row_words = FEW_ROWS, K // 8
    tiles = triton.cdiv(N, few.rows)
    per_part = triton.cdiv(triton.cdiv(row_words, few.words), triton.cdiv(few.programs, tiles)) * few.words
    n_parts = triton.cdiv(row_words, per_part)
    to = out_TN if n_parts == 1 else torch.empty((n_parts, T, N), dtype=torch.float32, device=x_TK.device)
    _launch(
        few_rows, tiles * n_parts, *tensors, to, T, N, row_words, per_part, TS=kernel_of(T)[1],
        ROWS=few.rows, WORDS=few.words, STAGES=few.stages, num_warps=few.warps, **common,
    )  # fmt: skip
    if n_parts > 1:
        _launch(add_parts, triton.cdiv(T * N, ADDED), to, out_TN, T * N, PARTS=n_parts, SIZE=ADDED)
    return out_TN
