"""`lownibble bench plan`: planned memory next to the measured memory of a training step on this machine.

On a CPU each setting runs twice, each time in a fresh process. Once with torch's profiler, which records every allocation and
release of the CPU allocator, also inside operations; allocated bytes are their running sum from before the model is loaded, and
the peak is its maximum during the first two steps. Once without the profiler, for the peak resident set size during those
steps. On CUDA one process gives both figures, the allocator's peaks of allocated and reserved bytes during the first four
steps, of which the third captures its pass as a CUDA graph. Every row is truncated at `max_length`, so every batch is as large
as the planner assumes.

The embedded model has many settings on a CPU; any other model there, one for LoRA and one for QLoRA. Plans for a CPU are of
layers that are not compiled, and so are these runs. CUDA has three settings: QLoRA and LoRA as in a long run with default
flags, which compiles, and QLoRA not compiled. Planning time is that of the whole command, Python start-up included, and is
measured with the many settings.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

from lownibble.bench.processes import Save
from lownibble.bench.subject import subject
from lownibble.config import DataConfig, LoraConfig, Method, RunConfig, TrainConfig
from lownibble.errors import ConfigError, LownibbleError, TrainingError
from lownibble.memory.planned import device_of
from lownibble.models import pick_device
from lownibble.planning.memory import compiles, plan_memory
from lownibble.planning.models import find_shape

_T = TypeVar("_T")


LONG = 10_000
"""Optimiser steps of a run with compiled layers, of which the first few are taken."""


def _setting(
    method: Method, batch_size: int, max_length: int, r: int = 16, *, max_steps: int = 2,
    torch_compile: bool | Literal["auto"] = False, **train: Any,
) -> RunConfig:  # fmt: skip
    sizes = {"batch_size": batch_size, "max_length": max_length, "max_steps": max_steps}
    return RunConfig(
        method=method, lora=LoraConfig(r=r), data=DataConfig(max_eval_rows=2),
        train=TrainConfig(**sizes, torch_compile=torch_compile, **train),
    )  # fmt: skip


def _on_a_card(size: tuple[int, int]) -> list[RunConfig]:
    long: dict[str, Any] = {"max_steps": LONG, "torch_compile": "auto"}
    return [_setting("qlora", *size, **long), _setting("lora", *size, **long), _setting("qlora", *size)]


SETTINGS = (
    *(_setting(method, *size) for method in ("full", "lora", "qlora") for size in ((1, 128), (2, 256), (4, 256), (1, 512))),
    *(_setting(method, 4, 256, gradient_checkpointing=True) for method in ("full", "lora", "qlora")),
    *(_setting(method, 2, 512, gradient_checkpointing=True) for method in ("lora", "qlora")),
    _setting("lora", 2, 256, r=64), _setting("qlora", 2, 256, r=4), _setting("qlora", 2, 256, r=128),
    _setting("qlora", 2, 256, gradient_accumulation_steps=2), _setting("full", 1, 256, gradient_accumulation_steps=2),
    _setting("full", 1, 128, optim="adamw_8bit"), _setting("full", 1, 128, optim="paged_adamw"),
    _setting("qlora", 2, 256, packing=True),
)  # fmt: skip


COMMANDS = {
    "7B on one GPU: all methods, with the largest batch and row": "plan llama-2-7b --gpu rtx-4090 --batch-size 1",
    "7B on all GPUs": "plan llama-2-7b --batch-size 1",
    "65B QLoRA": "plan llama-65b --gpu h200 --method qlora --batch-size 1 --max-length 512",
    "65B QLoRA, traced": "plan llama-65b --gpu h200 --method qlora --batch-size 1 --max-length 512 --exact",
}
"""Label -> timed command. On an H200 the first setting fits, so one step is traced."""


def bench_plan(
    *, peers: bool = False, repeats: int = 1, model: str = "demo", batch_size: int | None = None, length: int | None = None,
    save: Save = lambda record: None,
) -> dict[str, Any]:  # fmt: skip
    """Plan and run every setting.

    Args:
        model: what to train; see `subject.py`.
        batch_size, length: rows and tokens per row of the settings for one model (default 4 x 1024 on CUDA, 4 x 256 on a CPU).
        save: called with the record so far, after each setting.
    Raises:
        ConfigError: `peers` or `repeats` is given; neither applies. Or a size is given for the many settings.
        ModelError, ConfigError: the model cannot be measured.
        TrainingError: no setting could be run. On CUDA one that cannot is in `failed`.
    """
    if peers or repeats != 1:
        raise ConfigError("'bench plan' compares a plan with a run, once each. Leave --peers and --repeats out.")
    cuda = pick_device().type == "cuda"
    many = model == "demo" and not cuda
    if many and (batch_size or length):
        raise ConfigError("'bench plan' has many settings for the embedded model. Leave --batch-size and --max-length out.")
    size = batch_size or 4, length or (1024 if cuda else 256)
    one_model = _on_a_card(size) if cuda else [_setting(method, *size) for method in ("lora", "qlora")]
    settings = SETTINGS if many else one_model
    runs: list[dict[str, Any]] = []
    failed: list[str] = []
    seconds: dict[str, float] = {}
    with subject(model) as found, tempfile.TemporaryDirectory() as folder:
        workload = {"model": found.name, "random_weights": found.random, "settings": len(settings)}
        data = Path(folder) / "rows.jsonl"
        words = "one two three four five six seven eight nine ten " * (1 + max(each.train.max_length for each in settings) // 10)
        data.write_text("".join(json.dumps({"text": f"{number} {words}"}) + "\n" for number in range(64)))
        for setting in settings:
            options = {} if many else {"model": str(found.folder)}
            try:
                runs.append(_compare(setting.with_options(data=setting.data.with_options(path=str(data)), **options)))
            except (RuntimeError, LownibbleError) as error:  # BrokenProcessPool is the first
                if not cuda:
                    raise
                failed.append(f"{setting.method}: {type(error).__name__}: {error}")
                print(f"bench plan: {failed[-1]}", file=sys.stderr)
            if runs:
                save({"workload": workload, "runs": runs, "failed": failed, "headlines": _headlines(runs)})
    if not runs:
        raise TrainingError(f"No setting could be run. {' '.join(failed)}")
    if many:
        seconds = {name: _seconds(command) for name, command in COMMANDS.items()}
    timed = {f"seconds: {name}": each for name, each in seconds.items()}
    plans = {"commands": COMMANDS, "seconds": seconds} if many else {}
    return {"workload": workload, "runs": runs, "failed": failed, **plans, "headlines": {**_headlines(runs), **timed}}


def _headlines(runs: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [abs(run["allocated_error"]) for run in runs]
    found: dict[str, Any] = {"allocated, median error": statistics.median(errors), "allocated, worst error": max(errors)}
    if "reserved_bytes" in runs[0]:
        return {**found, "reserved, worst error": max(abs(run["reserved_error"]) for run in runs)}
    shares = [(run["process_bytes"] - run["allocated_bytes"]) / 2**20 for run in runs]
    return {
        **found,
        "process, runs within the interval": f"{sum(run['process_within'] for run in runs)} of {len(runs)}",
        "process less allocated, MiB, least and most": f"{min(shares):.0f} to {max(shares):.0f}",
    }


def _seconds(command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lownibble.cli.main", *command.split()], check=True, capture_output=True)
    return time.perf_counter() - began


def _compare(config: RunConfig) -> dict[str, Any]:
    train, device, shape = config.train, pick_device(), find_shape(config.model)
    plan = plan_memory(
        shape, device_of(device), config.method, quant=config.quant, lora=config.lora, train=train,
        compiled=compiles(shape, device_of(device), train, tokens=_tokens(train)),
    )  # fmt: skip
    found: dict[str, Any] = {
        "method": config.method, "batch_size": train.batch_size, "max_length": train.max_length, "r": config.lora.r,
        "gradient_checkpointing": train.gradient_checkpointing, "packing": train.packing, "optim": train.optim,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
    }  # fmt: skip
    if device.type == "cuda":
        assert plan.reserved is not None
        allocated, beside, found["compiled"] = in_a_process(config, _on_cuda)
        name, planned = "reserved", plan.reserved
    else:
        allocated, beside = in_a_process(config, peak_allocated), in_a_process(config, _resident)
        name, planned = "process", plan.device
    found |= {
        "allocated_bytes": allocated, "planned": plan.to_dict(), "allocated_error": plan.allocated.likely / allocated - 1,
        f"{name}_bytes": beside, f"{name}_error": planned.likely / beside - 1,
        f"{name}_within": planned.low <= beside <= planned.high,
    }  # fmt: skip
    print(
        f"bench plan: {config.method} {train.batch_size} x {train.max_length} r {config.lora.r}"
        f"{', compiled' if found.get('compiled') else ''}: allocated "
        f"{allocated / 1e9:.3f} GB, planned {found['allocated_error']:+.2%}; {name} {beside / 1e9:.3f} GB, planned "
        f"{found[f'{name}_error']:+.2%}",
        file=sys.stderr,
    )
    return found


def _tokens(train: TrainConfig) -> int:
    """Tokens of the whole run."""
    return (train.max_steps or 0) * train.batch_size * train.max_length * train.gradient_accumulation_steps


def in_a_process(config: RunConfig, measure: Callable[[str], _T]) -> _T:
    """`measure` (a function of this module) of a run's configuration in JSON, in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, config.model_dump_json()).result()


def _on_cuda(config: str) -> tuple[int, int, bool]:
    """Peak bytes allocated and reserved by torch's CUDA allocator during four steps, and whether their layers are compiled."""
    import torch

    from lownibble.memory import usage

    trainer, first = _ready(config)
    usage.settle(trainer.device)
    usage.reset_peak(trainer.device)
    _take_steps(trainer, first, 4)
    peaks = torch.cuda.max_memory_allocated(trainer.device), torch.cuda.max_memory_reserved(trainer.device)
    return *peaks, trainer.passes.compiled


def peak_allocated(config: str) -> int:
    """Peak bytes allocated by torch's CPU allocator during two steps."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU]):
        pass  # the profiler crashed once in its slow first start, on a loaded machine
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer, first = _ready(config)
        with record_function("lownibble steps"):
            _take_steps(trainer, first)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    began = next(event.start_ns() for event in events if event.name() == "lownibble steps")
    used = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        used += event.nbytes()
        if event.start_ns() >= began:
            peak = max(peak, used)
    return peak


def _resident(config: str) -> int:
    """Peak resident set size of this process in bytes during two steps."""
    from lownibble.memory import usage

    trainer, first = _ready(config)
    usage.settle(trainer.device)
    usage.reset_peak(trainer.device)
    _take_steps(trainer, first)
    return usage.peak_bytes(trainer.device)


def _ready(config: str) -> tuple[Any, int]:
    from lownibble.training.making import prepare

    trainer, _ = prepare(RunConfig.model_validate_json(config))
    return trainer, trainer.set_up()


def _take_steps(trainer: Any, first: int, count: int = 2) -> None:
    for step, rows in zip(range(first, first + count), trainer.micro.steps(first), strict=False):
        trainer.step(step, rows)
