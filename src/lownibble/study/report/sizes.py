"""Quality by the size of the base: evaluation loss before and after training against bits a weight, constants included.

Two plots for each model and task whose bases have three sizes at least. Methods that differ in the bits of their codec alone, or
in those that codecs were mixed for, are joined by a line; a method with a dense base is a level across the plot. Merge-aware
methods, which hold two bases, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lownibble.study.report.curves import Axis, linear

MIN_SIZES = 3
"""Fewer sizes than this are no figure."""


@dataclass(frozen=True)
class Dot:
    """A method's loss; positions in percent of the plot. `low` and `high`: of its interval, None without one."""

    method: int
    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Sizes:
    """One plot: dots, lines as (method, path in a box of 1000 by 1000), and levels as (method, position, text)."""

    title: str
    note: str
    x: Axis
    y: Axis
    dots: list[Dot]
    lines: list[tuple[int, str]]
    levels: list[tuple[int, float, str]]
    summary: str


def sizes(group: Mapping[str, Any], methods: Mapping[str, Any], names: Sequence[str]) -> list[Sizes]:
    """The plots of a model and task: after training and before it.

    Args:
        group: of the study's summary. methods: the study's methods, by name, as in its file. names: the order of their colours.
    """
    found = [
        m for m in group["methods"]
        if m["scores"] and "loss" in m["scores_before"] and not methods[m["method"]].get("merge_aware")
    ]  # fmt: skip
    if len({round(m["bits"], 2) for m in found if m["bits"]}) < MIN_SIZES:
        return []
    after = {m["method"]: m["scores"]["loss"] for m in found}
    before = {m["method"]: {"mean": m["scores_before"]["loss"], "low": None, "high": None} for m in found}
    notes = (
        (after, "Evaluation loss after training: mean over seeds with its 95% interval."),
        (before, "Evaluation loss before training: what packing costs, less what the start makes up for."),
    )
    return [_plot(group["label"], note, found, losses, methods, names) for losses, note in notes]


def _plot(
    title: str, note: str, found: Sequence[Mapping[str, Any]], losses: Mapping[str, Mapping[str, Any]],
    methods: Mapping[str, Any], names: Sequence[str],
) -> Sizes:  # fmt: skip
    packed = sorted((m for m in found if m["bits"]), key=lambda m: float(m["bits"]))
    means = [loss["mean"] for loss in losses.values()]
    bits = [m["bits"] for m in packed]
    room = 0.06 * (bits[-1] - bits[0])
    x = linear(bits[0] - room, bits[-1] + room)
    low, high = min(means), max(means)
    y = linear(low - 0.08 * (high - low), high + 0.08 * (high - low))

    def up(value: float | None) -> float | None:
        return None if value is None else 100 - 100 * min(max(y.share(value), 0.0), 1.0)

    dots, families = [], dict[str, list[Dot]]()
    for m in packed:
        loss = losses[m["method"]]
        at = up(loss["mean"])
        assert at is not None
        text = f"{m['method']}: {m['bits']:.2f} bits, {loss['mean']:.3f}"
        dot = Dot(names.index(m["method"]), m["method"], 100 * x.share(m["bits"]), at, up(loss["low"]), up(loss["high"]), text)
        dots.append(dot)
        families.setdefault(_family(methods[m["method"]]), []).append(dot)
    lines = [
        (of[0].method, "".join(f"{'L' if i else 'M'}{10 * d.x:.1f} {10 * d.y:.1f}" for i, d in enumerate(of)))
        for of in families.values()
        if len(of) > 1
    ]
    levels = []
    for m in found:
        at = up(losses[m["method"]]["mean"])
        if not m["bits"] and at is not None:
            levels.append((names.index(m["method"]), at, f"{m['method']}: {losses[m['method']]['mean']:.3f}"))
    said = [dot.text for dot in dots] + [text for _, _, text in levels]
    return Sizes(title, note, x, y, dots, lines, levels, "; ".join(said))


def _family(method: Mapping[str, Any]) -> str:
    """What methods on one line have in common."""
    quant = method.get("quant", {})
    quant = {**quant, "quant_type": quant.get("quant_type", "nf4").rstrip("0123456789")}
    quantize = {key: key == "bits" or value for key, value in method.get("quantize", {}).items()}
    return json.dumps({**method, "quant": quant, "quantize": quantize}, sort_keys=True)
