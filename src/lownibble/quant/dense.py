"""DenseProducts: training matmuls with a dense matrix such as the head's, exact or in 8 bits.

The head of a small model is a third of its multiplications; if the frozen base uses 8-bit matmuls (`eightbit.py`), a frozen head
does too: W is quantised to 8 bits per row, hidden states and the gradient of the logits per token and 64 columns. W is quantised
again for each matmul, a panel at a time; only its row scales are kept.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lownibble.kernels import ops
from lownibble.kernels.types import LARGEST_CODE, PART
from lownibble.quant.linear import QuantLinear

BACKENDS = ("cpu", "reference")
"""Backends with 8-bit dense matmuls; on GPUs a 16-bit head runs on tensor cores."""


def code_type_for(model: nn.Module, weight_NK: Tensor, device: torch.device | None = None) -> torch.dtype | None:
    """Code dtype of matmuls with `weight_NK`, a dense matrix of the model; None if they are exact. `device`: where they run, if
    the matrix is elsewhere now.

    int8 if the model's packed weights use it and the matrix is frozen, float32, and supported by the kernels in use.
    """
    layer = next((module for module in model.modules() if isinstance(module, QuantLinear)), None)
    if layer is None or layer.code_type is not torch.int8 or weight_NK.requires_grad or weight_NK.is_inference():
        return None  # an inference tensor has no version counter, by which scales are cached
    suits = weight_NK.dtype == torch.float32 and weight_NK.shape[1] % PART == 0 and weight_NK.is_contiguous()
    return torch.int8 if suits and ops.active_backend(device or weight_NK.device) in BACKENDS else None


class _Last(threading.local):
    def __init__(self) -> None:
        self.source: Any = None
        self.state: tuple[int, int] | None = None
        self.scale: Tensor | None = None


_last = _Last()


def forget() -> None:
    """Drop the cached row scales: version counters miss changes through `.data`, which a caller may make between runs."""
    _last.source = _last.state = _last.scale = None


def _row_scales(weight_NK: Tensor) -> Tensor:
    """8-bit scale of each row, (N,); cached for the last matrix while it is unchanged."""
    state = (weight_NK._version, weight_NK.data_ptr())
    if _last.scale is None or _last.source() is not weight_NK or _last.state != state:
        scale = torch.linalg.vector_norm(weight_NK.detach(), float("inf"), dim=1) / LARGEST_CODE[torch.int8]
        _last.source, _last.state, _last.scale = weakref.ref(weight_NK), state, scale
    return _last.scale


class DenseProducts:
    """Matmuls with W (N, K) into given output tensors, without autograd; with a `code_type` in 8 bits, on float32."""

    def __init__(self, weight_NK: Tensor, code_type: torch.dtype | None = None) -> None:
        self.weight, self.code_type = weight_NK.detach(), code_type
        self._scale = None if code_type is None else _row_scales(weight_NK)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row (N,) in backward, counted in float32: values and, in 8 bits, codes plus a scale and a start per part."""
        N = len(self.weight)
        return 4 * N + (0 if self.code_type is None else N + -(-N // PART) * 8)

    def forward(self, x_TK: Tensor, out_TN: Tensor) -> Tensor:
        """x W^T into `out_TN`."""
        if self._scale is None or self.code_type is None:
            return ops.matmul_dense(x_TK.contiguous(), self.weight, False, out=out_TN)
        rows = ops.quantize_rows(x_TK.contiguous(), None, self.code_type)
        return ops.matmul_8bit_dense(rows, self.weight, self._scale, False, out_TN)

    def backward(self, dy_TN: Tensor, out_TK: Tensor) -> Tensor:
        """dy W into `out_TK`."""
        if self._scale is None or self.code_type is None:
            return ops.matmul_dense(dy_TN, self.weight, True, out=out_TK)
        rows = ops.quantize_rows(dy_TN, self._scale, self.code_type)
        return ops.matmul_8bit_dense(rows, self.weight, self._scale, True, out_TK)
