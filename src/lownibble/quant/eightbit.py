"""Frozen products on 8-bit units: `compute="int8"`.

The activations are scaled to 8 bits by token and 64 columns, the weight is brought from 4 to 8 bits by output row, integers are
summed exactly, and the low-rank branch is added in float32 (`kernels/ops.py` has the formulas, ADR 7 the reasons). The gradient
of the input is the same product with the same integers: dx = rowquant(dy * row_scale) Wq. What it changes are the values of the
frozen product, a little (`tests/quant/test_eightbit.py` holds the bound); gradients of the adapters are exact given those.

q, k and v, and gate and up, read the same input: it is scaled once. `shared_rows` remembers the last input by identity and
version, without keeping it alive.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from lownibble.errors import BackendError, InputError
from lownibble.kernels import ops
from lownibble.kernels.ops import Addition, Rows8bit
from lownibble.quant.tensor import QuantizedTensor


def choose(compute: str, device: torch.device) -> str:
    """'exact' or 'int8' for a `QuantConfig.compute`; 'auto' is exact.

    Raises:
        BackendError: 8-bit products do not run on `device` with the kernels in use; says what is missing and what to use.
    """
    if compute != "int8":
        return "exact"
    if device.type != "cpu":
        raise BackendError(f"compute='int8' has no kernel for '{device}' yet. Use compute='exact'.")
    active = ops.active_backend(device)
    if active == "cpu":
        from lownibble.kernels import cpu

        cpu.need_int8()
    elif active != "reference":
        raise BackendError(f"compute='int8' has no '{active}' kernel yet. Use compute='exact'.")
    elif not ops.is_forced():
        raise BackendError(
            f"compute='int8' needs the compiled kernels ({ops.backend_status()['cpu']}). Use compute='exact', or install them."
        )
    return "int8"


def check_weight(weight: QuantizedTensor, name: str) -> None:
    """Raise unless the weight's shape and blocks suit 8-bit products.

    Raises:
        InputError: names the weight and what to do.
    """
    if weight.shape[1] % 64:
        raise InputError(
            f"compute='int8' takes weights whose rows are a multiple of 64 long. '{name}' is "
            f"{weight.shape[0]} x {weight.shape[1]}. Use compute='exact', or add it to skip_modules."
        )


class _Last(threading.local):
    def __init__(self) -> None:
        self.source: Any = None
        self.state: tuple[int, str] | None = None
        self.rows: Rows8bit | None = None


_last = _Last()


def shared_rows(x: Tensor) -> Rows8bit:
    """`x` (..., C) as rows of 8 bits; the same tensor asked for again, unchanged, is not scaled again."""
    state = None if x.is_inference() else (x._version, ops.active_backend(x.device))  # inference tensors have no version
    if _last.rows is not None and _last.source() is x and _last.state == state:
        return _last.rows
    rows = ops.quantize_rows(x.detach().reshape(-1, x.shape[-1]).float().contiguous())
    if state is not None:
        _last.source, _last.state, _last.rows = weakref.ref(x), state, rows
    return rows


@torch.library.custom_op("lownibble::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = ops.quantize_rows(x.reshape(-1, x.shape[-1]).float().contiguous())
    return rows.codes, rows.scale, rows.start


@_quantize_rows.register_fake
def _(x):  # type: ignore[no-untyped-def]
    T, C = x.numel() // x.shape[-1], x.shape[-1]
    n_codes, n_scales = ops.row_sizes(T, C)
    scales = (x.new_empty(n_scales, dtype=dtype) for dtype in (torch.float32, torch.int32))
    return x.new_empty(n_codes, dtype=torch.int8), *scales


def rows_of(x: Tensor) -> list[Tensor]:
    """The tensors of `x` (..., C) as rows of 8 bits, by an operator that a compiler can call: it merges equal calls itself."""
    return list(_quantize_rows(x.detach()))


def forward(rows: Rows8bit, weight: QuantizedTensor, addition: Addition, dtype: torch.dtype) -> Tensor:
    """(T, N) in `dtype`: rows (T, K) times W^T for W (N, K), plus `addition`."""
    parts = weight.parts
    scale = ops.row_scales(*parts, weight.shape, weight.nested)
    return ops.matmul_8bit(rows, *parts, weight.shape, scale, False, addition, weight.nested).to(dtype)


def backward(dy_TN: Tensor, weight: QuantizedTensor, addition: Addition) -> Tensor:
    """(T, K) in dy's dtype: the gradient of the input, dy W, plus `addition`."""
    parts = weight.parts
    scale = ops.row_scales(*parts, weight.shape, weight.nested)
    rows = ops.quantize_rows(dy_TN.float().contiguous(), scale)
    return ops.matmul_8bit(rows, *parts, weight.shape, scale, True, addition, weight.nested).to(dy_TN.dtype)
