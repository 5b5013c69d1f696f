"""`lownibble bench contact`: whether everything that runs on CUDA only computes what it should, in a minute and a half.

Each check holds one path against its plain reference, at small sizes, and is an entry of `CHECKS`; what it finds is in the record
by its name: passed, failed with the error and where it came from, or skipped with the reason, and the largest difference.

Checks run in processes of their own. What a check leaves behind is not for the next one to suffer: one that does not answer in
its time, or ends its process or the process's CUDA context, has failed, and a new process goes on with the rest. Most of the time
goes into compiling Triton's kernels, so several processes share the checks where there are processors for them.

`--stand-in` runs the same checks on a CPU, the kernels in Triton's interpreter; what cannot be run there is skipped by name. So
the checks themselves are tested without a card.
"""

from __future__ import annotations

import gc
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lownibble.bench.contact_kernels import KERNELS, OPTIMISERS, Contact, SkippedError, WrongError
from lownibble.bench.contact_models import MODELS
from lownibble.bench.processes import Save, end
from lownibble.errors import BackendError, ConfigError, TrainingError
from lownibble.kernels import ops, proven
from lownibble.measuring.turns import reserved_stdout
from lownibble.models import pick_device
from lownibble.study.processes import how_it_ended

CHECKS: dict[str, Callable[[Contact], None]] = {**KERNELS, **OPTIMISERS, **MODELS}
"""Name -> check: returns if all is well, else raises; `SkippedError` if it cannot run here."""

TIME_LIMIT_S, CHECK_S, START_S = 90, 45.0, 60.0
"""Seconds for all checks, for one, and for a process until it is ready."""
MOST_PROCESSES, CORES_EACH = 4, 4
TIME_UP = "the time was up"
LEAST_S = 1.0
"""A check is not begun with less time than this."""
_LINES = 12
"""Last lines of a traceback, or of a process's messages, that are kept."""


def bench_contact(
    *, peers: bool = False, repeats: int = 1, only: str | None = None, stand_in: bool = False,
    time_limit: float = TIME_LIMIT_S, save: Save = lambda record: None,
) -> dict[str, Any]:  # fmt: skip
    """Run the checks.

    Args:
        peers, repeats: refused: nothing is timed.
        only: names of checks, separated by commas; default: all.
        stand_in: on a CPU, as far as they can be.
        time_limit: seconds for all; checks that have not ended by then are skipped.
    Returns:
        `checks`: an entry each; `status` is failed if a check has failed, or none has passed.
    Raises:
        ConfigError: there is no CUDA device, or no check of a name; or `peers` or `repeats` are given.
    """
    if peers or repeats != 1:
        raise ConfigError("'bench contact' times nothing. Leave --peers and --repeats out.")
    names = _chosen(only)
    if not stand_in and pick_device().type != "cuda":
        raise ConfigError(
            "'bench contact' checks what runs on a CUDA device, and torch sees none. Run it on a machine with one, or with "
            "--stand-in: what a CPU can do of it."
        )
    environment = {**os.environ, **({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if stand_in else {})}
    workload = {"stand_in": stand_in, "time_limit_s": time_limit, "check_limit_s": CHECK_S}

    def result(outcomes: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        checks = [{"name": name, **outcomes[name]} for name in names if name in outcomes]
        failed = [each["name"] for each in checks if each["status"] == "failed"]
        wrong = f"{len(failed)} of {len(names)} checks failed: {', '.join(failed)}" if failed else ""
        if not wrong and not any(each["status"] == "passed" for each in checks):
            wrong = f"none of {len(names)} checks passed; they were skipped: {checks[0]['reason'] if checks else TIME_UP}"
        error = {"error": wrong} if wrong else {}
        headlines = {each["name"]: _words(each) for each in checks}
        return {"status": "failed" if wrong else "ok", **error, "workload": workload, "checks": checks, "headlines": headlines}

    def tell(outcomes: Mapping[str, dict[str, Any]], name: str) -> None:
        print(f"bench contact: {name}: {_words(outcomes[name])}", file=sys.stderr)
        save({**result(outcomes), "status": "partial"})

    until = time.monotonic() + time_limit
    with tempfile.TemporaryDirectory(prefix="lownibble-") as folder:  # of all processes, which may not end in peace
        command = [sys.executable, "-m", "lownibble.bench.contact", folder]
        return result(run_all(names, command, environment, until, tell))


def _chosen(only: str | None) -> list[str]:
    names = list(CHECKS) if only is None else [name.strip() for name in only.split(",")]
    if unknown := [name for name in names if name not in CHECKS]:
        raise ConfigError(f"There is no check '{unknown[0]}'. There are: {', '.join(CHECKS)}.")
    return names


def _words(outcome: Mapping[str, Any]) -> str:
    """An outcome in a line."""
    if outcome["status"] == "skipped":
        return f"skipped: {outcome['reason']}"
    if outcome["status"] == "failed":
        return f"failed: {outcome['error']}"[:200]
    return f"passed, {outcome['seconds']:.1f} s, largest difference {outcome['difference']:.0e}"


class _Worker:
    """A process that runs checks one after another; its messages are kept, for the end."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def ask(self, name: str, seconds: float) -> dict[str, Any]:
        """The outcome of a check; of '': that it is ready.

        Raises:
            TrainingError: it has ended, or does not answer in time.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if name:
            with suppress(BrokenPipeError):  # its output has ended, too
                print(name, file=stdin, flush=True)
        if not select.select([stdout], [], [], seconds)[0]:
            raise TrainingError(f"It gave no answer within {seconds:.0f} s.{self._last_words()}")
        line = stdout.readline()
        if not line.endswith("\n"):
            raise TrainingError(f"{how_it_ended(self._process.wait())}{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._messages.seek(0)
        lines = self._messages.read().splitlines()[-_LINES:]
        return "\n".join([" Its last messages:", *lines]) if lines else ""

    def close(self) -> None:
        """End the process."""
        end(self._process)
        for file in (self._process.stdin, self._process.stdout, self._messages):
            assert file is not None
            with suppress(BrokenPipeError):
                file.close()


def run_all(
    names: Sequence[str], command: Sequence[str], environment: Mapping[str, str], until: float,
    tell: Callable[[Mapping[str, dict[str, Any]], str], object], processes: int | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run checks in processes of `command` until that time (`time.monotonic`); returns name -> outcome.

    Args:
        tell: called with the outcomes so far and the name of the last one.
        processes: how many; default: by the processors.
    """
    pending, outcomes, workers, lock = deque(names), dict[str, dict[str, Any]](), set[_Worker](), threading.Lock()
    processes = processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // CORES_EACH, len(names)))

    def close(worker: _Worker) -> None:
        workers.discard(worker)
        worker.close()

    def asked(name: str, worker: _Worker) -> dict[str, Any]:
        began = time.monotonic()
        try:
            return worker.ask(name, max(0.0, min(CHECK_S, until - began)))
        except TrainingError as error:
            close(worker)
            if time.monotonic() >= until:
                return {"status": "skipped", "seconds": time.monotonic() - began, "reason": TIME_UP}
            return {"status": "failed", "seconds": time.monotonic() - began, "error": str(error)}

    def work() -> None:
        worker: _Worker | None = None
        while pending:
            if until - time.monotonic() < LEAST_S:
                return
            if worker is None or worker not in workers:
                workers.add(worker := _Worker(command, environment))
                worker.ask("", min(START_S, until - time.monotonic()))
            try:
                name = pending.popleft()
            except IndexError:  # another one took the last
                return
            outcome = asked(name, worker)
            if outcome.pop("lost", False):
                close(worker)
            with lock:
                outcomes[name] = outcome
                tell(outcomes, name)

    with ThreadPoolExecutor(processes) as pool:
        try:
            errors = [error for each in [pool.submit(work) for _ in range(processes)] if (error := each.exception())]
            left = list(pending)
        finally:
            pending.clear()
            for worker in list(workers):
                close(worker)
    for error in errors:
        if not isinstance(error, TrainingError):
            raise error
    if errors and time.monotonic() < until:  # no process starts
        outcomes |= {name: {"status": "failed", "seconds": 0.0, "error": str(errors[0])} for name in left}
        return outcomes
    return outcomes | {name: {"status": "skipped", "seconds": 0.0, "reason": TIME_UP} for name in left}


@contextmanager
def _kernels(name: str) -> Iterator[None]:
    """The Triton kernels, for checks of them; numpy, which computes in the interpreter, warns where a GPU gives infinity.

    Raises:
        BackendError: they cannot run here.
    """
    if name not in KERNELS:
        yield
        return
    with ops.use_backend("triton"), np.errstate(all="ignore"):
        yield


def outcome_of(name: str, at: Contact) -> dict[str, Any]:
    """Run a check; a kernel that plain torch had to replace is a failure."""
    began, before = time.monotonic(), dict(proven.refused)
    torch.manual_seed(0)
    outcome: dict[str, Any] = {"status": "passed"}
    try:
        with warnings.catch_warnings(action="ignore"), _kernels(name):
            CHECKS[name](at)
        if proven.refused != before:
            raise WrongError(proven.words())
    except SkippedError as error:
        outcome = {"status": "skipped", "reason": str(error)}
    except BackendError as error:
        status, key = ("failed", "error") if at.on_cuda else ("skipped", "reason")
        outcome = {"status": status, key: str(error)}
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = "".join(traceback.format_exception(cause, chain=False)).splitlines()[-_LINES:]
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:1000], "traceback": lines}
    proven.refused.clear()
    proven.refused.update(before)
    outcome |= {"seconds": time.monotonic() - began, "difference": at.difference if math.isfinite(at.difference) else None}
    return {**outcome, "notes": at.notes} if at.notes else outcome


def answer(out: IO[str], folder: Path) -> None:
    """Child side: run the checks whose names come on standard input, until the device is lost."""
    device = pick_device()
    print(json.dumps({}), file=out, flush=True)
    for line in sys.stdin:
        outcome = outcome_of(line.strip(), Contact(device, folder))
        outcome["lost"] = proven.is_lost(device)
        print(json.dumps(outcome, allow_nan=False), file=out, flush=True)
        if outcome["lost"]:
            return
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with reserved_stdout() as out:
        answer(out, Path(tempfile.mkdtemp(dir=sys.argv[1])))
