"""Products with a packed weight that decode it first: into one buffer that all layers share, then torch's dense product.

What a backend uses where it has no product of its own. At training sizes the decode costs a few percent of the product, and
reusing hot memory is what makes it cheap (a fresh allocation page-faults for longer than the decode takes). There is one buffer
per thread, device and dtype, only valid until the next use; the loss makes its logits in it (`training/loss.py`). On CUDA
"next" is an order of the stream, not of time: a decode is queued behind the product that reads the buffer because both go to
one stream. That is assumed, not checked: a thread that alternates between streams would have to release the buffer between
them. Autograd runs a GPU's backward on a thread of its own (and on the forward's stream), so training holds two buffers a
device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lownibble.kernels.types import Epilogue


class _Buffers(dict[tuple[torch.dtype, torch.device], Tensor]):
    """A thread's buffers; they go with the thread."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # told apart by identity, to be kept in a set


_everybodys: weakref.WeakSet[_Buffers] = weakref.WeakSet()


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers = _Buffers()
        _everybodys.add(self.buffers)


_scratch = _Scratch()


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor over this thread's shared buffer: overwritten by the next call with the same dtype and device."""
    buffers = _scratch.buffers
    key = (dtype, device)
    numel = shape.numel()
    if key not in buffers or buffers[key].numel() < numel:
        buffers.pop(key, None)  # before the new one, not beside it
        with torch.inference_mode(False):  # or training after generation could not use it
            buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffers[key][:numel].view(shape)


def release_scratch() -> int:
    """Free the decode buffers of all threads, of autograd's too; returns their bytes. One that is in use lives on until then."""
    freed = 0
    for buffers in list(_everybodys):
        held = list(buffers.values())
        buffers.clear()
        freed += sum(int(buffer.nbytes) for buffer in held)
    return freed


def matmul(decode: Callable[[Tensor], Tensor], shape: torch.Size, x_TC: Tensor, transposed: bool, epilogue: Epilogue) -> Tensor:
    """`x @ W.T` or, transposed, `x @ W`, plus `epilogue`, in x's dtype, for a weight of `shape` (N, K) that `decode` writes
    into a tensor.
    """
    return matmul_dense(x_TC, decode(scratch(shape, x_TC.dtype, x_TC.device)), transposed, epilogue)


def matmul_dense(x_TC: Tensor, weight_NK: Tensor, transposed: bool, epilogue: Epilogue) -> Tensor:
    """`x @ W.T` or, transposed, `x @ W`, plus `epilogue`, by torch; in x's dtype."""
    factor_CM = weight_NK if transposed else weight_NK.t()
    out = x_TC @ factor_CM if epilogue.bias is None else torch.addmm(epilogue.bias.to(x_TC.dtype), x_TC, factor_CM)
    if epilogue.low is not None and epilogue.factor is not None:
        out.addmm_(epilogue.low.to(x_TC.dtype), epilogue.factor.to(x_TC.dtype), alpha=epilogue.scale)
    return out
