"""GPTQ: round a weight column by column, and make up for each column's error in those that follow.

With R = E[x x^T] of the layer's inputs, the mean error of its outputs is tr((W - Q) R (W - Q)^T). Rounding column j to q_j costs
e_j = (w_j - q_j) / U_jj, and the later columns take -e_j U_j, with U the upper Cholesky factor of R^-1 = U^T U: what is left of
the error is then the least for the columns that are still free (Frantar et al. 2022, arXiv:2210.17323). Updates reach the columns
of a block of 128 at once, and the others when the block is done.

Columns whose inputs are strongest come first, as they have the most others to make up for them (act-order). A grid's groups are
fixed beforehand, of neighbouring columns, whatever the order ("static groups"): the packed weight then needs no order of its own,
and double-quantised scales, which depend on all groups, are known.

Any codec that has a grid can be the target (`quant/grid.py`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lownibble.calibration.moments import Moments
from lownibble.quant import PackedWeight
from lownibble.quant.grid import Grid as Rounded

BLOCK = 128
"""Columns that are rounded before the rest is updated."""


class Grid(Protocol):
    """The values that a packed weight can take, its scales being fixed."""

    def round(self, values_N: Tensor, column: int) -> Tensor:
        """The nearest values in a column (N,) float32, which are remembered."""


def round_again(weight_NK: Tensor, moments: Moments, nearest: PackedWeight) -> PackedWeight:
    """A weight (N, K) with the codec and scales of `nearest`, which is the weight rounded to nearest, and codes by GPTQ.

    Raises:
        QuantizationError: the codec has no grid, or the moments cannot be factored.
    """
    grid = Rounded(nearest)
    gptq(weight_NK.float(), moments, grid)
    return grid.packed()


def gptq(weight_NK: Tensor, moments: Moments, grid: Grid) -> None:
    """Round a weight (N, K) float32 onto `grid`, so that the layer's output changes as little as can be.

    Raises:
        QuantizationError: the moments cannot be factored.
    """
    order = moments.diagonal.argsort(descending=True, stable=True)
    left_NK = weight_NK[:, order].clone()
    upper_KK = moments.inverse_root(order)
    columns = order.tolist()
    for first in range(0, len(columns), BLOCK):
        block = slice(first, first + BLOCK)
        now_BN, factor_BB = left_NK[:, block].t().contiguous(), upper_KK[block, block]  # columns are contiguous
        error_BN = torch.empty_like(now_BN)
        for i, column in enumerate(columns[block]):
            rounded_N = grid.round(now_BN[i], column)
            torch.div(now_BN[i] - rounded_N, factor_BB[i, i], out=error_BN[i])
            now_BN[i + 1 :].addr_(factor_BB[i, i + 1 :], error_BN[i], alpha=-1)
        left_NK[:, first + BLOCK :].addmm_(error_BN.t(), upper_KK[block, first + BLOCK :], alpha=-1)
