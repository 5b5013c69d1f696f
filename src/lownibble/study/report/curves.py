"""Curves: losses, scores and speed by step, ready to draw.

All scales, ticks and smoothing are decided here, once. The template draws the default view (steps, one loss scale) as plain SVG,
and `charts.js` moves the same marks when the reader picks another axis: it knows only how a scale maps a value to a fraction of
the plot. Positions are percentages and lines live in a nested, stretched viewport, so a plot is readable at any width, even
without a script. Rejected: drawing in JavaScript alone (nothing visible without it, nothing to test from Python) and one SVG with
a fixed view box (text becomes unreadable on a phone).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

POINTS = 400
"""Longer runs are drawn with at most this many points, each the mean over equally many steps."""

LOG_FROM = 10.0
"""Losses that span more than this factor are shown on a logarithmic scale by default."""

X_TITLES = {
    "steps": "optimiser steps",
    "seconds": "seconds of training (evaluation not counted)",
    "tokens": "tokens trained on (padding not counted)",
}


@dataclass(frozen=True)
class Axis:
    """A scale: its range, and (value, text) of its ticks."""

    lo: float
    hi: float
    log: bool
    ticks: list[tuple[float, str]]

    def share(self, value: float) -> float:
        """Position of a value on the axis: 0 at `lo`, 1 at `hi`."""
        if self.log:
            return math.log(value / self.lo) / math.log(self.hi / self.lo)
        return (value - self.lo) / (self.hi - self.lo)


@dataclass(frozen=True)
class Series:
    """One line or row of marks. `track` names its x values; y None: no point; `error`: half height of the error bars."""

    method: int
    label: str
    track: str
    look: str
    y: list[float | None]
    error: list[float] | None = None


@dataclass(frozen=True)
class Panel:
    """One plot: its y scales by name, of which `scale` is shown first, and what is drawn; `target` is a level to mark."""

    title: str
    note: str
    scales: dict[str, Axis]
    scale: str
    series: list[Series]
    summary: str
    target: float | None = None


@dataclass(frozen=True)
class Curves:
    """Every plot of a comparison. `tracks` holds, by method, the x values of its steps ("train") and evaluations ("eval")."""

    methods: list[str]
    x: dict[str, Axis]
    tracks: list[dict[str, dict[str, list[float]]]]
    panels: list[Panel]
    has_log: bool

    def path(self, panel: Panel, series: Series) -> str:
        """The SVG path of a series in the default view, in a box of 1000 by 1000."""
        parts, pen = [], "M"
        for x, y in zip(self.tracks[series.method][series.track]["steps"], series.y, strict=True):
            if y is None:
                pen = "M"
                continue
            parts.append(f"{pen}{1000 * self.x['steps'].share(x):.1f} {1000 - 1000 * panel.scales[panel.scale].share(y):.1f}")
            pen = "L"
        return "".join(parts)

    def marks(self, panel: Panel, series: Series) -> list[dict[str, Any]]:
        """Positions in percent of a series' points in the default view, and the ends of their error bars."""
        found = []
        axis = panel.scales[panel.scale]
        for i, (x, y) in enumerate(zip(self.tracks[series.method][series.track]["steps"], series.y, strict=True)):
            if y is not None:
                e = series.error[i] if series.error else 0.0
                low, middle, high = (f"{100 - 100 * axis.share(v):.2f}%" for v in (y - e, y, y + e))
                found.append({"i": i, "x": f"{100 * self.x['steps'].share(x):.2f}%", "y": middle, "low": low, "high": high})
        return found

    def to_json(self) -> dict[str, Any]:
        """The data that the script needs to move the marks and to show their values."""

        def axis(a: Axis) -> dict[str, Any]:
            return {"lo": a.lo, "hi": a.hi, "log": a.log, "ticks": a.ticks}

        return {
            "methods": self.methods,
            "x": {name: {**axis(a), "title": X_TITLES[name]} for name, a in self.x.items()},
            "tracks": [
                {name: {k: _short(v) for k, v in track.items()} for name, track in by_name.items()} for by_name in self.tracks
            ],
            "panels": [
                {
                    "scale": p.scale,
                    "scales": {name: axis(a) for name, a in p.scales.items()},
                    "target": p.target,
                    "series": [
                        {
                            "method": s.method,
                            "label": s.label,
                            "track": s.track,
                            "y": _short(s.y),
                            "error": _short(s.error) if s.error else None,
                        }
                        for s in p.series
                    ],
                }
                for p in self.panels
            ],
        }


def _short(values: Iterable[float | None]) -> list[float | None]:
    """Round to six significant digits: more than any plot shows, at a third of the bytes."""
    return [None if v is None else float(f"{v:.6g}") for v in values]


def linear(lo: float, hi: float, *, want: int = 5) -> Axis:
    """A linear scale from `lo` to `hi` with ticks at round numbers."""
    if hi <= lo:
        margin = abs(lo) / 10 or 1.0
        lo, hi = lo - margin, hi + margin
    rough = (hi - lo) / want
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return Axis(lo, hi, False, [(k * step, f"{k * step:,.10g}") for k in range(first, last + 1)])


def logarithmic(lo: float, hi: float) -> Axis:
    """A logarithmic scale from `lo` to `hi` (both above 0) with ticks at 1, 2 and 5, or at powers of ten if those exceed 7."""
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [m * 10.0**d for d in decades for m in factors if lo <= m * 10.0**d <= hi]
        if len(ticks) <= 7:
            break
    if len(ticks) < 2:
        ticks = [value for value, _ in linear(lo, hi).ticks]
    return Axis(lo, hi, True, [(t, f"{t:,.10g}") for t in ticks])


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values (fewer at the start)."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def thin(steps: list[dict[str, Any]]) -> tuple[list[dict[str, float]], int]:
    """Downsample a run's steps to at most `POINTS` points (mean loss, summed tokens and seconds); and the steps per point."""
    size = max(1, math.ceil(len(steps) / POINTS))
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    found = [
        {
            "step": g[-1]["step"],
            "loss": sum(s["loss"] for s in g) / len(g),
            "tokens": sum(s["tokens"] for s in g),
            "seconds": sum(s["seconds"] for s in g),
        }
        for g in groups
    ]
    return found, size


def _tracks(
    points: list[dict[str, float]], steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]
) -> dict[str, dict[str, list[float]]]:
    numbers = [s["step"] for s in steps]
    totals = {key: [0.0, *accumulate(s[key] for s in steps)] for key in ("seconds", "tokens")}

    def at(where: list[float]) -> dict[str, list[float]]:
        done = [bisect_right(numbers, step) for step in where]
        return {"steps": where, **{key: [sums[n] for n in done] for key, sums in totals.items()}}

    return {"train": at([p["step"] for p in points]), "eval": at([e["step"] for e in evaluations])}


def _range(series: list[Series]) -> tuple[float, float]:
    ends = [(y, s.error[i] if s.error else 0.0) for s in series for i, y in enumerate(s.y) if y is not None]
    return min(y - e for y, e in ends), max(y + e for y, e in ends)


def _loss_panel(title: str, note: str, series: list[Series], summary: str, target: float | None = None) -> Panel:
    lo, hi = _range(series)
    margin = (hi - lo) * 0.04
    scales = {"linear": linear(max(0.0, lo - margin) if lo >= 0 else lo - margin, hi + margin)}
    if lo > 0 and hi > lo:
        factor = (hi / lo) ** 0.04
        scales["log"] = logarithmic(lo / factor, hi * factor)
    return Panel(title, note, scales, "linear", series, summary, target)


def _is_wide(panel: Panel) -> bool:
    lo, hi = _range(panel.series)
    return lo > 0 and hi / lo > LOG_FROM


def build(summaries: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Curves | None:
    """The plots of all runs that have steps and evaluations; None if none has."""
    names = [s["method"] for s in summaries]
    points, sizes = zip(*(thin(run.get("steps", [])) for run in runs), strict=True)
    evaluations: list[list[dict[str, Any]]] = [run.get("evaluations", []) for run in runs]
    tracks = [_tracks(p, run.get("steps", []), e) for p, run, e in zip(points, runs, evaluations, strict=True)]
    target = next((s["target_loss"] for s in summaries if s.get("target_loss") is not None), None)
    losses = [*_evaluation(names, evaluations, target), *_training(names, points, max(sizes))]
    if any(_is_wide(p) for p in losses):
        losses = [replace(p, scale="log") if "log" in p.scales else p for p in losses]
    panels = [
        *losses,
        *_scores(names, evaluations),
        *_speed(names, runs, points, max(sizes)),
    ]
    if not panels:
        return None
    x = {}
    for key in X_TITLES:
        values = [v for track in tracks for side in track.values() for v in side[key]]
        x[key] = linear(min(values), max(values))
    has_log = any("log" in p.scales for p in panels)
    return Curves(names, x, tracks, panels, has_log)


def _from_to(names: list[str], series: list[Series]) -> str:
    found = []
    for s in series:
        values = [y for y in s.y if y is not None]
        if values:
            found.append(f"{names[s.method]} from {values[0]:.4g} to {values[-1]:.4g}")
    return "; ".join(found)


def _evaluation(names: list[str], evaluations: list[list[dict[str, Any]]], target: float | None) -> list[Panel]:
    series = [Series(i, "loss", "eval", "marks", [e["loss"] for e in side]) for i, side in enumerate(evaluations) if side]
    if not series:
        return []
    note = "Mean loss (nats) over the label tokens of the evaluation rows."
    if target is not None:
        note += f" Dashed level: {target:.3f}, the lowest loss that every method reached."
    return [_loss_panel("Evaluation loss", note, series, _from_to(names, series), target)]


def _training(names: list[str], points: tuple[list[dict[str, float]], ...], size: int) -> list[Panel]:
    window = max(3, math.ceil(max(len(p) for p in points) / 20))
    raw = [Series(i, "loss", "train", "raw", [p["loss"] for p in side]) for i, side in enumerate(points) if side]
    if not raw:
        return []
    smoothed = [
        Series(i, f"mean of {window}", "train", "line", list(smooth([p["loss"] for p in side], window)))
        for i, side in enumerate(points)
        if side
    ]
    unit = "steps" if size == 1 else f"points of {size} steps"
    note = f"Mean loss (nats) over the label tokens of each step (thin), and its mean over the last {window} {unit} (thick)."
    return [_loss_panel("Training loss", note, [*raw, *smoothed], _from_to(names, smoothed))]


def _scores(names: list[str], evaluations: list[list[dict[str, Any]]]) -> list[Panel]:
    found = []
    for score in dict.fromkeys(name for side in evaluations for e in side for name in e.get("scores", {})):
        series = []
        for i, side in enumerate(evaluations):
            if not side:
                continue
            correct = [e.get("correct", []) for e in side] if score == "accuracy" else [[]]
            bars = [math.sqrt((p := sum(c) / len(c)) * (1 - p) / len(c)) for c in correct] if all(correct) else None
            series.append(
                Series(i, score.replace("_", " "), "eval", "marks", [e.get("scores", {}).get(score) for e in side], bars)
            )
        lo, hi = _range(series)
        margin = (hi - lo) * 0.06
        title = score.replace("_", " ").capitalize()
        scale = linear(lo - margin, hi + margin)
        found.append(Panel(title, _score_note(score, series), {"linear": scale}, "linear", series, _from_to(names, series)))
    return found


def _score_note(score: str, series: list[Series]) -> str:
    meaning = {
        "accuracy": "Share of the evaluation rows whose right label is the most probable one.",
        "label_probability": "Mean probability of the right label among the possible ones.",
    }.get(score, "Mean over the evaluation rows.")
    if any(s.error for s in series):
        meaning += " Bars: ± one binomial standard error. All methods answer the same rows, so their difference is surer."
    return meaning


def _speed(names: list[str], runs: list[dict[str, Any]], points: tuple[list[dict[str, float]], ...], size: int) -> list[Panel]:
    series: list[Series] = []
    medians = []
    for i, (run, side) in enumerate(zip(runs, points, strict=True)):
        speed = run.get("speed", {})
        if not side or not speed:
            continue
        warmup = math.ceil(speed["warmup_steps"] / max(1, math.ceil(len(run["steps"]) / POINTS)))
        rates = [p["tokens"] / p["seconds"] for p in side]
        median = speed["tokens_per_s_quartiles"][1]
        series += [
            Series(i, "tokens/s, warm-up", "train", "hollow", [*rates[:warmup], *[None] * (len(rates) - warmup)]),
            Series(i, "tokens/s", "train", "dots", [*[None] * warmup, *rates[warmup:]]),
            Series(i, "median", "train", "rule", [*[None] * warmup, *[median] * (len(rates) - warmup)]),
        ]
        medians.append(f"{names[i]} median {median:.0f}")
    if not series:
        return []
    _, hi = _range(series)
    what = "of each step" if size == 1 else f"over {size} steps at a time"
    note = f"Rate {what}, padding not counted. Line: median over the steps after warm-up; hollow: warm-up, left out."
    return [Panel("Tokens a second", note, {"linear": linear(0.0, hi * 1.05)}, "linear", series, "; ".join(medians))]
