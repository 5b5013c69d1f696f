"""This machine's matrix-product throughput, measured in turn with the contenders: `python -m lownibble.bench.matmul`.

A large square product (`rehearsal/products.py`) bounds the training step: no step can be faster than its matrix products at this
rate.
"""

from __future__ import annotations

import time
from typing import Any

from lownibble.measuring.turns import answer_turns
from lownibble.memory import usage
from lownibble.models import pick_device
from lownibble.rehearsal.products import fastest

REPEATS = 6


def main() -> None:
    """Take turns until standard input ends; a turn is `REPEATS` products per step."""
    device = pick_device()
    product = fastest(device)

    def do(steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        for _ in range(steps * REPEATS):
            out = product.multiply()
        out[0, 0].item()  # synchronises with the GPU
        seconds = time.perf_counter() - began
        return {"flops": product.flops * REPEATS * steps, "seconds": seconds, "library": product.library}

    with usage.kept_heap():  # as in the contenders: oneDNN allocates its output
        answer_turns({}, do)


if __name__ == "__main__":
    main()
