"""Texts of single tokens, for log probabilities and /tokenize."""

from __future__ import annotations

from typing import Any


class TokenTexts:
    """The text that each token adds to those before it; where that is part of a character, the token as the vocabulary has it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        anchor = tokenizer("a", add_special_tokens=False).input_ids
        self._anchor, self._known = anchor, dict[int, str]()
        self._before = self._decode(anchor)

    def __call__(self, token: int) -> str:
        """The token's text."""
        if token not in self._known:
            text = self._decode([*self._anchor, token])
            text = text[len(self._before) :] if text.startswith(self._before) else self._decode([token])
            self._known[token] = self._tokenizer.id_to_token(token) or "" if "\ufffd" in text else text
        return self._known[token]

    def all(self, tokens: list[int]) -> str:
        """The text of tokens, special ones among them."""
        return self._decode(tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))
