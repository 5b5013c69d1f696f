"""Measuring memory: the process's (or the device allocator's) peak, and live bytes by kind.

On a CPU the figure is the resident set, its peak kept by the kernel (VmHWM, reset through /proc/self/clear_refs); where there
is no /proc the peak is `ru_maxrss`, which cannot be reset. On CUDA it is the allocator's peak. Peaks are reported above the
baseline taken after imports, so that they compare between methods.
"""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn

from lownibble.errors import TrainingError
from lownibble.lora import LowRank
from lownibble.models.info import info
from lownibble.optim import state_bytes, states
from lownibble.quant import QuantLinear

_T = TypeVar("_T")
_EXHAUSTED = ("can't allocate memory", "Cannot allocate memory", "not enough memory")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def used_bytes(device: torch.device) -> int:
    """Bytes in use now: allocated on CUDA, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """Highest bytes in use since `reset_peak` (since the start where the peak cannot be reset)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def held_peak_bytes(device: torch.device) -> int:
    """Like `peak_bytes`, but on CUDA what the allocator reserved: that is what the device has no longer."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_bytes(device)


_highest: dict[torch.device, int] = {}


def highest_bytes(device: torch.device) -> int:
    """Highest bytes held since the process began, whatever `reset_peak` did in between."""
    return max(_highest.get(device, 0), held_peak_bytes(device))


def settle(device: torch.device) -> None:
    """Give back what is free but still held: Python's cycles, the C heap's free pages, the device allocator's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        trim_heap()


def trim_heap() -> None:
    """Give the system back the pages of the C heap that are free, where the C library can (glibc).

    The heap of a training step is in pieces: glibc cannot use a freed tensor's place for an aligned one of the same size, so what
    is free grows from pass to pass.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""mallopt's names for two limits (malloc.h): free bytes at its end from which the heap shrinks, size of a block outside it."""


@contextmanager
def kept_heap() -> Iterator[None]:
    """Inside the block freed memory of the C heap stays the process's, where the C library can (glibc). For processes of our own:
    it sets limits of the C library, which cannot be read back, so the Python calls (`lownibble.train`) leave them alone.

    A step frees what the next one will want again; given back in between, it costs a fault a page. Blocks of more than 32 MiB are
    the system's all the same. Afterwards what is free is given back, and the limits are those that glibc comes to by itself when
    large blocks are freed.
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
    """Whether an error says that memory ran out; torch has a type for it on CUDA only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in _EXHAUSTED)
    )


def retry_on_oom(step: Callable[[], _T], shrink: Callable[[], None]) -> _T:
    """What `step` returns. While it runs out of memory, `shrink` is called (when what the failed step held is freed), and it is
    called again."""
    while True:
        try:
            return step()
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
        shrink()


@contextmanager
def oom_becomes_error(message: Callable[[], str]) -> Iterator[None]:
    """A block in which running out of memory ends with one clear message.

    Raises:
        TrainingError: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_exhausted(error):
            raise
        raise TrainingError(message()) from error


def reset_peak(device: torch.device) -> None:
    """Start a new peak at the bytes in use now, where the system allows it."""
    _highest[device] = highest_bytes(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")


def bytes_by_kind(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Live bytes: dense weights, codes of packed ones, quantisation constants, adapters, gradients, optimiser states (those in
    memory).

    Each parameter counts once, tied ones too.
    """
    kinds = dict.fromkeys(("weights", "codes", "constants", "adapters", "gradients", "optimizer"), 0)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kinds[kind_of(module, name)] += parameter.nbytes
            if parameter.grad is not None:
                kinds["gradients"] += parameter.grad.nbytes
    if optimizer is not None:
        kinds["optimizer"] = state_bytes(optimizer).resident
    return kinds


def ledger(model: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Every kind of tensor by dtype, and what is held in more bits than the checkpoint had; optimiser states, paged out or not.

    Returns:
        `tensors`: [{kind, dtype, tensors, bytes}]; `upcasts`: [{kind, from, to, tensors, bytes}], bytes as they are now.
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
            _add(found, (kind, dtype), parameter.nbytes)
            before = stored.get(f"{path}.{name}".lstrip(".").replace(".base.", "."))
            if before and kind == "weights" and parameter.itemsize > getattr(torch, before).itemsize:
                _add(raised, (kind, before, dtype), parameter.nbytes)
            if parameter.grad is not None:
                _add(found, ("gradients", str(parameter.grad.dtype).removeprefix("torch.")), parameter.grad.nbytes)
            for of_state, shape in states.shapes(optimizer, parameter).values() if optimizer and parameter.requires_grad else ():
                _add(found, ("optimizer", str(of_state).removeprefix("torch.")), math.prod(shape) * of_state.itemsize)
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
    """The kind of memory that a module's own parameter is."""
    if isinstance(module, QuantLinear) and name != "bias":
        return "codes" if name == module.names[0] else "constants"
    return "adapters" if isinstance(module, LowRank) else "weights"


class SavedActivations:
    """Bytes that autograd keeps for backward: distinct storages that are not parameters."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self._seen and storage.data_ptr():
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor.detach()  # an output held with its own graph would be a cycle that nothing frees if backward never runs

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[SavedActivations]:
        """Count what is saved inside the block (one forward pass)."""
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield self


def _unpack(tensor: Any) -> Any:
    return tensor
