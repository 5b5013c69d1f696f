"""DoRA: the norm of each row of the weight is trained apart from its direction.

    y = m / n * (x W^T + s (x A^T) B^T) + bias          n_i = ||w_i + s b_i A||, m (out,) trained, starts at n

n is a constant to autograd (section 4.3 of the paper). Neither W + s B A nor its norm is formed, which takes a product as large
as the weight in every forward pass:

    n_i^2 = ||w_i||^2 + 2 s b_i . (A w_i) + s^2 b_i (A A^T) b_i^T

||w_i||^2 is a constant of the frozen base, computed once in float32 and kept as a buffer that no file holds; W A^T is one product
with the rows of A as input. The sum loses precision only where B A cancels a row of W. n is not kept from one pass to the next:
the only sign that A has changed are version counters, which writes through `.data` and optimisers of one's own may not raise.

The product is LoRA's (`product.py`), scaled in place. Backward needs it once more, for the gradient of m, and takes it from the
layer's output, (y - bias) / m: most layers' output is saved by the operation after it anyway. Where the model changes the output
in place (Falcon, Llama 4; `Passes.check_outputs` finds out) the product is kept instead.

With dropout, PEFT drops the inputs of the base's product, too, where it is scaled (d: the dropped x):

    y = x W^T + bias + (m / n - 1) * d W^T + m / n * s (d A^T) B^T = (x - d) W^T + bias + m / n * (d W^T + s (d A^T) B^T)

which are two products with W in each direction. A row whose weight is zero starts as zero and can learn; PEFT divides by zero
there.

Source: Liu et al. 2024 (arXiv:2402.09353); the numbers and file keys are PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lownibble.lora.product import dropped
from lownibble.lora.targets import parameter_shapes
from lownibble.lora.variants import LORA, Variant, low_rank_sum
from lownibble.quant import QuantLinear, matrix
from lownibble.quant.linear import frozen_matmul

if TYPE_CHECKING:
    from lownibble.lora.layer import LowRank

_TINY = torch.finfo(torch.float32).tiny


class _DoRA(Variant):
    """y = m / n * (x W^T + s (x A^T) B^T) + bias; see the module docstring."""

    keys: ClassVar[dict[str, str]] = {**LORA.keys, "magnitude": "lora_magnitude_vector"}
    keeps_output: ClassVar[bool] = True

    def shapes(self, n_in: int, n_out: int, r: int) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(n_in, n_out, r, use_dora=True)

    def start(self, base: nn.Linear | QuantLinear, adapter: LowRank) -> None:
        adapter.register_buffer("row_squares", row_squares(base), persistent=False)
        adapter.magnitude.data.copy_(_norm(base, adapter, base.weight.dtype))

    def forward(self, base: nn.Linear | QuantLinear, adapter: LowRank, x: Tensor, dropout: float) -> Tensor:
        norm = _norm(base, adapter, x.dtype)
        if dropout == 0:
            z = low_rank_sum(base, adapter, x, None, 0.0)
            return _rescaled(z, adapter, norm, base.bias).view(*x.shape[:-1], -1)
        kept = dropped(x, dropout, torch.randint(2**62, ()))
        y = _rescaled(low_rank_sum(base, adapter, kept, None, 0.0), adapter, norm, None)
        rest: Tensor = base(x - kept)
        return rest + y.view(rest.shape)

    def merge(self, weight: Tensor, parameters: Mapping[str, Tensor], scale: float) -> Tensor:
        total = LORA.merge(weight, parameters, scale)
        norm = torch.linalg.vector_norm(total, dim=1).clamp_min_(_TINY)
        return total.mul_((parameters["magnitude"] / norm).unsqueeze(1))


DORA = _DoRA()


@torch.no_grad()
def row_squares(base: nn.Linear | QuantLinear) -> Tensor:
    """||w_i||^2 of each row of a base, (out,) float32."""
    weight = base.weight.dequantize(torch.float32) if isinstance(base, QuantLinear) else matrix(base).detach()
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return norms.square_()


def row_gains(base: nn.Linear | QuantLinear, parameters: Mapping[str, Tensor], scale: float, squares: Tensor) -> Tensor:
    """m / n of an adapter whose `parameters` are fixed, (out,) float32; `squares`: of `row_squares`."""
    A, B = parameters["lora_A"].float(), parameters["lora_B"].float()
    return parameters["magnitude"].float() / _row_norm(base, A, B, scale, squares, torch.float32)


def _norm(base: nn.Linear | QuantLinear, adapter: LowRank, dtype: torch.dtype) -> Tensor:
    return _row_norm(base, adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.scale, adapter.row_squares, dtype)


@torch.no_grad()
def _row_norm(
    base: nn.Linear | QuantLinear, A: Tensor, B: Tensor, s: float, squares: Tensor, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """||W + s B A|| of each row, (out,) float32, from a product with W in `dtype`."""
    if not isinstance(base, QuantLinear):
        product = A.to(base.weight.dtype) @ matrix(base).t()
    elif torch.compiler.is_compiling():
        product = frozen_matmul(A.to(dtype), base.flat, base.spec, base.out_features, [])
    else:
        product = base.weight.matmul(A.to(dtype))
    inner = torch.addmm(product.float().t(), B, A @ A.t(), beta=2, alpha=s)  # (out, r)
    return (inner.mul_(B).sum(1).mul_(s).add_(squares)).clamp_min_(_TINY).sqrt_()


def _rescaled(z: Tensor, adapter: LowRank, norm: Tensor, bias: Tensor | None) -> Tensor:
    """z (..., out) * magnitude / norm + bias, in z's dtype; may be z changed in place."""
    if torch.compiler.is_compiling() or adapter.output_changes:
        y = (z * (adapter.magnitude / norm)).to(z.dtype)
        return y if bias is None else y + bias
    scaled: Tensor = _Rescale.apply(z, adapter.magnitude, norm, bias)
    return scaled


class _Rescale(torch.autograd.Function):
    """z (T, N) * magnitude / norm + bias, in place."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
        gain = magnitude / norm  # stays float32: a step changes it by less than 16 bits resolve
        y = z.mul_(gain)
        if bias is not None:
            y.add_(bias)
        ctx.mark_dirty(z)
        ctx.save_for_backward(y, magnitude, gain, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, magnitude, gain, bias = ctx.saved_tensors
        work = dy * y if bias is None else torch.sub(y, bias).mul_(dy)
        dmagnitude = work.sum(0, dtype=magnitude.dtype) / magnitude.masked_fill(magnitude == 0, math.inf)
        dz = torch.mul(dy, gain, out=work)
        return dz, dmagnitude, None, dy.sum(0) if ctx.needs_input_grad[3] else None
