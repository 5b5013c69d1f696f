"""The protocol of packed weights: what a codec implements and the rest of the package relies on.

A `Codec` packs a dense tensor into a `PackedWeight`: named tensors and facts (metadata). `tensors`, `facts` and `decode` are
enough for loading, training under an adapter, resuming, merging, planning and serving: matmuls dequantise into a buffer shared by
all layers, then multiply. A codec with its own kernels overrides `matmul` and `matvec`.

The packed weight is separate from the module that holds it (`linear.py`): modules keep the tensors as parameters without
gradient, so that state_dict, `.to()`, safetensors and sharding (FSDP2) handle them unchanged, and rebuild the packed weight from
facts and tensors with `restore` when they compute.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lownibble import stored
from lownibble.config import QuantConfig
from lownibble.errors import ModelError, QuantizationError
from lownibble.kernels import decoded
from lownibble.kernels.types import NO_EPILOGUE, Epilogue, FourBit, Grouped
from lownibble.quant import layouts
from lownibble.quant.grid import Steps
from lownibble.quant.layouts import Layout, TensorSpec
from lownibble.registry import CODECS

MARKER = stored.MARKER
"""Between path and quant_type in the name of the tensor that marks a packed layer in the common file format."""

_DTYPES = {name: getattr(torch, name) for name in layouts.ITEMSIZE}


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype: 'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


class PackedWeight(ABC):
    """A packed weight (N, K); the base class of each codec's own.

    Attributes:
        shape: of the unpacked weight. dtype: default dtype to dequantise to.
    """

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name, as in the codec's `layout`: the codes first, each with at least one dimension."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Metadata, ready for JSON, that `restore` needs besides the tensors: 'quant_type', 'shape', 'dtype', and the codec's."""

    @abstractmethod
    def decode(self, out: Tensor) -> Tensor:
        """Dequantise into `out` (contiguous, of `shape`, float32/bfloat16/float16) and return it."""

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return next(iter(self.tensors().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def constant_nbytes(self) -> int:
        """Bytes of the quantisation constants (all tensors but the codes)."""
        _, *constants = self.tensors().values()
        return sum(tensor.nbytes for tensor in constants)

    @property
    def four_bit(self) -> FourBit | None:
        """The weight in the 4-bit kernels' format, or None; only these have 8-bit matmuls and compiled decoder layers."""
        return None

    @property
    def grouped(self) -> Grouped | None:
        """The weight in the format of the kernels of codes with one scale a group, or None."""
        return None

    def numel(self) -> int:
        """Elements of the unpacked weight."""
        return math.prod(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The dequantised values, of `shape`, in `dtype` (default: the original one); written into `out` if given."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        return self.decode(out)

    def matmul(self, x_TC: Tensor, *, transposed: bool = False, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
        """`x_TC @ W.T` with W (N, K), or `x_TC @ W` when transposed, plus `epilogue`, in x's dtype; no gradient."""
        return decoded.matmul(self.decode, self.shape, x_TC.contiguous(), transposed, epilogue)

    def matvec(self, x_TK: Tensor) -> Tensor:
        """`x_TK @ W.T` for a few rows, (T, N) in x's dtype; no gradient."""
        return self.matmul(x_TK)

    def steps(self) -> Steps:
        """The values that this weight can take with its scales as they are.

        Raises:
            QuantizationError: the codec does not say (see `grid.py`).
        """
        raise QuantizationError(
            f"The codec '{self.facts()['quant_type']}' has no grid to round to. Take another quant_type, or --method rtn."
        )

    def with_codes(self, codes_NK: Tensor) -> PackedWeight:
        """The weight with these codes (N, K), uint8 each, and the same scales; for codecs with `steps`."""
        raise NotImplementedError

    def with_dtype(self, dtype: torch.dtype) -> PackedWeight:
        """The same weight with another default dtype."""
        return restore({**self.facts(), "dtype": dtype_name(dtype)}, self.tensors())

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        return restore(self.facts(), {name: tensor.to(device) for name, tensor in self.tensors().items()})


class Codec(ABC):
    """A scheme for packing weights, registered in `registry.CODECS` under its `quant_type`.

    `write` and `read` are the common file format of packed layers (`write` and `read` of this file), which a codec may override
    for matrices; experts' weights have the common one with every codec.
    """

    marker: ClassVar[str] = MARKER
    """Separator of path and quant_type in the name of the tensor that marks a packed layer in a file; a format of the codec's own
    has another."""

    @abstractmethod
    def layout(self, shape: Sequence[int], config: QuantConfig) -> Layout:
        """The tensors of a packed weight of `shape`; without torch, since the planner calls it.

        Raises:
            ConfigError, QuantizationError: an option or the shape is not supported; says what is.
        """

    @abstractmethod
    def quantize(self, tensor: Tensor, config: QuantConfig, statistics: Tensor | None = None) -> PackedWeight:
        """Pack a finite tensor (N, K).

        Args:
            config: the codec's options; it may ignore only those meant for other codecs.
            statistics: (K,) second moments of the layer's inputs from a calibration pass, or None.
        """

    @abstractmethod
    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedWeight:
        """Rebuild a packed weight from its `facts` and `tensors`."""

    def options(self, facts: Mapping[str, Any]) -> QuantConfig:
        """The configuration with which the weight with these facts was packed."""
        known = {key: facts[key] for key in ("quant_type", "block_size", "double_quant") if key in facts}
        return QuantConfig(**known)

    def below(self, config: QuantConfig, shapes: Sequence[Sequence[int]]) -> QuantConfig | None:
        """How `join` holds weights of these shapes, all packed as `config` says; None if it cannot."""
        return None

    def join(self, weights: Sequence[PackedWeight]) -> PackedWeight:
        """The weight whose rows are those of `weights`, one below the other, with the same values; where `below` allows it, and
        the columns are in one order."""
        raise NotImplementedError

    def write(self, path: str, weight: PackedWeight) -> dict[str, Tensor]:
        """Tensors by name that a file stores for the layer at `path`."""
        return write(path, weight)

    def written(self, path: str, shape: Sequence[int], config: QuantConfig) -> dict[str, TensorSpec]:
        """Dtype and shape of each tensor that `write` returns for a weight of `shape`."""
        return written(path, shape, config)

    def stored_options(self, path: str, stored: Tensor, name: str) -> QuantConfig:
        """Configuration of the packed layer at `path`, from its marker tensor.

        Raises:
            ModelError: it cannot be read.
        """
        return self.options(read_facts(path, stored, name))

    def read(self, path: str, parts: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> PackedWeight:
        """The packed weight of the layer at `path` from the tensors that `write` returned; `name` is the file's name in errors.

        Raises:
            ModelError: a part is missing, damaged or of another shape.
        """
        return read(path, parts, dtype, name)


_FACTS_BYTES = 512


def _key(path: str, place: int, name: str) -> str:
    """Name in a file of a packed layer's tensor; the codes (place 0) have the name of a dense weight."""
    return f"{path}.weight.{name}" if place else f"{path}.weight"


def write(path: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The tensors by name that a file stores for the layer or the experts' weights at `path`: the codes `PATH.weight`, constants
    `PATH.weight.NAME`, and the facts as JSON in a uint8 tensor `PATH.weight.packed.QUANT_TYPE`."""
    facts = weight.facts()
    text = json.dumps(facts, sort_keys=True).encode().ljust(_FACTS_BYTES)
    stored = {_key(path, i, name): tensor for i, (name, tensor) in enumerate(weight.tensors().items())}
    return {**stored, f"{path}{MARKER}{facts['quant_type']}": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def written(path: str, shape: Sequence[int], config: QuantConfig) -> dict[str, TensorSpec]:
    """Dtype and shape of each tensor that `write` returns for a weight of `shape`, (N, K) or (E, N, K)."""
    found = {_key(path, i, name): spec for i, (name, spec) in enumerate(layouts.of_layer(shape, config).items())}
    return {**found, f"{path}{MARKER}{config.quant_type}": TensorSpec("uint8", (_FACTS_BYTES,))}


def read_facts(path: str, stored: Tensor, name: str) -> dict[str, Any]:
    """The facts of the packed weight at `path` from its marker tensor; `name` is the file's name in errors.

    Raises:
        ModelError: they cannot be read.
    """
    try:
        facts: dict[str, Any] = json.loads(bytes(stored.tolist()))
        torch.Size(facts["shape"])
        CODECS[facts["quant_type"]].options(facts)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{name}: the facts of the packed weight '{path}' cannot be read ({error}). Download the checkpoint again."
        ) from None
    return facts


def read(path: str, parts: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> PackedWeight:
    """The packed weight at `path` from the tensors that `write` returned; `name` is the file's name in errors.

    Raises:
        ModelError: a part is missing, damaged or of another shape.
    """
    key = next((key for key in parts if key.startswith(path + MARKER)), "")
    if not key:
        raise ModelError(f"{name}: the packed weight '{path}' lacks its facts. Download the checkpoint again.")
    facts = read_facts(path, parts[key], name)
    config, found = CODECS[facts["quant_type"]].options(facts), {}
    for i, (part, (wanted, size)) in enumerate(layouts.of_layer(facts["shape"], config).items()):
        tensor = parts.get(_key(path, i, part))
        if tensor is None or tensor.dtype != _DTYPES[wanted] or tuple(tensor.shape) != size:
            got = "it is missing" if tensor is None else f"it is {dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            raise ModelError(f"{name}: '{_key(path, i, part)}' must be {wanted} {size}: {got}. Download the checkpoint again.")
        found[part] = tensor
    return restore({**facts, "dtype": dtype_name(dtype)}, found)


def restore(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedWeight:
    """Rebuild a packed weight from its `facts()` and `tensors()`."""
    if "experts" in facts:
        return PackedExperts(facts, tensors)
    weight: PackedWeight = CODECS[facts["quant_type"]].restore(facts, tensors)
    return weight


class PackedExperts(PackedWeight):
    """The weights (E, N, K) of the experts of a mixture: E matrices, packed each on its own by any codec, in one set of tensors.

    Each tensor is one of the codec's with a leading dimension of E, so that experts are read, sharded and decoded one by one; no
    codec needs to know of it.
    """

    def __init__(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._facts, self._tensors = dict(facts), dict(tensors)
        self.shape = torch.Size(facts["shape"])
        self.dtype = getattr(torch, facts["dtype"])
        self._of_one = {key: value for key, value in facts.items() if key != "experts"} | {"shape": facts["shape"][1:]}

    @classmethod
    def of(cls, weights: Iterable[PackedWeight], n_experts: int) -> PackedExperts:
        """Put the packed weights of `n_experts` experts, of one codec and shape, into one set of tensors."""
        found: PackedExperts | None = None
        for expert, weight in enumerate(weights):
            found = found or cls.uninitialised(weight, n_experts)
            assert weight.facts() == found[expert].facts()
            for name, tensor in weight.tensors().items():
                found._tensors[name][expert] = tensor
        assert found is not None
        return found

    @classmethod
    def uninitialised(cls, one: PackedWeight, n_experts: int) -> PackedExperts:
        """The weights of `n_experts` experts that are packed as `one`, with any values."""
        facts = one.facts()
        tensors = {name: tensor.new_empty((n_experts, *tensor.shape)) for name, tensor in one.tensors().items()}
        return cls({**facts, "shape": [n_experts, *facts["shape"]], "experts": n_experts}, tensors)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, expert: int) -> PackedWeight:
        """The weight (N, K) of one expert; it shares the tensors."""
        return restore(self._of_one, {name: tensor[expert] for name, tensor in self._tensors.items()})

    @cached_property
    def stack(self) -> FourBit | Grouped | None:
        """All matrices in the format of the kernels for all experts, or None: the codec has no kernels, or orders columns."""
        one = self[0]
        if one.four_bit is None and (one.grouped is None or one.grouped.order is not None):
            return None
        held = restore({**self._of_one, "shape": self.shape}, self._tensors)
        return held.four_bit or held.grouped

    def tensors(self) -> dict[str, Tensor]:
        """The codec's tensors, with a leading dimension of experts."""
        return dict(self._tensors)

    def facts(self) -> dict[str, Any]:
        """An expert's facts, with the shape (E, N, K), and 'experts'."""
        return dict(self._facts)

    def decode(self, out: Tensor) -> Tensor:
        """Dequantise all experts."""
        for expert in range(len(self)):
            self[expert].decode(out[expert])
        return out


@cache
def _spec(text: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    facts, names = json.loads(text)
    return facts, tuple(names)


def to_spec(weight: PackedWeight) -> str:
    """Facts and tensor names as one string, for custom operators (torch.compile), which cannot take a `PackedWeight`."""
    return json.dumps([weight.facts(), list(weight.tensors())], sort_keys=True)


def from_spec(spec: str, tensors: Sequence[Tensor]) -> PackedWeight:
    """Rebuild a packed weight from its `to_spec` and its tensors in order."""
    facts, names = _spec(spec)
    return restore(facts, dict(zip(names, tensors, strict=True)))
