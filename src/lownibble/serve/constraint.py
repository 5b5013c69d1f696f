"""Constrained decoding: outputs that follow a JSON schema or a grammar, by llguidance (ADR 40).

JSON is written as `json.dumps` writes it, with no other white space: a model that may put any amount of it puts too much of it.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
from torch import Tensor

from lownibble.errors import InputError

_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class ConstraintError(InputError):
    """Outputs cannot be constrained, or not to this schema."""


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: a fast tokenizer. size: number of logits. ends: the tokens that end an output.
    """

    def __init__(self, tokenizer: Any, size: int, ends: frozenset[int]) -> None:
        self.tokenizer, self.size, self.ends = tokenizer, size, ends
        self._made: Any = None
        self._lock = threading.Lock()

    def json(self, schema: dict[str, Any]) -> Matcher:
        """Outputs that are JSON of this schema.

        Raises:
            ConstraintError: the schema is not valid, or has keywords that are not known; llguidance is not installed, or does not
                know the tokenizer.
        """
        return self.lark(f"start: %json {as_schema(schema)}")

    def lark(self, grammar: str) -> Matcher:
        """Outputs of a grammar in llguidance's dialect of Lark; raises as `json`."""
        tokens = self._tokens()
        from llguidance import LLMatcher

        matcher = LLMatcher(tokens, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise ConstraintError(f"The schema cannot be followed: {matcher.get_error()[:500]}")
        return Matcher(matcher, self.size)

    def _tokens(self) -> Any:
        with self._lock:
            if self._made is None:
                try:
                    from llguidance import hf
                except ImportError:
                    raise ConstraintError(
                        "Response formats and required tools need llguidance. Install it: pip install 'lownibble[serve]'."
                    ) from None
                try:
                    self._made = hf.from_tokenizer(self.tokenizer, n_vocab=self.size, eos_token=sorted(self.ends) or None)
                except ValueError as error:
                    raise ConstraintError(f"Outputs of this model's tokenizer cannot be constrained: {error}.") from None
            return self._made


class Matcher:
    """One output that follows a grammar; `sampling.Constraint`."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def copy(self) -> Matcher:
        """The same grammar for another output."""
        return Matcher(self._matcher.deep_copy(), self._size)

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next; raises ConstraintError where the grammar has become too complex."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        return (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: self._size].bool()

    def accept(self, token: int) -> bool:
        """Go on by a token; returns whether the output is complete and nothing may follow. Raises as `allowed`."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"The schema cannot be followed to the end: {self._matcher.get_error()[:500]}")


def as_schema(schema: dict[str, Any]) -> str:
    """The schema for a grammar's `%json`, with the form in which JSON is written."""
    return json.dumps({**schema, "x-guidance": _FORM})
