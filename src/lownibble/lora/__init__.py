"""Low-rank adapters: which layers, the layer, injection, and files in PEFT's layout.

Importing this does no work, so that what needs no torch (`targets`) can be had without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lownibble.lora.adapter import load_adapter, read_config, save_adapter
    from lownibble.lora.inject import (
        add_lora,
        count_parameters,
        lora_layers,
        match_targets,
        plan,
        remove_adapter,
        set_adapter,
        trainable_summary,
    )
    from lownibble.lora.layer import LoraLinear, LowRank

_HOME = {
    **dict.fromkeys(("load_adapter", "read_config", "save_adapter"), "adapter"),
    **dict.fromkeys(
        (
            "add_lora",
            "count_parameters",
            "lora_layers",
            "match_targets",
            "plan",
            "remove_adapter",
            "set_adapter",
            "trainable_summary",
        ),
        "inject",
    ),
    **dict.fromkeys(("LoraLinear", "LowRank"), "layer"),
}

__all__ = [
    "LoraLinear", "LowRank", "add_lora", "count_parameters", "load_adapter", "lora_layers", "match_targets", "plan",
    "read_config", "remove_adapter", "save_adapter", "set_adapter", "trainable_summary",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lownibble.lora' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lownibble.lora.{_HOME[name]}"), name)
