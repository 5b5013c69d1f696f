"""GPTQ. Oracle: after each column, the least-squares solution for the columns that are still free, in float64."""

import pytest
import torch

from lownibble.calibration import Moments
from lownibble.calibration.gptq import gptq


class Steps:
    """Multiples of a step, from -top to top."""

    def __init__(self, shape, step, top=3):
        self.values, self.step, self.top = torch.full(shape, float("nan"), dtype=torch.float64), step, top

    def round(self, values_N, column):
        rounded = (values_N / self.step).round().clamp(-self.top, self.top) * self.step
        self.values[:, column] = rounded.double()
        return rounded


def least_squares(weight, moments, grid):
    """The published optimisation, spelled out: free columns take what minimises the error, given those that are rounded."""
    R = moments.damped().double()
    order = moments.diagonal.argsort(descending=True, stable=True).tolist()
    wanted, free = weight.double(), list(range(len(order)))
    now = wanted.clone()
    for column in order:
        now[:, column] = grid.round(now[:, column], column)
        free.remove(column)
        done = [each for each in order if each not in free]
        if free:
            error = now[:, done] - wanted[:, done]
            now[:, free] = wanted[:, free] - torch.linalg.solve(R[free][:, free], R[free][:, done] @ error.T).T
    return now


def inputs(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    return Moments(x.T @ x / n, n), x


@pytest.mark.parametrize(("shape", "tokens"), [((6, 20), 200), ((5, 150), 900), ((4, 30), 10)])
def test_it_is_the_published_optimisation(shape, tokens):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    moments, _ = inputs(tokens, shape[1])
    ours, plain = Steps(shape, 0.7), Steps(shape, 0.7)
    gptq(weight, moments, ours)
    least_squares(weight, moments, plain)
    torch.testing.assert_close(ours.values, plain.values, rtol=1e-6, atol=1e-6)  # the same steps; float32 and float64


def test_outputs_change_less_than_by_rounding_to_nearest():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(4))
    moments, x = inputs(2000, 64)
    grid = Steps(weight.shape, 0.7, top=7)
    gptq(weight, moments, grid)
    nearest = (weight / 0.7).round().clamp(-7, 7) * 0.7

    def wrong(rounded):
        return (x @ (weight - rounded.float()).T).square().mean()

    assert wrong(grid.values) < 0.6 * wrong(nearest)


def test_with_uncorrelated_inputs_it_rounds_to_nearest():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(5))
    grid = Steps(weight.shape, 0.5, top=9)
    gptq(weight, Moments(torch.diag(torch.linspace(1, 3, 32)), 100), grid)
    assert torch.equal(grid.values.float(), (weight / 0.5).round().clamp(-9, 9) * 0.5)
