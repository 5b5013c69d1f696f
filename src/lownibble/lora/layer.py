"""LoraLinear: a linear layer with named adapters. The adapter's variant (`variants.py`) defines the computation.

Composition (a frozen base module and adapters by name) was chosen over a subclass per codec: a new codec only has to follow
`quant/packed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lownibble.lora.targets import scaling
from lownibble.lora.variants import LORA, Variant
from lownibble.models.experts import is_container
from lownibble.quant import PackedWeight, QuantLinear, matrix
from lownibble.quant.experts import DenseExperts
from lownibble.quant.linear import with_data


class LowRank(nn.Module):
    """One adapter of one layer: its variant's parameters, float32, initially zero: `lora_A` (r, in), `lora_B` (out, r), ...

    Attributes:
        output_changes: the model changes the layer's output in place, so backward must not read it (`Variant.keeps_output`).
        rounded: A and B in the dtype of the activations, during a pass for which they were rounded at once (`RoundedAdapters`).
    """

    lora_A: nn.Parameter  # noqa: N815 - PEFT's names
    lora_B: nn.Parameter  # noqa: N815
    magnitude: nn.Parameter  # DoRA's, as `row_squares`
    row_squares: Tensor
    start_A: Tensor  # noqa: N815
    start_B: Tensor  # noqa: N815

    def __init__(
        self, variant: Variant, in_features: int, out_features: int, r: int, scale: float, dropout: float, device: torch.device
    ) -> None:
        super().__init__()
        self.variant, self.r, self.scale, self.dropout = variant, r, scale, dropout
        self.output_changes = False
        self.rounded: list[Tensor] = []
        for name, shape in variant.shapes(in_features, out_features, r).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))

    def keep_start(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Keep copies of A and B at the start, which the initialisation took out of the base."""
        device = self.lora_A.device
        self.register_buffer("start_A", lora_A.detach().to(device, copy=True), persistent=False)
        self.register_buffer("start_B", lora_B.detach().to(device, copy=True), persistent=False)

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """A and B at the start, if they were taken out of the base."""
        return (self.start_A, self.start_B) if "start_A" in self._buffers else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        # Master weights and norms stay float32 when the model is cast; moves between devices pass through.
        for name, parameter in list(self.named_parameters(recurse=False)):
            moved = fn(parameter.data)
            as_it_is = moved.dtype == parameter.dtype
            setattr(self, name, with_data(parameter, moved if as_it_is else parameter.data.to(moved.device)))
        for name, buffer in self.named_buffers(recurse=False):
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}"


class RoundedAdapters:
    """16-bit copies of a model's trained matrices, made anew by a few kernels for each training pass; without them each layer
    rounds its own, in forward and in backward: 900 launches a step of 8B shapes on a GPU."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, LowRank) and m.lora_A.requires_grad]
        self._masters: list[Tensor] = [p for layer in self._layers for p in (layer.lora_A, layer.lora_B)]
        self._copies = [torch.empty_like(master, dtype=dtype, requires_grad=False) for master in self._masters]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block layers compute with copies of what their matrices are at its beginning."""
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._masters)
        for index, layer in enumerate(self._layers):
            layer.rounded = self._copies[2 * index : 2 * index + 2]
        try:
            yield
        finally:
            for layer in self._layers:
                layer.rounded = []


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(out, in) features of a linear layer, or of each expert's, dense or packed."""
    held = isinstance(linear, (QuantLinear, DenseExperts))
    n_out, n_in = (linear.weight if held else matrix(linear)).shape[-2:]  # type: ignore[index, union-attr]
    return int(n_out), int(n_in)


class LoraLinear(nn.Module):
    """A frozen linear layer (`nn.Linear` or `QuantLinear`) with named low-rank adapters, at most one active."""

    def __init__(self, base: nn.Linear | QuantLinear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.changed_base = False
        self.out_features, self.in_features = sizes(base)

    def add(self, name: str, r: int, alpha: float, dropout: float, use_rslora: bool, variant: Variant = LORA) -> LowRank:
        """Add the adapter `name`, all zeros, and make it the active one."""
        scale, device = scaling(r, alpha, use_rslora), self.base.weight.device
        self.adapters[name] = LowRank(variant, self.in_features, self.out_features, r, scale, dropout, device)
        self.active = name
        return self.adapter(name)

    def adapter(self, name: str) -> LowRank:
        """The adapter `name`."""
        adapter = self.adapters[name]
        assert isinstance(adapter, LowRank)
        return adapter

    @property
    def weight(self) -> Tensor | PackedWeight:
        """The base's weight, (out_features, in_features)."""
        return self.base.weight if isinstance(self.base, (QuantLinear, DenseExperts)) else matrix(self.base)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    @property
    def keeps_output(self) -> bool:
        """Whether backward reads the layer's output, which then must not be changed in place."""
        adapter = None if self.active is None else self.adapter(self.active)
        return adapter is not None and adapter.variant.keeps_output and not adapter.output_changes

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        if self.active is None:
            base: Tensor = self.base(x)
            return base
        adapter = self.adapter(self.active)
        return adapter.variant.forward(self.base, adapter, x, adapter.dropout if self.training else 0.0)


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

    def __getattr__(self, name: str) -> Any:
        """The current module's, of what is not the wrapper's own: an embedding's `padding_idx`, a method that a model calls."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "active" not in self.__dict__ or is_container(self.original):  # being made; experts are found by their attributes
                raise
        found = getattr(self.current, name)
        return partial(self._call, found) if getattr(found, "__self__", None) is self.current else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The current module's output, in the original's dtype; a float32 copy computes in float32."""
        return self._call(self.current, *args, **kwargs)

    def _call(self, of_current: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.active is None:
            return of_current(*args, **kwargs)
        master, outside = (next(m.parameters()).dtype for m in (self.current, self.original))
        kwargs = {key: _cast(value, master) for key, value in kwargs.items()}
        return _cast(of_current(*(_cast(a, master) for a in args), **kwargs), outside)


def inside(path: str, model: nn.Module, kinds: type | tuple[type, ...]) -> bool:
    """Whether the module or parameter at `path` is part of a module of these kinds."""
    parents = path.split(".")[:-1]
    return any(isinstance(model.get_submodule(".".join(parents[:depth])), kinds) for depth in range(1, len(parents) + 1))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors, also inside tuples, to `dtype`; return anything else unchanged."""
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
