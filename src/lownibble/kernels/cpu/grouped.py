"""The compiled kernels for grouped weights (`native/grouped.h`, `native/matmul.h`): argument checks and ctypes calls."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lownibble.errors import InputError
from lownibble.kernels import decoded
from lownibble.kernels.checks import check_float, check_grouped, check_unordered
from lownibble.kernels.cpu.arguments import address, block_shift, empty, epilogue_addresses, type_number
from lownibble.kernels.cpu.loading import library
from lownibble.kernels.types import Epilogue, Grouped

_CPU = torch.device("cpu")
_FLOAT8 = 9  # in native/kernels.h; other codes have their number of bits


def _codes(weight: Grouped) -> tuple[int | None, ...]:
    """Addresses and numbers of the codes, scales and zero points."""
    check_grouped(weight, _CPU)
    nested, zero = weight.nested, weight.zero
    coding = _FLOAT8 if weight.codes.dtype is torch.float8_e4m3fn else weight.bits
    inner: tuple[int | None, ...] = (None, None, None, 0)
    if nested is not None:
        inner = nested.values.data_ptr(), nested.absmax.data_ptr(), nested.offset.data_ptr(), block_shift(nested.block_size)
    plain = weight.codes.data_ptr(), coding, weight.values.data_ptr(), weight.scale.data_ptr()
    return *plain, *inner, None if zero is None else zero.data_ptr()


def _rows(weight: Grouped) -> tuple[int, int, int]:
    """Rows, columns and group size."""
    *rows, K = weight.shape
    return math.prod(rows), K, max(1, weight.group_size)


def dequantize_grouped(weight: Grouped, out: Tensor) -> Tensor:
    """As `ops.dequantize_grouped`."""
    dtype, codes = type_number(out, "out"), _codes(weight)
    order = None
    if weight.order is not None:
        low, high = map(int, weight.order.aminmax()) if weight.order.numel() else (0, -1)
        if low < 0 or high >= weight.shape[-1]:  # the kernel writes where it says
            raise InputError(f"'order' must be columns below {weight.shape[-1]}. Got {low} to {high}.")
        order = weight.order.data_ptr()
    out_data = address(out, "out", out.dtype, weight.shape.numel())
    library().dequantize_grouped(*codes, order, *_rows(weight), dtype, out_data, torch.get_num_threads())
    return out


def gemv_grouped(x_TK: Tensor, weight: Grouped) -> Tensor:
    """As `ops.gemv_grouped`."""
    check_unordered(weight)
    dtype, codes, rows, T = type_number(x_TK, "x_TK"), _codes(weight), _rows(weight), len(x_TK)
    N, K = weight.shape
    x_data, out_TN = address(x_TK, "x_TK", x_TK.dtype, T * K), empty(T, N, dtype=x_TK.dtype)
    if library().gemv_grouped(x_data, dtype, T, *codes, *rows, out_TN.data_ptr(), torch.get_num_threads()):
        raise MemoryError(f"No memory for {T * K * 4} bytes: x_TK in float32.")
    return out_TN


def matmul_grouped(x_TC: Tensor, weight: Grouped, transposed: bool, epilogue: Epilogue) -> Tensor:
    """As `ops.matmul_grouped`: a fused float32 kernel on AVX-512 (`native/matmul.h`), else the weight is dequantised first."""
    check_unordered(weight)
    N, K = weight.shape
    check_float(x_TC, "x")
    suits = x_TC.dtype == torch.float32 and K % 64 == 0 and N * K > 0 and weight.group_size % 16 == 0
    if not suits or not library().has_matmul():
        return decoded.matmul(partial(dequantize_grouped, weight), weight.shape, x_TC, transposed, epilogue)
    T, terms, columns = len(x_TC), N if transposed else K, K if transposed else N
    codes, (bias, low_branch) = _codes(weight), epilogue_addresses(epilogue, T, columns)
    x_data, out = address(x_TC, "x_TC", torch.float32, T * terms), empty(T, columns)
    failed = library().matmul_grouped(
        x_data, T, *codes, *_rows(weight), int(transposed), bias, *low_branch, epilogue.scale, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for the decoded panels of a weight.")
    return out
