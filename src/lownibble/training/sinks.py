"""Event sinks: progress bar and JSONL file; trackers have a room of their own.

A sink is a callable that takes an event, and a context manager.
"""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Self, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lownibble.lora.experts import EXPERTS
from lownibble.memory.budget import Setting
from lownibble.training.compiling import IMPOSSIBLE
from lownibble.training.events import Evaluated, Event, Finished, Fitted, Skipped, Started, Stepped, Warned

MANY_ROWS = 500
"""Evaluation rows from which on the first evaluation, before any step, is announced."""


class Sink(AbstractContextManager["Sink"]):
    """Takes events until it is closed."""

    @abstractmethod
    def __call__(self, event: Event) -> None:
        """Take one event."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Release what the sink holds."""


class ProgressSink(Sink):
    """A progress bar with throughput and time left on a terminal; elsewhere text lines only. Writes to standard error."""

    def __init__(self, label: str = "train", file: IO[str] | None = None) -> None:
        self.console = Console(file=file or sys.stderr, highlight=False, soft_wrap=True, markup=False)
        self.label = label
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Fitted):
            self.console.print(f"{self.label}: {_fit(event)}")
        elif isinstance(event, Started):
            if event.compute:
                self.console.print(f"{self.label}: frozen-base matmul precision: {event.compute}")
            if event.adapted.get(EXPERTS):
                said = " and ".join(f"{count} {kind}" for kind, count in event.adapted.items())
                self.console.print(f"{self.label}: adapters on {said} (--no-target-experts leaves experts out)")
            if event.shared:
                of, computed = (event.shared[key] for key in ("tokens", "computed_tokens"))
                self.console.print(
                    f"{self.label}: what sequences begin with alike is computed once: {computed / of:.0%} of their tokens"
                )
            if event.compiled:
                self.console.print(f"{self.label}: layers compiled in {event.compile_seconds:.0f} s ({event.compile_reason})")
            elif event.compile_reason.startswith(IMPOSSIBLE):
                self.console.print(f"{self.label}: layers are not compiled, which would pay: {event.compile_reason}")
            if event.eval_rows >= MANY_ROWS:
                self.console.print(f"{self.label}: evaluating {event.eval_rows:,} rows first (--max-eval-rows takes fewer)")
            self.task = self.progress.add_task(self.label, total=event.total_steps, completed=event.first_step, figures="")
        elif isinstance(event, Stepped):
            figures = f"loss {event.loss:.3f}  {event.tokens / event.seconds:.0f} tok/s"
            self.progress.update(self.task, completed=event.step, figures=figures)
        elif isinstance(event, Skipped):
            self.progress.update(self.task, completed=event.step)
            self.console.print(f"{self.label}: step {event.step} was skipped: {event.reason}")
        elif isinstance(event, Warned):
            self.console.print(f"{self.label}: warning: {event.message}")
        elif isinstance(event, Evaluated):
            scores = "".join(f", {name} {value:.3f}" for name, value in event.scores.items())
            self.console.print(f"{self.label}: step {event.step}: evaluation loss {event.loss:.4f}{scores}")
        elif isinstance(event, Finished):
            self.console.print(f"{self.label}: {event.steps} steps in {event.seconds:.0f} s")


def _fit(event: Fitted) -> str:
    """One line on how training fits into the memory budget."""
    if event.max_tokens is None:
        passes = f"batches as configured (up to {event.whole_tokens} tokens)"
    else:
        passes = f"forward passes of up to {event.max_tokens} tokens instead of {event.whole_tokens}"
    what = f"{passes}{Setting(event.paged, event.gradient_checkpointing).words}"
    return f"memory budget {event.budget_bytes / 1e9:.2f} GB: {what}; {event.peak_bytes / 1e9:.2f} GB expected"


class JsonlSink(Sink):
    """JSON Lines, one object per event, flushed at once: `{"event": "Stepped", ...}`."""

    def __init__(self, path: str | Path, append: bool = False) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        cut_short = append and Path(path).exists() and Path(path).read_bytes()[-1:] not in (b"", b"\n")
        self.file = Path(path).open("a" if append else "w", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        if cut_short:
            self.file.write("\n")

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self.file.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
        self.file.flush()


def read_events(path: Path) -> list[Event]:
    """Read the events that `JsonlSink` wrote; lines truncated by a kill are skipped."""
    kinds = {kind.__name__: kind for kind in get_args(Event)}
    events: list[Event] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            values = json.loads(line)
            events.append(kinds[values.pop("event")](**values))
    return events


def deliver(events: Iterable[Event], sinks: Iterable[AbstractContextManager[Sink]]) -> Iterator[Event]:
    """Yield events after passing each to every sink; closes the sinks at the end, also after an error."""
    with ExitStack() as stack:
        opened = [stack.enter_context(sink) for sink in sinks]
        for event in events:
            for sink in opened:
                sink(event)
            yield event
