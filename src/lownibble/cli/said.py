"""Where commands say things: the console, and a progress bar."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on in silence where nobody reads on (`| head`): a run is still to be pushed. rich would exit with 1."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def console_of(arguments: argparse.Namespace) -> Console:
    """Standard output; with --json, which has that for itself, standard error. Brackets are text: paths and errors have them."""
    return _Console(file=sys.stderr if arguments.json else sys.stdout, highlight=False, markup=False)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bar with remaining time on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield tell
