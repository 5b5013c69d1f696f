"""AdamW with both moments in 8 bits: bitsandbytes' blockwise optimiser (Dettmers et al. 2021), 2.03 bytes per parameter
instead of 8.

Each block of 256 elements shares its absmax; each element is a code of the dynamic map, signed for the first moment and
unsigned for the second. The moments are dequantised to float32, updated, used and quantised again. Tensors below 4096 elements
keep float32 moments, as in bitsandbytes.

A value gets the nearest code, as in bitsandbytes on CUDA and in its plain-torch path. Its CPU build uses a lookup table of
65,536 points instead, whose steps of 3e-5 are too coarse for a second moment: everything below 1.5e-5 of a block's absmax
becomes 1.6e-5 there (`docs/log.md`). For absmax values, where that table is our reference, it does not matter (ADR 4).

Each operation below rounds once (no fused multiply-add, no scaled sum), so results depend neither on where a tensor is split
nor on the number of threads: paged and unpaged are bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import sqrt

import torch
from torch import Tensor

from lownibble.kernels import ops
from lownibble.optim.specs import BLOCK_8BIT, SMALLEST_8BIT
from lownibble.quant.codebook import dynamic8, dynamic8_unsigned

BLOCK = BLOCK_8BIT
SMALLEST = SMALLEST_8BIT
"""Elements below which a tensor's moments stay in float32 (bitsandbytes' `min_8bit_size`)."""

STRETCH = 1 << 17
"""Elements dequantised at a time, a multiple of the block: temporaries fit in cache and hardly add to peak memory."""

_TINY = 1e-38  # bitsandbytes' floor for the absmax of an all-zero block


@dataclass(frozen=True)
class AdamStep:
    """Hyperparameters of one AdamW step for one tensor; `step` counts from 1."""

    step: int
    rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float

    def update(self, parameter: Tensor, gradient: Tensor, average: Tensor, square: Tensor) -> None:
        """Update the moments and the parameter in place. All (n,); moments float32, the others of any floating dtype."""
        beta1, beta2 = self.betas
        gradient = gradient.float()
        average.mul_(beta1).add_(gradient * (1 - beta1))
        square.mul_(beta2).add_((gradient * gradient).mul_(1 - beta2))
        root = square.sqrt().div_(sqrt(1 - beta2**self.step)).add_(self.epsilon)
        change = average.div(root).mul_(-self.rate / (1 - beta1**self.step))
        parameter.copy_(parameter.float().mul(1 - self.rate * self.weight_decay).add_(change))


@cache
def _values(signed: bool, device: str) -> Tensor:
    """The codebook: (256,) float32, ascending."""
    return (dynamic8 if signed else dynamic8_unsigned)(device)


_CELL_BITS = 15  # low bits of a float that a cell ignores: 256 cells per power of two
_LOWEST = 2.0**-24  # below every boundary; smaller magnitudes share the first cell


def _bits(value: float) -> int:
    return int(torch.tensor(value).view(torch.int32))


@cache
def _cells(signed: bool, device: str) -> tuple[Tensor, Tensor, int]:
    """Lookup tables that replace a search: cells of a float's high bits, narrow enough to contain at most one boundary.

    Returns:
        the number of boundaries below each cell (int32; magnitudes 0 to 1, then negative ones if signed), the boundaries
        between codes (256, the last infinite), and the number of cells per sign.
    """
    values = _values(signed, "cpu")
    bounds = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([torch.inf])])
    edges = torch.arange(_bits(_LOWEST) >> _CELL_BITS, (_bits(1.0) >> _CELL_BITS) + 2, dtype=torch.int32) << _CELL_BITS
    low, high = edges[:-1].view(torch.float32).clone(), (edges[1:] - 1).view(torch.float32)
    low[0] = 0
    first, last = torch.bucketize(low, bounds), torch.bucketize(high, bounds)
    if signed:
        first, last = torch.cat([first, torch.bucketize(-high, bounds)]), torch.cat([last, torch.bucketize(-low, bounds)])
    assert int((last - first).max()) == 1
    return first.int().to(device), bounds.to(device), len(low)


def nearest(scaled: Tensor, signed: bool) -> Tensor:
    """(n,) int32 codes nearest to (n,) float32 in [-1, 1] ([0, 1] if unsigned); ties go to the lower code."""
    first, bounds, count = _cells(signed, str(scaled.device))
    bits = scaled.view(torch.int32)
    cell = ((bits & 0x7FFFFFFF) >> _CELL_BITS).sub_(_bits(_LOWEST) >> _CELL_BITS).clamp_(0, count - 1)
    if signed:
        cell.add_((bits < 0).int().mul_(count))
    codes = first.index_select(0, cell)
    return codes.add_(scaled > bounds.index_select(0, codes))


def encode(x: Tensor, signed: bool, codes: Tensor, absmax: Tensor) -> None:
    """Quantise x (n,) float32 into codes (n,) uint8 and block absmax: full blocks times a reciprocal, a partial one divided."""
    full = x.numel() // BLOCK * BLOCK
    blocks, last = x[:full].view(-1, BLOCK), x[full:]
    scaled = torch.empty_like(x)
    if full:
        largest = absmax[: full // BLOCK]
        torch.amax(blocks.abs(), dim=1, out=largest)
        torch.mul(blocks, (1.0 / largest.clamp(min=_TINY)).unsqueeze(1), out=scaled[:full].view(-1, BLOCK))
    if last.numel():
        absmax[-1] = last.abs().max().clamp(min=_TINY)
        torch.div(last, absmax[-1], out=scaled[full:])
    codes.copy_(nearest(scaled.clamp_(-1, 1), signed))


def decode(codes: Tensor, signed: bool, absmax: Tensor) -> Tensor:
    """Dequantise to (n,) float32."""
    return ops.dequantize_8bit(codes, absmax, _values(signed, str(codes.device)), BLOCK)


def update_encoded(
    step: AdamStep, parameter: Tensor, gradient: Tensor, codes: tuple[Tensor, Tensor], absmax: tuple[Tensor, Tensor]
) -> None:
    """One step on (n,) elements of a parameter whose moments are quantised; the first element starts a block."""
    for start in range(0, parameter.numel(), STRETCH):
        part, blocks = slice(start, start + STRETCH), slice(start // BLOCK, (start + STRETCH) // BLOCK)
        moments = [decode(codes[i][part], i == 0, absmax[i][blocks]) for i in (0, 1)]
        step.update(parameter[part], gradient[part], moments[0], moments[1])
        for i in (0, 1):
            encode(moments[i], i == 0, codes[i][part], absmax[i][blocks])
