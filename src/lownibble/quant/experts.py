"""The linear layers of a mixture's experts, held as one module: packed, or dense as the model has them.

transformers keeps the weights of all experts of a layer in parameters of three dimensions ('fused'): `gate_up_proj` (E, 2F, K)
and `down_proj` (E, K, F), or turned, (E, in, out). Here such a parameter becomes a module of the same name, which computes with
rows that are sorted by expert, and which adapters wrap as they wrap a linear layer. An expert without rows is neither decoded
nor multiplied.

Products are a loop over the experts that have rows, each with the kernels of a single matrix: decode into the shared buffer, then
the library's product; with few rows and no gradient, as in decoding, the fused matrix-vector kernel (a third of the time at one
row). At training sizes an expert has dozens of rows, and the loop's own cost is a few percent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lownibble.kernels import ops
from lownibble.kernels.decoded import matmul_dense
from lownibble.kernels.types import NO_EPILOGUE, Epilogue
from lownibble.quant import eightbit
from lownibble.quant.linear import MATVEC_MAX_ROWS, QuantLinear
from lownibble.quant.packed import PackedExperts, PackedWeight, restore

Weights = Tensor | PackedExperts
"""Weights of all experts, indexed by expert: dense (E, N, K), or packed."""


def segments(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows; `ends`: by expert, the end of its rows."""
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, slice(start, end)
        start = end


def empty_rows(like: Tensor, n: int, ends: Sequence[int]) -> Tensor:
    """(S, n) for one row per row of `like`, of its dtype: to be written for the experts' rows, zero for those after them."""
    out = like.new_empty(len(like), n)
    out[ends[-1] :].zero_()
    return out


def ends_of(expert_of_row: Tensor, n_experts: int) -> list[int]:
    """The end of each expert's rows, for rows sorted by expert; without values (fake tensors): as if they were even."""
    rows = len(expert_of_row)
    if isinstance(expert_of_row, FakeTensor):
        return [rows * (expert + 1) // n_experts for expert in range(n_experts)]
    found: list[int] = torch.bincount(expert_of_row, minlength=n_experts).cumsum(0).tolist()
    return found


def expert_product(
    x_TC: Tensor, weight: Tensor | PackedWeight, transposed: bool, epilogue: Epilogue, code_type: torch.dtype | None
) -> Tensor:
    """`x W^T` or, transposed, `x W`, plus `epilogue`, for one expert's weight (N, K); in 8 bits if `code_type` is given."""
    if isinstance(weight, Tensor):
        return matmul_dense(x_TC, weight.to(x_TC.dtype), transposed, epilogue)
    if code_type is None:
        return weight.matmul(x_TC, transposed=transposed, epilogue=epilogue)
    if transposed:
        return eightbit.backward(x_TC, weight, epilogue, code_type)
    return eightbit.forward(ops.quantize_rows(x_TC.contiguous(), None, code_type), weight, epilogue, x_TC.dtype)


def products(x_SK: Tensor, weights: Weights, ends: Sequence[int], code_type: torch.dtype | None = None) -> Tensor:
    """x (S, in), rows sorted by expert -> (S, out), without gradient."""
    out = empty_rows(x_SK, weights.shape[1], ends)
    for expert, rows in segments(ends):
        weight, few = weights[expert], code_type is None and rows.stop - rows.start <= MATVEC_MAX_ROWS
        if few and isinstance(weight, PackedWeight):
            out[rows] = weight.matvec(x_SK[rows])
        else:
            out[rows] = expert_product(x_SK[rows], weight, False, NO_EPILOGUE, code_type)
    return out


def frozen_product(x_SK: Tensor, weights: Weights, ends: Sequence[int], code_type: torch.dtype | None = None) -> Tensor:
    """x (S, in), rows sorted by expert, times frozen weights -> (S, out), with x's gradient if it has one."""
    if torch.is_grad_enabled() and x_SK.requires_grad:
        y: Tensor = _FrozenExperts.apply(x_SK, weights, ends, code_type)
        return y
    return products(x_SK, weights, ends, code_type)


def save_weights(ctx: Any, weights: Weights, *others: Tensor) -> None:
    """Save tensors and weights for backward."""
    tensors = {"": weights} if isinstance(weights, Tensor) else weights.tensors()
    ctx.save_for_backward(*others, *tensors.values())
    ctx.packed = None if isinstance(weights, Tensor) else (weights.facts(), tuple(tensors))
    ctx.backend = ops.chosen()


def saved_weights(ctx: Any, tensors: Sequence[Tensor]) -> Weights:
    """The weights that `save_weights` saved, from the tensors after the others."""
    if ctx.packed is None:
        return tensors[0]
    facts, names = ctx.packed
    found = restore(facts, dict(zip(names, tensors, strict=True)))
    assert isinstance(found, PackedExperts)
    return found


class _FrozenExperts(torch.autograd.Function):
    """y[rows of e] = x[rows of e] W_e^T for frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Weights, ends: Sequence[int], code_type: torch.dtype | None) -> Tensor:
        save_weights(ctx, weights)
        ctx.rest = ends, code_type, weights.shape
        out = empty_rows(x, weights.shape[1], ends)
        for expert, rows in segments(ends):
            out[rows] = expert_product(x[rows], weights[expert], False, NO_EPILOGUE, code_type)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ends, code_type, shape = ctx.rest
        weights, dx = saved_weights(ctx, ctx.saved_tensors), empty_rows(dy, shape[2], ends)
        with ops.keeping(ctx.backend):
            for expert, rows in segments(ends):
                dx[rows] = expert_product(dy[rows], weights[expert], True, NO_EPILOGUE, code_type)
        return dx, None, None, None


class QuantExperts(QuantLinear):
    """The experts' linear layers with frozen packed weights (E, out, in); parameters as `QuantLinear`, each with a leading E."""

    @property
    def n_experts(self) -> int:
        """Experts."""
        return int(self.facts["experts"])

    def forward(self, x_SK: Tensor, ends: Sequence[int]) -> Tensor:  # type: ignore[override]
        """x (S, in), rows sorted by expert -> (S, out). `ends`: by expert, the end of its rows."""
        weights: Any = self.weight
        return frozen_product(x_SK, weights, ends, self.code_type)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.n_experts} x {super().extra_repr()}"


class DenseExperts(nn.Module):
    """The experts' linear layers with dense weights, in the model's own parameter.

    Args:
        parameter: (E, out, in), or if `turned` (E, in, out).
    """

    bias = None

    def __init__(self, parameter: nn.Parameter, turned: bool) -> None:
        super().__init__()
        self.parameter, self.turned = parameter, turned

    @property
    def weight(self) -> Tensor:
        """The weights (E, out, in)."""
        return self.parameter.transpose(1, 2) if self.turned else self.parameter

    @property
    def n_experts(self) -> int:
        """Experts."""
        return len(self.parameter)

    @property
    def out_features(self) -> int:
        """Features of an output row."""
        return int(self.weight.shape[1])

    @property
    def in_features(self) -> int:
        """Features of an input row."""
        return int(self.weight.shape[2])

    def forward(self, x_SK: Tensor, ends: Sequence[int]) -> Tensor:
        """x (S, in), rows sorted by expert -> (S, out). `ends`: by expert, the end of its rows."""
        return dense_product(x_SK, self.weight, ends)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.n_experts} x {self.in_features}, {self.out_features}"


def dense_product(x_SK: Tensor, weight: Tensor, ends: Sequence[int]) -> Tensor:
    """x (S, in), rows sorted by expert, times dense weights (E, out, in) -> (S, out); with the weights' gradient if they have
    one."""
    if not weight.requires_grad:
        return frozen_product(x_SK, weight, ends)
    parts = [x_SK[rows] @ weight[expert].t().to(x_SK.dtype) for expert, rows in segments(ends)]
    return torch.cat([*parts, x_SK.new_zeros(len(x_SK) - sum(map(len, parts)), weight.shape[1])])
