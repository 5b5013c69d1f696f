"""The compiled attention kernels (`native/attention.h`): argument checks and ctypes calls."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lownibble.errors import InputError
from lownibble.kernels.checks import check_tensor
from lownibble.kernels.cpu.arguments import empty
from lownibble.kernels.cpu.loading import library

_CPU = torch.device("cpu")


def has_attention(head_dim: int) -> bool:
    """Whether the instruction set in use has an attention kernel for this head size."""
    return bool(library().has_attention()) and head_dim % 16 == 0


def _heads(tensors: dict[str, Tensor], T: int) -> tuple[list[int], Any]:
    """Addresses and strides (row, token, head) of (B, heads, T, D) tensors."""
    strides = []
    for role, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.is_cpu or tensor.shape[2] != T or tensor.stride(3) != 1:
            raise InputError(f"'{role}' must be float32 on the CPU, of {T} tokens and contiguous heads. Got {tensor.dtype}.")
        strides += [tensor.stride(0), tensor.stride(2), tensor.stride(1)]
    return [tensor.data_ptr() for tensor in tensors.values()], (ctypes.c_int64 * len(strides))(*strides)


def _shape(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[int, int, int, int]:
    """T, heads, key heads and head_dim, after checking that all shapes suit the kernel."""
    (B, heads, T, D), key_heads = q.shape, k.shape[1]
    if k.shape != (B, key_heads, T, D) or v.shape != k.shape or heads % key_heads:
        raise InputError(f"'k' and 'v' must be ({B}, key heads, {T}, {D}). Got {tuple(k.shape)} and {tuple(v.shape)}.")
    if not has_attention(D):
        raise InputError(
            f"The attention kernel needs AVX-512 and heads of a multiple of 16. Got {D} with '{library().isa().decode()}'."
        )
    check_tensor(cu_seqlens, "cu_seqlens", torch.int64, cu_seqlens.numel(), _CPU)
    places = cu_seqlens.tolist()
    if places[:1] != [0] or places[-1:] != [B * T] or any(b > a // T * T + T or b < a for a, b in pairwise(places)):
        raise InputError(f"'cu_seqlens' must rise from 0 to {B * T} without leaving a row of {T} tokens between two of them.")
    return T, heads, key_heads, D


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """As `ops.attention`."""
    T, heads, key_heads, D = _shape(q, k, v, cu_seqlens)
    out, lse = empty(len(q), T, heads, D), empty(len(q) * T, heads)
    addresses, strides = _heads({"q": q, "k": k, "v": v, "out": out.transpose(1, 2)}, T)
    failed = library().attention(
        *addresses, strides, lse.data_ptr(), cu_seqlens.data_ptr(), len(cu_seqlens) - 1, T, heads, key_heads, D, scaling,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for the scores of attention.")
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.attention_backward`."""
    T, heads, key_heads, D = _shape(q, k, v, cu_seqlens)
    if dout.shape != out.shape or out.shape != (len(q), T, heads, D):
        raise InputError(f"'dout' and 'out' must be {(len(q), T, heads, D)}. Got {tuple(dout.shape)} and {tuple(out.shape)}.")
    check_tensor(lse, "lse", torch.float32, len(q) * T * heads, _CPU)
    gradients = {f"d{role}": empty(len(q), T, t.shape[1], D).transpose(1, 2) for role, t in (("q", q), ("k", k), ("v", v))}
    given = {"dout": dout.contiguous().transpose(1, 2), "q": q, "k": k, "v": v, "out": out.transpose(1, 2)}
    addresses, strides = _heads({**given, **gradients}, T)
    failed = library().attention_backward(
        *addresses, strides, lse.data_ptr(), cu_seqlens.data_ptr(), len(cu_seqlens) - 1, T,
        heads, key_heads, D, scaling, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for the scores of attention.")
    return gradients["dq"], gradients["dk"], gradients["dv"]
