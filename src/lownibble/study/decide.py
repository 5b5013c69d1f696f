"""What a study's comparisons show: a difference, equivalence, or neither, over looks and over all comparisons.

A comparison is two methods on one model and task, by its first metric. It shows a difference if the interval of the mixed model
(`measuring/mixed.py`) leaves out 0, and equivalence if two one-sided tests place it within the margin (Schuirmann 1987). Each
look has its share of the 5% (`measuring/sequential.py`). Of all planned comparisons at most 5% of studies show any difference
that is not there, and at most 5% any equivalence (Holm 1979, over each of the two kinds of statement, at whatever look: Maurer
and Bretz 2013). A decision stays: what is shown is as of the look that showed it.

A study without looks is decided once all its cells have ended. What its records show before is provisional, as each report of
it has the whole 5%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from lownibble.measuring import mixed, sequential
from lownibble.study.tasks import KINDS

LEVEL = 0.05
"""Share of studies that may show any difference that is not there; and any equivalence."""

DIFFERENT, EQUIVALENT = "different", "equivalent"

Records = Mapping[str, Mapping[str, Any] | None]
"""Digest of a cell -> its record; None: it has none."""


@dataclass(frozen=True)
class Comparison:
    """Two methods on one model and task.

    Attributes:
        metric: what is compared. margin: of equivalence, in its units; None: nothing is known yet.
        seeds: those that finished with both, in the study's order. data: their differences a - b; None without seeds.
        ended: for each look, how many of `seeds` it has; None: some of its cells are missing.
        whole: no cell is missing.
    """

    model: str
    task: str
    a: str
    b: str
    metric: str
    margin: float | None
    seeds: tuple[int, ...]
    data: mixed.Layout | None
    ended: tuple[int | None, ...]
    whole: bool = True


@dataclass(frozen=True)
class Decision:
    """What a comparison shows.

    Attributes:
        shown: DIFFERENT, EQUIVALENT or None.
        seeds: how many it is based on, by `tail` at the look where it was decided, or else at the last one.
        looked: number of looks until then. tail: of each side of the interval; 0.025 with a single look.
        level: of equivalence there, were it the only comparison; 0.05 with a single look.
        provisional: cells are missing of a study that looks once.
    """

    shown: str | None
    seeds: int
    looked: int
    tail: float
    level: float = LEVEL
    provisional: bool = False


def planned_looks(decide: Mapping[str, Any], seeds: Sequence[int]) -> tuple[int, ...]:
    """Numbers of seeds at which a study looks: those of its table [decide], and all."""
    return (*decide.get("looks", ()), len(seeds))


def planned_pairs(decide: Mapping[str, Any], methods: Sequence[str]) -> list[tuple[str, str]]:
    """The comparisons that a study plans: those of its table [decide], else all pairs; each in the order of `methods`."""
    chosen = [set(pair) for pair in decide.get("pairs", ())]
    return [pair for pair in combinations(methods, 2) if not chosen or set(pair) in chosen]


def main_metric(kind: str) -> str:
    """The metric that decides a kind of task."""
    metric = KINDS[kind].metrics[0]
    return "loss" if metric == "perplexity" else metric


def comparisons(study: Mapping[str, Any], records: Records) -> list[Comparison]:
    """The planned comparisons of a study (the contents of study.json), with what their records say."""
    spec = study["spec"]
    looks = planned_looks(spec.get("decide", {}), seeds := spec.get("seeds", [0, 1, 2]))
    cells = {(c["model"], c["task"], c["method"], c["seed"]): c for c in study["cells"]}
    found = []
    for model, task in dict.fromkeys((c["model"], c["task"]) for c in study["cells"]):
        methods = list(dict.fromkeys(c["method"] for c in study["cells"] if (c["model"], c["task"]) == (model, task)))
        for a, b in planned_pairs(spec.get("decide", {}), methods):
            of = {seed: [records[cells[model, task, name, seed]["digest"]] for name in (a, b)] for seed in seeds}
            kind = cells[model, task, a, seeds[0]]["kind"]
            found.append(_comparison(model, task, (a, b), kind, spec["tasks"][task].get("margin"), of, looks))
    return found


def _comparison(
    model: str, task: str, pair: tuple[str, str], kind: str, margin: float | None,
    of: Mapping[int, Sequence[Mapping[str, Any] | None]], looks: Sequence[int],
) -> Comparison:  # fmt: skip
    metric, order = main_metric(kind), list(of)
    runs = [{seed: r for seed in of if (r := of[seed][side]) and r["status"] == "ok"} for side in (0, 1)]
    both = {seed: [run[seed]["result"] for run in runs] for seed in of if all(seed in run for run in runs)}
    if why_not_compared(*runs):
        both = {}
    ended = [
        sum(seed in both for seed in order[:look]) if all(r is not None for seed in order[:look] for r in of[seed]) else None
        for look in looks
    ]
    if len(looks) == 1:  # a study that looks once shows what there is until then
        ended = [len(both)]
    if margin is None:
        margin = margin_of(kind, both)
    data = mixed.layout(differences(both, metric)) if both else None
    whole = all(r is not None for each in of.values() for r in each)
    return Comparison(model, task, *pair, metric, margin, tuple(both), data, tuple(ended), whole)


def why_not_compared(a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]]) -> str:
    """Why two methods cannot be compared by the records of their finished runs (by seed), or ''."""
    both = [run[seed] for seed in a if seed in b for run in (a, b)]
    if not both:
        return "no seed finished with both"
    return "" if _of_same_rows(both) else "their runs are of different rows"


def _of_same_rows(runs: Iterable[Mapping[str, Any]]) -> bool:
    """Whether runs were trained and scored on the same rows, as far as their records say."""
    of = set()
    for run in runs:
        data, result = run.get("data", {}), run["result"]
        rows = sorted((metric, len(scores)) for metric, scores in result["row_scores"].items())
        of.add((data.get("train_digest"), data.get("eval_digest"), result.get("label_tokens"), *rows))
    return len(of) == 1


def margin_of(kind: str, both: Mapping[int, Sequence[Mapping[str, Any]]]) -> float | None:
    """The kind's margin of equivalence. Of a loss, which has no scale of its own, it is a share of that of the first seed, and so
    fixed before the first look; None without a seed. `both`: seed -> the two methods' results."""
    if main_metric(kind) != "loss":
        return KINDS[kind].margin
    first = next(iter(both.values()), None)
    return None if first is None else KINDS[kind].margin * float(np.mean([result["scores"]["loss"] for result in first]))


def differences(both: Mapping[int, Sequence[Mapping[str, Any]]], metric: str) -> list[list[float]]:
    """The differences (seeds, rows) of a metric; one row if it is not scored by row.

    Args:
        both: seed -> the two methods' results.
    """
    if all(metric in result["row_scores"] for results in both.values() for result in results):
        rows = [[result["row_scores"][metric] for result in results] for results in both.values()]
        return [[x - y for x, y in zip(a, b, strict=True)] for a, b in rows]
    return [[a["scores"][metric] - b["scores"][metric]] for a, b in both.values()]


def is_shown(kind: str, found: mixed.Estimate, margin: float, tail: float) -> Any:
    """Whether an estimate (or each of many) shows a difference or equivalence, at the tail of its look (see `tails`)."""
    reach = found.reach(tail)
    return np.abs(found.mean) > reach if kind == DIFFERENT else np.abs(found.mean) + reach < margin


def tails(kind: str, looks: Sequence[int], comparisons: int) -> tuple[float, ...]:
    """One-sided tails of the looks; a difference has two sides, equivalence is two tests of which both must reject."""
    return sequential.tails(looks, LEVEL / (2 if kind == DIFFERENT else 1) / comparisons)


def decide(planned: Sequence[Comparison], looks: Sequence[int]) -> list[Decision]:
    """Decide all planned comparisons of a study."""
    at = {kind: _holm(len(planned), partial(_first, kind, planned, looks)) for kind in (EQUIVALENT, DIFFERENT)}
    found, ours, levels = [], tails(DIFFERENT, looks, 1), tails(EQUIVALENT, looks, 1)
    provisional = len(looks) == 1 and not all(each.whole for each in planned)
    for i, each in enumerate(planned):
        shown = min((kind for kind in at if i in at[kind]), key=lambda kind: at[kind][i], default=None)
        over = [look for look, n in enumerate(each.ended) if n is not None]
        look = at[shown][i] if shown else max(over, default=0)
        seeds = each.ended[look]
        looked, used = look + 1 if over else 0, len(each.seeds) if seeds is None else seeds
        found.append(Decision(shown, used, looked, ours[look], levels[look], provisional))
    return found


def _first(kind: str, planned: Sequence[Comparison], looks: Sequence[int], i: int, left: int) -> int | None:
    """The first look at which comparison `i` is shown as one of `left`."""
    each = planned[i]
    for look, (seeds, tail) in enumerate(zip(each.ended, tails(kind, looks, left), strict=True)):
        if not seeds or each.data is None or each.margin is None:
            continue
        if is_shown(kind, mixed.estimate(each.data.first(seeds)), each.margin, tail):
            return look
    return None


def _holm(n: int, first: Callable[[int, int], int | None]) -> dict[int, int]:
    """Holm's procedure: comparison -> the look that showed it. `first`: that look, as one of so many comparisons."""
    found: dict[int, int] = {}
    while new := {i: look for i in range(n) if i not in found and (look := first(i, n - len(found))) is not None}:
        found |= new
    return found


def still_needed(planned: Sequence[Comparison], decisions: Sequence[Decision]) -> Callable[[str, str, str], bool]:
    """Whether more seeds of a (model, task, method) are needed: not if all its planned comparisons are decided."""
    open_: dict[tuple[str, str, str], bool] = {}
    for each, decision in zip(planned, decisions, strict=True):
        for method in (each.a, each.b):
            place = (each.model, each.task, method)
            open_[place] = open_.get(place, False) or decision.shown is None
    return lambda model, task, method: open_.get((model, task, method), True)
