"""Preference rows, with TRL's column names, as prompt and answers.

    paired     prompt, chosen, rejected; or chosen and rejected alone, which begin with the prompt (implicit)
    unpaired   prompt, completion, label (true: a good answer)

Each column is text, or a list of messages. An implicit prompt is what both answers begin with (of text: without a space at its
end, as TRL has it; rows of one question may so have different prompts). A prompt that both answers repeat is taken off them. A
text `prompt` beside conversations is either their last question, and left alone, or the question that the answers lack.

Only what the columns mean is decided here; `preference.py` checks and tokenises them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lownibble.data.dialects import TRAIN, n_asked
from lownibble.errors import DataError

Said = str | list[dict[str, Any]]
"""Text, or messages."""

PAIRED = ("chosen", "rejected")


class Preference(NamedTuple):
    """A prompt; its answers, chosen and rejected, or one with a label; and the tools that the prompt offers."""

    prompt: Said
    answers: tuple[Said, ...]
    tools: Any = None
    label: bool | None = None


def is_paired(fields: dict[str, Any]) -> bool:
    """Whether a row has a chosen and a rejected answer."""
    return all(name in fields for name in PAIRED)


def pair_of(fields: dict[str, Any]) -> Preference:
    """The preference of a row with `chosen` and `rejected`.

    Raises:
        DataError: a column is missing or of another type, or the prompt cannot be told from the answers.
    """
    for name in PAIRED:
        if name not in fields:
            listed = ", ".join(fields) or "none"
            raise DataError(f"the field '{name}' is missing; the row has {listed}. Give prompt, chosen and rejected.")
    chosen, rejected, prompt = (_said(fields.get(name), name) for name in (*PAIRED, "prompt"))
    if chosen is None or rejected is None:
        name = "chosen" if chosen is None else "rejected"
        raise DataError(f"the field '{name}' is null. Fill it, or remove the row.")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError("one of 'chosen' and 'rejected' is text, the other messages. Give both in one form.")
    if chosen == rejected:
        raise DataError("'chosen' and 'rejected' are the same, which says nothing. Mend or remove the row.")
    tools = fields.get("tools")
    if isinstance(chosen, str):
        assert isinstance(rejected, str)
        if isinstance(prompt, list):
            raise DataError("'prompt' is messages, and the answers are text. Give all three in one form.")
        if prompt is None:
            prompt = chosen[: _shared_text(chosen, rejected)]
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            if not prompt.strip():
                raise DataError("'chosen' and 'rejected' do not begin alike, and there is no 'prompt'. Give the row a prompt.")
        elif _repeats(chosen, prompt) and _repeats(rejected, prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return Preference(prompt, (chosen, rejected), tools)
    assert isinstance(rejected, list)
    shared = _shared_turns(chosen, rejected)
    if isinstance(prompt, list):
        if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return Preference(prompt, (chosen, rejected), tools)
    if shared == 0 and isinstance(prompt, str):
        return Preference([{"role": "user", "content": prompt}], (chosen, rejected), tools)
    if shared == 0:
        raise DataError("'chosen' and 'rejected' begin with different messages, and there is no 'prompt'. Give the row a prompt.")
    if isinstance(prompt, str) and not any(turn.get("content") == prompt for turn in chosen[:shared]):
        raise DataError("'prompt' is not what 'chosen' and 'rejected' answer. Make them agree, or leave out 'prompt'.")
    return Preference(chosen[:shared], (chosen[shared:], rejected[shared:]), tools)


def labelled_of(fields: dict[str, Any]) -> list[Preference]:
    """The labelled answers of a row: its completion, or its chosen and its rejected one.

    Raises:
        DataError: a column is missing or of another type, or the label is not true or false.
    """
    if is_paired(fields) and "completion" not in fields and "label" not in fields:
        pair = pair_of(fields)
        return [
            Preference(pair.prompt, (answer,), pair.tools, good) for answer, good in zip(pair.answers, (True, False), strict=True)
        ]
    joined = isinstance(fields.get("messages"), list) and "completion" not in fields
    for name in ("label",) if joined else ("prompt", "completion", "label"):
        if fields.get(name) is None:
            listed = ", ".join(fields) or "none"
            raise DataError(f"the field '{name}' is missing; the row has {listed}. Give prompt, completion and label.")
    label = fields["label"]
    if isinstance(label, str):  # all cells of a CSV file are text
        label = {"true": True, "false": False}.get(label.strip().lower(), label)
    if not isinstance(label, bool):
        raise DataError(f"the label must be true or false, and is {label!r}. Write true for a good answer, false for a bad one.")
    if joined:
        prompt, completion = _parted(fields["messages"])
    else:
        prompt, completion = _said(fields["prompt"], "prompt"), _said(fields["completion"], "completion")  # type: ignore[assignment]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError("one of 'prompt' and 'completion' is text, the other messages. Give both in one form.")
    return [Preference(prompt, (completion,), fields.get("tools"), label)]


def _said(value: Any, name: str) -> Said | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return value
    what = "an empty list" if value == [] else f"{type(value).__name__} ({str(value)[:40]})"
    raise DataError(f"the field '{name}' must be text or a list of messages, and is {what}. Mend or remove the row.")


def _parted(turns: list[Any]) -> tuple[Said, Said]:
    """Prompt and completion of a conversation: joined by `dialects.py`, which marks the prompt; else the last answer is it."""
    turns = [turn if isinstance(turn, dict) else {} for turn in turns]
    marked = n_asked(turns)
    last = max((n for n, turn in enumerate(turns) if turn.get("role") == "assistant"), default=len(turns))
    bare = [{key: value for key, value in turn.items() if key != TRAIN} for turn in turns]
    return bare[: marked or last], bare[marked or last :]


def _repeats(answer: str, prompt: str) -> bool:
    """Whether an answer begins with the prompt, and goes on after it with another word."""
    rest = answer[len(prompt) :]
    return answer.startswith(prompt) and bool(prompt and rest) and not (prompt[-1].isalnum() and rest[0].isalnum())


def _shared_text(one: str, other: str) -> int:
    """Characters that two texts begin with alike, without a space at the end."""
    count = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return count - (count > 0 and one[count - 1] == " ")


def _shared_turns(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
