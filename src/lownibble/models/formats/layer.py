"""A quantised layer of a checkpoint, whatever the format."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import ConfigError, ModelError, QuantizationError
from lownibble.models.checkpoint import Checkpoint
from lownibble.quant import PackedWeight, layouts
from lownibble.quant.codebook import e8m0
from lownibble.quant.codecs.grouped import of_groups
from lownibble.quant.packed import PackedExperts
from lownibble.registry import CODECS


class Layer(ABC):
    """The weight of one layer.

    Attributes:
        name: of the dense tensor that it stands for: 'model.layers.0.mlp.up_proj.weight', 'model.layers.0.mlp.experts.down_proj'.
        keys: names of the stored tensors.
        quant_type: the codec that holds its numbers unchanged, or None.
        group: (K,) the group of each column, or None: it is that of the column's place.
    """

    name: str
    keys: tuple[str, ...]
    quant_type: str | None
    group: Tensor | None = None

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """The shape of the weight."""

    @property
    @abstractmethod
    def options(self) -> QuantConfig:
        """How the codec holds it; only with a `quant_type`."""

    @abstractmethod
    def packed(self, dtype: torch.dtype) -> PackedWeight:
        """The weight in its codec, which decodes to `dtype`; only with a `quant_type`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The decoded weight, float32."""


@dataclass
class Found:
    """The quantised layers of a checkpoint.

    Attributes:
        layers: by the name of their weight.
        unused: stored tensors that loading has no use for: scales of quantised activations and caches.
        title: the format in words, or '' for bitsandbytes' 4 bits and our own.
    """

    layers: dict[str, Layer]
    unused: set[str] = field(default_factory=set)
    title: str = ""


Finder = Callable[[Checkpoint, Mapping[str, Any]], Found]


class Numbers(NamedTuple):
    """A weight as `scale * (codes - zero)`, each group of columns with its own scale and zero.

    Attributes:
        codes: (N, K) of any type. scale: (N, G); in uint8 exponents of two, plus 127. zero: (N, G) or None.
        group: (K,) the group of each column, or None: G groups of neighbours, all but the last of the same size.
        levels: what each code stands for, float32; None: its number.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group: Tensor | None = None
    levels: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight, float32."""
        n_in, n_groups = self.codes.shape[1], self.scale.shape[1]
        group = torch.arange(n_in) // -(-n_in // n_groups) if self.group is None else self.group.long()
        codes = self.codes.float() if self.levels is None else self.levels[self.codes.long()]
        scale = exponents(self.scale)
        if self.zero is not None:
            codes -= self.zero.float()[:, group]
        return codes.mul_(scale[:, group])


def exponents(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents of two, plus 127."""
    return e8m0()[scale.long()] if scale.dtype == torch.uint8 else scale.float()


class StoredLayer(Layer):
    """A layer of another tool's format.

    Args:
        name, parts: of the weight, and of its stored tensors by their roles.
        shape: of the weight.
        options: how a codec holds it, or None if none does.
        read: reads the numbers, or, if they are of no such form, the weight.
        group: see `Layer`.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, str],
        shape: Iterable[int],
        options: QuantConfig | None,
        read: Callable[[], Numbers | Tensor],
        group: Tensor | None = None,
    ) -> None:
        self.name, self.keys, self._shape, self._options, self._read = (
            name,
            tuple(parts.values()),
            torch.Size(shape),
            options,
            read,
        )
        self.quant_type, self.group = options.quant_type if options is not None else None, group

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self._shape

    @cached_property
    def options(self) -> QuantConfig:
        """How the codec holds it."""
        assert self._options is not None
        return self._options

    def packed(self, dtype: torch.dtype) -> PackedWeight:
        """The weight in its codec."""
        numbers, order = self._read(), None
        assert isinstance(numbers, Numbers)
        codes = numbers.codes
        if layouts.GROUPED[self.options.quant_type].act_order:
            assert numbers.group is not None
            order = numbers.group.argsort(stable=True)
            codes = codes[:, order]
        return of_groups(codes, numbers.scale, numbers.zero, order, dtype, self.options)

    def dense(self) -> Tensor:
        """The decoded weight."""
        found = self._read()
        return found.dense() if isinstance(found, Numbers) else found


class Experts(Layer):
    """The weights of a mixture's experts that are held packed, each read on its own.

    Args:
        name, keys: of the model's parameter, and of the stored tensors.
        shape: (E, N, K) of the packed weights.
        options: how a codec holds each.
        read: expert, dtype -> its packed weight (N, K), which decodes to `dtype`.
        turned: whether the parameter that the checkpoint stands for is (E, K, N).
    """

    def __init__(
        self, name: str, keys: Iterable[str], shape: Iterable[int], options: QuantConfig,
        read: Callable[[int, torch.dtype], PackedWeight], turned: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.keys, self.quant_type = name, tuple(keys), options.quant_type
        self._shape, self._options, self._read, self.turned = torch.Size(shape), options, read, turned

    @property
    def shape(self) -> torch.Size:
        """The shape of the model's parameter."""
        n_experts, rows, columns = self._shape
        return torch.Size((n_experts, columns, rows)) if self.turned else self._shape

    @property
    def options(self) -> QuantConfig:
        """How the codec holds each expert."""
        return self._options

    def packed(self, dtype: torch.dtype) -> PackedExperts:
        """The weights (E, N, K) in their codec."""
        n_experts = self._shape[0]
        return PackedExperts.of((self._read(expert, dtype) for expert in range(n_experts)), n_experts)

    def dense(self) -> Tensor:
        """The decoded parameter."""
        weights = self.packed(torch.float32).dequantize(torch.float32)
        return weights.transpose(1, 2).contiguous() if self.turned else weights


def stacked(name: str, experts: Sequence[Sequence[Layer]]) -> Experts | None:
    """Layers that are stored expert by expert as the packed weights of a mixture, without decoding; None if no codec holds them
    together.

    Args:
        name: of the model's parameter (E, N, K).
        experts: of each expert the layers whose rows, one below the other, are its weight.
    """
    layers, first = [layer for parts in experts for layer in parts], experts[0]
    kinds = {layer.quant_type for layer in layers}
    if len(kinds) != 1 or None in kinds or any(layer.options != first[0].options for layer in layers[1:]):
        return None
    shapes = [layer.shape for layer in first]
    if len({shape[1] for shape in shapes}) != 1 or any([layer.shape for layer in parts] != shapes for parts in experts):
        return None
    if any(not _grouped_alike(layer, parts[0]) for parts in experts for layer in parts):
        return None
    codec = CODECS[first[0].options.quant_type]
    how = first[0].options if len(first) == 1 else codec.below(first[0].options, shapes)
    if how is None:
        return None

    def read(expert: int, dtype: torch.dtype) -> PackedWeight:
        one: list[PackedWeight] = [layer.packed(dtype) for layer in experts[expert]]
        return codec.join(one) if len(one) > 1 else one[0]

    size = (len(experts), sum(shape[0] for shape in shapes), shapes[0][1])
    return Experts(name, (key for layer in layers for key in layer.keys), size, how, read)


def _grouped_alike(one: Layer, other: Layer) -> bool:
    if one.group is None or other.group is None:
        return one.group is other.group
    return torch.equal(one.group, other.group)


def codec(quant_type: str, shape: Iterable[int], group: int, said: int | None) -> QuantConfig | None:
    """How a codec holds groups of `group` columns, or None if it does not. A group that is a row is called so, unless config.json
    says (`said`) that groups are of that size."""
    shape = tuple(shape)
    size = "row" if group >= shape[-1] and group != said else group
    if size != "row" and size not in layouts.GROUP_SIZES:
        return None
    config = QuantConfig(quant_type=quant_type, block_size=size, double_quant=False)
    try:
        layouts.layout(shape, config)
    except (ConfigError, QuantizationError):
        return None
    return config


def by_path(keys: Iterable[str], roles: Iterable[str]) -> dict[str, dict[str, str]]:
    """Path -> role -> name, for the stored tensors called PATH.ROLE."""
    wanted, found = set(roles), dict[str, dict[str, str]]()
    for key in keys:
        path, _, role = key.rpartition(".")
        if role in wanted:
            found.setdefault(path, {})[role] = key
    return found


_OF_ACTIVATIONS = re.compile(
    r"(?:^|[._])(?:(?:input|output|activation)_(?:scale|scale_ub|global_scale|zero_point)|[qkv]_(?:scale|zero_point))$"
)


def of_activations(keys: Iterable[str]) -> set[str]:
    """The stored scales and zero points of quantised activations and caches, which training does not quantise."""
    return {key for key in keys if _OF_ACTIVATIONS.search(key)}


def need(parts: Mapping[str, str], roles: Iterable[str], path: str, name: str) -> None:
    """Raise ModelError if a layer lacks one of the tensors."""
    missing = [role for role in roles if role not in parts]
    if missing:
        raise ModelError(f"'{name}': the quantised layer '{path}' lacks its {', '.join(missing)}. Download the checkpoint again.")


def wrong(path: str, name: str, why: str) -> ModelError:
    """The error for a layer whose tensors do not fit together."""
    return ModelError(f"'{name}': the quantised layer '{path}' cannot be read: {why}. Download the checkpoint again.")
