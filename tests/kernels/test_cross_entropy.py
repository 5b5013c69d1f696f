"""The head's loss and its gradient in place, on every backend. Oracle: torch's cross-entropy and autograd in float64."""

import pytest
import torch
from oracles import DTYPES, ROUNDOFF, assert_same_bits
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lownibble.errors import InputError
from lownibble.kernels import ops
from lownibble.kernels.traced import Traced
from lownibble.kernels.types import IGNORED

TILE = 8192
"""Logits that the Triton kernel reads at a time."""
SHAPES = [(1, 1), (3, 17), (5, 64), (2, 1000), (2, TILE), (3, 2 * TILE + 37), (0, 7)]
EXPONENTIAL = 2e-5
"""Relative: an exponent of 60 has an ulp of 4e-6."""


def _case(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and labels of which every third is ignored, from the second on."""
    generator = torch.Generator().manual_seed(0)
    labels_L = torch.randint(shape[1], (shape[0],), generator=generator)
    labels_L[1::3] = IGNORED
    return (torch.randn(shape, generator=generator) * 10).to(dtype), labels_L


def _oracle(logits_LV: Tensor, labels_L: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    exact_LV = logits_LV.double().requires_grad_()
    loss_L = F.cross_entropy(exact_LV, labels_L, reduction="none", ignore_index=-100)
    (gradient_LV,) = torch.autograd.grad(loss_L.sum() * scale, exact_LV)
    return loss_L.detach(), gradient_LV


def _assert_close(found_LV: Tensor, expected_LV: Tensor, dtype: torch.dtype, scale: float) -> None:
    """Rounded once from float32, where a likely label is left with the error of its probability; float16 is coarse near 0."""
    probability = expected_LV.abs().clamp(max=scale)
    bound = (ROUNDOFF[dtype] + EXPONENTIAL) * probability + 2e-6 * scale * (expected_LV < 0) + 2.0**-25
    assert found_LV.dtype == dtype
    assert bool(((found_LV.double() - expected_LV).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(kernels, shape, dtype):
    logits_LV, labels_L = _case(shape, dtype)
    expected_L, gradient_LV = _oracle(logits_LV, labels_L, 0.25)
    loss_L = kernels.cross_entropy(logits_LV, labels_L, 0.25, True)
    torch.testing.assert_close(loss_L, expected_L.float(), rtol=1e-6, atol=1e-5)
    _assert_close(logits_LV, gradient_LV, dtype, 0.25)
    assert not logits_LV[labels_L == IGNORED].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_on_the_device_is_the_number(kernels, dtype):
    logits_LV, labels_L = _case((5, 70), dtype)
    again_LV = logits_LV.clone()
    loss_L = kernels.cross_entropy(logits_LV, labels_L, 1 / 7, True)
    assert_same_bits(kernels.cross_entropy(again_LV, labels_L, torch.tensor(1 / 7), True), loss_L)
    assert_same_bits(again_LV, logits_LV)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_alone(kernels, dtype):
    logits_LV, labels_L = _case((5, TILE + 70), dtype)
    loss_L = kernels.cross_entropy(logits_LV.clone(), labels_L, 1.0, True)
    assert_same_bits(kernels.cross_entropy(logits_LV, labels_L, 1.0, False), loss_L)


@pytest.mark.parametrize("place", [0, 69, TILE + 69])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_row_says_so_and_an_ignored_one_is_zeros(kernels, value, place):
    """Whether or not it is the label's logit; the other rows are as without it."""
    logits_LV, labels_L = _case((3, TILE + 70), torch.float32)
    whole_LV = logits_LV.clone()
    expected_L = kernels.cross_entropy(whole_LV, labels_L, 1.0, True)
    logits_LV[:2, place] = value
    loss_L = kernels.cross_entropy(logits_LV, labels_L, 1.0, True)
    assert loss_L[0].isnan()
    assert logits_LV[0].isnan().any()
    assert loss_L[1] == 0
    assert not logits_LV[1].any()
    assert_same_bits(loss_L[2], expected_L[2])
    assert_same_bits(logits_LV[2], whole_LV[2])


def test_a_vocabulary_without_some_tokens(kernels):
    """Their logits are minus infinity, here of a whole tile, and those of padding beyond the last."""
    logits_LV, labels_L = _case((3, 2 * TILE), torch.float32)
    logits_LV[:, : TILE + 5] = logits_LV[:, 2 * TILE - 3 :] = -torch.inf
    labels_L[[0, 2]] = torch.tensor([TILE + 5, 2 * TILE - 4])
    expected_L, gradient_LV = _oracle(logits_LV, labels_L, 1.0)
    loss_L = kernels.cross_entropy(logits_LV, labels_L, 1.0, True)
    torch.testing.assert_close(loss_L, expected_L.float(), rtol=1e-6, atol=1e-5)
    _assert_close(logits_LV, gradient_LV, torch.float32, 1.0)


@pytest.mark.parametrize("label", [-1, 5, 1 << 40])
def test_a_label_outside_the_vocabulary(kernels, label):
    logits_LV, labels_L = torch.zeros(2, 5), torch.tensor([0, label])
    if kernels.name == "triton":
        assert kernels.cross_entropy(logits_LV, labels_L, 1.0, True).isnan().tolist() == [False, True]
    else:
        with pytest.raises(RuntimeError, match="out of bounds"):
            kernels.cross_entropy(logits_LV, labels_L, 1.0, True)


def test_logits_that_autograd_has_saved_are_not_used_again(kernels):
    logits_LV = torch.zeros(2, 5, requires_grad=True).exp()
    kernels.cross_entropy(logits_LV.detach(), torch.tensor([0, 1]), 1.0, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits_LV.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_it_allocates_is_what_is_traced(dtype):
    """On a CPU a float32 copy of 16-bit logits, besides some values a row."""
    found = []
    for backend in (ops.current("cpu"), Traced(fused=False, attention=False, cross_entropy=False, experts_at_once=False)):
        logits_LV, labels_L = _case((8, 5000), dtype)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            backend.cross_entropy(logits_LV, labels_L, 1.0, True)
        sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        found.append(sum(size for size in sizes if size > 0))
    copied = 0 if dtype == torch.float32 else 4 * 8 * 5000
    assert found == pytest.approx([copied, copied], abs=2000)


def test_wrong_arguments_are_refused(unsafe_kernels):
    logits_LV, labels_L = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match="logits_LV"):
        unsafe_kernels.cross_entropy(torch.zeros(5, 2).t(), labels_L, 1.0, True)
    if unsafe_kernels.name == "triton":
        for wrong, message in (
            ((logits_LV.double(), labels_L, 1.0, True), "logits_LV"),
            ((logits_LV, labels_L.int(), 1.0, True), "labels_L"),
            ((logits_LV, labels_L[:1], 1.0, True), "labels_L"),
            ((logits_LV, labels_L, torch.ones(2), True), "scale"),
        ):
            with pytest.raises(InputError, match=message):
                unsafe_kernels.cross_entropy(*wrong)
