"""Read an adapter's configuration, adapter_config.json, as PEFT or this package wrote it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lownibble.config import LoraConfig
from lownibble.errors import AdapterError, ConfigError
from lownibble.lora import portable
from lownibble.lora.portable import CONFIG_FILE, folder_of

_INERT: dict[str, Any] = {
    "arrow_config": None, "auto_mapping": ..., "base_model_name_or_path": ...,
    "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "fan_in_fan_out": ...,
    "inference_mode": ..., "layer_replication": None, "loftq_config": ..., "lora_bias": False,
    "megatron_config": None, "megatron_core": ..., "peft_type": "LORA", "peft_version": ..., "qalora_group_size": ...,
    "revision": ..., "runtime_config": ..., "task_type": ..., "trainable_token_indices": None,
    "use_qalora": False, "use_rslora": ..., "use_bdlora": None,
}  # fmt: skip
"""PEFT options that Lownibble has no counterpart for -> the value that means 'off' (`...`: no effect on the weights)."""

_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values (or prefixes) of PEFT's `init_lora_weights` that modify the base, so that the adapter fits only the modified base."""


def read_config(folder: str | Path) -> LoraConfig:
    """The `LoraConfig` of an adapter folder written by Lownibble or PEFT.

    Raises:
        AdapterError: no such file, not JSON, not LoRA, or it uses something Lownibble does not implement (named).
    """
    return to_config(folder_of(folder) / CONFIG_FILE, read_values(folder))


def read_values(folder: str | Path) -> dict[str, Any]:
    """What the file of an adapter folder says.

    Raises:
        AdapterError: there is none, or it is no JSON object.
    """
    path = folder_of(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"'{folder}' holds no adapter: {CONFIG_FILE} is missing. Point to the folder that has it.") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"Cannot read '{path}': {error}. Save the adapter again.") from None
    if not isinstance(values, dict):
        raise AdapterError(f"Cannot read '{path}': it is not a JSON object. Save the adapter again.")
    return values


def to_config(path: Path, values: dict[str, Any]) -> LoraConfig:
    """The `LoraConfig` of what the file at `path` says.

    Raises:
        AdapterError: as `read_config`.
    """
    values = portable.read_patterns(values)
    known = {key: value for key, value in values.items() if key in LoraConfig.model_fields and value is not None}
    if known.get("alora_invocation_tokens") == []:  # plain LoRA to PEFT
        del known["alora_invocation_tokens"]
    for key, value in values.items():
        off = _INERT.get(key)
        if key not in known and off is not ... and value != off and value not in (None, False, [], {}):
            raise AdapterError(f"'{path}' uses {key} = {value!r}, which Lownibble does not implement. Merge it with PEFT first.")
    absent = [key for key in ("r", "lora_alpha", "target_modules") if key not in known]
    if absent:
        raise AdapterError(f"'{path}' does not say {', '.join(absent)}. Save the adapter again.")
    start = known.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise AdapterError(
            f"'{path}' was started with init_lora_weights = {start!r}, which changes the base weights. "
            "Save it again with PEFT's path_initial_model_for_weight_conversion."
        )
    excluded = known.get("exclude_modules")
    if isinstance(excluded, str) and re.fullmatch(r"[\w.]+", excluded):  # a pattern to PEFT; a name here
        known["exclude_modules"] = f"(?:{excluded})"
    if isinstance(known.get("layers_to_transform"), int):
        known["layers_to_transform"] = [known["layers_to_transform"]]
    if known.get("init_lora_weights") not in (True, False, "gaussian"):
        known["init_lora_weights"] = True  # the initialisation no longer matters
    known["target_experts"] = False  # those of a file are its target_parameters
    try:
        return LoraConfig(**known)
    except ConfigError as error:
        raise AdapterError(f"'{path}' cannot be used: {error}") from None
