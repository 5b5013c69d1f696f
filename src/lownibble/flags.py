"""Command-line flags, derived from `config/`: one flag per option, with its type, choices, default and description.

An omitted flag is absent from the parsed arguments, so that it does not override the TOML file. Values are converted by
their option's type (TOML for lists and tables) and validated only by the configuration classes.

A shell hands on `\\n` as two characters, so in options that are texts for a model (`escapes` in their field) `\\n`, `\\t` and
`\\\\` are a new line, a tab and a backslash, as in a TOML file.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from contextlib import suppress
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lownibble.errors import ConfigError
from lownibble.leaves import GROUPS, build, flag_name, leaves
from lownibble.options import Options, kinds_of, members_of, read_toml


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


def read(arguments: argparse.Namespace, config: type[Options], toml: str | None = None, of: type[Options] | None = None) -> Any:
    """Build the configuration from defaults, a TOML file (if given) and the flags; later sources take precedence.

    Args:
        of: whose file it may be as well: what only that one has is left out.
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
    unused = set() if of is None else of.model_fields.keys() - config.model_fields.keys()
    return build(config, {key: value for key, value in (read_toml(toml) if toml else {}).items() if key not in unused}, given)


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


def _words(field: FieldInfo) -> list[str]:
    """The literal choices of a union."""
    return [c for m in get_args(field.annotation) if get_origin(m) is Literal for c in get_args(m)]


def _metavar(field: FieldInfo) -> str:
    kinds = kinds_of(field)
    return next((word for kind, word in ((int, "N"), (float, "X"), (list, "LIST"), (dict, "TABLE")) if kind in kinds), "VALUE")


def _has_numbers(field: FieldInfo) -> bool:
    """Whether an option's list is one of integers."""
    lists = (member for member in members_of(field) if get_origin(member) is list)
    return any((get_args(item)[0] if get_origin(item) is Annotated else item) is int for of in lists for item in get_args(of))


def _parts(text: str, field: FieldInfo) -> list[str] | None:
    """The parts of a comma-separated list; None where an option may also be a text, and the parts are no names (or numbers, in a
    list of them): then it is one, such as a regular expression."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    plain = r"\d+" if _has_numbers(field) else r"[\w.-]+"
    return parts if str not in kinds_of(field) or all(re.fullmatch(plain, part) for part in parts) else None


_ESCAPED = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}


def _text(text: str, field: FieldInfo) -> str:
    extra = field.json_schema_extra
    if not (isinstance(extra, dict) and extra.get("escapes")):
        return text
    return re.sub(r"\\[nt\\]", lambda found: _ESCAPED[found[0]], text)


def _parse(value: Any, field: FieldInfo, flag: str) -> Any:
    """Convert a flag's text: 'none' where None is allowed, booleans, numbers, TOML or comma-separated lists, tables, texts."""
    if isinstance(value, list):
        if len(value) == 1:
            return _parse(value[0], field, flag)
        found = [(word, _parts(word, field)) for word in value]
        if _has_numbers(field) and any(parts is None for _, parts in found):
            return _text(" ".join(value), field)
        return [part for word, parts in found for part in ([word] if parts is None else parts)]
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
            if str not in kinds:
                raise ConfigError(f'--{flag} takes a TOML value such as {{q_proj = 8}} or ["a", "b"]. Got {value!r}.') from None
    if kinds & {int, float} and str not in kinds:
        with suppress(ValueError):
            return int(value) if value.lstrip("-").isdecimal() else float(value)
    if list in kinds and (str not in kinds or "," in value or value == "") and (parts := _parts(value, field)) is not None:
        return parts
    return _text(value, field)
