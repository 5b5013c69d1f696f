"""For the kernel tests: every backend and instruction set, random inputs, and bounds of rounding."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lownibble.kernels import cpu, ops, reference
from lownibble.kernels.types import Epilogue, Nested
from lownibble.quant.codebook import dynamic8, dynamic8_lookup

NESTED_BLOCK_SIZE = 256
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding to the type: half the gap between neighbours, from the number of mantissa bits."""


def variants() -> list[str]:
    status = ops.backend_status()
    isas = [f"cpu-{isa}" for isa in cpu.available_isas()] if status["cpu"] == "ok" else []
    return ["reference", *isas, *(["triton"] if status["triton"] == "ok" else [])]


class _OnCuda:
    """The Triton kernels on the GPU for tests written with CPU tensors: arguments go there, results come back."""

    name = "triton"

    def __getattr__(self, operation: str):
        def call(*arguments):
            there = tree_map(lambda a: a.cuda() if isinstance(a, Tensor) else a, arguments)
            result = getattr(ops.backend("triton"), operation)(*there)
            if operation == "cross_entropy":
                arguments[0].copy_(there[0])
            if operation in ("dequantize_4bit", "dequantize_grouped"):
                assert result is there[1]
                return arguments[1].copy_(result)
            return tree_map(Tensor.cpu, result)

        return call


@contextmanager
def running(variant: str) -> Iterator[ops.Backend]:
    backend_name, _, isa = variant.partition("-")
    if backend_name == "triton":
        with np.errstate(all="ignore"):  # the interpreter computes in numpy, which warns where a GPU gives infinity or NaN
            yield _OnCuda() if torch.cuda.is_available() else ops.backend("triton")
        return
    if not isa:
        yield ops.backend(backend_name)
        return
    before = cpu.isa()
    cpu.select_isa(isa)
    assert cpu.isa() == isa
    try:
        yield ops.backend(backend_name)
    finally:
        cpu.select_isa(before)


def random(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nested_constants(absmax: Tensor) -> tuple[Tensor, Nested]:
    offset = (absmax.mean() if absmax.numel() else absmax.new_zeros(())).view(1)
    codes, nested_absmax = reference.quantize_8bit(absmax - offset, dynamic8_lookup(), NESTED_BLOCK_SIZE)
    return codes, Nested(dynamic8(), nested_absmax, offset, NESTED_BLOCK_SIZE)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    same_bits = actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
    assert torch.equal(*same_bits), f"{int((actual != expected).sum())} of {actual.numel()} values differ"


def gemv_bound(x_TK: Tensor, weight_NK: Tensor, exact_TN: Tensor, kernels: ops.Backend | None = None) -> Tensor:
    """Largest error of summing K rounded products in float32 in any order (Higham 2002, section 3.1), then rounding once to
    the output type; the last term is half of float16's smallest step. Tensor cores take weights rounded to x's dtype."""
    (T, K), sizes = x_TK.shape, x_TK.double().abs() @ weight_NK.double().abs().t()
    summed = (K + 1) * ROUNDOFF[torch.float32] * sizes
    if kernels is not None and kernels.name == "triton" and T > 1 and x_TK.dtype != torch.float32:
        summed += ROUNDOFF[x_TK.dtype] * sizes + 2.0**-25 * x_TK.double().abs().sum(1, keepdim=True)
    return summed + ROUNDOFF[x_TK.dtype] * (exact_TN.abs() + summed) + 2.0**-25


def matmul_bound(x_TC: Tensor, factor_CM: Tensor, epilogue: Epilogue, exact_TM: Tensor) -> Tensor:
    """Largest error of `ops.matmul_4bit`: operands rounded to x's dtype, terms summed in float32 in any order with the low-rank
    branch (scaled before or after), each of up to three parts of the sum rounded to the output type."""
    low, factor = epilogue.low, epilogue.factor
    terms = x_TC.shape[1]
    sizes = x_TC.double().abs() @ factor_CM.double().abs()
    if low is not None and factor is not None:
        terms += low.shape[1] + 1
        sizes += abs(epilogue.scale) * low.double().abs() @ factor.double().abs()
    if epilogue.bias is not None:
        sizes += epilogue.bias.double().abs()
    return (terms + 2) * ROUNDOFF[torch.float32] * sizes + 4 * ROUNDOFF[x_TC.dtype] * (sizes + exact_TM.abs()) + 2.0**-24
