"""Responses of chat and text completions: requests' choices while they are generated, and OpenAI's JSON of them.

Streams and whole responses share this code: `Choice` collects the engine's events, `Reply` puts them in shape. The Responses API
has a reply of its own (`responses.py`).
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from lownibble.serve.constraint import Matcher
from lownibble.serve.protocol import Generation
from lownibble.serve.request import End, Event, Piece, Scored
from lownibble.serve.request import Request as EngineRequest
from lownibble.serve.sampling import Chosen
from lownibble.serve.service import ApiError, Service
from lownibble.serve.tools import Call, CallForm, CallReader


@dataclass(frozen=True)
class Asked:
    """What is asked for besides the options that chat and text completions share.

    Attributes:
        prompts: token ids of each prompt. texts: what `echo` repeats of each; None: no echo.
        limit: tokens of each output; None: the default. logprobs: number of top tokens; None: no log probabilities.
        starts: where the tokens of each prompt begin in those texts, for log probabilities.
        continues: outputs go on within the prompt's text.
        matcher: what outputs must follow. calls: how they may call tools; names: which; most: how many times (None: any).
        noted: what was taken and changes nothing.
    """

    prompts: list[list[int]]
    limit: int | None
    logprobs: int | None
    chat: bool
    texts: list[str] | None = None
    starts: list[list[int]] | None = None
    continues: bool = False
    matcher: Matcher | None = None
    calls: CallForm | None = None
    names: frozenset[str] = frozenset()
    most: int | None = None
    noted: tuple[str, ...] = ()

    @property
    def param(self) -> str:
        """Name of the field with the prompt."""
        return "messages" if self.chat else "prompt"

    def reader(self) -> CallReader | None:
        """A reader of one output's calls; None where there are none to read."""
        return None if self.calls is None else CallReader(self.calls, set(self.names), self.most)


@dataclass(eq=False)
class Choice:
    """One completion choice while it is generated."""

    index: int
    request: EngineRequest
    echo: str | None
    starts: list[int]
    reader: CallReader | None
    scored: list[Chosen] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    parts: list[str | Call] = field(default_factory=list)
    end: End | None = None

    def add(self, event: Piece | End) -> list[str | Call]:
        """Take an event; returns what it adds to the output."""
        if isinstance(event, Piece):
            self.pieces.append(event)
        else:
            self.end = event
        text, last = (event.text, False) if isinstance(event, Piece) else ("", True)
        new: list[str | Call] = [text] if text else []
        if self.reader:
            new = self.reader.feed(text, last=last)
        self.parts += new
        return new

    @property
    def calls(self) -> list[Call]:
        """The calls of tools so far."""
        return [part for part in self.parts if isinstance(part, Call)]

    @property
    def reason(self) -> str:
        """Why it has ended."""
        assert self.end is not None
        return "tool_calls" if self.calls and self.end.reason == "stop" else self.end.reason


def event_text(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


class Reply:
    """The response of chat and text completions, whole or as the events of a stream."""

    def __init__(self, service: Service, body: Generation, asked: Asked) -> None:
        self.model, self.asked, self.logprobs, self.scores = body.model, asked, asked.logprobs is not None, body.prompt_logprobs
        self.text, self.ignored = service.texts, [*body.noted, *asked.noted]
        self.tells_usage = body.stream_options is not None and body.stream_options.include_usage
        self.id, self.created = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def begun(self, choices: list[Choice]) -> list[str]:
        """What a stream begins with."""
        if self.asked.chat:
            return [event_text(self.chunk(choice, {"role": "assistant", "content": ""})) for choice in choices]
        if self.logprobs:  # the echo comes with its log probabilities
            return []
        return [event_text(self.chunk(choice, {"content": choice.echo})) for choice in choices if choice.echo is not None]

    def take(self, choice: Choice, event: Event, new: list[str | Call]) -> None:
        """Note an event of a whole response, which has added `new` to the output."""

    def on(self, choice: Choice, event: Event, new: list[str | Call]) -> list[str]:
        """What a stream tells of an event, which has added `new` to the output."""
        found: list[dict[str, Any]] = []
        if isinstance(event, Scored) and choice.echo is not None and self.logprobs:
            found.append(self.chunk(choice, {"content": choice.echo}, told=self.told_prompt(choice)))
        told = self.told([event], choice) if isinstance(event, Piece) and event.token is not None and self.logprobs else None
        made = len(choice.calls) - sum(isinstance(part, Call) for part in new)
        for part in new:
            if isinstance(part, str):
                delta: dict[str, Any] = {"content": part}
            else:
                delta, made = {"tool_calls": [part.told(made)]}, made + 1
            found.append(self.chunk(choice, delta, told=told))
            told = None
        if told is not None:
            found.append(self.chunk(choice, {"content": ""}, told=told))
        if isinstance(event, End):
            found.append(self.chunk(choice, {}, reason=choice.reason))
        return [event_text(each) for each in found]

    def failed(self, error: ApiError) -> list[str]:
        """What a stream that fails ends with."""
        return [event_text(error.body)]

    def ended(self, choices: list[Choice]) -> list[str]:
        """What a stream ends with."""
        usage = {**self.head(chunk=True), "choices": [], "usage": self.usage(choices)}
        return [*([event_text(usage)] if self.tells_usage else []), "data: [DONE]\n\n"]

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """The fields of all events and of the whole."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.asked.chat else "text_completion"
        noted = {"ignored": self.ignored} if self.ignored else {}
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **noted}

    def chunk(
        self, choice: Choice, delta: dict[str, Any], *, reason: str | None = None, told: dict[str, Any] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        """An event of a stream."""
        said = {"delta": delta} if self.asked.chat else {"text": delta.get("content", "")}
        return {**self.head(chunk=True), "choices": [{"index": choice.index, **said, "logprobs": told, "finish_reason": reason}]}

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The whole response."""
        found, head = [], self.head(chunk=False)
        for choice in choices:
            text, calls = "".join(part for part in choice.parts if isinstance(part, str)), choice.calls
            said: dict[str, Any] = {"text": (choice.echo or "") + text}
            if self.asked.chat:
                called = {"tool_calls": [call.told() for call in calls]} if calls else {}
                said = {"message": {"role": "assistant", "content": text if text or not calls else None, **called}}
            told = self.told(choice.pieces, choice) if self.logprobs else None
            if told is not None and choice.echo is not None:
                told = {key: [*values, *told[key]] for key, values in self.told_prompt(choice).items()}
            scores = {} if self.scores is None else {"prompt_logprobs": self._scores(choice, self.scores)}
            if self.asked.chat and scores:
                head, scores = {**head, **scores}, {}
            found.append({"index": choice.index, **said, "logprobs": told, "finish_reason": choice.reason, **scores})
        return {**head, "choices": found, "usage": self.usage(choices)}

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """Numbers of tokens."""
        ends = [choice.end for choice in choices if choice.end is not None]
        prompts = {id(choice.request.prompt): len(choice.request.prompt) for choice in choices}  # n choices share a prompt
        made, reused = sum(end.completion_tokens for end in ends), sum(end.reused_tokens for end in ends)
        read = sum(prompts.values())
        return {
            "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": min(reused, read)},
        }  # fmt: skip

    def told(self, pieces: list[Piece], choice: Choice) -> dict[str, Any]:
        """Log probabilities of the output's tokens."""
        tokens = [piece.token for piece in pieces if piece.token is not None]
        if self.asked.chat:
            return {"content": [{**self._token(one.token, one.logprob), "top_logprobs": [self._token(*top) for top in one.top]}
                                for one in tokens]}  # fmt: skip
        before = len(choice.echo or "")
        return self._lists(tokens, [before + piece.offset for piece in pieces if piece.token is not None])

    def told_prompt(self, choice: Choice) -> dict[str, Any]:
        """Log probabilities of the prompt's tokens; the first has none."""
        lists = self._lists([one._replace(top=one.top[: self.asked.logprobs]) for one in choice.scored], choice.starts)
        return {**lists, "top_logprobs": [None, *lists["top_logprobs"][1:]]}

    def _lists(self, tokens: list[Chosen], offsets: list[int]) -> dict[str, Any]:
        return {
            "tokens": [self.text(one.token) for one in tokens], "token_logprobs": [one.logprob for one in tokens],
            "text_offset": offsets, "top_logprobs": [{self.text(token): value for token, value in one.top} for one in tokens],
        }  # fmt: skip

    def _scores(self, choice: Choice, top: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: of each token of the prompt, and of the `top` most probable ones in its place."""
        found: list[dict[str, Any] | None] = [None]
        for one in choice.scored[1:]:
            ranked = [(token, value, rank) for rank, (token, value) in enumerate(one.top[:top], 1)]
            entries = [(one.token, one.logprob, one.rank), *ranked]
            found.append({str(token): {"logprob": value, "rank": rank, "decoded_token": self.text(token)}
                          for token, value, rank in entries})  # fmt: skip
        return found

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": logprob, "bytes": list(self.text.utf8(token))}
