"""Engine requests, their events (`Scored`, `Piece`, `End`, `Failed`), and running sequences."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream
from torch import Tensor

from lownibble.decoding import How
from lownibble.errors import InputError
from lownibble.kernels.decoder import Adapter
from lownibble.lora.invocation import begin_of
from lownibble.serve.registry import Loaded
from lownibble.serve.sampling import Chosen, Constraint, Sampler, Sampling, check_finite, scored

TEXT_BEFORE = 8
"""Prompt tokens that the detokeniser sees before the output: with some tokenizers they decide whether it begins with a space."""


class Scored(NamedTuple):
    """The prompt's tokens with their log probabilities; the first has none. Told once, before the output."""

    tokens: list[Chosen]


class Piece(NamedTuple):
    """The text that a token added to the output; may be empty while a character or a stop string is incomplete."""

    text: str
    token: Chosen | None
    offset: int
    """Characters of the output from earlier tokens."""


class End(NamedTuple):
    """The request has ended; `reason` is 'stop', 'length' or 'cancelled'."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int
    first_s: float | None
    """Seconds from submission to the first token."""
    s: float


class Failed(NamedTuple):
    """The request could not be carried out."""

    error: Exception


Event = Scored | Piece | End | Failed


@dataclass(eq=False)
class Request:
    """One sequence to generate. `tell` is called from the engine's thread and must not block.

    Attributes:
        prompt: token ids; at least one.
        max_tokens: of the output; 0 reads the prompt only.
        adapter: name, or None for the base; `scale` multiplies its low-rank branch.
        stop, stop_tokens: strings and tokens that end the output and are not part of it.
        ignore_eos: the model's own end tokens do not end the output.
        continues: decode the output as a continuation of the prompt's text, including the space between them.
        keeps_special: special tokens are part of the text.
        score: number of top tokens to report for each token of the prompt; None: the prompt is not scored.
        constraint: what the output follows; of this request alone.
    """

    prompt: list[int]
    max_tokens: int
    tell: Callable[[Event], None]
    adapter: str | None = None
    scale: float = 1.0
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    continues: bool = False
    keeps_special: bool = False
    score: int | None = None
    constraint: Constraint | None = None
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)


def active_from(prompt: list[int], adapter: Adapter | None, tokenizer: Any) -> int:
    """From which position of a sequence on its adapter is active; what comes before is the base's.

    Raises:
        InputError: the prompt does not have the tokens that activate the adapter.
    """
    if adapter is None:
        return sys.maxsize
    if not adapter.invocation:
        return 0
    begin = begin_of(prompt, adapter.invocation)
    if begin is None:
        text = tokenizer.decode(list(adapter.invocation), skip_special_tokens=False)
        raise InputError(
            f"The prompt does not have the tokens {list(adapter.invocation)} ({text!r}) that activate this adapter (its "
            "alora_invocation_tokens). Send them, or leave the adapter out."
        )
    return begin


class Kept(NamedTuple):
    """What keys and values are of: the tokens, and the adapter (digest, scale) with the position from which on it is active."""

    key: tuple[str, float] | None
    tokens: list[int]
    active_from: int


NOTHING = Kept(None, [], 0)


def in_common(kept: Kept, wanted: Kept) -> int:
    """Tokens of a prompt whose keys and values can be reused; never the last one, whose logits are needed."""
    n = 0
    for ours, theirs in zip(kept.tokens, wanted.tokens[:-1], strict=False):
        if ours != theirs:
            break
        n += 1
    same = (kept.key, kept.active_from) == (wanted.key, wanted.active_from)
    return n if same else min(n, kept.active_from, wanted.active_from)  # up to there both are the base's


class Running:
    """A running sequence: a request in its slot of the key-value cache."""

    def __init__(self, request: Request, loaded: Loaded | None, tokenizer: Any) -> None:
        self.request, self.loaded = request, loaded
        self.slot = self.reused = 0  # until it is given a slot
        self.adapter: Adapter | None = loaded.scaled(request.scale) if loaded else None
        self.active_from = active_from(request.prompt, self.adapter, tokenizer)
        self.tokens = list(request.prompt)
        self.done = 0  # tokens whose keys and values are in the cache
        self.ahead: Running | None = None  # the sequence that has the first `shared` tokens of the prompt, or is reading them
        self.shared = 0
        self.sampler = Sampler(request.sampling, request.prompt, request.constraint)
        self.scores = [Chosen(request.prompt[0])]
        self.tokenizer = tokenizer
        before = request.prompt[-TEXT_BEFORE:] if request.continues else []
        self.stream = DecodeStream(before, skip_special_tokens=not request.keeps_special)
        said = tokenizer.decode(before, skip_special_tokens=True)
        # if the prompt ends within a character, the stream's first text is all of `before` with that character completed
        self.repeated = len(said.rstrip("\ufffd")) if said.endswith("\ufffd") else 0
        self.text = ""  # decoded, not yet sent
        self.told = 0  # characters sent
        self.first: float | None = None

    @property
    def kept(self) -> Kept:
        """What the keys and values of all its tokens are of."""
        key = (self.loaded.digest, self.request.scale) if self.loaded else ("", 1.0)
        return Kept(key, self.tokens, self.active_from)

    @property
    def made(self) -> int:
        """Number of output tokens so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def unread(self) -> int:
        """Number of tokens whose keys and values are not in the cache."""
        return len(self.tokens) - self.done

    def go_on(self, read: int, logits_V: Tensor, eos: Container[int]) -> str | None:
        """Score the next token of the prompt, or sample one of the output, by the logits (V,) after `read` tokens; returns as
        `take`."""
        request = self.request
        if read < len(request.prompt):
            check_finite(logits_V)
            self.scores.append(scored(logits_V, request.prompt[read], request.score or 0))
            return None
        if read == len(request.prompt):
            if request.score is not None:
                request.tell(Scored(self.scores))
            if request.max_tokens == 0:
                return "length"
        return self.take(self.sampler(logits_V), eos)

    @property
    def drawn_by(self) -> How | None:
        """How the next token may be drawn on the logits' device; None: the host needs the logits."""
        request, how = self.request, self.request.sampling
        if request.score is not None or request.constraint or request.max_tokens == 0:
            return None
        if how.logprobs is not None or how.logit_bias:
            return None
        return How(**{name: getattr(how, name) for name in How._fields})

    def go_on_with(self, token: int, eos: Container[int]) -> str | None:
        """Go on with a token drawn elsewhere; returns as `take`. Raises ArithmeticError for -1: its logits are not finite."""
        if token < 0:
            raise ArithmeticError("The model's logits are not finite.")
        return self.take(Chosen(token), eos)

    def take(self, chosen: Chosen, eos: Container[int]) -> str | None:
        """Append a token and send the text that is certain; returns the finish reason, None if generation continues."""
        request = self.request
        if self.first is None:
            self.first = time.monotonic()
        self.tokens.append(chosen.token)
        if chosen.token in request.stop_tokens or (chosen.token in eos and not request.ignore_eos):
            request.tell(Piece(self.text, None, self.told))
            return "stop"
        offset = self.told + len(self.text)
        self.text += self._decode(chosen.token)
        found = [at for text in request.stop if (at := self.text.find(text)) >= 0]
        if found:
            request.tell(Piece(self.text[: min(found)], chosen, offset))
            return "stop"
        complete = request.constraint is not None and request.constraint.accept(chosen.token)
        ends = complete or self.made == request.max_tokens
        held = 0 if ends else _could_begin(self.text, request.stop)
        sure = len(self.text) - held
        request.tell(Piece(self.text[:sure], chosen, offset))
        self.told, self.text = self.told + sure, self.text[sure:]
        return "stop" if complete else "length" if ends else None

    def _decode(self, token: int) -> str:
        try:
            text = self.stream.step(self.tokenizer, token) or ""
        except Exception:  # invalid bytes changed text already sent: restart without them
            self.stream = DecodeStream([], skip_special_tokens=not self.request.keeps_special)
            text = self.stream.step(self.tokenizer, token) or ""
        if text and self.repeated:
            text, self.repeated = text[self.repeated :], 0
        return text


def _could_begin(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    return max((n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)
