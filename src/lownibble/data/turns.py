"""Where the assistant's turns are in a rendered conversation: the parts that need no template (see `chat.py`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lownibble.errors import DataError

PART_ENDS = ">]:\n "
"""Characters that end a part of a header: a special token, a name, a line."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that may hold its reasoning."""

Span = tuple[int, int, int]
"""Start, end, and number of the message, of text that the assistant wrote; in characters, or in tokens."""

Regions = dict[int, list[tuple[int, int]]]
"""Number of a message -> [start, end) of the pieces of text that it gave."""


def header_end(header: str, region: str, content: str) -> int:
    """Where a turn's header ends. A template may print more before that of the first turn (a default system message)."""
    if region.startswith(header):
        return len(header)
    at = region.find(header)
    if at >= 0 and content in region[at + len(header) :]:
        return at + len(header)
    return next((n for n in range(shared_length(header, region), 0, -1) if header[n - 1] in PART_ENDS), 0)


def question_end(messages: list[dict[str, Any]], number: int, region: str, regions: Regions) -> int:
    """Where a turn's own content begins if the template prints inside of the turn what the user said before it, having printed
    nothing in the user's own pass; 0 if it does not."""
    at, first = 0, max((n for n in range(number) if messages[n]["role"] == "assistant"), default=0)
    for n in range(first, number):
        content = plain_content(messages[n]).strip()
        if messages[n]["role"] == "user" and n not in regions and content and (found := region.find(content, at)) >= 0:
            at = found + len(content)
    return max(at, region.find(plain_content(messages[number]).strip(), at)) if at else 0


def owner_of(at: int, regions: Regions, speaking: list[int]) -> int | None:
    """The assistant's message that printed a place in the text; None where none is known."""
    return next((n for n in speaking if any(start <= at < end for start, end in regions.get(n, []))), None)


def append(pieces: list[tuple[int, int]], start: int, end: int) -> None:
    """Add a piece, joined to the one before where they touch."""
    if pieces and pieces[-1][1] == start:
        start = pieces.pop()[0]
    pieces.append((start, end))


def shared_length(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def check_shown(messages: list[dict[str, Any]], number: int, written: str) -> None:
    """Raise where the template leaves out an assistant turn or its tool calls."""
    message = messages[number]
    content, calls = plain_content(message), message.get("tool_calls") or []
    fragments = [part.strip() for part in re.split(r"\n|<[^<>\s]*>", content) if part.strip()]
    names = [str(call.get("function", call).get("name")) for call in calls]
    said = written.casefold()
    shown = any(all(word in said for word in fragment.casefold().split()) for fragment in fragments)
    if not written or (fragments and not shown):
        raise DataError(
            f"the chat template renders nothing of message {number + 1}, an assistant turn. Give it a content that the template "
            "uses, remove the turn, or set its weight to 0."
        )
    if any(written.count(name) <= content.count(name) for name in names):
        raise DataError(
            f"the chat template does not render the tool calls of message {number + 1}. Use a model whose template knows tools, "
            "or write the calls into its content."
        )


def check_kept(messages: list[dict[str, Any]], text: str, tools: Any) -> None:
    """Raise where the template leaves out what somebody else than the assistant says, or the tools."""
    at = 0
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            continue
        for line in lines_of(message):
            found = text.find(line, at)
            if found < 0:
                found = max(text.find(line), text.find(json.dumps(line, ensure_ascii=False)[1:-1]))
            if found < 0:
                raise DataError(
                    f"the chat template leaves out message {number + 1}, whose role is '{message['role']}', or a part of it. "
                    "Give it a role that the template knows, or remove it."
                )
            at = max(at, found)
    given = [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)] if isinstance(tools, list) else []
    names = [tool["name"] for tool in given if isinstance(tool, Mapping) and isinstance(tool.get("name"), str)]
    if any(name not in text for name in names):
        raise DataError("the chat template leaves out the tools. Use a model whose template knows them, or remove the column.")


def lines_of(message: dict[str, Any]) -> list[str]:
    """The lines of a message's text that are not empty, part by part: a template may change what is between parts."""
    return [line.strip() for text in texts_of(message) for line in text.splitlines() if line.strip()]


def holds_answers(messages: list[dict[str, Any]], number: int, region: str, regions: Regions) -> bool:
    """Whether the answers of tools that follow a turn are printed inside of it, and not in passes of their own."""
    for answer in range(number + 1, len(messages)):
        if messages[answer]["role"] not in ("tool", "function", "ipython"):
            return False
        content = plain_content(messages[answer]).strip()
        if answer not in regions and content and content in region:
            return True
    return False


def is_text(part: Any) -> bool:
    """Whether a part of a content is text."""
    return isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("text"), str))


def texts_of(message: dict[str, Any]) -> list[str]:
    """The texts of a message's content, part by part."""
    content = message.get("content")
    if isinstance(content, list):
        return [part if isinstance(part, str) else str(part.get("text", "")) for part in content if is_text(part)]
    return [content] if isinstance(content, str) else []


def plain_content(message: dict[str, Any]) -> str:
    """The text of a message's content."""
    return "".join(texts_of(message))


def regions_by_contents(
    messages: list[dict[str, Any]], text: str, assistants: list[int], header: str, special: list[str]
) -> Regions | None:
    """Regions by looking for each message after the one before, an assistant's right after its header, with the special token
    that follows it; None where an assistant's is not there."""
    at = 0
    regions: Regions = {}
    for number, message in enumerate(messages):
        content = plain_content(message).strip()
        found = text.find(content, at) if content else -1
        if number in assistants:
            if header and (begin := text.find(header, at)) >= 0:
                begin += len(header)
                found = begin + len(text[begin:]) - len(text[begin:].lstrip())
            if not content or found < 0 or not text.startswith(content, found):
                return None
        if found >= 0:
            at = found + len(content)
            closing = next((token for token in special if text[at : at + 64].lstrip().startswith(token)), "")
            regions[number] = [(found, text.index(closing, at) + len(closing))]
    return regions
