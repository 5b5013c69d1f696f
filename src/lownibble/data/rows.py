"""Rows and data sets: what every source gives and everything after it takes.

A row keeps where it came from, so that an error found later (a missing field, no label token left) still names file and
line.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lownibble.errors import DataError

SHOWN_PROBLEMS = 5
"""Bad rows that one error spells out; the others are counted."""


@dataclass(frozen=True)
class Row:
    """One row: its fields by name, and its origin such as 'train.jsonl:12'."""

    fields: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class Dataset:
    """Rows with a name; a source may bring the templates that suit it, used where the configuration has none."""

    name: str
    rows: list[Row]
    prompt_template: str | None = None
    completion_template: str | None = None

    @cached_property
    def digest(self) -> str:
        """sha256 over the rows' canonical content, in order; origins do not count."""
        state = hashlib.sha256()
        for row in self.rows:
            state.update(canonical(row.fields))
            state.update(b"\n")
        return state.hexdigest()


def canonical(value: Any) -> bytes:
    """Bytes that are equal for equal content: JSON with sorted keys; what JSON cannot hold (dates, bytes) by its str()."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")


@dataclass
class Problems:
    """Bad rows, gathered so that one error shows the first few of them at once."""

    source: str
    found: list[str] = field(default_factory=list)

    def add(self, origin: str, what: str) -> None:
        """Note a bad row: what is wrong with it, and what to do."""
        self.found.append(f"{origin}: {what}")

    def check(self) -> None:
        """Raise what was gathered, if anything was.

        Raises:
            DataError: at least one bad row was added.
        """
        if not self.found:
            return
        lines = self.found[:SHOWN_PROBLEMS]
        if len(self.found) > SHOWN_PROBLEMS:
            lines.append(f"and {len(self.found) - SHOWN_PROBLEMS} more bad rows in {self.source}")
        raise DataError("\n".join(lines))
