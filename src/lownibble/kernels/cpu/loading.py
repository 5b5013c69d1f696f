"""The compiled library (`native/`), loaded through ctypes, and the instruction set that it uses.

Why ctypes and plain pointers, not a torch extension: the library needs no torch headers to build, works with every torch
version, and a call costs 4 to 9 microseconds, about half of it the checks of `arguments.py`; a wrong length or type must raise
here, because the library trusts its arguments. ctypes releases the GIL during a call.

torch must be imported before the library is loaded (this module does): both then share one OpenMP runtime and one thread
pool. The number of threads is `torch.get_num_threads()`.

The default is the machine's best instruction set; the environment variable LOWNIBBLE_ISA (avx512, avx2, neon, scalar) or
`select_isa` forces one. The kernels write through pointers: autograd and version counters do not see it.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch  # noqa: F401 - before the library, see above

from lownibble.errors import BackendError

_ABI = 13
_FOLDER = Path(__file__).parent.parent

_pointer, _int64, _int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_WEIGHT = [_pointer] * 6
"""codes, values, absmax, and nested values, absmax, offset or None three times."""
_SIGNATURES = {
    "dequantize_4bit": [*_WEIGHT, _int64, _int32, _int32, _int32, _pointer, _int32],
    "quantize_4bit": [_pointer, _int32, _int64, _int32, _pointer, _pointer, _pointer, _pointer, _int32],
    "quantize_sum_4bit": [
        *[_pointer] * 2, _int64, *[_pointer] * 2, *[_int64] * 3, _int32, *[_pointer] * 4, _int32
    ],
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
    "matmul_dense": [
        _pointer, _int64, _pointer, _int64, _int64, _int32, *[_pointer] * 3, *[_int64] * 3, ctypes.c_float, _pointer, _int32
    ],
    "outer": [_pointer, _pointer, _int64, _int64, _int64, _int32, _pointer, _int32],
    "gemv_4bit": [_pointer, _int32, _int64, _int64, *_WEIGHT, _int64, _int32, _int32, _pointer, _int32],
    "dequantize_grouped": [_pointer, _int32, *[_pointer] * 5, _int32, *[_pointer] * 2, *[_int64] * 3, _int32, _pointer, _int32],
    "gemv_grouped": [
        _pointer, _int32, _int64, _pointer, _int32, *[_pointer] * 5, _int32, _pointer, *[_int64] * 3, _pointer, _int32
    ],
    "matmul_grouped": [
        _pointer, _int64, _pointer, _int32, *[_pointer] * 5, _int32, _pointer, *[_int64] * 3, _int32, *[_pointer] * 3,
        *[_int64] * 3, ctypes.c_float, _pointer, _int32,
    ],
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
    **dict.fromkeys(
        (
            "quantize_sum_4bit",
            "gemv_4bit",
            "gemv_grouped",
            "matmul_4bit",
            "matmul_grouped",
            "matmul_dense",
            "outer",
            "matmul_int8",
            "matmul_int8_dense",
        ),
        _int32,
    ),
    **dict.fromkeys(("attention", "attention_backward"), _int32),
    **dict.fromkeys(("decoder_sizes", "decoder_layers", "low_rank", "low_rank_backward"), _int32),
    **dict.fromkeys(("decoder_workspace", "low_rank_sums"), _int64),
}
"""Return types; functions not listed return nothing."""


def _load(path: Path) -> SimpleNamespace:
    """The functions of the library by name, with argument and return types set."""
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
    return SimpleNamespace(**functions)


@cache
def library() -> SimpleNamespace:
    """The compiled library, loaded once.

    Raises:
        BackendError: it is missing or does not load (with the reason kept from the installation), or LOWNIBBLE_ISA names an
            instruction set that this machine does not have.
    """
    path = _FOLDER / "_native.so"
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
