"""AdamW with moments in 8 bits, in plain torch: the reference, and the path on a CPU. Formats are in `optim/eight_bit.py`.

A tensor is updated in stretches that fit in cache: moments dequantised to float32, updated, used, quantised again. Each operation
rounds once (no fused multiply-add, no scaled sum), so results depend neither on where a tensor is split nor on the number of
threads, and a kernel can give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lownibble.kernels.checks import check_block_size, check_tensor

STRETCH = 1 << 17
"""Elements dequantised at a time, a multiple of any block: temporaries fit in cache and hardly add to peak memory."""

_TINY = 1e-38  # bitsandbytes' floor for the absmax of an all-zero block

_CELL_BITS = 15  # low bits of a float that a cell ignores: 256 cells per power of two
_LOWEST = 2.0**-24  # below every boundary; smaller magnitudes share the first cell

Decode = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""`ops.dequantize_8bit` of a backend."""


@dataclass(frozen=True)
class AdamStep:
    """Hyperparameters of one AdamW step for one tensor; `step` counts from 1."""

    step: int
    rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float

    @property
    def numbers(self) -> tuple[float, ...]:
        """beta1, 1 - beta1, beta2, 1 - beta2, divisor of the second moment's root, epsilon, and the factors of the moments' ratio
        and of the parameter; to be rounded to float32."""
        beta1, beta2 = self.betas
        return (
            beta1, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2**self.step), self.epsilon,
            -self.rate / (1 - beta1**self.step), 1 - self.rate * self.weight_decay,
        )  # fmt: skip

    def update(self, parameter: Tensor, gradient: Tensor, average: Tensor, square: Tensor) -> None:
        """Update the moments and the parameter in place. All (n,); moments float32, the others of any floating dtype."""
        beta1, rest1, beta2, rest2, divisor, epsilon, factor, decay = self.numbers
        gradient = gradient.float()
        average.mul_(beta1).add_(gradient * rest1)
        square.mul_(beta2).add_((gradient * gradient).mul_(rest2))
        root = square.sqrt().div_(divisor).add_(epsilon)
        change = average.div(root).mul_(factor)
        parameter.copy_(parameter.float().mul(decay).add_(change))


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of n elements, checked once: the first and the second, flat and contiguous, on one device.

    values: (n,) uint8 codes with `absmax`, each (ceil(n / block_size),) float32; or (n,) float32 without.

    Raises:
        InputError: tensors of other sizes, types or devices.
    """

    values: tuple[Tensor, Tensor]
    absmax: tuple[Tensor, Tensor] | None
    block_size: int

    def __post_init__(self) -> None:
        n, device = self.n, self.device
        check_block_size(self.block_size)
        for values in self.values:
            check_tensor(values, "moments", torch.float32 if self.absmax is None else torch.uint8, n, device)
        for absmax in self.absmax or ():
            check_tensor(absmax, "absmax", torch.float32, -(-n // self.block_size), device)

    @cached_property
    def n(self) -> int:
        """Number of elements."""
        return self.values[0].numel()

    @cached_property
    def device(self) -> torch.device:
        """Where they are."""
        return self.values[0].device

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of the values and the absmax."""
        return tuple(tensor.data_ptr() for tensor in (*self.values, *(self.absmax or ())))


class AdamPart(NamedTuple):
    """A tensor, or some of its blocks, to update in place: (n,), contiguous, on the moments' device.

    parameter, gradient: of one dtype: float32, bfloat16 or float16.
    """

    step: AdamStep
    parameter: Tensor
    gradient: Tensor
    moments: Moments


class CodeMap(NamedTuple):
    """An 8-bit code book with the tables that find the nearest code; from `code_map`.

    values: (256,) float32, ascending. bounds: (256,) float32, the midpoints between neighbours, the last infinite.
    first: int32, the number of bounds below each cell of a float's high bits: magnitudes 0 to 1, then negative ones if `signed`.
    """

    values: Tensor
    bounds: Tensor
    first: Tensor
    signed: bool


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32, device="cpu").view(torch.int32))


def code_map(values: Tensor, device: torch.device | str) -> CodeMap:
    """The tables of a code book, (256,) float32 on the CPU, from 0 or -1 to 1. A cell has at most one bound in it."""
    bounds = torch.cat([(values[1:] + values[:-1]) / 2, values.new_tensor([torch.inf])])
    cells = torch.arange(_bits(_LOWEST) >> _CELL_BITS, (_bits(1.0) >> _CELL_BITS) + 2, dtype=torch.int32, device="cpu")
    edges = cells << _CELL_BITS
    low, high = edges[:-1].view(torch.float32).clone(), (edges[1:] - 1).view(torch.float32)
    low[0] = 0
    first, last = torch.bucketize(low, bounds), torch.bucketize(high, bounds)
    signed = bool(values[0] < 0)
    if signed:
        first, last = torch.cat([first, torch.bucketize(-high, bounds)]), torch.cat([last, torch.bucketize(-low, bounds)])
    assert int((last - first).max()) == 1
    return CodeMap(values.to(device), bounds.to(device), first.int().to(device), signed)


def nearest(scaled: Tensor, book: CodeMap) -> Tensor:
    """(n,) int32 codes nearest to (n,) float32 in [-1, 1] ([0, 1] if unsigned); ties go to the lower code."""
    count = len(book.first) // (2 if book.signed else 1)
    bits = scaled.view(torch.int32)
    cell = ((bits & 0x7FFFFFFF) >> _CELL_BITS).sub_(_bits(_LOWEST) >> _CELL_BITS).clamp_(0, count - 1)
    if book.signed:
        cell.add_((bits < 0).int().mul_(count))
    codes = book.first.index_select(0, cell)
    return codes.add_(scaled > book.bounds.index_select(0, codes))


def encode(x: Tensor, book: CodeMap, codes: Tensor, absmax: Tensor, block_size: int) -> None:
    """Quantise x (n,) float32 into codes (n,) uint8 and block absmax: full blocks times a reciprocal, a partial one divided."""
    full = x.numel() // block_size * block_size
    blocks, last = x[:full].view(-1, block_size), x[full:]
    scaled = torch.empty_like(x)
    if full:
        largest = absmax[: full // block_size]
        torch.amax(blocks.abs(), dim=1, out=largest)
        torch.mul(blocks, (1.0 / largest.clamp(min=_TINY)).unsqueeze(1), out=scaled[:full].view(-1, block_size))
    if last.numel():
        absmax[-1] = last.abs().max().clamp(min=_TINY)
        torch.div(last, absmax[-1], out=scaled[full:])
    codes.copy_(nearest(scaled.clamp_(-1, 1), book))


def _update_encoded(decode: Decode, part: AdamPart, absmax_of: tuple[Tensor, Tensor], books: tuple[CodeMap, CodeMap]) -> None:
    block_size = part.moments.block_size
    for start in range(0, part.parameter.numel(), STRETCH):
        of, blocks = slice(start, start + STRETCH), slice(start // block_size, (start + STRETCH) // block_size)
        codes, absmax = [each[of] for each in part.moments.values], [each[blocks] for each in absmax_of]
        moments = [decode(codes[i], absmax[i], books[i].values, block_size) for i in (0, 1)]
        part.step.update(part.parameter[of], part.gradient[of], moments[0], moments[1])
        for i in (0, 1):
            encode(moments[i], books[i], codes[i], absmax[i], block_size)


def adamw_8bit(decode: Decode, parts: Sequence[AdamPart], books: tuple[CodeMap, CodeMap], found_inf: Tensor | None) -> None:
    """As `ops.adamw_8bit`; reads `found_inf` on the host."""
    if found_inf is not None and bool(found_inf):
        return
    for part in parts:
        if part.moments.absmax is None:
            part.step.update(part.parameter, part.gradient, *part.moments.values)
        else:
            _update_encoded(decode, part, part.moments.absmax, books)
