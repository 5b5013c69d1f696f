"""Arguments of tool calls in messages. OpenAI has them as text that holds an object, datasets often as the object itself, and
chat templates want one of the two: many print an object as JSON, and a text as a string."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any


def with_arguments(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A message with the arguments of each of its tool calls changed."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_changed(call, change) for call in calls]} if isinstance(calls, list) else message


def as_object(arguments: Any) -> Any:
    """The object, if the arguments are text that holds one."""
    try:
        found = json.loads(arguments or "{}") if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else arguments


def as_other(arguments: Any) -> Any:
    """Text instead of an object, or an object instead of text."""
    if arguments is None or isinstance(arguments, str):
        return as_object(arguments)
    return json.dumps(arguments, ensure_ascii=False)


def prints_python(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether a template prints an object of arguments as Python writes it, and not as JSON."""
    calls = [call for message in messages for call in message.get("tool_calls") or [] if isinstance(call, Mapping)]
    found = [inner.get("arguments") for call in calls if isinstance(inner := call.get("function", call), Mapping)]
    objects = [arguments for arguments in found if isinstance(arguments, dict) and arguments]
    return any(str(each) in text and json.dumps(each, ensure_ascii=False) not in text for each in objects)


def _changed(call: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _changed(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call
