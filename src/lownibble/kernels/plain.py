"""Plain torch operations for backends without a kernel of their own: reference, Triton, and CPUs that lack the instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lownibble.kernels import decoded
from lownibble.kernels.types import IGNORED, Epilogue, FourBit, Grouped, Scaled8bit, Stack, of_expert


def sum_8bit(base: Scaled8bit, low_Nr: Tensor, lora_A: Tensor) -> Tensor:
    """decode(base) + low_Nr @ lora_A, (N, K) float32, in the buffer that all layers share."""
    total = decoded.scratch(base.codes.shape, torch.float32, base.codes.device)
    torch.mul(base.codes.view(-1, base.group), base.scale.unsqueeze(1), out=total.view(-1, base.group))
    return total.addmm_(low_Nr, lora_A)


def softmax_rows(x_LV: Tensor, scale: float | Tensor) -> Tensor:
    """Replace each row of `x_LV` (L, V) float32 by `scale` times its softmax; returns its log-sum-exp (L,)."""
    largest_L1 = x_LV.amax(1, keepdim=True)
    x_LV.sub_(largest_L1).exp_()
    total_L1 = x_LV.sum(1, keepdim=True)
    x_LV.mul_(total_L1.reciprocal() * scale)
    return (largest_L1 + total_L1.log()).squeeze(1)


def cross_entropy(
    logits_LV: Tensor, labels_L: Tensor, scale: float | Tensor, wants_gradient: bool,
    softmax: Callable[[Tensor, float | Tensor], Tensor] = softmax_rows,
) -> Tensor:  # fmt: skip
    """As `ops.cross_entropy`, around a `softmax_rows`."""
    ignored_L = labels_L == IGNORED
    label_L1 = labels_L.masked_fill(ignored_L, 0).unsqueeze(1)
    scores_LV = logits_LV.float()  # float32 logits themselves
    chosen_L = scores_LV.gather(1, label_L1).squeeze(1)
    loss_L = softmax(scores_LV, scale) - chosen_L
    if wants_gradient:
        scores_LV.scatter_(1, label_L1, scores_LV.gather(1, label_L1) - scale)
        scores_LV.index_fill_(0, ignored_L.nonzero().squeeze(1), 0)  # a mask would be another pass over all rows
        if scores_LV is not logits_LV:
            logits_LV.copy_(scores_LV)
    return loss_L.masked_fill_(ignored_L, 0)


def gemv_bf16(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """As `ops.gemv_bf16`."""
    return x_TK @ weight_NK.float().t()


def low_rank(x_TC: Tensor, factor_Cr: Tensor, scale: float) -> Tensor:
    """As `ops.low_rank`."""
    factor = factor_Cr.to(x_TC.dtype)
    if scale == 1:
        return x_TC @ factor
    return x_TC.new_empty(len(x_TC), factor.shape[1]).addmm_(x_TC, factor, beta=0, alpha=scale)


def low_rank_backward(dy_TN: Tensor, x_TK: Tensor, low_Tr: Tensor, lora_B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.low_rank_backward`; on CUDA the gradients of 16-bit factors are not rounded to 16 bits."""
    dlow_Tr = low_rank(dy_TN, lora_B, scale)
    dtype = torch.promote_types(lora_B.dtype, torch.float32)
    if dy_TN.is_cuda and dy_TN.dtype != dtype:
        return dlow_Tr, outer_float32(dlow_Tr, x_TK), outer_float32(dy_TN, low_Tr).mul_(scale)
    dB = (low_Tr.t() @ dy_TN).mul_(scale).t().to(dtype).contiguous()
    return dlow_Tr, (dlow_Tr.t() @ x_TK).to(dtype), dB


def outer(a_TP: Tensor, b_TQ: Tensor, out: Tensor | None = None, adds: bool = False) -> Tensor:
    """As `ops.outer`."""
    return out.addmm_(a_TP.t(), b_TQ) if adds and out is not None else torch.mm(a_TP.t(), b_TQ, out=out)


def outer_float32(a_TP: Tensor, b_TQ: Tensor) -> Tensor:
    """a^T b (P, Q) in float32; on CUDA it is not rounded to 16 bits before."""
    if a_TP.is_cuda and a_TP.dtype != torch.float32:
        return torch.mm(a_TP.t(), b_TQ, out_dtype=torch.float32)
    return (a_TP.t() @ b_TQ).float()


def _rows(ends_E: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = max(start, end)


def matmul_experts(
    matmul_4bit: Callable[..., Tensor], matmul_grouped: Callable[..., Tensor], x_SC: Tensor, weights: Stack, ends_E: Tensor,
    transposed: bool, epilogue: Epilogue,
) -> Tensor:  # fmt: skip
    """As `ops.matmul_experts`: a loop over experts that have rows, around the products of one matrix."""
    out = x_SC.new_zeros(len(x_SC), weights.shape[2 if transposed else 1])
    for expert, rows in _rows(ends_E):
        own, one = epilogue, of_expert(weights, expert)
        if epilogue.low is not None and epilogue.factor is not None:
            own = Epilogue(None, epilogue.low[rows], epilogue.factor[expert], epilogue.scale)
        product: Any = matmul_4bit if isinstance(one, FourBit) else matmul_grouped if isinstance(one, Grouped) else _matmul
        out[rows] = product(x_SC[rows], one, transposed, own)
    return out


def _matmul(x_TC: Tensor, weight_NK: Tensor, transposed: bool, epilogue: Epilogue) -> Tensor:
    return decoded.matmul_dense(x_TC, weight_NK.to(x_TC.dtype), transposed, epilogue)


def outer_experts(a_SP: Tensor, b_SQ: Tensor, ends_E: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """As `ops.outer_experts`: a loop over experts that have rows."""
    out = a_SP.new_zeros(len(ends_E), a_SP.shape[1], b_SQ.shape[1], dtype=dtype)
    for expert, rows in _rows(ends_E):
        out[expert] = (a_SP[rows].t() @ b_SQ[rows]).mul_(scale)
    return out
