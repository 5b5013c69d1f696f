"""The report of a comparison: one self-contained HTML page.

The template, the style and the script are separate files, inlined here. Names, paths and errors are untrusted and are treated as
text everywhere: the template escapes by default, data for the script is JSON with `<`, `>`, `&` and `'` escaped, and a content
security policy allows only this style and this script, and no requests.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lownibble.study import table
from lownibble.study.report import curves, facts, memory

_HERE = Path(__file__).parent


def write(path: str | Path, comparison: dict[str, Any], runs: list[dict[str, Any]]) -> Path:
    """Write the page of a comparison's record and its runs' records (in the same order); returns its path."""
    path = Path(path)
    path.write_text(render(comparison, runs, path.parent), encoding="utf-8")
    return path


def render(comparison: dict[str, Any], runs: list[dict[str, Any]], folder: Path) -> str:
    """Render the page as text; `folder` is where it will be written, beside the records that it links to."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    summaries = comparison["methods"]
    names = [s["method"] for s in summaries]
    named = list(zip(names, runs, strict=True))
    config = comparison.get("config", {})
    style, base, charts = ((_HERE / name).read_text(encoding="utf-8") for name in ("style.css", "base.js", "charts.js"))
    script = base + charts
    lists = {
        "model": facts.model(named),
        "data": facts.data(named),
        "environment": facts.environment(comparison, named),
    }
    changed, kept = facts.options(config)
    return environment.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=content_hash(style),
        script_hash=content_hash(script),
        names=names,
        summaries=summaries,
        model=config.get("model", "unknown model"),
        data=next(
            (run["data"]["name"] for run in runs if run.get("data", {}).get("name")),
            config.get("data", {}).get("path", "unknown data"),
        ),
        created=comparison.get("created", "").replace("T", " ").replace("+00:00", " UTC"),
        recommended=comparison.get("advice", {}).get("method"),
        headline=facts.headline(comparison),
        reasons=facts.reasons(comparison),
        rows=_rows(summaries),
        bars=memory.build(summaries, runs),
        curves=curves.build(summaries, runs),
        evaluations=_evaluations(named),
        resumed=[name for name, run in named if run.get("steps") and run["steps"][0]["step"] > 1],
        on_device=any(run.get("environment", {}).get("device_type", "cpu") != "cpu" for run in runs),
        changed=changed,
        kept=kept,
        command=shlex.join(comparison.get("command", [])),
        lists=lists,
        apart=[fact.name for fact in [*lists["data"], *lists["environment"]] if fact.differs],
        records=facts.records(folder, [s["method"] for s in summaries if s["status"] != "left out"]),
    )


def content_hash(text: str) -> str:
    """The SHA-256 source of a style or script for a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _rows(summaries: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The comparison's table; only its first row if no method finished."""
    found = [(_tidy(label), [_tidy(cell) for cell in cells]) for label, cells in table.rows(summaries)]
    return found if any(s["status"] == "ok" for s in summaries) else found[:1]


def _tidy(text: str) -> str:
    """An arrow for '->', and no line break between a figure and its unit."""
    return re.sub(r"(?<=\d) (?=([GMK]iB|s)\b)", "\N{NO-BREAK SPACE}", text.replace("->", "→"))


def _evaluations(named: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Every evaluation as a row of figures, and the names of their scores."""
    sides = [(name, e) for name, run in named for e in run.get("evaluations", [])]
    scores = list(dict.fromkeys(key for _, e in sides for key in e.get("scores", {})))
    rows = [
        (e["step"], name, [f"{e['loss']:.4f}", *(f"{e['scores'][s]:.4f}" if s in e.get("scores", {}) else "-" for s in scores)])
        for name, e in sides
    ]
    return {"scores": [s.replace("_", " ") for s in scores], "rows": sorted(rows, key=lambda row: row[0])}
