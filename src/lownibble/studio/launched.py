"""Jobs: commands of Lownibble that run in processes of their own, and outlive the page and the studio.

    FOLDER/.studio/lock              held by the studio, with its address in it
    FOLDER/.studio/jobs/ID/job.json  command, folder it was started in, process id, when that process began, output
    FOLDER/.studio/jobs/ID/result    standard output: one JSON document, when it has ended
    FOLDER/.studio/jobs/ID/log       standard error
    FOLDER/.studio/jobs/ID/memory    bytes that its processes held, once a second while a studio is open
    FOLDER/uploads/                  files that were uploaded

Nothing else is kept: a studio that starts finds the jobs by these files, and a process by its id and the moment it began (ids are
given again). A job without a process and without a result has died, whatever it died of. Runs in FOLDER that were started from a
terminal are listed beside them.

Rejected: a database or a daemon that owns the processes. Both are one more thing that can be down, and a run would end with it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from lownibble.errors import ConfigError, OutputError
from lownibble.studio.held import gpu_bytes, held
from lownibble.studio.tracks import Memory, Track

RESUMED = ("train", "compare")
"""Commands that go on with --resume; others are run again as they were."""

LOG_BYTES = 64 << 10
"""Bytes of the end of a log that are shown."""

DIED = (
    "The process ended without a result: it was killed, often for want of memory, or the machine was restarted. Look at the end "
    "of the log. Resume goes on from the last checkpoint; with --memory-budget a run stays within a limit."
)


@dataclass(frozen=True)
class Job:
    """A started command. `words`: after `lownibble`; `began`: seconds since the epoch, as the system has it of the process;
    `asked`: whether it was asked to stop; `planned`: bytes (low, likely, high); `pid` 0: a run from a terminal."""

    id: str
    words: list[str]
    cwd: str
    output: str | None = None
    pid: int = 0
    began: float = 0.0
    started: float = 0.0
    asked: bool = False
    planned: list[int] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The command's name."""
        return self.words[0] if self.words else ""

    @property
    def folder(self) -> Path | None:
        """Where its output goes."""
        return None if self.output is None else Path(self.cwd) / self.output

    @property
    def shown(self) -> str | None:
        """The path of its output for what is started now: as it was given, where that still means the same."""
        return self.output if self.folder is None or Path(self.cwd) == Path.cwd() else str(self.folder)


@contextmanager
def opened(folder: str | Path) -> Iterator[Jobs]:
    """The jobs of a folder, locked against another studio.

    Raises:
        OutputError: another studio has it, or it cannot be written.
    """
    own = Path(folder) / ".studio"
    try:
        (own / "jobs").mkdir(parents=True, exist_ok=True)
        lock = (own / "lock").open("a+")
    except OSError as error:
        raise OutputError(f"Cannot write to the folder '{folder}': {error.strerror}. Choose another --folder.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise OutputError(
                f"Another studio has '{folder}' open, at {lock.read() or 'an address of its own'}. Use that one, or choose "
                "another --folder."
            ) from None
        jobs = Jobs(Path(folder), own / "lock")
        try:
            yield jobs
        finally:
            jobs.close()


class Jobs:
    """The jobs of a folder. Its methods may be called from any thread."""

    def __init__(self, folder: Path, lock: Path) -> None:
        self.folder, self.note = folder, lock
        self.lock = threading.RLock()
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.tracks: dict[Path, Track] = {}
        self.memories: dict[str, Memory] = {}
        self.addresses: dict[tuple[str, float], str] = {}
        self.told: dict[Path, tuple[tuple[int, int], Any]] = {}
        self.ended = threading.Event()
        self.sampler = threading.Thread(target=self._sample, daemon=True)
        self.sampler.start()

    def close(self) -> None:
        """End the sampling of memory; the jobs go on."""
        self.ended.set()
        self.sampler.join(5)

    def announce(self, address: str) -> None:
        """Note the studio's address, for another one that finds the folder locked."""
        self.note.write_text(address)

    # ---- starting and stopping

    def start(
        self, words: Sequence[str], output: str | None, *, files: dict[str, str] | None = None, planned: list[int] | None = None,
        facts: dict[str, Any] | None = None, environment: dict[str, str] | None = None,
    ) -> Job:  # fmt: skip
        """Start a command.

        Args:
            words: after `lownibble`; a word '{job}/NAME' is the path of the file NAME of `files`.
            files: name -> text of files to put into the job's own folder.
        Raises:
            OutputError: a running job has the same output, or the job's folder cannot be written.
            ConfigError: the process cannot be started.
        """
        with self.lock:
            for other in self.all():
                if (
                    output
                    and other.folder
                    and other.folder.resolve() == Path(output).resolve()
                    and self.status(other) == "running"
                ):
                    raise OutputError(f"A job that writes to '{output}' is running. Choose another name, or stop that one first.")
            id_ = self._free_id(words[0])
            place = self._place(id_)
            paths = {f"{{job}}/{name}": str(place / name) for name in files or {}}
            job = Job(id_, [paths.get(word, word) for word in words], str(Path.cwd()), output, planned=planned,
                      facts=facts or {})  # fmt: skip
            with _disk(place):
                place.mkdir(parents=True)
            try:
                with _disk(place):
                    for name, text in (files or {}).items():
                        (place / name).write_text(text, encoding="utf-8")
                return self._launch(job, job.words, environment)
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise

    def _launch(self, job: Job, words: list[str], environment: dict[str, str] | None = None) -> Job:
        place = self._place(job.id)
        with _disk(place), (place / "result").open("wb") as result, (place / "log").open("ab") as log:
            log.write(f"$ lownibble {shlex.join(words)}\n".encode())
            log.flush()
            try:
                child = subprocess.Popen(
                    [sys.executable, "-m", "lownibble", *words, "--json"], stdin=subprocess.DEVNULL, stdout=result, stderr=log,
                    cwd=job.cwd, env={**os.environ, **(environment or {})}, start_new_session=True,
                )  # fmt: skip
            except (OSError, ValueError) as error:  # no such folder, no more processes, too long, a zero byte
                raise ConfigError(
                    f"Cannot start 'lownibble {job.kind}' in '{job.cwd}': {error}. Look whether that folder is there, and "
                    "whether the machine has room for another process."
                ) from None
            self.children[job.id] = child
            began = 0.0
            with suppress(psutil.Error):
                began = psutil.Process(child.pid).create_time()
            job = replace(job, pid=child.pid, began=began, started=time.time(), asked=False)
            try:
                self._write(job)
            except OSError:
                child.kill()  # a job that no studio would find again
                raise
        return job

    def stop(self, id_: str) -> Job:
        """Ask a job to stop; asked again, end it with all of its processes.

        Raises:
            ConfigError: it runs, and was not started here.
        """
        with self.lock:
            job = self.job(id_)
            if self.status(job) == "running":
                if not job.pid:
                    raise ConfigError("Only a job that was started here can be stopped. Stop this one where it was started.")
                with suppress(ProcessLookupError):
                    if job.asked:
                        os.killpg(job.pid, signal.SIGKILL)
                    else:
                        os.kill(job.pid, signal.SIGTERM)
                job = replace(job, asked=True)
                with suppress(OSError):  # a full disk keeps nobody from stopping
                    self._write(job)
            return job

    def resume(self, id_: str, environment: dict[str, str] | None = None) -> Job:
        """Start a job that is not running again, from where it was.

        Raises:
            ConfigError: it is running, or was not started here, or the process cannot be started.
            OutputError: the job's folder cannot be written.
        """
        with self.lock:
            job = self.job(id_)
            if self.status(job) == "running" or not job.pid:
                raise ConfigError("Only a job that was started here and has ended can be resumed.")
            more = ["--resume"] if job.kind in RESUMED and "--resume" not in job.words else []
            return self._launch(job, [*job.words, *more], environment)

    def _free_id(self, kind: str) -> str:
        taken = {path.name for path in (self.folder / ".studio" / "jobs").iterdir()}
        return next(name for n in range(1, len(taken) + 2) if (name := f"{kind}-{n}") not in taken)

    def free_output(self, name: str) -> str:
        """A path below the folder that is not there yet: 'qlora-1', 'qlora-2', ..., with the name's suffix."""
        stem, suffix = Path(name).stem, Path(name).suffix
        taken = {job.folder.resolve() for job in self.all() if job.folder}
        paths = (str(self.folder / f"{stem}-{n}{suffix}") for n in range(1, 1 << 20))
        return next(path for path in paths if Path(path).resolve() not in taken and not Path(path).exists())

    def _place(self, id_: str) -> Path:
        return self.folder / ".studio" / "jobs" / id_

    def _write(self, job: Job) -> None:
        place = self._place(job.id)
        part = place / "job.part"
        part.write_text(json.dumps(asdict(job)), encoding="utf-8")
        part.replace(place / "job.json")

    # ---- finding and describing

    def all(self) -> list[Job]:
        """All jobs and runs, newest first.

        Raises:
            OutputError: the folder is gone.
        """
        found = []
        try:
            places, folders = [*(self.folder / ".studio" / "jobs").iterdir()], [*self.folder.iterdir()]
        except OSError as error:
            raise OutputError(
                f"Cannot read '{self.folder}': {error.strerror}. Put it back, or start the studio again with another --folder."
            ) from None
        for path in places:
            known = self._parsed(path / "job.json")
            with suppress(TypeError):  # no job, or one of another version
                job = Job(**known)
                if isinstance(job.words, list) and all(isinstance(word, str) for word in job.words):
                    found.append(job)
        outputs = {job.folder.resolve() for job in found if job.folder}
        for folder in folders:
            if folder.resolve() in outputs or folder.name.startswith("."):
                continue
            with suppress(OSError, ValueError):  # it may not be read, or is no run: max of nothing
                files = [each for name in _OF_A_RUN if (each := folder / name).exists()]
                methods = sorted(folder.glob("*/events.jsonl")) if not files and _is_held(folder) else []
                written = max(each.stat().st_mtime for each in (*files, *methods))
                record = self._parsed(folder / "record.json")
                command = record.get("command") if isinstance(record, dict) else None
                words = list(map(str, command[1:])) if isinstance(command, list) else ["compare" if methods else "train"]
                found.append(Job(f"run:{folder.name}", words, str(Path.cwd()), str(folder), started=written))
        return sorted(found, key=lambda job: -job.started)

    def job(self, id_: str) -> Job:
        """A job by its id.

        Raises:
            ConfigError: there is none.
        """
        for job in self.all():
            if job.id == id_:
                return job
        raise ConfigError(f"There is no job '{id_}'. Load the page again.")

    def _parsed(self, path: Path) -> Any:
        """The JSON of a file, read again only where it has changed; None if there is none."""
        try:
            changed = path.stat().st_mtime_ns, path.stat().st_size
            if path not in self.told or self.told[path][0] != changed:
                text = path.read_text(encoding="utf-8")
                self.told[path] = changed, json.loads(text.strip().rpartition("\n")[2] if path.name == "result" else text)
        except (OSError, ValueError):
            return None
        return self.told[path][1]

    def status(self, job: Job) -> str:
        """'running', 'ok', 'failed', 'interrupted' or 'died'."""
        if child := self.children.get(job.id):
            child.poll()
        if _lives(job) if job.pid else _is_held(job.folder):
            return "running"
        result = self.result(job)
        if result is None:
            return "interrupted" if job.asked or not job.pid else "died"
        return str(result.get("status", "ok"))

    def result(self, job: Job) -> dict[str, Any] | None:
        """The JSON document that a job ended with: a record, or an error."""
        if job.pid:
            found = self._parsed(self._place(job.id) / "result")
        else:
            found = self._parsed(job.folder / "record.json") if job.folder else None
        return found if isinstance(found, dict) else None

    def tracks_of(self, job: Job) -> list[Track]:
        """The runs of a job: one, or one for each method of a comparison. Read them under `lock`: another thread's look adds to
        them."""
        if job.folder is None or job.kind not in ("train", "compare"):
            return []
        files = [job.folder / "events.jsonl"] if job.kind == "train" else sorted(job.folder.glob("*/events.jsonl"))
        with self.lock:
            return [self.tracks.setdefault(f, Track("" if job.kind == "train" else f.parent.name, f)).look() for f in files]

    def memory(self, job: Job) -> dict[str, Any]:
        """Bytes held over time, as `Memory.curve`."""
        with self.lock:
            return self.memories.setdefault(job.id, Memory(self._place(job.id) / "memory")).look().curve()

    def log(self, job: Job) -> str:
        """The end of what it said."""
        try:
            with (self._place(job.id) / "log").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - LOG_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))

    def address(self, job: Job) -> str | None:
        """Where a server listens, once it does: what its last start said, which may have left the end of the log since."""
        if job.kind != "serve" or self.status(job) != "running":
            return None
        key = job.id, job.started
        with self.lock, suppress(OSError):
            if key not in self.addresses:
                text = (self._place(job.id) / "log").read_text(encoding="utf-8", errors="replace").rpartition("\n$ lownibble ")[2]
                if found := re.search(r" at (http://\S+)/v1", text):
                    self.addresses[key] = found[1]
        return self.addresses.get(key)

    def describe(self, job: Job) -> dict[str, Any]:
        """What a list of jobs shows of one, ready for JSON."""
        status, result = self.status(job), self.result(job)
        note = "" if status in ("running", "ok") else str((result or {}).get("error", DIED if status == "died" else ""))
        with self.lock:
            tracks = self.tracks_of(job)
            seen = sum(track.tail.offset for track in tracks)
            runs = [{"name": track.name, **track.figures(), **self._ended(job, track)} for track in tracks]
        return {
            "id": job.id, "kind": job.kind, "command": f"lownibble {shlex.join(job.words)}", "status": status, "note": note,
            "asked": job.asked, "output": job.shown, "started": job.started, "own": bool(job.pid), "planned": job.planned,
            "facts": job.facts, "seen": seen, "runs": runs,
        }  # fmt: skip

    def _ended(self, job: Job, track: Track) -> dict[str, str]:
        """The phase of a comparison's method that has a record: one that failed says nothing at its end."""
        is_over = job.kind == "compare" and (track.tail.path.parent / "record.json").exists()
        return {"phase": "finished"} if is_over else {}

    # ---- memory

    def _sample(self) -> None:
        """Note once a second what running jobs hold."""
        while not self.ended.wait(1.0):
            with suppress(Exception):  # the folder is gone, the disk is full: the page says so, and this thread is the only one
                running = [job for job in self.all() if job.pid and self.status(job) == "running"]
                on_gpus = gpu_bytes() if running else {}
                for job in running:
                    ids, in_memory = held(job.pid)
                    on_gpu = sum(on_gpus.get(pid, 0) for pid in ids)
                    sample = {"seconds": round(time.time() - job.started, 1), "bytes": on_gpu or in_memory}
                    with (self._place(job.id) / "memory").open("a") as file:
                        file.write(json.dumps(sample) + "\n")


_OF_A_RUN = ("record.json", "events.jsonl")


def _is_held(folder: Path | None) -> bool:
    """Whether a process writes its run there (`training/output.py`)."""
    if folder is None:
        return False
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lives(job: Job) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(job.pid)
        same = abs(process.create_time() - job.began) < 5
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    return False


@contextmanager
def _disk(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(place if place.exists() else place.parent).free
        raise OutputError(
            f"Cannot write into '{place}': {error.strerror} ({free / 1e9:.1f} GB are free). Free some space, then try again."
        ) from None
