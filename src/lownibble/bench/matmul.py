"""What this machine's float32 matrix product can do, measured in turn with everything else: `python -m lownibble.bench.matmul`.

A square product whose operands fit the caches, written into the same output: no training step can be faster than its products at
this rate.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from lownibble.training.turns import answer_turns

SIZE, REPEATS = 2048, 6


def main() -> None:
    """Take turns until standard input ends; a turn is `REPEATS` products for each step asked for."""
    a, b, out = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE), torch.empty(SIZE, SIZE)

    def do(steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        for _ in range(steps * REPEATS):
            torch.mm(a, b, out=out)
        return {"flops": 2.0 * SIZE**3 * REPEATS * steps, "seconds": time.perf_counter() - began}

    answer_turns({}, do)


if __name__ == "__main__":
    main()
