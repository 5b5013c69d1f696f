"""The output folder of a run, and its locking.

    OUTPUT/adapter/       the adapter in PEFT's layout (full fine-tuning: OUTPUT/model/)
    OUTPUT/record.json    configuration and measurements
    OUTPUT/events.jsonl   every event of the loop
    OUTPUT/checkpoints/   the state needed to resume
    OUTPUT/.lock          held while a process trains here
    OUTPUT/.launch        which start of torchrun trains here: its processes may begin again, those of another start may not, and
                          none once it was asked to stop

One run per folder: a folder that contains a run is rejected unless that run is resumed, and a second process on the same folder
is rejected while the first one is alive.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lownibble.errors import OutputError

_TRIES = 5
"""More tries of locking: a studio that asks whether a run is alive has the lock for a moment."""

_RUN_FILES = ("record.json", "adapter", "model", "checkpoints")


@contextmanager
def hold(folder: str | Path) -> Iterator[Path]:
    """Create an output folder and lock it against other processes.

    Raises:
        OutputError: another process holds it, or it is not writable.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise OutputError(f"Cannot write to the output folder '{folder}': {error.strerror}. Choose another --output.") from None
    with lock:
        for tries in range(_TRIES + 1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if tries == _TRIES:
                    message = f"Another process is using '{folder}'. Wait for it, or choose another --output."
                    raise OutputError(message) from None
                time.sleep(0.02)
        yield folder


def _this_launch() -> str:
    """The start of torchrun that this process belongs to: its agent is the parent of every process that it starts or restarts."""
    return f"{platform.node()} {os.getppid()}"


def begin(folder: Path) -> None:
    """Note, in a claimed folder, that this start of torchrun trains here."""
    (folder / ".launch").write_text(_this_launch())


def began(folder: str | Path) -> bool:
    """Whether processes of this start of torchrun trained in the folder before."""
    return _note(folder)[:1] == [_this_launch()]


def stop(folder: Path, signal_number: int) -> None:
    """Note that this start of torchrun was asked to stop: it takes that for a failure, and may start its processes again."""
    (folder / ".launch").write_text(f"{_this_launch()}\n{signal_number}")


def stopped(folder: str | Path) -> int:
    """The signal that asked this start of torchrun to stop, or 0."""
    noted = _note(folder)
    return int(noted[1]) if len(noted) > 1 and began(folder) else 0


def _note(folder: str | Path) -> list[str]:
    note = Path(folder) / ".launch"
    return note.read_text().splitlines() if note.exists() else []


@contextmanager
def claim(folder: str | Path, *, resume: bool) -> Iterator[Path]:
    """Hold an output folder for one run.

    Raises:
        OutputError: it contains another run, another process holds it, or it cannot be written (now, or later inside the block,
            such as on a full disk).
    """
    with hold(folder) as folder:
        found = [name for name in _RUN_FILES if (folder / name).exists()]
        if found and not resume:
            raise OutputError(
                f"'{folder}' holds another run ({', '.join(found)}). Choose another --output, or go on with --resume."
            )
        try:
            yield folder
        except (OSError, SafetensorError) as error:  # all reading is done, so this is a write error
            raise OutputError(f"Cannot write into '{folder}': {error}. Free some space, then go on with --resume.") from error
