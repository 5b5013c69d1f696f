"""The page's form: what each command takes, from the configuration that its flags are made of, and back to a command line.

A value travels as the text that its flag would take, under the option's dotted name ('train.max_steps'). There is no second list
of options: what is added to `config/` is on the page.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lownibble.config import (
    CompareConfig,
    EvalConfig,
    ExportConfig,
    MergeConfig,
    PlanConfig,
    QuantizeConfig,
    RowsConfig,
    RunConfig,
    ServeConfig,
)
from lownibble.errors import ConfigError
from lownibble.flags import default_of, read
from lownibble.leaves import flag_name, leaves
from lownibble.options import Known, Options, kinds_of


@dataclass(frozen=True)
class Command:
    """A command: its configuration, the options that are given without a flag, and the one that names its output."""

    config: type[Options]
    positional: tuple[str, ...] = ()
    output: str | None = None


COMMANDS = {
    "train": Command(RunConfig, output="train.output_dir"), "compare": Command(CompareConfig, output="train.output_dir"),
    "merge": Command(MergeConfig, ("adapter",), "output"), "export": Command(ExportConfig, ("source",), "output"),
    "quantize": Command(QuantizeConfig, ("model",), "output"), "eval": Command(EvalConfig, ("model",)),
    "serve": Command(ServeConfig, ("model",)), "data": Command(RowsConfig), "plan": Command(PlanConfig, ("model",)),
}  # fmt: skip
"""Commands that the page starts."""

NOT_SHOWN = ("api_key", "admin_key", "train.resume")
"""Options without a field: keys would be seen in the list of processes, and resuming is a button."""


def fields(command: str) -> list[dict[str, Any]]:
    """The fields of a command's form, ready for JSON: `name`, `group`, `flag`, `help`, `default` (text), `choices`, `open`
    (whether other values are valid, too), `numeric`."""
    config = COMMANDS[command].config
    return [_field(config, path, field) for path, field in leaves(config) if ".".join(path) not in NOT_SHOWN]


def _field(config: type[Options], path: tuple[str, ...], field: FieldInfo) -> dict[str, Any]:
    union = get_origin(field.annotation) in (Union, UnionType)
    choices, closed = [], True
    for member in get_args(field.annotation) if union else (field.annotation,):
        plain, *extra = get_args(member) if get_origin(member) is Annotated else (member, *field.metadata)
        known = next((each.names for each in extra if isinstance(each, Known)), ())
        if plain is bool:
            choices += ["true", "false"]
        elif get_origin(plain) is Literal or known:
            choices += [text_of(choice) for choice in known or get_args(plain)]
        elif plain is not type(None):
            closed = False
    kinds = kinds_of(field)
    return {
        "name": ".".join(path), "group": path[0] if len(path) > 1 else "", "flag": "--" + flag_name(path, field),
        "help": field.description or "", "default": text_of(default_of(config, path, field)), "choices": choices,
        "open": not closed, "numeric": not kinds.isdisjoint({int, float}) and kinds <= {int, float, type(None)},
    }  # fmt: skip


def text_of(value: Any) -> str:
    """A default as a flag's text; '' if there is none."""
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(text_of, value))
    return "" if value == {} else f"{value:g}" if isinstance(value, float) else str(value)


def configuration(command: str, values: Mapping[str, str]) -> Any:
    """The configuration that a form's values make.

    Raises:
        ConfigError: an option is unknown to the command, or its value is not valid.
    """
    if command not in COMMANDS:
        raise ConfigError(f"There is no command '{command}'. Known: {', '.join(COMMANDS)}.")
    config = COMMANDS[command].config
    known = {".".join(path) for path, _ in leaves(config)} - set(NOT_SHOWN)
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"'{command}' has no option {', '.join(unknown)}. Load the page again if Lownibble was updated.")
    return read(Namespace(**values), config)


def command_line(command: str, values: Mapping[str, str]) -> list[str]:
    """The words after `lownibble` that do what a form says.

    Raises:
        ConfigError: as `configuration`, or a word that would be taken for a flag stands where none is.
    """
    configuration(command, values)
    spec, words = COMMANDS[command], [command]
    words += [values[name] for name in spec.positional if name in values]
    if wrong := [word for word in words if word.startswith("-")]:
        raise ConfigError(f"'{wrong[0]}' would be taken for an option. Write a path as ./{wrong[0]}.")
    for path, field in leaves(spec.config):
        name, flag = ".".join(path), "--" + flag_name(path, field)
        if name not in values or name in spec.positional:
            continue
        value = values[name]
        if field.annotation is bool:
            words.append(flag if value.lower() == "true" else flag.replace("--", "--no-", 1))
        elif value.startswith("-") or bool in kinds_of(field):
            words.append(f"{flag}={value}")
        else:
            words += [flag, value]
    return words


def taken_by(command: str, values: Mapping[str, str], origin: str) -> dict[str, str]:
    """Of a form's values, those that another command has by the same name; and the defaults of the form's own command, `origin`,
    where the other's are not the same."""
    its, taken = _defaults(origin) if origin in COMMANDS else {}, {}
    for name, default in _defaults(command).items():
        if name in values:
            taken[name] = values[name]
        elif its.get(name, "") not in ("", default):
            taken[name] = its[name]
    return taken


def _defaults(command: str) -> dict[str, str]:
    config = COMMANDS[command].config
    return {".".join(path): text_of(default_of(config, path, field)) for path, field in leaves(config)}
