"""8-bit frozen-base matmuls: `compute="int8"` and `compute="fp8"`.

Activations are quantised to 8 bits per token and 64 columns, the 4-bit weight to 8 bits per output row; codes are multiplied and
summed, and the low-rank branch is added in float32 (`kernels/ops.py` has the formulas, ADR 7 the reasons). The gradient of the
input is the same matmul with the same codes: dx = rowquant(dy * row_scale) Wq. The values of the frozen-base matmul change a
little (`tests/quant/test_eightbit.py` holds the bounds); adapter gradients are exact given those values.

Codes are integers, or float8 (e4m3: four exponent and three mantissa bits), which keeps small values of a part but rounds large
ones more coarsely (ADR 11).

q, k and v, and gate and up, share their input, which is quantised once: `shared_rows` caches the last input by identity and
version, without keeping it alive.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lownibble.errors import BackendError, InputError
from lownibble.kernels import ops
from lownibble.kernels.checks import check_library_8bit, check_weight_8bit
from lownibble.kernels.types import Epilogue, FourBit, Rows8bit, row_sizes
from lownibble.quant.packed import PackedExperts, PackedWeight

CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Values of `compute` with 8-bit matmuls -> their code dtype."""

CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
"""Minimum CUDA compute capability with the 8-bit units the kernels use; below it Triton would fall back to slower units."""


PROVEN = {"cpu": "int8"}
"""Device type -> the 8-bit compute that 'auto' chooses for float32 training there: every figure of `bench quality` (evaluation
loss and scores of two tasks) differs from exact compute by less than the spread between seeds."""


def automatic(weights: Iterable[PackedWeight], dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """Resolve compute='auto' for training on these frozen weights with activations of `dtype`: (compute, reason)."""
    compute = PROVEN.get(device.type)
    if compute is None or dtype != torch.float32:
        return "exact", f"8-bit products have not been proven on '{device.type}' in {str(dtype).removeprefix('torch.')}"
    if ops.active_backend(device) != "cpu":
        return "exact", "8-bit products need the compiled kernels"
    try:
        choose(compute, device)
        for weight in weights:
            _check_shape(_four_bit(weight, compute))
    except (BackendError, InputError) as error:
        return "exact", str(error).partition(". ")[0]
    return compute, "faster; 'bench quality' found no difference above seed noise; --compute exact turns it off"


def choose(compute: str, device: torch.device) -> str:
    """Resolve a `QuantConfig.compute` to 'exact', 'int8' or 'fp8'; 'auto' is exact here, training resolves it with `automatic`.

    A backend forced by `use_backend` may be slow: the reference and Triton's interpreter support int8 and fp8 anywhere.

    Raises:
        BackendError: the kernels in use have no 8-bit matmuls on `device`; says what is missing and what to use.
    """
    if compute not in CODE_TYPES:
        return "exact"
    active = ops.active_backend(device)
    if active == "cpu":
        from lownibble.kernels import cpu

        cpu.need_int8(CODE_TYPES[compute])
    elif active == "triton" and device.type == "cuda":
        _need_capability(compute, device)
    elif not ops.is_forced():
        reasons = " ".join(f"{name}: {why}" for name, why in ops.backend_status().items() if why != "ok")
        raise BackendError(f"compute='{compute}' has no fast kernel on '{device}'. {reasons} Use compute='exact'.")
    return compute


def _need_capability(compute: str, device: torch.device) -> None:
    needed, found = CAPABILITY[compute], torch.cuda.get_device_capability(device)
    if found < needed:
        others = " or ".join(f"compute='{name}'" for name in ("int8", "exact") if found >= CAPABILITY.get(name, (0, 0)))
        raise BackendError(
            f"compute='{compute}' needs CUDA devices of compute capability {needed[0]}.{needed[1]} or later. "
            f"'{device}' has {found[0]}.{found[1]}. Use {others}."
        )


def _four_bit(weight: PackedWeight, compute: str) -> FourBit:
    """The weight, or of experts the first one's, in the format of the 8-bit matmuls.

    Raises:
        InputError: its codec has no 8-bit matmuls.
    """
    weight = weight[0] if isinstance(weight, PackedExperts) else weight
    if weight.four_bit is None:
        codec = weight.facts()["quant_type"]
        raise InputError(
            f"compute='{compute}' is for 4-bit codecs (nf4, fp4); '{codec}' has exact products only. Use compute='exact'."
        )
    return weight.four_bit


def _check_shape(weight: FourBit) -> None:
    check_weight_8bit(weight.shape, weight.block_size)
    if ops.current(weight.codes.device).row_part is None:
        check_library_8bit(weight.shape)


def check_weight(weight: PackedWeight, name: str, compute: str) -> None:
    """Check that the weight's codec, shape and block size support 8-bit matmuls; of experts, those of one.

    Raises:
        InputError: names the weight and what to do.
    """
    if isinstance(weight, PackedExperts):
        weight = weight[0]
    try:
        four_bit = _four_bit(weight, compute)
    except InputError as error:
        raise InputError(f"'{name}': {error}") from None
    if weight.shape[-1] % 64:
        raise InputError(
            f"compute='{compute}' takes weights whose rows are a multiple of 64 long. '{name}' is "
            f"{' x '.join(map(str, weight.shape))}. Use compute='exact', or add it to skip_modules."
        )
    try:
        _check_shape(four_bit)
    except InputError as error:
        raise InputError(f"'{name}': {error}") from None


class _Last(threading.local):
    def __init__(self) -> None:
        self.source: Any = None
        self.state: tuple[int, str, torch.dtype] | None = None
        self.rows: Rows8bit | None = None


_last = _Last()


def shared_rows(x: Tensor, code_type: torch.dtype) -> Rows8bit:
    """`x` (..., C) quantised to rows of 8 bits; cached for the last tensor while it is unchanged."""
    state = None if x.is_inference() else (x._version, ops.active_backend(x.device), code_type)  # inference tensors: no version
    if _last.rows is not None and _last.source() is x and _last.state == state:
        return _last.rows
    rows = ops.quantize_rows(x.detach().reshape(-1, x.shape[-1]).contiguous(), None, code_type)
    if state is not None:
        _last.source, _last.state, _last.rows = weakref.ref(x), state, rows
    return rows


@torch.library.custom_op("lownibble::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor, code_type: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows = ops.quantize_rows(x.reshape(-1, x.shape[-1]).contiguous(), None, code_type)
    return rows.codes, rows.scale, rows.start


@_quantize_rows.register_fake
def _(x, code_type):  # type: ignore[no-untyped-def]
    T, C = x.numel() // x.shape[-1], x.shape[-1]
    part = ops.current(x.device).row_part
    n_codes, n_scales = row_sizes(T, C, part)
    scale, start = x.new_empty(n_scales, dtype=torch.float32), x.new_empty(n_scales if part else 0, dtype=torch.int32)
    return x.new_empty(n_codes, dtype=code_type), scale, start


def rows_of(x: Tensor, code_type: torch.dtype | None) -> list[Tensor]:
    """Tensors of `x` (..., C) quantised to rows of 8 bits, by a custom operator for torch.compile, which merges equal calls.

    Empty without a code type (exact matmuls).
    """
    return [] if code_type is None else list(_quantize_rows(x.detach(), code_type))


def of_tensors(tensors: list[Tensor], x_TC: Tensor) -> Rows8bit | None:
    """What `rows_of(x)` stands for, or None without a code type."""
    if not tensors:
        return None
    codes, scale, start = tensors
    return Rows8bit(codes, scale, start, len(x_TC), x_TC.shape[1], ops.current(x_TC.device).row_part)


def forward(rows: Rows8bit, weight: PackedWeight, epilogue: Epilogue, dtype: torch.dtype) -> Tensor:
    """(T, N) in `dtype`: rows (T, K) times W^T for W (N, K), plus `epilogue`."""
    four_bit = _four_bit(weight, "int8")
    scale = ops.row_scales(four_bit, rows.codes.dtype)
    return ops.matmul_8bit(rows, four_bit, scale, False, epilogue, dtype)


def backward(dy_TN: Tensor, weight: PackedWeight, epilogue: Epilogue, code_type: torch.dtype) -> Tensor:
    """(T, K) in dy's dtype: the gradient of the input, dy W, plus `epilogue`."""
    four_bit = _four_bit(weight, "int8")
    scale = ops.row_scales(four_bit, code_type)
    rows = ops.quantize_rows(dy_TN.contiguous(), scale, code_type)
    return ops.matmul_8bit(rows, four_bit, scale, True, epilogue, dy_TN.dtype)
