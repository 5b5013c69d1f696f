"""Low-rank adapters: target selection, the layer, injection, and files in PEFT's format.

Imports are lazy, so that `targets`, which needs no torch, can be used without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lownibble.lazy import lazily

if TYPE_CHECKING:
    from lownibble.lora.active import count_parameters, lora_layers, remove_adapter, set_adapter, trainable_summary
    from lownibble.lora.adapter import load_adapter, save_adapter
    from lownibble.lora.configuration import read_config
    from lownibble.lora.inject import add_lora, match_targets, plan
    from lownibble.lora.layer import LoraLinear, LowRank

_HOME = {
    **dict.fromkeys(("load_adapter", "save_adapter"), "adapter"),
    "read_config": "configuration",
    **dict.fromkeys(("count_parameters", "lora_layers", "remove_adapter", "set_adapter", "trainable_summary"), "active"),
    **dict.fromkeys(("add_lora", "match_targets", "plan"), "inject"),
    **dict.fromkeys(("LoraLinear", "LowRank"), "layer"),
}

__all__ = [
    "LoraLinear", "LowRank", "add_lora", "count_parameters", "load_adapter", "lora_layers", "match_targets", "plan",
    "read_config", "remove_adapter", "save_adapter", "set_adapter", "trainable_summary",
]  # fmt: skip

__getattr__ = lazily(__name__, _HOME)
