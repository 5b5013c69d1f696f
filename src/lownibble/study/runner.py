"""`study run`: run the missing cells of a study, one process each, then the speed measurements.

    OUTPUT/study.json             the study, digests of its contents, the learning rates found, and which records belong to it
    OUTPUT/bases/<name>/          packed bases that runs share (`bases.py`)
    OUTPUT/cells/<digest>.json    one record per run; `spec.py` says what the digest is of
    OUTPUT/speed/<digest>.json    interleaved speed of the methods of one model and task
    OUTPUT/again/                 further runs of finished cells (`reruns.py`)
    OUTPUT/summary.json           figures over all of it (`analysis.py`; written with the report)
    OUTPUT/report.html, .md       the report (`report/study_page.py`)

A record is written atomically when its cell has ended, so a killed study is resumable: only missing cells are run. A failed
cell is a result too, and is run again only with `retry_failed`. Order: learning rate search, compared runs, speed measurements.
Seeds are run up to each look (`decide.py`); methods whose comparisons are all decided then are left out of later ones.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lownibble import record
from lownibble.errors import ConfigError, InputError, OutputError
from lownibble.study import bases, devices, reruns
from lownibble.study.contents import Began, look
from lownibble.study.decide import comparisons, decide, planned_looks, still_needed
from lownibble.study.durations import Durations, Kind, kind_of
from lownibble.study.executors import EXECUTORS, Started, nobody_told
from lownibble.study.power import check_jobs, plan_study
from lownibble.study.records import peak_bytes, read_record
from lownibble.study.spec import Cell, Contents, StudySpec, cells, read_study, tuning_cells
from lownibble.training.output import hold

Rates = dict[tuple[str, str, str], float]


def run_study(
    path: str | Path, output: str | Path, *, jobs: int = 1, gpus_per_cell: int = 1, executor: str = "local",
    retry_failed: bool = False, again: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Run the missing parts of the study in the file `path`; returns the contents of OUTPUT/study.json.

    Args:
        output: its folder; records of the study in it are reused.
        jobs: maximum concurrent runs, each on GPUs of its own (`devices.slots`). Speed is always measured alone.
        gpus_per_cell: GPUs that a run is trained on, one process each; without GPUs, processes. With several, methods do not take
            turns.
        executor: 'local' or 'ray'.
        retry_failed: run failed cells and failed or skipped speed measurements again.
        again: run so many of the finished cells once more, to see whether they agree with their first run.
    Raises:
        InputError: the file, its data or its models cannot be used; nothing was run.
        OutputError: the folder cannot be written, or another process is using it.
        DataError, ModelError: rows or a model changed while it ran; what had ended before is kept.
    """
    if executor not in EXECUTORS:
        raise ConfigError(f"There is no executor '{executor}'. Give one of {', '.join(EXECUTORS)}.")
    check_jobs(jobs)
    spec = read_study(path)
    for cell in (*tuning_cells(spec), *cells(spec)):
        devices.check(cell.config, gpus_per_cell)
    contents = look(cell for cell in cells(spec) if cell.seed == spec.seeds[0])
    if spec.decide.power is not None:
        _check_power(plan_study(path, output, jobs))
    with hold(output) as folder:
        _forget_kept(folder, retry_failed)
        studied = _Study(spec, contents, folder, jobs, gpus_per_cell, executor)
        return studied.run(again)


def _check_power(plan: dict[str, Any]) -> None:
    """Refuse a study whose power does not suffice; of one that has begun, say so.

    Raises:
        ConfigError: as above.
    """
    if not plan["told"]:
        return
    found = "\n  ".join(["The study is not expected to reach the 'power' of its [decide].", *plan["told"]])
    if not plan["started"]:
        raise ConfigError(f"{found}\n  Nothing was run. Change the study, or leave 'power' out to run it all the same.")
    print(f"warning: {found}", file=sys.stderr)


def _forget_kept(folder: Path, retry_failed: bool) -> None:
    """Remove records to be made again: unreadable ones and, with `retry_failed`, failed or skipped ones."""
    for file in (*folder.glob("cells/*.json"), *folder.glob("speed/*.json")):
        found = read_record(file)
        if found is None or (retry_failed and (found["status"] != "ok" or "skipped" in found)):
            file.unlink()


class _Study:
    """A running study and its folder."""

    def __init__(self, spec: StudySpec, contents: Contents, folder: Path, jobs: int, gpus: int, executor: str) -> None:
        self.spec, self.contents, self.folder, self.jobs = spec, contents, folder, jobs
        self.gpus, self.executor = gpus, executor
        self.grid = list(tuning_cells(spec, contents))
        self.before = read_record(folder / "study.json") or {}
        self.began = Began(contents, [*self.grid, *cells(spec, contents=contents)])
        self.shown = _Shown(folder, jobs, Durations([*self.grid, *cells(spec)], here=executor == "local" and gpus == 1))

    def run(self, again: int) -> dict[str, Any]:
        self._write(best_rates(self.folder, self.grid))
        with self.shown:
            self.shown.count([*self.grid, *cells(self.spec, best_rates(self.folder, self.grid), self.contents)])
            self._cells(self.grid)
            rates = best_rates(self.folder, self.grid)
            compared = list(cells(self.spec, rates, self.contents))
            self._write(rates)
            self.shown.count([*self.grid, *compared])
            for look in planned_looks(self.spec.decide.model_dump(), self.spec.seeds):
                still = self._undecided(compared)
                self.shown.count([*self.grid, *still])
                self._cells([cell for cell in still if cell.seed in self.spec.seeds[:look]])
            self._again(compared, again)
            self._speed(compared)
        return self._write(rates, ended=True)

    def _undecided(self, compared: Sequence[Cell]) -> list[Cell]:
        """The cells that have a record, and those that comparisons which are not decided yet need."""
        records = {cell.digest: read_record(self.folder / "cells" / f"{cell.digest}.json") for cell in compared}
        looks = planned_looks(self.spec.decide.model_dump(), self.spec.seeds)
        if len(looks) == 1:  # nothing is decided before the last seed, also where the study was interrupted or is extended
            return list(compared)
        study = {
            "spec": self.spec.model_dump(mode="json", exclude_unset=True),
            "cells": [{**_labels(cell), "digest": cell.digest} for cell in compared],
        }
        planned = comparisons(study, records)
        needed = still_needed(planned, decide(planned, looks))
        return [cell for cell in compared if records[cell.digest] or needed(cell.model, cell.task, cell.method)]

    def _decided(self, compared: Sequence[Cell], ended: bool) -> list[list[int]]:
        """The looks with which these cells, or some of them, have been decided: more than one where a study was extended."""
        same = {cell.digest for cell in compared} & {cell["digest"] for cell in self.before.get("cells", [])}
        found: list[list[int]] = self.before.get("decided", []) if same else []
        now = list(planned_looks(self.spec.decide.model_dump(), self.spec.seeds))
        return [*found, now] if ended and now not in found and now[-1] > 1 else found

    def _write(self, rates: Rates, ended: bool = False) -> dict[str, Any]:
        """Write study.json: the study and which records belong to it."""
        compared = list(cells(self.spec, rates, self.contents))
        found = {
            **record.new("study"),
            "status": "ok",
            "name": self.spec.name,
            "spec": self.spec.model_dump(mode="json", exclude_unset=True),
            "contents": self.contents._asdict(),
            "environment": record.environment(),
            "jobs": self.jobs,
            "gpus_per_cell": self.gpus,
            "executor": self.executor,
            "tuning": [{**_labels(cell), "digest": cell.digest} for cell in self.grid],
            "learning_rates": [
                {"model": model, "method": method, "task": task, "learning_rate": rate}
                for (model, method, task), rate in rates.items()
            ],
            "cells": [{**_labels(cell), "digest": cell.digest} for cell in compared],
            "speed": [{"model": model, "task": task, "digest": digest} for (model, task), (digest, _) in self._turns(compared)],
            "decided": self._decided(compared, ended),
        }
        self._keep("study.json", found)
        return found

    def _keep(self, name: str, found: dict[str, Any]) -> None:
        """Write a record.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            record.write(self.folder / name, found)
        except OSError as error:
            raise OutputError(
                f"Cannot write into '{self.folder}': {error}. Free some space, then run the study again; it resumes."
            ) from error

    def _cells(self, wanted: Sequence[Cell]) -> None:
        """Run the cells that have no record."""
        unique = {cell.digest: cell for cell in wanted}
        missing = [cell for digest, cell in unique.items() if not (self.folder / "cells" / f"{digest}.json").exists()]
        failed = self._bases(missing)
        for cell in missing:
            if cell.base in failed:
                self._ended(cell, failed[cell.base])
        missing = [cell for cell in missing if cell.base not in failed]
        work = [self._job(cell) for cell in missing]
        for index, found in self._execute(work, lambda index: self.shown.began(missing[index], missing[:index])):
            if found["status"] == "ok":
                shutil.rmtree(self._work(missing[index]), ignore_errors=True)
            self._ended(missing[index], found)

    def _execute(
        self, work: Sequence[dict[str, Any]], started: Started = nobody_told, jobs: int | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
        """(index, record) of each job as it ends."""
        return EXECUTORS[self.executor](work, jobs or self.jobs, self.gpus, started)

    def _ended(self, cell: Cell, found: dict[str, Any]) -> None:
        if found["status"] == "ok":
            self.began.check(cell, found)
        self._keep(f"cells/{cell.digest}.json", _of_cell(cell, found))
        self.shown.ended(cell, found)

    def _again(self, compared: Sequence[Cell], count: int) -> None:
        """Run finished cells once more."""
        finished = [cell.digest for cell in compared if _peak(self.folder, cell) is not None]
        chosen = reruns.choose(compared, finished, count)
        failed = self._bases(chosen)
        for cell in chosen:
            if cell.base in failed:
                self._ran_again(cell, failed[cell.base])
        work = [cell for cell in chosen if cell.base not in failed]
        if count:
            self.shown.say(f"{len(work)} finished cells are run once more")
        for index, found in self._execute([self._job(cell) for cell in work]):
            shutil.rmtree(self._work(work[index]), ignore_errors=True)
            self._ran_again(work[index], found)

    def _ran_again(self, cell: Cell, found: dict[str, Any]) -> None:
        if found["status"] == "ok":
            self.began.check(cell, found)
        self._keep(str(reruns.file_of(self.folder, cell.digest).relative_to(self.folder)), _of_cell(cell, found))
        how = found.get("error") or ", ".join(f"{name} {value:.3f}" for name, value in found["result"]["scores"].items())
        self.shown.say(f"again: {cell.task} x {cell.method} x seed {cell.seed}: {how}")

    def _bases(self, wanted: Sequence[Cell]) -> dict[str | None, dict[str, Any]]:
        """Pack the bases of these cells that are not there; returns the records of those that failed, by name."""
        needed = {cell.base: cell for cell in wanted if cell.base is not None}
        missing = {name: cell for name, cell in needed.items() if not bases.is_packed(self._base(name))}
        work = [bases.job(cell.config, cell.quantize, self._base(name)) for name, cell in missing.items()]
        failed: dict[str | None, dict[str, Any]] = {}
        for index, found in self._execute(work, lambda index: self.shown.say(f"base {list(missing)[index]}: it is being packed")):
            name, cell = list(missing.items())[index]
            if found["status"] != "ok":
                failed[name] = {**found, "error": f"Its base could not be packed: {found['error']}"}
            else:
                try:
                    self.began.check(cell, found)
                except InputError:
                    shutil.rmtree(self._base(name))
                    raise
                self.shown.say(f"base {name}: packed for {cell.task} x {cell.method}")
        return failed

    def _base(self, name: str) -> Path:
        return self.folder.resolve() / "bases" / name

    def _work(self, cell: Cell) -> Path:
        """The folder of a long run's checkpoints until it has finished."""
        return self.folder.resolve() / "work" / cell.digest

    def _job(self, cell: Cell) -> dict[str, Any]:
        config = cell.config if cell.base is None else bases.on_base(cell.config, self._base(cell.base))
        train = config.train.with_options(output_dir=None, report_to="none", resume=False)
        if config.train.save_steps is not None:  # long runs resume from their newest checkpoint
            train = train.with_options(output_dir=str(self._work(cell)), resume=True)
        return {
            "job": "cell", "kind": cell.kind, "tuning": cell.tuning, "ranks": self.gpus,
            "config": config.with_options(train=train).to_dict(),
        }  # fmt: skip

    def _turns(self, compared: Sequence[Cell]) -> list[tuple[tuple[str, str], tuple[str, dict[str, Cell]]]]:
        """For each model and task, the digest of its speed measurement and the cells measured: those of the first seed."""
        groups: dict[tuple[str, str], dict[str, Cell]] = {}
        for cell in compared:
            if cell.seed == self.spec.seeds[0]:
                groups.setdefault((cell.model, cell.task), {})[cell.method] = cell
        names = {
            key: hashlib.sha256("".join(c.digest for c in of.values()).encode()).hexdigest()[:16] for key, of in groups.items()
        }
        return [(key, (names[key], of)) for key, of in groups.items()]

    def _speed(self, compared: Sequence[Cell]) -> None:
        for (model, task), (digest, group) in self._turns(compared):
            path = self.folder / "speed" / f"{digest}.json"
            peaks = {name: _peak(self.folder, cell) for name, cell in group.items()}
            finished = {name: peak for name, peak in peaks.items() if peak is not None}
            known = read_record(path)
            if len(finished) < 2 or (known is not None and known.get("methods") == list(finished)):
                continue
            if self.gpus > 1:
                skipped = {**record.new("study-speed"), "status": "ok", "skipped": devices.ALONE}
                self._keep_speed(digest, skipped, model, task, list(finished))
                continue
            print(f"speed: {model} x {task}: {', '.join(finished)} take turns", file=sys.stderr)
            configs = {name: self._job(group[name])["config"] for name in finished}
            for config in configs.values():
                config["train"]["output_dir"], config["train"]["resume"] = None, False
            job = {"job": "speed", "methods": list(finished), "configs": configs, "peaks": list(finished.values())}
            for _, found in self._execute([job], jobs=1):
                self._keep_speed(digest, found, model, task, list(finished))

    def _keep_speed(self, digest: str, found: dict[str, Any], model: str, task: str, methods: list[str]) -> None:
        own = {"model": model, "task": task, "methods": methods}
        self._keep(f"speed/{digest}.json", {"kind": "study-speed", **found, **own})


def _of_cell(cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    """The record of a cell's run."""
    own = {**_labels(cell), "digest": cell.digest, "contents": cell.contents, "config": cell.config.to_dict()}
    own |= {"quantize": dict(cell.quantize)} if cell.quantize else {}
    return {**record.new("study-cell"), **found, "kind": "study-cell", "cell": own}


def _labels(cell: Cell) -> dict[str, Any]:
    names = ("model", "method", "task", "kind", "seed", "tuning")
    return {**{name: getattr(cell, name) for name in names}, "learning_rate": cell.config.train.learning_rate}


def _peak(folder: Path, cell: Cell) -> int | None:
    found = read_record(folder / "cells" / f"{cell.digest}.json")
    if found is None or found["status"] != "ok":
        return None
    return peak_bytes(found)


def best_rates(folder: Path, grid: Sequence[Cell]) -> Rates:
    """The learning rate with the lowest evaluation loss for each (model, method, task) whose grid has a finished run."""
    losses: dict[tuple[str, str, str], dict[float, float]] = {}
    for cell in grid:
        found = read_record(folder / "cells" / f"{cell.digest}.json")
        if found is not None and found["status"] == "ok" and math.isfinite(found["result"]["scores"]["loss"]):
            key = (cell.model, cell.method, cell.task)
            losses.setdefault(key, {})[cell.config.train.learning_rate] = found["result"]["scores"]["loss"]
    return {key: min(of, key=of.__getitem__) for key, of in losses.items()}


def _name(cell: Cell) -> str:
    which = f"learning rate {cell.config.train.learning_rate:g}" if cell.tuning else f"seed {cell.seed}"
    return f"{cell.task} x {cell.method} x {which}"


class _Shown:
    """Progress of a study on standard error: a bar on a terminal, and a line for each cell that ends."""

    def __init__(self, folder: Path, jobs: int, durations: Durations) -> None:
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True, markup=False)
        columns = (TextColumn("study"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.folder, self.jobs, self.total, self.done = folder, jobs, 0, 0
        self.left: dict[Kind, int] = {}
        self.durations = durations
        self.bar = self.progress.add_task("study", left="")

    def __enter__(self) -> _Shown:
        self.progress.start()
        return self

    def say(self, text: str) -> None:
        """Show a line."""
        self.console.print(text)

    def count(self, all_cells: Sequence[Cell]) -> None:
        """Count the finished and the missing cells."""
        first, self.total, self.done = not self.total, len(all_cells), 0
        self.left = {kind_of(cell): 0 for cell in all_cells}
        self.durations.known.clear()
        for cell in all_cells:
            key = kind_of(cell)
            found = read_record(self.folder / "cells" / f"{cell.digest}.json")
            self.left[key] += found is None
            self.done += found is not None
            if found is not None and found["status"] == "ok":
                self.durations.learn(key, found["measured"]["seconds"])
        if first:
            self.console.print(f"study: {self.total} cells, {self.done} of them are there already")
        self.progress.update(self.bar, total=self.total, completed=self.done, left=self._time_left())

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def began(self, cell: Cell, before: Sequence[Cell]) -> None:
        """Show that a cell has begun, if it is the first of its kind: it may take an hour in silence."""
        kind = kind_of(cell)
        if kind not in self.durations.known and kind not in map(kind_of, before):
            seconds = self.durations.seconds(kind)
            how_long = "how long it takes is not known yet" if seconds is None else f"it takes about {_time(seconds)}"
            self.say(f"{_name(cell)}: it has begun; {how_long}")

    def ended(self, cell: Cell, found: dict[str, Any]) -> None:
        """Show that a cell has ended, and how."""
        key = kind_of(cell)
        self.done += 1
        self.left[key] -= 1
        name = f"[{self.done}/{self.total}] {_name(cell)}"
        if found["status"] == "ok":
            seconds, scores = found["measured"]["seconds"], found["result"]["scores"]
            self.durations.learn(key, seconds)
            figures = ", ".join(f"{metric} {value:.3f}" for metric, value in scores.items())
            text = f"{name}: {figures} ({seconds:.0f} s); {self._time_left()}"
        else:
            text = f"{name}: failed: {found['error']}"
        self.console.print(text)
        self.progress.update(self.bar, completed=self.done, left=self._time_left())

    def _time_left(self) -> str:
        seconds = [(n, self.durations.seconds(kind)) for kind, n in self.left.items() if n]
        if any(each is None for _, each in seconds):
            return "time left unknown"
        return f"about {_time(sum(n * (each or 0.0) for n, each in seconds) / self.jobs)} left"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
