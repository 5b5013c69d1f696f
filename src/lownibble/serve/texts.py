"""Texts of single tokens, for log probabilities and /tokenize."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile("<0x([0-9A-F]{2})>")


class TokenTexts:
    """The text that each token adds to those before it; where that is part of a character, the token as the vocabulary has it."""

    def __init__(self, tokenizer: Any) -> None:
        self._whole, self._tokenizer = tokenizer, tokenizer.backend_tokenizer
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

    def utf8(self, token: int) -> bytes:
        """The token's text in UTF-8; its own bytes where it is part of a character."""
        text = self(token)
        if text == self._tokenizer.id_to_token(token) and "\ufffd" in self._decode([*self._anchor, token]):
            if byte := _BYTE.fullmatch(text):
                return bytes([int(byte[1], 16)])
            if all(letter in self._bytes for letter in text):
                return bytes(self._bytes[letter] for letter in text)
        return text.encode()

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """Letter of a byte-level vocabulary -> its byte."""
        return {letter: byte for byte, letter in bytes_to_unicode().items()}

    def starts(self, prompt: str | list[int], *, special: bool) -> list[int]:
        """Where each token begins in the prompt's text: in the string, or in what the tokens decode to (`all`). Special tokens
        that encoding adds to a string have no width."""
        found, end = list[int](), 0
        if isinstance(prompt, str):
            for begin, after in self._whole(prompt, add_special_tokens=special, return_offsets_mapping=True).offset_mapping:
                found.append(min(begin, end) if after else end)
                end = max(end, after)
            return found
        stream = DecodeStream([], skip_special_tokens=False)
        for token in prompt:
            found.append(end)
            try:
                end += len(stream.step(self._tokenizer, token) or "")
            except Exception:  # bytes that are no text
                stream = DecodeStream([], skip_special_tokens=False)
        return found

    def all(self, tokens: list[int]) -> str:
        """The text of tokens, special ones among them."""
        return self._decode(tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))
