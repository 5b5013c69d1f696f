"""Rows and data sets, as every source produces them and the rest of the pipeline consumes them.

A row records its origin, so that an error found later (a missing field, no label token left) still names the file and line.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lownibble.data.dialects import is_padded, standard
from lownibble.errors import DataError

SHOWN_PROBLEMS = 5
"""Maximum number of bad rows listed in one error; the others are counted."""


@dataclass(frozen=True)
class Row:
    """One row: its fields by name, and its origin such as 'train.jsonl:12'."""

    fields: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class Dataset:
    """Named rows, those in other tools' formats converted (`dialects.py`); a source may provide default templates, used if the
    configuration has none. `padded`: `dialects.is_padded` of all rows; a part of the rows keeps it."""

    name: str
    rows: list[Row]
    prompt_template: str | None = None
    completion_template: str | None = None
    padded: bool | None = None

    def __post_init__(self) -> None:
        padded = is_padded(row.fields for row in self.rows) if self.padded is None else self.padded
        object.__setattr__(self, "padded", padded)
        object.__setattr__(self, "rows", [Row(standard(row.fields, padded=padded), row.origin) for row in self.rows])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the rows' canonical content, in order; origins are excluded."""
        state = hashlib.sha256()
        for row in self.rows:
            state.update(canonical(row.fields))
            state.update(b"\n")
        return state.hexdigest()


def canonical(value: Any) -> bytes:
    """Canonical bytes, equal for equal content: JSON with sorted keys; types that JSON lacks (dates, bytes) as their str()."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")


@dataclass
class Problems:
    """Collects bad rows so that one error lists the first few of them."""

    source: str
    found: list[str] = field(default_factory=list)

    def add(self, origin: str, what: str) -> None:
        """Record a bad row: what is wrong with it, and the remedy."""
        self.found.append(f"{origin}: {what}")

    def check(self) -> None:
        """Raise one error for the recorded rows, if there are any.

        Raises:
            DataError: at least one bad row was added.
        """
        if not self.found:
            return
        lines = self.found[:SHOWN_PROBLEMS]
        if len(self.found) > SHOWN_PROBLEMS:
            lines.append(f"and {len(self.found) - SHOWN_PROBLEMS} more bad rows in {self.source}")
        raise DataError("\n".join(lines))
