"""Dense linear layers of a model on the CPU kernels of Lownibble, installed for a pass and removed after it.

torch multiplies float32 matrices by MKL, which uses AVX-512 on Intel's processors alone. On an AMD Zen 5, whose AVX-512 units are
as wide, it reaches less than half of what the kernels of the packed base reach with a dense matrix (docs/adr/0050). Adapted
layers call those by themselves; here is the rest: what full fine-tuning trains, and linear layers without an adapter.

Layers stay torch's `nn.Linear`; only their forward function is another one meanwhile. It is a method, not a `partial`: for each
of the latter the compiler makes a graph of its own. What is saved for backward is what torch's own saves: x if the weight is
trained, the weight if x has a gradient. Not installed: where the kernels are not the compiled ones with AVX-512, on subclasses
with a forward of their own, on layers whose rows are no multiple of 64 long, that are no float32, or that someone else gave a
forward function, and on weights that are sharded.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lownibble.kernels import cpu, ops
from lownibble.kernels.types import Epilogue
from lownibble.models.forwards import Forward, replaced_forwards


def own_forwards(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """The model's dense linear layers that can compute with Lownibble's kernels, each with the forward function that does."""
    if ops.active_backend("cpu") != "cpu" or not cpu.library().has_matmul():
        return []
    return [(module, MethodType(_forward, module)) for module in model.modules() if _suits(module)]


def installed(forwards: list[tuple[nn.Module, Forward]]) -> AbstractContextManager[None]:
    """Inside the block the layers run these forward functions, but those that were given another one since."""
    return replaced_forwards(pair for pair in forwards if "forward" not in vars(pair[0]))


def on_own_kernels(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the model's dense linear layers compute with Lownibble's kernels, where those can."""
    return installed(own_forwards(model))


def _suits(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return False
    weight = module.weight
    whole = type(weight.data) is Tensor and weight.device.type == "cpu" and weight.is_contiguous()  # shards are DTensors
    return whole and weight.dtype == torch.float32 and weight.shape[1] % 64 == 0 and weight.numel() > 0


def _forward(module: Any, input: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if input.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(input, weight, bias)
    x_TK = input.reshape(-1, input.shape[-1])
    y_TN: Tensor = (linear if torch.compiler.is_compiling() else _Linear.apply)(x_TK, weight, bias)
    return y_TN.view(*input.shape[:-1], len(weight))  # a view made in the function could not be changed in place


def _product(x_TK: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.matmul_dense(x_TK.contiguous(), weight, False, Epilogue(None if bias is None else bias.contiguous()))


def _gradients(
    dy_TN: Tensor, x_TK: Tensor | None, weight: Tensor | None, wants_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx if there is a `weight`, dW if there is an `x`, and the bias's."""
    dy_TN = dy_TN.contiguous()
    dx = None if weight is None else ops.matmul_dense(dy_TN, weight, True)
    dweight = None if x_TK is None else ops.outer(dy_TN, x_TK.contiguous())
    return dx, dweight, dy_TN.sum(0) if wants_dbias else None


class _Linear(torch.autograd.Function):
    """x (T, K), W (N, K), bias (N,) -> (T, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.backend = ops.chosen()
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with ops.keeping(ctx.backend):
            x, weight = ctx.saved_tensors
            return _gradients(dy, x, weight, ctx.needs_input_grad[2])


@torch.library.custom_op("lownibble::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_Linear` for torch.compile."""
    return _product(x, weight, bias)


@linear.register_fake
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("lownibble::linear_backward", mutates_args=())
def linear_backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, wants_dbias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, W and bias; those that are not wanted are empty."""
    dx, dweight, dbias = (dy.new_empty(0) if grad is None else grad for grad in _gradients(dy, x, weight, wants_dbias))
    return dx, dweight, dbias


@linear_backward.register_fake
def _(dy, x, weight, wants_dbias):  # type: ignore[no-untyped-def]
    T, N = dy.shape
    return (
        dy.new_empty(0 if weight is None else (T, weight.shape[1])),
        dy.new_empty(0 if x is None else (N, x.shape[1])),
        dy.new_empty(N if wants_dbias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
    ctx.backend = ops.chosen()


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    with ops.keeping(ctx.backend):
        grads = linear_backward(dy, *ctx.saved_tensors, ctx.needs_input_grad[2])
    return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad, strict=True))


linear.register_autograd(_differentiate, setup_context=_save)
