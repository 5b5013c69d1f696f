"""Rows in the formats of other tools, made into the forms of `forms.py`.

    ShareGPT             conversations: [{from, value}], system                    -> messages
    Alpaca               instruction, input, output, system                        -> prompt, completion
    TRL, conversational  prompt: [{role, content}], completion: [{role, content}]  -> messages; the completion alone is trained
    messages as text     messages (or conversations) as a string of JSON           -> messages
    OpenAI, arrow        weight per turn; fields that are null because other rows have them -> absent

What a row does not need for this is left alone. A row that is none of these stays as it is.
"""

from __future__ import annotations

import json
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


def standard(fields: dict[str, Any]) -> dict[str, Any]:
    """The row's fields in a form that `forms.py` knows."""
    found = {**fields}
    for key in ("messages", "conversations", "tools"):
        if isinstance(found.get(key), str):
            found[key] = _parsed(found[key])
    if found.get("messages") is None and isinstance(found.get("conversations"), list):
        found = _share_gpt(found)
    elif _is_conversation(found.get("prompt")) and _is_conversation(found.get("completion")):
        found = _joined(found)
    elif _is_alpaca(found):
        found = _alpaca(found)
    conversations = [key for key in CONVERSATIONS if isinstance(found.get(key), list)]
    for key in conversations:
        found[key] = [_without_nulls(turn) if isinstance(turn, dict) else turn for turn in found[key]]
    if conversations and isinstance(found.get("tools"), list):
        found["tools"] = _without_inner_nulls(found["tools"])
    return found


def _is_alpaca(fields: dict[str, Any]) -> bool:
    own = any(fields.get(key) is not None for key in ("messages", "prompt", "completion"))
    return not own and isinstance(fields.get("instruction"), str) and isinstance(fields.get("output"), str)


def _parsed(text: str) -> Any:
    """The list that a string of JSON holds, or the string."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list) else text


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def _share_gpt(fields: dict[str, Any]) -> dict[str, Any]:
    turns = [_share_gpt_turn(turn) if isinstance(turn, dict) else turn for turn in fields["conversations"]]
    if isinstance(fields.get("system"), str) and fields["system"].strip():
        turns.insert(0, {"role": "system", "content": fields["system"]})
    return {**{key: value for key, value in fields.items() if key not in ("conversations", "system")}, "messages": turns}


def _share_gpt_turn(turn: dict[str, Any]) -> dict[str, Any]:
    if "from" not in turn or "value" not in turn:
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"], **rest}


def _joined(fields: dict[str, Any]) -> dict[str, Any]:
    turns = [{**turn, TRAIN: False} for turn in fields["prompt"]] + [{**turn} for turn in fields["completion"]]
    return {**{key: value for key, value in fields.items() if key not in ("prompt", "completion")}, "messages": turns}


def _alpaca(fields: dict[str, Any]) -> dict[str, Any]:
    parts = [fields.get("system"), fields["instruction"], fields.get("input")]
    prompt = "\n\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
    rest = {key: value for key, value in fields.items() if key not in ("messages", "prompt", "completion")}
    return {**rest, "prompt": f"{prompt}\n\n", "completion": fields["output"]}


def _without_nulls(turn: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in turn.items() if value is not None}
    if isinstance(found.get("tool_calls"), list):
        found["tool_calls"] = _without_inner_nulls(found["tool_calls"])
    return found


def _without_inner_nulls(value: Any) -> Any:
    """Objects without the keys that are null: Parquet gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_inner_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_inner_nulls(inner) for inner in value] if isinstance(value, list) else value
