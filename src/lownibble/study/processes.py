"""The processes of a run that a study or a comparison starts: one, or one a rank, told what torchrun tells its own.

torchrun is for people; here its agent would be one more process between the ranks and who must end them, and would tell how a
rank ended only in its log. The parent holds the store over which the ranks find each other, and sees each one's exit code.

Each process's standard input is a pipe from its parent, and a process ends with it (`end_with_standard_input`): none outlives its
parent, however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

GRACE_S = 10
"""Seconds that ranks have to end, and to say why, when one of them has failed; then they are killed."""

_POLL_S = 0.05

LOST = "RankLostError"
"""The error of a rank whose peers are gone: never the cause."""

alive: set[subprocess.Popen[str]] = set()
"""Running processes, for who must kill them."""


def run_module(
    module: str, *arguments: str, ranks: int = 1, devices: Sequence[str] | None = None, line: Callable[[int], str] | None = None,
    output: IO[str] | None = None, threads: int | None = None,
) -> dict[int, int]:  # fmt: skip
    """Run `python -m MODULE ARGUMENTS` in so many processes until they end, or one failed and the others had `GRACE_S`.

    Args:
        devices: CUDA devices that they see, as in CUDA_VISIBLE_DEVICES; None: as this process.
        line: rank -> a line that it gets on standard input.
        output: where what they print goes; None: standard error. threads: of each; None: its share of the processors.
    Returns:
        rank -> exit code; those that were killed because another had failed are not in it.
    """
    processes: list[subprocess.Popen[str]] = []
    store = _store() if ranks > 1 else None
    try:
        for rank in range(ranks):
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=output or sys.stderr,
                stderr=output, text=True, start_new_session=True,
                env=environment(rank, ranks, store.port if store else 0, devices, threads),
            )  # fmt: skip
            alive.add(process)
            processes.append(process)
            if line is not None:
                assert process.stdin is not None
                with suppress(BrokenPipeError):  # it has exited already: see its exit code
                    process.stdin.write(line(rank) + "\n")
                    process.stdin.flush()
        return _wait(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            alive.discard(process)


def _store() -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def environment(
    rank: int, ranks: int, port: int, devices: Sequence[str] | None, threads: int | None = None
) -> dict[str, str]:  # fmt: skip
    """The environment of a rank: torchrun's variables, its share of the processors and the devices that it sees."""
    found = dict(os.environ)
    if devices is not None:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if threads is not None:
        found["OMP_NUM_THREADS"] = str(threads)
    if ranks > 1:
        found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        found |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return found


def _wait(processes: Sequence[subprocess.Popen[str]]) -> dict[int, int]:
    def codes() -> dict[int, int]:
        return {rank: code for rank, process in enumerate(processes) if (code := process.poll()) is not None}

    until = None
    while len(ended := codes()) < len(processes) and (until is None or time.monotonic() < until):
        if until is None and any(ended.values()):
            until = time.monotonic() + GRACE_S
        time.sleep(_POLL_S)
    return ended


def why_failed(codes: dict[int, int], errors: dict[int, str], ranks: int) -> str:
    """What a run's failure says: the error of the first rank that failed by itself, and which one it was if there are several.

    Args:
        codes: of `run_module`. errors: rank -> its error, of those that left one.
    """
    told = errors | {rank: how_it_ended(code) for rank, code in codes.items() if code and rank not in errors}
    causes = {rank: error for rank, error in told.items() if not error.startswith(LOST)} or told
    if not causes:
        return how_it_ended(0)
    rank = min(causes)
    return causes[rank] if rank == 0 else f"Rank {rank} of {ranks}: {causes[rank]}"


def how_it_ended(code: int) -> str:
    """Describe, from its exit code, how a process without a record ended."""
    why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    hint = " (the system's out-of-memory killer sends it)" if code == -signal.SIGKILL else ""
    return f"The process ended with {why}{hint} and left no record."


def end_with_standard_input() -> None:
    """Let this process end when its standard input does: its parent has then ended or been killed."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
