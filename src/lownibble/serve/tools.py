"""Tool calls: the form in which a chat template prints them, read back from an output, and as a grammar for it.

The form is found by rendering a call (`data/ends.py`). Three kinds are known: each call as JSON between two marks (Hermes, Qwen:
`<tool_call>`), a list of calls as JSON after a mark (Mistral: `[TOOL_CALLS]`), and a call as JSON that is the whole answer (Llama
3.1). Where a template prints calls otherwise, tools are refused.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from lownibble.data.chat import ChatRenderer
from lownibble.data.ends import PROBE, written_call
from lownibble.serve.constraint import as_schema
from lownibble.serve.protocol import Tool

_KEYS = ("arguments", "parameters")
_DECODER = json.JSONDecoder()


class CallForm(NamedTuple):
    """How a template prints calls.

    Attributes:
        before, after: what is printed around the JSON of a call, or of a list of calls; marks, and white space between them.
        key: of the call's arguments.
        listed: the JSON is a list of calls.
        special: `before` has special tokens, which a decoded text has only if it keeps them.
    """

    before: str
    after: str
    key: str
    listed: bool
    special: bool


class Call(NamedTuple):
    """A call: the function's name and its arguments as JSON text."""

    name: str
    arguments: str

    def told(self, index: int | None = None) -> dict[str, Any]:
        """The call in OpenAI's shape; `index`: its number in a stream."""
        number = {} if index is None else {"index": index}
        function = {"name": self.name, "arguments": self.arguments}
        return {**number, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def call_form(chat: ChatRenderer) -> CallForm | None:
    """The form of calls in a chat template; None where it is none of those that are known."""
    text = written_call(chat).strip()
    for start in (place for place, letter in enumerate(text) if letter in "{["):
        try:
            found, end = _DECODER.raw_decode(text, start)
        except ValueError:
            continue
        [call] = found if isinstance(found, list) and len(found) == 1 else [found]
        if not isinstance(call, dict) or call.get("name") != PROBE:
            continue
        key = next((key for key in _KEYS if key in call), None)
        before, after = text[:start].lstrip(), text[end:].rstrip()
        for token in chat.special_tokens:  # what ends the turn is no part of a call
            after = after.removesuffix(token).rstrip()
        if key is None or PROBE in before + after:
            return None
        special = any(token in before for token in chat.special_tokens)
        return CallForm(before, after, key, isinstance(found, list), special)
    return None


def call_grammar(form: CallForm, tools: list[Tool], *, several: bool, tokenizer: Any) -> str:
    """A grammar (llguidance's Lark) of outputs that call one or several of the tools and say nothing else."""
    several = several and bool(form.before)
    more_calls, more_of_list = (' ("\\n" call)*' * (several and not form.listed), ' (", " one)*' * several)
    lines = [
        f"start: call{more_calls}",
        f"call: {' '.join([*_literals(form.before, tokenizer), 'body', *_literals(form.after, tokenizer)])}",
        f'body: "[" one{more_of_list} "]"' if form.listed else "body: one",
        f"one: {' | '.join(f'one_{number}' for number in range(len(tools)))}",
    ]
    for number, tool in enumerate(tools):  # a rule of its own for each schema: its references are to its own root
        head = f'{{"name": {json.dumps(tool.function.name)}, {json.dumps(form.key)}: '
        lines.append(f'one_{number}: {json.dumps(head)} arguments_{number} "}}"')
        lines.append(f"arguments_{number}: %json {as_schema(tool.function.parameters or {'type': 'object'})}")
    return "\n".join(lines)


def _literals(text: str, tokenizer: Any) -> list[str]:
    """The text in a grammar: a mark that is a token is that token."""
    mark = text.strip()
    if not mark:
        return [json.dumps(text)] if text else []
    token = tokenizer.get_vocab().get(mark)
    middle = json.dumps(mark) if token is None else f"<[{token}]>"
    space, rest = text[: text.index(mark)], text[text.index(mark) + len(mark) :]
    return [json.dumps(space)] * bool(space) + [middle] + [json.dumps(rest)] * bool(rest)


class CallReader:
    """Reads the calls out of an output as it grows. What turns out to be none stays text: nothing is lost.

    Args:
        names: of the functions that may be called.
        most: calls that are kept; None: all.
    """

    def __init__(self, form: CallForm, names: set[str], most: int | None = None) -> None:
        self.begin, self.end, self.names = form.before.strip(), form.after.strip(), names
        self.most = most
        self.held = ""
        self.made = 0  # calls told
        self.plain = False  # the answer has no mark of a call and is text

    def feed(self, text: str, *, last: bool = False) -> list[str | Call]:
        """What is certain after some more text; `last`: it is the end of the output."""
        self.held += text
        found: list[str | Call] = []
        for part in self._marked(last) if self.begin else self._whole(last):
            self.made += isinstance(part, Call)
            if isinstance(part, str) or self.most is None or self.made <= self.most:
                found.append(part)
        return found

    def _whole(self, last: bool) -> Iterator[str | Call]:
        if not self.plain and (not self.held.strip() or self.held.lstrip()[0] == "{") and not last:
            return
        text, self.held = self.held, ""
        calls = [] if self.plain or not last else self._calls(text.strip())
        if calls:
            yield from calls
        elif text:
            self.plain = True
            yield text

    def _calls(self, text: str) -> list[Call]:
        """The calls that a text consists of, with white space or semicolons between them; [] if it is anything else."""
        found: list[Call] = []
        while text:
            try:
                value, end = _DECODER.raw_decode(text)
            except (ValueError, RecursionError):
                return []
            more = self._as_calls(value)
            if not more:
                return []
            found, text = found + more, text[end:].lstrip("; \n")
        return found

    def _marked(self, last: bool) -> Iterator[str | Call]:
        while (at := self.held.find(self.begin)) >= 0:
            if said := self.held[:at].rstrip():
                yield said
            body, self.held = self.held[at + len(self.begin) :].lstrip(), self.held[len(said) :]
            found: list[Call] = []
            if self.end in body:
                try:
                    value, end = _DECODER.raw_decode(body)
                except (ValueError, RecursionError):
                    value, end = None, 0
                if body[end:].lstrip().startswith(self.end):
                    found, rest = self._as_calls(value), body[end:].lstrip()[len(self.end) :]
            if found:
                yield from found
                self.held = rest
            elif last:
                break
            else:
                return
        sure = len(self.held) if last else len(self.held) - _could_begin(self.held, self.begin)
        text, self.held = self.held[:sure], self.held[sure:]
        if not last or self.made:
            self.held, text = text[len(text.rstrip()) :] + self.held, text.rstrip()
        if text:
            yield text

    def _as_calls(self, value: Any) -> list[Call]:
        found = []
        for each in value if isinstance(value, list) else [value]:
            name = each.get("name") if isinstance(each, dict) else None
            if not isinstance(name, str) or name not in self.names:
                return []
            arguments: Any = next((each[key] for key in _KEYS if key in each), {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            found.append(Call(name, text))
        return found


def _could_begin(text: str, mark: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
