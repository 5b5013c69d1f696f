"""Base class of all option groups, with uniform error messages; sizes in bytes, and TOML files.

An unknown key, a wrong type or a value out of range raises `ConfigError` naming the option, what it must be and what it got;
all problems are reported at once. No torch here: reading a configuration is instant.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, WithJsonSchema, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from lownibble.errors import ConfigError
from lownibble.registry import Registry

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}


@dataclass(frozen=True)
class Known:
    """Validator of a string field: it must be a name in a registry (`registry.py`), which plug-ins may extend."""

    names: Registry

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def check(value: str) -> str:
            if value not in self.names:
                raise PydanticCustomError("not_known", "not a known name")
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {**handler(schema), "enum": list(self.names)}


def members_of(field: FieldInfo) -> list[Any]:
    """The members of an option's union, without their bounds."""
    union = get_origin(field.annotation) in (Union, UnionType)
    return [
        get_args(m)[0] if get_origin(m) is Annotated else m for m in (get_args(field.annotation) if union else [field.annotation])
    ]


def kinds_of(field: FieldInfo) -> set[Any]:
    """The types an option accepts: members of a union, and the types of its literal choices."""
    members = members_of(field)
    literal = {type(c) for m in members if get_origin(m) is Literal for c in get_args(m)}
    return literal | {get_origin(m) or m for m in members if get_origin(m) is not Literal}


def _expectation(annotation: Any, metadata: tuple[Any, ...]) -> str:
    """What an option must be, in words, from its type and bounds."""
    if get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        metadata = (*metadata, *extra)
    known = next((each for each in metadata if isinstance(each, Known)), None)
    if known is not None:
        return "one of " + ", ".join(repr(name) for name in known.names)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        kinds = [_expectation(a, metadata) for a in get_args(annotation) if a is not NoneType]
        return " or ".join([*kinds, "none"] if NoneType in get_args(annotation) else kinds)
    if get_origin(annotation) is list:
        return "a list of " + _expectation(get_args(annotation)[0], ()).removeprefix("an ").removeprefix("a ") + " items"
    if get_origin(annotation) is dict:
        return "a table of name = value"
    words = _WORDS.get(annotation, f"a table of {annotation.__name__} options" if isinstance(annotation, type) else "valid")
    for bound in metadata:
        for kind, attribute, sign in ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<")):
            if isinstance(bound, kind):
                words += f" {sign} {getattr(bound, attribute):g}"
    return words


def _problem(owner: type[Options], error: ErrorDetails) -> str:
    """One line for one pydantic error, in the package's uniform format."""
    inner = error.get("ctx", {}).get("error")
    if isinstance(inner, ConfigError):
        return str(inner)
    if not error["loc"]:
        return f"{owner.__name__}: {error['msg'].removeprefix('Value error, ')}"
    key = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{owner.__name__} needs the option '{key}': {owner.model_fields[key].description}."
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, owner.model_fields, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'?" if near else f"Known options: {', '.join(owner.model_fields)}."
        return f"{owner.__name__} has no option '{key}'. {hint}"
    field = owner.model_fields[key]
    if error["type"] == "value_error":
        return f"The '{key}' of {owner.__name__}: {error['msg'].removeprefix('Value error, ')}"
    expected = _expectation(field.annotation, tuple(field.metadata))
    return f"The '{key}' of {owner.__name__} must be {expected}. Got {error['input']!r}."


_SIZE = r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kmgKMG][iI]?|)[bB]\s*"
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def n_bytes(size: str) -> int:
    """Parse a size to bytes: '64MB' is 64,000,000, '64MiB' is 64 x 2^20; also B, KB, GB, KiB, GiB and fractions.

    Raises:
        ValueError: it is not a size.
    """
    found = re.fullmatch(_SIZE, size)
    if found is None:
        raise ValueError(f"must be a size such as '64MB' or '1.5GiB'. Got {size!r}.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def is_a_size(value: str) -> str:
    """Validate a size and return it unchanged; for pydantic fields."""
    n_bytes(value)
    return value


Size = Annotated[str, AfterValidator(is_a_size), WithJsonSchema({"type": "string", "pattern": f"^{_SIZE}$"})]
"""A size in bytes: '64MB'."""


class Options(BaseModel):
    """A group of options: frozen, no unknown keys, uniform error messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            lines = dict.fromkeys(_problem(type(self), detail) for detail in error.errors())
            raise ConfigError("\n".join(lines)) from None

    @model_validator(mode="before")
    @classmethod
    def _are_what_they_look_like(cls, values: Any) -> Any:
        """pydantic would take true for 1, '8' for 8 and 'yes' for true; 'none' is how a file says that there is none."""
        if not isinstance(values, Mapping):
            return values
        taken = dict(values)
        for name, value in values.items():
            field = cls.model_fields.get(name)
            kinds = set() if field is None else kinds_of(field)
            if isinstance(value, str) and value == "none" and NoneType in kinds and str not in kinds:
                taken[name] = None
            elif isinstance(value, (bool, str)) and type(value) not in kinds and kinds <= {int, float, bool, NoneType} and kinds:
                assert field is not None
                expected = _expectation(field.annotation, tuple(field.metadata))
                raise ConfigError(f"The '{name}' of {cls.__name__} must be {expected}. Got {value!r}.")
        return taken

    def with_options(self, **changes: Any) -> Any:
        """A copy with top-level options replaced, validated again."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Every option with its resolved value, ready for JSON."""
        return self.model_dump(mode="json")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The contents of a TOML configuration file.

    Raises:
        ConfigError: the file cannot be read, or is not UTF-8 or not TOML.
    """
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration file '{path}': {error.strerror}. Check the path.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"'{path}' is not valid TOML: {error}. Mend that line.") from None
