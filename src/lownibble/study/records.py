"""The records of a study: files that may be missing, unfinished or of a run that failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_record(file: Path) -> dict[str, Any] | None:
    """Read a record; None if it is missing or unreadable."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "status" in found else None


def peak_bytes(found: Mapping[str, Any]) -> int:
    """Peak memory of a finished cell's process above its baseline after imports, over loading and training."""
    memory = found["measured"]["memory"]
    return int(max(memory["train_peak_bytes"], memory["load_peak_bytes"]))
