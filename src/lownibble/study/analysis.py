"""Analysis of a study's records: means over seeds and differences between methods, each with a confidence interval.

Methods are compared within a model and a task, paired by seed (the same order of rows and the same initialisation for all of
them) and by evaluation row; what the comparisons show is decided in `decide.py`. Convergence is the ratio of the steps that two
methods need to the same loss, the higher one of their mean lowest losses and a hundredth more, paired by seed, averaged over
logarithms (geometric mean). A seed that does not get there counts as one that takes more steps than it had
(`measuring/survival.py`). (A method's own steps are, per seed, to the lowest loss that all reach.) Speed is measured
interleaved, not taken from the cells, which ran at different times. Memory is the peak of the cell's process above its baseline
after imports.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lownibble.errors import ConfigError
from lownibble.measuring import mixed, stats, survival
from lownibble.study import reruns
from lownibble.study.decide import (
    DIFFERENT,
    LEVEL,
    Decision,
    comparisons,
    decide,
    differences,
    main_metric,
    margin_of,
    planned_looks,
    still_needed,
    why_not_compared,
)  # fmt: skip
from lownibble.study.records import peak_bytes, read_record
from lownibble.study.tasks import KINDS, LOSS_MARGIN

LESS_IS_BETTER = ("perplexity", "loss")
"""Metrics for which lower is better."""

POWER = 0.8
"""The detectable difference is one that would be shown with this probability."""

LARGE = 100.0
"""Logarithms of ratios beyond which nothing is known."""

MEMORY_MATTERS = 0.05
"""Fraction of the peak that a method must save for memory to decide between methods of equal quality."""


def analyse(folder: str | Path) -> dict[str, Any]:
    """Summarise the study in `folder`: the contents of `summary.json` without claims and hardware table.

    Raises:
        ConfigError: the folder holds no study.
    """
    folder = Path(folder)
    study = read_record(folder / "study.json")
    if study is None or study.get("kind") != "study":
        raise ConfigError(f"'{folder}' holds no study (study.json is missing or unreadable). Give the folder of 'study run'.")
    records = {cell["digest"]: read_record(folder / "cells" / f"{cell['digest']}.json") for cell in _all(study)}
    speeds = {(each["model"], each["task"]): read_record(folder / "speed" / f"{each['digest']}.json") for each in study["speed"]}
    looks = planned_looks(study["spec"].get("decide", {}), seeds := study["spec"].get("seeds", [0, 1, 2]))
    planned = comparisons(study, records)
    decisions = decide(planned, looks)
    decided = {(c.model, c.task, c.a, c.b): decision for c, decision in zip(planned, decisions, strict=True)}
    needed = still_needed(planned, decisions)
    groups = []
    for model, task in dict.fromkeys((cell["model"], cell["task"]) for cell in study["cells"]):
        of = {kind: [c for c in study[kind] if (c["model"], c["task"]) == (model, task)] for kind in ("cells", "tuning")}
        groups.append(_group(study, of["cells"], of["tuning"], records, speeds.get((model, task)), decided))
    several = len({group["model"] for group in groups}) > 1
    for group in groups:
        group["label"] = f"{group['task']} on {group['model']}" if several else group["task"]
    stopped = {
        c["digest"] for c in study["cells"] if records[c["digest"]] is None and not needed(c["model"], c["task"], c["method"])
    }
    found = list(records.values())
    compared = [records[cell["digest"]] for cell in study["cells"]]
    return {
        "kind": "study-summary",
        "schema": study["schema"],
        "status": "ok" if any(r is not None and r["status"] == "ok" for r in compared) else "failed",
        "name": study["name"],
        "created": study["created"],
        "counts": {
            "cells": len(found),
            "finished": sum(r is not None and r["status"] == "ok" for r in found),
            "failed": sum(r is not None and r["status"] != "ok" for r in found),
            "stopped": len(stopped),
            "missing": sum(r is None for r in found) - len(stopped),
            "hours": sum(r["measured"]["seconds"] for r in found if r is not None and r["status"] == "ok") / 3600,
        },
        "seeds": seeds,
        "looks": list(looks),
        "comparisons": len(planned),
        "decided_before": [each for each in study.get("decided", []) if each != list(looks)],
        "groups": groups,
        "again": reruns.agreement(folder, study, records),
    }


def _all(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [*study["tuning"], *study["cells"]]


def _group(
    study: Mapping[str, Any], cells: Sequence[dict[str, Any]], grid: Sequence[dict[str, Any]],
    records: Mapping[str, dict[str, Any] | None], speed: dict[str, Any] | None,
    decided: Mapping[tuple[str, str, str, str], Decision],
) -> dict[str, Any]:  # fmt: skip
    """The summary of one model and task."""
    first = cells[0]
    kind, place = KINDS[first["kind"]], (first["model"], first["task"])
    margin = study["spec"]["tasks"][first["task"]].get("margin")
    names = list(dict.fromkeys(cell["method"] for cell in cells))
    runs = {name: _runs([cell for cell in cells if cell["method"] == name], records) for name in names}
    steps, target = _steps_to_target(runs)
    methods = []
    for name in names:
        own = [cell for cell in cells if cell["method"] == name]
        methods.append({
            "method": name,
            "seeds": sorted(runs[name]),
            "failed": [found["error"] for c in own if (found := records[c["digest"]]) is not None and found["status"] != "ok"],
            "missing": sum(records[cell["digest"]] is None for cell in own),
            "learning_rate": own[0]["learning_rate"],
            **_tuned([cell for cell in grid if cell["method"] == name], records),
            **_method(runs[name], steps.get(name, {}), _rates(speed, name)),
        })  # fmt: skip
    why_not = {(a, b): why_not_compared(runs[a], runs[b]) for a, b in combinations(names, 2)}
    pairs = [
        _pair(a, b, runs, first["kind"], margin, speed, decided.get((*place, a, b))) for (a, b), why in why_not.items() if not why
    ]
    return {
        "model": first["model"], "task": first["task"], "kind": first["kind"], "metrics": list(kind.metrics),
        "target_loss": target, "speed_skipped": (speed or {}).get("skipped"), "methods": methods, "pairs": pairs,
        "not_compared": [{"a": a, "b": b, "why": why} for (a, b), why in why_not.items() if why and (*place, a, b) in decided],
        "pareto": _pareto(methods, kind.metrics[0]), "pareto_of": _pareto_of(methods),
        **_advice(methods, pairs, kind.metrics[0]),
    }  # fmt: skip


def _runs(cells: Iterable[dict[str, Any]], records: Mapping[str, dict[str, Any] | None]) -> dict[int, dict[str, Any]]:
    """Seed -> record of the finished cells."""
    return {c["seed"]: found for c in cells if (found := records[c["digest"]]) is not None and found["status"] == "ok"}


def _tuned(grid: Sequence[dict[str, Any]], records: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """The learning rate grid with the loss of each, whether all failed, and whether the best lies at the grid's edge."""
    losses = []
    for cell in sorted(grid, key=lambda cell: float(cell["learning_rate"])):
        found = records[cell["digest"]]
        done = found is not None and found["status"] == "ok"
        losses.append(
            {"learning_rate": cell["learning_rate"], "loss": found["result"]["scores"]["loss"] if found and done else None}
        )
    known = [each["loss"] for each in losses if each["loss"] is not None]
    best = next((i for i, each in enumerate(losses) if known and each["loss"] == min(known)), None)
    failed = bool(losses) and not known
    return {
        "grid": losses,
        "grid_failed": failed,
        "at_edge": best is not None and len(losses) > 1 and best in (0, len(losses) - 1),
    }


def _rates(speed: dict[str, Any] | None, name: str) -> dict[str, float] | None:
    found: dict[str, float] | None = (speed or {}).get("tokens_per_s", {}).get(name)
    return found


def interval(values: Sequence[float], *, logarithms: bool = False) -> dict[str, Any]:
    """Mean and 95% confidence interval, of ratios over logarithms; bounds are None with fewer than two values or no spread."""
    if not values:
        return {"mean": None, "low": None, "high": None, "values": []}
    found = stats.mean_difference([math.log(v) for v in values] if logarithms else list(values))
    mean, low, high = (math.exp(v) if logarithms and math.isfinite(v) else v for v in found[:3])
    known = math.isfinite(found.low)
    return {"mean": mean, "low": low if known else None, "high": high if known else None, "values": list(values)}


def _method(
    runs: Mapping[int, dict[str, Any]], steps: Mapping[int, float], rates: dict[str, float] | None
) -> dict[str, Any]:  # fmt: skip
    if not runs:
        return {"scores": {}, "scores_before": {}, "curve": None, "rates": rates, "bits": None}
    some = next(iter(runs.values()))
    results = {seed: run["result"] for seed, run in runs.items()}
    tokens = statistics.fmean(r["measured"]["speed"]["tokens_per_s"] * r["measured"]["speed"]["step_s"] for r in runs.values())
    per_step = tokens / rates["median"] if rates else None
    return {
        "scores": {name: interval([r["scores"][name] for r in results.values()]) for name in some["result"]["scores"]},
        "scores_before": {
            name: statistics.fmean(r["scores_before"][name] for r in results.values()) for name in some["result"]["scores_before"]
        },
        "area": interval([stats.area(_curve(run)) for run in runs.values() if len(_curve(run)) > 1]),
        "steps_to_target": interval(list(steps.values())),
        "seconds_to_target": interval([n * per_step for n in steps.values()]) if per_step else None,
        "peak_bytes": interval([float(peak_bytes(run)) for run in runs.values()]),
        "bytes_by_kind": {
            name.removesuffix("_bytes"): some["measured"]["memory"][name]
            for name in (
                "weights_bytes",
                "codes_bytes",
                "constants_bytes",
                "adapters_bytes",
                "gradients_bytes",
                "optimizer_bytes",
            )
        },
        "rates": rates,
        "bits": _bits(some),
        "step_s": per_step,
        "trained_parameters": some["model"]["trainable_parameters"],
        "parameters": some["model"]["parameters"],
        "curve": _band(list(runs.values())),
        "training_curves": {str(seed): run["result"]["losses"] for seed, run in runs.items()},
    }


def _bits(run: Mapping[str, Any]) -> float | None:
    """Bits a weight of the packed base, constants included; None for a dense one."""
    packed, measured = run["model"].get("quantized_parameters"), run["measured"]
    shards = measured["parallel"]["memory"] if measured.get("parallel", {}).get("mode") == "fsdp" else [measured["memory"]]
    return 8 * sum(held["codes_bytes"] + held["constants_bytes"] for held in shards) / packed if packed else None


def _curve(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [(e["step"], e["loss"]) for e in run["result"]["evaluations"]]


def _band(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Evaluation loss by step (steps common to all seeds): mean and interval over seeds, and each seed's value."""
    steps = sorted(set.intersection(*({e["step"] for e in run["result"]["evaluations"]} for run in runs)))
    by_step = [[loss for run in runs for at, loss in _curve(run) if at == step] for step in steps]
    bands = [interval(losses) for losses in by_step]
    return {"steps": steps, **{name: [band[name] for band in bands] for name in ("mean", "low", "high", "values")}}


def _steps_to_target(
    runs: Mapping[str, Mapping[int, dict[str, Any]]],
) -> tuple[dict[str, dict[int, float]], dict[int, float]]:  # fmt: skip
    """Method -> seed -> steps to the lowest loss that all methods reach with that seed; and seed -> that loss."""
    finished = {name: of for name, of in runs.items() if of}
    steps: dict[str, dict[int, float]] = {name: {} for name in finished}
    targets: dict[int, float] = {}
    for seed in sorted(set.intersection(*(set(of) for of in finished.values())) if finished else ()):
        curves = {name: _curve(of[seed]) for name, of in finished.items()}
        targets[seed] = max(min(loss for _, loss in curve) for curve in curves.values())
        for name, curve in curves.items():
            reached = stats.crossing(curve, targets[seed])
            assert reached is not None  # its own lowest loss is the target or below
            steps[name][seed] = reached
    return steps, targets


def _steps_ratio(curves: Sequence[Sequence[Sequence[tuple[float, float]]]]) -> dict[str, Any]:
    """Steps of the first over those of the second to a common loss, over seeds: mean, interval, the loss, how many seeds of each
    ended before, and how many were left out, because one of both was there before its first step. An end of the interval is None
    if nothing is known of it.

    Args:
        curves: for each seed the evaluation losses of both.
    """
    lowest = [statistics.fmean(min(loss for _, loss in of[side]) for of in curves) for side in (0, 1)]
    target = (1 + LOSS_MARGIN) * max(lowest)
    known, above, below, ended_before, at_start = [], [], [], [0, 0], 0
    for a, b in curves:
        x, y = stats.crossing(a, target), stats.crossing(b, target)
        ended_before = [ended_before[0] + (x is None), ended_before[1] + (y is None)]
        at_start += 0 in (x, y)
        if x and y:
            known.append(math.log(x / y))
        elif x is None and y:
            above.append(math.log(a[-1][0] / y))
        elif y is None and x:
            below.append(math.log(x / b[-1][0]))
    found = survival.mean_of_censored(known, above, below)
    mean, low, high = (None, None, None) if found is None else (math.exp(v) if abs(v) < LARGE else None for v in found[:3])
    return {
        "mean": mean, "low": low, "high": high, "values": [math.exp(v) for v in known],
        "loss": target, "ended_before": ended_before, "at_start": at_start,
    }  # fmt: skip


def _pair(
    a: str, b: str, runs: Mapping[str, Mapping[int, dict[str, Any]]], kind: str, margin: float | None,
    speed: dict[str, Any] | None, decision: Decision | None,
) -> dict[str, Any]:  # fmt: skip
    """`a` against `b`: differences are a - b, ratios a / b. `decision`: None if the comparison is not planned."""
    both = [seed for seed in runs[a] if seed in runs[b]]
    results = {seed: [runs[name][seed]["result"] for name in (a, b)] for seed in both}
    scores = {metric: _difference(results, metric) for metric in dict.fromkeys((*KINDS[kind].metrics, "loss"))}
    main = main_metric(kind)
    used = {seed: results[seed] for seed in both[: decision.seeds if decision else None]} or results
    scores[main] = _difference(used, main, decision.tail if decision else LEVEL / 2)
    data = mixed.layout(differences(used, main))
    found = mixed.estimate(data)
    margin = margin or margin_of(kind, results)
    assert margin is not None  # there is a seed
    known = scores[main]["low"] is not None
    peaks = [peak_bytes(runs[a][seed]) / peak_bytes(runs[b][seed]) for seed in both]
    return {
        "a": a, "b": b, "seeds": both, "scores": scores,
        "equivalence": {
            "metric": main, "margin": margin, "p": found.tail(margin - abs(float(found.mean))) if known else 1.0,
            "level": decision.level if decision else LEVEL,
        },
        "decision": None if decision is None else {
            "shown": decision.shown, "seeds": decision.seeds, "looked": decision.looked,
            **({"provisional": True} if decision.provisional else {}),
        },
        "detectable": float(found.reach(LEVEL / 2) + found.reach(1 - POWER)) if known else None,
        "variances": {**mixed.variances(data)._asdict(), "rows": data.rows, "seeds": len(used)} if len(used) > 1 else None,
        "steps_ratio": _steps_ratio([[_curve(runs[name][seed]) for name in (a, b)] for seed in both]),
        "memory_ratio": interval(peaks, logarithms=True),
        "speed_ratio": _speed_ratio(speed, a, b),
    }  # fmt: skip


def _difference(results: Mapping[int, Sequence[Mapping[str, Any]]], metric: str, tail: float = LEVEL / 2) -> dict[str, Any]:
    """The difference of a metric with its interval, by the mixed model; p is that of a single look."""
    data = mixed.layout(differences(results, metric))
    found = mixed.estimate(data)
    mean, reach = float(found.mean), float(found.reach(tail))
    known = math.isfinite(reach)
    return {
        "mean": mean, "low": mean - reach if known else None, "high": mean + reach if known else None,
        "p": 2 * found.tail(abs(mean)), "values": data.means.tolist(), "rows": data.rows,
    }  # fmt: skip


def _speed_ratio(speed: dict[str, Any] | None, a: str, b: str) -> dict[str, float] | None:
    """Tokens/s of a over b, within rounds: median, min and max."""
    ratios = (speed or {}).get("ratios", {})
    if f"{a}_vs_{b}" in ratios:
        found: dict[str, float] = ratios[f"{a}_vs_{b}"]
        return found
    other = ratios.get(f"{b}_vs_{a}")
    return None if other is None else {"median": 1 / other["median"], "min": 1 / other["max"], "max": 1 / other["min"]}


def _better(metric: str, value: float) -> float:
    """The value, negated if lower is better."""
    return -value if metric in LESS_IS_BETTER else value


def _pareto(methods: Sequence[dict[str, Any]], metric: str) -> list[str]:
    """The Pareto front of quality, memory and speed; speed counts only if it was measured interleaved for all methods."""
    points, timed = {}, "speed" in _pareto_of(methods)
    for m in methods:
        if m["scores"]:
            quality, rate = _better(metric, m["scores"][metric]["mean"]), m["rates"]["median"] if timed else 0.0
            points[m["method"]] = (-quality, m["peak_bytes"]["mean"], -rate)
    return stats.pareto(points)


def _pareto_of(methods: Sequence[dict[str, Any]]) -> list[str]:
    return ["quality", "memory", *(["speed"] if all(m["rates"] for m in methods if m["scores"]) else [])]


def _advice(methods: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The recommended method for this task, and why. None: there is none; means over different seeds decide nothing."""
    finished = {m["method"]: m for m in methods if m["scores"]}
    if not finished:
        return {"advice": None, "reason": "No method finished."}
    beaten = {loser for pair in pairs if (loser := shown_worse(pair, metric)) is not None}
    apart = {loser for pair in pairs if (loser := _worse_unplanned(pair, metric)) is not None} - beaten
    equal = [name for name in finished if name not in beaten | apart] or list(finished)
    met = {frozenset((pair["a"], pair["b"])) for pair in pairs}
    equal, aside = _all_compared(equal, met)
    if aside and not any(equal[0] in two for two in met):
        return {"advice": None, "reason": f"{', '.join([*equal, *aside])}: not compared with one another."}
    lean = min(equal, key=lambda name: float(finished[name]["peak_bytes"]["mean"]))
    timed = all(finished[name]["rates"] for name in equal)
    fast = max(equal, key=lambda name: float(finished[name]["rates"]["median"])) if timed else lean
    saved = 1 - finished[lean]["peak_bytes"]["mean"] / finished[fast]["peak_bytes"]["mean"]
    chosen = lean if saved >= MEMORY_MATTERS else fast
    left = [name for name in finished if name != chosen]
    words, compared = [], next((pair["equivalence"]["metric"] for pair in pairs), metric)
    if beaten:
        until = " so far" if any(pair["decision"] and pair["decision"].get("provisional") for pair in pairs) else ""
        words.append(f"{', '.join(sorted(beaten))} shown to be worse in {compared}{until}")
    if apart:
        words.append(f"{', '.join(sorted(apart))} worse by the 95% interval of a comparison that was not planned")
    others = [name for name in equal if name != chosen]
    if others:
        words.append(f"no difference in {compared} shown to {', '.join(others)}")
        why = "least memory" if chosen == lean and (saved >= MEMORY_MATTERS or not timed) else "fastest"
        words.append(f"{why} among these")
    if aside:
        words.append(f"not compared with {', '.join(aside)}")
    return {"advice": chosen, "reason": "; ".join(words) + "." if left and words else "It is the only one that finished."}


def _all_compared(methods: Sequence[str], met: set[frozenset[str]]) -> tuple[list[str], list[str]]:
    """Methods that were all compared with one another, and those left out for that: the ones with the fewest comparisons."""
    kept, aside = list(methods), list[str]()
    while any(frozenset(two) not in met for two in combinations(kept, 2)):
        least = min(reversed(kept), key=lambda name: sum(frozenset((name, other)) in met for other in kept))
        kept.remove(least)
        aside.insert(0, least)
    return kept, aside


def shown_worse(pair: Mapping[str, Any], metric: str) -> str | None:
    """The worse method of a pair that was decided as different; None: none was."""
    if pair["decision"] is None or pair["decision"]["shown"] != DIFFERENT:
        return None
    return _worse(pair, metric)


def _worse_unplanned(pair: Mapping[str, Any], metric: str) -> str | None:
    """The method of a pair that was not planned which is worse by its interval and by more than the margin may be; None: none."""
    test = pair["equivalence"]
    found = pair["scores"][test["metric"]]
    is_open = pair["decision"] is not None or found["low"] is None or found["low"] <= 0 <= found["high"] or test["p"] <= LEVEL
    return None if is_open else _worse(pair, metric)


def _worse(pair: Mapping[str, Any], metric: str) -> str:
    first_is_better = (pair["scores"][pair["equivalence"]["metric"]]["mean"] < 0) == (metric in LESS_IS_BETTER)
    return str(pair["b"] if first_is_better else pair["a"])
