"""What torchrun told this process: its rank, and whether it was started again. Imports no torch, because every command asks.

The processes of a run usually fail alike, over their options, and print one message (`should_tell`): the first rank its own, and
another one only if it says something else. They compare over the store that torchrun keeps for its processes, and for those that
it starts again: what the first rank said is dropped when all of a later start have found each other (`distributed.py`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

PREFIX, ERROR = "lownibble", "error"
"""Of what the processes of a run keep in torchrun's store; and, below it, the key of the first rank's message."""

_SECONDS = 5
"""Seconds that a rank waits for the first one's message before it prints its own."""


def is_several() -> bool:
    """Whether this process was started as one of several, or by torchrun as the only one."""
    return world() > 1 or {"WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def world() -> int:
    """The number of processes. A cluster may tell a pod that it is one of one."""
    return int(os.environ.get("WORLD_SIZE") or "1")


def rank() -> int:
    """This process's number."""
    return int(os.environ.get("RANK", "0"))


def restarts() -> int:
    """How often this machine's processes were started again because one of them failed: another number on each machine."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def sharing(device_type: str) -> int:
    """Processes of the run that share the memory of this one's device: on a CPU all of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device_type == "cpu" else 1


def should_tell(message: str) -> bool:
    """Whether this process should print its error, `message`."""
    if not is_several():
        return True
    store, key = _store(), f"{PREFIX}/{ERROR}"
    with suppress(RuntimeError):
        if rank() == 0 and store is not None:
            store.set(key, message)
        elif store is not None:
            return bool(store.get(key).decode() != message)
    return True


def _store() -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with suppress(RuntimeError, ValueError, KeyError):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_SECONDS), wait_for_workers=False)
    return None
