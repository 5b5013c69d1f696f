"""`lownibble bench plan`: planned memory next to the measured memory of a training step on this machine.

Each setting runs twice, each time in a fresh process. Once with torch's profiler, which records every allocation and release of
the CPU allocator, also inside operations; allocated bytes are their running sum from before the model is loaded, and the peak is
its maximum during the first two steps. Once without the profiler, for the peak resident set size during those steps. Every row is
truncated at `max_length`, so every batch is as large as the planner assumes.

Planning time is that of the whole command, Python start-up included.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from lownibble.config import DataConfig, LoraConfig, Method, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.planning.hardware import this_machine
from lownibble.planning.memory import plan_memory
from lownibble.planning.models import find_shape


def _setting(method: Method, batch_size: int, max_length: int, r: int = 16, **train: Any) -> RunConfig:
    return RunConfig(
        method=method, lora=LoraConfig(r=r), data=DataConfig(max_eval_rows=2),
        train=TrainConfig(batch_size=batch_size, max_length=max_length, max_steps=2, torch_compile=False, **train),
    )  # fmt: skip


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


def bench_plan(*, peers: bool = False, repeats: int = 1) -> dict[str, Any]:
    """Plan and run every setting.

    Raises:
        ConfigError: `peers` or `repeats` is given; neither applies.
    """
    if peers or repeats != 1:
        raise ConfigError("'bench plan' compares a plan with a run, once each. Leave --peers and --repeats out.")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        words = "one two three four five six seven eight nine ten " * 120
        data.write_text("".join(json.dumps({"text": f"{number} {words}"}) + "\n" for number in range(64)))
        runs = [_compare(setting.with_options(data=setting.data.with_options(path=str(data)))) for setting in SETTINGS]
    errors = [abs(run["allocated_error"]) for run in runs]
    shares = [(run["process_bytes"] - run["allocated_bytes"]) / 2**20 for run in runs]
    seconds = {name: _seconds(command) for name, command in COMMANDS.items()}
    return {
        "workload": {"model": "demo", "settings": len(runs)},
        "runs": runs,
        "commands": COMMANDS,
        "seconds": seconds,
        "headlines": {
            "allocated, median error": statistics.median(errors),
            "allocated, worst error": max(errors),
            "process, runs within the interval": f"{sum(run['process_within'] for run in runs)} of {len(runs)}",
            "process less allocated, MiB, least and most": f"{min(shares):.0f} to {max(shares):.0f}",
            **{f"seconds: {name}": each for name, each in seconds.items()},
        },
    }


def _seconds(command: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lownibble.cli.main", *command.split()], check=True, capture_output=True)
    return time.perf_counter() - began


def _compare(config: RunConfig) -> dict[str, Any]:
    train = config.train
    plan = plan_memory(
        find_shape(config.model), this_machine(), config.method, quant=config.quant, lora=config.lora, train=train
    )  # fmt: skip
    allocated, process = (in_a_process(config, profiled) for profiled in (True, False))
    found = {
        "method": config.method, "batch_size": train.batch_size, "max_length": train.max_length, "r": config.lora.r,
        "gradient_checkpointing": train.gradient_checkpointing, "packing": train.packing, "optim": train.optim,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "allocated_bytes": allocated, "planned": plan.to_dict(), "allocated_error": plan.allocated.likely / allocated - 1,
        "process_bytes": process, "process_error": plan.device.likely / process - 1,
        "process_within": plan.device.low <= process <= plan.device.high,
    }  # fmt: skip
    print(
        f"bench plan: {config.method} {train.batch_size} x {train.max_length} r {config.lora.r}: allocated "
        f"{allocated / 1e9:.3f} GB, planned {found['allocated_error']:+.2%}; process {process / 1e9:.3f} GB, planned "
        f"{found['process_error']:+.2%}",
        file=sys.stderr,
    )
    return found


def in_a_process(config: RunConfig, profiled: bool) -> int:
    """Peak bytes of a run's first two steps in a fresh process: allocated (by the profiler) or the resident set size."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_allocated if profiled else _resident, config.model_dump_json()).result()


def _allocated(config: str) -> int:
    """Peak bytes allocated by torch's CPU allocator during two steps."""
    from torch.profiler import ProfilerActivity, profile, record_function

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
    from lownibble.training.run import prepare

    trainer, _ = prepare(RunConfig.model_validate_json(config))
    return trainer, trainer.set_up()


def _take_steps(trainer: Any, first: int) -> None:
    for step, rows in zip(range(first, first + 2), trainer.micro.steps(first), strict=False):
        trainer.step(step, rows)
