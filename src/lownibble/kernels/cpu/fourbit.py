"""The compiled kernels for 4-bit and dense weights: quantise, dequantise, exact matmuls (`native/kernels.h`,
`native/matmul.h`)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lownibble.kernels import decoded, plain
from lownibble.kernels.checks import check_float
from lownibble.kernels.cpu.arguments import address, block_shift, empty, epilogue_addresses, type_number, weight_addresses
from lownibble.kernels.cpu.loading import library
from lownibble.kernels.types import NO_EPILOGUE, Epilogue, FourBit, Scaled8bit


def quantize_4bit(x: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_4bit`."""
    n, shift, dtype = x.numel(), block_shift(block_size), type_number(x, "x")
    codes = empty((n + 1) // 2, dtype=torch.uint8)
    absmax = empty(-(-n // block_size))
    library().quantize_4bit(
        address(x, "x", x.dtype, n),
        dtype,
        n,
        shift,
        address(bounds, "bounds", torch.float32, 15),
        address(order, "order", torch.uint8, 16),
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, absmax


def quantize_sum_4bit(
    base: Scaled8bit, low_Nr: Tensor, lora_A: Tensor, bounds: Tensor, order: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_sum_4bit`, a tile at a time."""
    (N, K), r, shift = base.codes.shape, len(lora_A), block_shift(block_size)
    codes = empty((N * K + 1) // 2, dtype=torch.uint8)
    absmax = empty(-(-N * K // block_size))
    if not N * K:
        return codes, absmax
    failed = library().quantize_sum_4bit(
        address(base.codes, "codes", torch.int8, N * K), address(base.scale, "scale", torch.float32, N * K // base.group),
        base.group, address(low_Nr, "low_Nr", torch.float32, N * r), address(lora_A, "lora_A", torch.float32, r * K), N, K, r,
        shift, address(bounds, "bounds", torch.float32, 15), address(order, "order", torch.uint8, 16), codes.data_ptr(),
        absmax.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for a tile of a weight.")
    return codes, absmax


def dequantize_4bit(weight: FourBit, out: Tensor) -> Tensor:
    """As `ops.dequantize_4bit`."""
    n, shift, dtype = weight.shape.numel(), block_shift(weight.block_size), type_number(out, "out")
    *addresses, nested_shift = weight_addresses(weight)
    out_data = address(out, "out", out.dtype, n)
    library().dequantize_4bit(*addresses, n, shift, nested_shift, dtype, out_data, torch.get_num_threads())
    return out


def quantize_8bit(x: Tensor, lookup: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_8bit`."""
    n, shift = x.numel(), block_shift(block_size)
    codes = empty(n, dtype=torch.uint8)
    absmax = empty(-(-n // block_size))
    library().quantize_8bit(
        address(x, "x", torch.float32, n),
        n,
        shift,
        address(lookup, "lookup", torch.uint8, 65536),
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    """As `ops.dequantize_8bit`."""
    n, shift = codes.numel(), block_shift(block_size)
    out = empty(n)
    library().dequantize_8bit(
        address(codes, "codes", torch.uint8, n),
        address(absmax, "absmax", torch.float32, -(-n // block_size)),
        address(values, "values", torch.float32, 256),
        n,
        shift,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def gemv_4bit(x_TK: Tensor, weight: FourBit) -> Tensor:
    """As `ops.gemv_4bit`."""
    (T, K), N = x_TK.shape, weight.shape[0]
    shift, dtype = block_shift(weight.block_size), type_number(x_TK, "x_TK")
    *addresses, nested_shift = weight_addresses(weight)
    x_data = address(x_TK, "x_TK", x_TK.dtype, T * weight.shape[1])
    out_TN = empty(T, N, dtype=x_TK.dtype)
    failed = library().gemv_4bit(
        x_data, dtype, T, K, *addresses, N, shift, nested_shift, out_TN.data_ptr(), torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"No memory for {T * K * 4} bytes: x_TK in float32.")
    return out_TN


def matmul_4bit(x_TC: Tensor, weight: FourBit, transposed: bool, epilogue: Epilogue) -> Tensor:
    """As `ops.matmul_4bit`: a fused float32 kernel on AVX-512 (`native/matmul.h`), else the weight is dequantised first."""
    N, K = weight.shape
    check_float(x_TC, "x")
    if x_TC.dtype != torch.float32 or K % 64 or N * K == 0 or weight.block_size < 32 or not library().has_matmul():
        return decoded.matmul(partial(dequantize_4bit, weight), weight.shape, x_TC, transposed, epilogue)
    T, terms, columns = len(x_TC), N if transposed else K, K if transposed else N
    *addresses, nested_shift = weight_addresses(weight)
    bias, low_branch = epilogue_addresses(epilogue, T, columns)
    x_data = address(x_TC, "x_TC", torch.float32, T * terms)
    out = empty(T, columns)
    failed = library().matmul_4bit(
        x_data, T, *addresses, N, K, block_shift(weight.block_size), nested_shift, int(transposed),
        bias, *low_branch, epilogue.scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for the decoded panels of a weight.")
    return out


def matmul_dense(
    x_TC: Tensor, weight_NK: Tensor, transposed: bool, epilogue: Epilogue = NO_EPILOGUE, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """As `ops.matmul_dense`: with the kernel of `matmul_4bit` where it runs, else by torch."""
    (N, K), T = weight_NK.shape, len(x_TC)
    suits = x_TC.dtype == torch.float32 and K % 64 == 0 and N * K > 0 and weight_NK.is_contiguous()
    if not suits or not library().has_matmul():
        return decoded.matmul_dense(x_TC, weight_NK, transposed, epilogue, out)
    terms, columns = (N, K) if transposed else (K, N)
    bias, low_branch = epilogue_addresses(epilogue, T, columns)
    out = empty(T, columns) if out is None else out
    failed = library().matmul_dense(
        address(x_TC, "x_TC", torch.float32, T * terms), T, address(weight_NK, "weight_NK", torch.float32, N * K), N, K,
        int(transposed), bias, *low_branch, epilogue.scale, address(out, "out", torch.float32, T * columns),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for the panels of a weight.")
    return out


def outer(a_TP: Tensor, b_TQ: Tensor, out: Tensor | None = None, adds: bool = False) -> Tensor:
    """As `ops.outer`: with the kernel of `matmul_4bit` where it runs, else by torch."""
    (T, P), Q = a_TP.shape, b_TQ.shape[1]
    suits = a_TP.dtype == torch.float32 and Q % 64 == 0 and T * P * Q > 0
    if not suits or not library().has_matmul():
        return plain.outer(a_TP, b_TQ, out, adds)
    out = empty(P, Q) if out is None else out
    failed = library().outer(
        address(a_TP, "a_TP", torch.float32, T * P), address(b_TQ, "b_TQ", torch.float32, T * Q), T, P, Q, int(adds),
        address(out, "out", torch.float32, P * Q), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for the panels of a matrix.")
    return out


def gemv_bf16(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """As `ops.gemv_bf16`."""
    (T, K), N = x_TK.shape, len(weight_NK)
    out_TN = empty(T, N)
    x_data, weight = address(x_TK, "x_TK", torch.float32, T * K), address(weight_NK, "weight_NK", torch.bfloat16, N * K)
    library().gemv_bf16(x_data, T, K, weight, out_TN.data_ptr(), N, torch.get_num_threads())
    return out_TN


def _softmax_rows(x_LV: Tensor, scale: float | Tensor) -> Tensor:
    """As `plain.softmax_rows`."""
    (L, V), x_data = x_LV.shape, address(x_LV, "logits_LV", torch.float32, x_LV.numel())
    lse = empty(L)
    library().softmax_rows(x_data, L, V, float(scale), lse.data_ptr(), torch.get_num_threads())
    return lse


def cross_entropy(logits_LV: Tensor, labels_L: Tensor, scale: float | Tensor, wants_gradient: bool) -> Tensor:
    """As `ops.cross_entropy`."""
    return plain.cross_entropy(logits_LV, labels_L, scale, wants_gradient, _softmax_rows)
