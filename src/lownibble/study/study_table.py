"""A study's figures for the terminal: a table of scores, and a line for each difference between methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lownibble.study.report.figures import gib, ratio, signed, span
from lownibble.study.report.study_page import verdict


def tables(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Scores by task and method; then differences and ratios by task and pair."""
    scores = Table(title=Text(f"{summary['name']}: mean over seeds (95% interval)"), title_justify="left")
    for name in ("task", "method", "score", "", "evaluation loss", "peak GiB"):
        scores.add_column(name, justify="left" if name in ("task", "method", "score") else "right")
    for group in summary["groups"]:
        metric = group["metrics"][0]
        for m in group["methods"]:
            of = m["scores"]
            figures = [span(of[metric]), span(of["loss"]), gib(m["peak_bytes"])] if of else [_none(m), "-", "-"]
            scores.add_row(*map(Text, (group["label"], m["method"], metric, *figures)))
    yield scores
    for group in summary["groups"]:
        for pair in group["pairs"]:
            yield Text(f"{group['label']}, {pair['a']} against {pair['b']}", style="bold")
            metric = pair["equivalence"]["metric"]
            yield Text(f"  {metric} {signed(pair['scores'][metric])}: {verdict(pair)}")
            steps, speed, memory = (ratio(pair[f"{name}_ratio"]) for name in ("steps", "speed", "memory"))
            yield Text(f"  steps {steps}, tokens/s {speed}, memory {memory}")


def plan_tables(plan: Mapping[str, Any]) -> Iterator[RenderableType]:
    """A study's plan: its tasks with their power, then what is to be said of it."""
    hours = "unknown hours" if plan["hours"] is None else f"about {plan['hours']:.1f} hours"
    hours += " (by their operations: a factor of two either way)" if plan["hours_estimated"] else ""
    yield Text(f"{plan['name']}: {plan['cells']} cells, {plan['left']} of them to run, {hours}", style="bold")
    shown = Table(title=Text(f"{plan['comparisons']} comparisons, looks after {plan['looks']} seeds"), title_justify="left")
    for name in ("task", "score", "margin", "seeds x rows", "power", "decided after", "shows from"):
        shown.add_column(name, justify="left" if name in ("task", "score") else "right")
    for of in plan["tasks"]:
        detectable = "-" if of["detectable"] is None else f"{of['detectable']:.3g}"
        figures = (
            f"{of['margin']:.3g}",
            f"{of['seeds']} x {of['rows']}",
            f"{of['power']:.0%}",
            f"{of['seeds_until_decided']:.1f}",
            detectable,
        )
        shown.add_row(*map(Text, (of["task"], of["metric"], *figures)))
    yield shown
    yield Text(
        "power: the probability that equivalence of equal methods is shown. decided after: so many seeds, in the mean. "
        "shows from: a difference that is shown in 80%."
    )
    for source in dict.fromkeys(of["source"] for of in plan["tasks"]):
        yield Text(f"variances of {', '.join(of['task'] for of in plan['tasks'] if of['source'] == source)}: {source}")
    for text in plan["told"]:
        yield Text(text, style="yellow")


def _none(method: Mapping[str, Any]) -> str:
    return f"failed: {method['failed'][0]}" if method["failed"] else f"{method['missing']} missing"
