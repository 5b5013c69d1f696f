"""The options of a command as one flat list: for flags, TOML files and tables of what differed.

A configuration holds groups (`data`, `quant`, `lora`, `train`); a leaf is one option, by its path: ('model',), ('lora', 'r'). A
command that needs part of a group takes the options in `TAKES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

from lownibble.config import (
    PACKED,
    DataConfig,
    EvalConfig,
    ExportConfig,
    MergeConfig,
    PlanConfig,
    QuantizeConfig,
    RowsConfig,
    ServeConfig,
)
from lownibble.options import Options

PLANNED = {
    "data": ("path", "split", "prompt_template", "completion_template", "use_chat_template", "max_rows", "calibration_tokens"),
    "quant": PACKED,
    "lora": (
        "r", "use_dora", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "rank_pattern", "target_parameters", "target_experts",
    ),
    "train": (
        "num_train_epochs", "batch_size", "max_length", "packing", "gradient_accumulation_steps", "gradient_checkpointing",
        "optim", "optim_page_budget", "torch_compile", "cuda_graphs", "parallel", "fsdp_cpu_offload", "objective",
        "precompute_ref_log_probs",
    ),
}  # fmt: skip
"""Group -> its options that affect a plan; others may be given and have no effect."""

MERGED = {
    "data": (
        "path",
        "eval_path",
        "split",
        "eval_split",
        "prompt_template",
        "completion_template",
        "use_chat_template",
        "mask_prompt",
    ),
    "quant": PACKED,
}

ONLY_QUANT = {"quant": PACKED}

EVALUATED = {
    "data": tuple(DataConfig.model_fields),
    "quant": PACKED,
    "lora": (),
    "train": ("batch_size", "max_length"),
}

TAKES: dict[type[Options], Mapping[str, tuple[str, ...]]] = {
    PlanConfig: PLANNED,
    EvalConfig: EVALUATED,
    RowsConfig: {"data": tuple(DataConfig.model_fields), "train": ("max_length", "objective")},
    MergeConfig: MERGED,
    ExportConfig: ONLY_QUANT,
    QuantizeConfig: ONLY_QUANT,
    ServeConfig: ONLY_QUANT,
}
"""Configuration -> the options of its groups that it accepts; configurations not listed accept all."""

GROUPS = ("data", "quant", "lora", "train")
"""Fields of a run's configuration that are groups; in TOML they are tables."""


def leaves(config: type[Options]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """(path, field) of every option of a run's configuration, groups expanded: ('model',), ('lora', 'r'), ..."""
    for name, field in config.model_fields.items():
        if name in GROUPS:
            group = next(
                a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type) and issubclass(a, Options)
            )
            for inner, inner_field in group.model_fields.items():
                if TAKES.get(config) is None or inner in TAKES[config][name]:
                    yield (name, inner), inner_field
        else:
            yield (name,), field


def flag_name(path: tuple[str, ...], field: FieldInfo) -> str:
    """The command-line name of an option, without dashes: 'max-steps', or the field's own 'flag'."""
    extra = field.json_schema_extra
    return str(extra["flag"]) if isinstance(extra, dict) and "flag" in extra else path[-1].replace("_", "-")


def build(config: type[Options], *layers: dict[str, Any]) -> Any:
    """Build a configuration from defaults and layers of values; later ones override key by key, groups merge with defaults."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key == "data" and isinstance(value, str):
                value = {"path": value}
            if key in GROUPS and isinstance(value, dict) and isinstance(merged.get(key, {}), dict):
                merged[key] = {**merged.get(key, {}), **value}
            elif key in GROUPS and key in merged and not isinstance(merged[key], dict):
                continue  # no table, though it must be one: told by the validation
            else:
                merged[key] = value
    for key in GROUPS:
        if isinstance(merged.get(key), dict) and key in config.model_fields:
            default: Options = config.model_fields[key].default
            merged[key] = {**{name: getattr(default, name) for name in default.model_fields_set}, **merged[key]}
    return config(**merged)
