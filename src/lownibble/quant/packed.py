"""The protocol of packed weights: what a codec makes, and all that the rest of the package asks of it.

A `Codec` packs a dense tensor; a `PackedWeight` is what it becomes: some tensors by name and some facts. With no more than
`tensors`, `facts` and `decode` it loads, trains under an adapter, resumes, merges, plans, serves: products decode it into a
buffer that all layers share, and multiply. A codec with kernels of its own overrides `matmul` and `matvec`.

The value is apart from the module that holds it (`linear.py`): modules keep the tensors as parameters without gradient, so that
state_dict, `.to()`, safetensors and sharding (FSDP2) take them as they are, and make the value anew when they compute.
`restore` is how: facts and tensors back to a weight.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import ModelError
from lownibble.kernels import decoded
from lownibble.kernels.types import NO_EPILOGUE, Epilogue, FourBit
from lownibble.quant import layouts
from lownibble.quant.layouts import Layout, TensorSpec
from lownibble.registry import CODECS

_DTYPES = {name: getattr(torch, name) for name in layouts.ITEMSIZE}


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' of torch.float32."""
    return str(dtype).removeprefix("torch.")


class PackedWeight(ABC):
    """A weight (N, K) in fewer bits. A codec's own class derives from this.

    Attributes:
        shape: of the weight that it stands for. dtype: what it decodes to where nothing else is asked for.
    """

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, the codes first, each of at least one dimension; those of its codec's `layout`."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """All that is needed besides the tensors, ready for JSON: 'quant_type', 'shape', 'dtype', and what the codec needs."""

    @abstractmethod
    def decode(self, out: Tensor) -> Tensor:
        """Write the values into `out` (contiguous, of `shape`, float32/bfloat16/float16), and return it."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def constant_nbytes(self) -> int:
        """Bytes of the constants alone."""
        _, *constants = self.tensors().values()
        return sum(tensor.nbytes for tensor in constants)

    @property
    def four_bit(self) -> FourBit | None:
        """The weight as the 4-bit kernels take it, where it is of that form: they have 8-bit products and token steps."""
        return None

    def numel(self) -> int:
        """Elements of the weight that it stands for."""
        return math.prod(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The values, in `dtype` (default: the original one), of `shape`; written into `out` when given."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        return self.decode(out)

    def matmul(self, x_TC: Tensor, *, transposed: bool = False, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
        """`x_TC @ W.T` with W (N, K), or `x_TC @ W` when transposed, plus `epilogue`, in x's dtype; no gradient."""
        return decoded.matmul(self.decode, self.shape, x_TC.contiguous(), transposed, epilogue)

    def matvec(self, x_TK: Tensor) -> Tensor:
        """`x_TK @ W.T` for a few rows, (T, N) in x's dtype; no gradient."""
        return self.matmul(x_TK)

    def with_dtype(self, dtype: torch.dtype) -> PackedWeight:
        """The same, decoding to another type by default."""
        return restore({**self.facts(), "dtype": dtype_name(dtype)}, self.tensors())

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same on another device."""
        return restore(self.facts(), {name: tensor.to(device) for name, tensor in self.tensors().items()})


class Codec(ABC):
    """A way of packing weights; an object in `registry.CODECS` under the `quant_type` that chooses it.

    The file format of packed layers, `write` and `read`, is this class's unless a codec has one of its own: for a layer at PATH
    the codes are `PATH.weight`, constants `PATH.weight.NAME`, and the facts JSON in a uint8 tensor
    `PATH.weight.packed.QUANT_TYPE`.
    """

    marker: ClassVar[str] = ".weight.packed."
    """What stands between path and quant_type in the name of the tensor that tells a packed layer in a file."""

    @abstractmethod
    def layout(self, shape: Sequence[int], config: QuantConfig) -> Layout:
        """The tensors of a packed weight of `shape`, without torch: the planner asks.

        Raises:
            ConfigError, QuantizationError: an option or the shape does not suit; says what would do.
        """

    @abstractmethod
    def quantize(self, tensor: Tensor, config: QuantConfig, statistics: Tensor | None = None) -> PackedWeight:
        """Pack a finite tensor (N, K).

        Args:
            config: the codec's options; those it does not know it may ignore only if they are for other codecs.
            statistics: (K,) second moments of the layer's inputs, where a calibration pass gave them.
        """

    @abstractmethod
    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedWeight:
        """The weight that `facts` and `tensors` are of."""

    def options(self, facts: Mapping[str, Any]) -> QuantConfig:
        """The configuration that packs like the weight with these facts."""
        known = {key: facts[key] for key in ("quant_type", "block_size", "double_quant") if key in facts}
        return QuantConfig(**known)

    def write(self, path: str, weight: PackedWeight) -> dict[str, Tensor]:
        """What a file holds for the layer at `path`."""
        facts = weight.facts()
        text = json.dumps(facts, sort_keys=True).encode().ljust(_FACTS_BYTES)
        stored = {_key(path, i, name): tensor for i, (name, tensor) in enumerate(weight.tensors().items())}
        return {**stored, f"{path}{self.marker}{facts['quant_type']}": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    def written(self, path: str, shape: Sequence[int], config: QuantConfig) -> dict[str, TensorSpec]:
        """Type and shape of each tensor that `write` gives for a weight of `shape`."""
        found = {_key(path, i, name): spec for i, (name, spec) in enumerate(self.layout(shape, config).items())}
        return {**found, f"{path}{self.marker}{config.quant_type}": TensorSpec("uint8", (_FACTS_BYTES,))}

    def _facts(self, path: str, stored: Tensor, name: str) -> dict[str, Any]:
        try:
            facts = json.loads(bytes(stored.tolist()))
            torch.Size(facts["shape"])
            self.options(facts)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{name}: the facts of the packed weight '{path}' cannot be read ({error}). Download the checkpoint again."
            ) from None
        found: dict[str, Any] = facts
        return found

    def stored_options(self, path: str, stored: Tensor, name: str) -> QuantConfig:
        """How the layer at `path` is packed, from the tensor that tells.

        Raises:
            ModelError: it cannot be read.
        """
        return self.options(self._facts(path, stored, name))

    def read(self, path: str, parts: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> PackedWeight:
        """The weight of the layer at `path` from what `write` gave, by full names; `name` is how errors call the file.

        Raises:
            ModelError: a part is missing, damaged or of another shape.
        """
        key = next((key for key in parts if key.startswith(path + self.marker)), "")
        if not key:
            raise ModelError(f"{name}: the packed weight '{path}' lacks its facts. Download the checkpoint again.")
        facts = self._facts(path, parts[key], name)
        config, shape = self.options(facts), torch.Size(facts["shape"])
        found = {}
        for i, (part, (wanted, size)) in enumerate(self.layout(shape, config).items()):
            tensor = parts.get(_key(path, i, part))
            if tensor is None or tensor.dtype != _DTYPES[wanted] or tuple(tensor.shape) != size:
                got = "it is missing" if tensor is None else f"it is {dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
                raise ModelError(
                    f"{name}: '{_key(path, i, part)}' must be {wanted} {size}: {got}. Download the checkpoint again."
                )
            found[part] = tensor
        return self.restore({**facts, "dtype": dtype_name(dtype)}, found)


_FACTS_BYTES = 512


def _key(path: str, place: int, name: str) -> str:
    """What a file calls a tensor of a packed layer: the codes, which come first, as a dense layer's weight."""
    return f"{path}.weight.{name}" if place else f"{path}.weight"


def restore(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedWeight:
    """A packed weight from what its `facts()` and `tensors()` were."""
    weight: PackedWeight = CODECS[facts["quant_type"]].restore(facts, tensors)
    return weight


@cache
def _spec(text: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    facts, names = json.loads(text)
    return facts, tuple(names)


def to_spec(weight: PackedWeight) -> str:
    """Facts and names of the tensors as one text, for operators that a compiler can call, which take tensors and text alone."""
    return json.dumps([weight.facts(), list(weight.tensors())], sort_keys=True)


def from_spec(spec: str, tensors: Sequence[Tensor]) -> PackedWeight:
    """The weight from `to_spec` and its tensors in order."""
    facts, names = _spec(spec)
    return restore(facts, dict(zip(names, tensors, strict=True)))
