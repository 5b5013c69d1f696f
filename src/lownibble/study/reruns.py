"""Cells of a study that are run a second time, on another day or machine, and whether they agree with the first run.

    OUTPUT/again/<digest>-<n>.json    the record of the n-th further run of a cell

A digest names everything that decides a cell's result. On the same machine and versions the numbers should be the same; elsewhere
they differ by rounding, which training amplifies. What a study claims is weaker: its intervals are about runs with other seeds,
so two runs of one cell may differ by as much as two seeds do. They agree where they differ by no more than the 95% interval of
the difference of two seeds, by the standard deviation over seeds that the methods of the task have in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from lownibble.study.decide import LEVEL, main_metric
from lownibble.study.records import read_record
from lownibble.study.spec import Cell

FOLDER = "again"


def choose(compared: Sequence[Cell], finished: Iterable[str], count: int) -> list[Cell]:
    """At most `count` of the `finished` cells (digests), spread over models, tasks and methods; the same ones each time."""
    done, nth, order = set(finished), dict[tuple[str, str, str], int](), list[tuple[int, str, Cell]]()
    for cell in sorted({cell.digest: cell for cell in compared if cell.digest in done}.values(), key=lambda cell: cell.digest):
        place = (cell.model, cell.task, cell.method)
        nth[place] = nth.get(place, -1) + 1
        order.append((nth[place], cell.digest, cell))
    return [cell for *_, cell in sorted(order, key=lambda each: each[:2])[:count]]


def file_of(folder: Path, digest: str) -> Path:
    """Where the next further run of a cell is kept."""
    number = 1
    while (folder / FOLDER / f"{digest}-{number}.json").exists():
        number += 1
    return folder / FOLDER / f"{digest}-{number}.json"


def agreement(folder: Path, study: Mapping[str, Any], records: Mapping[str, dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Each further run beside the first one: the task's main score and the loss, their differences and the bounds on them.

    `bound` is None where no method of the task has two seeds; `same`: all losses and scores are the same numbers.
    """
    found = []
    for cell in study["cells"]:
        first = records[cell["digest"]]
        for file in sorted((folder / FOLDER).glob(f"{cell['digest']}-*.json")):
            second = read_record(file)
            if first is None or first["status"] != "ok" or second is None:
                continue
            own = {name: cell[name] for name in ("model", "task", "method", "seed", "digest")}
            own |= {"first": first["created"], "again": second["created"], "error": second.get("error")}
            if second["status"] == "ok":
                results = first["result"], second["result"]
                metrics = dict.fromkeys((main_metric(cell["kind"]), "loss"))
                own["same"] = all(results[0][name] == results[1][name] for name in ("losses", "evaluations", "scores"))
                own["scores"] = {
                    name: _difference(results[0]["scores"][name], results[1]["scores"][name], _spread(study, records, cell, name))
                    for name in metrics
                }
            found.append(own)
    return found


def words(found: Sequence[Mapping[str, Any]]) -> str:
    """What further runs show, in two sentences."""
    ran = [run for run in found if "scores" in run]
    judged = [of for run in ran for of in run["scores"].values() if of["bound"] is not None]
    same, agree = sum(run["same"] for run in ran), sum(of["agrees"] for of in judged)
    failed = f" {len(found) - len(ran)} failed." if len(found) > len(ran) else ""
    return (
        f"Of {len(found)} repeated runs {same} gave the same numbers throughout.{failed} {agree} of {len(judged)} scores "
        "differ by no more than two seeds of a method do (in 95 of 100 cases)."
    )


def _difference(first: float, again: float, spread: tuple[float, int] | None) -> dict[str, Any]:
    bound = None
    if spread is not None:
        bound = float(stats.t.ppf(1 - LEVEL / 2, spread[1])) * spread[0] * math.sqrt(2)
    difference = again - first
    return {
        "first": first,
        "difference": difference,
        "bound": bound,
        "agrees": None if bound is None else abs(difference) <= bound,
    }


def _spread(
    study: Mapping[str, Any], records: Mapping[str, dict[str, Any] | None], of: Mapping[str, Any], metric: str
) -> tuple[float, int] | None:
    """Standard deviation of a score over seeds, pooled over the methods of a model and task, and its degrees of freedom."""
    by_method: dict[str, list[float]] = {}
    for cell in study["cells"]:
        found = records[cell["digest"]]
        if (cell["model"], cell["task"]) == (of["model"], of["task"]) and found is not None and found["status"] == "ok":
            by_method.setdefault(cell["method"], []).append(found["result"]["scores"][metric])
    free = sum(len(values) - 1 for values in by_method.values())
    if not free:
        return None
    means = {name: math.fsum(values) / len(values) for name, values in by_method.items()}
    squares = math.fsum((value - means[name]) ** 2 for name, values in by_method.items() for value in values)
    return math.sqrt(squares / free), free
