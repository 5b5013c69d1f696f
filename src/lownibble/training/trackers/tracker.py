"""What a tracker is, and all trackers of a run as one sink."""

from __future__ import annotations

import importlib
import json
import secrets
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from lownibble.config import TrainConfig
from lownibble.errors import ConfigError
from lownibble.registry import TRACKERS
from lownibble.training.events import Evaluated, Event, Stepped
from lownibble.training.sinks import Sink

Status = Literal["finished", "failed", "killed"]

IDS = "trackers.json"
"""File in the output folder: what each tracker calls the run, so that a resumed run goes on with the same curves."""


@dataclass(frozen=True)
class About:
    """What a tracker gets to know of a run. `id`: for trackers that take one; a resumed run has that of the first."""

    name: str
    folder: Path | None
    config: dict[str, Any]
    id: str
    resumed: bool

    @property
    def options(self) -> dict[str, Any]:
        """The options by dotted name ('train.max_steps'); tables inside groups stay whole."""
        found: dict[str, Any] = {}
        for key, value in self.config.items():
            found |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
        return found


class Tracker(ABC):
    """One run in one tracker. It is started when made; any exception of any method drops it, and the run goes on.

    One whose `log` raised is ended as "failed", without files.
    """

    module: ClassVar[str]
    """The library, which is the name of this package's extra, too."""
    needs_folder: ClassVar[bool] = False
    """Whether it writes into the output folder, and nowhere without one."""
    id: str = ""
    """What the tracker calls the run, if it chooses that itself."""

    @abstractmethod
    def __init__(self, about: About) -> None:
        """Start the run, or go on with it."""

    @abstractmethod
    def log(self, figures: dict[str, float], step: int) -> None:
        """Take figures of one optimiser step."""

    @abstractmethod
    def end(self, status: Status, files: list[Path]) -> None:
        """End the run. `files`: what to keep with it, files and folders: the record, the adapter."""


def figures_of(event: Event) -> tuple[dict[str, float], int] | None:
    """(figures by name, step) of an event; None where it has none."""
    if isinstance(event, Stepped):
        return {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/tokens_per_s": event.tokens / event.seconds,
        }, event.step
    if isinstance(event, Evaluated):
        return {"eval/loss": event.loss, **{f"eval/{name}": value for name, value in event.scores.items()}}, event.step
    return None


def check(config: TrainConfig) -> None:
    """Refuse trackers that cannot be used.

    Raises:
        ConfigError: one's library is not installed or cannot be imported, or it writes into an output folder and there is none.
    """
    for name in config.report_to:
        tracker: type[Tracker] = TRACKERS[name]
        try:
            importlib.import_module(tracker.module)
        except ImportError as error:
            raise ConfigError(
                f"The 'report_to' of TrainConfig names '{name}', which cannot be imported: {error}. Run: "
                f"pip install 'lownibble[{name}]'"
            ) from None
        if tracker.needs_folder and config.output_dir is None:
            raise ConfigError(f"The 'report_to' of TrainConfig names '{name}', which writes into the output folder. Give one.")


class Trackers(Sink):
    """The trackers of a run as one sink, that ends them after the record is written: `finish`, or leaving the block."""

    def __init__(self, names: list[str], config: dict[str, Any], folder: Path | None, *, resumed: bool = False) -> None:
        self.names, self.config, self.folder, self.resumed = names, config, folder, resumed
        self.running: dict[str, Tracker] = {}
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        if not self.names:
            return self
        file = self.folder / IDS if self.folder else None
        known: dict[str, str] = {}
        with suppress(OSError, ValueError):  # not there, or cut short: the curves begin anew
            known = json.loads(file.read_text()) if file and self.resumed else {}
        name = self.folder.resolve().name if self.folder else "run"
        for each in self.names:
            resumed = each in known
            about = About(name, self.folder, self.config, known.get(each) or secrets.token_hex(8), resumed)

            def start(each: str = each, about: About = about) -> None:
                self.running[each] = TRACKERS[each](about)
                known[each] = self.running[each].id or about.id

            self._guarded(each, start)
        if file:
            file.write_text(json.dumps(known, indent=2) + "\n")
        return self

    def __call__(self, event: Event) -> None:
        """Pass an event's figures on."""
        if found := figures_of(event):
            for name, tracker in list(self.running.items()):
                self._guarded(name, partial(tracker.log, *found))

    def finish(self, status: Status, files: list[Path]) -> None:
        """End every tracker that still runs, with the files to keep."""
        for name in list(self.running):
            self._guarded(name, partial(self.running.pop(name).end, status, files))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stopped = isinstance(error, KeyboardInterrupt)
        self.finish("killed" if stopped else "failed" if error else "finished", [])

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # standard output is the command's
                act()
        except Exception as error:
            if dropped := self.running.pop(name, None):
                with suppress(Exception), redirect_stdout(sys.stderr):
                    dropped.end("failed", [])
            words = " ".join(str(error).split()) or "no reason given"
            self.failures.append(f"reporting to {name} failed ({type(error).__name__}: {words}); the run goes on without it")
            warnings.warn(self.failures[-1], stacklevel=2)
