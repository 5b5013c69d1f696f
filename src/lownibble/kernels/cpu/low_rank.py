"""The compiled low-rank kernels (`native/low_rank.h`): argument checks and ctypes calls."""

from __future__ import annotations

import torch
from torch import Tensor

from lownibble.kernels import plain
from lownibble.kernels.checks import check_factor, check_tensor
from lownibble.kernels.cpu.arguments import empty
from lownibble.kernels.cpu.loading import library

_CPU = torch.device("cpu")


def _runs(x: Tensor, r: int) -> bool:
    return x.dtype == torch.float32 and x.numel() > 0 and r > 0 and bool(library().has_low_rank())


def _factor(factor: Tensor, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Address, rank and strides of a factor."""
    check_factor(factor, shape, _CPU)
    return factor.data_ptr(), shape[1], factor.stride(0), factor.stride(1)


def low_rank(x_TC: Tensor, factor_Cr: Tensor, scale: float) -> Tensor:
    """As `ops.low_rank`: a float32 kernel on AVX-512, else torch."""
    (T, C), r = x_TC.shape, factor_Cr.shape[1]
    if not _runs(x_TC, r):
        return plain.low_rank(x_TC, factor_Cr, scale)
    check_tensor(x_TC, "x_TC", torch.float32, T * C, _CPU)
    factor, out_Tr = _factor(factor_Cr, (C, r)), empty(T, r)
    if library().low_rank(x_TC.data_ptr(), T, C, *factor, scale, out_Tr.data_ptr(), torch.get_num_threads()):
        raise MemoryError("No memory for a packed low-rank factor.")
    return out_Tr


def low_rank_backward(dy_TN: Tensor, x_TK: Tensor, low_Tr: Tensor, lora_B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.low_rank_backward`: a float32 kernel on AVX-512, else torch."""
    (T, N), K, r = dy_TN.shape, x_TK.shape[1], low_Tr.shape[1]
    if not _runs(dy_TN, r) or not _runs(x_TK, r):
        return plain.low_rank_backward(dy_TN, x_TK, low_Tr, lora_B, scale)
    check_tensor(dy_TN, "dy_TN", torch.float32, T * N, _CPU)
    check_tensor(x_TK, "x_TK", torch.float32, T * K, _CPU)
    check_tensor(low_Tr, "low_Tr", torch.float32, T * r, _CPU)
    factor = _factor(lora_B, (N, r))
    dlow_Tr, dB, dA = empty(T, r), empty(N, r), empty(r, K)
    sums = empty(library().low_rank_sums(T, N, K, r))
    failed = library().low_rank_backward(
        dy_TN.data_ptr(), x_TK.data_ptr(), low_Tr.data_ptr(), T, N, K, *factor, scale,
        dlow_Tr.data_ptr(), dB.data_ptr(), dA.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("No memory for a packed low-rank factor.")
    return dlow_Tr, dA, dB
