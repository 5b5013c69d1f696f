"""Figures of a study as text: means with their intervals, ratios, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score(value: float | None) -> str:
    """Three decimals (from 100 on: four significant digits), '-' for None."""
    return "-" if value is None else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3f}"


def span(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """'mean (low to high)'; without an interval, the mean and the reason."""
    if found is None or found["mean"] is None:
        return "-"
    low, high = found["low"], found["high"]
    if low is None and high is None:
        return f"{found['mean']:.{digits}f} ({_no_interval(found)})"
    ends = (None if end is None else f"{end:.{digits}f}" for end in (low, high))
    return f"{found['mean']:.{digits}f} ({' to '.join(end or 'no bound' for end in ends)})"


def _no_interval(found: Mapping[str, Any]) -> str:
    return "all seeds alike" if len(found.get("values") or ()) > 1 else "one seed"


def signed(found: Mapping[str, Any], digits: int = 3) -> str:
    """A difference with its sign and interval."""
    if found["low"] is None:
        return f"{found['mean']:+.{digits}f} ({_no_interval(found)})"
    return f"{found['mean']:+.{digits}f} ({found['low']:+.{digits}f} to {found['high']:+.{digits}f})"


def ratio(found: Mapping[str, Any] | None) -> str:
    """A ratio with its interval, or with the range over rounds; of steps with the seeds that have none."""
    if found is None:
        return "-"
    if found.get("median") is not None:
        return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"
    n = found.get("at_start")
    return span(found, 2) + (f"; {n} seed{'s' if n > 1 else ''} left out, at that loss before training" if n else "")


def gib(found: Mapping[str, Any] | None) -> str:
    """Mean bytes as GiB, with the range over seeds if there is one."""
    if found is None or not found["values"]:
        return "-"
    low, high = min(found["values"]) / 2**30, max(found["values"]) / 2**30
    return (
        f"{found['mean'] / 2**30:.2f}"
        if f"{low:.2f}" == f"{high:.2f}"
        else f"{found['mean'] / 2**30:.2f} ({low:.2f} to {high:.2f})"
    )


def planned(row: Mapping[str, Any]) -> str:
    """One cell of the planner's table."""
    if not row["fits"]:
        return "no"
    hours = "" if row["hours"] is None else f", {row['hours']:.1f} h"
    dollars = "" if row["dollars"] is None else f", ${row['dollars']:.0f}"
    return f"{row['gib']:.1f} GiB{hours}{dollars}"


def pipe(text: str) -> str:
    """Escape text for a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
