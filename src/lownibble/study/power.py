"""`study plan`: the cells, hours and power of a study, before it is run.

Power is the probability that a comparison of two equal methods shows equivalence: the share of simulated studies in which it
does, by the code that decides real ones, over all looks, as one of the planned comparisons with none shown before it (Holm's
first step: the study itself has a little more). Variances are those of finished records: of this study, or of the `pilot` that
its [decide] names; of the same comparisons if these have any, else of the task, else of others by the same metric. Where there
are none, `ASSUMED` stands in, and the plan says so. Variances from few seeds are uncertain, and so is the power.

`detectable` is a difference that the last look would show in 80% of studies with it.

Hours are those of records, too, and where there are none by operations (`durations.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lownibble import record
from lownibble.config import RunConfig
from lownibble.errors import ConfigError
from lownibble.measuring import mixed
from lownibble.study.analysis import POWER
from lownibble.study.contents import load_rows
from lownibble.study.decide import (
    DIFFERENT,
    EQUIVALENT,
    Comparison,
    comparisons,
    is_shown,
    main_metric,
    planned_looks,
    planned_pairs,
    tails,
)  # fmt: skip
from lownibble.study.durations import Durations, Kind, kind_of
from lownibble.study.records import read_record
from lownibble.study.spec import Cell, StudySpec, cells, read_study, tuning_cells
from lownibble.study.tasks import KINDS

STUDIES = 2000
"""Simulated studies for a figure: its error is about 1 point."""

ASSUMED = mixed.Variances(seed=0.02**2, row=0.15**2, rest=0.15)
"""Of the difference of a score by row, where no record says more; about those of accuracy in studies/articles."""

ASSUMED_LOSS = 0.01
"""Standard deviation over seeds of a difference in loss, as a share of it, where no record says more."""

TRIED, MOST_ROWS = (3, 5, 8, 12, 20, 30), 100_000
"""Numbers of seeds for which the rows that suffice are searched, and how far."""


def expected(
    of: mixed.Variances, looks: Sequence[int], rows: int, margin: float, comparisons: int, studies: int = STUDIES,
    seeds: int | None = None,
) -> tuple[float, float]:  # fmt: skip
    """The power of a comparison of equal methods, and its mean number of seeds until it is decided.

    Args:
        looks: numbers of seeds; the last one is all of them. comparisons: planned in the study. seeds: how many are run, by
            default all: looks beyond them are not taken, and keep their share of the error.
    """
    seeds = looks[-1] if seeds is None else seeds
    data = mixed.draw(of, seeds, rows, studies, np.random.default_rng(0))
    until, shown = np.full(studies, seeds), np.zeros(studies, bool)
    for look, tail in zip(looks, tails(EQUIVALENT, looks, comparisons), strict=True):
        if look <= seeds:
            new = is_shown(EQUIVALENT, mixed.estimate(data.first(look)), margin, tail) & ~shown
            until[new], shown = look, shown | new
    return float(shown.mean()), float(until.mean())


def detectable(of: mixed.Variances, seeds: int, rows: int, tail: float) -> float | None:
    """The difference that a look at so many seeds, of this tail, would show with a probability of `POWER`; None: seeds that are
    all alike show none."""
    data = mixed.estimate(mixed.draw(of, seeds, rows, STUDIES, np.random.default_rng(0)))
    distance = data.reach(tail) - data.mean
    return float(np.quantile(distance, POWER)) if np.isfinite(distance).all() else None


def plan_study(path: str | Path, output: str | Path, jobs: int = 1) -> dict[str, Any]:
    """Plan the study in the file `path`; `output`: its folder, whose records count. Nothing is run.

    Raises:
        InputError: the file, its data or its pilot cannot be used.
    """
    check_jobs(jobs)
    spec = read_study(path)
    folders = [Path(output)] if (Path(output) / "study.json").exists() else []
    if spec.decide.pilot is not None:
        folders.append(Path(spec.decide.pilot))
    known = [_Earlier(folder) for folder in folders]
    all_cells = [*tuning_cells(spec), *cells(spec)]
    durations = Durations(all_cells)
    for kind, seconds in (each for earlier in known for each in earlier.seconds):
        durations.learn(kind, seconds)
    finished = known[0].cells if folders and folders[0] == Path(output) else {}
    ended = {_place(cell): cell for cell in all_cells if _has_ended(cell, finished)}
    left = [(cell, durations.seconds(kind_of(cell))) for cell in all_cells if _place(cell) not in ended]
    fitting = _fitting(spec, left, jobs)
    pairs = planned_pairs(spec.decide.model_dump(), list(spec.methods))
    n = len(pairs) * len(spec.tasks) * len(spec.models)
    groups = {(cell.model, cell.task): cell for cell in cells(spec)} if pairs else {}
    tasks = [_task(spec, cell, pairs, n, known, fitting) for cell in groups.values()]
    wanted, hours = spec.decide.power or POWER, _hours(left, jobs)
    short = [each for each in tasks if each["power"] < wanted]
    return {
        **record.new("study-plan"),
        "status": "ok",
        "name": spec.name,
        "cells": len(all_cells),
        "left": len(left),
        "hours": hours,
        "hours_estimated": any(durations.is_estimated(kind_of(cell)) for cell, _ in left),
        "hours_given": spec.decide.hours,
        "seeds": len(spec.seeds),
        "seeds_in_time": fitting,
        "looks": list(planned_looks(spec.decide.model_dump(), spec.seeds)),
        "comparisons": n,
        "power": wanted,
        "tasks": tasks,
        "started": any(not cell.tuning for cell in ended.values()),
        "told": _told(spec, short, hours, fitting, wanted),
    }


def check_jobs(jobs: int) -> None:
    """Refuse a number of jobs below one (ConfigError)."""
    if jobs < 1:
        raise ConfigError(f"The number of jobs must be an integer >= 1. Got {jobs}.")


class _Earlier:
    """What the records in a study's folder say.

    Attributes:
        seconds: kind and seconds of each. cells: what the records say of the cells that have one, by their names.
    """

    def __init__(self, folder: Path) -> None:
        study = read_record(folder / "study.json")
        if study is None or study.get("kind") != "study":
            raise ConfigError(f"'{folder}' holds no study (study.json is missing or unreadable). Give the folder of 'study run'.")
        of = [*study["tuning"], *study["cells"]]
        records = {cell["digest"]: read_record(folder / "cells" / f"{cell['digest']}.json") for cell in of}
        ended = [(cell, found) for cell in of if (found := records[cell["digest"]]) is not None]
        self.seconds = [
            (Kind(c["model"], c["task"], c["method"], c["tuning"]), float(found["measured"]["seconds"]))
            for c, found in ended
            if found["status"] == "ok"
        ]
        names = ("model", "method", "task", "seed", "learning_rate", "tuning")
        self.cells: dict[tuple[Any, ...], dict[str, Any]] = {
            tuple(c[name] for name in names if c["tuning"] or name != "learning_rate"): found.get("cell", {})
            for c, found in ended
        }
        tasks = {name: {**task, "margin": None} for name, task in study["spec"]["tasks"].items()}
        every = {**study, "spec": {**study["spec"], "decide": {}, "tasks": tasks}}  # its margins are its own
        self.comparisons = [c for c in comparisons(every, records) if c.data is not None and len(c.seeds) > 1]


def _place(cell: Cell) -> tuple[Any, ...]:
    """A cell by its names: compared ones have learning rates that are not known yet."""
    rate = (cell.config.train.learning_rate,) if cell.tuning else ()
    return (cell.model, cell.method, cell.task, cell.seed, *rate, cell.tuning)


def _has_ended(cell: Cell, finished: Mapping[tuple[Any, ...], dict[str, Any]]) -> bool:
    """Whether a cell has a record with its options. Not looked at are files, which may have moved, and the learning rate that the
    search found."""
    if (found := finished.get(_place(cell))) is None:
        return False
    if "config" not in found:  # the record does not say
        return True
    try:
        before = RunConfig(**found["config"])
    except ConfigError:  # of a version with other options
        return False
    now = replace(cell, contents=("", "", ""))
    data = before.data.with_options(path=cell.config.data.path, eval_path=cell.config.data.eval_path)
    train = before.train if cell.tuning else before.train.with_options(learning_rate=cell.config.train.learning_rate)
    config = before.with_options(model=cell.config.model, data=data, train=train)
    return now.digest == replace(now, config=config, quantize=found.get("quantize", {})).digest


def _hours(left: Sequence[tuple[Cell, float | None]], jobs: int) -> float | None:
    if any(seconds is None for _, seconds in left):
        return None
    return sum(seconds or 0.0 for _, seconds in left) / 3600 / jobs


def _fitting(spec: StudySpec, left: Sequence[tuple[Cell, float | None]], jobs: int) -> int:
    """How many seeds end within the hours given; all, if nothing is known of the time."""
    for seeds in range(len(spec.seeds), 0, -1):
        needed = _hours([(cell, s) for cell, s in left if cell.tuning or cell.seed in spec.seeds[:seeds]], jobs)
        if spec.decide.hours is None or needed is None or needed <= spec.decide.hours:
            return seeds
    return 0


def _task(
    spec: StudySpec, cell: Cell, pairs: Sequence[tuple[str, str]], n: int, known: Sequence[_Earlier], seeds: int
) -> dict[str, Any]:  # fmt: skip
    """The power of the comparisons on one model and task, with the seeds that end in time."""
    metric, wanted = main_metric(cell.kind), spec.decide.power or POWER
    by_row = metric != "loss"
    rows = len(load_rows(cell.task, cell.kind, cell.config.data)[1].rows)
    of, margin, source = _variances(cell, metric, pairs, known)
    margin = spec.tasks[cell.task].margin or margin
    counted = rows if by_row else 1
    looks = planned_looks(spec.decide.model_dump(), spec.seeds) if spec.decide.looks else (max(1, seeds),)
    taken = [(look, tail) for look, tail in zip(looks, tails(DIFFERENT, looks, n), strict=True) if 1 < look <= seeds]
    power, until = expected(of, looks, counted, margin, n, seeds=seeds) if taken else (0.0, float(seeds))
    return {
        "model": cell.model, "task": cell.task, "metric": metric, "margin": margin, "rows": rows, "seeds": seeds,
        "variances": of._asdict(), "source": source, "power": power, "seeds_until_decided": until,
        "detectable": detectable(of, taken[-1][0], counted, taken[-1][1]) if taken else None,
        "needs": [[s, r if by_row else rows] for s in TRIED if (r := _rows_needed(of, s, margin, n, wanted, by_row)) is not None],
    }  # fmt: skip


def _rows_needed(of: mixed.Variances, seeds: int, margin: float, n: int, wanted: float, by_row: bool) -> int | None:
    """The least number of rows (to a fifth) with which so many seeds have the power; None: no number has."""
    rows = 20.0 if by_row else 1.0
    while rows <= (MOST_ROWS if by_row else 1):
        if expected(of, (seeds,), round(rows), margin, n, STUDIES // 4)[0] >= wanted:
            return round(rows)
        rows *= 1.2
    return None


def _variances(
    cell: Cell, metric: str, pairs: Sequence[tuple[str, str]], known: Sequence[_Earlier]
) -> tuple[mixed.Variances, float, str]:  # fmt: skip
    """Variances of a comparison on a task, its margin, and where they are from."""
    planned = [set(pair) for pair in pairs]
    like: list[tuple[str, Callable[[Comparison], bool]]] = [
        ("these comparisons", lambda c: (c.model, c.task) == (cell.model, cell.task) and {c.a, c.b} in planned),
        (f"the task {cell.task}", lambda c: c.task == cell.task and c.metric == metric),
        (f"other tasks with {metric}", lambda c: c.metric == metric),
    ]
    for earlier in known:
        for name, is_like in like:
            found = [c for c in earlier.comparisons if is_like(c)]
            if found:
                all_ = [mixed.variances(c.data) for c in found if c.data is not None]
                mean = mixed.Variances(*(statistics.fmean(each) for each in zip(*all_, strict=True)))
                margin = KINDS[cell.kind].margin if metric != "loss" else statistics.fmean(c.margin for c in found if c.margin)
                return mean, margin, f"records of {name}: {len(found)} x {len(found[0].seeds)} seeds"
    if metric == "loss":
        return mixed.Variances(ASSUMED_LOSS**2, 0.0, 0.0), KINDS[cell.kind].margin, "assumed, for a loss of 1"
    return ASSUMED, KINDS[cell.kind].margin, "assumed"


def _told(
    spec: StudySpec, short: Sequence[Mapping[str, Any]], hours: float | None, fitting: int, wanted: float
) -> list[str]:  # fmt: skip
    """What is to be said of a plan, a sentence each; nothing if its power suffices."""
    found = []
    if spec.decide.hours is not None and hours is None:
        found.append("Nothing is known of how long a cell takes: name a 'pilot' in [decide], or run a few cells first.")
    if short and fitting < len(spec.seeds):
        found.append(f"In {spec.decide.hours:g} hours {fitting} of {len(spec.seeds)} seeds end; all take {hours:.1f} hours.")
    for each in short:
        needs = " or ".join(f"{seeds} seeds x {rows} rows" for seeds, rows in each["needs"])
        known = f"{each['metric']} within {each['margin']:.3g}"
        found.append(
            f"{each['task']} on {each['model']}: the power is {each['power']:.0%} and should be {wanted:.0%} "
            f"({each['seeds']} seeds x {each['rows']} rows, {known}). It takes {needs or f'more than {TRIED[-1]} seeds'}."
        )
    return found
