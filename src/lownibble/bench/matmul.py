"""This machine's matrix-product throughput, measured in turn with the contenders: `python -m lownibble.bench.matmul`.

A large square product in float32 (bfloat16 on CUDA). It bounds the training step: no step can be faster than its matrix products
at this rate. On a CPU the faster one of torch's two libraries, MKL and oneDNN, makes it: MKL uses AVX-512 on Intel's processors
alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lownibble.measuring.turns import answer_turns
from lownibble.models import pick_device, pick_dtype

SIZE, SIZE_CUDA, REPEATS = 2048, 8192, 6


def products(size: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The square product by each library that torch has for it here."""
    a = torch.randn(size, size, device=device, dtype=pick_dtype("auto", device))
    b, out = torch.randn_like(a), torch.empty_like(a)
    found: dict[str, Callable[[], Any]] = {"torch.mm": lambda: torch.mm(a, b, out=out)}
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return found


def _seconds(product: Callable[[], Any]) -> float:
    began = time.perf_counter()
    product()
    return time.perf_counter() - began


def main() -> None:
    """Take turns until standard input ends; a turn is `REPEATS` products per step."""
    device = pick_device()
    size = SIZE if device.type == "cpu" else SIZE_CUDA
    found = products(size, device)
    library = min(found, key=lambda name: min(_seconds(found[name]) for _ in range(4))) if len(found) > 1 else next(iter(found))

    def do(steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        for _ in range(steps * REPEATS):
            found[library]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {"flops": 2.0 * size**3 * REPEATS * steps, "seconds": time.perf_counter() - began, "library": library}

    answer_turns({}, do)


if __name__ == "__main__":
    main()
