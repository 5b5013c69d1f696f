"""Benchmarks: ours next to peers, interleaved in one run, reported as medians and pairwise ratios."""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

from lownibble.errors import ConfigError

BENCHES = (
    "kernels",
    "parity",
    "train",
    "experts",
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
    "prefix",
    "soak",
    "chats",
    "parallel",
    "preference",
    "contact",
    "gpu",
)
"""Benchmarks of `lownibble bench`. Each is a module of this package, imported when it runs, with a function `bench_NAME`."""

OPTIONS = {
    "data": ("train", "quality"),
    "model": ("train", "experts", "decode", "plan", "preference", "gpu"),
    "batch_size": ("train", "experts", "plan", "gpu"),
    "max_length": ("train", "experts", "plan", "gpu"),
    "only": ("train", "contact"),
    "time_limit": ("contact", "gpu"),
    "stand_in": ("contact",),
}
"""Option -> the benchmarks that have it; all have `peers` and `repeats`."""

SAVES = ("train", "decode", "plan", "contact", "kernels")
"""Benchmarks that take `save`, called with the record so far."""


def run_bench(name: str, **options: Any) -> dict[str, Any]:
    """Run a benchmark; returns the record of `bench_NAME(peers, repeats, ...)`, whose `headlines` are the figures to show.

    Raises:
        ConfigError: the benchmark does not have an option.
    """
    for option, having in OPTIONS.items():
        if option in options and name not in having:
            known = [f"'bench {each}'" for each in having]
            them = " and ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)
            raise ConfigError(f"--{option.replace('_', '-')} is for {them}; 'bench {name}' has work of its own. Leave it out.")
    if "max_length" in options:
        options["length"] = options.pop("max_length")
    bench = getattr(import_module(f"lownibble.bench.{name}"), f"bench_{name}")
    return cast("dict[str, Any]", bench(**options))
