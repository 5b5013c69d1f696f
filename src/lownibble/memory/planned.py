"""The planned memory of a run, compared with the measured peak."""

from __future__ import annotations

from itertools import islice
from typing import Any, Protocol

import torch

from lownibble import launch
from lownibble.arch import all_paths, read_shape
from lownibble.config import LoraConfig, Method, QuantConfig, TrainConfig
from lownibble.errors import ConfigError, InputError
from lownibble.lora.active import active_adapter, adapter_configs
from lownibble.lora.layer import LoraLinear
from lownibble.lora.merge_aware import MergeAware
from lownibble.memory.budget import Fit
from lownibble.models.packed import config_of
from lownibble.optim import paged_name, plain_name
from lownibble.planning import hardware
from lownibble.planning.hardware import Device
from lownibble.planning.memory import MemoryPlan, plan_memory
from lownibble.planning.step import Batch
from lownibble.quant import QuantLinear

STEPS = 10_000
"""Number of steps that are searched for the largest microbatch."""


class TrainingRun(Protocol):
    """The trainer attributes used here (`training/loop.py`)."""

    model: Any
    config: TrainConfig
    micro: Any
    passes: Any
    device: torch.device
    total_steps: int
    ranks: Any

    @property
    def fit(self) -> Fit:
        """The memory fit that is in effect."""


class RunPlan:
    """Memory plan of a run, cached per fit to the memory budget."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._made: dict[tuple[Any, ...], tuple[Batch, MemoryPlan] | InputError] = {}

    def _plan(self) -> tuple[Batch, MemoryPlan] | InputError:
        fit = self._run.fit
        key = fit.max_tokens, fit.paged, fit.gradient_checkpointing, self._run.passes.compiled, self._run.micro.shares
        if key not in self._made:
            try:
                self._made[key] = plan_of(self._run)
            except InputError as error:
                self._made[key] = error
        return self._made[key]

    def beside_measured(self, peak_bytes: int) -> dict[str, Any]:
        """For the record: the plan of the run's largest microbatch, and its relative error against the measured peak.

        Compares the resident set size on a CPU, allocated bytes on CUDA. On a CPU the plan is of layers that are not compiled;
        compiled ones save fewer activations. If the planner does not know the model or an option, returns only `unknown`, the
        reason.
        """
        run, found = self._run, self._plan()
        if isinstance(found, InputError):
            return {"unknown": str(found)}
        batch, plan = found
        figure = plan.device if run.device.type == "cpu" else plan.allocated
        return {
            "batch": batch._asdict(), "plan": plan.to_dict(), "compiled": run.passes.compiled,
            "figure": "process" if run.device.type == "cpu" else "allocated", "planned_bytes": figure._asdict(),
            "measured_bytes": peak_bytes, "error": figure.likely / peak_bytes - 1,
            "within": figure.low <= peak_bytes <= figure.high,
        }  # fmt: skip

    def warnings(self) -> list[str]:
        """Warning that the planned memory exceeds the device's; none if a memory budget is set or there is no plan."""
        found = self._plan()
        if isinstance(found, InputError):
            return []
        needed, there = found[1].device, device_of(self._run.device).memory_bytes
        there //= launch.sharing(self._run.device.type)
        if self._run.config.memory_budget or needed.likely <= there:
            return []
        return [
            f"by the plan this run takes {needed.likely / 1e9:.1f} GB ({needed.low / 1e9:.1f} to {needed.high / 1e9:.1f}), and "
            f"there are {there / 1e9:.1f} GB; --memory-budget gives up what it must to stay within"
        ]


def plan_of(run: TrainingRun) -> tuple[Batch, MemoryPlan]:
    """Return the largest microbatch of the run as set up now, and the memory plan of a step with it.

    Raises:
        ModelError, ConfigError, TargetError: the planner does not know the model or an option.
    """
    model, train, fit = run.model, run.config, run.fit
    shape, adapters, active = read_shape(model.config.to_dict()), adapter_configs(model), active_adapter(model)
    packed = {path.removesuffix(".base"): m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    method: Method = "full" if not adapters else "qlora" if packed else "lora"
    quant = QuantConfig()
    if "lm_head" in packed:
        raise ConfigError("The planner does not know a quantised head. Leave 'lm_head' in skip_modules to plan the run.")
    if packed:
        dense = ["lm_head", *(path for path in all_paths(shape) if path not in packed)]
        quant = config_of({path: module.weight for path, module in packed.items()}, dense)
    options = train.with_options(
        optim=(paged_name(train.optim) if fit.paged else None) or plain_name(train.optim),
        gradient_checkpointing=fit.gradient_checkpointing
    )  # fmt: skip
    steps = islice(run.micro.steps(), min(STEPS, run.total_steps))
    largest = max((rows for step in steps for rows in run.micro.dealt(step)), key=run.micro.tokens, default=None)
    if largest is None:
        raise ConfigError("This rank has no rows in the first steps, so there is nothing to plan.")
    batch = run.micro.shape(largest)
    device = device_of(run.device)
    return batch, plan_memory(
        shape, device, method, quant=quant,
        lora=LoraConfig() if active is None else adapters[active], train=options, dtype=str(model.dtype).removeprefix("torch."),
        batch=batch, rounded=_rounded(model), compiled=run.passes.compiled and device.kind == "cuda",
        parallel=run.ranks.mode if run.ranks.several else None, ranks=run.ranks.world,
    )  # fmt: skip


def _rounded(model: Any) -> dict[str, QuantConfig]:
    """Path -> codec that a merge-aware layer computes in."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear) and module.active is not None:
            variant = module.adapter(module.active).variant
            if isinstance(variant, MergeAware):
                found[path] = variant.leaves
    return found


def device_of(device: torch.device) -> Device:
    """The planner's `Device` for a torch device."""
    if device.type == "cpu":
        return hardware.this_machine()
    return Device(
        torch.cuda.get_device_name(device), "this GPU", "cuda", memory_bytes=torch.cuda.get_device_properties(device).total_memory
    )
