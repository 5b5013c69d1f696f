"""SIGINT and SIGTERM: finish the step, save, then stop.

While a run is inside `requests()`, the first signal only leaves a note, which the loop reads between steps; a second one
interrupts at once, as if there were no handler. A note that no step was left to read stops who started the run, once it is over
and saved. Signals arrive in the main thread only; a run elsewhere is not interrupted this way.
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
    """A run was asked to stop and did, between two steps, or at its end with a result (a `TrainResult`).

    `signal`: the number of the signal.
    """

    def __init__(self, message: str, signal_number: int, result: Any = None) -> None:
        super().__init__(message)
        self.signal, self.result = signal_number, result


@contextmanager
def requests() -> Iterator[Callable[[], int]]:
    """Inside the block, and after it, the value called gives the number of the signal that asked to stop, or 0."""
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
