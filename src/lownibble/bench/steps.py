"""The child side of the training benchmark, the same for every contender: load, first step, then turns of fixed training steps.

All contenders do the same work: same weights, batches, rank, targets, optimiser, learning rate and gradient clipping; loss on
every token. They run in bfloat16 on CUDA if available, else in float32 on the CPU. The time of a step ends when its loss is read,
which waits for the device.

Memory: on a CPU the peak of the process above what it used before the model was loaded, loading and compiling included. On CUDA
the allocator's peaks (allocated and reserved) after the first step, so that nobody's compilation counts; CUDA graphs are captured
in the third.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LEARNING_RATE, CLIP, R, ALPHA = 2e-4, 1.0, 16, 32
COUNT = 16
"""Batches of random token ids; steps go round."""

_LAUNCH = re.compile(r"cu(da)?(Launch\w*Kernel\w*|GraphLaunch)")
"""Calls of the CUDA runtime and driver that launch a kernel, or a whole graph."""
NAME = 120
"""Characters of a kernel's name that are recorded; those of templates are long."""


class Built(NamedTuple):
    """A contender: `step(n)` takes its nth optimiser step and returns the loss, having waited for the device. `facts` are asked
    for after the first step."""

    step: Callable[[int], float]
    model: nn.Module
    facts: Callable[[], dict[str, Any]] = dict


Build = Callable[[str, Tensor], Built]
"""(model folder, (N, B, T) token ids on the CPU) -> the contender."""


def ids_of(model: str, batch_size: int, length: int) -> Tensor:
    """(N, B, T) token ids for a model folder: random ones for random weights, else the demo's training sentences."""
    from pathlib import Path

    from lownibble.arch import read_config, read_shape
    from lownibble.bench.subject import RANDOM, random_ids
    from lownibble.config import DataConfig
    from lownibble.data import load
    from lownibble.models import load_tokenizer, resolve

    config = read_config(Path(model))
    if RANDOM in config:
        return random_ids(read_shape(config).vocab, COUNT, batch_size, length)
    train, _ = load(DataConfig(max_rows=2000))
    ids = torch.tensor(load_tokenizer(resolve(model))("\n".join(str(row.fields["text"]) for row in train.rows))["input_ids"])
    ids = ids.repeat(-(-batch_size * length // len(ids)))
    count = len(ids) // (batch_size * length)
    return ids[: count * batch_size * length].view(count, batch_size, length)


def launches(averages: Iterable[Any]) -> int:
    """Kernel launches in a profile's `key_averages()`."""
    return sum(each.count for each in averages if _LAUNCH.fullmatch(each.key))


def kernels(averages: Iterable[Any], count: int = 40) -> dict[str, Any]:
    """From a profile's `key_averages()`: milliseconds that the device worked, and its `count` kernels that took longest."""
    from torch._C._autograd import DeviceType

    found = [each for each in averages if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    found.sort(key=lambda each: -each.self_device_time_total)
    longest = [
        {"name": each.key[:NAME], "calls": each.count, "ms": round(each.self_device_time_total / 1e3, 3)}
        for each in found[:count]
    ]
    return {"device_ms": sum(each.self_device_time_total for each in found) / 1e3, "kernels": longest}


def _profiled(step: Callable[[], object]) -> dict[str, Any]:
    """Kernel launches of a step on CUDA, and what its kernels took."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    return {"launches_per_step": launches(averages), **kernels(averages)}


def take_turns(build: Build, model: str, batch_size: int, length: int, out: Any) -> None:
    """Build a contender, take its first step (on CUDA three more, of which the last is profiled), then answer turns.

    Args:
        model: the model's folder. out: where answers go (`reserved_stdout`).
    """
    from lownibble.measuring.turns import answer_turns
    from lownibble.memory import usage
    from lownibble.models import pick_device

    device, ids_NBT = pick_device(), ids_of(model, batch_size, length)
    cuda = device.type == "cuda"
    usage.reset_peak(device)
    baseline = usage.used_bytes(device)
    torch.manual_seed(0)
    began = time.perf_counter()
    built = build(model, ids_NBT)
    if cuda:
        torch.cuda.synchronize()
    facts: dict[str, Any] = {"load_s": time.perf_counter() - began, "load_peak_bytes": usage.peak_bytes(device) - baseline}
    if cuda:
        usage.settle(device)
    began = time.perf_counter()
    losses = [built.step(0)]
    facts["first_step_s"] = time.perf_counter() - began
    if cuda:
        usage.reset_peak(device)
        losses.extend(built.step(number) for number in (1, 2))
        facts |= _profiled(lambda: losses.append(built.step(3)))
    else:
        facts["launches_per_step"] = None
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    facts |= {"trainable_parameters": trained, **built.facts()}
    taken = len(losses)

    def do(steps: int) -> dict[str, Any]:
        nonlocal taken
        began = time.perf_counter()
        losses.extend([built.step(taken + number) for number in range(steps)])
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        taken += steps
        answer = {
            "tokens": steps * batch_size * length,
            "seconds": seconds,
            "losses": losses.copy(),
            "peak_bytes": (usage.peak_bytes(device) if cuda else usage.highest_bytes(device)) - baseline,
            "reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
        }
        losses.clear()
        return answer

    answer_turns(facts, do, out)
