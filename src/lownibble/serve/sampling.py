"""Sampling of tokens from logits: greedy or random, with a generator per request.

The order is vLLM's: bias of tokens, penalties, what a grammar allows; temperature, min_p, top_k, top_p. Formulas are those of
vLLM and transformers. Repetitions count in prompt and output, presence and frequency in the output only. Log probabilities are of
the model's own logits, before any of this. A request with none of these options does none of their work.

A seeded request draws the same random numbers whatever other requests are running.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

GREEDY = 1e-5
"""Temperatures below are greedy."""


class Sampling(NamedTuple):
    """Sampling parameters; the defaults are greedy and change nothing.

    top_k: 0 or less keeps all tokens. min_p: share of the largest probability that a token must have. logit_bias: pairs of token
    and what is added to its logit. logprobs: number of top tokens to report, None: no log probabilities.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class Chosen(NamedTuple):
    """A token, its log probability, the top tokens with theirs, and its rank (1 is the most probable)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class Constraint(Protocol):
    """A grammar that the output follows."""

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next."""

    def accept(self, token: int) -> bool:
        """Go on by a token; returns whether the output is complete and nothing may follow."""


def check_finite(logits_V: Tensor) -> None:
    """Raise ArithmeticError if logits are not finite."""
    if not torch.isfinite(logits_V).all():
        raise ArithmeticError("The model's logits are not finite.")


def scored(logits_V: Tensor, token: int, top: int) -> Chosen:
    """The token's log probability and rank, and the `top` most probable tokens."""
    log_V = logits_V.double().log_softmax(0)
    values, ids = log_V.topk(min(top, len(log_V)))
    rank = 1 + int((logits_V > logits_V[token]).sum())
    return Chosen(token, float(log_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)), rank)


class Sampler:
    """Samples the tokens of one sequence."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), constraint: Constraint | None = None) -> None:
        self.sampling, self.constraint = sampling, constraint
        self.generator = torch.Generator()
        self.generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63)
        self._counts: Counter[int] = Counter()  # of the output's tokens
        self._prompt = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._bias = tuple(map(torch.tensor, zip(*sampling.logit_bias, strict=True)))
        self._penalised = sampling.repetition_penalty != 1 or bool(sampling.presence_penalty or sampling.frequency_penalty)

    def __call__(self, logits_V: Tensor) -> Chosen:
        """Sample a token from the logits (V,); raises ArithmeticError if they are not finite."""
        check_finite(logits_V)
        how = self.sampling
        edited_V = self._edited(logits_V) if self._bias or self._penalised or self.constraint else logits_V
        token = int(edited_V.argmax()) if how.temperature < GREEDY else self._draw(edited_V)
        if self._penalised:
            self._counts[token] += 1
        return Chosen(token) if how.logprobs is None else scored(logits_V, token, how.logprobs)

    def _edited(self, logits_V: Tensor) -> Tensor:
        how, edited_V = self.sampling, logits_V.double()
        if self._bias:
            edited_V.index_add_(0, self._bias[0], self._bias[1].double())
        if how.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._prompt | self._counts.keys()), dtype=torch.int64)
            values = edited_V[seen]
            edited_V[seen] = torch.where(values < 0, values * how.repetition_penalty, values / how.repetition_penalty)
        if (how.presence_penalty or how.frequency_penalty) and self._counts:
            counts = torch.tensor(list(self._counts.values()), dtype=edited_V.dtype)
            edited_V[torch.tensor(list(self._counts))] -= how.frequency_penalty * counts + how.presence_penalty
        if self.constraint:
            edited_V.masked_fill_(~self.constraint.allowed(), -torch.inf)
        return edited_V

    def _draw(self, logits_V: Tensor) -> int:
        how = self.sampling
        probabilities_V = (logits_V.double() / how.temperature).softmax(0)
        if 0 < how.top_k < len(probabilities_V):
            values, ids = probabilities_V.topk(how.top_k)
        else:
            values, ids = probabilities_V.sort(descending=True, stable=True)
        if how.min_p > 0 or how.top_k > 0:
            values = torch.where(values < how.min_p * values[0], 0.0, values)
            values /= values.sum()
        before = values.cumsum(0) - values
        values = torch.where(before < how.top_p, values, 0.0)  # the most probable token is always kept
        values[0] = values[0].clamp_min(torch.finfo(values.dtype).tiny)
        return int(ids[torch.multinomial(values, 1, generator=self.generator)])
