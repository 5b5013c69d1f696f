"""Arguments of the compiled CPU kernels: tensor checks and conversion to ctypes values."""

from __future__ import annotations

import torch
from torch import Tensor

from lownibble.kernels.checks import (
    DTYPES,
    check_block_size,
    check_factor,
    check_float,
    check_tensor,
    check_weight,
)
from lownibble.kernels.types import Epilogue, FourBit

_CPU = torch.device("cpu")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to write to, on the CPU and of `dtype` whatever torch's defaults and `torch.device` blocks say."""
    return torch.empty(shape, dtype=dtype, device=_CPU)


def block_shift(block_size: int) -> int:
    """Log2 of a supported block size."""
    check_block_size(block_size)
    return block_size.bit_length() - 1


def type_number(tensor: Tensor, role: str) -> int:
    """The number in `native/kernels.h` of a tensor's float dtype."""
    check_float(tensor, role)
    return DTYPES[tensor.dtype]


def address(tensor: Tensor, role: str, dtype: torch.dtype, length: int) -> int:
    """Address of a contiguous CPU tensor of `length` elements of `dtype`; anything else raises."""
    check_tensor(tensor, role, dtype, length, _CPU)
    return tensor.data_ptr()


def weight_addresses(weight: FourBit) -> tuple[int, int, int, int | None, int | None, int | None, int]:
    """The six addresses of a 4-bit weight and log2 of the nested block size; None and 0 without double quantisation."""
    check_weight(weight, _CPU)
    plain, nested = (weight.codes.data_ptr(), weight.values.data_ptr(), weight.absmax.data_ptr()), weight.nested
    if nested is None:
        return *plain, None, None, None, 0
    nested_pointers = nested.values.data_ptr(), nested.absmax.data_ptr(), nested.offset.data_ptr()
    return *plain, *nested_pointers, block_shift(nested.block_size)


def epilogue_addresses(
    epilogue: Epilogue, T: int, columns: int
) -> tuple[int | None, tuple[int | None, int | None, int, int, int]]:
    """Address of the bias; addresses of the low-rank branch, its rank and the strides of its factor."""
    bias = None if epilogue.bias is None else address(epilogue.bias, "bias", torch.float32, columns)
    low, factor = epilogue.low, epilogue.factor
    if low is None or factor is None:
        return bias, (None, None, 0, 0, 0)
    r = low.shape[1]
    check_factor(factor, (r, columns), _CPU)
    return bias, (address(low, "low", torch.float32, T * r), factor.data_ptr(), r, factor.stride(0), factor.stride(1))
