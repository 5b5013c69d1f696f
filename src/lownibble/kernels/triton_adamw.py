"""AdamW with moments in 8 bits as one Triton kernel for many tensors.

A launch takes a table instead of tensors: a row of addresses and sizes for each tensor, in which a program finds its own by
bisection: nine reads for 448 tensors, where a table of all programs would have 20,000 entries to make and to send. A program
updates whole blocks, one per row of a two-dimensional tile, so that a block's largest magnitude is a reduction along the row.
Tensors with float32 moments, and those of another dtype, are launches of their own.

Gradients are elsewhere in each step, and bias corrections change, so the table is made anew: nine numbers a tensor, written on
the host and sent by one asynchronous copy from pinned memory, which torch's allocator keeps until the copy is done. Rejected:
torch's own operations, over stretches or for all tensors at once (`torch._foreach_*`): dozens of launches, each reading and
writing float32 moments; a table that is kept and mended where something moved: it would have to be looked through all the same.

Codes are found by bisection of the 255 bounds, 1 KiB that stays in the L1 cache; the plain path's table of cells takes 50. Bits
equal the plain path's, by the means of `triton_programs.py` (no contraction, `div_rn`, `sqrt_rn`, no flushed subnormals), where
that one's square root is rounded correctly; torch's on a CPU may be one unit in the last place off. Values that are not
finite are not compared: a reduction passes over NaN here.

With `found_inf` the program reads it, and if it is set takes its tensor for empty: the host does not wait, and nothing else is
read or written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lownibble.errors import InputError
from lownibble.kernels.adamw import AdamPart, AdamStep, CodeMap
from lownibble.kernels.checks import check_float, check_tensor

TILE, WARPS = 2048, 8
"""Elements per program, or one block where that is more: 8 per thread, at most 128 registers."""

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _nearest(scaled, bounds):
    """The number of bounds below each value; of 255, by halves."""
    code = tl.zeros(scaled.shape, tl.int32)
    for i in tl.static_range(8):
        middle = code + (128 >> i)
        code = tl.where(scaled > tl.load(bounds + middle - 1), middle, code)
    return code


@triton.jit
def _encode(value, bounds, codes, absmax, block, element, inside, n, BLOCK: tl.constexpr):
    """As `adamw.encode`: a partial last block is divided, and its absmax has a floor."""
    largest = tl.max(tl.abs(value), axis=1)
    divisor = tl.maximum(largest, tl.full((), 1e-38, tl.float32))
    short = (block + 1) * BLOCK > n
    scaled = tl.where(short[:, None], tl.div_rn(value, divisor[:, None]), value * tl.div_rn(1.0, divisor)[:, None])
    tl.store(codes + element, _nearest(scaled, bounds).to(tl.uint8), mask=inside)
    tl.store(absmax + block, tl.where(short, divisor, largest), mask=tl.max(inside.to(tl.int32), axis=1) > 0)


@triton.jit
def _decode(values, codes, absmax, block, element, inside):
    scale = tl.load(absmax + block, mask=tl.max(inside.to(tl.int32), axis=1) > 0, other=0.0)
    code = tl.load(codes + element, mask=inside, other=0).to(tl.int32)
    return tl.load(values + code, mask=inside, other=0.0) * scale[:, None]


@triton.jit(do_not_specialize=["rows", "halvings"])
def adamw(
    table, rows, halvings, found_inf, values1, bounds1, values2, bounds2, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
    ENCODED: tl.constexpr, SKIPS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCKS blocks of one tensor.

    table: int64: `rows` rows of WIDTH numbers, at most 2^halvings: elements, first program, row of hyperparameters, addresses;
        then those rows, `AdamStep.numbers`, float32.
    """
    program = tl.program_id(0)
    low, high = 0, rows
    for _ in range(0, halvings):
        middle = (low + high) // 2
        ahead = tl.load(table + middle * WIDTH + 1) <= program
        low, high = tl.where(ahead, middle, low), tl.where(ahead, high, middle)
    row = table + low * WIDTH
    n = tl.load(row)
    if SKIPS:
        n = tl.where(tl.load(found_inf) == 0, n, 0)
    block = (program - tl.load(row + 1)) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = element < n
    number = (table + rows * WIDTH).to(tl.pointer_type(tl.float32)) + tl.load(row + 2) * 8
    parameter = tl.load(row + 3).to(tl.pointer_type(DTYPE))
    gradient = tl.load(tl.load(row + 4).to(tl.pointer_type(DTYPE)) + element, mask=inside, other=0.0).to(tl.float32)
    if ENCODED:
        codes1, codes2 = tl.load(row + 5).to(tl.pointer_type(tl.uint8)), tl.load(row + 6).to(tl.pointer_type(tl.uint8))
        absmax1, absmax2 = tl.load(row + 7).to(tl.pointer_type(tl.float32)), tl.load(row + 8).to(tl.pointer_type(tl.float32))
        average = _decode(values1, codes1, absmax1, block, element, inside)
        square = _decode(values2, codes2, absmax2, block, element, inside)
    else:
        first, second = tl.load(row + 5).to(tl.pointer_type(tl.float32)), tl.load(row + 6).to(tl.pointer_type(tl.float32))
        average = tl.load(first + element, mask=inside, other=0.0)
        square = tl.load(second + element, mask=inside, other=0.0)
    average = average * tl.load(number) + gradient * tl.load(number + 1)
    square = square * tl.load(number + 2) + (gradient * gradient) * tl.load(number + 3)
    root = tl.div_rn(tl.sqrt_rn(square), tl.load(number + 4)) + tl.load(number + 5)
    change = tl.div_rn(average, root) * tl.load(number + 6)
    value = tl.load(parameter + element, mask=inside, other=0.0).to(tl.float32) * tl.load(number + 7) + change
    tl.store(parameter + element, value.to(DTYPE), mask=inside)
    if ENCODED:
        _encode(average, bounds1, codes1, absmax1, block, element, inside, n, BLOCK)
        _encode(square, bounds2, codes2, absmax2, block, element, inside, n, BLOCK)
    else:
        tl.store(first + element, average, mask=inside)
        tl.store(second + element, square, mask=inside)


def _table(parts: Sequence[AdamPart], tile: int, device: torch.device) -> tuple[Tensor, int]:
    """The table on the device, and the number of programs."""
    rows: list[int] = []
    steps: dict[AdamStep, int] = {}
    programs = 0
    for step, parameter, gradient, moments in parts:
        number = steps.setdefault(step, len(steps))
        rows += (moments.n, programs, number, parameter.data_ptr(), gradient.data_ptr(), *moments.addresses)
        programs += -(-moments.n // tile)
    numbers = torch.tensor([step.numbers for step in steps], dtype=torch.float32).view(-1).view(torch.int64)
    host = torch.empty(len(rows) + len(numbers), dtype=torch.int64, pin_memory=device.type == "cuda")
    torch.cat([torch.tensor(rows), numbers], out=host)
    return host.to(device, non_blocking=True), programs


def adamw_8bit(parts: Sequence[AdamPart], books: tuple[CodeMap, CodeMap], found_inf: Tensor | None) -> None:
    """As `ops.adamw_8bit`; the host waits for nothing."""
    alike: dict[tuple[torch.dtype, bool], list[AdamPart]] = defaultdict(list)
    device, block_size = parts[0].moments.device, parts[0].moments.block_size
    for part in parts:
        n, dtype = part.moments.n, part.parameter.dtype
        if part.moments.device != device or part.moments.block_size != block_size:
            raise InputError(
                "All moments must be on one device, in blocks of one size. Update the others in a call of their own."
            )
        check_tensor(part.parameter, "parameter", dtype, n, device)
        check_tensor(part.gradient, "gradient", dtype, n, device)
        if n:
            alike[dtype, part.moments.absmax is not None].append(part)
    for book in books:
        check_tensor(book.values, "values", torch.float32, 256, device)
        check_tensor(book.bounds, "bounds", torch.float32, 256, device)
    if found_inf is not None:
        check_tensor(found_inf, "found_inf", torch.float32, 1, device)
    blocks = max(1, TILE // block_size)
    for (dtype, encoded), members in alike.items():
        check_float(members[0].parameter, "parameter")
        table, programs = _table(members, blocks * block_size, device)
        with torch.cuda.device_of(table):
            adamw[(programs,)](
                table, len(members), (len(members) - 1).bit_length(), table if found_inf is None else found_inf,
                books[0].values, books[0].bounds, books[1].values, books[1].bounds, WIDTH=9 if encoded else 7,
                DTYPE=_TYPES[dtype], ENCODED=encoded, SKIPS=found_inf is not None, BLOCKS=blocks, BLOCK=block_size,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
