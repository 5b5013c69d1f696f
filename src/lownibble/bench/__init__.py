"""Benchmarks: ours next to peers, interleaved in one run, reported as medians and pairwise ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _kernels(**options: Any) -> dict[str, Any]:
    from lownibble.bench.kernels import bench_kernels

    return bench_kernels(**options)


def _train(**options: Any) -> dict[str, Any]:
    from lownibble.bench.train import bench_train

    return bench_train(**options)


def _decode(**options: Any) -> dict[str, Any]:
    from lownibble.bench.decode import bench_decode

    return bench_decode(**options)


def _parity(**options: Any) -> dict[str, Any]:
    from lownibble.bench.parity import bench_parity

    return bench_parity(**options)


def _quality(**options: Any) -> dict[str, Any]:
    from lownibble.bench.quality import bench_quality

    return bench_quality(**options)


def _memory(**options: Any) -> dict[str, Any]:
    from lownibble.bench.memory import bench_memory

    return bench_memory(**options)


def _paging(**options: Any) -> dict[str, Any]:
    from lownibble.bench.paging import bench_paging

    return bench_paging(**options)


BENCHES: dict[str, Callable[..., dict[str, Any]]] = {
    "kernels": _kernels,
    "parity": _parity,
    "train": _train,
    "decode": _decode,
    "quality": _quality,
    "memory": _memory,
    "paging": _paging,
}
"""What `lownibble bench` measures: name -> function (peers, repeats), which returns the figures of a record.

`headlines` in the result are the figures to show.
"""
