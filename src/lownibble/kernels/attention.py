"""Causal attention over segments and its gradients in plain torch (`ops.attention`), one segment at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def _segments(cu_seqlens: Tensor, T: int) -> list[tuple[int, slice]]:
    """(row, slice of its tokens) of each segment."""
    return [(a // T, slice(a % T, a % T + b - a)) for a, b in pairwise(cu_seqlens.tolist())]


def _scores(q_HLD: Tensor, k_HLD: Tensor, scaling: float) -> Tensor:
    scores_HLL = q_HLD @ k_HLD.transpose(1, 2) * scaling
    return scores_HLL.masked_fill(torch.ones_like(scores_HLL[0], dtype=torch.bool).triu(1), float("-inf"))


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """As `ops.attention`."""
    B, heads, T, D = q.shape
    group = heads // k.shape[1]
    out, lse = q.new_empty(B, T, heads, D), q.new_empty(B, T, heads)
    for row, part in _segments(cu_seqlens, T):
        scores_HLL = _scores(q[row, :, part], k[row, :, part].repeat_interleave(group, dim=0), scaling)
        out[row, part] = (scores_HLL.softmax(-1) @ v[row, :, part].repeat_interleave(group, dim=0)).transpose(0, 1)
        lse[row, part] = scores_HLL.logsumexp(-1).t()
    return out, lse.view(B * T, heads)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.attention_backward`."""
    B, heads, T, D = q.shape
    key_heads = k.shape[1]
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
    for row, part in _segments(cu_seqlens, T):
        queries, gradient = q[row, :, part], dout[row, part].transpose(0, 1)
        keys, values = (tensor[row, :, part].repeat_interleave(heads // key_heads, dim=0) for tensor in (k, v))
        p_HLL = (_scores(queries, keys, scaling) - lse.view(B, T, heads)[row, part].t().unsqueeze(2)).exp()
        delta_HL = (gradient * out[row, part].transpose(0, 1)).sum(-1, keepdim=True)
        ds_HLL = p_HLL * (gradient @ values.transpose(1, 2) - delta_HL) * scaling
        dq[row, :, part] = ds_HLL @ keys
        for target, full in ((dk, ds_HLL.transpose(1, 2) @ queries), (dv, p_HLL.transpose(1, 2) @ gradient)):
            target[row, :, part] = full.view(key_heads, heads // key_heads, -1, D).sum(1)
    return dq, dk, dv
