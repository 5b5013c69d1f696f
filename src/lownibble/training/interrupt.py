"""Graceful stop on SIGINT and SIGTERM: finish the step, save, then stop.

Inside `requests()`, the first signal only sets a flag, which the loop reads between steps; a second one raises KeyboardInterrupt
at once. If no step is left to read the flag, the run finishes and is saved, and then `RunInterrupted` is raised with its result.
Signals arrive in the main thread only; a run in another thread cannot be stopped this way.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class RunInterrupted(KeyboardInterrupt):
    """A run stopped on request, between two steps, or at its end with a `result` (a `TrainResult`).

    `signal`: the signal number.
    """

    def __init__(self, message: str, signal_number: int, result: Any = None) -> None:
        super().__init__(message)
        self.signal, self.result = signal_number, result


@contextmanager
def requests() -> Iterator[Callable[[], int]]:
    """Handle SIGINT and SIGTERM inside the block. The yielded function, also valid later, returns the received signal or 0."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        os.write(2, b"\nStopping after this step; once more stops at once.\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
