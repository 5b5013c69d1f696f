"""The linear layers of a mixture's experts, held as one module: packed, or dense as the model has them.

transformers keeps the weights of all experts of a layer in parameters of three dimensions ('fused'): `gate_up_proj` (E, 2F, K)
and `down_proj` (E, K, F), or turned, (E, in, out). Here such a parameter becomes a module of the same name, which computes with
rows that are sorted by expert, and which adapters wrap as they wrap a linear layer. An expert without rows is neither decoded
nor multiplied.

On CUDA a product is one kernel for all experts, which decodes inside and reads on the device which rows are whose, so that the
host waits for nothing (`kernels/triton_experts.py`). Elsewhere, for 8-bit products, and for codecs that the kernel does not know,
it is a loop over the experts that have rows, each with the kernels of a single matrix: decode into the shared buffer, then the
library's product; with few rows and no gradient, as in decoding, the fused matrix-vector kernel (a third of the time at one row).
At training sizes an expert has dozens of rows, and on a CPU the loop's own cost is a few percent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lownibble.kernels import ops
from lownibble.kernels.checks import DTYPES
from lownibble.kernels.types import NO_EPILOGUE, Epilogue, Stack
from lownibble.quant import eightbit
from lownibble.quant.linear import MATVEC_MAX_ROWS, QuantLinear
from lownibble.quant.packed import PackedExperts, PackedWeight, restore

Weights = Tensor | PackedExperts
"""Weights of all experts, indexed by expert: dense (E, N, K), or packed."""


class Ends:
    """Where the rows of each expert end, for rows that are sorted by expert.

    Args:
        on_device: (E,) int32, on the rows' device. n_rows: rows in all; there may be some after the last expert's.
    """

    def __init__(self, on_device: Tensor, n_rows: int) -> None:
        self.on_device, self.n_rows = on_device, n_rows

    @classmethod
    def of(cls, expert_of_row: Tensor, n_experts: int) -> Ends:
        """The ends for rows with these experts, ascending; rows of experts beyond the number of experts are nobody's."""
        experts = torch.arange(n_experts, device=expert_of_row.device, dtype=expert_of_row.dtype)
        return cls(torch.searchsorted(expert_of_row, experts, right=True, out_int32=True), len(expert_of_row))

    @cached_property
    def on_host(self) -> list[int]:
        """The same as numbers, for which the host waits, once; without values (fake tensors): as if they were even."""
        if isinstance(self.on_device, FakeTensor):
            n_experts = len(self.on_device)
            return [self.n_rows * (expert + 1) // n_experts for expert in range(n_experts)]
        found: list[int] = self.on_device.tolist()
        return found

    def segments(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) for every expert that has rows."""
        start = 0
        for expert, end in enumerate(self.on_host):
            if end > start:
                yield expert, slice(start, end)
            start = end


class Product(NamedTuple):
    """What a product with frozen weights of all experts computes with, x W_e^T + scale (x A_e^T) B_e^T.

    Attributes:
        adapter: A (E, r, in) and B (E, out, r), or nothing. rounded: both in the dtype of activations, or nothing.
    """

    weights: Weights
    code_type: torch.dtype | None = None
    adapter: Sequence[Tensor] = ()
    rounded: Sequence[Tensor] = ()
    scale: float = 1.0


def empty_rows(like: Tensor, n: int, ends: Ends) -> Tensor:
    """(S, n) for one row per row of `like`, of its dtype: to be written for the experts' rows, zero for those after them."""
    out = like.new_empty(len(like), n)
    out[ends.on_host[-1] :].zero_()
    return out


def at_once(x: Tensor, weights: Weights, code_type: torch.dtype | None) -> Stack | None:
    """The weights as the backend's kernels for all experts take them, or None: products go by expert."""
    if code_type is not None or x.dtype not in DTYPES or not ops.current(x.device).experts_at_once:
        return None
    return weights if isinstance(weights, Tensor) else weights.stack


def expert_product(
    x_TC: Tensor, weight: Tensor | PackedWeight, transposed: bool, epilogue: Epilogue, code_type: torch.dtype | None
) -> Tensor:
    """`x W^T` or, transposed, `x W`, plus `epilogue`, for one expert's weight (N, K); in 8 bits if `code_type` is given."""
    if isinstance(weight, Tensor):
        return ops.matmul_dense(x_TC, weight.to(x_TC.dtype), transposed, epilogue)
    if code_type is None:
        return weight.matmul(x_TC, transposed=transposed, epilogue=epilogue)
    if transposed:
        return eightbit.backward(x_TC, weight, epilogue, code_type)
    return eightbit.forward(ops.quantize_rows(x_TC.contiguous(), None, code_type), weight, epilogue, x_TC.dtype)


def _all_products(x_SC: Tensor, weights: Weights, ends: Ends, transposed: bool, code_type: torch.dtype | None) -> Tensor:
    """`expert_product` for the rows of every expert."""
    stack = at_once(x_SC, weights, code_type)
    if stack is not None:
        return ops.matmul_experts(x_SC.contiguous(), stack, ends.on_device, transposed)
    out = empty_rows(x_SC, weights.shape[2 if transposed else 1], ends)
    for expert, rows in ends.segments():
        out[rows] = expert_product(x_SC[rows], weights[expert], transposed, NO_EPILOGUE, code_type)
    return out


def products(x_SK: Tensor, weights: Weights, ends: Ends, code_type: torch.dtype | None = None) -> Tensor:
    """x (S, in), rows sorted by expert -> (S, out), without gradient."""
    if isinstance(weights, Tensor) or code_type is not None or at_once(x_SK, weights, code_type) is not None:
        return _all_products(x_SK, weights, ends, False, code_type)
    out = empty_rows(x_SK, weights.shape[1], ends)
    for expert, rows in ends.segments():
        few, weight = rows.stop - rows.start <= MATVEC_MAX_ROWS, weights[expert]
        out[rows] = weight.matvec(x_SK[rows]) if few else expert_product(x_SK[rows], weight, False, NO_EPILOGUE, None)
    return out


def frozen_product(x_SK: Tensor, weights: Weights, ends: Ends, code_type: torch.dtype | None = None) -> Tensor:
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
    def forward(ctx: Any, x: Tensor, weights: Weights, ends: Ends, code_type: torch.dtype | None) -> Tensor:
        save_weights(ctx, weights)
        ctx.rest = ends, code_type
        return _all_products(x, weights, ends, False, code_type)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ends, code_type = ctx.rest
        with ops.keeping(ctx.backend):
            dx = _all_products(dy, saved_weights(ctx, ctx.saved_tensors), ends, True, code_type)
        return dx, None, None, None


class _TrainedExperts(torch.autograd.Function):
    """y[rows of e] = x[rows of e] W_e^T for dense weights that are trained, where products are kernels for all experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Ends) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weights)
        ctx.ends, ctx.backend = ends, ops.chosen()
        return ops.matmul_experts(x, weights, ends.on_device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, weights), ends, dy = ctx.saved_tensors, ctx.ends.on_device, dy.contiguous()
        with ops.keeping(ctx.backend):
            dx = ops.matmul_experts(dy, weights, ends, True) if ctx.needs_input_grad[0] else None
            return dx, ops.outer_experts(dy, x, ends, 1.0, weights.dtype), None


class QuantExperts(QuantLinear):
    """The experts' linear layers with frozen packed weights (E, out, in); parameters as `QuantLinear`, each with a leading E."""

    @property
    def n_experts(self) -> int:
        """Experts."""
        return int(self.facts["experts"])

    def forward(self, x_SK: Tensor, ends: Ends) -> Tensor:  # type: ignore[override]
        """x (S, in), rows sorted by expert -> (S, out)."""
        weights: Any = self.weight
        return frozen_product(x_SK, weights, ends, self.code_type)

    def product(self) -> Product:
        """What it computes with."""
        weights: Any = self.weight
        return Product(weights, self.code_type)

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

    def forward(self, x_SK: Tensor, ends: Ends) -> Tensor:
        """x (S, in), rows sorted by expert -> (S, out)."""
        return dense_product(x_SK, self.weight, ends)

    def product(self) -> Product:
        """What it computes with."""
        return Product(self.weight)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.n_experts} x {self.in_features}, {self.out_features}"


def dense_product(x_SK: Tensor, weight: Tensor, ends: Ends) -> Tensor:
    """x (S, in), rows sorted by expert, times dense weights (E, out, in) -> (S, out); with the weights' gradient if they have
    one."""
    if not weight.requires_grad:
        return frozen_product(x_SK, weight, ends)
    if at_once(x_SK, weight, None) is not None:
        y: Tensor = _TrainedExperts.apply(x_SK, weight, ends)
        return y
    parts = [x_SK[rows] @ weight[expert].t().to(x_SK.dtype) for expert, rows in ends.segments()]
    return torch.cat([*parts, x_SK.new_zeros(len(x_SK) - sum(map(len, parts)), weight.shape[1])])
