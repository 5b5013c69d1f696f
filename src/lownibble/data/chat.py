"""Conversations to text, and which of it the assistant wrote.

A conversation is rendered by the tokenizer's own chat template, once, as `apply_chat_template` does it. Where the assistant's turns
are in that text is found in this order:

1. by the template's `{% generation %}` marks, where it has them;
2. by turn boundaries: the template is compiled a second time with a marker at the beginning and at the end of every pass of a loop
   over messages (Jinja's syntax tree is changed, not the text), rendered, and the markers are taken out again. What is left must
   be the plain rendering, character by character, or the markers are not believed;
3. by the turns' contents, looked for one after the other;
4. where none of it tells all turns apart: the last turn alone, from where the rendering of what comes before it (with the
   generation prompt) ends. `Rendered.only_last` says so.

A turn begins with its header ("<|im_start|>assistant"), which is the prompt's at inference and no label: as much of the template's
generation prompt as the turn begins with, in whole tokens, but never beyond where its content starts. It ends with the token that
closes it (the last special token followed by nothing but white space), or with the template's end-of-sequence token where that stands
after the last turn.

The cost is two renderings, whatever the number of turns. Rejected: rendering every prefix of the conversation (quadratic in its
turns, and many templates rewrite earlier turns: Qwen3 drops their reasoning, others end every rendering with the end of sequence);
a list of known templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from lownibble.errors import DataError, ModelError

_BEGIN, _END = 0xF0000, 0x100000  # planes of Unicode for private use; the turn's number is added
_MOST_TURNS = 0xFFFD
_MARKER = re.compile("[\U000f0000-\U0010fffd]")
_TURN = "lownibble_turn"
"""Key of a message that carries its number while the marked template is rendered."""


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: as the model sees it.
        spans: (start, end, number of the message) of what the assistant wrote, in characters.
        only_last: the template does not let all assistant turns be told apart, and `spans` has the last one only.
    """

    text: str
    spans: list[tuple[int, int, int]]
    only_last: bool = False


class ChatRenderer:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def template(self, tools: Any = None) -> str:
        """The template that the tokenizer takes.

        Raises:
            ModelError: it has none.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                "The tokenizer has no chat template, which messages and use_chat_template need. "
                "Take a chat (instruct) model, or give prompt_template and completion_template."
            )
        found: str = self.tokenizer.get_chat_template(tools=tools)
        return found

    def text(self, messages: list[dict[str, Any]], tools: Any = None, generation: bool = False) -> str:
        """The conversation as text; `generation` adds the header of the assistant's next turn.

        Raises:
            ModelError: the tokenizer has no chat template.
            DataError: the template refuses the conversation (the message is the template's).
        """
        return self._render(self._formed(messages), tools, generation)

    def _render(self, messages: list[dict[str, Any]], tools: Any, generation: bool) -> str:
        def render() -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation
            )
            return text

        self.template(tools)
        return _guarded(render)

    def rendered(self, messages: list[dict[str, Any]], tools: Any = None) -> Rendered:
        """The conversation as text, and what of it the assistant wrote.

        Raises:
            ModelError: the tokenizer has no chat template.
            DataError: the template refuses the conversation, or leaves nothing of an assistant turn.
        """
        messages = self._formed(messages)
        text = self._render(messages, tools, False)
        assistants = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not assistants:
            return Rendered(text, [])
        marked = self._by_marks(messages, tools, text, assistants)
        if marked is not None:
            return Rendered(text, marked)
        regions = self._by_loops(messages, tools, text)
        if regions is None or any(number not in regions for number in assistants):
            regions = _by_contents(messages, text, assistants)
        if regions is None:
            return self._last_turn(messages, tools, text, assistants[-1])
        spans = [self._trimmed(text, messages, number, *regions[number]) for number in assistants]
        for start, end, number in spans:
            if start >= end:
                raise DataError(
                    f"the chat template renders nothing of message {number + 1}, an assistant turn. Give it a content that the "
                    "template uses, or remove the turn."
                )
        return Rendered(text, spans)

    def _by_marks(
        self, messages: list[dict[str, Any]], tools: Any, text: str, assistants: list[int]
    ) -> list[tuple[int, int, int]] | None:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.template(tools)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        [rendered], [found] = render_jinja_template(
            [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        spans = [(start, end) for start, end in found if start < end]
        if rendered != text or not spans:
            return None
        if len(spans) == len(assistants):
            return [(start, end, number) for (start, end), number in zip(spans, assistants, strict=True)]
        regions = self._by_loops(messages, tools, text) or {}
        owner = {
            (start, end): next((n for n in assistants if n in regions and regions[n][0] <= start < regions[n][1]), assistants[-1])
            for start, end in spans
        }
        return [(start, end, owner[start, end]) for start, end in spans]

    def _by_loops(self, messages: list[dict[str, Any]], tools: Any, text: str) -> dict[int, tuple[int, int]] | None:
        """Number of a message -> (start, end) of what its pass of the template's loop gave; None where that cannot be told."""
        template = self.template(tools)
        if len(messages) > _MOST_TURNS or _MARKER.search(text):
            return None
        try:
            marked = _marked(template).render(
                messages=_aliased([{**message, _TURN: number} for number, message in enumerate(messages)]), tools=tools,
                documents=None, add_generation_prompt=False, **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception:
            return None  # the plain template has rendered this conversation; only the marked one has failed
        plain: list[str] = []
        length, last = 0, 0
        begun: dict[int, int] = {}
        regions: dict[int, tuple[int, int]] = {}
        open_turn: int | None = None

        def close(turn: int, at: int) -> None:
            if at > begun[turn] and marked_text_between(begun[turn], at):
                start = regions.get(turn, (begun[turn], at))[0]
                regions[turn] = (min(start, begun[turn]), at)

        def marked_text_between(start: int, end: int) -> bool:
            return end > start

        for found in _MARKER.finditer(marked):
            piece = marked[last : found.start()]
            plain.append(piece)
            length, last = length + len(piece), found.end()
            code = ord(found.group())
            turn = code - (_END if code >= _END else _BEGIN)
            if open_turn is not None:
                close(open_turn, length)  # also where `continue` skipped the end of the pass
                open_turn = None
            if code < _END:
                begun[turn], open_turn = length, turn
        plain.append(marked[last:])
        return regions if "".join(plain) == text else None

    def _trimmed(self, text: str, messages: list[dict[str, Any]], number: int, start: int, end: int) -> tuple[int, int, int]:
        """Of a turn's region what the assistant wrote: without the header, with the end of sequence after the last turn."""
        region, content = text[start:end], _plain_content(messages[number])
        limit = region.find(content.strip()) if content.strip() else -1
        header = self._common_header(region)
        start += header if limit < 0 else min(header, limit)
        eos = self.tokenizer.eos_token
        if eos and number == len(messages) - 1 and text[end:].lstrip().startswith(eos):
            end = text.index(eos, end) + len(eos)
        return start, end, number

    def _common_header(self, region: str) -> int:
        """Characters that a turn's region shares with the generation prompt, in whole tokens."""
        prompt = self.generation_prompt
        shared = next((n for n, (a, b) in enumerate(zip(prompt, region, strict=False)) if a != b), min(len(prompt), len(region)))
        if shared == len(prompt):
            return shared
        boundaries = [0]
        for token in _pieces(self.tokenizer, prompt):
            boundaries.append(boundaries[-1] + len(token))
        return max(boundary for boundary in boundaries if boundary <= shared)

    @cached_property
    def generation_prompt(self) -> str:
        """What the template adds where the assistant is to speak next; '' where that cannot be told."""
        probe = self._formed([{"role": "user", "content": "a"}])
        try:
            without, with_prompt = (self._render(probe, None, generation) for generation in (False, True))
        except DataError:
            return ""
        shared = next((n for n, (a, b) in enumerate(zip(without, with_prompt, strict=False)) if a != b), len(without))
        return with_prompt[shared:]

    def _last_turn(self, messages: list[dict[str, Any]], tools: Any, text: str, last: int) -> Rendered:
        before = self._render(messages[:last], tools, True) if last else ""
        shared = next((n for n, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
        content = _plain_content(messages[last]).strip()
        at = text.rfind(content) if content else -1
        if last != len(messages) - 1 or (shared < len(before) and at < 0) or shared >= len(text):
            raise DataError(
                "the chat template does not let the assistant's turns be told from the rest. Make the assistant turn the last of "
                "its row, or use another chat template."
            )
        return Rendered(text, [(shared if at < 0 or shared == len(before) else at, len(text), last)], only_last=True)

    @cached_property
    def _takes_parts(self) -> bool | None:
        """Whether the template reads a content as a list of parts (True), as text (False), or either (None)."""
        probe, reads = "lownibbleprobe", []
        for content in (probe, [{"type": "text", "text": probe}]):
            try:
                reads.append(_shows(self._render([{"role": "user", "content": content}], None, False), probe))
            except DataError:
                reads.append(False)
        return None if reads[0] == reads[1] else reads[1]

    def _formed(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with their contents in the form that the template reads."""
        if all(isinstance(message.get("content"), (str, type(None))) for message in messages) and self._reads_text:
            return messages
        return [self._form(message) for message in messages]

    @cached_property
    def _reads_text(self) -> bool:
        return self._takes_parts is not True

    def _form(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, str) and self._takes_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and self._takes_parts is not True and all(_is_text(part) for part in content):
            return {**message, "content": "".join(part if isinstance(part, str) else part["text"] for part in content)}
        return message


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("text"), str))


def _shows(rendered: str, probe: str) -> bool:
    """Whether the probe is in the text as it is, and not inside of a printed list of parts."""
    return probe in rendered and "'text'" not in rendered and '"text"' not in rendered


def _plain_content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content if _is_text(part))
    return content if isinstance(content, str) else ""


def _by_contents(messages: list[dict[str, Any]], text: str, assistants: list[int]) -> dict[int, tuple[int, int]] | None:
    """Regions by looking for each message's content after the one before; None where an assistant's is not found."""
    at, regions = 0, {}
    for number, message in enumerate(messages):
        content = _plain_content(message).strip()
        found = text.find(content, at) if content else -1
        if found >= 0:
            at = found + len(content)
            regions[number] = (found, at)
        elif number in assistants:
            return None
    return regions


def _pieces(tokenizer: Any, text: str) -> list[str]:
    """The tokens of a text, as text; the whole where the tokenizer does not say where they stand."""
    if not getattr(tokenizer, "is_fast", False):
        return [text]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    ends = sorted({end for _, end in offsets if end} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _guarded(render: Callable[[], str]) -> str:
    """Render; whatever a template does to a conversation becomes an error that says so."""
    from jinja2 import TemplateError

    try:
        return render()
    except TemplateError as error:
        raise DataError(f"the chat template refuses this conversation: {error} Mend the order of its roles.") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise DataError(
            f"the chat template cannot render this conversation ({type(error).__name__}: {error}). Mend its messages."
        ) from error


def _aliased(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers hands them to templates, with reasoning under all its names."""
    from transformers.utils import chat_template_utils

    aliased = getattr(chat_template_utils, "_alias_reasoning_fields", None)
    found: list[dict[str, Any]] = messages if aliased is None else aliased(messages)
    return json.loads(json.dumps(found))  # plain data: templates are untrusted


@lru_cache(maxsize=16)
def _marked(template: str) -> Any:
    """The template, compiled with markers around every pass of a loop over messages."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)

    def mark(name: str, base: int) -> nodes.Output:
        call = nodes.Call(nodes.Name("lownibble_mark", "load"), [nodes.Name(name, "load"), nodes.Const(base)], [], None, None)
        return nodes.Output([call])

    for loop in list(tree.find_all(nodes.For)):
        if isinstance(loop.target, nodes.Name):
            loop.body = [mark(loop.target.name, _BEGIN), *loop.body, mark(loop.target.name, _END)]
    for node in tree.find_all(nodes.Node):
        node.set_environment(environment)
    compiled = environment.from_string(tree)
    compiled.globals["lownibble_mark"] = _mark
    return compiled


def _mark(message: Any, base: int) -> str:
    number = message.get(_TURN) if isinstance(message, Mapping) else None
    return "" if number is None else chr(base + number)
