"""Command-line flags, derived from `config/`: one flag per option, with its type, choices, default and description.

An omitted flag is absent from the parsed arguments, so that it does not override the TOML file. Values are converted by
their option's type (TOML for lists and tables) and validated only by the configuration classes.
"""

from __future__ import annotations

import argparse
import tomllib
from contextlib import suppress
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lownibble.errors import ConfigError
from lownibble.leaves import GROUPS, build, flag_name, leaves
from lownibble.options import Options, read_toml


def add_flags(parser: argparse.ArgumentParser, config: type[Options], positional: tuple[str, ...] = ()) -> None:
    """Add every option of `config` to the parser, grouped as in the configuration, except the `positional` ones."""
    groups = {
        name: parser.add_argument_group(f"{name} options ([{name}] in TOML)") for name in GROUPS if name in config.model_fields
    }  # fmt: skip
    for path, field in leaves(config):
        if path[0] in positional:
            continue
        target = groups[path[0]] if len(path) > 1 else parser
        default = default_of(config, path, field)
        shown = "" if default in (None, PydanticUndefined) else f" (default: {default})"
        text = f"{field.description or path[-1]}{shown}".replace("%", "%%")
        name, dest = "--" + flag_name(path, field), ".".join(path)
        if _is_bool(field):
            action = argparse.BooleanOptionalAction
            target.add_argument(name, dest=dest, action=action, default=argparse.SUPPRESS, help=text)
        elif {bool, str} == kinds_of(field):
            words = "|".join(("true", "false", *_words(field)))
            target.add_argument(name, f"--no-{name[2:]}", dest=dest, action=_Switch, help=text, metavar=words)
        elif list in kinds_of(field):
            metavar = "METHOD" if path == ("methods",) else _metavar(field)
            target.add_argument(name, dest=dest, nargs="+", action=_Words, default=argparse.SUPPRESS, help=text, metavar=metavar)
        else:
            target.add_argument(name, dest=dest, default=argparse.SUPPRESS, help=text, metavar=_metavar(field))


def read(arguments: argparse.Namespace, config: type[Options], toml: str | None = None) -> Any:
    """Build the configuration from defaults, a TOML file (if given) and the flags; later sources take precedence.

    Raises:
        ConfigError: an unknown key or an invalid value in the TOML file or the flags.
    """
    given: dict[str, Any] = {}
    for path, field in leaves(config):
        dest = ".".join(path)
        if hasattr(arguments, dest):
            value = _parse(getattr(arguments, dest), field, flag_name(path, field))
            if len(path) > 1:
                given.setdefault(path[0], {})[path[1]] = value
            else:
                given[path[0]] = value
    return build(config, read_toml(toml) if toml else {}, given)


class _Words(argparse.Action):
    """Several words, or the flag several times, are one list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *values])


class _Switch(argparse.Action):
    """On, off, or a word: `--flag` is true, `--no-flag` is false, `--flag word`."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        off = str(option_string).startswith("--no-")
        if off and values is not None:
            parser.error(f"{option_string} takes no value")
        setattr(namespace, self.dest, "false" if off else values or "true")


def default_of(config: type[Options], path: tuple[str, ...], field: FieldInfo) -> Any:
    """An option's default; None or `PydanticUndefined` if it has none."""
    if len(path) > 1:
        return getattr(config.model_fields[path[0]].default, path[1])
    return field.default


def _is_bool(field: FieldInfo) -> bool:
    return field.annotation is bool


def kinds_of(field: FieldInfo) -> set[Any]:
    """The types an option accepts: members of a union, and the types of its literal choices."""
    union = get_origin(field.annotation) in (Union, UnionType)
    members = [
        get_args(m)[0] if get_origin(m) is Annotated else m for m in (get_args(field.annotation) if union else [field.annotation])
    ]
    literal = {type(c) for m in members if get_origin(m) is Literal for c in get_args(m)}
    return literal | {get_origin(m) or m for m in members if get_origin(m) is not Literal}


def _words(field: FieldInfo) -> list[str]:
    """The literal choices of a union."""
    return [c for m in get_args(field.annotation) if get_origin(m) is Literal for c in get_args(m)]


def _metavar(field: FieldInfo) -> str:
    kinds = kinds_of(field)
    return next((word for kind, word in ((int, "N"), (float, "X"), (list, "LIST"), (dict, "TABLE")) if kind in kinds), "VALUE")


def _parse(value: Any, field: FieldInfo, flag: str) -> Any:
    """Convert a flag's text: 'none' where None is allowed, booleans, numbers, TOML or comma-separated lists, TOML tables."""
    if isinstance(value, list):
        if len(value) == 1:
            return _parse(value[0], field, flag)
        return [item for word in value for item in word.split(",") if item]
    if not isinstance(value, str):
        return value
    kinds = kinds_of(field)
    if value.lower() == "none" and type(None) in kinds:
        return None
    if value.lower() in ("true", "false") and bool in kinds:
        return value.lower() == "true"
    if dict in kinds or (list in kinds and value.startswith("[")):
        try:
            return tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            raise ConfigError(f'--{flag} takes a TOML value such as {{q_proj = 8}} or ["a", "b"]. Got {value!r}.') from None
    if kinds & {int, float} and str not in kinds:
        with suppress(ValueError):
            return int(value) if value.lstrip("-").isdecimal() else float(value)
    if list in kinds and (str not in kinds or "," in value or value == ""):
        return [item for item in value.split(",") if item]
    return value
