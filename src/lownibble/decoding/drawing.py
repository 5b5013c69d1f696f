"""Sampling of tokens on the device that the logits are on, for all rows of a step at once.

The order and the formulas are the host's (`serve/sampling.py`): penalties; temperature, min_p, top_k, top_p. Repetitions count in
prompt and output, presence and frequency in the output only. Greedy rows get the host's tokens; others are drawn from the same
distribution, with other random numbers: one for each token, a hash of the request's seed and the token's number (splitmix64), so
that a seeded request draws the same whatever else is running. The token is where the sum of probabilities passes it.

Everything is computed in double precision, as on the host, in shapes that do not depend on values: nothing waits for the device.
Rows are sorted only if they cut their distribution, and penalties are computed only where a row has some. Some rows are drawn at
once, then the next: so working memory does not grow with a step's rows (`most_bytes`).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lownibble.transfers import to_device

GREEDY = 1e-5
"""Temperatures below are greedy."""

_AT_ONCE = 2**21
"""Logits that are worked on at once: of 8 rows of 256,000 tokens, say. Fewer would be more launches for no less time."""

_WORK_BYTES = 88
"""Working memory per logit at most: 56 for what is held at once, and twice values and places for what sorting takes inside."""


class How(NamedTuple):
    """Sampling parameters of a request; the defaults are greedy and change nothing. top_k: 0 keeps all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def cuts(self) -> bool:
        """Whether less probable tokens are left out."""
        return self.temperature >= GREEDY and (self.top_p < 1 or self.min_p > 0 or self.top_k > 0)

    @property
    def penalises(self) -> bool:
        """Whether tokens that have come before change their logits."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)


def most_bytes(slots: int, vocabulary: int) -> int:
    """Bytes that a `Drawer` takes at most on its device: which tokens were in prompt and output, and working memory."""
    return slots * vocabulary * 5 + _WORK_BYTES * min(slots * vocabulary, max(_AT_ONCE, vocabulary))


class Drawer:
    """Draws the tokens of up to `slots` sequences."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._device, self._vocabulary, self._slots = device, vocabulary, slots
        self._how = [How()] * slots
        with torch.inference_mode(False):
            self._values = torch.zeros(slots, len(How._fields), dtype=torch.float64, device=device)
            self._seed = torch.zeros(slots, dtype=torch.int64, device=device)
            self._made = torch.zeros(slots, dtype=torch.int64, device=device)
        self._prompt: Tensor | None = None  # (slots, vocabulary) bool, and how often each token is in the output
        self._output: Tensor | None = None

    def begin(self, slot: int, how: How, prompt: Sequence[int], seed: int | None = None) -> None:
        """Begin a sequence in a slot; without a seed it has one of its own."""
        self._how[slot] = how
        self._values[slot].copy_(to_device(torch.tensor(how, dtype=torch.float64), self._device))
        self._seed[slot] = secrets.randbits(63) if seed is None else seed % 2**63
        self._made[slot] = 0
        if how.penalises:
            if self._prompt is None or self._output is None:
                with torch.inference_mode(False):
                    self._prompt = torch.zeros(self._slots, self._vocabulary, dtype=torch.bool, device=self._device)
                    self._output = torch.zeros(self._slots, self._vocabulary, dtype=torch.int32, device=self._device)
            self._prompt[slot].zero_().index_fill_(0, to_device(torch.tensor(prompt), self._device), True)
            self._output[slot].zero_()

    def __call__(self, logits_BV: Tensor, slots: Sequence[int]) -> Tensor:
        """(B,) int64 on the device: the next token of each slot, -1 where logits are not finite.

        logits_BV: (B, vocabulary), of the slots in order, no slot twice.
        """
        at_B, n = to_device(torch.tensor(slots), self._device), max(1, _AT_ONCE // self._vocabulary)
        parts = [
            self._tokens(logits_BV[i : i + n], at_B[i : i + n], [self._how[slot] for slot in slots[i : i + n]])
            for i in range(0, len(slots), n)
        ]
        self._made.index_add_(0, at_B, torch.ones_like(at_B))
        return torch.cat(parts)

    def _tokens(self, logits_BV: Tensor, at_B: Tensor, hows: list[How]) -> Tensor:
        values_BF, logits_BV = self._values[at_B], logits_BV.double()
        how = dict(zip(How._fields, values_BF.unsqueeze(-1).unbind(1), strict=True))
        edited_BV = logits_BV
        penalises = any(one.penalises for one in hows)
        if penalises:
            edited_BV = self._penalised(logits_BV, at_B, how)
        tokens_B = edited_BV.argmax(-1)
        for cut in (False, True):
            rows = [row for row, one in enumerate(hows) if one.temperature >= GREEDY and one.cuts == cut]
            if rows:
                its = to_device(torch.tensor(rows), self._device)
                drawn = self._drawn(edited_BV[its], at_B[its], {name: value[its] for name, value in how.items()}, cut)
                tokens_B = tokens_B.index_copy(0, its, drawn)
        if penalises:
            assert self._output is not None
            self._output[at_B, tokens_B] += 1
        return torch.where(logits_BV.isfinite().all(-1), tokens_B, -1)

    def _penalised(self, logits_BV: Tensor, at_B: Tensor, how: dict[str, Tensor]) -> Tensor:
        assert self._prompt is not None
        assert self._output is not None
        count_BV, repetition = self._output[at_B], how["repetition_penalty"]
        seen_BV = self._prompt[at_B] | (count_BV > 0)
        edited_BV = torch.where(logits_BV < 0, logits_BV * repetition, logits_BV / repetition)
        edited_BV = torch.where(seen_BV, edited_BV, logits_BV)
        return edited_BV - torch.where(count_BV > 0, how["frequency_penalty"] * count_BV + how["presence_penalty"], 0.0)

    def _drawn(self, logits_BV: Tensor, at_B: Tensor, how: dict[str, Tensor], cut: bool) -> Tensor:
        values_BV = (logits_BV / how["temperature"]).softmax(-1)
        ids_BV = None
        if cut:
            values_BV, ids_BV = values_BV.sort(dim=-1, descending=True, stable=True)
            rank_V, top_k = torch.arange(self._vocabulary, device=self._device), how["top_k"]
            values_BV.masked_fill_((rank_V >= top_k) & (top_k > 0), 0.0)
            values_BV.masked_fill_(values_BV < how["min_p"] * values_BV[:, :1], 0.0)
            values_BV /= values_BV.sum(-1, keepdim=True)
            before_BV = values_BV.cumsum(-1).sub_(values_BV)
            values_BV.masked_fill_((before_BV >= how["top_p"]) & (rank_V > 0), 0.0)  # the most probable token is always kept
            del before_BV
        sums_BV = values_BV.cumsum(-1)
        target_B1 = self._uniform(at_B).unsqueeze(1) * sums_BV[:, -1:]
        # the last place at which the sum still grows: rounding must not lead beyond it
        last_B = self._vocabulary - 1 - (values_BV > 0).flip(-1).to(torch.int8).argmax(-1)
        place_B = torch.minimum((sums_BV <= target_B1).sum(-1), last_B)
        return place_B if ids_BV is None else ids_BV.gather(1, place_B.unsqueeze(1))[:, 0]

    def _uniform(self, at_B: Tensor) -> Tensor:
        """(B,) float64 in [0, 1): splitmix64 of the seed and the number of the token; integers wrap."""
        z = self._seed[at_B] + (self._made[at_B] + 1) * _signed(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ _shifted(z, shift)) * _signed(factor)
        return _shifted(z ^ _shifted(z, 31), 11).double() * 2.0**-53


def _signed(word: int) -> int:
    """64 bits as a signed integer."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift 64 bits to the right, filling with zeros."""
    found: Tensor = (z >> by) & (2 ** (64 - by) - 1)
    return found
