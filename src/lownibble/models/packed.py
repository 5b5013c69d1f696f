"""Checkpoints with packed layers: bitsandbytes' 4-bit ones, and those that this package writes with any codec.

The codec defines which tensors belong together and how they are read and written (`quant/packed.py`): a layer at PATH has its
codes as `PATH.weight`, its constants as `PATH.weight.NAME`, and a marker tensor with codec and facts. Bytes are kept unchanged.
The weights of a mixture's experts are one layer, at the path of the model's parameter, in the codecs' common format: no other
tool has one for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lownibble.config import PER_LAYER, QuantConfig
from lownibble.errors import ModelError
from lownibble.models.checkpoint import Checkpoint
from lownibble.quant import Codec, PackedWeight
from lownibble.quant import packed as common
from lownibble.registry import CODECS

OWN_METHOD = "lownibble"
"""The `quant_method` of checkpoints that our transformers quantizer saves."""


def packed_modules(keys: Iterable[str]) -> dict[str, str]:
    """Path of each layer that is stored packed -> its quant_type."""
    keys = [key for key in keys if ".weight." in key]
    found = {}
    for marker in {common.MARKER, *(CODECS[name].marker for name in CODECS)} if keys else ():
        for key in keys:
            path, is_marked, quant_type = key.partition(marker)
            if is_marked:
                found[path] = quant_type
    return found


def read(checkpoint: Checkpoint, path: str, quant_type: str, dtype: torch.dtype) -> PackedWeight:
    """The packed weight of the layer at `path`, its bytes unchanged; `dtype` is its default dtype to dequantise to.

    Raises:
        ModelError: a part is missing or damaged, or the codec is unknown.
    """
    keys = [key for key in checkpoint.file_of if key == f"{path}.weight" or key.startswith(f"{path}.weight.")]
    parts = {key: checkpoint.read(key).clone() for key in keys}  # a copy never keeps the file mapped
    return unpack(parts, path, quant_type, dtype, f"'{checkpoint.name}'")


def options(checkpoint: Checkpoint, path: str, quant_type: str) -> QuantConfig:
    """Configuration of the packed layer at `path`, from its marker tensor.

    Raises:
        ModelError: it is damaged, or the codec is unknown.
    """
    name = f"'{checkpoint.name}'"
    codec = _codec(quant_type, path, name)
    if is_of_experts(checkpoint, path, quant_type):
        return codec.options(common.read_facts(path, checkpoint.read(f"{path}{common.MARKER}{quant_type}"), name))
    return codec.stored_options(path, checkpoint.read(f"{path}{codec.marker}{quant_type}"), name)


def is_of_experts(checkpoint: Checkpoint, path: str, quant_type: str) -> bool:
    """Whether the packed weight at `path` is that of a mixture's experts.

    Raises:
        ModelError: as `options`.
    """
    key, name = f"{path}{common.MARKER}{quant_type}", f"'{checkpoint.name}'"
    _codec(quant_type, path, name)
    return key in checkpoint.file_of and _of_experts(path, checkpoint.read(key), name)


def _of_experts(path: str, marker: Tensor, name: str) -> bool:
    return "experts" in common.read_facts(path, marker, name)


def _codec(quant_type: str, path: str, name: str) -> Codec:
    if quant_type not in CODECS:
        raise ModelError(
            f"{name}: '{path}' is packed as '{quant_type}', a codec that is not known here. Known: {', '.join(CODECS)}."
        )
    codec: Codec = CODECS[quant_type]
    return codec


def unpack(parts: Mapping[str, Tensor], path: str, quant_type: str, dtype: torch.dtype, name: str) -> PackedWeight:
    """`read` for tensors in memory, by their full names; `name` is the checkpoint's name in errors."""
    codec, marker = _codec(quant_type, path, name), parts.get(f"{path}{common.MARKER}{quant_type}")
    if marker is not None and _of_experts(path, marker, name):
        return common.read(path, parts, dtype, name)
    return codec.read(path, parts, dtype, name)


def pack(path: str, weight: PackedWeight) -> dict[str, Tensor]:
    """Tensors by name that a checkpoint stores for the layer at `path`."""
    if isinstance(weight, common.PackedExperts):
        return common.write(path, weight)
    stored: dict[str, Tensor] = CODECS[weight.facts()["quant_type"]].write(path, weight)
    return stored


def pack_shapes(path: str, shape: torch.Size, config: QuantConfig) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor that `pack` returns for a weight of `shape`."""
    of_codec = CODECS[config.quant_type].written if len(shape) == 2 else common.written
    specs = of_codec(path, shape, config)
    return {key: (getattr(torch, spec.dtype), spec.shape) for key, spec in specs.items()}


def config_of(packed: Mapping[str, PackedWeight | QuantConfig], skip_modules: list[str]) -> QuantConfig:
    """The configuration by which the layers are packed: the most common codec, and a pattern for each group of others."""
    by_path = {
        path: each if isinstance(each, QuantConfig) else CODECS[each.facts()["quant_type"]].options(each.facts())
        for path, each in packed.items()
    }
    return QuantConfig.of_layers(by_path, skip_modules)


def own_config_json(config: QuantConfig, skip_modules: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json of a checkpoint of our own."""
    options = {key: getattr(config, key) for key in PER_LAYER}
    return {"quant_method": OWN_METHOD, **options, "pattern": config.pattern, "skip_modules": skip_modules}


def bnb_config_json(config: QuantConfig, skip_modules: list[str], dtype: str) -> dict[str, Any]:
    """The same with which transformers loads nf4 or fp4 in all layers, with bitsandbytes."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant, "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skip_modules,
    }  # fmt: skip
