"""The recommendation: which method to use, and why, from the measured summaries of one comparison.

The thresholds are constants. With several seeds a difference in quality counts if the decisions of studies show it
(`decide.py`). With one it counts if it is larger than twice its standard error over the evaluation rows, and the advice says that
this is one seed; without scored rows it has no error, and does not count. Among methods of equal quality the one with the lower
peak memory wins if it saves `MEMORY_MATTERS` or more, else the faster one, if the rounds of turns agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from lownibble.measuring import mixed, stats
from lownibble.study.decide import DIFFERENT, EQUIVALENT, Comparison, decide, differences, margin_of, tails

EXACT = "qlora+exact"
"""QLoRA whose 4-bit base is computed exactly: what is between it and LoRA is storage, between it and QLoRA the products."""

MEMORY_MATTERS = 0.05
"""Fraction of the peak that a method must save for memory to decide."""

SPEED_MATTERS = 0.10
"""Fraction of tokens/s by which a method must be slower for the reasons to say so."""

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Method -> seed -> its scores and row_scores, as in the records of a study's cells."""

Judge = Callable[[dict[str, Any], dict[str, Any]], tuple[bool, str]]
"""(summary of a, of b) -> whether a is shown to be better than b, and the figures as text."""


def paired_difference(before: list[bool], after: list[bool]) -> dict[str, float] | None:
    """Mean of after - before over the same rows with its standard error; None with fewer than two scored rows."""
    if len(before) < 2 or len(before) != len(after):
        return None
    differences = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    mean = sum(differences) / len(differences)
    return {"mean": mean, "standard_error": stats.standard_error(differences) or 0.0, "rows": len(differences)}


def better_in_quality(a: dict[str, Any], b: dict[str, Any]) -> tuple[bool, str]:
    """Whether `a` is significantly better than `b`, and the figures as text."""
    paired = paired_difference(b.get("correct", []), a.get("correct", []))
    if paired is not None:
        clear = paired["mean"] > 2 * paired["standard_error"] and paired["mean"] > 0
        points, error = 100 * paired["mean"], 100 * paired["standard_error"]
        return clear, f"accuracy differs by {points:+.1f} ± {error:.1f} points over {paired['rows']} rows"
    more = a["eval_loss"] - b["eval_loss"]
    by = f"{100 * more / b['eval_loss']:+.1f} %" if b["eval_loss"] else f"{more:+.3g}"
    return False, f"evaluation loss differs by {by}, of one seed and without scored rows: --seeds 3 gives its error"


def over_seeds(results: Results) -> list[dict[str, Any]]:
    """The difference of each pair of methods over seeds (and rows, if they are scored), and what it shows.

    `detectable` is a difference that would be shown in 80% of comparisons with it; None with fewer than two seeds of both.
    """
    scored = all("accuracy" in run["row_scores"] for of in results.values() for run in of.values())
    metric, kind = ("accuracy", "classification") if scored else ("loss", "completion")
    planned = []
    for a, b in combinations(results, 2):
        both = {seed: [results[a][seed], results[b][seed]] for seed in results[a] if seed in results[b]}
        data = mixed.layout(differences(both, metric)) if both else None
        planned.append(Comparison("", "", a, b, metric, margin_of(kind, both), tuple(both), data, (len(both),)))
    found = []
    for each, decision in zip(planned, decide(planned, (max(map(len, results.values()), default=1),)), strict=True):
        if each.data is None:
            continue
        estimate = mixed.estimate(each.data)
        mean, reach = float(estimate.mean), float(estimate.reach(decision.tail))
        known = math.isfinite(reach)
        tail = tails(DIFFERENT, (1,), len(planned))[0]
        found.append({
            "a": each.a, "b": each.b, "metric": metric, "margin": each.margin, "shown": decision.shown, "mean": mean,
            "low": mean - reach if known else None, "high": mean + reach if known else None,
            "detectable": float(estimate.reach(tail) + estimate.reach(0.2)) if known else None,
            "seeds": len(each.seeds), "rows": each.data.rows,
        })  # fmt: skip
    return found


def judge_of(pairs: Sequence[Mapping[str, Any]]) -> Judge:
    """Whether a method is better than another by these pairs (`over_seeds`)."""
    by_names = {(pair["a"], pair["b"]): pair for pair in pairs}

    def judge(a: dict[str, Any], b: dict[str, Any]) -> tuple[bool, str]:
        turned = (a["method"], b["method"]) not in by_names
        pair = by_names.get((b["method"], a["method"]) if turned else (a["method"], b["method"]))
        if pair is None:
            return False, "no seed finished with both"
        sign = (-1 if turned else 1) * (-1 if pair["metric"] == "loss" else 1)
        return pair["shown"] == DIFFERENT and sign * pair["mean"] > 0, _words(pair, turned)

    return judge


def _words(pair: Mapping[str, Any], turned: bool = False) -> str:
    """A pair's difference as text; `turned`: b - a."""
    sign, points = -1 if turned else 1, pair["metric"] == "accuracy"
    scale, unit, digits = (100, " points", 1) if points else (1, "", 3)
    rows = f" x {pair['rows']} rows" if pair["rows"] > 1 else ""
    text = f"{pair['metric']} differs by {sign * scale * pair['mean']:+.{digits}f}{unit}"
    if pair["low"] is None:
        return f"{text} over {pair['seeds']} seeds{rows}, which do not tell its error"
    low, high = sorted((sign * scale * pair["low"], sign * scale * pair["high"]))
    text += f" ({low:+.{digits}f} to {high:+.{digits}f}) over {pair['seeds']} seeds{rows}"
    if pair["shown"] == EQUIVALENT:
        return f"{text}, equivalent within {scale * pair['margin']:.{digits}f}"
    if pair["shown"] == DIFFERENT:
        return text
    return f"{text}; from {scale * pair['detectable']:.{digits}f}{unit} on it would likely have been shown"


def parts_of_qlora(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What storage in 4 bits and products in 8 bits change, a sentence each, if lora, qlora+exact and qlora were compared."""
    parts = {"Storage in 4 bits": ("lora", EXACT), "Products in 8 bits": (EXACT, "qlora")}
    by_names = {frozenset((pair["a"], pair["b"])): pair for pair in pairs}
    if any(frozenset(of) not in by_names for of in parts.values()):
        return []
    found = []
    for what, (less, more) in parts.items():
        pair = by_names[frozenset((less, more))]
        shown = {DIFFERENT: "a difference is shown", EQUIVALENT: "no difference that matters"}.get(
            pair["shown"], "no effect shown"
        )
        found.append(f"{what} ({more} less {less}): {shown} ({_words(pair, turned=pair['a'] == less)}).")
    return found


def advise(
    summaries: list[dict[str, Any]], ratios: dict[str, dict[str, float]] | None = None,
    pairs: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The recommended method (None if all failed) and the reasons, one sentence each.

    `pairs`: differences over seeds (`over_seeds`); None: each method has one seed.

    `ratios`: interleaved tokens/s ratios, "b_vs_a" -> median, min, max, for the reasons; without them, and for the choice itself,
    the runs' own rates are used.
    """
    finished = [s for s in summaries if s["status"] == "ok"]
    reasons = [f"{s['method']} {ended(s)}" for s in summaries if s["status"] != "ok"]
    if not finished:
        return {"method": None, "reasons": reasons}
    if len(finished) == 1:
        return {"method": finished[0]["method"], "reasons": [*reasons, f"{finished[0]['method']} is the only one that finished."]}
    judge = better_in_quality if pairs is None else judge_of(pairs)
    beaten = {b["method"] for a in finished for b in finished if a is not b and judge(a, b)[0]}
    equal = [s for s in finished if s["method"] not in beaten] or finished
    lean = min(equal, key=lambda s: s["peak_bytes"])
    fast = max(equal, key=lambda s: s["tokens_per_s"])
    saved = 1 - lean["peak_bytes"] / fast["peak_bytes"]
    chosen = lean if saved >= MEMORY_MATTERS or not _is_faster(fast, lean, ratios or {}) else fast
    reasons += _reasons(chosen, [s for s in finished if s is not chosen], ratios or {}, judge)
    if pairs is None:
        reasons.append("This is one seed: differences in quality smaller than twice their error were not counted.")
    else:
        reasons += parts_of_qlora(pairs)
        reasons.append("Differences in quality that their error over seeds explains were not counted.")
    quality = {f"{b['method']}_vs_{a['method']}": _quality(b, a, judge) for a, b in combinations(finished, 2)}
    return {"method": chosen["method"], "reasons": reasons, "quality": quality}


def ended(summary: dict[str, Any]) -> str:
    """How a method ended that has no figures."""
    return f"{summary['status'] if summary['status'] == 'left out' else 'failed'}: {summary['error']}"


def _is_faster(fast: dict[str, Any], slow: dict[str, Any], ratios: dict[str, dict[str, float]]) -> bool:
    """Whether the faster of two is so in every round of turns, if there were any."""
    a, b = fast["method"], slow["method"]
    if f"{a}_vs_{b}" in ratios:
        return ratios[f"{a}_vs_{b}"]["min"] > 1
    return f"{b}_vs_{a}" not in ratios or ratios[f"{b}_vs_{a}"]["max"] < 1


def _quality(a: dict[str, Any], b: dict[str, Any], judge: Judge) -> dict[str, str]:
    """How `a` compares with `b`, and the figures as text."""
    clear, words = judge(a, b)
    worse, _ = judge(b, a)
    return {"verdict": "better than" if clear else "worse than" if worse else "not distinguishable from", "words": words}


def _speed(chosen: dict[str, Any], other: dict[str, Any], ratios: dict[str, dict[str, float]]) -> tuple[float, str]:
    """Tokens/s of `chosen` relative to `other`, and how it was measured."""
    a, b = chosen["method"], other["method"]
    if f"{a}_vs_{b}" in ratios:
        paired = ratios[f"{a}_vs_{b}"]
        return paired["median"], f"interleaved, {paired['min']:.2f} to {paired['max']:.2f}"
    if f"{b}_vs_{a}" in ratios:
        paired = ratios[f"{b}_vs_{a}"]
        return 1 / paired["median"], f"interleaved, {1 / paired['max']:.2f} to {1 / paired['min']:.2f}"
    return chosen["tokens_per_s"] / other["tokens_per_s"], "one after the other: the machine's drift is in it"


def _reasons(
    chosen: dict[str, Any], others: list[dict[str, Any]], ratios: dict[str, dict[str, float]], judge: Judge
) -> list[str]:  # fmt: skip
    lines = []
    for other in others:
        found = _quality(chosen, other, judge)
        lines.append(f"Quality: {chosen['method']} is {found['verdict']} {other['method']} ({found['words']}).")
        memory = chosen["peak_bytes"] / other["peak_bytes"]
        lines.append(
            f"Memory: {chosen['method']} peaks at {memory:.2f} x {other['method']}'s ({_gib(chosen)} against {_gib(other)})."
        )
        speed, how = _speed(chosen, other, ratios)
        note = ", noticeably slower" if speed < 1 - SPEED_MATTERS else ""
        its, theirs = chosen.get("base_computed_in"), other.get("base_computed_in")
        named = "" if its == theirs else f", with its frozen base in {its} instead of {theirs},"
        lines.append(f"Speed: {chosen['method']}{named} runs at {speed:.2f} x {other['method']}'s tokens/s ({how}){note}.")
    return lines


def _gib(summary: dict[str, Any]) -> str:
    return f"{summary['peak_bytes'] / 2**30:.2f} GiB"
