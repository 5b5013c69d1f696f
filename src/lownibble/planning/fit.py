"""What fits: methods x devices, the largest batch and row, and the recommended method.

Memory is saved by the same settings and in the same order as by a run's memory budget (`memory/budget.py`): paged optimiser
states cost little and do not change results, checkpointing computes the layers twice, offloaded checkpoints take as many bytes of
host memory. A setting fits if the upper end of the
device's interval does, so that the verdict is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lownibble.config import CHECKPOINTING, Checkpointing, Method, Parallel, TrainConfig
from lownibble.optim.specs import is_paged, paged_name
from lownibble.planning.hardware import Device
from lownibble.planning.memory import MemoryPlan
from lownibble.planning.records import Measured

PlanOf = Callable[[Method, TrainConfig], MemoryPlan]
"""(method, training options) -> memory plan, on one device."""


PRECISION = 100
"""The search for the largest batch or row stops at a relative precision of 1 / PRECISION."""


class Relief(NamedTuple):
    """Memory-saving options applied so that a run fits, and the verdict's words for them."""

    words: str
    paged: bool
    gradient_checkpointing: Checkpointing


RELIEFS = (
    Relief("fits", False, False), Relief("fits with paging", True, False), Relief("fits with checkpointing", False, True),
    Relief("fits with checkpointing and paging", True, True), Relief("fits with offloaded checkpoints", False, "offload"),
    Relief("fits with offloaded checkpoints and paging", True, "offload"),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Whether a method fits on a device.

    Attributes:
        fits: whether it fits, with the options in `words`. over_bytes: the smallest excess over device memory; 0 if it fits.
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


def reliefs(train: TrainConfig, offloads: bool = False) -> Iterator[tuple[Relief, TrainConfig]]:
    """The given options, then those with more memory saving, cheapest first. `offloads`: checkpoints can be offloaded."""
    paged, checkpointing = is_paged(train.optim), train.gradient_checkpointing
    allowed = CHECKPOINTING if offloads or checkpointing == "offload" else CHECKPOINTING[:-1]
    allowed = allowed[allowed.index(checkpointing) :]
    for relief in RELIEFS:
        if relief.paged < paged or relief.gradient_checkpointing not in allowed:
            continue
        if train.fsdp_cpu_offload and (relief.paged or relief.gradient_checkpointing == "offload"):
            continue  # as `TrainConfig` refuses
        optim = train.optim if relief.paged == paged else paged_name(train.optim)
        if optim is None:
            continue  # a registered optimiser without a paged variant
        yield relief, train.with_options(optim=optim, gradient_checkpointing=relief.gradient_checkpointing)


def judge(method: Method, device: Device, train: TrainConfig, plan_of: PlanOf, offloads: bool = False) -> Verdict:
    """Whether a method fits on a device, and with which options; the cheapest that fit, else the nearest. See `reliefs`."""
    nearest: Verdict | None = None
    for relief, options in reliefs(train, offloads):
        memory = plan_of(method, options)
        over = memory.device.high - device.memory_bytes
        if over <= 0:
            return Verdict(method, device, True, relief.words, 0, options, memory)
        if nearest is None or over < nearest.over_bytes:
            nearest = Verdict(method, device, False, f"no: {over / 2**30:.1f} GiB over", over, options, memory)
    assert nearest is not None
    return nearest


def fits_as_given(verdict: Verdict, train: TrainConfig) -> bool:
    """Whether it fits with the options that were given, without more memory saving."""
    saving = verdict.train.optim, verdict.train.gradient_checkpointing
    return verdict.fits and saving == (train.optim, train.gradient_checkpointing)


def chosen(verdicts: Mapping[Parallel, Verdict], train: TrainConfig) -> Parallel:
    """What 'auto' is on several GPUs: ddp where the whole model fits one of them as it is, else fsdp if that can be planned."""
    return "ddp" if "fsdp" not in verdicts or ("ddp" in verdicts and fits_as_given(verdicts["ddp"], train)) else "fsdp"


def largest(least: int, most: int, limit: int, need: Callable[[int], int]) -> int:
    """The largest value from `least` to `most` (raised to `least`) whose need is within the limit, to 1%; 0 if none is.

    Memory grows almost linearly with batch and length, so the next value tried is where the line through the last two meets the
    limit (secant search).
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
            break  # the line through two fitting values leaves no larger one
    return fits


class Rule(NamedTuple):
    """A recommendation rule: the method and reason to give if `holds` is true."""

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
"""Measured QLoRA / LoRA ratio of tokens/s from which QLoRA is preferred for its smaller memory."""

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
"""Checked in order; the first that holds decides."""

FULL_REASON = "Full fine-tuning fits too; where the task is far from what the model knows, it is worth a try."


def recommend(verdicts: dict[str, Verdict], measured: Measured | None = None) -> tuple[Method | None, list[str]]:
    """The recommended method on a device (None: nothing fits), and why. `measured`: a comparison on the same model."""
    for rule in RULES:
        if rule.holds(verdicts, measured):
            told = [measured.reason] if measured is not None else []
            return rule.method, [rule.reason, *told, *[FULL_REASON] * verdicts["full"].fits]
    need = min(verdicts.values(), key=lambda verdict: verdict.over_bytes)
    return None, [f"Nothing fits. Nearest is {need.method}, {need.over_bytes / 2**30:.1f} GiB over."]
