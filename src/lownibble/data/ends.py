"""The tokens that end an answer: end of sequence, as model, generation config and tokenizer name it, and end of turn.

What ends a turn is in no file of its own; the chat template prints it. So a conversation with a sentinel answer is rendered, its
assistant's turns are found as training finds them (`chat.py`), and the special token that follows the sentinel is the one that a
model stops with: that of the conversation's last turn, or, where the template prints none there, of an earlier one. (gpt-oss ends
earlier turns with `<|end|>`, with which it also ends its reasoning.) Where several special tokens follow, it is the last of them;
white space ends their row. A call of tools may end with another token than an answer does, so one of those is rendered too.
"""

from __future__ import annotations

import re
from typing import Any

from lownibble.data.chat import ChatRenderer
from lownibble.errors import DataError, ModelError

PROBE = "lownibbleprobe"
"""The sentinel: an answer, and the name of a tool."""

_ASKED, _ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}
_PARAMETERS = {"type": "object", "properties": {"b": {"type": "string", "description": "c"}}, "required": ["b"]}
_TOOL = {"type": "function", "function": {"name": PROBE, "description": "a", "parameters": _PARAMETERS}}
_CALL = {"id": "lownibble", "type": "function", "function": {"name": PROBE, "arguments": {"b": "c"}}}
_CALLED = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RETURNED = {"role": "tool", "name": PROBE, "tool_call_id": "lownibble", "content": "d"}


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer of this model."""
    configs = (model.config.get_text_config(), model.config, model.generation_config)
    named = [getattr(config, "eos_token_id", None) for config in configs] + [tokenizer.eos_token_id]
    ends = {int(end) for ids in named if ids is not None for end in (ids if isinstance(ids, list) else [ids])}
    return frozenset(ends) | turn_ends(tokenizer)


def turn_ends(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens that end an assistant's turn in the tokenizer's chat template; empty where there are none."""
    chat = ChatRenderer(tokenizer)
    special = "|".join(re.escape(token) for token in chat.special_tokens)
    if not special:
        return frozenset()
    answers = _written(chat, [_ASKED, _ANSWERED, _ASKED, _ANSWERED], None)
    after = [re.match(rf"\s*(?:{special})*({special})", text.rpartition(PROBE)[2]) for text in reversed(answers)]
    called = [re.search(rf"({special})\s*$", text) for text in (written_call(chat),)]
    found = next((match for match in after if match), None)
    return frozenset(tokenizer.convert_tokens_to_ids(match[1]) for match in (found, *called) if match)


def written_call(chat: ChatRenderer) -> str:
    """What the template prints of an assistant's turn that calls `PROBE` with {"b": "c"}; "" where it knows no tools."""
    return next(iter(_written(chat, [_ASKED, _CALLED, _RETURNED, _ANSWERED], [_TOOL])), "")


def _written(chat: ChatRenderer, messages: list[dict[str, Any]], tools: Any) -> list[str]:
    """The text of each assistant's turn; [] where the template does not take such messages."""
    try:
        rendered = chat.rendered(messages, tools)
    except (DataError, ModelError):
        return []
    by_turn: dict[int, str] = {}
    for start, end, number in rendered.spans:
        by_turn[number] = by_turn.get(number, "") + rendered.text[start:end]
    return list(by_turn.values())
