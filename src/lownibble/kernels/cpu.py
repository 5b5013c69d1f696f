"""The compiled CPU kernels (`native/`), called through ctypes.

Why ctypes and plain pointers, not a torch extension: the library needs no torch headers to build, works with every torch
version, and a call costs 4 to 9 microseconds, about half of it the checks below; a wrong length or type must raise here,
because the library trusts its arguments. ctypes releases the interpreter lock during a call.

torch must be imported before the library is loaded (this module does): both then share one OpenMP runtime and one pool of
threads. The number of threads is `torch.get_num_threads()`.

The instruction set is the best that the machine has; the environment variable LOWNIBBLE_ISA (avx512, avx2, neon, scalar) or
`select_isa` forces one. The kernels write through pointers: autograd and version counters do not see it.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lownibble.errors import BackendError
from lownibble.kernels.checks import check_block_size, check_float, check_tensor, check_weight
from lownibble.kernels.ops import Nested

name = "cpu"
device_types = ("cpu",)

_ABI = 1
_FOLDER = Path(__file__).parent
_CPU = torch.device("cpu")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_pointer, _int64, _int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_WEIGHT = [_pointer] * 6
"""codes, values, absmax, and nested values, absmax, offset or None three times."""
_SIGNATURES = {
    "dequantize_4bit": [*_WEIGHT, _int64, _int32, _int32, _int32, _pointer, _int32],
    "quantize_4bit": [_pointer, _int32, _int64, _int32, _pointer, _pointer, _pointer, _pointer, _int32],
    "quantize_8bit": [_pointer, _int64, _int32, _pointer, _pointer, _pointer, _int32],
    "dequantize_8bit": [_pointer, _pointer, _pointer, _int64, _int32, _pointer, _int32],
    "gemv_4bit": [_pointer, _int32, _int64, _int64, *_WEIGHT, _int64, _int32, _int32, _pointer, _int32],
}


class _Library:
    """The loaded library: one attribute a function, argument types set once."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
            abi = int(library.lownibble_abi())
        except (OSError, AttributeError) as error:
            raise BackendError(f"The compiled library {path} cannot be loaded: {error}. Reinstall lownibble.") from error
        if abi != _ABI:
            raise BackendError(f"The compiled library {path} is of another version (ABI {abi}, not {_ABI}). Reinstall lownibble.")
        for function, argument_types in _SIGNATURES.items():
            getattr(library, f"lownibble_{function}").argtypes = argument_types
        for function in ("dequantize_4bit", "quantize_4bit", "quantize_8bit", "dequantize_8bit"):
            getattr(library, f"lownibble_{function}").restype = None
        library.lownibble_isa.restype = library.lownibble_available.restype = ctypes.c_char_p
        self.dequantize_4bit = library.lownibble_dequantize_4bit
        self.quantize_4bit = library.lownibble_quantize_4bit
        self.quantize_8bit = library.lownibble_quantize_8bit
        self.dequantize_8bit = library.lownibble_dequantize_8bit
        self.gemv_4bit = library.lownibble_gemv_4bit
        self.select = library.lownibble_select
        self.isa = library.lownibble_isa
        self.available_isas = library.lownibble_available().decode().split(",")


@cache
def library() -> _Library:
    """The compiled library, loaded once.

    Raises:
        BackendError: it is missing or does not load (with the reason kept from the installation), or LOWNIBBLE_ISA names an
            instruction set that this machine does not have.
    """
    path = _FOLDER / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        marker = _FOLDER / "_native.txt"
        reason = marker.read_text(encoding="utf-8").strip() if marker.exists() else "it was never built; reinstall lownibble."
        raise BackendError(f"The compiled library is missing: {reason}")
    loaded = _Library(path)
    forced = os.environ.get("LOWNIBBLE_ISA")
    if forced:
        _select(loaded, forced)
    return loaded


def _select(loaded: _Library, isa_name: str) -> None:
    if loaded.select(isa_name.encode()) != 0:
        raise BackendError(
            f"The instruction set '{isa_name}' cannot run here. Available: {', '.join(loaded.available_isas)}. "
            "Choose one of these or unset LOWNIBBLE_ISA."
        )


def isa() -> str:
    """Name of the instruction set in use: avx512, avx2, neon or scalar."""
    return str(library().isa().decode())


def available_isas() -> list[str]:
    """Names of the instruction sets that run on this machine, fastest first."""
    return list(library().available_isas)


def select_isa(isa_name: str) -> None:
    """Use the instruction set `isa_name` from now on, in the whole process.

    Raises:
        BackendError: this machine does not have it.
    """
    _select(library(), isa_name)


def _shift(block_size: int) -> int:
    check_block_size(block_size)
    return block_size.bit_length() - 1


def _dtype(tensor: Tensor, role: str) -> int:
    check_float(tensor, role)
    return _DTYPES[tensor.dtype]


def _data(tensor: Tensor, role: str, dtype: torch.dtype, length: int) -> int:
    """Address of a contiguous CPU tensor of `length` elements of `dtype`; anything else raises."""
    check_tensor(tensor, role, dtype, length, _CPU)
    return tensor.data_ptr()


def _weight(
    codes: Tensor, absmax: Tensor, values: Tensor, n: int, block_size: int, nested: Nested | None
) -> tuple[int, int, int, int | None, int | None, int | None, int]:
    """The six addresses of a 4-bit weight and the logarithm of the nested block size."""
    check_weight(codes, absmax, values, n, block_size, nested, _CPU)
    plain = codes.data_ptr(), values.data_ptr(), absmax.data_ptr()
    if nested is None:
        return *plain, None, None, None, 0
    nested_pointers = nested.values.data_ptr(), nested.absmax.data_ptr(), nested.offset.data_ptr()
    return *plain, *nested_pointers, _shift(nested.block_size)


def quantize_4bit(x: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_4bit`."""
    n, shift, dtype = x.numel(), _shift(block_size), _dtype(x, "x")
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    library().quantize_4bit(
        _data(x, "x", x.dtype, n),
        dtype,
        n,
        shift,
        _data(bounds, "bounds", torch.float32, 15),
        _data(order, "order", torch.uint8, 16),
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, absmax


def dequantize_4bit(
    codes: Tensor, absmax: Tensor, values: Tensor, block_size: int, out: Tensor, nested: Nested | None = None
) -> Tensor:
    """As `ops.dequantize_4bit`."""
    n, shift, dtype = out.numel(), _shift(block_size), _dtype(out, "out")
    *addresses, nested_shift = _weight(codes, absmax, values, n, block_size, nested)
    out_data = _data(out, "out", out.dtype, n)
    library().dequantize_4bit(*addresses, n, shift, nested_shift, dtype, out_data, torch.get_num_threads())
    return out


def quantize_8bit(x: Tensor, lookup: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_8bit`."""
    n, shift = x.numel(), _shift(block_size)
    codes = torch.empty(n, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
    library().quantize_8bit(
        _data(x, "x", torch.float32, n),
        n,
        shift,
        _data(lookup, "lookup", torch.uint8, 65536),
        codes.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    """As `ops.dequantize_8bit`."""
    n, shift = codes.numel(), _shift(block_size)
    out = torch.empty(n, dtype=torch.float32)
    library().dequantize_8bit(
        _data(codes, "codes", torch.uint8, n),
        _data(absmax, "absmax", torch.float32, -(-n // block_size)),
        _data(values, "values", torch.float32, 256),
        n,
        shift,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def gemv_4bit(
    x_TK: Tensor,
    codes: Tensor,
    absmax: Tensor,
    values: Tensor,
    block_size: int,
    out_features: int,
    nested: Nested | None = None,
) -> Tensor:
    """As `ops.gemv_4bit`."""
    T, K = x_TK.shape
    n, shift, dtype = out_features * K, _shift(block_size), _dtype(x_TK, "x_TK")
    *addresses, nested_shift = _weight(codes, absmax, values, n, block_size, nested)
    x_data = _data(x_TK, "x_TK", x_TK.dtype, T * K)
    out_TN = torch.empty((T, out_features), dtype=x_TK.dtype)
    failed = library().gemv_4bit(
        x_data, dtype, T, K, *addresses, out_features, shift, nested_shift, out_TN.data_ptr(), torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"No memory for {T * K * 4} bytes: x_TK in float32.")
    return out_TN
