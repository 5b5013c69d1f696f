"""Interleaved speed: the methods of a comparison take turns of `STEPS` training steps on the same batches.

The runs of a comparison are sequential, so a machine that slows down halfway slows one method only. Here each method is loaded in
its own process and they alternate; the advice reports the ratio within a round. All models are loaded at once: if 1.1 times the
sum of their measured peaks does not fit, the measurement is skipped and the record says why.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import psutil
import torch

from lownibble.config import RunConfig
from lownibble.measuring.turns import TurnTaker, play, ratio, spread
from lownibble.models import pick_device

ROUNDS, STEPS = 6, 1


def paired_speed(configs: Mapping[str, RunConfig], peaks: Sequence[int]) -> dict[str, Any]:
    """Measure the interleaved tokens/s of each configuration, and the ratio of each pair.

    Args:
        configs: by method name; each has run before.
        peaks: their measured peaks in bytes.
    Returns:
        `tokens_per_s` and `ratios` ("b_vs_a"), each with median, min and max over rounds; or `skipped`, the reason.
    """
    if len(configs) < 2:
        return {"skipped": "fewer than two methods finished"}
    free = _free_bytes(next(iter(configs.values())).device)
    if 1.1 * sum(peaks) > free:
        return {"skipped": f"all methods at once need {sum(peaks) / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"}
    with ExitStack() as stack:
        takers = []
        for name, config in configs.items():
            spec = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="turns-", suffix=".json"))
            json.dump(config.to_dict(), spec)
            spec.flush()
            takers.append(stack.enter_context(TurnTaker(name, "lownibble.measuring.turns", spec.name)))
        for taker in takers:
            taker.ready()
        answers = play(takers, ROUNDS, STEPS)
    rates = {name: [a["tokens"] / a["seconds"] for a in given[1:]] for name, given in answers.items()}
    return {
        "rounds": ROUNDS,
        "steps_per_round": STEPS,
        "tokens_per_s": {name: spread(values) for name, values in rates.items()},
        "ratios": {f"{b}_vs_{a}": ratio(rates[b], rates[a]) for a, b in combinations(rates, 2)},
    }


def _free_bytes(device: str) -> int:
    chosen = pick_device(device)
    return int(torch.cuda.mem_get_info(chosen)[0] if chosen.type == "cuda" else psutil.virtual_memory().available)
