"""Grids for rounding column by column. Oracles: the codec's own rounding and decoding; all values by brute force."""

import pytest
import torch

from lownibble.calibration import Moments
from lownibble.calibration.gptq import round_again
from lownibble.config import QuantConfig
from lownibble.errors import QuantizationError
from lownibble.quant import quantize
from lownibble.quant.grid import Grid
from lownibble.quant.packed import PackedWeight
from lownibble.registry import CODECS

TYPES = list(CODECS)


def weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(quant_type, **options):
    return QuantConfig(quant_type=quant_type, block_size=32, **options)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", TYPES)
def test_rounding_a_weight_gives_the_codecs_own_values(quant_type, double_quant):
    W, strength = weight((12, 96)), weight(96, 1).square()
    packed = quantize(W, of(quant_type, double_quant=double_quant), statistics=strength)
    grid = Grid(packed)
    rounded = torch.stack([grid.round(W[:, column], column) for column in range(96)], dim=1)
    made = grid.packed()
    assert torch.equal(made.dequantize(torch.float32), rounded)
    assert made.facts() == packed.facts()
    assert all(torch.equal(made.tensors()[name], t) for name, t in packed.tensors().items() if name != "codes")
    off, least = (rounded - W).abs(), (packed.dequantize(torch.float32) - W).abs()
    assert (off <= least * (1 + 1e-4) + 1e-6).all()  # nf4 finds codes before its scales are quantised; int8 stops at -127
    if not double_quant:
        torch.testing.assert_close(off, least, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quant_type", TYPES)
def test_other_values_go_to_the_nearest(quant_type):
    W, other = weight((5, 64)), 1.5 * weight((5, 64), 2)
    packed = quantize(W, of(quant_type), statistics=weight(64, 1).square())
    grid, steps = Grid(packed), packed.steps()
    levels = steps.levels[steps.levels.isfinite()]
    place = list(range(64)) if steps.order is None else steps.order.argsort().tolist()
    for column in (0, 31, 32, 63):
        rounded = grid.round(other[:, column], column)
        for row in range(5):
            run = (row * 64 + place[column]) // steps.size
            zero = 0 if steps.zero is None else steps.zero[run]
            values = (levels - zero) * steps.scale[run]
            assert (rounded[row] - other[row, column]).abs() <= (values - other[row, column]).abs().min() * (1 + 1e-5) + 1e-7


def test_blocks_may_span_rows():
    W = weight((6, 50))
    packed = quantize(W, QuantConfig(quant_type="nf4", block_size=64, double_quant=False))
    grid = Grid(packed)
    rounded = torch.stack([grid.round(W[:, column], column) for column in range(50)], dim=1)
    assert torch.equal(rounded, packed.dequantize(torch.float32))
    assert torch.equal(grid.packed().tensors()["codes"], packed.tensors()["codes"])


@pytest.mark.parametrize("quant_type", TYPES)
def test_gptq_onto_every_codec_changes_outputs_less_than_rounding_to_nearest(quant_type):
    W, x = weight((32, 96)), weight((600, 96), 3) @ weight((96, 96), 4) / 96**0.5
    moments = Moments(x.T @ x / len(x), len(x))
    nearest = quantize(W, of(quant_type), statistics=moments.diagonal)

    def wrong(packed):
        return (x @ (W - packed.dequantize(torch.float32)).T).square().mean()

    assert wrong(round_again(W, moments, nearest)) < 0.75 * wrong(nearest)


def test_a_codec_without_a_grid_is_named():
    class Own(PackedWeight):
        def tensors(self):
            return {"codes": torch.zeros(1)}

        def facts(self):
            return {"quant_type": "own"}

        def decode(self, out):
            return out

    with pytest.raises(QuantizationError, match=r"'own' has no grid to round to\. Take another quant_type, or --method rtn"):
        Grid(Own())
