"""LoraLinear: any linear layer plus a low-rank branch, computed and differentiated as one operation.

    y = x W^T + bias + scale * (dropout(x) A^T) B^T          A (r, in), B (out, r), scale = lora_alpha / r

One `autograd.Function` serves dense and quantised bases. It saves x, the small product x A^T and the packed weight; never a
decoded weight (decoded again in backward) and never a dropout mask (drawn again from its
seed). No gradient of the input is computed where none is wanted, which spares the first layer a product and a decode.
Adapters are float32 master weights; with 16-bit activations they are cast for the product and their gradient is cast back.

Composition (a frozen base module and adapters by name) was chosen over subclasses per codec: a new codec only has to
provide `QuantizedTensor.dequantize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lownibble.kernels.ops import Addition, Rows8bit
from lownibble.quant import QuantizedTensor, QuantLinear, int8


def _keep_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """The inverted-dropout mask that `seed` stands for: 0 or 1 / (1 - p), in x's shape and dtype."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


def _input_gradient(dy: Tensor, weight: Tensor | QuantizedTensor, addition: Addition, in_int8: bool) -> Tensor:
    """dy W, (T, K), plus `addition`."""
    low, factor = addition.low, addition.factor
    if isinstance(weight, Tensor):
        dx = dy @ weight.to(dy.dtype)
        return dx if low is None or factor is None else dx.addmm_(low, factor.to(dy.dtype))
    if in_int8:
        return int8.backward(dy, weight, addition._replace(low=None if low is None else low.float()))
    return weight.matmul(dy, transposed=True, addition=addition)


class _LoraMatmul(torch.autograd.Function):
    """x (T, K) -> (T, N). `weight` is frozen: (N, K) dense or quantised. `rows`: x in 8 bits, for 8-bit products, or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | QuantizedTensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
        scale: float, dropout: float, seed: int, rows: Rows8bit | None,
    ) -> Tensor:  # fmt: skip
        dropped = x if dropout == 0 else x * _keep_mask(x, dropout, seed)
        low = dropped @ lora_A.to(x.dtype).t()
        if isinstance(weight, Tensor):
            w = weight.to(x.dtype).t()
            y = x @ w if bias is None else torch.addmm(bias.to(x.dtype), x, w)
            y.addmm_(low, lora_B.to(x.dtype).t(), alpha=scale)
        elif rows is None:
            y = weight.matmul(x, addition=Addition(bias, low, lora_B.t(), scale))
        else:
            bias_32 = None if bias is None else bias.float()
            y = int8.forward(rows, weight, Addition(bias_32, low.float(), lora_B.t(), scale), x.dtype)
        packed = not isinstance(weight, Tensor)
        ctx.save_for_backward(x, lora_A, lora_B, low, *(() if packed else (weight,)))
        ctx.weight = weight if packed else None
        ctx.int8 = rows is not None
        ctx.scale, ctx.dropout, ctx.seed = scale, dropout, seed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, lora_A, lora_B, low, *dense = ctx.saved_tensors
        weight = ctx.weight if ctx.weight is not None else dense[0]
        dlow = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scale)
        mask = _keep_mask(x, ctx.dropout, ctx.seed) if ctx.dropout else None
        dA = dB = dx = None
        if ctx.needs_input_grad[3]:
            dA = (dlow.t() @ (x if mask is None else x * mask)).to(lora_A.dtype)
        if ctx.needs_input_grad[4]:
            dB = (low.t() @ dy).mul_(ctx.scale).t().to(lora_B.dtype, memory_format=torch.contiguous_format)
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy, weight, Addition(low=dlow, factor=lora_A) if mask is None else Addition(), ctx.int8)
            if mask is not None:
                dx.add_((dlow @ lora_A.to(dy.dtype)).mul_(mask))
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, dA, dB, None, None, None, None


class LowRank(nn.Module):
    """One adapter of one layer: `lora_A` (r, in), `lora_B` (out, r), float32, and its scale."""

    def __init__(self, in_features: int, out_features: int, r: int, scale: float, dropout: float, device: torch.device) -> None:
        super().__init__()
        self.r, self.scale, self.dropout = r, scale, dropout
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        # Master weights stay float32 when the model is cast; moves between devices pass through.
        for name in ("lora_A", "lora_B"):
            parameter: nn.Parameter = getattr(self, name)
            parameter.data = parameter.data.to(fn(parameter.data).device)
        return self

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoraLinear(nn.Module):
    """A frozen linear layer (`nn.Linear` or `QuantLinear`) with named low-rank adapters, at most one active."""

    def __init__(self, base: nn.Linear | QuantLinear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.in_features, self.out_features = base.in_features, base.out_features

    def add(self, name: str, r: int, alpha: float, dropout: float, use_rslora: bool) -> LowRank:
        """Add the adapter `name`, all zeros, and make it the active one."""
        scale = alpha / (math.sqrt(r) if use_rslora else r)
        device = self.base.weight.device
        self.adapters[name] = LowRank(self.in_features, self.out_features, r, scale, dropout, device)
        self.active = name
        return self.adapters[name]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor | QuantizedTensor:
        """The base's weight, (out_features, in_features)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        if self.active is None:
            return self.base(x)  # type: ignore[no-any-return]
        adapter: LowRank = self.adapters[self.active]  # type: ignore[assignment]
        dropout = adapter.dropout if self.training else 0.0
        if not torch.is_grad_enabled() and dropout == 0:
            low = x @ adapter.lora_A.to(x.dtype).t()
            return self.base(x) + (low @ adapter.lora_B.to(x.dtype).t()).mul_(adapter.scale)  # type: ignore[no-any-return]
        seed = int(torch.randint(2**62, ())) if dropout else 0
        rows = int8.shared_rows(x) if isinstance(self.base, QuantLinear) and self.base.compute == "int8" else None
        y_TN = _LoraMatmul.apply(
            x.reshape(-1, self.in_features), self.base.weight, self.base.bias, adapter.lora_A, adapter.lora_B,
            adapter.scale, dropout, seed, rows,
        )  # fmt: skip
        return y_TN.view(*x.shape[:-1], self.out_features)  # type: ignore[no-any-return]


class TrainedCopy(nn.Module):
    """A module of `modules_to_save`: the frozen original and, by adapter name, copies that are trained in full."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.active: str | None = None

    @property
    def current(self) -> nn.Module:
        """The active copy, or the original."""
        return self.original if self.active is None else self.copies[self.active]

    @property
    def weight(self) -> Tensor:
        """The current module's weight."""
        return self.current.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The current module's bias."""
        return getattr(self.current, "bias", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The current module's output, in the original's dtype; a float32 copy computes in float32."""
        if self.active is None:
            return self.original(*args, **kwargs)
        master, outside = (next(m.parameters()).dtype for m in (self.current, self.original))
        kwargs = {key: _cast(value, master) for key, value in kwargs.items()}
        return _cast(self.current(*(_cast(a, master) for a in args), **kwargs), outside)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, also in a tuple, in `dtype`; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
