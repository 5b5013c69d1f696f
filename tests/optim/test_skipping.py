"""Steps skipped by `found_inf`. Oracles: the bits before the step, and the run that never had it."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from triton_interpreter import INTERPRETED

from lownibble.kernels import ops
from lownibble.optim import close_states, make_optimizer, set_learning_rate, skipped, states, step_if_finite
from lownibble.optim.specs import spec

KINDS = ["adamw", "paged_adamw", "adamw_8bit", "paged_adamw_8bit"]
RUNS = [
    *(pytest.param((kind, "cpu", None), id=kind) for kind in KINDS),
    *(
        pytest.param(
            (kind, "cpu", "triton"), id=f"{kind}, interpreted", marks=pytest.mark.skipif(not INTERPRETED, reason="a GPU")
        )
        for kind in KINDS[2:]
    ),
    *(pytest.param((kind, "cuda", None), id=f"{kind}, cuda", marks=pytest.mark.gpu) for kind in KINDS),
]


@pytest.fixture(params=RUNS)
def run(request):
    """An optimiser and a device, and the kernels of both."""
    kind, device, backend = request.param
    with ops.use_backend(backend) if backend else nullcontext():
        yield kind, device


def _made(run):
    """LoRA+: matrices B learn at four times the rate; the largest parameter has 8-bit moments."""
    generator, (kind, device) = torch.Generator().manual_seed(3), run
    shapes = ((64, 65), (33, 4), (300,))
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    return make_optimizer(kind, parameters, 1e-3, 0.1, fast=parameters[1:2], ratio=4.0), parameters


def _step(optimizer, parameters, number, found_inf=None):
    generator = torch.Generator().manual_seed(number)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.grad = None if (number + index) % 3 == 0 else gradient
    set_learning_rate(optimizer, 1e-2 / number)
    optimizer.found_inf = found_inf
    optimizer.step()


def _bits(optimizer, parameters):
    """Values of the parameters and of all states, step counts included; states that are still zero do not count."""
    number = {parameter: index for index, parameter in enumerate(parameters)}
    found = {index: parameter.detach().clone() for index, parameter in enumerate(parameters)}
    for parameter, key, first, values in states.parts(optimizer):
        if values.any():
            found[number[parameter], key, first] = values.clone()
    return found


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("when", [1, 3])
def test_a_skipped_step_is_no_step(run, when):
    """The first step and a later one; with infinite gradients, as there are where a step is skipped."""
    assert spec(run[0]).skips_on_device
    (ours, parameters), (plain, others) = _made(run), _made(run)
    for number in range(1, when):
        _step(ours, parameters, number)
        _step(plain, others, number)
    before = _bits(ours, parameters)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, torch.inf)
    ours.found_inf = torch.ones((), device=run[1])
    ours.step()
    skipped(ours)
    assert _same(_bits(ours, parameters), before)
    for number in range(when, when + 3):
        _step(ours, parameters, number)
        _step(plain, others, number)
    assert _same(_bits(ours, parameters), _bits(plain, others))
    close_states(ours), close_states(plain)


def test_a_found_inf_of_zero_is_none(run):
    (ours, parameters), (plain, others) = _made(run), _made(run)
    for number in range(1, 4):
        _step(ours, parameters, number, torch.zeros((), device=run[1]))
        _step(plain, others, number)
    assert _same(_bits(ours, parameters), _bits(plain, others))
    close_states(ours), close_states(plain)


def test_an_optimiser_from_outside_is_not_stepped(monkeypatch):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    step_if_finite(optimizer, torch.tensor([1.0, torch.inf]), on_device=False)
    assert torch.equal(parameter, torch.ones(3))
    step_if_finite(optimizer, torch.tensor([1.0, 2.0]), on_device=False)
    assert torch.equal(parameter, torch.zeros(3))
