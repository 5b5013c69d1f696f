"""Measured comparisons of LoRA with QLoRA on the same model, read from their records for the recommendation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lownibble.errors import ConfigError

DEFAULT = "runs"
"""Folder searched for records by default; need not exist."""

Verdict = Literal["better than", "worse than", "not distinguishable from"]


@dataclass(frozen=True)
class Measured:
    """A comparison.

    Attributes:
        path: its record. quality: QLoRA is ... LoRA. words: the figures behind it. speed: QLoRA's tokens/s over LoRA's, paired.
    """

    path: str
    quality: Verdict
    words: str
    speed: float | None

    @property
    def reason(self) -> str:
        """A sentence for the recommendation."""
        speed = "" if self.speed is None else f", at {self.speed:.2f} of LoRA's tokens/s"
        return f"Measured ({self.path}): QLoRA is {self.quality} LoRA ({self.words}){speed}."


def find(folder: str | None, model: str) -> Measured | None:
    """The newest comparison of `model` in a record file or, recursively, in a folder (default: `DEFAULT`); None if none.

    Raises:
        ConfigError: the given folder does not exist.
    """
    top = Path(folder or DEFAULT)
    if folder and not top.exists():
        raise ConfigError(f"There is no folder or record '{folder}'. Give what 'lownibble compare' wrote.")
    records = [top] if top.is_file() else sorted(top.glob("**/record.json"))
    found = [(contents["created"], path, contents) for path in records if (contents := _comparison(path, model))]
    if not found:
        return None
    _, path, contents = max(found, key=lambda each: each[0])
    quality = contents["advice"]["quality"]["qlora_vs_lora"]
    ratio = contents.get("paired_speed", {}).get("ratios", {}).get("qlora_vs_lora")
    return Measured(str(path), quality["verdict"], quality["words"], ratio and float(ratio["median"]))


def _comparison(path: Path, model: str) -> dict[str, Any] | None:
    """The record, if it is of a finished comparison of LoRA with QLoRA on this model."""
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = contents["kind"] == "compare" and contents["config"]["model"] == model
        return contents if same and "qlora_vs_lora" in contents["advice"]["quality"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
