"""Rows in the formats of other tools, made into the forms of `forms.py`.

    ShareGPT             conversations: [{from, value}], system                    -> messages
    Alpaca               instruction, input, output, system                        -> prompt, completion
    TRL, conversational  prompt: [{role, content}], completion: [{role, content}]  -> messages; the completion alone is trained
    messages as text     messages (or conversations) as a string of JSON; columns of
                         preferences, prompt and completion too, where it is messages -> messages
    OpenAI, arrow        weight per turn; fields that are null because other rows have them -> absent
    OpenAI, before 2024  function_call, and the role `function`                    -> tool_calls, and `tool`

What a row does not need for this is left alone. A row that is none of these stays as it is.

Parquet and arrow give every object the keys of all others, null where it has none; so have JSON files that are written from them.
Such nulls inside of calls and tools are taken away. Where the calls of a column, or the tools, differ in their keys, nulls are
meant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""ShareGPT's names for who speaks -> chat templates'; others are kept."""

CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")
"""Columns that may be lists of messages."""

TRAIN = "train"
"""Key of a message that says whether its turn is trained."""


def standard(fields: dict[str, Any], *, padded: bool = True) -> dict[str, Any]:
    """The row's fields in a form that `forms.py` knows. `padded`: see `is_padded`."""
    found = {**fields}
    for key in ("messages", "conversations", "tools"):
        if isinstance(found.get(key), str):
            found[key] = _parsed(found[key])
    for names in (("chosen", "rejected"), ("prompt", "completion")):
        found |= _conversations(found, names)
    if found.get("messages") is None and isinstance(found.get("conversations"), list):
        found = _share_gpt(found)
    elif _is_conversation(found.get("prompt")) and _is_conversation(found.get("completion")):
        found = _joined(found)
    elif _is_alpaca(found):
        found = _alpaca(found)
    conversations = [key for key in CONVERSATIONS if isinstance(found.get(key), list)]
    for key in conversations:
        turns = [_without_nulls(turn, padded) if isinstance(turn, dict) else turn for turn in found[key]]
        found[key] = _with_tool_calls(turns)
    if conversations and isinstance(found.get("tools"), list) and padded:
        found["tools"] = _without_inner_nulls(found["tools"])
    return found


def is_padded(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether nulls in objects may be those of a file that gives all of them the same keys: no two calls, nor tools, of a column
    differ in theirs."""
    keys_of: dict[str, set[Any]] = {}
    for fields in rows:
        for column, found in _objects_of(fields):
            known = keys_of.setdefault(column, set())
            known.add(frozenset(found))
            if len(known) > 1:
                return False
    return True


def n_asked(turns: list[Any]) -> int:
    """Number of the messages that stood in `prompt` before `standard` joined it and `completion`."""
    marked = (isinstance(turn, dict) and turn.get(TRAIN) is False for turn in turns)
    return next((n for n, is_marked in enumerate(marked) if not is_marked), len(turns))


def _objects_of(fields: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Columns of a row with what is given to each call in them, and the properties of each tool."""
    for column in (*CONVERSATIONS, "conversations"):
        for turn in fields[column] if isinstance(fields.get(column), list) else []:
            for function in _functions(turn.get("tool_calls") if isinstance(turn, dict) else None):
                if isinstance(arguments := function.get("arguments"), dict):
                    yield column, arguments
    for function in _functions(fields.get("tools")):
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and isinstance(properties := parameters.get("properties"), dict):
            yield "tools", properties


def _functions(calls: Any) -> Iterator[dict[str, Any]]:
    """The functions of a list of calls or tools."""
    for call in calls if isinstance(calls, list) else []:
        if isinstance(call, dict) and isinstance(function := call.get("function", call), dict):
            yield function


def _conversations(fields: dict[str, Any], names: tuple[str, str]) -> dict[str, Any]:
    """Columns that both are messages as a string of JSON, parsed, and a prompt beside them; {} for others."""
    texts = {name: fields[name] for name in (*names, "prompt") if isinstance(fields.get(name), str)}
    found = {name: value for name, text in texts.items() if _is_conversation(value := _parsed(text), "content")}
    return found if all(name in found for name in names) else {}


def _is_alpaca(fields: dict[str, Any]) -> bool:
    own = any(fields.get(key) is not None for key in ("messages", "prompt", "completion"))
    return not own and isinstance(fields.get("instruction"), str) and fields.get("output") is not None


def _parsed(text: str) -> Any:
    """The list that a string of JSON holds, or the string."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _is_conversation(value: Any, *more: str) -> bool:
    keys = {"role", *more}
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and keys <= turn.keys() for turn in value)


def _share_gpt(fields: dict[str, Any]) -> dict[str, Any]:
    turns = [_share_gpt_turn(turn) if isinstance(turn, dict) else turn for turn in fields["conversations"]]
    if isinstance(fields.get("system"), str) and fields["system"].strip():
        turns.insert(0, {"role": "system", "content": fields["system"]})
    return {**{key: value for key, value in fields.items() if key not in ("conversations", "system")}, "messages": turns}


def _share_gpt_turn(turn: dict[str, Any]) -> dict[str, Any]:
    if turn.get("from") is None or "value" not in turn:
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    return {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"], **rest}


def _joined(fields: dict[str, Any]) -> dict[str, Any]:
    turns = [{**turn, TRAIN: False} for turn in fields["prompt"]] + [{**turn} for turn in fields["completion"]]
    return {**{key: value for key, value in fields.items() if key not in ("prompt", "completion")}, "messages": turns}


def _alpaca(fields: dict[str, Any]) -> dict[str, Any]:
    parts = [_as_text(fields.get(name)) for name in ("system", "instruction", "input")]
    wrong = next((part for part in parts if part is not None and not isinstance(part, str)), None)  # `forms.py` refuses it
    prompt = "\n\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
    rest = {key: value for key, value in fields.items() if key not in ("messages", "prompt", "completion")}
    return {**rest, "prompt": f"{prompt}\n\n" if wrong is None else wrong, "completion": _as_text(fields["output"])}


def _as_text(value: Any) -> Any:
    """A number as text; others as they are, and what pandas writes for nothing as null."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return str(value) if isinstance(value, (int, float)) else value


def _without_nulls(turn: dict[str, Any], padded: bool) -> dict[str, Any]:
    found = {key: value for key, value in turn.items() if value is not None}
    if isinstance(calls := found.get("tool_calls"), list):
        found["tool_calls"] = _without_inner_nulls(calls) if padded else [_without_own_nulls(call) for call in calls]
    return found


def _without_own_nulls(call: Any) -> Any:
    return {key: value for key, value in call.items() if value is not None} if isinstance(call, dict) else call


def _without_inner_nulls(value: Any) -> Any:
    """Objects without the keys that are null."""
    if isinstance(value, dict):
        return {key: _without_inner_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_inner_nulls(inner) for inner in value] if isinstance(value, list) else value


def _with_tool_calls(turns: list[Any]) -> list[Any]:
    """A conversation with its `function_call`s, which templates do not know, as tool calls, and what answers them as a tool's."""
    if not any(isinstance(turn, dict) and isinstance(turn.get("function_call"), dict) for turn in turns):
        return turns
    return [_with_tool_call(turn) if isinstance(turn, dict) else turn for turn in turns]


def _with_tool_call(turn: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in turn.items() if key != "function_call"}
    if isinstance(call := turn.get("function_call"), dict) and not turn.get("tool_calls"):
        rest["tool_calls"] = [{"type": "function", "function": call}]
    return {**rest, "role": "tool"} if turn.get("role") == "function" else rest
