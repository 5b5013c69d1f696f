"""`lownibble schema`: the options of the commands as JSON Schema (draft 2020-12), from the classes that flags are made of.

For editors, forms and agents: a TOML file that the schema refuses would not load (but 'none', where there may be none). The
reverse does not hold: what depends on several options together (packing with group_by_length) is checked when the configuration
is made, and a file or model must exist. An option's `flag` is its name on the command line where that differs; `escapes`: there
it has new lines as `\\n`. Names of codecs, optimisers and the like are those known here, plug-ins' too.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from lownibble.config import (
    CompareConfig,
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
from lownibble.errors import ConfigError
from lownibble.options import Options
from lownibble.study.spec import StudySpec

CONFIGS: dict[str, type[Options]] = {
    "train": RunConfig, "compare": CompareConfig, "study": StudySpec, "plan": PlanConfig, "data": RowsConfig, "eval": EvalConfig,
    "merge": MergeConfig, "export": ExportConfig, "quantize": QuantizeConfig, "push": PushConfig, "serve": ServeConfig,
    "studio": StudioConfig,
}  # fmt: skip
"""Command -> its options; of `study`, the file that `study run` takes."""


def schema(command: str | None = None) -> dict[str, Any]:
    """JSON Schema of one command's options, or of an object with those of each command by its name.

    Raises:
        ConfigError: no command of that name has options.
    """
    head = {"$schema": GenerateJsonSchema.schema_dialect}
    if command is not None and command not in CONFIGS:
        raise ConfigError(f"There are no options of '{command}'. Give one of {', '.join(CONFIGS)}, or none for all.")
    if command is not None:
        return {**head, **CONFIGS[command].model_json_schema()}
    refs, shared = models_json_schema([(config, "validation") for config in CONFIGS.values()], title="Options of lownibble")
    commands = {name: refs[config, "validation"] for name, config in CONFIGS.items()}
    return {**head, **shared, "type": "object", "properties": commands, "additionalProperties": False}
