"""Low-rank adapters: the layer, injection, and files in PEFT's layout."""

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

__all__ = [
    "LoraLinear", "LowRank", "add_lora", "count_parameters", "load_adapter", "lora_layers", "match_targets", "plan",
    "read_config", "remove_adapter", "save_adapter", "set_adapter", "trainable_summary",
]  # fmt: skip
