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
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from lownibble.errors import BackendError
from lownibble.kernels import cpu_attention, cpu_decoder, cpu_int8, cpu_low_rank, decoded, plain
from lownibble.kernels.cpu_arguments import addition_addresses, address, block_shift, type_number, weight_addresses
from lownibble.kernels.decoder import DecoderLayers, Segment, Step
from lownibble.kernels.ops import Addition, Nested, Rows8bit

name = "cpu"
device_types = ("cpu",)

_ABI = 9
_FOLDER = Path(__file__).parent

_pointer, _int64, _int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_WEIGHT = [_pointer] * 6
"""codes, values, absmax, and nested values, absmax, offset or None three times."""
_SIGNATURES = {
    "dequantize_4bit": [*_WEIGHT, _int64, _int32, _int32, _int32, _pointer, _int32],
    "quantize_4bit": [_pointer, _int32, _int64, _int32, _pointer, _pointer, _pointer, _pointer, _int32],
    "quantize_8bit": [_pointer, _int64, _int32, _pointer, _pointer, _pointer, _int32],
    "dequantize_8bit": [_pointer, _pointer, _pointer, _int64, _int32, _pointer, _int32],
    "row_scales": [*_WEIGHT, _int64, _int64, _int32, _int32, _pointer, _int32],
    "quantize_rows": [_pointer, _pointer, _int64, _int64, _pointer, _pointer, _pointer, _int32],
    "matmul_int8": [
        *[_pointer] * 3, _int64, *_WEIGHT, _int64, _int64, _int32, _int32, _int32, *[_pointer] * 4, *[_int64] * 3,
        ctypes.c_float, _pointer, _int32,
    ],
    "matmul_int8_dense": [*[_pointer] * 3, _int64, _pointer, _int64, _int64, _int32, _pointer, _pointer, _int32],
    "matmul_4bit": [
        _pointer, _int64, *_WEIGHT, _int64, _int64, _int32, _int32, _int32, *[_pointer] * 3, *[_int64] * 3,
        ctypes.c_float, _pointer, _int32,
    ],
    "matmul_dense": [_pointer, _int64, _pointer, _int64, _int64, _int32, _pointer, _int32],
    "gemv_4bit": [_pointer, _int32, _int64, _int64, *_WEIGHT, _int64, _int32, _int32, _pointer, _int32],
    "decoder_sizes": [_int32],
    "decoder_workspace": [_pointer, _int64, _int64, _int64, _int32],
    "decoder_layers": [_pointer, _int64, _pointer, _int64, _pointer, _int32],
    "attention": [*[_pointer] * 7, *[_int64] * 5, ctypes.c_float, _int32],
    "attention_backward": [*[_pointer] * 11, *[_int64] * 5, ctypes.c_float, _int32],
    "select": [ctypes.c_char_p],
    "low_rank": [_pointer, _int64, _int64, _pointer, *[_int64] * 3, ctypes.c_float, _pointer, _int32],
    "low_rank_sums": [_int64] * 4,
    "low_rank_backward": [
        *[_pointer] * 3, *[_int64] * 3, _pointer, *[_int64] * 3, ctypes.c_float, *[_pointer] * 4, _int32
    ],
    "softmax_rows": [_pointer, _int64, _int64, ctypes.c_float, _pointer, _int32],
    "gemv_bf16": [_pointer, _int64, _int64, _pointer, _pointer, _int64, _int32],
}  # fmt: skip


_RESULTS = {
    **dict.fromkeys(("isa", "available"), ctypes.c_char_p),
    **dict.fromkeys(("has_attention", "has_low_rank", "has_matmul", "has_int8", "select"), _int32),
    **dict.fromkeys(("gemv_4bit", "matmul_4bit", "matmul_dense", "matmul_int8", "matmul_int8_dense"), _int32),
    **dict.fromkeys(("attention", "attention_backward"), _int32),
    **dict.fromkeys(("decoder_sizes", "decoder_layers", "low_rank", "low_rank_backward"), _int32),
    **dict.fromkeys(("decoder_workspace", "low_rank_sums"), _int64),
}
"""What functions return; those not named here return nothing."""


def _load(path: Path) -> SimpleNamespace:
    """The functions of the library by name, their types set."""
    try:
        loaded = ctypes.CDLL(str(path))
        abi = int(loaded.lownibble_abi())
    except (OSError, AttributeError) as error:
        raise BackendError(f"The compiled library {path} cannot be loaded: {error}. Reinstall lownibble.") from error
    if abi != _ABI:
        raise BackendError(f"The compiled library {path} is of another version (ABI {abi}, not {_ABI}). Reinstall lownibble.")
    functions = {name: getattr(loaded, f"lownibble_{name}") for name in {**_SIGNATURES, **_RESULTS}}
    for name, function in functions.items():
        function.argtypes, function.restype = _SIGNATURES.get(name, []), _RESULTS.get(name)
    made = SimpleNamespace(**functions)
    cpu_decoder.check_structures(made)
    return made


@cache
def library() -> SimpleNamespace:
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
    loaded = _load(path)
    forced = os.environ.get("LOWNIBBLE_ISA")
    if forced:
        _select(loaded, forced)
    return loaded


def _select(loaded: SimpleNamespace, isa_name: str) -> None:
    if loaded.select(isa_name.encode()) != 0:
        raise BackendError(
            f"The instruction set '{isa_name}' cannot run here. Available: {', '.join(_isas(loaded))}. "
            "Choose one of these or unset LOWNIBBLE_ISA."
        )


def _isas(loaded: SimpleNamespace) -> list[str]:
    return str(loaded.available().decode()).split(",")


def isa() -> str:
    """Name of the instruction set in use: avx512, avx2, neon or scalar."""
    return str(library().isa().decode())


def available_isas() -> list[str]:
    """Names of the instruction sets that run on this machine, fastest first."""
    return _isas(library())


def select_isa(isa_name: str) -> None:
    """Use the instruction set `isa_name` from now on, in the whole process.

    Raises:
        BackendError: this machine does not have it.
    """
    _select(library(), isa_name)


def quantize_4bit(x: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_4bit`."""
    n, shift, dtype = x.numel(), block_shift(block_size), type_number(x, "x")
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
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


def dequantize_4bit(
    codes: Tensor, absmax: Tensor, values: Tensor, block_size: int, out: Tensor, nested: Nested | None = None
) -> Tensor:
    """As `ops.dequantize_4bit`."""
    n, shift, dtype = out.numel(), block_shift(block_size), type_number(out, "out")
    *addresses, nested_shift = weight_addresses(codes, absmax, values, n, block_size, nested)
    out_data = address(out, "out", out.dtype, n)
    library().dequantize_4bit(*addresses, n, shift, nested_shift, dtype, out_data, torch.get_num_threads())
    return out


def quantize_8bit(x: Tensor, lookup: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_8bit`."""
    n, shift = x.numel(), block_shift(block_size)
    codes = torch.empty(n, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32)
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
    out = torch.empty(n, dtype=torch.float32)
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
    n, shift, dtype = out_features * K, block_shift(block_size), type_number(x_TK, "x_TK")
    *addresses, nested_shift = weight_addresses(codes, absmax, values, n, block_size, nested)
    x_data = address(x_TK, "x_TK", x_TK.dtype, T * K)
    out_TN = torch.empty((T, out_features), dtype=x_TK.dtype)
    failed = library().gemv_4bit(
        x_data, dtype, T, K, *addresses, out_features, shift, nested_shift, out_TN.data_ptr(), torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"No memory for {T * K * 4} bytes: x_TK in float32.")
    return out_TN


def matmul_4bit(
    x_TC: Tensor, codes: Tensor, absmax: Tensor, values: Tensor, block_size: int, shape: torch.Size, transposed: bool,
    addition: Addition, nested: Nested | None = None,
) -> Tensor:  # fmt: skip
    """As `ops.matmul_4bit`: with a kernel in float32 on AVX-512 (`native/matmul.h`), else the weight is decoded first."""
    N, K = shape
    if x_TC.dtype != torch.float32 or K % 64 or N * K == 0 or block_size < 32 or not library().has_matmul():
        return decoded.matmul(dequantize_4bit, x_TC, codes, absmax, values, block_size, shape, transposed, addition, nested)
    T, terms, columns = len(x_TC), N if transposed else K, K if transposed else N
    *addresses, nested_shift = weight_addresses(codes, absmax, values, N * K, block_size, nested)
    bias, low_branch = addition_addresses(addition, T, columns)
    x_data = address(x_TC, "x_TC", torch.float32, T * terms)
    out = torch.empty((T, columns), dtype=torch.float32)
    failed = library().matmul_4bit(
        x_data, T, *addresses, N, K, block_shift(block_size), nested_shift, int(transposed),
        bias, *low_branch, addition.scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for the decoded panels of a weight.")
    return out


def matmul_dense(x_TC: Tensor, weight_NK: Tensor, transposed: bool, out: Tensor) -> Tensor:
    """As `ops.matmul_dense`: with the kernel of `matmul_4bit` where it runs, else by torch."""
    N, K = weight_NK.shape
    suits = x_TC.dtype == torch.float32 and K % 64 == 0 and N * K > 0 and weight_NK.is_contiguous()
    if not suits or not library().has_matmul():
        return plain.matmul_dense(x_TC, weight_NK, transposed, out)
    T, terms, columns = len(x_TC), N if transposed else K, K if transposed else N
    failed = library().matmul_dense(
        address(x_TC, "x_TC", torch.float32, T * terms), T, address(weight_NK, "weight_NK", torch.float32, N * K), N, K,
        int(transposed), address(out, "out", torch.float32, T * columns), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for the panels of a weight.")
    return out


def has_int8() -> bool:
    """Whether the 8-bit products run with the instruction set in use."""
    return bool(library().has_int8())


def need_int8(code_type: torch.dtype = torch.int8) -> None:
    """Raise `BackendError` unless the 8-bit products run, with codes of that type."""
    cpu_int8.need(library(), code_type)


def row_scales(
    codes: Tensor, absmax: Tensor, values: Tensor, block_size: int, shape: torch.Size, nested: Nested | None = None,
    code_type: torch.dtype = torch.int8,
) -> Tensor:  # fmt: skip
    """As `ops.row_scales`, for int8."""
    return cpu_int8.row_scales(library(), codes, absmax, values, block_size, shape, nested, code_type)


def quantize_rows(x_TC: Tensor, column_scale: Tensor | None = None, code_type: torch.dtype = torch.int8) -> Rows8bit:
    """As `ops.quantize_rows`, for int8."""
    return cpu_int8.quantize_rows(library(), x_TC, column_scale, code_type)


def matmul_8bit(
    x: Rows8bit, codes: Tensor, absmax: Tensor, values: Tensor, block_size: int, shape: torch.Size, row_scale: Tensor,
    transposed: bool, addition: Addition, nested: Nested | None = None,
) -> Tensor:  # fmt: skip
    """As `ops.matmul_8bit`."""
    return cpu_int8.matmul_8bit(
        library(), x, codes, absmax, values, block_size, shape, row_scale, transposed, addition, nested
    )  # fmt: skip


def matmul_8bit_dense(x: Rows8bit, weight_NK: Tensor, row_scale: Tensor, transposed: bool, out: Tensor) -> Tensor:
    """As `ops.matmul_8bit_dense`."""
    return cpu_int8.matmul_8bit_dense(library(), x, weight_NK, row_scale, transposed, out)


def gemv_bf16(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """As `ops.gemv_bf16`."""
    (T, K), N = x_TK.shape, len(weight_NK)
    out_TN = torch.empty((T, N))
    x_data, weight = address(x_TK, "x_TK", torch.float32, T * K), address(weight_NK, "weight_NK", torch.bfloat16, N * K)
    library().gemv_bf16(x_data, T, K, weight, out_TN.data_ptr(), N, torch.get_num_threads())
    return out_TN


def low_rank(x_TC: Tensor, factor_Cr: Tensor, scale: float) -> Tensor:
    """As `ops.low_rank`."""
    return cpu_low_rank.low_rank(library(), x_TC, factor_Cr, scale)


def low_rank_backward(dy_TN: Tensor, x_TK: Tensor, low_Tr: Tensor, lora_B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.low_rank_backward`."""
    return cpu_low_rank.low_rank_backward(library(), dy_TN, x_TK, low_Tr, lora_B, scale)


def softmax_rows(x_LV: Tensor, scale: float) -> Tensor:
    """As `ops.softmax_rows`."""
    L, V = x_LV.shape
    lse = torch.empty(L)
    library().softmax_rows(address(x_LV, "x_LV", torch.float32, L * V), L, V, scale, lse.data_ptr(), torch.get_num_threads())
    return lse


def decoder_layers(
    x_TH: Tensor, layers: DecoderLayers, keys: Tensor, values: Tensor, step: Step, segments: Sequence[Segment]
) -> None:
    """As `ops.decoder_layers`."""
    cpu_decoder.decoder_layers(library(), x_TH, layers, keys, values, step, segments)


def has_attention(head_dim: int) -> bool:
    """Whether there is an attention kernel for heads of this size with the instruction set in use."""
    return cpu_attention.available(library(), head_dim)


def attention(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """As `ops.attention`."""
    return cpu_attention.attention(library(), q, k, v, borders, scaling)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.attention_backward`."""
    return cpu_attention.attention_backward(library(), dout, q, k, v, out, lse, borders, scaling)
