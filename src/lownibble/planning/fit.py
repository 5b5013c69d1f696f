"""What fits where: methods x devices, the largest batch and row, and which method to take.

What can be given up is what the memory budget of a run gives up, in the same order (`memory/budget.py`): paged optimiser states
cost little and change nothing, checkpointing computes the layers twice. A setting fits where the upper end of the device's
interval does: who plans wants to know what is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from lownibble.config import Method, TrainConfig
from lownibble.optim.specs import is_paged, paged_name
from lownibble.planning.hardware import Device
from lownibble.planning.memory import MemoryPlan
from lownibble.planning.records import Measured

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")

PlanOf = Callable[[Method, TrainConfig], MemoryPlan]
"""The memory of a method with these training options, on one device."""


PRECISION = 100
"""The search for the largest batch or row ends at one part in so many."""


class Relief(NamedTuple):
    """What is given up so that a run fits: its words, and the options."""

    words: str
    paged: bool
    gradient_checkpointing: bool


RELIEFS = (
    Relief("fits", False, False), Relief("fits with paging", True, False), Relief("fits with checkpointing", False, True),
    Relief("fits with checkpointing and paging", True, True),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Whether a method fits on a device.

    Attributes:
        fits: with what is in `words`. over_bytes: by how much it does not, at the least that can be done.
        train: the options with which it fits, or comes nearest.
    """

    method: Method
    device: Device
    fits: bool
    words: str
    over_bytes: int
    train: TrainConfig
    memory: MemoryPlan

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.method, "device": self.device.name, "memory_bytes": self.device.memory_bytes, "fits": self.fits,
            "verdict": self.words, "over_bytes": self.over_bytes, "gradient_checkpointing": self.train.gradient_checkpointing,
            "optim": self.train.optim, "memory": self.memory.to_dict(),
        }  # fmt: skip


def reliefs(train: TrainConfig) -> Iterator[tuple[Relief, TrainConfig]]:
    """What may be given up beyond the options as they are, the cheapest first."""
    for relief in RELIEFS:
        paged, checkpointing = is_paged(train.optim), train.gradient_checkpointing
        if relief.paged < paged or relief.gradient_checkpointing < checkpointing:
            continue
        optim = train.optim if relief.paged == paged else paged_name(train.optim)
        if optim is None:
            continue  # an optimiser from outside, that does not page
        yield relief, train.with_options(optim=optim, gradient_checkpointing=relief.gradient_checkpointing)


def judge(method: Method, device: Device, train: TrainConfig, plan_of: PlanOf) -> Verdict:
    """Whether a method fits, and with what."""
    nearest: Verdict | None = None
    for relief, options in reliefs(train):
        memory = plan_of(method, options)
        over = memory.device.high - device.memory_bytes
        if over <= 0:
            return Verdict(method, device, True, relief.words, 0, options, memory)
        if nearest is None or over < nearest.over_bytes:
            nearest = Verdict(method, device, False, f"no: {over / 2**30:.1f} GiB over", over, options, memory)
    assert nearest is not None
    return nearest


def largest(least: int, most: int, limit: int, need: Callable[[int], int]) -> int:
    """The largest value from `least` to `most` (at least that) whose need is within the limit, to 1%; 0 where none is.

    What a step takes goes up with its batch and its length nearly along a line, so the next value to try is where the line
    through the last two meets the limit.
    """
    fits, needed = least, need(least)
    if needed > limit:
        return 0
    fails, tried = max(least, most) + 1, 2 * least
    while fails - fits > max(1, fits // PRECISION):
        tried = min(max(tried, fits + 1), fails - 1)
        at_tried = need(tried)
        slope = max(1.0, abs(at_tried - needed) / abs(tried - fits))
        on_the_way = at_tried <= limit
        if on_the_way:
            fits, needed = tried, at_tried
        else:
            fails = tried
        tried = fits + int((limit - needed) / slope)
        if on_the_way and tried - fits <= fits // PRECISION:
            break  # by the line through two values that fit there is no more to be had
    return fits


class Rule(NamedTuple):
    """One of the rules of the recommendation: it holds when its condition does, and then says a method and why."""

    method: Method
    holds: Callable[[dict[str, Verdict], Measured | None], bool]
    reason: str


def _plain(verdict: Verdict) -> bool:
    return verdict.fits and verdict.words == "fits"


def _better(measured: Measured | None) -> bool:
    return measured is not None and measured.quality == "better than"


def _as_good_and_fast(measured: Measured | None) -> bool:
    return measured is not None and measured.quality != "worse than" and (measured.speed or 0) >= AS_FAST


AS_FAST = 0.95
"""QLoRA's measured share of LoRA's tokens/s from which its smaller memory decides."""

RULES = (
    Rule(
        "qlora", lambda v, m: v["qlora"].fits and _better(m),
        "QLoRA fits, and was measured to be better than LoRA here.",
    ),
    Rule(
        "qlora", lambda v, m: _plain(v["qlora"]) and _as_good_and_fast(m),
        "QLoRA fits as it is, and was measured to be as good and as fast as LoRA here; it takes less memory.",
    ),
    Rule(
        "lora", lambda v, m: v["lora"].fits and m is not None and m.quality == "worse than",
        "LoRA fits, and QLoRA was measured to be worse here.",
    ),
    Rule(
        "lora", lambda v, _: _plain(v["lora"]),
        "LoRA fits as it is. Its frozen weights are not rounded, and a QLoRA step is at best as fast.",
    ),
    Rule(
        "qlora", lambda v, _: _plain(v["qlora"]),
        "QLoRA fits as is; LoRA needs slower settings or does not fit.",
    ),
    Rule(
        "lora", lambda v, _: v["lora"].fits and not v["lora"].train.gradient_checkpointing,
        "LoRA fits with paged optimiser states, which change nothing and cost little.",
    ),
    Rule("qlora", lambda v, _: v["qlora"].fits and not v["lora"].fits, "QLoRA fits, LoRA does not."),
    Rule("lora", lambda v, _: v["lora"].fits, "LoRA fits with checkpointing, as QLoRA does; its weights are not rounded."),
)  # fmt: skip
"""In order; the first that holds decides."""

FULL_REASON = "Full fine-tuning fits too; where the task is far from what the model knows, it is worth a try."


def recommend(verdicts: dict[str, Verdict], measured: Measured | None = None) -> tuple[Method | None, list[str]]:
    """The method to take on a device, and why; None: nothing fits. `measured`: a comparison on the same model."""
    for rule in RULES:
        if rule.holds(verdicts, measured):
            told = [measured.reason] if measured is not None else []
            return rule.method, [rule.reason, *told, *[FULL_REASON] * verdicts["full"].fits]
    need = min(verdicts.values(), key=lambda verdict: verdict.over_bytes)
    return None, [f"Nothing fits. Nearest is {need.method}, {need.over_bytes / 2**30:.1f} GiB over."]
