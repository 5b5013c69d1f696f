"""Decoding steps of one token of each row: argument types, and the operations in plain torch.

What differs from step to step (slots, positions, adapters of the rows) is in tensors on the device, and shapes do not depend on
it, so a step can be captured once in a graph and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lownibble.kernels.decoder import LowRank

RANK_STEP = 16
"""Ranks are padded with zeros to a multiple of this."""


class Attending(NamedTuple):
    """How a layer attends.

    scaling: of scores; None: D ** -0.5. window: last tokens that are seen, the own one among them. softcap: scores are
    `softcap * tanh(scores / softcap)`. sinks: (heads,), scores that take a share of the weight and have no value.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


PLAIN_ATTENTION = Attending()


class RowAdapters(NamedTuple):
    """Which adapter each row of a step has.

    Attributes:
        at: (B,) int64, the place of each row's adapter in the tables; -1: none.
        pointers: (places, linears, 2) int64, the addresses of A (r, K) and B (N, r), multiples of 16.
        ranks: (places, linears) int32, in units of `RANK_STEP`; 0: no branch.
        scales: (places, linears) float32; all are on the device.
        largest_r: of all ranks, a multiple of `RANK_STEP`.
        dtype: of A and B. touched: the linear layers that some adapter may have a branch for.
        branches: by place, the branches on the device, contiguous, their ranks a multiple of `RANK_STEP`, without gains.
    """

    at: Tensor
    pointers: Tensor
    ranks: Tensor
    scales: Tensor
    largest_r: int
    dtype: torch.dtype
    touched: frozenset[int]
    branches: Sequence[Sequence[LowRank | None]]


def attend_slots(
    q_BHD: Tensor, keys: Tensor, values: Tensor, slots_B: Tensor, positions_B: Tensor, how: Attending
) -> Tensor:  # fmt: skip
    """As `ops.attend_slots`: over the whole capacity, masked."""
    (B, H, D), n = q_BHD.shape, keys.shape[1]
    own_keys, own_values = keys.index_select(0, slots_B), values.index_select(0, slots_B)
    scores = (q_BHD.view(B, n, H // n, D) @ own_keys.transpose(2, 3)).float() * (how.scaling or D**-0.5)
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    place, own = torch.arange(keys.shape[2], device=q_BHD.device), positions_B.unsqueeze(1)
    unseen = place > own
    if how.window is not None:
        unseen |= place <= own - how.window
    scores.masked_fill_(unseen[:, None, None], -torch.inf)
    if how.sinks is not None:
        scores = torch.cat([scores, how.sinks.float().view(1, n, H // n, 1).expand(B, n, H // n, 1)], dim=-1)
    weights = scores.softmax(-1).to(q_BHD.dtype)[..., : keys.shape[2]]
    return (weights @ own_values).view(B, H, -1)


def add_low_rank_rows(y_TN: Tensor, x_TK: Tensor, adapters: RowAdapters, linear: int) -> None:
    """As `ops.add_low_rank_rows`: every adapter of the step for all rows, of which its own are taken."""
    for place, of_linears in enumerate(adapters.branches):
        if branch := of_linears[linear]:
            added = torch.mm(x_TK @ branch.A.t(), branch.B.t()).mul_(branch.scale)
            y_TN.add_(torch.where((adapters.at == place).unsqueeze(1), added, 0))
