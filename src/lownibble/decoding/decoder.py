"""What generation needs of a decoder: `Decoder` runs steps of tokens of any sequences, over the `Cache` of their contexts.

A step takes any number of tokens: a prompt, one token of one sequence, or one of each of many, with an adapter per range of
tokens. So one scheduler (`serve/engine.py`) and one loop (`generate.py`) serve every decoder: that of the CPU's compiled layers
(`cpu.py`), and transformers' own modules (`modules.py`). The tensors that say what a step is are on the host; where weights,
caches and logits are is the decoder's business, and an adapter has `prepared` for its form there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lownibble.errors import ModelError
from lownibble.kernels.decoder import Adapter, Segment

PROMPT_TOKENS = 256
"""Prompt tokens per prefill step; bounds the workspace, and what layers with a window keep beyond it."""


class RefusedError(ModelError):
    """A model that a decoder cannot decode; `why` is the reason alone."""

    def __init__(self, who: object, why: str) -> None:
        super().__init__(
            f"{type(who).__name__} cannot be decoded by Lownibble: {why}. Use transformers' own loop (leave custom_generate out)."
        )
        self.why = why


class Cache(Protocol):
    """The contexts of `slots` sequences of up to `capacity` tokens."""

    slots: int
    capacity: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def reach(self, slot: int, n: int) -> int:
        """After how many of a slot's first n tokens a sequence can go on."""

    def resume(self, slot: int, n: int) -> int:
        """Prepare a slot to go on after its first n tokens; returns after how many it can: `reach`."""


@runtime_checkable
class Forking(Protocol):
    """A cache in which a sequence can begin as another does."""

    def fork(self, source: int, target: int, n: int) -> None:
        """Copy the first n tokens of a slot, which must be in reach, to another."""

    def mark(self, slot: int, n: int) -> None:
        """Let sequences go on after the first n tokens of the one that begins in a slot, however long it gets."""


class Decoder(ABC):
    """A model, ready for decoding steps.

    Attributes:
        note: one line for the user: which decoder this is, and why.
        paths: by layer, the paths of the linear layers and experts' weights that adapters may change, in the order of an
            adapter's branches.
        unread: paths of linear layers that no text passes through, whose branches in an adapter change nothing here.
        draws: logits are on another device than the host, which had better get tokens only (`drawing.py`).
        prompt_tokens: tokens of prompts that a step may as well have: with fewer it takes as long.
    """

    model: Any
    note: str
    paths: Sequence[Sequence[str]]
    unread: Set[str] = frozenset()
    draws: bool = False
    prompt_tokens: int = 0

    @abstractmethod
    def cache(self, slots: int, capacity: int) -> Cache:
        """An empty cache.

        Raises:
            ModelError: the model cannot attend to `capacity` tokens here.
        """

    @abstractmethod
    def slot_bytes(self, capacity: int) -> int:
        """Bytes of a cache's slot."""

    def warm_up(self, cache: Any) -> None:  # noqa: B027 - optional
        """Compile, load and capture what steps on an empty cache will need, so that no sequence waits for it."""

    @abstractmethod
    def step(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, *, segments: Sequence[Segment] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run one decoding step, which adds the tokens to their slots' contexts.

        Args:
            tokens, slots, positions: (T,) int64 on the host: token ids, and the cache slot and position of each. A slot's tokens
                lie together, in order, at most `PROMPT_TOKENS` or `prompt_tokens` of them.
            segments: token ranges and their adapters; default: the model's active adapter for all tokens.
            wanted: (W,) int64 on the host, indices of the tokens whose logits are needed; default: all.
        Returns:
            (W, vocabulary) logits of the next token, on the model's device.
        """

    def prompt(
        self, tokens: Tensor, slot: int, cache: Any, *, position: int = 0, adapter: Adapter | None = None, active_from: int = 0
    ) -> Tensor:
        """Prefill `slot` with a prompt (T,), T > 0, from `position` on; returns (1, vocabulary) logits after its last token.
        `adapter`: on the tokens from `active_from` on; default: the model's active one."""
        at_once = max(PROMPT_TOKENS, self.prompt_tokens)
        for begin in range(0, len(tokens), at_once):
            part = tokens[begin : begin + at_once]
            positions = torch.arange(position + begin, position + begin + len(part))
            active = max(0, active_from - begin)
            segments = None if adapter is None else [Segment(active, len(part), adapter)] * (active < len(part))
            last = torch.tensor([len(part) - 1])
            logits = self.step(part, torch.full_like(positions, slot), positions, cache, segments=segments, wanted=last)
        return logits
