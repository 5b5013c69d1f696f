"""Measuring memory: the process's (or the device allocator's) peak, and live bytes by kind.

On a CPU the figure is the resident set, its peak kept by the kernel (VmHWM, reset through /proc/self/clear_refs); where there
is no /proc the peak is `ru_maxrss`, which cannot be reset. On CUDA it is the allocator's peak. Peaks are reported above the
baseline taken after imports, so that they compare between methods.
"""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lownibble.lora import LowRank
from lownibble.optim import state_bytes
from lownibble.quant import QuantLinear

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


def reset_peak(device: torch.device) -> None:
    """Start a new peak at the bytes in use now, where the system allows it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _CLEAR.write_text("5")


def bytes_by_kind(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Live bytes: dense weights, 4-bit codes, quantisation constants, adapters, gradients, optimiser states (those in memory).

    Each parameter counts once, tied ones too.
    """
    kinds = dict.fromkeys(("weights", "codes", "constants", "adapters", "gradients", "optimizer"), 0)
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = "adapters" if isinstance(module, LowRank) else "weights"
            if isinstance(module, QuantLinear) and name != "bias":
                kind = "codes" if name == "codes" else "constants"
            kinds[kind] += parameter.nbytes
            if parameter.grad is not None:
                kinds["gradients"] += parameter.grad.nbytes
    if optimizer is not None:
        kinds["optimizer"] = state_bytes(optimizer).resident
    return kinds


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
        return tensor

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[SavedActivations]:
        """Count what is saved inside the block (one forward pass)."""
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield self


def _unpack(tensor: Any) -> Any:
    return tensor
