"""Lownibble: LoRA or QLoRA for your model, data and GPU, measured side by side; then trained, merged and served.

Imports are lazy: each name is loaded from its module on first use, so that torch is imported only if needed. `__all__` is the
public interface; everything else may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lownibble.waiting import wait_briefly

if TYPE_CHECKING:
    from lownibble.config import CompareConfig, DataConfig, LoraConfig, PlanConfig, QuantConfig, RunConfig, TrainConfig
    from lownibble.decoding.generate import decode, drop_cache
    from lownibble.exporting.convert import export
    from lownibble.exporting.merge import merge
    from lownibble.exporting.quantize import quantize_model
    from lownibble.hub.push import push
    from lownibble.kernels.ops import use_backend
    from lownibble.lora import add_lora, load_adapter, save_adapter, set_adapter, trainable_summary
    from lownibble.models.load import load
    from lownibble.optim import OptimizerSpec
    from lownibble.quant import Codec, PackedWeight, QuantLinear, dequantize, quantize
    from lownibble.quant import PackedWeight as QuantizedTensor
    from lownibble.rehearsal.plan import plan
    from lownibble.study.compare import compare
    from lownibble.training.objectives import Objective
    from lownibble.training.run import TrainResult, run, train

__version__ = "0.1.0"

wait_briefly()

_HOME = {
    **dict.fromkeys(("CompareConfig", "DataConfig", "LoraConfig", "PlanConfig", "QuantConfig"), "config"),
    **dict.fromkeys(("RunConfig", "TrainConfig"), "config"),
    **dict.fromkeys(("Codec", "PackedWeight", "QuantLinear", "QuantizedTensor", "dequantize", "quantize"), "quant"),
    **dict.fromkeys(("add_lora", "load_adapter", "save_adapter", "set_adapter", "trainable_summary"), "lora"),
    **dict.fromkeys(("TrainResult", "run", "train"), "training"), "Objective": "training.objectives", "OptimizerSpec": "optim",
    **dict.fromkeys(("decode", "drop_cache"), "decoding.generate"), "compare": "study.compare", "export": "exporting.convert",
    "load": "models", "merge": "exporting.merge", "plan": "rehearsal.plan", "push": "hub.push",
    "quantize_model": "exporting.quantize", "use_backend": "kernels.ops",
}  # fmt: skip
"""Public name -> its module."""

__all__ = [
    "Codec", "CompareConfig", "DataConfig", "LoraConfig", "Objective", "OptimizerSpec", "PackedWeight", "PlanConfig",
    "QuantConfig", "QuantLinear", "QuantizedTensor", "RunConfig", "TrainConfig", "TrainResult", "__version__", "add_lora",
    "compare", "decode", "dequantize", "drop_cache", "export", "load", "load_adapter", "merge", "plan", "push", "quantize",
    "quantize_model", "run", "save_adapter", "set_adapter", "train", "trainable_summary", "use_backend",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lownibble' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"lownibble.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
