"""The low-rank branch's own products and gradients, on every backend. Oracle: the formulas in float64."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lownibble.errors import BackendError, InputError
from lownibble.kernels import cpu, ops, plain

SHAPES = [(1, 3, 5, 1), (77, 100, 130, 7), (300, 48, 33, 16), (513, 192, 576, 40), (64, 64, 64, 64), (2049, 17, 33, 16)]
"""T, N, K, r: one of each, nothing a multiple of anything, more than one share of rows, more than 16 of a rank, many shares."""


def _isas() -> list[str]:
    try:
        return [f"cpu-{isa}" for isa in cpu.available_isas()]
    except BackendError:
        return []


def _backend(variant: str) -> ops.Backend:
    name, _, isa = variant.partition("-")
    if isa:
        cpu.select_isa(isa)
    return ops.backend(name)


@pytest.fixture(params=["reference", *_isas()])
def kernels(request: pytest.FixtureRequest):
    before = cpu.isa() if "cpu" in request.param else None
    yield _backend(request.param)
    if before:
        cpu.select_isa(before)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _close(found: Tensor, expected: Tensor, terms: int) -> None:
    scale = float(expected.abs().max())
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=scale * (terms + 4) * 2.0**-24)


@pytest.mark.parametrize(("T", "N", "K", "r"), SHAPES)
def test_equals_the_formulas(kernels: ops.Backend, T: int, N: int, K: int, r: int) -> None:
    x, dy, lora_A, lora_B = _random(T, K), _random(T, N), _random(r, K), _random(N, r)
    low = kernels.low_rank(x, lora_A.t(), 1.0)
    _close(low, x.double() @ lora_A.double().t(), K)
    _close(kernels.low_rank(dy, lora_B, 0.3), 0.3 * (dy.double() @ lora_B.double()), N)
    dlow, dA, dB = kernels.low_rank_backward(dy, x, low, lora_B, 1.7)
    expected = 1.7 * (dy.double() @ lora_B.double())
    _close(dlow, expected, N)
    _close(dA, expected.t() @ x.double(), N + T)
    _close(dB, 1.7 * (dy.double().t() @ low.double()), T)
    assert all(gradient.is_contiguous() for gradient in (dlow, dA, dB))


def test_16_bit_operands_give_gradients_in_the_adapters_type(kernels: ops.Backend) -> None:
    x, dy, lora_A, lora_B = _random(9, 32).bfloat16(), _random(9, 16).bfloat16(), _random(4, 32), _random(16, 4)
    low = kernels.low_rank(x, lora_A.t(), 1.0)
    dlow, dA, dB = kernels.low_rank_backward(dy, x, low, lora_B, 0.5)
    assert (low.dtype, dlow.dtype, dA.dtype, dB.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(dB, 0.5 * (dy.float().t() @ low.float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_on_cuda_16_bit_operands_give_the_gradients_that_the_operators_promise(factors: torch.dtype) -> None:
    """The real functions on fake CUDA tensors against what they promise to a trace. Autograd would cast back silently."""
    with FakeTensorMode():
        x, dy, low, lora_A, lora_B = (
            torch.empty(shape, dtype=dtype, device="cuda")
            for shape, dtype in (
                ((64, 128), torch.bfloat16), ((64, 96), torch.bfloat16), ((64, 8), torch.bfloat16), ((8, 128), factors),
                ((96, 8), factors),
            )
        )  # fmt: skip
        _, dA, dB = plain.low_rank_backward(dy, x, low, lora_B, 2.0)
        assert (dA.dtype, dB.dtype) == (torch.float32, torch.float32)
        assert (dA.shape, dB.shape) == (lora_A.shape, lora_B.shape)
        assert plain.outer_float32(low, dy).dtype == torch.float32


def test_no_rows_give_no_gradient(kernels: ops.Backend) -> None:
    dlow, dA, dB = kernels.low_rank_backward(_random(0, 5), _random(0, 3), _random(0, 2), _random(5, 2), 1.0)
    assert dlow.shape == (0, 2)
    assert torch.equal(dA, torch.zeros(2, 3))
    assert torch.equal(dB, torch.zeros(5, 2))


def test_a_value_that_is_not_finite_reaches_every_gradient_it_belongs_to(kernels: ops.Backend) -> None:
    x, dy, lora_B = _random(70, 20), _random(70, 24), _random(24, 3)
    low = _random(70, 3)
    dy[66, 5] = float("nan")
    dlow, dA, dB = kernels.low_rank_backward(dy, x, low, lora_B, 1.0)
    assert torch.equal(dlow.isnan().any(1).nonzero().flatten(), torch.tensor([66]))
    assert bool(dA.isnan().all())
    assert torch.equal(dB.isnan().any(1).nonzero().flatten(), torch.tensor([5]))


@pytest.mark.skipif(not _isas(), reason="the compiled kernels are not built")
def test_threads_do_not_change_the_result() -> None:
    x, dy, lora_A, lora_B = _random(1500, 96), _random(1500, 80), _random(8, 96), _random(80, 8)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            low = cpu.low_rank(x, lora_A.t(), 1.0)
            results.append((low, *cpu.low_rank_backward(dy, x, low, lora_B, 0.5)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif("cpu-avx512" not in _isas(), reason="the kernel is AVX-512's")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(x=g["x"][:-1]), "'x_TK'"),
        (lambda g: g.update(low=g["low"].t().contiguous().t()), "'low_Tr'"),
        (lambda g: g.update(lora_B=g["lora_B"].bfloat16()), "factor"),
        (lambda g: g.update(lora_B=g["lora_B"][:-1]), "factor"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message: str) -> None:
    given = {"dy": _random(6, 5), "x": _random(6, 4), "low": _random(6, 3), "lora_B": _random(5, 3)}
    change(given)
    with pytest.raises(InputError, match=message):
        cpu.low_rank_backward(given["dy"], given["x"], given["low"], given["lora_B"], 1.0)
    with pytest.raises(InputError, match="factor"):
        cpu.low_rank(_random(6, 4), _random(5, 3), 1.0)
