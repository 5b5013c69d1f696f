"""A plan for the terminal: what fits where, and for one device what its memory is filled with."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lownibble.plan.fit import Verdict
from lownibble.plan.memory import KINDS, Interval
from lownibble.plan.plan import Plan, Row
from lownibble.plan.speed import Range

COLOURS = {
    "weights": "blue", "codes": "cyan", "constants": "bright_cyan", "adapters": "green", "gradients": "yellow",
    "optimizer": "magenta", "activations": "red", "workspace": "bright_black", "the rest": "white",
}  # fmt: skip
WIDTH = 60


def tables(plan: Plan) -> Iterator[RenderableType]:
    """What to print, in order."""
    train = plan.config.train
    shape = f"{plan.shape.name}: {plan.shape.parameters / 1e9:.2f}B parameters, batch {train.batch_size} x {train.max_length}"
    yield _overview(plan, shape)
    if len(plan.devices) == 1:
        for row in plan.rows:
            yield from _bars(row.verdict)
    for device in plan.devices if len(plan.devices) == 1 else ():
        method, reasons = plan.advice.get(device.name, (None, []))
        if reasons:
            yield Text(f"Recommendation: {method or 'none'}. {' '.join(reasons)}", style="bold")


def _overview(plan: Plan, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("device", "GiB", "method", "verdict", "needs GiB"):
        table.add_column(name, justify="right" if "GiB" in name else "left")
    extra = [name for name, wanted in (
        ("tokens/s", any(row.speed for row in plan.rows)), ("hours", plan.config.tokens), ("$", plan.config.tokens),
        ("largest batch", len(plan.devices) == 1), ("longest row", len(plan.devices) == 1),
    ) if wanted]  # fmt: skip
    for name in extra:
        table.add_column(name, justify="right")
    for row in plan.rows:
        verdict = row.verdict
        style = "green" if verdict.fits and verdict.words == "fits" else "yellow" if verdict.fits else "red"
        cells = {
            "tokens/s": _range(row.speed.tokens_per_s if row.speed else None, "{:,.0f}"), "hours": _range(row.speed.hours if row.speed else None),
            "$": _range(row.speed.dollars if row.speed else None), "largest batch": _largest(row, row.largest_batch_size),
            "longest row": _largest(row, row.largest_max_length),
        }  # fmt: skip
        table.add_row(
            verdict.device.title, f"{verdict.device.memory_bytes / 2**30:.1f}", verdict.method, Text(verdict.words, style=style),
            _gib(verdict.memory.device), *(cells[name] for name in extra),
        )  # fmt: skip
    return table


def _largest(row: Row, value: int | None) -> str:
    return "-" if not value else f"{value:,}"


def _gib(interval: Interval) -> str:
    return f"{interval.likely / 2**30:.1f} ({interval.low / 2**30:.1f} to {interval.high / 2**30:.1f})"


def _range(found: Range | None, form: str = "{:.1f}") -> str:
    return "-" if not found else f"{form.format(found.likely)} ({form.format(found.low)} to {form.format(found.high)})"


def parts(verdict: Verdict) -> dict[str, int]:
    """Kind of memory -> bytes on the device, and the rest: context, workspaces, what lies between tensors."""
    kinds = {kind: verdict.memory.kinds[kind] for kind in KINDS if verdict.memory.kinds[kind]}
    return {**kinds, "the rest": max(0, verdict.memory.device.likely - sum(kinds.values()))}


def _bars(verdict: Verdict) -> Iterator[Text]:
    """A bar as long as the device's memory, or what is needed, and what its colours mean."""
    whole = max(verdict.device.memory_bytes, verdict.memory.device.likely)
    bar = Text(f"{verdict.method:<6}")
    used = 0
    for kind, n in parts(verdict).items():
        end = used + n
        bar.append("█" * (round(end / whole * WIDTH) - round(used / whole * WIDTH)), style=COLOURS[kind])
        used = end
    limit = round(verdict.device.memory_bytes / whole * WIDTH)
    bar.append("·" * max(0, limit - round(used / whole * WIDTH)), style="bright_black")
    bar.append(f" {verdict.memory.device.likely / 2**30:.1f} of {verdict.device.memory_bytes / 2**30:.1f} GiB")
    yield bar
    legend = Text("      ")
    for kind, n in parts(verdict).items():
        legend.append("■ ", style=COLOURS[kind])
        legend.append(f"{kind} {n / 2**30:.2f}  ")
    yield legend
