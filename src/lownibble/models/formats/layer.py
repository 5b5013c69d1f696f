"""A quantised layer of a checkpoint, whatever the format."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
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


class Layer(ABC):
    """The weight of one layer.

    Attributes:
        name: of the dense tensor that it stands for: 'model.layers.0.mlp.up_proj.weight', 'model.layers.0.mlp.experts.down_proj'.
        keys: names of the stored tensors.
        quant_type: the codec that holds its numbers unchanged, or None.
    """

    name: str
    keys: tuple[str, ...]
    quant_type: str | None

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
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, str],
        shape: Iterable[int],
        options: QuantConfig | None,
        read: Callable[[], Numbers | Tensor],
    ) -> None:
        self.name, self.keys, self._shape, self._options, self._read = (
            name,
            tuple(parts.values()),
            torch.Size(shape),
            options,
            read,
        )
        self.quant_type = options.quant_type if options is not None else None

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
