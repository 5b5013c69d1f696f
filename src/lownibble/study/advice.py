"""The recommendation: which method to use, and why, from the measured summaries of one comparison.

The thresholds are constants. A difference in quality counts only if it is larger than twice its standard error over the
evaluation rows (`LOSS_MATTERS` without scored rows); a run has one seed, and the advice says so. Among methods of equal quality
the one with the lower peak memory wins if it saves `MEMORY_MATTERS` or more, else the faster one.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from lownibble.measuring import stats

MEMORY_MATTERS = 0.05
"""Fraction of the peak that a method must save for memory to decide."""

SPEED_MATTERS = 0.10
"""Fraction of tokens/s by which a method must be slower for the reasons to say so."""

LOSS_MATTERS = 0.05
"""Relative difference in evaluation loss that counts as a difference if there are no scored rows."""


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
    relative = (b["eval_loss"] - a["eval_loss"]) / b["eval_loss"]
    return relative > LOSS_MATTERS, f"evaluation loss differs by {100 * -relative:+.1f} %"


def advise(summaries: list[dict[str, Any]], ratios: dict[str, dict[str, float]] | None = None) -> dict[str, Any]:
    """The recommended method (None if all failed) and the reasons, one sentence each.

    `ratios`: interleaved tokens/s ratios, "b_vs_a" -> median, min, max, for the reasons; without them, and for the choice itself,
    the runs' own rates are used.
    """
    finished = [s for s in summaries if s["status"] == "ok"]
    reasons = [f"{s['method']} {ended(s)}" for s in summaries if s["status"] != "ok"]
    if not finished:
        return {"method": None, "reasons": reasons}
    if len(finished) == 1:
        return {"method": finished[0]["method"], "reasons": [*reasons, f"{finished[0]['method']} is the only one that finished."]}
    beaten = {b["method"] for a in finished for b in finished if a is not b and better_in_quality(a, b)[0]}
    equal = [s for s in finished if s["method"] not in beaten] or finished
    lean = min(equal, key=lambda s: s["peak_bytes"])
    fast = max(equal, key=lambda s: s["tokens_per_s"])
    saved = 1 - lean["peak_bytes"] / fast["peak_bytes"]
    chosen = lean if saved >= MEMORY_MATTERS else fast
    reasons += _reasons(chosen, [s for s in finished if s is not chosen], ratios or {})
    reasons.append("This is one seed: differences in quality smaller than twice their error were not counted.")
    quality = {f"{b['method']}_vs_{a['method']}": _quality(b, a) for a, b in combinations(finished, 2)}
    return {"method": chosen["method"], "reasons": reasons, "quality": quality}


def ended(summary: dict[str, Any]) -> str:
    """How a method ended that has no figures."""
    return f"{summary['status'] if summary['status'] == 'left out' else 'failed'}: {summary['error']}"


def _quality(a: dict[str, Any], b: dict[str, Any]) -> dict[str, str]:
    """How `a` compares with `b`, and the figures as text."""
    clear, words = better_in_quality(a, b)
    worse, _ = better_in_quality(b, a)
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


def _reasons(chosen: dict[str, Any], others: list[dict[str, Any]], ratios: dict[str, dict[str, float]]) -> list[str]:
    lines = []
    for other in others:
        found = _quality(chosen, other)
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
