"""The comparison as a table: one column per method, one row per figure. Terminal, README and report show the same rows."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.table import Table

from lownibble.study.advice import ended


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def _mib(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def _planned(summary: dict[str, Any]) -> str:
    planned = summary.get("planned") or {"unknown": ""}
    if "unknown" in planned:
        return "not planned"
    ours, theirs = planned["planned_bytes"]["likely"], planned["measured_bytes"]
    return f"{ours / 2**30:.2f} -> {_gib(theirs)} ({planned['error']:+.0%})"


def _activations(summary: dict[str, Any]) -> str:
    kinds = summary["bytes_by_kind"]
    return _mib(kinds["activations"]) if "activations" in kinds else "-"


def _change(summary: dict[str, Any], score: str) -> str:
    before, after = summary["scores_before"].get(score), summary["scores"].get(score)
    return "-" if before is None or after is None else f"{before:.3f} -> {after:.3f}"


def rows(summaries: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(figure, one text per method); failed methods show '-' and their error in the first row."""

    def row(name: str, text: Any) -> tuple[str, list[str]]:
        return name, [text(s) if s["status"] == "ok" else "-" for s in summaries]

    def quartiles(s: dict[str, Any]) -> str:
        low, _, high = s["tokens_per_s_quartiles"]
        return f"{s['tokens_per_s']:.0f} ({low:.0f} to {high:.0f})"

    def turns(s: dict[str, Any]) -> str:
        paired = s.get("paired_tokens_per_s")
        return f"{paired['median']:.0f} ({paired['min']:.0f} to {paired['max']:.0f})" if paired else "-"

    found = [
        ("result", ["finished" if s["status"] == "ok" else ended(s) for s in summaries]),
        *(
            [row("frozen-base matmul precision", lambda s: s["base_computed_in"])]
            if all("base_computed_in" in s for s in summaries if s["status"] == "ok")
            else []  # an older record without this field
        ),
        *(
            [row("processes", lambda s: f"{s['parallel']['ranks']} ({s['parallel']['mode']})" if "parallel" in s else "1")]
            if any("parallel" in s for s in summaries)
            else []
        ),
        row("peak memory above imports", lambda s: _gib(s["peak_bytes"])),
        row("  weights and constants", lambda s: _mib(sum(s["bytes_by_kind"][k] for k in ("weights", "codes", "constants")))),
        row("  saved activations", _activations),
        *(
            [row("process peak (CUDA: allocated), planned -> measured", _planned)]
            if any(s["status"] == "ok" and s.get("planned") for s in summaries)
            else []
        ),
        row("tokens/s of the run (quartiles over steps)", quartiles),
        row("tokens/s, interleaved (min to max)", turns),
        row("samples/s", lambda s: f"{s['samples_per_s']:.1f}"),
        row("evaluation loss, before -> after", lambda s: f"{s['eval_loss_before']:.3f} -> {s['eval_loss']:.3f}"),
    ]
    names = dict.fromkeys(name for s in summaries if s["status"] == "ok" for name in s["scores"])
    for name in names:
        label = name.replace("_", " ") + ", before -> after"
        found.append(row(label, partial(_change, score=name)))
    finished = next((s for s in summaries if s["status"] == "ok"), None)
    if finished is not None:
        label = f"steps to evaluation loss {finished['target_loss']:.3f}"
        found.append(row(label, lambda s: f"{s['steps_to_target']:.1f} ({s['seconds_to_target']:.0f} s)"))
    found.append(row("adapter on disk", lambda s: _mib(s["adapter_bytes"])))
    return found


def comparison_table(summaries: list[dict[str, Any]]) -> Table:
    """The rows as a terminal table."""
    table = Table(title_justify="left")
    table.add_column("")
    for summary in summaries:
        table.add_column(summary["method"], justify="right")
    for name, cells in rows(summaries):
        table.add_row(name, *cells)
    return table


def markdown(summaries: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| | " + " | ".join(s["method"] for s in summaries) + " |", "| --- |" + " ---: |" * len(summaries)]
    lines += [f"| {name.strip()} | " + " | ".join(cells) + " |" for name, cells in rows(summaries)]
    return "\n".join(lines)
