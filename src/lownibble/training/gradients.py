"""Gradients at the end of a step: summed over ranks, their norm, clipped."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lownibble.training.distributed import Ranks, buffer_for
from lownibble.training.sharding import Part


def add_up(losses: Sequence[Tensor], parts: Collection[Part], ranks: Ranks, device: torch.device) -> Tensor:
    """Sum a rank's losses, and the gradients that are not sharded, over ranks; returns the loss, () float32.

    A tensor that no rank's rows reached keeps no gradient, as in one process. What this needs is allocated before anything is
    exchanged, so that a rank without memory for it can tell the others.

    Raises:
        MemoryError: a rank has no memory for it (on all ranks; with shards on that one).
    """
    total = torch.stack(list(losses)).float().sum() if losses else torch.zeros((), device=device)
    whole = [part.parameter for part in parts if not part.is_shard]
    counts = ranks.total(*(int(parameter.grad is not None) for parameter in whole)) if whole else []
    summed = [total]

    def allocate() -> Tensor | None:
        for parameter, count in zip(whole, counts, strict=True):
            if count:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                summed.append(parameter.grad)
        return buffer_for(summed)

    ranks.add_up(summed, ranks.together(allocate))
    return total


def clip(parts: Collection[Part], ranks: Ranks, most: float | None, device: torch.device) -> Tensor:
    """Clip to the norm `most`, if given; returns the norm of all gradients before, (), on their `device`."""
    trained = [part.parameter for part in parts]
    if ranks.sharded:
        norm = _norm_of_shards(parts, ranks, device)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if most is not None:
        nn.utils.clip_grads_with_norm_(trained, most, norm)
    return norm


def _norm_of_shards(parts: Collection[Part], ranks: Ranks, device: torch.device) -> Tensor:
    """Of every rank's shards, and once of what is whole on each."""
    norms = []
    for shards in (True, False):
        held = [p.parameter.grad for p in parts if p.is_shard is shards and p.parameter.grad is not None]
        norms.append(nn.utils.get_total_norm(held).float() if held else torch.zeros((), device=device))
    squared = norms[0].square()
    ranks.add_up([squared])
    return (squared + norms[1].square()).sqrt()
