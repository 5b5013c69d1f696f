"""What a config.json says about weights that are stored quantised: the format in words, and the codec that holds it. No torch.

The loader finds the layers themselves (`models/formats/`) and has the last word; the planner has only this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lownibble.config import QuantConfig
from lownibble.errors import ConfigError, ModelError

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json."""

METHODS = (
    "auto-round", "awq", "bitsandbytes", "bitsandbytes 8-bit", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "hqq",
    "lownibble", "mxfp4", "mxfp8",
)  # fmt: skip
"""Formats that can be loaded, by `quant_method`."""


def of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the contents of a config.json say that the weights are stored, or {}: its own, or its text model's."""
    parts = [config, config.get("text_config")]
    found = next((part[key] for part in parts if isinstance(part, Mapping) for key in KEYS if part.get(key)), None)
    return dict(found) if isinstance(found, Mapping) else {}


def method(stored: Mapping[str, Any]) -> str:
    """The format's name: `quant_method`, with bitsandbytes' 8 bits apart."""
    name = str(stored.get("quant_method", "an unknown method"))
    if name == "bitsandbytes" and stored.get("load_in_8bit", stored.get("_load_in_8bit")):
        return "bitsandbytes 8-bit"
    return name


def check(stored: Mapping[str, Any], name: str) -> None:
    """Reject formats that are not known.

    Raises:
        ModelError: it is one; names those that are known.
    """
    if stored and method(stored) not in METHODS:
        raise ModelError(
            f"'{name}' is quantised with {method(stored)}. Quantised checkpoints that can be loaded: {', '.join(METHODS)}. Take "
            "one of those, or the dense checkpoint that this one was made from."
        )


def _size(stored: Mapping[str, Any]) -> int:
    size = stored.get("group_size")
    return size if isinstance(size, int) and size > 0 else 0


def _schemes(stored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The weights' schemes of compressed-tensors."""
    groups = stored.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    return [group.get("weights") or {} for group in groups if isinstance(group, Mapping)]


def title(stored: Mapping[str, Any]) -> str:
    """The format of another tool in words, e.g. 'GPTQ, 4 bits in groups of 128'; '' for bitsandbytes' 4 bits and our own."""
    kind, block = method(stored), stored.get("weight_block_size")
    if kind in ("gptq", "awq", "auto-round"):
        groups = f"groups of {_size(stored)}" if _size(stored) else "rows"
        tool, order = "AutoRound" if kind == "auto-round" else kind.upper(), ", act-order" * bool(stored.get("desc_act"))
        return f"{tool}, {stored.get('bits', 4)} bits in {groups}{order}"
    if kind == "compressed-tensors":
        said = {
            f"{how.get('num_bits', '?')}-bit {how.get('type', 'int')} by {how.get('strategy', '?')}" for how in _schemes(stored)
        }
        return f"compressed-tensors, {' and '.join(sorted(said)) or 'no scheme named'}"
    if kind in ("fp8", "fbgemm_fp8", "mxfp8"):
        return f"{'MX' * (kind == 'mxfp8')}FP8 in {f'blocks of {block[0]} x {block[1]}' if block else 'rows or tensors'}"
    if kind == "hqq":
        params = (stored.get("quant_config") or {}).get("weight_quant_params") or {}
        return f"HQQ, {params['nbits']} bits in groups of {params.get('group_size')}" if "nbits" in params else "HQQ"
    return {"mxfp4": "MXFP4 experts", "bitsandbytes 8-bit": "bitsandbytes, 8 bits in rows"}.get(kind, "")


def codec(stored: Mapping[str, Any]) -> QuantConfig | None:
    """The codec that holds the layers' numbers as they are stored, or None: they are decoded.

    Scales of blocks and tensors are held as scales of groups and rows.
    """
    kind, bits, size = method(stored), stored.get("bits", 4), _size(stored) or "row"
    act = "_act" * bool(stored.get("desc_act"))
    block = stored.get("weight_block_size")
    if kind == "bitsandbytes":
        return QuantConfig(
            quant_type=stored.get("bnb_4bit_quant_type", "fp4"), double_quant=stored.get("bnb_4bit_use_double_quant", False)
        )
    if kind == "lownibble":
        known = {key: stored[key] for key in ("quant_type", "block_size", "double_quant", "pattern") if key in stored}
        return QuantConfig(**known)
    if kind in ("gptq", "auto-round") and bits in (2, 3, 4, 8) and (bits < 8 or stored.get("sym", True)):
        return _grouped(f"int{bits}{act}", size)
    if kind == "awq":
        return _grouped("int4", size)
    if kind == "bitsandbytes 8-bit":
        return _grouped("int8", "row")
    if kind in ("fp8", "fbgemm_fp8", "mxfp8"):
        return _grouped("fp8", block[1] if block else 32 if kind == "mxfp8" else "row")
    if kind == "compressed-tensors":
        return _compressed(stored)
    return None


def _grouped(quant_type: str, size: int | str) -> QuantConfig | None:
    try:
        return QuantConfig(quant_type=quant_type, block_size=size, double_quant=False)
    except ConfigError:
        return None


def _compressed(stored: Mapping[str, Any]) -> QuantConfig | None:
    found = []
    for how in _schemes(stored):
        bits, kind = how.get("num_bits"), how.get("type", "int")
        block = how.get("block_structure")
        size = block[1] if isinstance(block, list) else how.get("group_size") or "row"
        if kind == "float" and bits == 8:
            found.append(_grouped("fp8", size))
        elif kind == "int" and bits in (2, 3, 4, 8) and (bits < 8 or how.get("symmetric", True)):
            found.append(_grouped(f"int{bits}{'_act' * (how.get('actorder') in ('group', True))}", size))
        else:
            found.append(None)
    return found[0] if found and all(each == found[0] for each in found) else None


def kept_dense(stored: Mapping[str, Any]) -> list[str]:
    """Names of modules that are stored dense, as far as they are names and no patterns."""
    given = [stored.get(key) for key in ("modules_to_not_convert", "ignore", "llm_int8_skip_modules", "skip_modules")]
    return [name for names in given if isinstance(names, list) for name in names if isinstance(name, str) and ":" not in name]
