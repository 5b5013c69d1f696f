"""From logits to a token: greedy, or by temperature and top-p with a generator of the request's own.

A seeded request draws the same numbers whatever else runs beside it.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How tokens are chosen; `temperature` 0 is greedy. `logprobs`: how many most probable tokens are told, None: none."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


class Chosen(NamedTuple):
    """A token, the logarithm of its probability, and the most probable tokens with theirs; of the model, before sampling."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        self.generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63)

    def __call__(self, logits_V: Tensor) -> Chosen:
        """Choose from the logits (V,)."""
        if not torch.isfinite(logits_V).all():
            raise ArithmeticError("The model's logits are not finite.")
        how = self.sampling
        token = int(logits_V.argmax()) if how.temperature == 0 else self._draw(logits_V)
        if how.logprobs is None:
            return Chosen(token)
        log_V = logits_V.double().log_softmax(0)
        values, ids = log_V.topk(how.logprobs)
        return Chosen(token, float(log_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _draw(self, logits_V: Tensor) -> int:
        probabilities_V = (logits_V.double() / self.sampling.temperature).softmax(0)
        values, ids = probabilities_V.sort(descending=True, stable=True)
        before = values.cumsum(0) - values
        values = torch.where(before < self.sampling.top_p, values, 0.0)  # the first is always kept
        values[0] = values[0].clamp_min(torch.finfo(values.dtype).tiny)
        return int(ids[torch.multinomial(values, 1, generator=self.generator)])
