"""Writing the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(path: str | Path, comparison: dict[str, Any], runs: list[dict[str, Any]]) -> Path:
    """Write the page; returns its path."""
    path = Path(path)
    path.write_text("")
    return path
