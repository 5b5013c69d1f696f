"""A plan for the terminal: what fits on which device, and for a single device its memory by kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lownibble.planning.fit import Verdict
from lownibble.planning.memory import KINDS, OF_RANKS, Interval, sequences_of_row
from lownibble.planning.plan import Plan, Row
from lownibble.planning.speed import Range

COLOURS = {
    "weights": "blue", "codes": "cyan", "constants": "bright_cyan", "adapters": "green", "gradients": "yellow",
    "optimizer": "magenta", "activations": "red", "workspace": "bright_black", "the rest": "white",
}  # fmt: skip
WIDTH = 60


def tables(plan: Plan) -> Iterator[RenderableType]:
    """What to print, in order: one line per device, or the details of a single one."""
    train = plan.config.train
    part = f" (the text model of a {plan.shape.wrapper}; the rest is not planned)" if plan.shape.wrapper else ""
    size = f"{plan.shape.parameters / 1e9:.2f}B parameters{f', {plan.stored_as}' if plan.stored_as else ''}"
    pairs = f" ({train.objective}: two sequences a row)" if sequences_of_row(train) == 2 else ""
    title = f"{plan.shape.name}{part}: {size}, batch {train.batch_size} x {train.max_length}{pairs}"
    for left_out, why in plan.refused.items():
        yield Text(f"{left_out} is not planned: {why}")
    if plan.shape.counts is not None:
        title += "; traced step, its layers not compiled"
    if plan.config.merge_aware:
        title += "; merge-aware"
    if any(row.verdict.memory.compiled for row in plan.rows):
        title += "; compiled layers"
    if plan.config.train.fsdp_cpu_offload:
        title += "; shards in host memory"
    if plan.config.gpus:
        for device in plan.devices:
            rows = [row for row in plan.rows if row.verdict.device == device]
            yield _of_ranks(plan, rows, f"{title}, on each {device.title} ({device.memory_bytes / 2**30:.1f} GiB)")
            yield Text("GiB on each at the worst instant:")
            yield from map(_kinds, rows)
        return
    if len(plan.devices) > 1:
        yield _overview(plan, title)
        return
    device = plan.devices[0]
    yield _detail(plan, f"{title}, {device.title} ({device.memory_bytes / 2**30:.1f} GiB)")
    for row in plan.rows:
        yield from _bars(row.verdict)
    method, reasons = plan.advice.get(device.name, (None, []))
    if reasons:
        yield Text(f"Recommendation: {method or 'none'}. {' '.join(reasons)}", style="bold")


def _overview(plan: Plan, title: str) -> Table:
    """Devices x methods: likely GiB and the verdict."""
    methods = list(dict.fromkeys(row.verdict.method for row in plan.rows))
    tokens = plan.config.tokens
    costs = f"; hours and dollars for {tokens:,} tokens" if tokens else ""
    table = Table(title=f"{title}: GiB needed{costs}", title_justify="left")
    table.add_column("device")
    table.add_column("GiB", justify="right")
    for method in methods:
        table.add_column(method)
    if plan.advice:
        table.add_column("take")
    for device in plan.devices:
        rows = [row for row in plan.rows if row.verdict.device == device]
        advice = [plan.advice[device.name][0] or "none"] if plan.advice else []
        table.add_row(device.title, f"{device.memory_bytes / 2**30:.1f}", *map(_cell, rows), *advice)
    return table


def _of_ranks(plan: Plan, rows: list[Row], title: str) -> Table:
    """Numbers of GPUs, ways and methods: what each card needs, and the speed and the cost of all."""
    tokens = plan.config.tokens
    table = Table(title=f"{title}; *: auto takes it", title_justify="left")
    columns = ("GPUs", "method", "", "needs, GiB", "tokens/s of all", "$ for 1,000,000 tokens")
    for name in (*columns, *((f"hours, $ for {tokens:,} tokens",) if tokens else ())):
        table.add_column(name)
    for row in rows:
        verdict, speed, ranks = row.verdict, row.speed, row.ranks
        assert ranks is not None
        figures = [_range(speed.tokens_per_s if speed else None, "{:,.0f}"), _range(ranks.dollars_per_million, "{:.2f}")]
        if tokens:
            figures.append(f"{_range(speed.hours if speed else None)}, {_range(speed.dollars if speed else None)}")
        table.add_row(
            f"{ranks.gpus} {ranks.parallel}{'*' * ranks.is_auto}", verdict.method, Text(verdict.words, style=_style(verdict)),
            _gib(verdict.memory.device), *figures,
        )  # fmt: skip
    return table


def _kinds(row: Row) -> Text:
    assert row.ranks is not None
    held = ", ".join(f"{kind} {n / 2**30:.2f}" for kind, n in parts(row.verdict).items())
    on_host = f"; in host memory {n / 2**30:.2f}" if (n := row.verdict.memory.host_bytes) else ""
    return Text(f"{row.ranks.gpus:>4} {row.ranks.parallel:<4} {row.verdict.method:<6} {held}{on_host}")


def _cell(row: Row) -> Text:
    verdict, speed = row.verdict, row.speed
    words = f"{verdict.memory.device.likely / 2**30:.1f}, {verdict.words}"
    if verdict.fits and speed is not None and speed.hours is not None:
        words += f"; {speed.hours.likely:.1f} h"
        words += f", ${speed.dollars.likely:.2f}" if speed.dollars is not None else ""
    return Text(words, style=_style(verdict))


def _style(verdict: Verdict) -> str:
    return "red" if not verdict.fits else "green" if verdict.words == "fits" else "yellow"


def _detail(plan: Plan, title: str) -> Table:
    """Figures x methods, on one device."""
    tokens = plan.config.tokens
    cells: dict[str, list[Text | str]] = {
        "": [Text(row.verdict.words, style=_style(row.verdict)) for row in plan.rows],
        "needs, GiB": [_gib(row.verdict.memory.device) for row in plan.rows],
        "largest batch": [_largest(row.largest_batch_size) for row in plan.rows],
        "longest row": [_largest(row.largest_max_length) for row in plan.rows],
    }
    if any(row.verdict.memory.host_bytes for row in plan.rows):
        cells["pinned host memory, GiB"] = [f"{row.verdict.memory.host_bytes / 2**30:.1f}" for row in plan.rows]
    if any(row.verdict.memory.compiled for row in plan.rows):
        cells["decoder layers"] = ["compiled" if row.verdict.memory.compiled else "not compiled" for row in plan.rows]
    if any(row.speed for row in plan.rows):
        cells["tokens/s"] = [_range(row.speed.tokens_per_s if row.speed else None, "{:,.0f}") for row in plan.rows]
    if tokens and "tokens/s" in cells:
        cells[f"hours for {tokens:,} tokens"] = [_range(row.speed.hours if row.speed else None) for row in plan.rows]
        cells["dollars"] = [_range(row.speed.dollars if row.speed else None) for row in plan.rows]
    table = Table(title=title, title_justify="left")
    for name in ("", *(row.verdict.method for row in plan.rows)):
        table.add_column(name)
    for name, values in cells.items():
        table.add_row(name, *values)
    return table


def _largest(value: int | None) -> str:
    return "-" if not value else f"{value:,}"


def _gib(interval: Interval) -> str:
    return f"{interval.likely / 2**30:.1f} ({interval.low / 2**30:.1f} to {interval.high / 2**30:.1f})"


def _range(found: Range | None, form: str = "{:.1f}") -> str:
    return "-" if not found else f"{form.format(found.likely)} ({form.format(found.low)} to {form.format(found.high)})"


def parts(verdict: Verdict) -> dict[str, int]:
    """Kind of memory -> bytes on the device, and 'the rest': context, workspaces, fragmentation."""
    kinds = {kind: n for kind in (*KINDS, *OF_RANKS) if (n := verdict.memory.kinds.get(kind))}
    return {**kinds, "the rest": max(0, verdict.memory.device.likely - sum(kinds.values()))}


def _bars(verdict: Verdict) -> Iterator[Text]:
    """A bar scaled to the device's memory or the likely need, whichever is larger, and its legend."""
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


def beside(planned: Mapping[str, Any]) -> str:
    """A run's planned and measured memory, from its record."""
    ours = {name: n / 2**30 for name, n in planned["planned_bytes"].items()}
    compiled = ", for layers not compiled" if planned["compiled"] and not planned["plan"].get("compiled") else ""
    return (
        f"planned {ours['likely']:.2f} GiB ({ours['low']:.2f} to {ours['high']:.2f}{compiled}), measured "
        f"{planned['measured_bytes'] / 2**30:.2f} GiB, error {planned['error']:+.1%}"
    )
