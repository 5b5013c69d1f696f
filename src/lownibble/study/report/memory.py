"""Memory bars: each method's peak, stacked by kind of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lownibble.study.report.curves import Axis, linear

KINDS = {
    "weights": "model weights in 16 or 32 bits",
    "codes": "model weights in 4 bits",
    "constants": "quantisation constants",
    "adapters": "LoRA matrices",
    "gradients": "gradients of what is trained",
    "optimizer": "optimiser states",
    "activations": "saved for backward in the first step",
    "other": "peak minus all of the above: buffers, allocator, temporary tensors",
}
"""Kind of memory -> description, in stacking order."""

_CHARACTER_PX, _NARROWEST_BAR_PX = 7.0, 300.0


@dataclass(frozen=True)
class Segment:
    """A segment of a bar; positions in percent of the axis. `label` is empty if it would not fit on a phone."""

    kind: str
    x: str
    width: str
    label: str
    text: str


@dataclass(frozen=True)
class Bar:
    """One method's peak."""

    method: str
    peak: str
    segments: list[Segment]
    summary: str


@dataclass(frozen=True)
class Bars:
    """All bars on one axis (GiB), and the same figures as a table: (kind, what it is, one text per method)."""

    axis: Axis
    bars: list[Bar]
    rows: list[tuple[str, str, list[str]]]
    peaks: list[tuple[str, list[str]]]


def size(n_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{n_bytes:.0f} B" if n_bytes else "0"


def build(summaries: list[dict[str, Any]], runs: list[dict[str, Any]]) -> Bars | None:
    """The bars of the methods that finished; None if none did."""
    finished = [(s, r) for s, r in zip(summaries, runs, strict=True) if s["status"] == "ok" and s.get("bytes_by_kind")]
    if not finished:
        return None
    kinds = [s["bytes_by_kind"] for s, _ in finished]
    axis = linear(0.0, max(max(s["peak_bytes"], sum(s["bytes_by_kind"].values())) for s, _ in finished) / 2**30)
    peaks = [
        ("peak while loading", [size(s["load_peak_bytes"]) for s, _ in finished]),
        ("peak while training", [size(s["train_peak_bytes"]) for s, _ in finished]),
    ]
    baselines = [r.get("memory", {}).get("baseline_bytes") for _, r in finished]
    if all(b is not None for b in baselines):
        peaks.append(("baseline after imports, not counted", [size(b) for b in baselines]))
    used = [name for name in dict.fromkeys([*KINDS, *(n for k in kinds for n in k)]) if any(k.get(name) for k in kinds)]
    rows = [(name, KINDS.get(name, ""), [size(k.get(name, 0)) for k in kinds]) for name in used]
    return Bars(axis, [_bar(s, axis, used) for s, _ in finished], rows, peaks)


def _bar(summary: dict[str, Any], axis: Axis, kinds: list[str]) -> Bar:
    segments, start = [], 0.0
    for kind in kinds:
        n_bytes = summary["bytes_by_kind"].get(kind, 0)
        width = axis.share(n_bytes / 2**30)
        fits = width * _NARROWEST_BAR_PX > len(kind) * _CHARACTER_PX + 8
        part = 100 * n_bytes / summary["peak_bytes"]
        text = f"{kind}: {size(n_bytes)}, {part:.1f} % of the peak"
        if n_bytes:
            segments.append(Segment(kind, f"{100 * start:.3f}%", f"{100 * width:.3f}%", kind if fits else "", text))
        start += width
    peak = f"{summary['peak_bytes'] / 2**30:.2f} GiB"
    said = "; ".join(s.text for s in segments)
    return Bar(summary["method"], peak, segments, f"{summary['method']}: peak {peak}. {said}")
