"""The articles' claims against a study's figures: agrees, disagrees, or could not be tested here, and why.

A claim with `study` (`planning/articles.toml`) says which figures decide it:

    figure = "steps_ratio" | "speed_ratio" | "memory_ratio", a, b, low, high    a's figure over b's lies between low and high
    figure = "equivalent", a, b, kinds                                          no difference in score beyond the margin

A study decides a claim if the interval lies wholly inside or outside the claimed range; if it overlaps, more seeds are needed. A
claim of several parts holds for a task if all its parts do, and agrees with a study if it holds for all tasks it is about. Claims
that the study cannot test go to the planner: a bound that no program can break decides a claim too. The results of a study on a
small model hold for that model; the page says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lownibble.options import read_toml
from lownibble.planning.claims import ARTICLES, Judgement, judge_claim
from lownibble.study.decide import DIFFERENT, EQUIVALENT

AGREES, DISAGREES, MIXED, UNDECIDED, UNTESTED = (
    "agrees", "disagrees", "differs by task", "not decided", "could not be tested here",
)  # fmt: skip


def compare_claims(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each claim with its verdict, the basis of the verdict, and the figures (one text each)."""
    found = []
    for claim, judged in _articles():
        verdict, basis, figures = _by_study(claim.get("study"), groups)
        if verdict == UNTESTED:
            if judged.verdict in ("impossible", "implausible"):
                verdict, basis, figures = DISAGREES, f"planner: {judged.verdict}", judged.arithmetic
            elif judged.verdict == "consistent" and claim["kind"] in ("fits", "saved"):  # the planner alone decides these
                verdict, basis, figures = AGREES, "planner", judged.arithmetic
            elif judged.verdict == "consistent":
                basis, figures = f"planner: possible; {basis}", judged.arithmetic
        found.append({"text": judged.text, "source": judged.source, "verdict": verdict, "basis": basis, "figures": figures})
    return found


@cache
def _articles() -> list[tuple[dict[str, Any], Judgement]]:
    """Each claim, and the planner's judgement of it."""
    claims = read_toml(ARTICLES)["claim"]
    return [(claim, judge_claim(claim, f"claim {number}")) for number, claim in enumerate(claims, 1)]


def _by_study(
    wanted: Sequence[Mapping[str, Any]] | None, groups: Sequence[Mapping[str, Any]]
) -> tuple[str, str, list[str]]:  # fmt: skip
    if wanted is None:
        return UNTESTED, "it needs models, cards or settings that this study does not have", []
    verdicts: Counter[str] = Counter()
    figures = []
    for group in groups:
        parts = [_answer(each, group) for each in wanted if "kinds" not in each or group["kind"] in each["kinds"]]
        answers = [part for part in parts if part is not None]
        figures += [text for _, text in answers]
        if answers:
            verdicts[_together([verdict for verdict, _ in answers], len(parts))] += 1
    if not verdicts:
        return UNTESTED, f"this study has no such figures of {wanted[0]['a']} and {wanted[0]['b']}", []
    if verdicts[AGREES] and verdicts[DISAGREES]:
        verdict = MIXED
    else:
        verdict = DISAGREES if verdicts[DISAGREES] else AGREES if set(verdicts) == {AGREES} else UNDECIDED
    return verdict, f"measured, tasks: {', '.join(f'{n} {what}' for what, n in verdicts.items())}", figures


def _together(verdicts: Sequence[str], parts: int) -> str:
    """The combined verdict of a claim's parts on one task; a part without a figure leaves it undecided."""
    if DISAGREES in verdicts:
        return DISAGREES
    return AGREES if verdicts.count(AGREES) == parts else UNDECIDED


def _answer(wanted: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[str, str] | None:
    """The verdict of one model and task, with its figure; None: not measured."""
    pair, turned = next(
        ((p, p["a"] != wanted["a"]) for p in group["pairs"] if {p["a"], p["b"]} == {wanted["a"], wanted["b"]}), (None, False)
    )
    if pair is None:
        return None
    if wanted["figure"] == "equivalent":
        return _equivalent(pair, group["label"])
    value = pair[wanted["figure"]]
    if value is None:
        return None
    middle, low, high = (value.get(a, value.get(b)) for a, b in (("mean", "median"), ("low", "min"), ("high", "max")))
    if middle is None or (low is None and high is None):
        return None
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if turned:
        middle, low, high = 1 / middle, (-math.inf if math.isinf(high) else 1 / high), (math.inf if low <= 0 else 1 / low)
    if high < wanted["low"] or low > wanted["high"]:
        verdict = DISAGREES
    else:
        verdict = AGREES if wanted["low"] <= low and high <= wanted["high"] else UNDECIDED
    ends = " to ".join("no bound" if math.isinf(end) else f"{end:.2f}" for end in (low, high))
    return verdict, f"{group['label']}: {wanted['a']} / {wanted['b']} {middle:.2f} ({ends})"


def _equivalent(pair: Mapping[str, Any], task: str) -> tuple[str, str] | None:
    test = pair["equivalence"]
    found = pair["scores"][test["metric"]]
    if found["low"] is None:
        return None
    text = f"{task}: {test['metric']} {found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
    decision = pair["decision"] or {}
    shown, text = decision.get("shown"), text + (", provisional" if decision.get("provisional") else "")
    if shown == EQUIVALENT:
        return AGREES, f"{text}, equivalent within {test['margin']:.3g}"
    if shown == DIFFERENT:
        return DISAGREES, f"{text}, a difference"
    return UNDECIDED, f"{text}, neither shown"
