"""Forward and backward of an adapted layer, written once and registered twice.

    y = x W^T + bias + scale * (dropout(x) A^T) B^T          A (r, in), B (out, r)

`forward` and `backward` are plain functions. Eager mode runs them in an `autograd.Function`; it saves x, the small product x A^T
and the packed weight, never a dequantised weight (dequantised again in backward) or a dropout mask (regenerated from its seed).
The gradient of the input is skipped if not needed, which saves the first layer a matmul. Under `torch.compile` a custom operator
takes its place, because the compiler cannot trace kernels that work on pointers, or packed weights: it costs more Python per
call, but a decoder layer becomes one graph, whose norms, rotary embedding and activation function are fused and partly
recomputed in backward instead of saved.

Adapters are float32 master weights; with 16-bit activations they are cast for the matmul, by the caller once for all layers and
both directions (`rounded`) or else at each use. Their gradients are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lownibble.kernels import ops, plain
from lownibble.kernels.types import NO_EPILOGUE, Epilogue, Rows8bit
from lownibble.quant import eightbit
from lownibble.quant.packed import PackedWeight, from_spec, restore

Rounded = Sequence[Tensor]
"""A and B in the dtype of the activations, or nothing."""


def _keep_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """The inverted-dropout mask generated from `seed`: 0 or 1 / (1 - p), in x's shape and dtype."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


@torch.library.custom_op("lownibble::dropped", mutates_args=())
def dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """dropout(x) by the mask of `seed`, () int64; saves no mask for backward."""
    return x * _keep_mask(x, p, int(seed))


@dropped.register_fake
def _(x, p, seed):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


def _save_seed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _drop_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return dropped(dy, ctx.p, *ctx.saved_tensors), None, None


dropped.register_autograd(_drop_gradient, setup_context=_save_seed)


def input_gradient(dy: Tensor, weight: Tensor | PackedWeight, epilogue: Epilogue, code_type: torch.dtype | None) -> Tensor:
    """dy (T, N) -> dy W (T, K), plus `epilogue`. `code_type`: that of 8-bit products, or None."""
    if isinstance(weight, Tensor):
        return ops.matmul_dense(dy, weight.to(dy.dtype), True, epilogue)
    if code_type is not None:
        return eightbit.backward(dy, weight, epilogue, code_type)
    return weight.matmul(dy, transposed=True, epilogue=epilogue)


def forward(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float,
    dropout: float, seed: int, rows: Rows8bit | None, active: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (T, K) -> y (T, N) and dropout(x) A^T (T, r). `rows`: x in 8 bits, for 8-bit matmuls, or None. `active`: (T, 1) bool,
    the rows that have the low-rank branch; None: all."""
    x = x.contiguous()
    dropped = x if dropout == 0 else x * _keep_mask(x, dropout, seed)
    low = ops.low_rank(dropped, lora_A.t())
    if active is not None:
        low = low.mul_(active)
    return with_low(x, weight, bias, low, lora_B, scale, rows), low


def with_low(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, low: Tensor, lora_B: Tensor, scale: float,
    rows: Rows8bit | None,
) -> Tensor:  # fmt: skip
    """x (T, K) -> y (T, N), with `low` for x A^T (T, r)."""
    epilogue = Epilogue(None if bias is None else bias.to(x.dtype).contiguous(), low, lora_B.t(), scale)
    if isinstance(weight, Tensor):
        return ops.matmul_dense(x, weight.to(x.dtype), False, epilogue)
    if rows is None:
        return weight.matmul(x, epilogue=epilogue)
    return eightbit.forward(rows, weight, epilogue, x.dtype)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | PackedWeight, lora_A: Tensor, lora_B: Tensor, low: Tensor, scale: float,
    dropout: float, seed: int, code_type: torch.dtype | None, wants_dx: bool, active: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """dy (T, N) -> dx (T, K) if wanted, dA and dB. `code_type`: the forward's code dtype for 8-bit matmuls, or None."""
    dy, x = dy.contiguous(), x.contiguous()
    mask = _keep_mask(x, dropout, seed) if dropout else None
    read = x if mask is None else x * mask
    if active is None:
        dlow, dA, dB = ops.low_rank_backward(dy, read, low, lora_B, scale)
    else:  # `low` is zero in the other rows, so they add nothing to dB
        dlow, dB = ops.low_rank(dy, lora_B, scale).mul_(active), plain.outer_float32(low, dy).mul_(scale).t().contiguous()
        dA = plain.outer_float32(dlow, read)
    if not wants_dx:
        return None, dA, dB
    dx = input_gradient(dy, weight, Epilogue(low=dlow, factor=lora_A) if mask is None else NO_EPILOGUE, code_type)
    if mask is not None:
        dx.add_((dlow @ lora_A.to(dy.dtype)).mul_(mask))
    return dx, dA, dB


class LoraMatmul(torch.autograd.Function):
    """`forward` and `backward` for autograd: x (T, K) -> (T, N). `weight` is frozen, (N, K), dense or packed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
        scale: float, dropout: float, seed: int, rows: Rows8bit | None, rounded: Rounded, active: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The module-level `forward`; returns y only. `rounded`: A and B in x's dtype, or none."""
        A, B = rounded or (lora_A, lora_B)
        y, low = forward(x, weight, bias, A, B, scale, dropout, seed, rows, active)
        tensors = {"": weight} if isinstance(weight, Tensor) else weight.tensors()
        ctx.save_for_backward(x, A, B, low, active, *tensors.values())
        ctx.packed = None if isinstance(weight, Tensor) else (weight.facts(), tuple(tensors))
        ctx.rest = scale, dropout, seed, None if rows is None else rows.codes.dtype
        ctx.backend = ops.chosen()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The module-level `backward`, and the bias gradient if needed."""
        x, lora_A, lora_B, low, active, *tensors = ctx.saved_tensors
        facts, names = ctx.packed or (None, ())
        weight = tensors[0] if facts is None else restore(facts, dict(zip(names, tensors, strict=True)))
        scale, dropout, seed, code_type = ctx.rest
        with ops.keeping(ctx.backend):
            dx, dA, dB = backward(
                dy, x, weight, lora_A, lora_B, low, scale, dropout, seed, code_type, ctx.needs_input_grad[0], active
            )  # fmt: skip
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, dA, dB, None, None, None, None, None, None


def frozen_weight(tensors: list[Tensor], spec: str) -> Tensor | PackedWeight:
    """The weight that an operator's arguments stand for."""
    return from_spec(spec, tensors) if spec else tensors[0]


@torch.library.custom_op("lownibble::lora_matmul", mutates_args=())
def lora_matmul(
    x: Tensor, weight: list[Tensor], spec: str, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float,
    dropout: float, seed: Tensor | None, rows: list[Tensor], rounded: list[Tensor], active: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Custom operator for torch.compile: x (..., K) -> y (..., N) and dropout(x) A^T (T, r).

    `weight`: one dense tensor, or with a `spec` the `flat` of a `QuantLinear`. `seed`: () int64, with dropout. `rows`: x in
    8 bits from `eightbit.rows_of`, or empty. `rounded`: A and B in x's dtype, or empty. `active`: as in `forward`.
    """
    x_TK = x.reshape(-1, x.shape[-1])
    frozen, as_rows = frozen_weight(weight, spec), eightbit.of_tensors(rows, x_TK)
    A, B = rounded or (lora_A, lora_B)
    y, low = forward(x_TK, frozen, bias, A, B, scale, dropout, 0 if seed is None else int(seed), as_rows, active)
    return y.view(*x.shape[:-1], -1), low


@lora_matmul.register_fake
def _(x, weight, spec, bias, lora_A, lora_B, scale, dropout, seed, rows, rounded, active):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], lora_B.shape[0])), x.new_empty((x.numel() // x.shape[-1], lora_A.shape[0]))


@torch.library.custom_op("lownibble::lora_matmul_backward", mutates_args=())
def lora_matmul_backward(
    dy: Tensor, x: Tensor, weight: list[Tensor], spec: str, lora_A: Tensor, lora_B: Tensor, low: Tensor, scale: float,
    dropout: float, seed: Tensor | None, code_type: torch.dtype | None, wants_dx: bool, active: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x (nothing if not wanted), A and B; see `backward`."""
    dy_TN, x_TK = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    frozen, drawn = frozen_weight(weight, spec), 0 if seed is None else int(seed)
    dx, dA, dB = backward(dy_TN, x_TK, frozen, lora_A, lora_B, low, scale, dropout, drawn, code_type, wants_dx, active)
    return x.new_empty(0) if dx is None else dx.view(x.shape), dA, dB


@lora_matmul_backward.register_fake
def _(dy, x, weight, spec, lora_A, lora_B, low, scale, dropout, seed, code_type, wants_dx, active):  # type: ignore[no-untyped-def]
    dA, dB = (x.new_empty(factor.shape, dtype=torch.promote_types(factor.dtype, torch.float32)) for factor in (lora_A, lora_B))
    return x.new_empty(x.shape if wants_dx else 0), dA, dB


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, spec, _, lora_A, lora_B, scale, dropout, seed, rows, rounded, active = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *(rounded or (lora_A, lora_B)), output[1], seed, active, *weight)
    ctx.rest = spec, scale, dropout, len(weight), [tensor.dtype for tensor in rows], len(rounded)
    ctx.backend = ops.chosen()


def _differentiate(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
    x, lora_A, lora_B, low, seed, active, *weight = ctx.saved_tensors
    spec, scale, dropout, n_weight, row_types, n_rounded = ctx.rest
    wants_dx, code_type = ctx.needs_input_grad[0], row_types[0] if row_types else None
    with ops.keeping(ctx.backend):
        dx, dA, dB = lora_matmul_backward(
            dy, x, weight, spec, lora_A, lora_B, low, scale, dropout, seed, code_type, wants_dx, active
        )  # fmt: skip
    dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    without = [None] * n_weight, [None] * len(row_types), [None] * n_rounded
    return dx if wants_dx else None, without[0], None, dbias, dA, dB, None, None, None, *without[1:], None


lora_matmul.register_autograd(_differentiate, setup_context=_save)
