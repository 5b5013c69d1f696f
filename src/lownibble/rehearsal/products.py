"""A large matrix product, by which a device's FLOP/s are measured: float32 on a CPU, 16-bit on CUDA.

On a CPU torch has two libraries for it, MKL and oneDNN, and multiplies by the first. MKL uses AVX-512 on Intel's processors
alone, so that `torch.mm` is half as fast as the processor can be on some others (docs/adr/0050). The faster one counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lownibble.models import pick_dtype

SIZE, SIZE_CUDA, TRIES, REPEATS = 2048, 8192, 3, 7
"""Rows of the matrices; timed products by each library, before one is chosen, and of the chosen one."""


class Product(NamedTuple):
    """One product of two square matrices: `library` that computes it, its FLOPs, and `multiply` that runs it once."""

    library: str
    flops: float
    multiply: Callable[[], torch.Tensor]


def products(device: torch.device, size: int | None = None) -> list[Product]:
    """The product by each library that torch has for it on `device`."""
    size = size or (SIZE if device.type == "cpu" else SIZE_CUDA)
    a = torch.randn(size, size, device=device, dtype=pick_dtype("auto", device))
    b, out, flops = a + a.t(), torch.empty_like(a), 2.0 * size**3  # symmetric: oneDNN takes the transpose
    found = [Product("torch.mm", flops, lambda: torch.mm(a, b, out=out))]
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        by_onednn: Any = torch.ops.mkldnn._linear_pointwise
        found.append(Product("oneDNN", flops, lambda: by_onednn(a, b, None, "none", [], "")))
    return found


def fastest(device: torch.device, size: int | None = None) -> Product:
    """The product by the library that is fastest on `device`, tried if there are several."""
    found = products(device, size)
    return found[0] if len(found) == 1 else min(found, key=lambda each: min(_seconds(each.multiply) for _ in range(TRIES)))


def flops_per_s(device: torch.device, size: int | None = None) -> float:
    """FLOP/s of the fastest product."""
    product = fastest(device, size)
    return product.flops / least_seconds(product.multiply)


def least_seconds(do: Callable[[], torch.Tensor]) -> float:
    """Minimum time of `REPEATS` calls, after one warm-up call."""

    def synchronised() -> None:
        do().view(-1)[0].item()

    synchronised()
    return min(_seconds(synchronised) for _ in range(REPEATS))


def _seconds(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began
