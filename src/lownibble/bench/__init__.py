"""Benchmarks: ours next to peers, interleaved in one run, reported as medians and pairwise ratios."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

BENCHES = (
    "kernels",
    "parity",
    "train",
    "decode",
    "quality",
    "codecs",
    "gptq",
    "memory",
    "paging",
    "plan",
    "published",
    "merge",
    "latency",
    "dropin",
    "serve",
    "soak",
    "chats",
)
"""Benchmarks of `lownibble bench`. Each is a module of this package, imported when it runs, with a function `bench_NAME`."""


def run_bench(name: str, **options: Any) -> dict[str, Any]:
    """Run a benchmark; returns the record of `bench_NAME(peers, repeats, ...)`, whose `headlines` are the figures to show."""
    bench = getattr(import_module(f"lownibble.bench.{name}"), f"bench_{name}")
    return cast("dict[str, Any]", bench(**options))
