"""Matching of module paths by options: PEFT's and transformers' rules, in one place. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lownibble.errors import ConfigError

_T = TypeVar("_T")


def names(path: str, wanted: Iterable[str]) -> bool:
    """Whether one of `wanted` is the whole path or whole names at its end (PEFT's `target_modules` as a list)."""
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def is_part(path: str, wanted: Iterable[str]) -> bool:
    """Whether one of `wanted` is a whole name, or several, anywhere in the path (transformers' modules not to convert)."""
    return any(f".{name}." in f".{path}." for name in wanted)


def fits(path: str, pattern: str) -> bool:
    """Whether a pattern (PEFT's `rank_pattern`) matches this path: a regular expression for whole names at its end."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def by_pattern(path: str, patterns: Mapping[str, _T], default: _T) -> _T:
    """The value of the first pattern that matches the path, else `default`."""
    return next((value for pattern, value in patterns.items() if fits(path, pattern)), default)


def check_patterns(option: str, patterns: Iterable[str]) -> None:
    """Check that every pattern is a valid regular expression.

    Raises:
        ConfigError: names the option and the pattern.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{option} {pattern!r} is not a valid regular expression: {error}. Correct it.") from None
