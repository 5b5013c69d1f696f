"""Adapters on the experts of a mixture: a low-rank update of its own for each expert, as PEFT's `target_parameters`.

    y[rows of e] = x W_e^T + scale (x A_e^T) B_e^T          A (E, r, in), B (E, out, r)

In PEFT's files the experts of A lie below each other, (E r, in), and those of B interleave: column i E + e of (out, r E) is
column i of expert e. PEFT wraps the module that holds the weights once for each adapted weight, the one that comes first
innermost, so its tensors are called after the module, with `.base_layer` for each wrapper around: with both weights adapted
`gate_up_proj` is at `experts.base_layer` and `down_proj` at `experts`. vLLM and SGLang read the same names (docs/train.md).

Frozen products, low-rank products and their gradients are of rows sorted by expert, as in `quant/experts.py`: on CUDA each is a
kernel for all experts, else they go expert by expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lownibble.kernels import ops
from lownibble.kernels.types import Epilogue, Stack
from lownibble.lora.layer import LoraLinear, LowRank, TrainedCopy, inside
from lownibble.lora.product import Rounded
from lownibble.lora.variants import Variant
from lownibble.models import experts
from lownibble.quant.experts import (
    DenseExperts,
    Ends,
    Product,
    QuantExperts,
    Weights,
    at_once,
    empty_rows,
    expert_product,
    products,
    save_weights,
    saved_weights,
)


def _adapted(x: Tensor, stack: Stack, ends: Ends, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The formula above and x A^T, by kernels for all experts."""
    low = ops.matmul_experts(x, A, ends.on_device)
    return ops.matmul_experts(x, stack, ends.on_device, False, Epilogue(None, low, B.transpose(1, 2), scale)), low


class _LoraExperts(torch.autograd.Function):
    """The formula above for frozen weights: x (S, in), rows sorted by expert -> (S, out); saves x, x A^T and packed tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Weights, ends: Ends, lora_A: Tensor, lora_B: Tensor, scale: float,
        code_type: torch.dtype | None, rounded: Rounded,
    ) -> Tensor:  # fmt: skip
        (A, B), x = rounded or (lora_A, lora_B), x.contiguous()
        stack = at_once(x, weights, code_type)
        if stack is not None:
            y, low = _adapted(x, stack, ends, A, B, scale)
        else:
            y, low = empty_rows(x, B.shape[1], ends), x.new_empty(len(x), A.shape[1])
            for expert, rows in ends.segments():
                low[rows] = ops.low_rank(x[rows], A[expert].t())
                epilogue = Epilogue(None, low[rows], B[expert].t(), scale)
                y[rows] = expert_product(x[rows], weights[expert], False, epilogue, code_type)
        save_weights(ctx, weights, x, A, B, low)
        ctx.rest = ends, scale, code_type
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, A, B, low, *tensors = ctx.saved_tensors
        weights, (ends, scale, code_type) = saved_weights(ctx, tensors), ctx.rest
        dy, wants_dx = dy.contiguous(), ctx.needs_input_grad[0]
        with ops.keeping(ctx.backend):
            stack = at_once(dy, weights, code_type)
            if stack is None:
                dx, dA, dB = _backward_by_expert(dy, x, weights, ends, A, B, low, scale, code_type, wants_dx)
            else:
                kind, dlow = torch.promote_types(A.dtype, torch.float32), ops.matmul_experts(dy, B, ends.on_device, True)
                dA = ops.outer_experts(dlow, x, ends.on_device, scale, kind)
                dB = ops.outer_experts(dy, low, ends.on_device, scale, kind)
                epilogue = Epilogue(None, dlow, A, scale)
                dx = ops.matmul_experts(dy, stack, ends.on_device, True, epilogue) if wants_dx else None
        return dx, None, None, dA, dB, None, None, None


def _backward_by_expert(
    dy: Tensor, x: Tensor, weights: Weights, ends: Ends, A: Tensor, B: Tensor, low: Tensor, scale: float,
    code_type: torch.dtype | None, wants_dx: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    kind = torch.promote_types(A.dtype, torch.float32)
    dA, dB = A.new_zeros(A.shape, dtype=kind), B.new_zeros(B.shape, dtype=kind)
    dx = empty_rows(x, x.shape[1], ends) if wants_dx else None
    for expert, rows in ends.segments():
        dlow, dA[expert], dB[expert] = ops.low_rank_backward(dy[rows], x[rows], low[rows], B[expert], scale)
        if dx is not None:
            epilogue = Epilogue(low=dlow, factor=A[expert])
            dx[rows] = expert_product(dy[rows], weights[expert], True, epilogue, code_type)
    return dx, dA, dB


def low_rank_of_experts(x_SK: Tensor, ends: Ends, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale (x A_e^T) B_e^T, (S, out), for x (S, in) with rows sorted by expert; no gradient. A (E, r, in), B (E, out, r)."""
    y = empty_rows(x_SK, B.shape[1], ends)
    for expert, rows in ends.segments():
        low = x_SK[rows] @ A[expert].to(x_SK.dtype).t()
        torch.mm(low.mul_(scale), B[expert].to(x_SK.dtype).t(), out=y[rows])
    return y


class ExpertsLoRA(Variant):
    """A low-rank update for each of E experts."""

    keys: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts

    def shapes(self, n_in: int, n_out: int, r: int) -> dict[str, tuple[int, ...]]:
        """A (E, r, in) and B (E, out, r)."""
        return {"lora_A": (self.n_experts, r, n_in), "lora_B": (self.n_experts, n_out, r)}

    def forward(self, base: Any, adapter: LowRank, x: Tensor, dropout: float) -> Tensor:
        """Not by this: `LoraExperts` knows the experts' rows."""
        raise NotImplementedError

    def merge(self, weight: Tensor, parameters: Mapping[str, Tensor], scale: float) -> Tensor:
        """(E, out, in) plus scale B A."""
        return weight.baddbmm_(parameters["lora_B"], parameters["lora_A"], alpha=scale)

    def to_file(self, name: str, tensor: Tensor) -> Tensor:
        """PEFT's layout: A (E r, in), B (out, r E)."""
        if name == "lora_A":
            return tensor.flatten(0, 1)
        return tensor.permute(1, 2, 0).flatten(1)

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        """From PEFT's layout."""
        if name == "lora_A":
            return tensor.view(self.n_experts, -1, tensor.shape[1])
        return tensor.view(len(tensor), -1, self.n_experts).permute(2, 0, 1)


class LoraExperts(LoraLinear):
    """The experts' linear layers (`DenseExperts` or `QuantExperts`), frozen, with named adapters, at most one active."""

    def __init__(self, base: DenseExperts | QuantExperts) -> None:
        super().__init__(base)  # type: ignore[arg-type]

    def forward(self, x_SK: Tensor, ends: Ends) -> Tensor:  # type: ignore[override]
        """x (S, in), rows sorted by expert -> (S, out)."""
        if self.active is None:
            base: Tensor = self.base(x_SK, ends)
            return base
        adapter, code_type = self.adapter(self.active), getattr(self.base, "code_type", None)
        if not torch.is_grad_enabled():
            A, B = adapter.rounded or (adapter.lora_A, adapter.lora_B)
            weights: Any = self.weight
            stack = at_once(x_SK, weights, code_type)
            if stack is not None:
                return _adapted(x_SK.contiguous(), stack, ends, A, B, adapter.scale)[0]
            return products(x_SK, weights, ends, code_type).add_(low_rank_of_experts(x_SK, ends, A, B, adapter.scale))
        y: Tensor = _LoraExperts.apply(
            x_SK, self.weight, ends, adapter.lora_A, adapter.lora_B, adapter.scale, code_type, adapter.rounded
        )
        return y

    def product(self) -> Product:
        """What it computes with."""
        base: Product = self.base.product()  # type: ignore[operator]
        if self.active is None:
            return base
        adapter = self.adapter(self.active)
        return base._replace(adapter=(adapter.lora_A, adapter.lora_B), rounded=adapter.rounded, scale=adapter.scale)


LINEAR, EXPERTS = "linear layers", "weights of experts"


def adapted_layers(model: nn.Module) -> dict[str, int]:
    """Kind -> how many layers have the active adapter: linear layers, and weights of a mixture's experts."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear) and module.active is not None]
    of_experts = sum(isinstance(layer, LoraExperts) for layer in layers)
    return {LINEAR: len(layers) - of_experts, EXPERTS: of_experts}


def named_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> the module of every mixture's experts' weights: adapted, packed, or one around a dense parameter."""
    found: dict[str, nn.Module] = {}
    for path, held in experts.expert_weights(model).items():
        if inside(path, model, TrainedCopy):
            continue  # trained in full
        if isinstance(held, nn.Parameter):
            container: Any = model.get_submodule(path.rpartition(".")[0])
            held = DenseExperts(held, container.is_transposed)
        found[path] = held
    return found


def copied_weights(model: nn.Module) -> list[str]:
    """Paths, in the model without adapters, of the experts' weights in modules that an adapter trains in full."""
    inner = [path for path in experts.expert_weights(model) if inside(path, model, TrainedCopy)]
    return [path.replace(".original.", ".", 1) for path in inner if ".original." in path]


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of a mixture's experts."""
    return isinstance(module, (LoraExperts, QuantExperts, DenseExperts))


def variant_for(module: nn.Module, plain: Variant) -> Variant:
    """The variant of an adapter on a module: `plain` for linear layers."""
    inner = module.base if isinstance(module, LoraExperts) else module
    return ExpertsLoRA(inner.n_experts) if isinstance(inner, (QuantExperts, DenseExperts)) else plain


def file_paths(paths: Iterable[str], of_experts: Iterable[str]) -> dict[str, str]:
    """Path of each adapted layer -> its path in PEFT's files; `of_experts`: those of experts' weights."""
    adapted: dict[str, list[str]] = {}
    for path in of_experts:
        container, _, name = path.rpartition(".")
        adapted.setdefault(container, []).append(name)
    found = {path: path for path in paths}
    for container, names in adapted.items():
        outermost_first = sorted(names, key=experts.WEIGHTS.index, reverse=True)
        found |= {f"{container}.{name}": container + depth * ".base_layer" for depth, name in enumerate(outermost_first)}
    return found
