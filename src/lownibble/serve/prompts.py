"""From a request's messages and texts to tokens.

Whatever the chat template would leave out without a word (a role it does not know, tools, a variable that it does not read) is
refused: it would change nothing, and the client would not know.
"""

from __future__ import annotations

import json
from typing import Any

from lownibble.data.chat import ChatRenderer
from lownibble.data.turns import check_kept
from lownibble.errors import DataError, ModelError
from lownibble.serve.protocol import Message, Rendering, Tool
from lownibble.serve.service import ApiError


def conversation_text(chat: ChatRenderer, how: Rendering, messages: list[Message], tools: list[Tool]) -> str:
    """The conversation as the chat template renders it.

    Raises:
        ApiError: the template does not take it, or leaves something of it out.
    """
    given = [tool.model_dump(exclude_none=True) for tool in tools] or None
    try:
        template = chat.template(given)
        turns = [_turn(message, "developer" in template) for message in messages]
        options = _options(chat, given, how.chat_template_kwargs or {})
        if how.continue_final_message:
            options["continue_final_message"] = True
        text = chat.text(turns, given, how.generation, **options)
        kept = [{**turn, "content": ""} if turn["role"] == "tool" else turn for turn in turns]  # some print it in another form
        check_kept(kept, text, given)
    except (DataError, ModelError) as error:
        raise ApiError(400, str(error), param="messages") from None
    return text


def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a text, with or without the special tokens that the tokenizer adds.

    Raises:
        ApiError: the text is no valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, "The text holds a lone surrogate. Send valid Unicode.", param="prompt") from None
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    return ids


def _turn(message: Message, knows_developer: bool) -> dict[str, Any]:
    """The message as templates take it."""
    role = "system" if message.role == "developer" and not knows_developer else message.role
    turn: dict[str, Any] = {"role": role, "content": message.text}
    turn |= {key: value for key in ("name", "reasoning_content", "tool_call_id") if (value := getattr(message, key)) is not None}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return turn


def _arguments(text: str) -> str:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, f"The arguments of a tool call are no JSON object: '{text[:64]}'.", param="messages")
    return text or "{}"


def _options(chat: ChatRenderer, tools: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The template's variables that a request sets; raises ApiError for what is none."""
    known = chat.variables(tools) if given else set()
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ApiError(
            400, f"The chat template has no variable '{unknown[0][:64]}'. It has: {', '.join(sorted(known)) or 'none'}.",
            param="chat_template_kwargs",
        )  # fmt: skip
    return dict(given)
