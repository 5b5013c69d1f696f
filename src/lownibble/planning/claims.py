"""`lownibble claims`: judge whether a claim about memory or time is possible.

A claim names a model, a method and a figure; whatever it leaves open (batch, length, rank, checkpointing, optimiser, dtype) is
swept over the usual settings, in the claim's favour. Verdicts:

impossible     breaks a hard bound: bytes of the stored weights, FLOPs of the matrix products
implausible    breaks no bound, but no usual setting of the planner gives it
consistent     some usual setting gives it
not decided    a claim about quality: only a study can decide it, and the claim names the figure to measure

Each judgement shows its arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lownibble.arch import ModelShape, all_paths
from lownibble.config import LoraConfig, Method, QuantConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.options import n_bytes, read_toml
from lownibble.planning import hardware
from lownibble.planning.memory import Interval, MemoryPlan, plan_memory
from lownibble.planning.models import find_shape
from lownibble.planning.speed import EFFICIENCY, flops_per_token, plan_speed
from lownibble.quant import layouts

ARTICLES = Path(__file__).with_name("articles.toml")
"""The claims of the two articles that this project began with."""

COMMON = {"text", "source", "kind", "study"}
"""Keys of every claim. `study`: the study figure that decides it; used by `study/claims.py`, ignored here."""
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "memory": ({"model", "method", "memory"}, {"batch_size", "max_length", "r", "target_modules", "gradient_checkpointing"}),
    "time": ({"model", "method", "gpu", "step_s"}, {"batch_size", "max_length", "r", "target_modules"}),
    "ratio": ({"model", "gpu", "lora_per_qlora"}, {"batch_size", "max_length"}),
    "fits": ({"model", "method", "gpu", "fits"}, {"batch_size", "max_length", "gpus"}),
    "saved": ({"parameters", "saved_bits", "saved_memory"}, set()),
    "quality": ({"measure"}, set()),
}  # fmt: skip
"""Kind of claim -> required and optional keys besides `COMMON`."""

_MIB = 2**20


@dataclass(frozen=True)
class Judgement:
    """A verdict on a claim, and the arithmetic behind it."""

    text: str
    source: str
    verdict: str
    arithmetic: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge_file(path: str | Path = ARTICLES) -> list[Judgement]:
    """Judge every [[claim]] of a TOML file.

    Raises:
        ConfigError: the file or a claim is invalid (names missing or unknown keys).
        ModelError: a claim is about an unknown model.
    """
    contents = read_toml(path)
    claims = contents.get("claim")
    if not isinstance(claims, list) or not claims or set(contents) != {"claim"}:
        raise ConfigError(f"'{path}' must hold tables [[claim]] and nothing else. Got {', '.join(contents) or 'nothing'}.")
    return [judge_claim(claim, f"claim {number} of '{path}'") for number, claim in enumerate(claims, 1)]


def judge_claim(claim: Mapping[str, Any], where: str = "the claim") -> Judgement:
    """Judge one claim; `where` names it in errors."""
    kind = claim.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"The 'kind' of {where} must be one of {', '.join(KINDS)}. Got {kind!r}.")
    must, may = KINDS[kind]
    missing, unknown = must - claim.keys(), claim.keys() - must - may - COMMON
    if missing or unknown:
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"has what is not known: {', '.join(sorted(unknown))}"
        raise ConfigError(f"{where[:1].upper()}{where[1:]} {what}. A '{kind}' has {', '.join(sorted(must | may))}.")
    verdict, arithmetic = _JUDGES[kind](claim)
    return Judgement(str(claim.get("text", "")), str(claim.get("source", "")), verdict, arithmetic)


class _Way(NamedTuple):
    """Discrete training options: checkpointing, optimiser, dtype."""

    gradient_checkpointing: bool
    optim: str
    dtype: str


_SIZES = ((1, 128), (16, 512))
_RANKS = (8, 64)


def _ways(claim: Mapping[str, Any], method: Method) -> Iterator[_Way]:
    """The usual discrete options that a claim leaves open, least memory first."""
    given = claim.get("gradient_checkpointing")
    for recompute in (True, False) if given is None else (given,):
        for optim in ("paged_adamw_8bit", "adamw"):
            for dtype in ("bfloat16", "float32") if method == "full" else ("bfloat16",):
                yield _Way(recompute, optim, dtype)


def _usual(claim: Mapping[str, Any], way: _Way) -> Iterator[tuple[TrainConfig, LoraConfig]]:
    """The smallest and the largest usual sizes and ranks that a claim leaves open; judged figures of settings in between lie
    between theirs."""
    for (rows, length), r in dict.fromkeys(zip(_SIZES, _RANKS, strict=True)):
        train = TrainConfig(
            batch_size=claim.get("batch_size", rows), max_length=claim.get("max_length", length),
            gradient_checkpointing=way.gradient_checkpointing, optim=way.optim,
        )  # fmt: skip
        yield train, LoraConfig(r=claim.get("r", r), target_modules=claim.get("target_modules", "all-linear"))


def _plan(claim: Mapping[str, Any], method: Method, way: _Way, train: TrainConfig, lora: LoraConfig, gpus: int = 1) -> MemoryPlan:
    """On one of so many cards, with fsdp if there are several."""
    device = hardware.device("a100-80gb")  # the same tensors on all CUDA devices
    return plan_memory(
        find_shape(claim["model"]), device, method, quant=QuantConfig(), lora=lora, train=train, dtype=way.dtype,
        parallel="fsdp" if gpus > 1 else None, ranks=gpus,
    )  # fmt: skip


def _memory(claim: Mapping[str, Any]) -> tuple[str, list[str]]:
    shape, method, claimed = find_shape(claim["model"]), claim["method"], n_bytes(claim["memory"])
    bits = 8 * claimed / shape.parameters
    weights, how = _stored(shape, method)
    lines = [
        f"{claimed / 1e9:.1f} GB are {bits:.2f} bits for each of {shape.parameters / 1e9:.2f}e9 parameters",
        f"the weights alone take {weights / 1e9:.1f} GB: {how}",
    ]
    if claimed < weights:
        return "impossible", [*lines, "less than the weights that a step reads"]
    ranges = {}
    for way in _ways(claim, method):
        usual = list(_usual(claim, way))
        plans = [_plan(claim, method, way, *each).device for each in (usual[0], usual[-1])]
        ranges[way] = plans[0].low, plans[1].high
    lines += [
        f"planned {'with' if way.gradient_checkpointing else 'without'} checkpointing, {way.optim}, {way.dtype}: "
        f"{low / 1e9:.1f} to {high / 1e9:.1f} GB"
        for way, (low, high) in ranges.items()
    ]
    return ("consistent" if any(low <= claimed <= high for low, high in ranges.values()) else "implausible"), lines


def _stored(shape: ModelShape, method: Method) -> tuple[int, str]:
    """Lower bound in bytes for the weights (with gradients for full fine-tuning), and its explanation."""
    if method != "qlora":
        gradients = shape.parameters * 2 if method == "full" else 0
        what = "16 bits each, and their gradients as much again" if gradients else "16 bits each"
        return shape.parameters * 2 + gradients, what
    shapes = [linear.shape for linear in all_paths(shape).values()]
    packed, elements = sum(layouts.n_bytes(each, QuantConfig()) for each in shapes), sum(map(math.prod, shapes))
    rest, bits = 2 * (shape.parameters - elements), 8 * packed / elements
    return packed + rest, f"linears {packed / 1e9:.1f} GB at {bits:.3f} bits, the rest {rest / 1e9:.2f} GB at 16"


def _time(claim: Mapping[str, Any]) -> tuple[str, list[str]]:
    shape, method, device = find_shape(claim["model"]), claim["method"], hardware.device(claim["gpu"])
    assert device.flops is not None
    seconds, found = float(claim["step_s"]), []
    for way, train, lora in ((one, *each) for one in _ways(claim, method) for each in _usual(claim, one)):
        memory = _plan(claim, method, way, train, lora)
        flops = train.batch_size * train.max_length * flops_per_token(shape, method, memory.adapters_per_token, train)
        found.append((flops / seconds / device.flops, memory.device.low / device.memory_bytes, train))
    share, _, train = min(found, key=lambda each: each[0])
    most = max(each[0] for each in found)
    lines = [
        f"{train.batch_size} x {train.max_length} tokens in {seconds:g} s are {share:.0%} to {most:.0%} of the peak of "
        f"{device.title}, {device.flops / 1e12:g} TFLOP/s, by what is recomputed"
    ]
    if share > 1:
        return "impossible", [*lines, "more operations than the device can do"]
    least = min(each[1] for each in found)
    if least > 1:
        return "impossible", [*lines, f"and the step takes {least:.2f} of the device's memory at the least"]
    return ("consistent" if share <= EFFICIENCY[-1] else "implausible"), [
        *lines,
        f"published runs reach {EFFICIENCY[0]:.0%} to {EFFICIENCY[-1]:.0%}",
    ]


def _ratio(claim: Mapping[str, Any]) -> tuple[str, list[str]]:
    shape, device, found = find_shape(claim["model"]), hardware.device(claim["gpu"]), []
    methods: tuple[Method, Method] = ("qlora", "lora")
    for way in _ways(claim, "lora"):
        for train, lora in _usual(claim, way):
            speeds = [plan_speed(shape, device, method, train, _plan(claim, method, way, train, lora)) for method in methods]
            qlora, plain = (speed.step_s.likely for speed in speeds if speed is not None)
            found.append(qlora / plain)
    low, high, claimed = min(found), max(found), float(claim["lora_per_qlora"])
    lines = [
        f"LoRA is said to be {claimed:.2f} times as fast; both do the same products, QLoRA decodes its weights besides",
        f"planned: {low:.2f} to {high:.2f} times on {device.title}; the best published like for like is 1.02",
    ]
    return ("consistent" if low * 0.95 <= claimed <= high * 1.05 else "implausible"), lines


NUMBERS = (1, 2, 4, 8, 16)
"""Of cards, that a judgement looks for the smallest one in that suffices."""


def _fits(claim: Mapping[str, Any]) -> tuple[str, list[str]]:
    shape, device, method, gpus = find_shape(claim["model"]), hardware.device(claim["gpu"]), claim["method"], claim.get("gpus", 1)
    if not isinstance(gpus, int) or gpus < 1:
        raise ConfigError(f"The 'gpus' of a claim must be an integer >= 1. Got {gpus!r}.")
    way = next(_ways({"gradient_checkpointing": True}, method))

    def least(number: int) -> Interval:
        return _plan(claim, method, way, *next(_usual(claim, way)), gpus=number).on(device).device

    need, (weights, how) = least(gpus), _stored(shape, method)
    each = f" on each of {gpus}" if gpus > 1 else ""
    lines = [
        f"{device.title} has {device.memory_bytes / 2**30:.1f} GiB; with all that saves memory the smallest step takes "
        f"{need.low / 2**30:.1f} to {need.high / 2**30:.1f}{each}",
        f"the weights alone take {weights / 2**30:.1f} GiB: {how}",
    ]
    fits = need.high <= device.memory_bytes
    if not fits:
        enough = next((number for number in NUMBERS if number > gpus and least(number).high <= device.memory_bytes), None)
        lines.append(f"it fits on {enough} of them, each with a part (fsdp)" if enough else f"nor on up to {NUMBERS[-1]} of them")
    if claim["fits"] and weights > gpus * device.memory_bytes:
        return "impossible", lines
    return ("consistent" if fits == claim["fits"] else "implausible"), lines


def _saved(claim: Mapping[str, Any]) -> tuple[str, list[str]]:
    n, quant = int(claim["parameters"]), QuantConfig()
    plain = layouts.n_bytes((n,), quant.with_options(double_quant=False))
    bits = 8 * (plain - layouts.n_bytes((n,), quant)) / n
    memory = n * bits / 8
    claimed = n_bytes(claim["saved_memory"])
    lines = [
        "a block of 64 weights has a constant of 32 bits, 0.5 bits a weight; doubly quantised of 8 bits, and of 32 for 256 "
        f"blocks: {0.5 - bits:.3f}",
        f"saved: {bits:.3f} bits, for {n / 1e9:g}e9 weights {memory / 1e6:.0f} MB ({memory / _MIB:.0f} MiB); claimed "
        f"{claim['saved_bits']} bits, {claimed / 1e6:.0f} MB",
    ]
    near = abs(float(claim["saved_bits"]) - bits) <= 0.05 and abs(claimed - memory) <= 0.1 * memory
    return ("consistent" if near else "implausible"), lines


def _quality(claim: Mapping[str, Any]) -> tuple[str, list[str]]:
    return "not decided", [f"memory and time say nothing about it; to be measured: {claim['measure']}"]


_JUDGES: dict[str, Callable[[Mapping[str, Any]], tuple[str, list[str]]]] = {
    "memory": _memory, "time": _time, "ratio": _ratio, "fits": _fits, "saved": _saved, "quality": _quality,
}  # fmt: skip
