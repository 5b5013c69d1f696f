"""DenseProducts: a dense matrix, as a head's, in the products of a training step, exact or on 8-bit units.

The head of a small model is a third of its multiplications; where the frozen base is multiplied on 8-bit units (`eightbit.py`), a
frozen head is too: W brought to 8 bits by row, hidden states and the gradient of the logits by token and 64 columns. W is
packed for each product again, a panel at a time; only its row scales are kept.
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
"""Kernels that have 8-bit products with a dense matrix; on GPUs a head in 16 bits runs on tensor cores."""


def code_type_for(model: nn.Module, weight_NK: Tensor) -> torch.dtype | None:
    """The type of the codes of products with `weight_NK`, a dense matrix of the model; None where they are exact.

    8 bits as the model's packed weights, if it is frozen, float32, and suits the kernels in use.
    """
    layer = next((module for module in model.modules() if isinstance(module, QuantLinear)), None)
    if layer is None or layer.code_type is not torch.int8 or weight_NK.requires_grad or weight_NK.is_inference():
        return None  # a tensor of inference has no version to remember its scales by
    suits = weight_NK.dtype == torch.float32 and weight_NK.shape[1] % PART == 0 and weight_NK.is_contiguous()
    return torch.int8 if suits and ops.active_backend(weight_NK.device) in BACKENDS else None


class _Last(threading.local):
    def __init__(self) -> None:
        self.source: Any = None
        self.state: tuple[int, int] | None = None
        self.scale: Tensor | None = None


_last = _Last()


def forget() -> None:
    """Read matrices again: their version tells of changes, but not of one through `.data`, as a caller may make between runs."""
    _last.source = _last.state = _last.scale = None


def _row_scales(weight_NK: Tensor) -> Tensor:
    """What a code of 1 is worth in each row, (N,); the same matrix asked for again, unchanged, is not read again."""
    state = (weight_NK._version, weight_NK.data_ptr())
    if _last.scale is None or _last.source() is not weight_NK or _last.state != state:
        scale = torch.linalg.vector_norm(weight_NK.detach(), float("inf"), dim=1) / LARGEST_CODE[torch.int8]
        _last.source, _last.state, _last.scale = weakref.ref(weight_NK), state, scale
    return _last.scale


class DenseProducts:
    """Products with W (N, K) into given memory, without autograd; with a `code_type` in 8 bits, of float32."""

    def __init__(self, weight_NK: Tensor, code_type: torch.dtype | None = None) -> None:
        self.weight, self.code_type = weight_NK.detach(), code_type
        self._scale = None if code_type is None else _row_scales(weight_NK)

    @property
    def row_bytes(self) -> int:
        """Bytes that a row (N,) takes as it goes back: float32 values and, in 8 bits, codes, with a scale and a start a part."""
        N = len(self.weight)
        return 4 * N + (0 if self.code_type is None else N + -(-N // PART) * 8)

    def forward(self, x_TK: Tensor, out_TN: Tensor) -> Tensor:
        """x W^T into `out_TN`."""
        if self._scale is None or self.code_type is None:
            return ops.matmul_dense(x_TK.contiguous(), self.weight, False, out_TN)
        rows = ops.quantize_rows(x_TK.contiguous(), None, self.code_type)
        return ops.matmul_8bit_dense(rows, self.weight, self._scale, False, out_TN)

    def backward(self, dy_TN: Tensor, out_TK: Tensor) -> Tensor:
        """dy W into `out_TK`."""
        if self._scale is None or self.code_type is None:
            return ops.matmul_dense(dy_TN, self.weight, True, out_TK)
        rows = ops.quantize_rows(dy_TN, self._scale, self.code_type)
        return ops.matmul_8bit_dense(rows, self.weight, self._scale, True, out_TK)
