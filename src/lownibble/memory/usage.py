"""Measure memory: peak of the process or the device allocator, and live bytes by kind.

On a CPU the figure is the resident set size; its peak is kept by the kernel (VmHWM, reset through /proc/self/clear_refs), or is
`ru_maxrss`, which cannot be reset, if there is no /proc. On CUDA it is the allocator's peak. Peaks are reported above the
baseline taken after imports, so that methods can be compared.
"""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lownibble.errors import TrainingError
from lownibble.lora import LowRank
from lownibble.lora.merge_aware import MergeAware
from lownibble.models.info import info
from lownibble.optim import state_bytes, states
from lownibble.quant import QuantLinear

_T = TypeVar("_T")
_EXHAUSTED = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "CUDA error: out of memory")
"""In messages; the last is of pinned host memory."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def used_bytes(device: torch.device) -> int:
    """Bytes in use now: allocated on CUDA, resident set size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """Peak bytes in use since `reset_peak` (since process start if the peak cannot be reset)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def held_peak_bytes(device: torch.device) -> int:
    """Like `peak_bytes`, but on CUDA the bytes reserved by the allocator, which are not available on the device."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_bytes(device)


_highest: dict[torch.device, int] = {}


def highest_bytes(device: torch.device) -> int:
    """Peak bytes held since process start, regardless of `reset_peak`."""
    return max(_highest.get(device, 0), held_peak_bytes(device))


def settle(device: torch.device) -> None:
    """Release free but held memory: Python's reference cycles, the C heap's free pages, the device allocator's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def trim_heap() -> None:
    """Return free pages of the C heap to the system, if the C library supports it (glibc).

    A training step fragments the heap: glibc cannot reuse a freed tensor's block for an aligned one of the same size, so free
    memory grows from microbatch to microbatch.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""mallopt parameters (malloc.h): free bytes at the heap's end above which it shrinks; block size above which mmap is used."""


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep freed C heap memory in the process inside the block, if the C library supports it (glibc). Only for our own processes:
    it sets C library limits, which cannot be read back, so the Python calls (`lownibble.train`) do not use it.

    A step frees memory that the next step needs again; returned to the system in between, it costs a page fault per page. Blocks
    above 32 MiB are returned anyway (mmap). On exit, free memory is returned, and the limits become those that glibc's dynamic
    threshold reaches when large blocks are freed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        yield
        return
    mallopt(_MMAP_THRESHOLD, 32 << 20)
    mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(_TRIM_THRESHOLD, 64 << 20)
        trim_heap()


def is_exhausted(error: BaseException) -> bool:
    """Whether an error means out of memory; torch has an exception type for it on CUDA only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in _EXHAUSTED)
    )


def retry_on_oom(step: Callable[[], _T], shrink: Callable[[], None]) -> _T:
    """Return `step()`; whenever it runs out of memory, call `shrink` (after the failed step's memory is freed) and retry."""
    while True:
        try:
            return step()
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
        shrink()


@contextmanager
def oom_becomes_error(message: Callable[[], str]) -> Iterator[None]:
    """Context manager that turns out of memory into a `TrainingError` with a clear message.

    Raises:
        TrainingError: the block ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_exhausted(error):
            raise
        raise TrainingError(message()) from error


def reset_peak(device: torch.device) -> None:
    """Reset the peak to the bytes in use now, if the system allows it."""
    _highest[device] = highest_bytes(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_by_kind(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Live bytes by kind: dense weights, codes of packed weights, quantisation constants, adapters, gradients, resident optimiser
    states.

    Each parameter is counted once, tied ones too.
    """
    kinds = dict.fromkeys(("weights", "codes", "constants", "adapters", "gradients", "optimizer"), 0)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kinds[kind_of(module, name)] += local(parameter).nbytes
            if parameter.grad is not None:
                kinds["gradients"] += local(parameter.grad).nbytes
    for name, tensor in _rounded(model):
        kinds[name] += tensor.nbytes
    if optimizer is not None:
        kinds["optimizer"] = state_bytes(optimizer).resident
    return kinds


def _rounded(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(kind, tensor) of the packed weights that merge-aware layers compute with, which are not parameters."""
    for module in model.modules():
        variant = module.variant if isinstance(module, LowRank) else None
        if isinstance(variant, MergeAware) and variant.packed is not None:
            codes, *constants = variant.packed.tensors().values()
            yield "codes", codes
            yield from (("constants", each) for each in constants)


def ledger(
    model: Any, optimizer: torch.optim.Optimizer | None, stepped: Mapping[nn.Parameter, nn.Parameter] = MappingProxyType({})
) -> dict[str, Any]:
    """Tensors by kind and dtype (optimiser states paged out or not), and weights held in a wider dtype than the checkpoint's.

    Returns:
        `tensors`: [{kind, dtype, tensors, bytes}]; `upcasts`: [{kind, from, to, tensors, bytes}], bytes in the current dtype.
    """
    stored = info(model).stored_dtypes
    found: dict[tuple[str, ...], list[int]] = {}
    raised: dict[tuple[str, ...], list[int]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind, dtype = kind_of(module, name), str(parameter.dtype).removeprefix("torch.")
            _add(found, (kind, dtype), local(parameter).nbytes)
            before = stored.get(f"{path}.{name}".lstrip(".").replace(".base.", "."))
            if before and kind == "weights" and parameter.itemsize > getattr(torch, before).itemsize:
                _add(raised, (kind, before, dtype), local(parameter).nbytes)
            if parameter.grad is not None:
                _add(found, ("gradients", str(parameter.grad.dtype).removeprefix("torch.")), local(parameter.grad).nbytes)
            owner = stepped.get(parameter, parameter)
            for of_state, shape in states.shapes(optimizer, owner).values() if optimizer and parameter.requires_grad else ():
                _add(found, ("optimizer", str(of_state).removeprefix("torch.")), math.prod(shape) * of_state.itemsize)
    for kind, tensor in _rounded(model):
        _add(found, (kind, str(tensor.dtype).removeprefix("torch.")), tensor.nbytes)
    return {
        "tensors": [{"kind": k, "dtype": d, "tensors": n, "bytes": b} for (k, d), (n, b) in sorted(found.items())],
        "upcasts": [
            {"kind": k, "from": before, "to": d, "tensors": n, "bytes": b} for (k, before, d), (n, b) in sorted(raised.items())
        ],
    }  # fmt: skip


def _add(counts: dict[tuple[str, ...], list[int]], key: tuple[str, ...], n_bytes: int) -> None:
    entry = counts.setdefault(key, [0, 0])
    entry[0] += 1
    entry[1] += n_bytes


def kind_of(module: nn.Module, name: str) -> str:
    """Memory kind of a module's own parameter: codes, constants, adapters or weights."""
    if isinstance(module, QuantLinear) and name != "bias":
        return "codes" if name == module.names[0] else "constants"
    return "adapters" if isinstance(module, LowRank) else "weights"


class SavedActivations:
    """Bytes that autograd saves for backward: distinct storages that are not parameters."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self._seen and storage.data_ptr():
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor.detach()  # saving an output with its own graph would be a cycle that leaks if backward never runs

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[SavedActivations]:
        """Count the bytes saved inside the block (one forward pass)."""
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield self


def _unpack(tensor: Any) -> Any:
    return tensor
