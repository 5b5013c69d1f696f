"""Matmuls that first dequantise a packed weight into a buffer shared by all layers, then call torch's dense matmul.

The fallback for backends without a fused kernel. At training sizes dequantising costs a few percent of the matmul, and reusing
hot memory is what makes it cheap (a fresh allocation page-faults for longer than dequantising takes). There is one buffer per
thread, device and dtype, valid only until the next use; the loss computes its logits in it (`training/loss.py`). On CUDA, "next"
is stream order, not time: dequantising is queued behind the matmul that reads the buffer because both use the same stream. This
is assumed, not checked: a thread that alternates between streams would have to release the buffer in between. Autograd runs a
GPU's backward on a separate thread (and on the forward's stream), so training holds two buffers per device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lownibble.kernels.types import NO_EPILOGUE, Epilogue


class _Buffers(dict[tuple[torch.dtype, torch.device], Tensor]):
    """A thread's buffers, freed with the thread."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # by identity, so that a set can hold it


_everybodys: weakref.WeakSet[_Buffers] = weakref.WeakSet()


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers = _Buffers()
        _everybodys.add(self.buffers)


_scratch = _Scratch()


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised view of this thread's shared buffer, overwritten by the next call with the same dtype and device."""
    buffers = _scratch.buffers
    key = (dtype, device)
    numel = shape.numel()
    if key not in buffers or buffers[key].numel() < numel:
        buffers.pop(key, None)  # free the old buffer before allocating the new one
        with torch.inference_mode(False):  # training cannot use an inference tensor left by generation
            buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffers[key][:numel].view(shape)


def scratch_buffers() -> list[Tensor]:
    """The buffers of all threads."""
    return [buffer for buffers in list(_everybodys) for buffer in buffers.values()]


def release_scratch() -> int:
    """Free the buffers of all threads, including autograd's; returns their bytes. A buffer in use is freed after that use."""
    freed = 0
    for buffers in list(_everybodys):
        held = list(buffers.values())
        buffers.clear()
        freed += sum(int(buffer.nbytes) for buffer in held)
    return freed


def matmul(decode: Callable[[Tensor], Tensor], shape: torch.Size, x_TC: Tensor, transposed: bool, epilogue: Epilogue) -> Tensor:
    """`x @ W.T` or, transposed, `x @ W`, plus `epilogue`, in x's dtype. `decode` dequantises W of `shape` (N, K) into its
    argument.
    """
    return matmul_dense(x_TC, decode(scratch(shape, x_TC.dtype, x_TC.device)), transposed, epilogue)


def matmul_dense(
    x_TC: Tensor, weight_NK: Tensor, transposed: bool, epilogue: Epilogue = NO_EPILOGUE, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`x @ W.T` or, transposed, `x @ W`, plus `epilogue`, by torch; in x's dtype, into `out` if given.

    The low-rank term is written first and the large product added to it, which reads it while it multiplies; the other way
    round is one more pass over the output.
    """
    factor_CM, dtype = weight_NK if transposed else weight_NK.t(), x_TC.dtype
    bias = None if epilogue.bias is None else epilogue.bias.to(dtype)
    if epilogue.low is None or epilogue.factor is None:
        return torch.mm(x_TC, factor_CM, out=out) if bias is None else torch.addmm(bias, x_TC, factor_CM, out=out)
    low, factor = epilogue.low.to(dtype), epilogue.factor.to(dtype)
    if bias is None:
        out = x_TC.new_empty(len(x_TC), factor.shape[1]) if out is None else out
        out.addmm_(low, factor, beta=0, alpha=epilogue.scale)
    else:
        out = torch.addmm(bias, low, factor, alpha=epilogue.scale, out=out)
    return out.addmm_(x_TC, factor_CM)


def add_low_rank(out: Tensor, epilogue: Epilogue) -> Tensor:
    """Add the low-rank terms of `epilogue`, if it has any, to `out` in place."""
    if epilogue.low is not None and epilogue.factor is not None:
        out.addmm_(epilogue.low.to(out.dtype), epilogue.factor.to(out.dtype), alpha=epilogue.scale)
    return out
