"""Argument checks for kernels that work on raw pointers.

The compiled and Triton kernels trust lengths, dtypes and devices; a wrong one would read or write out of bounds (and on a GPU
destroy the process's CUDA context). A check is a few attribute reads and costs microseconds. All raise `InputError`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lownibble.errors import InputError
from lownibble.kernels.types import PART, FourBit, Grouped, Nested, Stack, of_expert

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Float dtypes that the kernels read and write -> their number in native/kernels.h."""
BLOCK_SIZES = frozenset(1 << shift for shift in range(4, 13))
"""Powers of two from 16 to 4096."""


def check_block_size(block_size: int) -> None:
    """Require a block size that the fast kernels support."""
    if block_size not in BLOCK_SIZES:
        raise InputError(
            f"The block size of these kernels must be a power of two from 16 to 4096. Got {block_size}. "
            "Quantise with one of those, or use the 'reference' backend."
        )


def check_float(tensor: Tensor, role: str) -> None:
    """Require float32, bfloat16 or float16."""
    if tensor.dtype not in DTYPES:
        raise InputError(
            f"'{role}' must be float32, bfloat16 or float16. Got {tensor.dtype}. Convert it, or use the 'reference' backend."
        )


def check_tensor(tensor: Tensor, role: str, dtype: torch.dtype, length: int, device: torch.device) -> None:
    """Require a contiguous tensor of `length` elements of `dtype` on `device`."""
    if tensor.numel() != length or tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.device != device:
        raise InputError(
            f"'{role}' must be a contiguous tensor of {length} elements of {dtype} on {device}. Got shape {tuple(tensor.shape)} "
            f"(contiguous: {tensor.is_contiguous()}) of {tensor.dtype} on {tensor.device}."
        )


def check_factor(factor: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """Require a low-rank factor: float32 of `shape`, with any strides."""
    if factor.shape != shape or factor.dtype != torch.float32 or factor.device != device:
        raise InputError(
            f"'factor' must be a float32 tensor of {tuple(shape)} on {device}. Got {factor.dtype} {tuple(factor.shape)} on "
            f"{factor.device}."
        )


def check_weight_8bit(shape: torch.Size, block_size: int) -> None:
    """Require weight rows of whole parts and blocks of at least 32, so that a part has one or two absmax values."""
    if shape[1] % PART or block_size < 32:
        raise InputError(
            f"8-bit products take weights whose rows are a multiple of {PART} long, in blocks of at least 32. "
            f"Got {shape[0]} x {shape[1]} in blocks of {block_size}. Use compute='exact'."
        )


def check_library_8bit(shape: torch.Size) -> None:
    """Require sizes that the 8-bit products of cuBLAS take in both directions."""
    if shape[0] % 16:
        raise InputError(
            f"8-bit products on CUDA take weights whose number of rows is a multiple of 16. Got {shape[0]} x {shape[1]}. Use "
            "compute='exact'."
        )


def check_grouped(weight: Grouped, device: torch.device) -> None:
    """Check the tensors of a grouped weight."""
    n, K, size = weight.shape.numel(), weight.shape[-1], weight.group_size
    bits, nested = weight.bits, weight.nested
    if bits not in (2, 3, 4, 8) or K % max(1, size) or (bits < 8 and size % 8):
        raise InputError(
            f"Grouped weights have codes of 2, 3, 4 or 8 bits, groups that divide a row, and whole bytes in a group. Got codes "
            f"of {bits} bits and groups of {size} in rows of {K}."
        )
    n_groups = n // max(1, size)
    eight = weight.codes.dtype in (torch.int8, torch.float8_e4m3fn)
    if eight != (bits == 8):
        raise InputError(f"'codes' of {bits} bits cannot be {weight.codes.dtype}.")
    check_tensor(weight.codes, "codes", weight.codes.dtype if eight else torch.uint8, _packed_bytes(n, bits), device)
    check_tensor(weight.values, "values", torch.float32, 1 << bits, device)
    check_tensor(weight.scale, "scale", torch.float32 if nested is None else torch.uint8, n_groups, device)
    if weight.zero is not None:
        check_tensor(weight.zero, "zero", torch.uint8, _packed_bytes(n_groups, bits), device)
    if weight.order is not None:
        check_tensor(weight.order, "order", torch.int32, K, device)
    if nested is not None:
        _check_nested(nested, n_groups, device)


def check_unordered(weight: Grouped) -> None:
    """Require columns of codes that are the weight's: products permute x or their output instead."""
    if weight.order is not None:
        raise InputError("Products take grouped weights without 'order'. Put the columns of x in that order, and leave it out.")


def _packed_bytes(n: int, bits: int) -> int:
    """Bytes of n codes, in whole bytes and whole codes."""
    whole = math.lcm(bits, 8)
    return -(-n * bits // whole) * whole // 8


def _check_nested(nested: Nested, n_blocks: int, device: torch.device) -> None:
    check_block_size(nested.block_size)
    check_tensor(nested.values, "nested.values", torch.float32, 256, device)
    check_tensor(nested.absmax, "nested.absmax", torch.float32, -(-n_blocks // nested.block_size), device)
    check_tensor(nested.offset, "nested.offset", torch.float32, 1, device)


def check_weight(weight: FourBit, device: torch.device) -> None:
    """Check the tensors of a 4-bit weight."""
    nested, n = weight.nested, weight.shape.numel()
    check_block_size(weight.block_size)
    n_blocks = -(-n // weight.block_size)
    check_tensor(weight.codes, "codes", torch.uint8, (n + 1) // 2, device)
    check_tensor(weight.values, "values", torch.float32, 16, device)
    check_tensor(weight.absmax, "absmax", torch.float32 if nested is None else torch.uint8, n_blocks, device)
    if nested is not None:
        _check_nested(nested, n_blocks, device)


def check_stack(weights: Stack, device: torch.device) -> None:
    """Check the tensors of experts' matrices."""
    if isinstance(weights, Tensor):
        check_float(weights, "weights")
        if weights.device != device:
            raise InputError(f"'weights' must be on {device}. They are on {weights.device}.")
        return
    n_experts, nested = weights.shape[0], weights.nested
    held = (weights.codes, *((nested.absmax, nested.offset) if nested else ()))
    held += (weights.absmax,) if isinstance(weights, FourBit) else (weights.scale, *_present(weights.zero))
    if not n_experts or any(tensor.numel() % n_experts or not tensor.is_contiguous() for tensor in held):
        raise InputError(f"The tensors of {n_experts} experts' weights must be contiguous, with as many elements for each.")
    one = of_expert(weights, 0)
    if isinstance(one, FourBit):
        check_weight(one, device)
    elif isinstance(one, Grouped):
        check_unordered(one)
        check_grouped(one, device)


def _present(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)
