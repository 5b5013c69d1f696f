"""Codebooks: the value of each code, computed from its formula.

NF4: quantiles of the normal distribution (QLoRA, Dettmers et al. 2023) by the formula in the authors' code, which differs from
the one printed in the paper; rounded to float32 it is bitsandbytes' published table. FP4: sign, two exponent bits and one
mantissa bit in bitsandbytes' bit order. DYNAMIC8: the signed *dynamic* 8-bit map of Dettmers et al. 2021 (not an FP8
format), used for the block constants in double quantisation and for the first moment of 8-bit AdamW; the unsigned map is for
the second moment.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Codebook(NamedTuple):
    """values: (16,) float32 by code; bounds: (15,) float32 ascending midpoints; order: (16,) uint8, codes by ascending value."""

    values: Tensor
    bounds: Tensor
    order: Tensor


_NF4_OFFSET = 0.9677083  # (31/32 + 29/30) / 2 as bitsandbytes rounds it


def _nf4_values() -> Tensor:
    def quantiles(count: int) -> Tensor:  # float32 before and after, as in the authors' code: the last bits depend on it
        probabilities = torch.linspace(_NF4_OFFSET, 0.5, count + 1)[:-1]
        values: Tensor = torch.special.ndtri(probabilities.double())
        return values.float()

    values: Tensor = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8)]).sort().values
    return values / values.max()


def _fp4_values() -> Tensor:
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3])
    return torch.cat([magnitudes, -magnitudes]) / 12


_TABLES = {"nf4": _nf4_values, "fp4": _fp4_values}


@cache
def codebook(quant_type: str, device: str = "cpu") -> Codebook:
    """The codebook of a 4-bit codec (`nf4` or `fp4`) on `device`. Cached; do not modify."""
    values = _TABLES[quant_type]()
    order = torch.argsort(values, stable=True)
    bounds = (values[order[:-1]] + values[order[1:]]) / 2
    return Codebook(values.to(device), bounds.to(device), order.to(torch.uint8).to(device))


@cache
def dynamic8_lookup(device: str = "cpu") -> Tensor:
    """(65536,) uint8: the code of the value nearest to each point of a uniform grid over [-1, 1]. Cached.

    bitsandbytes' CPU build finds 8-bit codes with such a table instead of a search, which shifts about one code in 700, near a
    boundary, by one; this package matches its bytes.
    """
    grid = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
    values = dynamic8()
    return torch.bucketize(grid.float(), (values[1:] + values[:-1]) / 2).to(torch.uint8).to(device)


@cache
def dynamic8(device: str = "cpu") -> Tensor:
    """The signed dynamic 8-bit map, ascending, (256,) float32. Cached; do not modify."""
    positive = []
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2**exponent + 1)
        positive.append(10.0 ** (exponent - 6) * (boundaries[:-1] + boundaries[1:]) / 2)
    magnitudes = torch.cat(positive)
    return torch.cat([-magnitudes, torch.tensor([0.0, 1.0]), magnitudes]).sort().values.to(device)


@cache
def dynamic8_unsigned(device: str = "cpu") -> Tensor:
    """The unsigned dynamic 8-bit map, from 0 to 1, ascending, (256,) float32. Cached; do not modify."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1)
        values.append(10.0 ** (exponent - 6) * (boundaries[:-1] + boundaries[1:]) / 2)
    return torch.cat(values).sort().values.to(device)
