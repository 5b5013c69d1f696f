"""The curves of a run, from `events.jsonl` while it is written: each look reads the file's new part only, and what goes to the
page is down-sampled here, so that ten runs of 10,000 steps are a few kilobytes and milliseconds a look.

Means of 2^n neighbouring steps, at most `POINTS` of them: a point that has been drawn does not move until n grows. After a resume
the steps that are done again replace those of before.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

POINTS = 512
"""Most points of a curve."""


class Tail:
    """The new lines of a growing file. `bytes_read`: of all looks together; `anew`: called when it starts over."""

    def __init__(self, path: Path, anew: Callable[[], None] = lambda: None) -> None:
        self.anew = anew
        self.path, self.offset, self.bytes_read, self.end = path, 0, 0, b""

    def lines(self) -> Iterator[dict[str, Any]]:
        """The JSON objects of whole lines that were added since the last look; lines that are none are skipped. A file that was
        written anew, which shows where the last look ended, is read from its start."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset - len(self.end))
                if file.read(len(self.end)) != self.end:
                    self.offset, self.end = file.seek(0), b""
                    self.anew()
                text = file.read()
        except OSError:
            return
        self.bytes_read += len(text)
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        self.end = (self.end + whole)[-64:]
        for line in whole.splitlines():
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


class Track:
    """One run's steps and evaluations, up to the last look."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.tail = name, Tail(path, self._clear)
        self._clear()

    def _clear(self) -> None:
        self.steps, self.losses, self.rates = array("q"), array("d"), array("d")
        self.evaluations: list[tuple[int, float]] = []
        self.total, self.counted, self.seconds = 0, 0, 0.0
        self.last, self.why = 0, ""
        self.skipped: list[int] = []
        self.warnings: list[str] = []
        self.phase = "starting"

    def look(self) -> Track:
        """Read what is new."""
        for event in self.tail.lines():
            kind = event.get("event")
            with suppress(KeyError, TypeError, ZeroDivisionError, ValueError, OverflowError):
                if kind == "Started":
                    self._back_to(int(event["first_step"]))
                    self.total, self.phase = int(event["total_steps"]), "training"
                elif kind == "Stepped":
                    step, loss, rate = int(event["step"]), float(event["loss"]), event["tokens"] / event["seconds"]
                    self.steps.append(step)
                    self.losses.append(loss)
                    self.rates.append(rate)
                    self.last = step
                    self.counted += 1
                    self.seconds += float(event["seconds"])
                elif kind == "Skipped":
                    self.last, self.why = int(event["step"]), str(event["reason"])
                    self.skipped.append(self.last)
                    self.counted += 1
                    self.seconds += float(event["seconds"])
                elif kind == "Evaluated":
                    self.evaluations.append((int(event["step"]), float(event["loss"])))
                elif kind == "Warned":
                    self.warnings.append(str(event["message"]))
                elif kind == "Finished":
                    self.phase = "finished"
        return self

    def _back_to(self, step: int) -> None:
        """Forget steps after `step`: a run that starts there makes them again."""
        kept = int(np.searchsorted(np.frombuffer(self.steps, np.int64), step, side="right")) if self.steps else 0
        for column in (self.steps, self.losses, self.rates):
            del column[kept:]
        self.evaluations = [each for each in self.evaluations if each[0] <= step]
        self.skipped = [each for each in self.skipped if each <= step]
        self.last = min(self.last, step)

    def said(self) -> list[str]:
        """Warnings, that of skipped steps included."""
        if not self.skipped:
            return self.warnings
        return [*self.warnings, f"Steps that were skipped: {len(self.skipped)}. The last one, {self.skipped[-1]}: {self.why}"]

    def figures(self) -> dict[str, Any]:
        """What a list of runs shows: last step, loss and tokens/s of the last steps, seconds left."""
        recent = slice(-16, None)
        return {
            "step": self.last, "total": self.total, "phase": self.phase,
            "loss": _mean(self.losses[recent]), "tokens_per_s": _mean(self.rates[recent]),
            "evaluation": _finite(self.evaluations[-1][1]) if self.evaluations else None, "seconds_left": self._seconds_left(),
        }  # fmt: skip

    def _seconds_left(self) -> float | None:
        """At the mean pace of the steps that this studio has seen, evaluations not counted."""
        return _finite((self.total - self.last) * self.seconds / self.counted) if self.counted else None

    def curve(self) -> dict[str, Any]:
        """Down-sampled columns, ready for JSON; values that are not finite are null."""
        evaluations = [(step, _finite(loss)) for step, loss in self.evaluations]
        if not self.steps:
            return {"name": self.name, "step": [], "loss": [], "tokens_per_s": [], "evaluations": evaluations, "mean_of": 1}
        width = 1 << max(0, -(-len(self.steps) // POINTS) - 1).bit_length()
        starts = np.arange(0, len(self.steps), width)
        counts = np.diff(np.append(starts, len(self.steps)))
        steps = np.frombuffer(self.steps, np.int64)[starts + counts - 1]

        def means(column: array[float]) -> list[float | None]:
            return [_finite(value) for value in np.add.reduceat(np.frombuffer(column), starts) / counts]

        return {
            "name": self.name, "step": steps.tolist(), "loss": means(self.losses), "tokens_per_s": means(self.rates),
            "evaluations": evaluations, "mean_of": width,
        }  # fmt: skip


def _mean(values: array[float]) -> float | None:
    return _finite(sum(values) / len(values)) if values else None


def _finite(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


class Memory:
    """Bytes that a job's processes held, as `launched.py` notes them: at most `POINTS` maxima of 2^n neighbours."""

    def __init__(self, path: Path) -> None:
        self.tail, self.seconds, self.held, self.before = Tail(path), array("d"), array("d"), 0.0

    def look(self) -> Memory:
        """Read what is new."""
        for sample in self.tail.lines():
            with suppress(KeyError, TypeError, ValueError):
                seconds, held = float(sample["seconds"]), float(sample["bytes"])
                if self.seconds and seconds + self.before < self.seconds[-1]:  # resumed: its clock began again
                    self.before = self.seconds[-1]
                self.seconds.append(seconds + self.before)
                self.held.append(held)
        return self

    def curve(self) -> dict[str, Any]:
        """Columns `seconds` and `bytes`, and the `peak`."""
        if not self.held:
            return {"seconds": [], "bytes": [], "peak": None}
        width = 1 << max(0, -(-len(self.held) // POINTS) - 1).bit_length()
        starts = np.arange(0, len(self.held), width)
        seconds, held = np.frombuffer(self.seconds)[starts], np.frombuffer(self.held)
        return {
            "seconds": seconds.round(1).tolist(), "bytes": np.maximum.reduceat(held, starts).tolist(), "peak": float(held.max())
        }  # fmt: skip
