"""Conversations to text, and which of it the assistant wrote.

A conversation is rendered by the tokenizer's own chat template, as `apply_chat_template` does it. The assistant's turns are then
found in the text, in this order:

1. by the template's `{% generation %}` marks, where it has them;
2. by turn boundaries: the template is compiled a second time with a marker before and after every pass of a loop over messages
   (Jinja's syntax tree is changed, not the text), rendered, and the markers are taken out again. The rest must equal the plain
   rendering character by character, or the markers are not used;
3. by the turns' contents, searched for one after the other;
4. where none of these tells all turns apart: the last turn alone, from the end of the rendering of what precedes it (with the
   generation prompt) on. `Rendered.only_last` says so.

A turn begins with its header ("<|im_start|>assistant"), which belongs to the prompt at inference and is no label: the generation
prompt without what opens a reasoning, or, where the template adds none, what it prints before a probe's content. A turn ends
with the token that closes it (the last special token, followed by nothing but white space), also where the template prints that
after the turn, or as the beginning of the next one.

The cost is two renderings, whatever the number of turns. Rejected: rendering every prefix of the conversation (quadratic in its
turns, and many templates rewrite earlier turns: Qwen3 drops their reasoning, others end every rendering with the end-of-sequence
token); a list of known templates.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, NamedTuple, TypeVar

from lownibble.data.calls import as_object, as_other, prints_python, with_arguments
from lownibble.data.turns import (
    REASONING_KEYS,
    Regions,
    Span,
    append,
    check_kept,
    check_shown,
    header_end,
    holds_answers,
    is_text,
    lines_of,
    owner_of,
    plain_content,
    question_end,
    regions_by_contents,
    shared_length,
    texts_of,
)
from lownibble.errors import DataError, ModelError

_T = TypeVar("_T")

_TURN = "lownibble_turn"
"""Key of a message that carries its number while the marked template is rendered."""

REASONING = ("<think>", "<|START_THINKING|>", "[THINK]", "<|channel>thought", "<|inner_prefix|>")
"""What opens a model's reasoning. A generation prompt may end with one; in a training row it is part of the answer."""


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: as the model sees it.
        spans: what the assistant wrote, in order; a turn may have several.
        marked: the spans are the template's own marks.
        only_last: the template does not let all assistant turns be told apart, and `spans` has the last one only.
        unsaid: the template leaves out the reasoning of the last turn. (Many leave out that of earlier ones, by design.)
    """

    text: str
    spans: list[Span]
    marked: bool = False
    only_last: bool = False
    unsaid: bool = False


class ChatRenderer:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._reads = dict[str, bool | None]()

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
        try:
            found: str = self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise ModelError(f"The tokenizer's chat templates cannot be used: {str(error).partition(chr(10))[0]}") from None
        return found

    def variables(self, tools: Any = None) -> set[str]:
        """Names of the template's own variables, which `text` takes as options."""
        from jinja2 import meta
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template = self.template(tools)

        def read() -> set[str]:
            return meta.find_undeclared_variables(_compile_jinja_template(template).environment.parse(template))

        set_by_us = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, *self.tokenizer.special_tokens_map}
        return _guarded(read) - set_by_us - {"messages", "raise_exception", "strftime_now"}

    def text(self, messages: list[dict[str, Any]], tools: Any = None, generation: bool = False, **options: Any) -> str:
        """The conversation as text; `generation` adds the header of the assistant's next turn. `options` are those of
        `apply_chat_template`, and variables of the template.

        Raises:
            ModelError: the tokenizer has no chat template.
            DataError: the template refuses the conversation (the message is the template's).
        """
        return self._either(self._formed(messages), tools, generation, **options)[1]

    def _either(
        self, messages: list[dict[str, Any]], tools: Any, generation: bool, **options: Any
    ) -> tuple[list[dict[str, Any]], str]:  # fmt: skip
        """The messages in the form that the template takes, and their text. Beside calls, no content is an empty one to templates
        that want text."""
        try:
            return self._called(messages, tools, generation, **options)
        except DataError:
            silent = [bool(message.get("tool_calls")) and message.get("content") is None for message in messages]
            if not any(silent):
                raise
            pairs = zip(messages, silent, strict=True)
            filled = [self._form({**message, "content": ""}) if none else message for message, none in pairs]
            return self._called(filled, tools, generation, **options)

    def _called(
        self, messages: list[dict[str, Any]], tools: Any, generation: bool, **options: Any
    ) -> tuple[list[dict[str, Any]], str]:  # fmt: skip
        """The messages, with the arguments of their calls in the form that the template takes, and their text: text that holds an
        object is tried as the object first."""
        parsed = [with_arguments(message, as_object) for message in messages]
        if parsed != messages:
            try:
                text = self._render(parsed, tools, generation, **options)
            except DataError:
                text = ""
            if text and not prints_python(parsed, text):
                return parsed, text
        try:
            return messages, self._render(messages, tools, generation, **options)
        except DataError:
            other = [with_arguments(message, as_other) for message in messages]
            if other == messages:
                raise
            return other, self._render(other, tools, generation, **options)

    def _render(self, messages: list[dict[str, Any]], tools: Any, generation: bool, **options: Any) -> str:
        def render() -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generation, **options
            )
            return text

        self.template(tools)
        return _guarded(render)

    def rendered(self, messages: list[dict[str, Any]], tools: Any = None, trained: Sequence[bool] | None = None) -> Rendered:
        """The conversation as text, and what of it the assistant wrote, in turns that are `trained` (default: all).

        Raises:
            ModelError: the tokenizer has no chat template.
            DataError: the template refuses the conversation, or leaves nothing of an assistant turn.
        """
        messages, text = self._either(self._formed(messages), tools, False)
        check_kept(messages, text, tools)
        speaking = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [number for number in speaking if trained is None or trained[number]]
        if not wanted:
            return Rendered(text, [])
        marked = self._by_marks(messages, tools, text, speaking)
        if marked is not None:
            found = Rendered(text, [span for span in marked if span[2] in wanted], marked=True)
        else:
            found = self._by_turns(messages, tools, text, wanted)
        written: dict[int, str] = {}
        for start, end, number in found.spans:
            written[number] = written.get(number, "") + text[start:end]
        for number in wanted[-1:] if found.only_last else wanted:
            check_shown(messages, number, written.get(number, ""))
        reasoning = [messages[wanted[-1]].get(name) for name in REASONING_KEYS] if wanted[-1] == speaking[-1] else []
        lines = [line for said in reasoning for line in lines_of({"content": said})]
        return found._replace(unsaid=any(line not in text for line in lines))

    def _by_turns(self, messages: list[dict[str, Any]], tools: Any, text: str, wanted: list[int]) -> Rendered:
        """The wanted turns by boundaries or contents, or the last one."""
        regions = self._by_loops(messages, tools, text)
        by_contents = regions is None or any(number not in regions for number in wanted)
        if by_contents:
            regions = regions_by_contents(messages, text, wanted, self.header, self.special_tokens)
        if regions is None:
            return self._last_turn(messages, tools, text, wanted)
        known, header = regions, "" if by_contents else self.header
        spans = [
            (start, end, number)
            for number in wanted
            for start, end in self._written(text, messages, tools, number, known, header)
        ]
        return Rendered(text, spans)

    def _by_marks(self, messages: list[dict[str, Any]], tools: Any, text: str, speaking: list[int]) -> list[Span] | None:
        """The template's own marks; None where it has none, or they cannot be told apart."""
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
        regions = self._by_loops(messages, tools, text) or {}
        owners = [owner_of(start, regions, speaking) for start, _ in spans]
        if None in owners and len(spans) == len(speaking):
            owners = list(speaking)
        last = max((end for _, end in regions.get(speaking[-1], [])), default=0 if len(speaking) == 1 else len(text) + 1)
        known = [speaking[-1] if own is None and start >= last else own for (start, _), own in zip(spans, owners, strict=True)]
        return None if None in known else [(*span, own) for span, own in zip(spans, known, strict=True) if own is not None]

    def _by_loops(self, messages: list[dict[str, Any]], tools: Any, text: str) -> Regions | None:
        """What each message's pass of the template's loops printed; None where that cannot be told."""
        sign = next(sign for n in count() if (sign := f"\ue000{n}\ue001") not in text)

        def mark(message: Any, loop: int, begins: bool) -> str:
            number = message.get(_TURN) if isinstance(message, Mapping) else None
            return "" if number is None else f"{sign}{number}{'+' if begins else '-'}{loop}\ue001"

        try:
            marked = _marked(self.template(tools)).render(
                messages=_aliased([{**message, _TURN: number} for number, message in enumerate(messages)]), tools=tools,
                documents=None, add_generation_prompt=False, lownibble_mark=mark, **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception:
            return None  # the plain template has rendered this conversation; only the marked one has failed
        plain: list[str] = []
        length, last = 0, 0
        within: list[tuple[int, int]] = []  # (message, loop) of the passes around the place
        regions: Regions = {}
        for found in [*re.finditer(f"{sign}(\\d+)([+-])(\\d+)\ue001", marked), None]:
            piece = marked[last : found.start()] if found else marked[last:]
            plain.append(piece)
            if piece and within:
                append(regions.setdefault(within[-1][0], []), length, length + len(piece))
            length += len(piece)
            if found:
                last, number, loop = found.end(), int(found[1]), int(found[3])
                while any(loop == other for _, other in within):  # its end, or a new pass where `continue` skipped the end
                    within.pop()
                if found[2] == "+":
                    within.append((number, loop))
        return regions if "".join(plain) == text else None

    def _written(
        self, text: str, messages: list[dict[str, Any]], tools: Any, number: int, regions: Regions, header: str
    ) -> list[tuple[int, int]]:
        """Of what a turn printed what the assistant wrote: without its header and the tools' answers, with the token that ends it
        where that is printed after it."""
        (start, end), *others = regions[number]
        if holds_answers(messages, number, text[start:end], regions):
            end = start + self._length_alone(messages, tools, number, text[start:end])
        own = header_end(header, text[start:end], plain_content(messages[number]).strip())
        start += max(own, question_end(messages, number, text[start:end], regions))
        found, last = [(start, end), *others], (others or [(start, end)])[-1][1]
        rest = text[last:].lstrip()
        closed = text[start:last].rstrip().endswith(tuple(self.special_tokens))
        eos = self.tokenizer.eos_token
        following = next((token for token in self.special_tokens if rest.startswith(token)), "")
        if eos and number == len(messages) - 1 and rest.startswith(eos):
            found.append((at := text.index(eos, last), at + len(eos)))
        elif following and not closed and not self.header.startswith(following):
            found.append((at := text.index(following, last), at + len(following)))  # a token that ends it, or begins the next
        return found

    def _length_alone(self, messages: list[dict[str, Any]], tools: Any, number: int, region: str) -> int:
        """Characters of a region that stay when the turn is the conversation's last: some templates print the tools' answers
        inside of the turn that called them."""
        first = max((n for n in range(number) if messages[n]["role"] == "user"), default=0)
        before = messages[:1] if first and messages[0]["role"] in ("system", "developer") else []
        alone = [*before, *messages[first : number + 1]]
        try:
            regions = self._by_loops(alone, tools, text := self._render(alone, tools, False)) or {}
        except DataError:
            return len(region)
        pieces = regions.get(len(alone) - 1, [])
        return shared_length(region, text[pieces[0][0] : pieces[0][1]]) if pieces else len(region)

    @cached_property
    def header(self) -> str:
        """What stands before an assistant's answer: the generation prompt, or, where the template has none, what it prints before
        the content of an assistant turn."""
        if self.generation_prompt:
            return self.generation_prompt
        probe = "lownibbleprobe"
        messages = self._formed([{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}])
        try:
            text = self._render(messages, None, False)
        except DataError:
            return ""
        [(start, end), *_] = (self._by_loops(messages, None, text) or {}).get(1) or [(0, 0)]
        before = text[start:end].partition(probe)[0] if probe in text[start:end] else ""
        return before if before.strip() else ""

    @cached_property
    def generation_prompt(self) -> str:
        """The header of an assistant turn that the template adds for generation, without what opens the reasoning."""
        probe = self._formed([{"role": "user", "content": "a"}])
        try:
            without, asked = (self._render(probe, None, generation) for generation in (False, True))
        except DataError:
            return ""
        eos = self.tokenizer.eos_token or ""
        for start in (without, without.rstrip().removesuffix(eos), without.rstrip().removesuffix(eos).rstrip()):
            if asked.startswith(start):
                break
        else:
            start = without[: shared_length(without, asked)]
        header = asked[len(start) :]
        return header[: min((at for tag in REASONING if (at := header.find(tag)) >= 0), default=len(header))]

    def _last_turn(self, messages: list[dict[str, Any]], tools: Any, text: str, wanted: list[int]) -> Rendered:
        """The last trained turn alone, from the end of the rendering of what precedes it."""
        last = wanted[-1]
        before = self._render(messages[:last], tools, True) if last else ""
        shared, content = shared_length(before, text), plain_content(messages[last]).strip()
        at = text.rfind(content) if content else -1
        start = shared if at < 0 or shared == len(before) else at
        if last != len(messages) - 1 or start >= len(text) or (shared < len(before) and at < 0):
            raise DataError(
                "the chat template does not let the assistant's turns be told from the rest. Make the assistant turn the last of "
                "its row, or use another chat template."
            )
        return Rendered(text, [(start, len(text), last)], only_last=len(wanted) > 1)

    @cached_property
    def special_tokens(self) -> list[str]:
        """All special tokens, the longest first."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*self.tokenizer.all_special_tokens, *added}, key=len, reverse=True)

    def _takes_parts(self, role: str) -> bool | None:
        """Whether the template reads a role's content as a list of parts (True), as text (False), or either (None)."""
        if role not in self._reads:
            probe, reads = "lownibbleprobe", []
            for content in (probe, [{"type": "text", "text": probe}]):
                try:
                    reads.append(_shows(self._render(_spoken(role, content), None, False), probe))
                except DataError:
                    reads.append(False)
            neither = reads == [False, False] and role != "user"  # it does not know the role, or wants more with it
            self._reads[role] = self._takes_parts("user") if neither else None if reads[0] == reads[1] else reads[1]
        return self._reads[role]

    def _formed(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with their contents in the form that the template reads."""
        texts = all(isinstance(message.get("content"), (str, type(None))) for message in messages)
        return messages if texts and not self._takes_parts("user") else [self._form(message) for message in messages]

    def _form(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, str) and self._takes_parts("user") and self._takes_parts(message["role"]) is not False:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and all(is_text(part) for part in content) and self._joins_parts(message["role"]):
            return {**message, "content": "".join(texts_of(message))}
        return message

    def _joins_parts(self, role: str) -> bool:
        """Whether a role's parts are given as text: where nobody's parts are read, and where its own are not."""
        own = self._takes_parts(role)
        return own is False or (own is None and self._takes_parts("user") is False)


def _spoken(role: str, content: Any) -> list[dict[str, Any]]:
    """A conversation in which a role says the content."""
    asked, said = {"role": "user", "content": "a"}, {"role": role, "content": content}
    if role == "user":
        return [said]
    if role == "assistant":
        return [asked, said]
    if role == "tool":
        call = {"id": "lownibble", "type": "function", "function": {"name": "b", "arguments": {"c": "d"}}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [asked, called, {**said, "name": "b", "tool_call_id": "lownibble"}]
    return [said, asked]


def _shows(rendered: str, probe: str) -> bool:
    """Whether the probe is in the text as it is, and not inside of a printed list of parts."""
    return probe in rendered and "'text'" not in rendered and '"text"' not in rendered


def _guarded(render: Callable[[], _T]) -> _T:
    """Render; whatever a template does to a conversation becomes an error that says so."""
    from jinja2 import TemplateError

    try:
        return render()
    except TemplateError as error:
        remedy = "Mend the order of its roles." if "role" in str(error).lower() else "Mend its messages, or the tokenizer."
        raise DataError(f"the chat template refuses this conversation: {error} {remedy}") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(
            f"the chat template cannot render this conversation ({type(error).__name__}: {error}). Mend its messages."
        ) from error


def _aliased(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers hands them to templates, with reasoning under all its names."""
    from transformers.utils import chat_template_utils

    aliased = getattr(chat_template_utils, "_alias_reasoning_fields", None)
    found: list[dict[str, Any]] = messages if aliased is None else aliased(messages)
    plain: list[dict[str, Any]] = json.loads(json.dumps(found))  # plain data: templates are untrusted
    return plain


@lru_cache(maxsize=16)
def _marked(template: str) -> Any:
    """The template, compiled with `lownibble_mark(message, loop, begins)` printed around every pass of a loop over messages."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)

    def mark(name: str, loop: int, begins: bool) -> nodes.Output:
        arguments = [nodes.Name(name, "load"), nodes.Const(loop), nodes.Const(begins)]
        return nodes.Output([nodes.Call(nodes.Name("lownibble_mark", "load"), arguments, [], None, None)])

    for number, loop in enumerate(list(tree.find_all(nodes.For))):
        numbers = isinstance(loop.iter, nodes.Call) and getattr(loop.iter.node, "name", "") == "range"  # no messages
        if isinstance(loop.target, nodes.Name) and not numbers:
            name = loop.target.name
            loop.body = [mark(name, number, True), *loop.body, mark(name, number, False)]
    tree.set_environment(environment)
    return environment.from_string(tree)
