"""The report of a study: one HTML page and one Markdown file, both of the same summary.

As for a comparison (`page.py`), everything is drawn here as SVG and readable without a script; the script (`study.js`) toggles
methods and shows values. Intervals are drawn to scale, clipped at a plot's limits: the page shows what can and cannot be told.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lownibble import record
from lownibble.study import reruns
from lownibble.study.analysis import LESS_IS_BETTER, analyse, shown_worse
from lownibble.study.claims import compare_claims
from lownibble.study.decide import EQUIVALENT, LEVEL, main_metric
from lownibble.study.hardware import hardware_table
from lownibble.study.records import read_record
from lownibble.study.report.curves import Axis, linear
from lownibble.study.report.figures import gib, pipe, planned, ratio, score, signed, span
from lownibble.study.report.methods import methods
from lownibble.study.report.page import content_hash
from lownibble.study.report.sizes import sizes

_HERE = Path(__file__).parent

MAX_METHODS = 4
"""With more methods than this, only their pairs with the first one are shown at once."""


def write(folder: str | Path, pages: str | Path | None = None) -> dict[str, Any]:
    """Write summary.json, report.html and report.md of the study in `folder`; returns the summary.

    Args:
        pages: folder of the two reports, which link to the records; default: beside the records.
    Raises:
        ConfigError: `folder` holds no study.
        OSError: they cannot be written.
    """
    folder = Path(folder)
    out = folder if pages is None else Path(pages)
    summary = analyse(folder)
    summary["claims"] = compare_claims(summary["groups"])
    summary["hardware"] = hardware_table()
    study = read_record(folder / "study.json")
    assert study is not None
    records = "" if out == folder else f"{quote(os.path.relpath(folder, out))}/"
    context = {**_context(folder, study, summary), "records": records}
    out.mkdir(parents=True, exist_ok=True)
    record.write(folder / "summary.json", summary)
    for name, text in (("report.html", _html(context)), ("report.md", _markdown(context))):
        (out / name).write_text(text, encoding="utf-8")
    return summary


def _html(context: dict[str, Any]) -> str:
    environment = _environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    style, script = (
        "".join((_HERE / name).read_text(encoding="utf-8") for name in names)
        for names in (("style.css", "study.css"), ("base.js", "study.js"))
    )
    return environment.get_template("study.html").render(
        **context, style=Markup(style), script=Markup(script), style_hash=content_hash(style), script_hash=content_hash(script)
    )


def _markdown(context: dict[str, Any]) -> str:
    return _environment(autoescape=False).get_template("study.md").render(**context)


def _environment(*, autoescape: bool) -> Environment:
    found = Environment(
        loader=FileSystemLoader(_HERE), autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters |= {"span": span, "score": score, "gib": gib, "signed": signed, "ratio": ratio, "cell": planned, "pipe": pipe}
    return found


def _context(folder: Path, study: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    names = list(dict.fromkeys(m["method"] for group in summary["groups"] for m in group["methods"]))
    hardware = summary["hardware"]
    devices = list(dict.fromkeys((row["device"], row["device_gib"]) for row in hardware["rows"]))
    models = list(dict.fromkeys(row["model"] for row in hardware["rows"]))
    places = {(row["device"], row["model"], row["method"]): row for row in hardware["rows"]}
    cells = {kind: study[kind] for kind in ("tuning", "cells")}
    records = {c["digest"]: read_record(folder / "cells" / f"{c['digest']}.json") for kind in cells.values() for c in kind}
    environments = [found["environment"] for found in records.values() if found is not None and "environment" in found]
    forests = [found for pair in _pairs(summary["groups"]) if (found := _forest(summary["groups"], *pair))]
    return {
        "summary": summary, "study": study, "names": names, "groups": summary["groups"], "counts": summary["counts"],
        "created": summary["created"].replace("T", " ").replace("+00:00", " UTC"),
        "forests": forests, "shown_pairs": len(forests) if len(names) <= MAX_METHODS else len(names) - 1,
        "sizes": [plot for group in summary["groups"] for plot in sizes(group, study["spec"]["methods"], names)],
        "panels": [_panel(group, names) for group in summary["groups"] if any(m["curve"] for m in group["methods"])],
        "headline": _headline(summary["groups"]), "decisions": _decisions(summary), "cautions": _cautions(summary),
        "less_is_better": LESS_IS_BETTER, "statistics": methods(summary),
        "again": summary["again"], "again_words": reruns.words(summary["again"]),
        "devices": devices, "models": models, "places": places, "hardware": hardware,
        "command": shlex.join(study["command"]), "environment": next(iter(environments), study["environment"]),
        "machines": sorted(set(map(_machine, environments))),
        "data": {c["task"]: records[c["digest"]]["data"] for c in study["cells"] if _ok(records[c["digest"]])},  # type: ignore[index]
        "failures": [(c, records[c["digest"]]) for kind in cells.values() for c in kind if _failed(records[c["digest"]])],
        "spec": _toml(study["spec"]), "listed": [(c, records[c["digest"]]) for c in study["cells"]],
    }  # fmt: skip


def _machine(environment: Mapping[str, Any]) -> str:
    return f"{environment['device']} ({environment['device_type']}, {environment['threads']} threads)"


def _ok(found: Mapping[str, Any] | None) -> bool:
    return found is not None and found["status"] == "ok"


def _failed(found: Mapping[str, Any] | None) -> bool:
    return found is not None and found["status"] != "ok"


def _toml(spec: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """The study's specification as TOML that produces the same cells."""
    lines = [f"{_key(k)} = {_value(v)}" for k, v in spec.items() if not _is_table(path, k, v)]
    for key, value in spec.items():
        if _is_table(path, key, value):
            inner = _toml(value, (*path, key))
            head = f"[{'.'.join(map(_key, (*path, key)))}]"
            lines.append(f"\n{head}\n{inner}" if any(not isinstance(v, dict) for v in value.values()) or not value else inner)
    return "\n".join(lines)


def _is_table(path: tuple[str, ...], key: str, value: Any) -> bool:
    return isinstance(value, dict) and len(path) < 2 and not (path and path[0] in ("train", "tuning"))


def _key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    return repr(value)


def _pairs(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The pairs of methods, LoRA against QLoRA first, the comparison that most readers want, then those with the first method."""
    found = list(dict.fromkeys((pair["a"], pair["b"]) for group in groups for pair in group["pairs"]))
    first = found[0][0] if found else None
    return sorted(found, key=lambda pair: (_first_lora_qlora(pair), pair[0] != first))


def _first_lora_qlora(pair: tuple[str, str]) -> bool:
    """A key that sorts the comparison of LoRA and QLoRA first."""
    return set(pair) != {"lora", "qlora"}


def _headline(groups: Sequence[Mapping[str, Any]]) -> str:
    """The recommendation over all tasks."""
    advised = [group["advice"] for group in groups if group["advice"]]
    if not advised:
        finished = any(m["scores"] for group in groups for m in group["methods"])
        return "No recommendation" if finished else "Nothing has finished yet"
    different = list(dict.fromkeys(advised))
    return f"Use {different[0]}" if len(different) == 1 else "It depends on the task: " + ", ".join(
        f"{name} for {', '.join(g['label'] for g in groups if g['advice'] == name)}" for name in different
    )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One difference of a forest plot; positions in percent of its width. `low` and `high` None: no interval.

    `basis`: seeds and rows, and what they could have shown.
    """

    label: str
    metric: str
    at: float
    low: float | None
    high: float | None
    margin: tuple[float, float]
    text: str
    verdict: str
    basis: str


@dataclass(frozen=True)
class Forest:
    """The differences of a pair over tasks. Metrics are in units of their equivalence margin, so that tasks share an axis."""

    a: str
    b: str
    lines: list[Line]
    zero: float
    ticks: list[tuple[float, str]]


def _forest(groups: Sequence[Mapping[str, Any]], a: str, b: str) -> Forest | None:
    found = []
    for group in groups:
        pair = next((p for p in group["pairs"] if (p["a"], p["b"]) == (a, b)), None)
        if pair is not None:
            found.append((group, pair, pair["scores"][pair["equivalence"]["metric"]], pair["equivalence"]["margin"]))
    if not found:
        return None

    def in_margins(value: float, margin: float) -> float:  # a loss of 0 has a margin of 0
        return value / margin if margin else math.copysign(math.inf, value) if value else 0.0

    reach = max(
        (abs(in_margins(v, margin)) for _, _, d, margin in found for v in (d["mean"], d["low"], d["high"]) if v is not None),
        default=1.0,
    )
    half = min(max(1.25, reach * 1.05), 12.0)

    def place(value: float, margin: float) -> float:
        return 50 + 50 * max(-1.0, min(1.0, in_margins(value, margin) / half))

    lines = [
        Line(
            group["label"], pair["equivalence"]["metric"], place(d["mean"], margin),
            None if d["low"] is None else place(d["low"], margin), None if d["high"] is None else place(d["high"], margin),
            (place(-margin, margin), place(margin, margin)), signed(d), verdict(pair), basis(pair),
        )
        for group, pair, d, margin in found
    ]  # fmt: skip
    step = next(s for s in (1, 2, 5) if half / s <= 4.5 or s == 5)
    ticks = [(place(n * step, 1.0), f"{n * step:+d}" if n else "0") for n in range(-int(half / step), int(half / step) + 1)]
    return Forest(a, b, lines, 50.0, ticks)


def verdict(pair: Mapping[str, Any]) -> str:
    """What a pair of methods shows, as text."""
    test, decision = pair["equivalence"], pair["decision"]
    found = pair["scores"][test["metric"]]
    if found["low"] is None:
        return "nothing can be told"
    if decision is None:
        return "no planned comparison"
    until = " (provisional)" if decision.get("provisional") else ""
    if decision["shown"] == EQUIVALENT:
        return f"equivalent within ±{test['margin']:.3g}{until}"
    if worse := shown_worse(pair, test["metric"]):
        return f"{pair['a'] if worse == pair['b'] else pair['b']} better{until}"
    alone = (
        "equivalence"
        if test["p"] <= test.get("level", LEVEL)
        else "a difference"
        if found["low"] > 0 or found["high"] < 0
        else None
    )
    bound = f"; at most {_bound(found):.2g} apart"
    return f"neither a difference nor equivalence shown{bound}{f' ({alone} if it were the only comparison)' if alone else ''}"


def _decisions(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The table that comes first: for each task and planned pair (class, what is shown, the difference or its bound)."""
    names: dict[tuple[str, str], None] = {}
    of_groups = []
    for group in summary["groups"]:
        cells = {(pair["a"], pair["b"]): _decision(pair) for pair in group["pairs"] if pair["decision"] is not None}
        cells |= {(each["a"], each["b"]): ("open", "not compared", each["why"]) for each in group["not_compared"]}
        names |= dict.fromkeys(cells)
        of_groups.append((group["label"], main_metric(group["kind"]), cells))
    pairs = sorted(names, key=_first_lora_qlora)
    rows = [(*which, [cells.get(pair, ("none", "-", "")) for pair in pairs]) for *which, cells in of_groups if cells]
    decided = sum(cell[0] == "shown" for *_, cells in rows for cell in cells)
    return {"pairs": pairs, "rows": rows, "planned": summary["comparisons"], "decided": decided}


def _cautions(summary: Mapping[str, Any]) -> list[str]:
    """What is to be said of all decisions."""
    decisions = [pair["decision"] for group in summary["groups"] for pair in group["pairs"] if pair["decision"]]
    found, level = [], f"{LEVEL:.0%}"
    if any(each.get("provisional") for each in decisions):
        found.append(
            f"Decisions are provisional while runs are missing: each report of them has the whole {level} of error. Plan 'looks' "
            "to decide before the last seed."
        )
    if before := summary["decided_before"]:
        found.append(
            f"This study was decided before, after {' and '.join(str(looks[-1]) for looks in before)} seeds, with other 'seeds' "
            f"or 'looks'. Each time has the whole {level} of error: it does not hold over all of them."
        )
    return found


def _decision(pair: Mapping[str, Any]) -> tuple[str, str, str]:
    metric, shown = pair["equivalence"]["metric"], pair["decision"]["shown"]
    kind, until = ("open", ", provisional") if pair["decision"].get("provisional") else ("shown", "")
    found = pair["scores"][metric]
    if found["low"] is None:
        return "open", "open", "nothing can be told"
    if shown is None:
        return "open", "open", f"at most {_bound(found):.2g} apart"
    if shown == EQUIVALENT:
        return kind, f"equivalent{until}", f"within {pair['equivalence']['margin']:.2g}"
    worse = shown_worse(pair, metric)
    return kind, f"{pair['a'] if worse == pair['b'] else pair['b']} better{until}", signed(found)


def _bound(found: Mapping[str, Any]) -> float:
    """How far two methods are apart at most, by the interval."""
    return float(max(-found["low"], found["high"]))


def basis(pair: Mapping[str, Any]) -> str:
    """How many seeds and rows a difference is of, and what they could have shown."""
    of = pair["variances"]
    if of is None or pair["detectable"] is None:
        return ""
    rows = f" x {of['rows']} rows" if of["rows"] > 1 else ""
    return f"{of['seeds']} seeds{rows}; differences from {pair['detectable']:.2g} are likely to show"


@dataclass(frozen=True)
class Curve:
    """A method's evaluation loss: marks in percent; paths of the mean, the band and the seeds in a box of 1000 by 1000."""

    method: int
    name: str
    marks: list[tuple[float, float]]
    line: str
    band: str
    seeds: list[str]


@dataclass(frozen=True)
class Panel:
    """The evaluation losses of one model and task."""

    title: str
    x: Axis
    y: Axis
    curves: list[Curve]
    readings: list[tuple[int, str]]
    """(step, text shown at it)"""
    rows: list[list[Any]]
    """The values with their head, to be saved"""
    summary: str


def _panel(group: Mapping[str, Any], names: Sequence[str]) -> Panel:
    methods = [m for m in group["methods"] if m["curve"]]
    steps = sorted({step for m in methods for step in m["curve"]["steps"]})
    values = [v for m in methods for at in m["curve"]["values"] for v in at]
    top = 1.6 * max(values)
    bands = {m["method"]: [_clipped(m["curve"], i, top) for i in range(len(m["curve"]["steps"]))] for m in methods}
    shown = values + [v for band in bands.values() for pair in band if pair for v in pair]
    x, y = linear(0.0, float(max(steps) or 1)), linear(max(0.0, min(shown)), max(shown))
    curves = []
    for m in methods:
        at = m["curve"]["steps"]
        points = [(1000 * x.share(s), 1000 - 1000 * y.share(v)) for s, v in zip(at, m["curve"]["mean"], strict=True)]
        band = [(1000 * x.share(s), pair) for s, pair in zip(at, bands[m["method"]], strict=True) if pair]
        outline = [(s, 1000 - 1000 * y.share(high)) for s, (_, high) in band]
        outline += [(s, 1000 - 1000 * y.share(low)) for s, (low, _) in reversed(band)]
        each = [
            _path([(1000 * x.share(s), 1000 - 1000 * y.share(v[i])) for s, v in zip(at, m["curve"]["values"], strict=True)])
            for i in range(len(m["curve"]["values"][0]))
        ]
        marks = [(left / 10, up / 10) for left, up in points]
        curves.append(Curve(names.index(m["method"]), m["method"], marks, _path(points), _path(outline, close=True), each))
    readings = []
    for step in steps:
        lines = [
            f"{m['method']}: {span(_at(m['curve'], m['curve']['steps'].index(step)))}"
            for m in methods
            if step in m["curve"]["steps"]
        ]
        readings.append((int(step), f"step {step:g}\n" + "\n".join(lines)))
    rows: list[list[Any]] = [["method", "step", "mean", "low", "high", "value of each seed"]]
    rows += [
        [m["method"], step, *(m["curve"][name][i] for name in ("mean", "low", "high")), *m["curve"]["values"][i]]
        for m in methods
        for i, step in enumerate(m["curve"]["steps"])
    ]
    last = "; ".join(f"{m['method']} {m['curve']['mean'][-1]:.3f}" for m in methods)
    return Panel(group["label"], x, y, curves, readings, rows, f"evaluation loss at the end: {last}")


def _at(curve: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {name: curve[name][i] for name in ("mean", "low", "high", "values")}


def _clipped(curve: Mapping[str, Any], i: int, top: float) -> tuple[float, float] | None:
    """A step's interval clipped to [0, `top`]: with three seeds it may be very wide."""
    low, high = curve["low"][i], curve["high"][i]
    return None if low is None else (max(0.0, low), min(high, top))


def _path(points: Sequence[tuple[float, float]], *, close: bool = False) -> str:
    return "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points)) + ("Z" if close and points else "")
