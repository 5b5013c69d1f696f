"""Operations that torch does well enough where there is no kernel of ours: the reference's, and CUDA's."""

from __future__ import annotations

from torch import Tensor


def softmax_rows(x_LV: Tensor, scale: float) -> Tensor:
    """As `ops.softmax_rows`."""
    largest_L1 = x_LV.amax(1, keepdim=True)
    x_LV.sub_(largest_L1).exp_()
    total_L1 = x_LV.sum(1, keepdim=True)
    x_LV.mul_(scale / total_L1)
    return (largest_L1 + total_L1.log()).squeeze(1)


def gemv_bf16(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """As `ops.gemv_bf16`."""
    return x_TK @ weight_NK.float().t()
