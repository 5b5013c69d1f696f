"""What a config.json says about weights that are stored quantised: the format in words, and the codec that holds it. No torch.

The loader finds the layers themselves (`models/formats/`) and has the last word; the planner has only this.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lownibble.config import PER_LAYER, QuantConfig
from lownibble.errors import ConfigError, ModelError
from lownibble.matching import is_part

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json."""

ORIGIN = "quantized_from"
"""Key of config.json in checkpoints that `lownibble quantize` makes: the dense model's name, revision and digest."""

TRAINED_ON = "lownibble_trained_on"
"""Key of an adapter's safetensors metadata: JSON facts of the base that it was trained on (`lora/provenance.py`)."""

MARKER = ".weight.packed."
"""Between path and codec in the name of the tensor with the facts of a layer in the common format (`quant/packed.py`)."""

MX_GROUP = 32
"""Weights that share an exponent in the MX formats."""

METHODS = (
    "auto-round", "awq", "bitsandbytes", "bitsandbytes 8-bit", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "hqq",
    "lownibble", "mxfp4", "mxfp8",
)  # fmt: skip
"""Formats that can be loaded, by `quant_method`."""


def of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the contents of a config.json say that the weights are stored, or {}: its own, or its text model's."""
    parts = [config, config.get("text_config")]
    found = next((part[key] for part in parts if isinstance(part, Mapping) for key in KEYS if part.get(key)), None)
    return _with_numbers(found) if isinstance(found, Mapping) else {}


def of_folder(folder: Path) -> dict[str, Any]:
    """As `of`, for a model folder; old GPTQ folders have it in a file of its own."""
    found, beside = of(read_json(folder / "config.json")), read_json(folder / "quantize_config.json")
    return found or (_with_numbers({"quant_method": "gptq", **beside}) if beside else {})


def read_json(file: Path) -> dict[str, Any]:
    """The file's content; {} if it is no JSON object, which is said where it is read as a model's configuration."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _with_numbers(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, with numbers that are written as text as numbers."""
    return {
        key: int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else value for key, value in stored.items()
    }


def method(stored: Mapping[str, Any]) -> str:
    """The format's name: `quant_method`, with bitsandbytes' 8 bits apart."""
    name = str(stored.get("quant_method", "an unknown method"))
    if name == "bitsandbytes" and stored.get("load_in_8bit", stored.get("_load_in_8bit")):
        return "bitsandbytes 8-bit"
    return name


def check(stored: Mapping[str, Any], name: str) -> None:
    """Reject formats that are not known.

    Raises:
        ModelError: it is one (names those that are known), or a size is no number.
    """
    if stored and method(stored) not in METHODS:
        raise ModelError(
            f"'{name}' is quantised with {method(stored)}. Quantised checkpoints that can be loaded: {', '.join(METHODS)}. Take "
            "one of those, or the dense checkpoint that this one was made from."
        )
    block = stored.get("weight_block_size")
    wrong = [key for key in ("bits", "group_size") if not isinstance(stored.get(key) or 0, int)]
    if block and not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        wrong.append("weight_block_size")
    if wrong:
        said = ", ".join(f"{key} = {stored[key]!r}" for key in wrong)
        raise ModelError(
            f"'{name}': the quantization_config of config.json makes no sense: {said}. Download the checkpoint again."
        )


def _size(stored: Mapping[str, Any]) -> int:
    size = stored.get("group_size")
    return size if isinstance(size, int) and size > 0 else 0


def _groups(stored: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups of compressed-tensors whose weights are quantised."""
    groups = stored.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    return [group for group in groups if isinstance(group, Mapping) and group.get("weights")]


def _schemes(stored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The weights' schemes of compressed-tensors."""
    return [group["weights"] for group in _groups(stored)]


def scheme(stored: Mapping[str, Any], path: str) -> dict[str, Any]:
    """compressed-tensors' scheme of the weight at `path`, or {}: a target's name goes before patterns, and these before
    classes."""
    groups = [(str(target), group["weights"]) for group in _groups(stored) for target in group.get("targets") or ("Linear",)]
    exact = (weights for target, weights in groups if target == path)
    matched = (weights for target, weights in groups if target.startswith("re:") and _is_named(path, target))
    classes = (weights for target, weights in groups if target == "Linear")
    return next((found for each in (exact, matched, classes) for found in each), {})


def of_path(stored: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """GPTQ's options for the layer at `path`: those of the first pattern of `dynamic` that fits, else the common ones."""
    for pattern, options in _dynamic(stored).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), path):
            return stored if pattern.startswith("-:") else {**stored, **options}
    return stored


def _dynamic(stored: Mapping[str, Any]) -> dict[str, Any]:
    """GPTQModel's options by pattern: '+:' or nothing, then a regular expression for the start of a path; '-:' for layers that
    are dense."""
    found = stored.get("dynamic")
    return (
        {str(key): value if isinstance(value, Mapping) else {} for key, value in found.items()}
        if isinstance(found, Mapping)
        else {}
    )


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
    kind, block = method(stored), stored.get("weight_block_size")
    if kind == "bitsandbytes":
        return QuantConfig(
            quant_type=stored.get("bnb_4bit_quant_type", "fp4"), double_quant=stored.get("bnb_4bit_use_double_quant", False)
        )
    if kind == "lownibble":
        known = {key: stored[key] for key in ("quant_type", "block_size", "double_quant", "pattern") if key in stored}
        return QuantConfig(**known)
    if kind in ("gptq", "auto-round"):
        others = {key.removeprefix("+:"): value for key, value in _dynamic(stored).items() if not key.startswith("-:")}
        by_target = [(f"^(?:{key}).*", _gptq({**stored, **value})) for key, value in others.items()]
        return _mixed(_gptq(stored), by_target)
    if kind == "awq":
        return _grouped("int4", _size(stored) or "row")
    if kind == "bitsandbytes 8-bit":
        return _grouped("int8", "row")
    if kind in ("fp8", "fbgemm_fp8", "mxfp8"):
        return _grouped("fp8", block[1] if block else 32 if kind == "mxfp8" else "row")
    if kind == "compressed-tensors":
        return _compressed(stored)
    return QuantConfig(quant_type="mxfp4") if kind == "mxfp4" else None


def named(stored: Mapping[str, Any], held: QuantConfig) -> str:
    """The format in words, also where it is bitsandbytes' 4 bits or our own; `held`: the codec that holds it."""
    return title(stored) or f"{held.quant_type}{' (bitsandbytes)' * (method(stored) == 'bitsandbytes')}"


def why_not(stored: Mapping[str, Any], trained_by: str) -> str:
    """Why a method cannot train on weights that are stored like this, or ''."""
    held = codec(stored) if trained_by != "qlora" and stored else None
    if held is None:
        return ""
    return f"The weights are stored as {named(stored, held)}, on which qlora trains. Take qlora, or the dense model."


def _grouped(quant_type: str, size: int | str) -> QuantConfig | None:
    try:
        return QuantConfig(quant_type=quant_type, block_size=size, double_quant=False)
    except ConfigError:
        return None


def _gptq(stored: Mapping[str, Any]) -> QuantConfig | None:
    bits = stored.get("bits", 4)
    if bits not in (2, 3, 4, 8) or (bits == 8 and not stored.get("sym", True)):
        return None
    return _grouped(f"int{bits}{'_act' * bool(stored.get('desc_act'))}", _size(stored) or "row")


def _compressed(stored: Mapping[str, Any]) -> QuantConfig | None:
    common, by_target = None, []
    for group in _groups(stored):
        form = group.get("format") or stored.get("format")
        found, targets = _scheme_codec(group["weights"], form), [str(target) for target in group.get("targets") or ("Linear",)]
        if "Linear" in targets:
            common = found
        names = [name for name in targets if not name.startswith("re:") and name != "Linear"]
        by_target += [("|".join(map(re.escape, names)), found)] * bool(names)
        by_target += [(f"^(?:{name.removeprefix('re:')}).*", found) for name in targets if name.startswith("re:")]
        if found is None:
            return None
    return _mixed(common or (by_target[0][1] if by_target else None), by_target)


def _scheme_codec(how: Mapping[str, Any], form: str | None) -> QuantConfig | None:
    bits, kind = how.get("num_bits"), how.get("type", "int")
    if kind == "int" and form in ("int-quantized", "naive-quantized"):
        bits = 8  # codes of fewer are in bytes, too
    block = how.get("block_structure")
    size = block[1] if isinstance(block, list) else how.get("group_size") or "row"
    size = "row" if size == -1 else size
    if kind == "float" and bits == 8:
        return _grouped("fp8", size)
    if kind == "float" and bits == 4 and size == MX_GROUP:
        return QuantConfig(quant_type="mxfp4")
    if kind == "int" and bits in (2, 3, 4, 8) and (bits < 8 or how.get("symmetric", True)):
        return _grouped(f"int{bits}{'_act' * (how.get('actorder') in ('group', True))}", size)
    return None


def _mixed(common: QuantConfig | None, by_target: list[tuple[str, QuantConfig | None]]) -> QuantConfig | None:
    """`common` with a pattern for those of other codecs; None if there is one that no codec holds."""
    if common is None or any(how is None for _, how in by_target):
        return None
    pattern = {
        key: {option: getattr(how, option) for option in PER_LAYER} for key, how in by_target if how is not None and how != common
    }
    return common.with_options(pattern=pattern) if pattern else common


def of_layer(codec: QuantConfig, n_in: int) -> QuantConfig:
    """How `codec` holds a layer with rows of n_in columns: where blocks do not divide them, in smaller groups."""
    block = codec.block_size
    if codec.quant_type != "fp8" or not isinstance(block, int) or n_in % block == 0:
        return codec
    return _grouped("fp8", "row" if n_in < block else math.gcd(block, n_in)) or codec


def only_experts(stored: Mapping[str, Any]) -> bool:
    """Whether the format is one of the experts of mixtures alone."""
    return method(stored) == "mxfp4"


def is_quantised(stored: Mapping[str, Any], path: str) -> bool:
    """Whether the linear layer at `path`, or the weight of experts, is stored quantised, by the names and patterns of
    config.json."""
    if only_experts(stored) and not is_part(path, ["experts"]):
        return False
    names = [name for key in _DENSE for name in stored.get(key) or () if isinstance(name, str)]
    if method(stored) == "compressed-tensors":
        groups = (stored.get("config_groups") or {}).values()
        targets = [name for group in groups if group.get("weights") for name in group.get("targets") or ("Linear",)]
        return any(name == "Linear" or _is_named(path, name) for name in targets) and not any(
            _is_named(path, name) for name in names
        )
    rule = next((key for key in _dynamic(stored) if re.match(key.removeprefix("+:").removeprefix("-:"), path)), "")
    if rule.startswith("-:"):
        return False
    inside = stored.get("modules_in_block_to_quantize")
    if inside:
        named = [name for each in inside for name in ([each] if isinstance(each, str) else each)]
        return any(path.endswith(f".{name}") for name in named)
    # as transformers' `should_convert_module`
    return not any(re.match(rf"(?:{name})(?:(?<=\.)|(?=\.|$))", path) or path.endswith(name) for name in names)


_DENSE = ("modules_to_not_convert", "ignore", "llm_int8_skip_modules", "skip_modules")


def _is_named(path: str, name: str) -> bool:
    """Whether a name of compressed-tensors (a path, or 're:' and a pattern) is that of a layer."""
    return bool(re.match(name.removeprefix("re:"), path)) if name.startswith("re:") else path == name


def contradiction(asked: QuantConfig, held: Collection[str], how: Callable[[str], QuantConfig], linears: Collection[str]) -> str:
    """What of the options that are asked for does not agree with layers that stay as they are stored, or ''. Options at their
    default ask for nothing.

    Args:
        held: paths of those layers; `how` says how each is held. linears: paths of all linear layers.
    """
    default = QuantConfig()
    for skip in asked.skip_modules if asked.skip_modules != default.skip_modules else ():
        if any(is_part(path, [skip]) for path in held):
            return f"'{skip}' is stored quantised, and skip_modules names it"
        if not any(is_part(path, [skip]) for path in linears):
            return f"skip_modules '{skip}' matches no linear module"
    if not asked.pattern and all(getattr(asked, key) == getattr(default, key) for key in PER_LAYER):
        return ""
    for path in held:
        wanted, found = asked.for_layer(path), how(path)
        differ = [key for key in PER_LAYER if getattr(wanted, key) != getattr(found, key)]
        if asked_for := [key for key in differ if getattr(wanted, key) != getattr(default, key)]:
            key = asked_for[0]
            return f"'{path}' is stored with {key} {getattr(found, key)}, and {getattr(wanted, key)} is asked for"
        if "quant_type" in differ:
            return (
                f"'{path}' is stored with quant_type {found.quant_type}, and the options are for {wanted.quant_type}, the default"
            )
    return ""
