"""How an adapter's targets are named in its configuration, so that PEFT adapts the same layers.

PEFT matches modules by their last names, and weights of experts by `target_parameters`. On mixtures whose experts transformers
fuses it reads some names (`TAKEN_FOR_EXPERTS`) in `target_modules` as those of the experts' former layers, and looks for them
among the fused weights: adapters on shared experts or on dense layers of such a model would be lost. Their weights are therefore
named in `target_parameters`, which PEFT wraps with the same tensors under the same keys.

Where PEFT renames tensors that are called as they should be (`renamed`), no file can be right for it: `save_adapter` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lownibble.config import LoraConfig
from lownibble.lora.active import lora_layers
from lownibble.lora.experts import copied_weights, is_experts, named_experts
from lownibble.lora.targets import OF_LINEAR, alpha_of, rank_of
from lownibble.models.conversion import fuses_experts

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""PEFT's prefix of module paths in its files."""

TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names in `target_modules` that PEFT (0.18 and later) takes for experts' on mixtures."""

_ESCAPED = re.escape(OF_LINEAR)


def folder_of(path: str | Path) -> Path:
    """The folder called `path`, `~` expanded, and one that is called '.' or '..' by its own name, which outputs are named by."""
    folder = Path(path).expanduser()
    return folder if folder.name not in ("", "..") else folder.resolve()


def named(model: nn.Module, config: LoraConfig, name: str) -> dict[str, Any]:
    """The options of the file's configuration that say which layers the adapter `name` has, and of what rank."""
    layers = dict(lora_layers(model, name))
    experts = {path for path, layer in layers.items() if is_experts(layer)}
    linears = layers.keys() - experts
    mistaken = set(_mistaken(model, config, linears))
    parameters = [
        *_short(experts, {*named_experts(model), *copied_weights(model)}),
        *_short(mistaken, _weights(model), OF_LINEAR),
    ]
    if config.target_modules != "all-linear" and not mistaken:
        parameters += [wanted for wanted in config.target_parameters if wanted.endswith(OF_LINEAR)]
    found: dict[str, Any] = {
        "target_modules": config.target_modules, "target_parameters": parameters or None, **_patterns(config, mistaken)
    }  # fmt: skip
    if config.target_modules == "all-linear" or mistaken:
        rest = linears - mistaken
        whole = config.layers_to_transform is None
        found["target_modules"] = _short(rest, _outside(model, rest)) if whole else sorted(rest)
        found["layers_to_transform"] = found["layers_pattern"] = None  # the paths say it
    return found


def read_patterns(values: dict[str, Any]) -> dict[str, Any]:
    """A file's configuration with patterns for a linear layer's weight as patterns for the layer."""
    patterns = {key: values[key] for key in ("rank_pattern", "alpha_pattern") if values.get(key)}
    return {
        **values, **{key: {p.removesuffix(_ESCAPED): value for p, value in given.items()} for key, given in patterns.items()}
    }  # fmt: skip


def renamed(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Key of an adapter's file -> the name in the model under which PEFT looks it up, for those that are called otherwise there.

    PEFT (0.21: `transformers_weight_conversion.py`) renames an adapter's tensors as transformers renames a checkpoint's, and
    takes that back where no more than a prefix was lost. A rule that also fits names of the model's own misplaces them.
    """
    if get_checkpoint_conversion_mapping(getattr(model.config, "model_type", None)) is None:
        return {}
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    rules = [WeightRenaming(f"{PREFIX}model.", "model."), WeightRenaming(PREFIX, ""), *rules]
    names = {key: rename_source_key(key, rules, [])[0] for key in keys if ".lora_" in key}
    return {key: name for key, name in names.items() if not key.endswith(name)}


def _mistaken(model: nn.Module, config: LoraConfig, linears: set[str]) -> list[str]:
    """Linear layers that PEFT would take for experts'; none with dropout or DoRA, which it refuses for parameters."""
    if config.lora_dropout or config.use_dora or not fuses_experts(model):
        return []
    return [path for path in linears if path.rpartition(".")[2] in TAKEN_FOR_EXPERTS]


def _short(paths: set[str], candidates: set[str], end: str = "") -> list[str]:
    """`paths` by their last names if those select no other candidate, else whole; each with `end`."""
    names = {path.rpartition(".")[2] for path in paths}
    same = {path for path in candidates if path.rpartition(".")[2] in names} == paths
    return sorted(f"{each}{end}" for each in (names if same else paths))


def _weights(model: nn.Module) -> set[str]:
    """Paths of modules that PEFT finds a weight in."""
    paths = {path for path, module in model.named_modules() if hasattr(module, "weight")}
    return {path for path in paths if path.rpartition(".")[2] not in ("base", "base_layer") and ".adapters." not in path}


def _outside(model: nn.Module, adapted: set[str]) -> set[str]:
    """Paths of all modules but parts of adapted layers (their base and adapters)."""

    def inside(path: str) -> bool:
        parents = path.split(".")[:-1]
        return any(".".join(parents[:n]) in adapted for n in range(1, len(parents) + 1))

    return {path for path, _ in model.named_modules() if not inside(path)}


def _patterns(config: LoraConfig, mistaken: set[str]) -> dict[str, Any]:
    """The patterns for ranks and scales, with those that PEFT would look up by the name of a weight."""
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for path in sorted(mistaken):
        if rank_of(path, config) != config.r:
            ranks[f"{re.escape(path)}{_ESCAPED}"] = rank_of(path, config)
        if alpha_of(path, config) != config.lora_alpha:
            alphas[f"{re.escape(path)}{_ESCAPED}"] = alpha_of(path, config)
    return {"rank_pattern": ranks, "alpha_pattern": alphas}
