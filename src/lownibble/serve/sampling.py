"""Sampling of tokens from logits: greedy, or temperature and top-p with a random generator per request.

A seeded request draws the same random numbers whatever other requests are running.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """Sampling parameters; `temperature` 0 is greedy. `logprobs`: number of top tokens to report, None: no log probabilities."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None


class Chosen(NamedTuple):
    """A token, its log probability, and the top tokens with theirs; from the raw logits, before temperature and top-p."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Samples the tokens of one sequence."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        self.generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63)

    def __call__(self, logits_V: Tensor) -> Chosen:
        """Sample a token from the logits (V,); raises ArithmeticError if they are not finite."""
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
        values = torch.where(before < self.sampling.top_p, values, 0.0)  # the most probable token is always kept
        values[0] = values[0].clamp_min(torch.finfo(values.dtype).tiny)
        return int(ids[torch.multinomial(values, 1, generator=self.generator)])
