"""The output folder of a run: who may write into it.

    OUTPUT/adapter/       the adapter in PEFT's layout (full fine-tuning: OUTPUT/model/)
    OUTPUT/record.json    what was asked and measured
    OUTPUT/events.jsonl   every event of the loop
    OUTPUT/checkpoints/   what a resumption needs
    OUTPUT/.lock          held while a process trains here

One run per folder: a folder that holds one is refused unless the run is to be resumed, and a second process on the same
folder is refused while the first one lives.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lownibble.errors import OutputError

_RUN_FILES = ("record.json", "adapter", "model", "checkpoints")


@contextmanager
def hold(folder: str | Path) -> Iterator[Path]:
    """Make an output folder, and keep other processes out of it.

    Raises:
        OutputError: another process works in it, or it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise OutputError(f"Cannot write to the output folder '{folder}': {error.strerror}. Choose another --output.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"Another process is using '{folder}'. Wait for it, or choose another --output.") from None
        yield folder


@contextmanager
def claim(folder: str | Path, *, resume: bool) -> Iterator[Path]:
    """Hold an output folder for one run.

    Raises:
        OutputError: it holds another run, another process trains in it, or it cannot be written (now, or later inside the
            block: a full disk).
    """
    with hold(folder) as folder:
        found = [name for name in _RUN_FILES if (folder / name).exists()]
        if found and not resume:
            raise OutputError(
                f"'{folder}' holds another run ({', '.join(found)}). Choose another --output, or go on with --resume."
            )
        try:
            yield folder
        except (OSError, SafetensorError) as error:  # all reading is done: this is the disk
            raise OutputError(f"Cannot write into '{folder}': {error}. Free some space, then go on with --resume.") from error
