"""The compiled 8-bit matmuls (`native/int8.h`): argument checks and ctypes calls."""

from __future__ import annotations

import torch
from torch import Tensor

from lownibble.errors import BackendError, InputError
from lownibble.kernels import decoded
from lownibble.kernels.checks import check_weight_8bit
from lownibble.kernels.cpu.arguments import address, block_shift, empty, epilogue_addresses, weight_addresses
from lownibble.kernels.cpu.loading import library
from lownibble.kernels.types import PART, Epilogue, FourBit, Rows8bit, row_sizes


def has_int8() -> bool:
    """Whether the instruction set in use has 8-bit matmuls."""
    return bool(library().has_int8())


def need_int8(code_type: torch.dtype = torch.int8) -> None:
    """Require support for 8-bit matmuls with codes of `code_type`.

    Raises:
        BackendError: the instruction set in use has none, or the code type is not int8.
    """
    if code_type is not torch.int8:
        raise BackendError(
            "compute='fp8' needs a CUDA device of compute capability 8.9 or later; the compiled CPU kernels have int8 only. "
            "Use compute='int8' or compute='exact'."
        )
    if not has_int8():
        isa = library().isa().decode()
        raise BackendError(
            f"compute='int8' needs the AVX-512 VNNI instructions; the kernels in use are '{isa}'. Use compute='exact'."
        )


def row_scales(weight: FourBit, code_type: torch.dtype = torch.int8) -> Tensor:
    """As `ops.row_scales`, for int8."""
    need_int8(code_type)
    N, K, shift, addresses, nested_shift = _weight(weight)
    scale = empty(N)
    library().row_scales(*addresses, N, K, shift, nested_shift, scale.data_ptr(), torch.get_num_threads())
    return scale


def _weight(weight: FourBit) -> tuple[int, int, int, list[int | None], int]:
    need_int8()
    N, K = weight.shape
    check_weight_8bit(weight.shape, weight.block_size)
    *addresses, nested_shift = weight_addresses(weight)
    return N, K, block_shift(weight.block_size), addresses, nested_shift


def quantize_rows(x_TC: Tensor, column_scale: Tensor | None = None, code_type: torch.dtype = torch.int8) -> Rows8bit:
    """As `ops.quantize_rows`, for int8; codes in tiles of 12 rows, see `native/int8.h`."""
    need_int8(code_type)
    x_TC = x_TC.float()
    T, C = x_TC.shape
    n_codes, n_scales = row_sizes(T, C)
    codes, scale = empty(n_codes, dtype=torch.int8), empty(n_scales)
    rows = Rows8bit(codes, scale, empty(n_scales, dtype=torch.int32), T, C)
    library().quantize_rows(
        address(x_TC, "x_TC", torch.float32, T * C),
        None if column_scale is None else address(column_scale, "column_scale", torch.float32, C),
        T, C, rows.codes.data_ptr(), rows.scale.data_ptr(), rows.start.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return rows


def _rows(x: Rows8bit, columns: int) -> tuple[int, int, int]:
    """Addresses of quantised rows, which must have `columns` columns."""
    if x.columns != columns:
        raise InputError(f"'x' must have {columns} columns. Got {x.columns}.")
    n_codes, n_scales = row_sizes(x.rows, columns)
    codes, scale = address(x.codes, "codes", torch.int8, n_codes), address(x.scale, "scale", torch.float32, n_scales)
    return codes, scale, address(x.start, "start", torch.int32, n_scales)


def matmul_8bit(
    x: Rows8bit, weight: FourBit, row_scale: Tensor, transposed: bool, epilogue: Epilogue, dtype: torch.dtype = torch.float32
) -> Tensor:
    """As `ops.matmul_8bit`; computed in float32."""
    N, K, shift, addresses, nested_shift = _weight(weight)
    T, columns = x.rows, K if transposed else N
    rows = _rows(x, N if transposed else K)
    added = epilogue.bias, epilogue.low, epilogue.factor
    own_bias, low, factor = (None if tensor is None else tensor.float() for tensor in added)
    epilogue = Epilogue(own_bias, low, factor, epilogue.scale)
    bias, low_branch = epilogue_addresses(epilogue, T, columns)
    out = empty(T, columns)
    if N * K == 0:
        return decoded.matmul_dense(empty(T, 0), empty(0, columns), True, epilogue).to(dtype)
    failed = library().matmul_int8(
        *rows, T, *addresses, N, K, shift, nested_shift, int(transposed), address(row_scale, "row_scale", torch.float32, N),
        bias, *low_branch, epilogue.scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for one packed panel of a weight.")
    return out.to(dtype)


def matmul_8bit_dense(x: Rows8bit, weight_NK: Tensor, row_scale: Tensor, transposed: bool, out: Tensor) -> Tensor:
    """As `ops.matmul_8bit_dense`."""
    need_int8()
    N, K = weight_NK.shape
    terms, columns = (N, K) if transposed else (K, N)
    check_weight_8bit(weight_NK.shape, PART)
    if N * K == 0:
        return out.zero_()
    failed = library().matmul_int8_dense(
        *_rows(x, terms), x.rows, address(weight_NK, "weight_NK", torch.float32, N * K), N, K, int(transposed),
        address(row_scale, "row_scale", torch.float32, N), address(out, "out", torch.float32, x.rows * columns),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for packed panels of a weight.")
    return out
