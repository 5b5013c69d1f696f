"""Codebooks: the value of each code, computed from its formula.

NF4: quantiles of the normal distribution (QLoRA, Dettmers et al. 2023) by the formula in the authors' code, which differs from
the one printed in the paper; rounded to float32 it is bitsandbytes' published table. NF3 and NF2: the same formula with fewer
values. FP4: sign, two exponent bits and one mantissa bit in bitsandbytes' bit order. E2M1: the 4-bit floats of MXFP4 (OCP
Microscaling Formats 1.0), another format of as many bits. DYNAMIC8: the signed *dynamic* 8-bit map of Dettmers et al. 2021 (not
an FP8 format), used for the block constants in double quantisation and for the first moment of 8-bit AdamW; the unsigned map is
for the second moment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_Made = TypeVar("_Made")


def _table(make: Callable[..., _Made]) -> Callable[..., _Made]:
    """Cache what `make` gives for its arguments, as ordinary tensors: ones made first while a step is traced on tensors without
    values, or in inference mode, would be there for all that comes after."""

    @cache
    @wraps(make)
    def made(*arguments: str) -> _Made:
        with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False):
            return make(*arguments)

    return made


class Codebook(NamedTuple):
    """values: (16,) float32 by code; bounds: (15,) float32 ascending midpoints; order: (16,) uint8, codes by ascending value."""

    values: Tensor
    bounds: Tensor
    order: Tensor


def normal_float(bits: int) -> Tensor:
    """The 2^bits values of NormalFloat, ascending from -1 to 1, with 0: one more above it than below."""
    n = 2**bits
    offset = round(((1 - 1 / (2 * n)) + (1 - 1 / (2 * (n - 1)))) / 2, 7)  # of NF4 as bitsandbytes rounds it

    def quantiles(count: int) -> Tensor:  # float32 before and after, as in the authors' code: the last bits depend on it
        probabilities = torch.linspace(offset, 0.5, count + 1, dtype=torch.float32)[:-1]
        values: Tensor = torch.special.ndtri(probabilities.double())
        return values.float()

    values: Tensor = torch.cat([-quantiles(n // 2 - 1), torch.zeros(1, dtype=torch.float32), quantiles(n // 2)]).sort().values
    return values / values.max()


def _fp4_values() -> Tensor:
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32)
    return torch.cat([magnitudes, -magnitudes]) / 12


_TABLES: dict[str, Callable[[], Tensor]] = {"nf4": partial(normal_float, 4), "fp4": _fp4_values}


@_table
def codebook(quant_type: str, device: str = "cpu") -> Codebook:
    """The codebook of a 4-bit codec (`nf4` or `fp4`) on `device`. Cached; do not modify."""
    values = _TABLES[quant_type]()
    order = torch.argsort(values, stable=True)
    bounds = (values[order[:-1]] + values[order[1:]]) / 2
    return Codebook(values.to(device), bounds.to(device), order.to(torch.uint8).to(device))


def _e2m1_values(device: torch.device | str = "cpu") -> Tensor:
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32, device=device)
    return torch.cat([magnitudes, -magnitudes])


def to_e2m1(values: Tensor) -> Tensor:
    """The codes of the nearest E2M1 values, uint8: ties to the even code, larger magnitudes to 6, zeros with their sign."""
    magnitudes = _e2m1_values(values.device)[:8]
    bounds = (magnitudes[1:] + magnitudes[:-1]) / 2
    bounds[1::2] = bounds[1::2].nextafter(bounds.new_zeros(()))  # a value on such a bound rounds up, to the even code
    return torch.bucketize(values.abs(), bounds, out_int32=True).to(torch.uint8) | values.signbit().to(torch.uint8) << 3


def _bytes_as(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


_LEVELS: dict[str, Callable[[], Tensor]] = {
    "nf3": partial(normal_float, 3), "nf2": partial(normal_float, 2), "mxfp4": _e2m1_values,
    "int8": partial(_bytes_as, torch.int8), "fp8": partial(_bytes_as, torch.float8_e4m3fn),
    **{f"int{bits}": partial(torch.arange, 2**bits, dtype=torch.float32) for bits in (2, 3, 4)},
}  # fmt: skip


@_table
def levels(quant_type: str, device: str = "cpu") -> Tensor:
    """The value of each code of a grouped codec before zero point and scale, (2^bits,) float32. Cached; do not modify."""
    return _LEVELS[quant_type.removesuffix("_act")]().to(device)


@_table
def e8m0(device: str = "cpu") -> Tensor:
    """The powers of two that a byte stands for as a scale of MX formats, (256,) float32; the last is NaN. Cached."""
    return torch.tensor([2.0 ** (code - 127) for code in range(255)] + [float("nan")], dtype=torch.float32).to(device)


@_table
def dynamic8_lookup(device: str = "cpu") -> Tensor:
    """(65536,) uint8: the code of the value nearest to each point of a uniform grid over [-1, 1]. Cached.

    bitsandbytes' CPU build finds 8-bit codes with such a table instead of a search, which shifts about one code in 700, near a
    boundary, by one; this package matches its bytes.
    """
    grid = torch.arange(65536, dtype=torch.float64) / 32767.5 - 1
    values = dynamic8()
    return torch.bucketize(grid.float(), (values[1:] + values[:-1]) / 2).to(torch.uint8).to(device)


@_table
def dynamic8(device: str = "cpu") -> Tensor:
    """The signed dynamic 8-bit map, ascending, (256,) float32. Cached; do not modify."""
    positive = []
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive.append(10.0 ** (exponent - 6) * (boundaries[:-1] + boundaries[1:]) / 2)
    magnitudes = torch.cat(positive)
    return torch.cat([-magnitudes, torch.tensor([0.0, 1.0], dtype=torch.float32), magnitudes]).sort().values.to(device)


@_table
def dynamic8_unsigned(device: str = "cpu") -> Tensor:
    """The unsigned dynamic 8-bit map, from 0 to 1, ascending, (256,) float32. Cached; do not modify."""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1, dtype=torch.float32)
        values.append(10.0 ** (exponent - 6) * (boundaries[:-1] + boundaries[1:]) / 2)
    return torch.cat(values).sort().values.to(device)
