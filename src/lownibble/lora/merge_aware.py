"""Merge-aware training: a layer computes with the packed weight that merging its adapter will write.

    E = pack(decode(W8) + scale B A)        y = x E^T + bias        dx = dy E
    dB = scale dy^T (x A^T)                 dA = (scale dy B)^T x   straight through the rounding: LoRA's own gradients

Plain QLoRA trains decode(W4) + scale B A; packed again, a delta smaller than a rounding step is lost. Here the rounding is part
of the forward pass, so the adapter learns which weights to push over a rounding boundary, and the merged model has the codes that
were trained. W must be finer than the grid: a sum with weights on the grid rounds back to them. So the base is held as int8
(`HELD`) in training, and leaves in the codec of the quant options (ADR 29).

E is packed once for each value of A and B and kept: for all microbatches of a step, backward, and evaluation. A layer then holds
W8 and E, 8 bits a weight more than plain QLoRA. Packing anew in backward would save E's 4 bits for a second packing. Version
counters tell that A or B changed; whatever writes them out of autograd's sight must count
(`torch.autograd.graph.increment_version`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lownibble.config import PER_LAYER, LoraConfig, QuantConfig
from lownibble.errors import TargetError
from lownibble.kernels import ops
from lownibble.kernels.types import Epilogue
from lownibble.lora.held import held
from lownibble.lora.variants import LORA, Variant
from lownibble.models.info import info
from lownibble.models.load import quantizable, repacked
from lownibble.quant import PackedWeight, QuantLinear, is_transposed, matrix_shape
from lownibble.quant.linear import frozen_linear
from lownibble.quant.packed import restore
from lownibble.quant.sums import pack_sum

if TYPE_CHECKING:
    from lownibble.lora.layer import LowRank


def held_as(model: nn.Module, quant: QuantConfig, adapted: Collection[str]) -> QuantConfig:
    """The configuration to load `model` with for merge-aware training.

    Layers that an adapter will round are held as `HELD`; packed layers without adapter are packed as they leave, as `quant` says.

    Args:
        model: the dense model, on any device (also meta). quant: how the merged model will be packed.
        adapted: paths of the layers that get adapters; those that `quant` leaves dense are plain LoRA, and merged dense.
    Raises:
        ConfigError: no adapted layer is packed, or one leaves in no fewer bits than it is held in.
        TargetError: a packed layer is a Conv1D, which no packed checkpoint holds.
    """
    leaves = quantizable(model, quant)
    rounded = sorted(repacked(model, leaves) & set(adapted))
    for path in rounded:
        if is_transposed(model.get_submodule(path)):
            raise TargetError(f"'{path}' is a Conv1D, which no packed checkpoint holds. Train without --merge-aware.")
    shapes = {path: matrix_shape(model.get_submodule(path)) for path in leaves}
    return QuantConfig.of_layers(held(leaves, shapes, rounded), quant.skip_modules).with_options(compute=quant.compute)


def check_adapter(config: LoraConfig, variant: Variant) -> None:
    """Check that an adapter can be trained merge-aware.

    Raises:
        TargetError: it is more than a low-rank sum, or has dropout.
    """
    if not variant.plain:
        raise TargetError("Merge-aware training is for plain LoRA, and this adapter is more. Train it without --merge-aware.")
    if config.lora_dropout:
        raise TargetError(
            "Merge-aware training has one weight for the base and its adapter, whose input can have no dropout of its own. Got "
            f"lora_dropout = {config.lora_dropout:g}. Set lora_dropout=0."
        )


def variants(
    model: nn.Module, config: LoraConfig, plain: Variant, layers: Mapping[str, nn.Module]
) -> dict[str, Variant]:  # fmt: skip
    """Path -> variant of a new adapter's layers: `plain`, or on a model prepared for merge-aware training, one for each packed
    layer that merging packs.

    Raises:
        TargetError: as `check_adapter`.
    """
    leaves = info(model).merge_aware
    if leaves is None:
        return dict.fromkeys(layers, plain)
    check_adapter(config, plain)
    packed = [path for path, layer in layers.items() if isinstance(getattr(layer, "base", layer), QuantLinear)]
    rounded = repacked(model, packed)
    return {path: MergeAware(leaves.for_layer(path)) if path in rounded else plain for path in layers}


def facts_of(quant: QuantConfig) -> dict[str, Any]:
    """How the merged model is packed, for an adapter's file."""
    own = {key: getattr(quant, key) for key in PER_LAYER}
    return own | ({"pattern": {key: own | options for key, options in quant.pattern.items()}} if quant.pattern else {})


class _StraightThrough(torch.autograd.Function):
    """y = x E^T + bias for x (T, K), with LoRA's gradients for A and B; saves x, x A^T and E's packed tensors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, weight: PackedWeight, scale: float
    ) -> Tensor:
        x, tensors = x.contiguous(), weight.tensors()
        low = ops.low_rank(x, lora_A.t())
        ctx.save_for_backward(x, lora_A, lora_B, low, *tensors.values())
        ctx.rest = weight.facts(), tuple(tensors), scale
        ctx.backend = ops.chosen()
        return weight.matmul(x, epilogue=Epilogue(None if bias is None else bias.to(x.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, _, lora_B, low, *tensors = ctx.saved_tensors
        facts, names, scale = ctx.rest
        dy = dy.contiguous()
        with ops.keeping(ctx.backend):
            _, dA, dB = ops.low_rank_backward(dy, x, low, lora_B, scale)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = restore(facts, dict(zip(names, tensors, strict=True))).matmul(dy, transposed=True)
        return dx, dA, dB, dy.sum(0) if ctx.needs_input_grad[3] else None, None, None


@torch.no_grad()
def _copy(packed: PackedWeight, into: PackedWeight) -> None:
    """Write a packed weight's tensors into those of another of the same codec and shape."""
    for new, old in zip(packed.tensors().values(), into.tensors().values(), strict=True):
        old.copy_(new)


class MergeAware(Variant):
    """LoRA on one packed layer, computed with the weight packed as `leaves` says. Files have LoRA's keys.

    Attributes:
        leaves: the codec of the merged layer.
        packed: the weight of the last forward pass, or None.
    """

    keys = LORA.keys

    def __init__(self, leaves: QuantConfig) -> None:
        self.leaves = leaves
        self.packed: PackedWeight | None = None
        self._base: PackedWeight | None = None
        self._state: tuple[Any, ...] = ()

    def shapes(self, n_in: int, n_out: int, r: int) -> dict[str, tuple[int, ...]]:
        """As LoRA's."""
        return LORA.shapes(n_in, n_out, r)

    def weight(self, base: QuantLinear, adapter: LowRank) -> PackedWeight:
        """The packed sum (out, in); packed anew if A, B, the base or the kernels are others than last time."""
        A, B, held = adapter.lora_A, adapter.lora_B, base.weight
        state = (A._version, B._version, A.data_ptr(), B.data_ptr(), ops.active_backend(A.device))
        if self.packed is None or self._base is not held or self._state != state:
            with torch.inference_mode(False):  # training cannot save an inference tensor left by generation
                packed = pack_sum(held, A, B, adapter.scale, self.leaves)
                if self.packed is None or self._base is not held or self._state[2:] != state[2:]:
                    self.packed = packed
                else:  # A and B were changed in place, so that no graph can need the old one: in its memory, as new blocks at
                    _copy(packed, self.packed)  # every step would fragment the heap
            self._base, self._state = held, state
        return self.packed

    def forward(self, base: nn.Linear | QuantLinear, adapter: LowRank, x: Tensor, dropout: float) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        assert isinstance(base, QuantLinear)
        assert not dropout
        weight = self.weight(base, adapter)
        if not torch.is_grad_enabled():
            return frozen_linear(x, weight, base.bias, None)
        y: Tensor = _StraightThrough.apply(
            x.reshape(-1, x.shape[-1]), adapter.lora_A, adapter.lora_B, base.bias, weight, adapter.scale
        )
        return y.view(*x.shape[:-1], -1)

    def merge(self, weight: Tensor, parameters: Any, scale: float) -> Tensor:
        """The sum before it is packed."""
        return LORA.merge(weight, parameters, scale)
