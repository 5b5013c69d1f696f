"""Second moments of a linear layer's inputs, and what closed forms need of them.

R = E[x x^T] weights errors of a layer's output: for an error E (out, in) of the weight, the mean of |E x|^2 is tr(E R E^T) =
|E L|^2 with any L for which R = L L^T. `root` takes the Cholesky factor, as good as the symmetric root and much cheaper.

With fewer tokens than inputs, or inputs that are always zero, R is singular: `root` adds a part of its mean diagonal until it can
be factored, as GPTQ does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lownibble.errors import QuantizationError

DAMPING = 0.01
"""Part of the mean diagonal that is added first (GPTQ's `percdamp`)."""

_TRIES = 4


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs.

    Attributes:
        matrix: E[x x^T], (in, in) float32.
        tokens: over which the mean is.
    """

    matrix: Tensor
    tokens: int

    @property
    def diagonal(self) -> Tensor:
        """E[x^2], (in,)."""
        return self.matrix.diagonal()

    def damped(self, damping: float = DAMPING) -> Tensor:
        """R plus `damping` times its mean diagonal, (in, in) float32. Inputs that are always zero count as of that size, so that
        their weights are rounded like others."""
        diagonal = self.diagonal
        mean = diagonal.mean()
        found = self.matrix.clone()
        found.diagonal().copy_(torch.where(diagonal > 0, diagonal, mean) + damping * mean)
        return found

    def root(self) -> Tensor:
        """L, lower triangular (in, in) float32, with R = L L^T, damped until R can be factored.

        Raises:
            QuantizationError: it cannot: the inputs are not finite, or all zero.
        """
        return self._factored(lambda matrix: torch.linalg.cholesky_ex(matrix))

    def inverse_root(self, order: Tensor) -> Tensor:
        """U, upper triangular (in, in) float32, with R^-1 = U^T U, for inputs in another order (in,).

        Raises:
            QuantizationError: as `root`.
        """

        def factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
            lower, wrong = torch.linalg.cholesky_ex(matrix[order][:, order])
            if int(wrong):
                return lower, wrong
            upper, as_wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            return upper, wrong + as_wrong

        return self._factored(factor)

    def _factored(self, factor: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        for i in range(_TRIES):
            found, wrong = factor(self.damped(DAMPING * 10**i))
            if not int(wrong) and bool(torch.isfinite(found).all()):
                return found
        raise QuantizationError(
            f"The second moments of a layer's inputs over {self.tokens} calibration tokens cannot be factored: they are zero or "
            "not finite. Give other calibration rows, or more of them."
        )
