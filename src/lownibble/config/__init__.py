"""Every option of Lownibble, defined once.

The same classes feed Python (`ln.LoraConfig(r=8)`), TOML files (tables `[lora]`, `[train]`, ...), command-line flags (derived
in `flags.py`) and the resolved configuration stored with every result. Names are PEFT's, transformers' and bitsandbytes'
where the meaning is the same. A leaf's name is unique over all groups, so that it can be a flag of its own.

Validation of option groups and its error messages are in `options.py`.
"""

from lownibble.config.commands import (
    COMPARE_TRAIN,
    FOR_ADAPTERS,
    PACKED,
    CompareConfig,
    Data,
    EvalConfig,
    ExportConfig,
    MergeConfig,
    PlanConfig,
    PushConfig,
    QuantizeConfig,
    RowsConfig,
    RunConfig,
    ServeConfig,
    StudioConfig,
)
from lownibble.config.groups import (
    CHECKPOINTING,
    CORRECT,
    FIXED,
    KEEP_THEIR_START,
    LOOK_AT_INPUTS,
    NEXT_TOKEN,
    PER_LAYER,
    PREFERENCE,
    SMOOTHED,
    Checkpointing,
    DataConfig,
    LoraConfig,
    QuantConfig,
    TrainConfig,
)
from lownibble.config.methods import METHODS, PARALLEL, Method, MethodSpec, NamedMethod, Parallel, method_named

__all__ = [
    "CHECKPOINTING", "COMPARE_TRAIN", "CORRECT", "FIXED", "FOR_ADAPTERS", "KEEP_THEIR_START", "LOOK_AT_INPUTS", "METHODS",
    "NEXT_TOKEN", "PACKED", "PARALLEL", "PER_LAYER", "PREFERENCE", "SMOOTHED", "Checkpointing", "CompareConfig", "Data",
    "DataConfig", "EvalConfig", "ExportConfig", "LoraConfig", "MergeConfig", "Method", "MethodSpec", "NamedMethod", "Parallel",
    "PlanConfig", "PushConfig", "QuantConfig", "QuantizeConfig", "RowsConfig", "RunConfig", "ServeConfig", "StudioConfig",
    "TrainConfig", "method_named",
]  # fmt: skip
