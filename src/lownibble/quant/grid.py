"""The grid of a packed weight: the values it can take with its scales as they are, for rounding column by column (GPTQ).

Every built-in codec is `scale * (level[code] - zero)` with a scale, and perhaps a zero point, for each run of neighbouring
weights (`PackedWeight.steps`), so one class rounds for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lownibble.quant.packed import PackedWeight


class Steps(NamedTuple):
    """The parts of `scale * (level[code] - zero)`.

    Attributes:
        levels: (2^bits,) float32, the value of each code.
        scale: of each run of `size` weights, in the order of the codes, (n / size,) float32.
        zero: of the same, or None.
        size: of a run. order: (K,) the column that each column of the codes is; None: itself.
    """

    levels: Tensor
    scale: Tensor
    zero: Tensor | None
    size: int
    order: Tensor | None = None


class Grid:
    """A weight (N, K) that is being rounded to the grid of a packed one."""

    def __init__(self, packed: PackedWeight) -> None:
        """Raises QuantizationError if the codec has no grid."""
        self._packed, self._steps = packed, packed.steps()
        levels = self._steps.levels
        self._codes_of = levels.argsort(stable=True)[: int(levels.isfinite().sum())]  # NaNs are sorted to the end
        ascending = levels[self._codes_of]
        self._bounds = (ascending[1:] + ascending[:-1]) / 2
        N, K = packed.shape
        self._starts_N = torch.arange(N, device=levels.device) * K
        self._codes_NK = torch.zeros(N, K, dtype=torch.uint8, device=levels.device)
        order = self._steps.order
        self._place = list(range(K)) if order is None else order.argsort().tolist()

    def round(self, values_N: Tensor, column: int) -> Tensor:
        """The nearest values of the grid in a column, (N,) float32; their codes are remembered."""
        steps, place = self._steps, self._place[column]
        run_N = (self._starts_N + place) // steps.size
        scale_N = steps.scale[run_N]
        zero_N = steps.zero[run_N] if steps.zero is not None else 0.0
        wanted_N = torch.where(scale_N != 0, values_N / scale_N, 0.0) + zero_N
        codes_N = self._codes_of[torch.bucketize(wanted_N, self._bounds)]
        self._codes_NK[:, place] = codes_N.to(torch.uint8)
        return (steps.levels[codes_N] - zero_N) * scale_N

    def packed(self) -> PackedWeight:
        """The packed weight with the codes that were rounded to."""
        return self._packed.with_codes(self._codes_NK)
