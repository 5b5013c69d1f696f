"""Writers of quantised checkpoints: bitsandbytes', GPTQ's, compressed-tensors', and our own; the inverse of this room's readers.

A format may hold less than a codec: scales in 16 bits, never quantised again. `quantize` therefore rounds the scales to what the
file holds before codes are chosen, so that what is in memory, what is written and what others decode are the same numbers.

    bnb-4bit            nf4, fp4: the codecs' own bytes (`quant/codecs/fourbit.py`)
    compressed-tensors  int2 to int8 (pack-quantized), fp8 (float-quantized), mxfp4; scales in the model's dtype. Each codec is a
                        config group; one that is not of all layers names its layers. transformers 5.23 loads such mixtures only
                        if nothing in them has zero points: it decodes all layers by one group while loading, and keeps no
                        packed zero points compressed
    gptq                int2 to int8 and their act-order forms, as gptq_v2: v1 has no zero point of 0, and GPTQModel refuses v1
                        files with zero points that it has not written. Scales in float16, for models in bfloat16 such that
                        that holds them too. Layers of other codecs, and dense ones, are rules in `dynamic`
    lownibble           every codec, as its file format is; the only one for the experts of mixtures, which the others leave dense

'auto' takes the first of these that holds all layers; for mixtures of integers GPTQ's, whose rules GPTQModel and vLLM know.
compressed-tensors goes before GPTQ because transformers reads it on any device with one pure-Python package, and vLLM has kernels
for its zero points; for GPTQ transformers needs gptqmodel and optimum, and knows no rules.

Sources: compressed-tensors 0.20 pack_quantized, naive_quantized, mxfp4; GPTQModel 7.7 qlinear/__init__.py (`pack_original`,
`dequantize_weight`), loader.py, config.py (`dynamic`); vLLM compressed_tensors.py.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lownibble import __version__
from lownibble.config import PER_LAYER, QuantConfig
from lownibble.errors import ConfigError
from lownibble.models import packed as packed_files
from lownibble.quant import PackedWeight, layouts, quantize
from lownibble.quant.bits import pack_words
from lownibble.quant.codecs import quantize_for
from lownibble.quant.codecs.grouped import GroupedWeight, parts_of

OWN = packed_files.OWN_METHOD

BNB_TYPES = ("nf4", "fp4")
"""Codecs of bitsandbytes' 4-bit checkpoints."""

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each stored tensor by name."""


class ToPack(NamedTuple):
    """A layer that is to be packed."""

    shape: torch.Size
    how: QuantConfig


class Writer(ABC):
    """A file format of packed layers.

    Attributes:
        name: as `--format` calls it.
    """

    name: str

    @abstractmethod
    def why_not(self, path: str, layer: ToPack) -> str:
        """Why the format does not hold a layer, or ''."""

    def options(self, quant: QuantConfig) -> QuantConfig:
        """The configuration as the format holds it. Options at their default ask for nothing, so formats whose constants are not
        quantised leave `double_quant` out; where a pattern asks for it, `why_not` refuses the layer."""
        return quant

    def quantize(
        self, weight: Tensor, how: QuantConfig, dtype: torch.dtype, *, name: str, statistics: Tensor | None = None
    ) -> PackedWeight:
        """Pack a weight with constants that the format holds, for a model in `dtype`.

        Raises:
            QuantizationError: as `quantize`, or a scale is too large for the format.
        """
        return quantize(weight, how, name=name, statistics=statistics)

    def n_bytes(self, layer: ToPack, dtype: torch.dtype) -> int:
        """Bytes of a layer's codes and constants."""
        return sum(kind.itemsize * math.prod(shape) for kind, shape in self.specs("", layer, dtype).values())

    @abstractmethod
    def specs(self, path: str, layer: ToPack, dtype: torch.dtype) -> Specs:
        """The tensors of a layer of a model in `dtype`."""

    @abstractmethod
    def tensors(self, path: str, weight: PackedWeight) -> dict[str, Tensor]:
        """The same with their values; the weight's `dtype` is the model's."""

    @abstractmethod
    def config_json(self, quant: QuantConfig, packed: Iterable[str], dense: list[str], dtype: str) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            quant: how the layers at the paths `packed` are packed. dense: paths of the other linear layers.
            dtype: the model's.
        """


class Own(Writer):
    """The codecs' own files."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, path: str, layer: ToPack) -> str:
        """As `Writer.why_not`."""
        known = self.name == OWN or layer.how.quant_type in BNB_TYPES
        return "" if known else f"it holds {', '.join(BNB_TYPES)}, and '{path}' is {layer.how.quant_type}"

    def n_bytes(self, layer: ToPack, dtype: torch.dtype) -> int:
        """As `Writer.n_bytes`: without facts and tables."""
        return layouts.n_bytes(layer.shape, layer.how)

    def specs(self, path: str, layer: ToPack, dtype: torch.dtype) -> Specs:
        """As `Writer.specs`."""
        return packed_files.pack_shapes(path, layer.shape, layer.how)

    def tensors(self, path: str, weight: PackedWeight) -> dict[str, Tensor]:
        """As `Writer.tensors`."""
        return packed_files.pack(path, weight)

    def config_json(self, quant: QuantConfig, packed: Iterable[str], dense: list[str], dtype: str) -> dict[str, Any]:
        """As `Writer.config_json`."""
        if self.name == OWN:
            return packed_files.own_config_json(quant, dense)
        return packed_files.bnb_config_json(quant.for_layer(next(iter(packed))), dense, dtype)


class _Grouped(Writer):
    """Formats of grouped codecs with scales that are not quantised."""

    types: tuple[str, ...]
    sizes: tuple[int, ...] = layouts.GROUP_SIZES

    def why_not(self, path: str, layer: ToPack) -> str:
        """As `Writer.why_not`."""
        how = layer.how
        if how.quant_type not in self.types:
            return f"it holds {', '.join(self.types)}, and '{path}' is {how.quant_type}"
        if how.double_quant:
            return f"its scales are not quantised, and double_quant is asked for in '{path}'"
        if how.block_size != "row" and how.block_size not in self.sizes:
            return f"its groups are of {', '.join(map(str, self.sizes))} or a row, and '{path}' has groups of {how.block_size}"
        return ""

    def options(self, quant: QuantConfig) -> QuantConfig:
        """As `Writer.options`."""
        plain: QuantConfig = quant.with_options(double_quant=False)
        return plain

    def quantize(
        self, weight: Tensor, how: QuantConfig, dtype: torch.dtype, *, name: str, statistics: Tensor | None = None
    ) -> PackedWeight:
        """As `Writer.quantize`."""
        return quantize_for(weight, how, lambda scale: self.scale(scale, dtype).float(), name=name, statistics=statistics)

    @abstractmethod
    def scale(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Scales as they are stored for a model in `dtype`; twice is as once."""


class CompressedTensors(_Grouped):
    """compressed-tensors: pack-quantized integers, float-quantized fp8, mxfp4-pack-quantized."""

    name = "compressed-tensors"
    types = ("int2", "int3", "int4", "int8", "fp8", "mxfp4")

    def scale(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """In the model's dtype, in which compressed-tensors decodes."""
        return scale.to(dtype)

    def specs(self, path: str, layer: ToPack, dtype: torch.dtype) -> Specs:
        """As `Writer.specs`."""
        (n_out, n_in), how = layer.shape, layer.how
        kind, groups = layouts.GROUPED[how.quant_type], n_in // layouts.group_size(layer.shape, how)
        if kind.is_float:
            return _named(path, weight=(torch.float8_e4m3fn, (n_out, n_in)), weight_scale=(dtype, (n_out, groups)))
        if kind.exponents:
            return _named(path, weight_packed=(torch.uint8, (n_out, n_in // 2)), weight_scale=(torch.uint8, (n_out, groups)))
        zero = {"weight_zero_point": (torch.int32, (_words(n_out, kind.bits), groups))} if kind.zero else {}
        return _named(
            path, weight_packed=(torch.int32, (n_out, _words(n_in, kind.bits))), weight_scale=(dtype, (n_out, groups)),
            weight_shape=(torch.int64, (2,)), **zero,
        )  # fmt: skip

    def tensors(self, path: str, weight: PackedWeight) -> dict[str, Tensor]:
        """As `Writer.tensors`."""
        assert isinstance(weight, GroupedWeight)
        kind, (codes, scale, zero, _) = layouts.GROUPED[weight.quant_type], parts_of(weight)
        if kind.exponents:
            return _named(path, weight_packed=codes[:, ::2] | codes[:, 1::2] << 4, weight_scale=scale)
        scale = self.scale(scale, weight.dtype)
        if kind.is_float:
            return _named(path, weight=codes, weight_scale=scale)
        held = {} if zero is None else {"weight_zero_point": pack_words(zero.t(), kind.bits).t().contiguous()}
        return _named(
            path, weight_packed=pack_words(_unsigned(codes), kind.bits), weight_scale=scale,
            weight_shape=torch.tensor(weight.shape), **held,
        )  # fmt: skip

    def config_json(self, quant: QuantConfig, packed: Iterable[str], dense: list[str], dtype: str) -> dict[str, Any]:
        """As `Writer.config_json`."""
        of_way: dict[tuple[Any, ...], list[str]] = {}
        for path in sorted(packed):
            of_way.setdefault(_way(quant.for_layer(path)), []).append(path)
        ways = [QuantConfig(**dict(zip(PER_LAYER, way, strict=True))) for way in of_way]
        groups = {
            f"group_{i}": {
                "targets": ["Linear"] if len(ways) == 1 else paths, "weights": self._scheme(how), "input_activations": None,
                "output_activations": None, "format": self._format(how.quant_type),
            }
            for i, (how, paths) in enumerate(zip(ways, of_way.values(), strict=True))
        }  # fmt: skip
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": self.name, "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed", "config_groups": groups, "ignore": dense, "kv_cache_scheme": None,
            "global_compression_ratio": None, **self._loading(ways),
        }  # fmt: skip

    def _loading(self, ways: list[QuantConfig]) -> dict[str, Any]:
        """What transformers needs to be told: to decode while loading. Else it expects zero points that are not packed, and
        mxfp4 becomes bfloat16 whatever the model is in; but it decodes all layers in one way."""
        kinds = [layouts.GROUPED[how.quant_type] for how in ways]
        return {"dequantize": True} if len(kinds) == 1 and (kinds[0].zero or kinds[0].exponents) else {}

    def _format(self, quant_type: str) -> str:
        return {"fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized"}.get(quant_type, "pack-quantized")

    def _scheme(self, how: QuantConfig) -> dict[str, Any]:
        kind, by_row = layouts.GROUPED[how.quant_type], how.block_size == "row"
        return {
            "num_bits": kind.bits, "type": "float" if kind.is_float or kind.exponents else "int", "symmetric": not kind.zero,
            "strategy": "channel" if by_row else "group", "group_size": None if by_row else how.block_size, "dynamic": False,
        }  # fmt: skip


class Gptq(_Grouped):
    """GPTQ's files."""

    name = "gptq"
    types = tuple(name for name in layouts.GROUPED if name.startswith("int"))
    sizes = (32, 64, 128, 256, 512, 1024)  # of GPTQModel's TorchLinear

    def why_not(self, path: str, layer: ToPack) -> str:
        """As `Writer.why_not`."""
        found = super().why_not(path, layer)
        whole = all(n % 32 == 0 for n in layer.shape)
        return found or ("" if whole else f"it packs 32 rows and columns at a time, and '{path}' is {tuple(layer.shape)}")

    def scale(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """In float16; for a model in bfloat16 such that loaders may turn them into that."""
        return (scale.bfloat16() if dtype == torch.bfloat16 else scale).half()

    def specs(self, path: str, layer: ToPack, dtype: torch.dtype) -> Specs:
        """As `Writer.specs`."""
        (n_out, n_in), how = layer.shape, layer.how
        bits, groups = layouts.GROUPED[how.quant_type].bits, n_in // layouts.group_size(layer.shape, how)
        return _named(
            path, qweight=(torch.int32, (_words(n_in, bits), n_out)), qzeros=(torch.int32, (groups, _words(n_out, bits))),
            scales=(torch.float16, (groups, n_out)), g_idx=(torch.int32, (n_in,)),
        )  # fmt: skip

    def tensors(self, path: str, weight: PackedWeight) -> dict[str, Tensor]:
        """As `Writer.tensors`."""
        assert isinstance(weight, GroupedWeight)
        kind, (codes, scale, zero, order) = layouts.GROUPED[weight.quant_type], parts_of(weight)
        codes, n_in = _unsigned(codes), weight.shape[1]
        g_idx = torch.arange(n_in, dtype=torch.int32) // (n_in // scale.shape[1])
        if order is not None:
            back = order.long().argsort()
            codes, g_idx = codes[:, back], g_idx[back]
        zero = torch.full(scale.shape, 2 ** (kind.bits - 1), dtype=torch.uint8) if zero is None else zero
        return _named(
            path, qweight=pack_words(codes, kind.bits).t().contiguous(), qzeros=pack_words(zero.t(), kind.bits),
            scales=self.scale(scale, weight.dtype).t().contiguous(), g_idx=g_idx.to(torch.int32),
        )  # fmt: skip

    def config_json(self, quant: QuantConfig, packed: Iterable[str], dense: list[str], dtype: str) -> dict[str, Any]:
        """As `Writer.config_json`."""
        packed = sorted(packed)
        common = self._options(quant)
        rules: dict[str, Any] = {f"-:^{re.escape(path)}$": {} for path in dense}
        for path in packed:
            own = {key: value for key, value in self._options(quant.for_layer(path)).items() if value != common[key]}
            rules |= {f"+:^{re.escape(path)}$": own} if own else {}
        inside = {path: re.sub(r"^.*?\.\d+\.", "", path) for path in (*packed, *dense)}
        names, others = {inside[path] for path in packed}, {inside[path] for path in dense if inside[path] != path}
        in_block = {"modules_in_block_to_quantize": [sorted(names)]} if others and not names & others else {}
        return {
            "quant_method": self.name, **common, "checkpoint_format": "gptq_v2", "pack_dtype": "int32",
            "lm_head": any("." not in path for path in packed), "dynamic": rules, **in_block,
            "meta": {"quantizer": [f"lownibble:{__version__}"]},
        }  # fmt: skip

    def _options(self, how: QuantConfig) -> dict[str, Any]:
        kind, by_row = layouts.GROUPED[how.quant_type], how.block_size == "row"
        return {
            "bits": kind.bits,
            "group_size": -1 if by_row else how.block_size,
            "sym": not kind.zero,
            "desc_act": kind.act_order,
        }


WRITERS: dict[str, Writer] = {
    each.name: each for each in (Own("bnb-4bit"), CompressedTensors(), Gptq(), Own(OWN))
}  # fmt: skip
"""File formats of packed layers, as `--format` calls them; 'auto' takes the first that holds all layers."""


def usual(quant: QuantConfig, *, of_experts: bool) -> Writer:
    """The writer of merges and exports: bitsandbytes' format for nf4 or fp4 in all layers, else our own; `of_experts`: whether
    experts of a mixture are packed, too."""
    return WRITERS["bnb-4bit" if quant.quant_type in BNB_TYPES and not quant.pattern and not of_experts else OWN]


def choose(name: str, quant: QuantConfig, layers: Callable[[QuantConfig], Mapping[str, Iterable[ToPack]]]) -> tuple[Writer, str]:
    """The writer called `name`, or for 'auto' the first that holds all layers, and why those before it do not.

    Args:
        layers: a configuration, `quant` as a writer holds it -> the ways in which each layer may be packed, by path.
    Raises:
        ConfigError: the format does not hold a layer; names those that do.
    """
    why = {writer.name: _why_not(writer, layers(writer.options(quant))) for writer in WRITERS.values()}
    holding = [other for other, reason in why.items() if not reason]
    if name == "auto":
        mixed = len({_way(each.how) for ways in layers(quant).values() for each in ways}) > 1
        first = Gptq.name if mixed and Gptq.name in holding else holding[0]
        return WRITERS[first], "; ".join(f"{other}: {reason}" for other, reason in why.items() if reason)
    if why[name]:
        stacks = [path for path, ways in layers(quant).items() if any(len(way.shape) == 3 for way in ways)]
        dense = f", or leave the experts dense: {leave_dense(stacks[0])}" if stacks else ""
        raise ConfigError(f"--format {name} does not hold this model: {why[name]}. Take --format {' or '.join(holding)}{dense}.")
    return WRITERS[name], ""


def leave_dense(path: str) -> str:
    """The options that leave the experts' weights at `path`, and others of the kind, dense."""
    return f"--skip-modules lm_head {path.split('.')[-2]}"


def _why_not(writer: Writer, layers: Mapping[str, Iterable[ToPack]]) -> str:
    stacks = [path for path, ways in layers.items() if any(len(way.shape) == 3 for way in ways)]
    if stacks and writer.name != OWN:
        return f"it has no place for the experts of a mixture ({stacks[0]}, ...)"
    several = writer.name == "bnb-4bit" and len({_way(each.how) for ways in layers.values() for each in ways}) > 1
    reasons = (writer.why_not(path, way) for path, ways in layers.items() for way in ways)
    return next(filter(None, reasons), "its layers are all packed alike" * several)


def _named(path: str, **parts: Any) -> dict[str, Any]:
    return {f"{path}.{name}": part for name, part in parts.items()}


def _way(how: QuantConfig) -> tuple[Any, ...]:
    return tuple(getattr(how, key) for key in PER_LAYER)


def _words(n: int, bits: int) -> int:
    return -(-n * bits // 32)


def _unsigned(codes: Tensor) -> Tensor:
    """Codes from 0."""
    return codes if codes.dtype == torch.uint8 else (codes.short() + 128).to(torch.uint8)
