"""This machine's matrix-product throughput, measured in turn with the contenders: `python -m lownibble.bench.matmul`.

A large square product in float32 (bfloat16 on CUDA), written into the same output. It bounds the training step: no step can be
faster than its matrix products at this rate.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from lownibble.measuring.turns import answer_turns
from lownibble.models import pick_device, pick_dtype

SIZE, SIZE_CUDA, REPEATS = 2048, 8192, 6


def main() -> None:
    """Take turns until standard input ends; a turn is `REPEATS` products per step."""
    device = pick_device()
    size = SIZE if device.type == "cpu" else SIZE_CUDA
    a = torch.randn(size, size, device=device, dtype=pick_dtype("auto", device))
    b, out = torch.randn_like(a), torch.empty_like(a)

    def do(steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        for _ in range(steps * REPEATS):
            torch.mm(a, b, out=out)
        out[0, 0].item()  # synchronises with the GPU
        return {"flops": 2.0 * size**3 * REPEATS * steps, "seconds": time.perf_counter() - began}

    answer_turns({}, do)


if __name__ == "__main__":
    main()
