"""Completion responses: build engine requests from a request's body, and turn the engine's events into OpenAI's JSON.

Streaming and non-streaming responses share this code: `_Choice` collects the events, and a stream forwards them as they arrive.
A client that disconnects cancels its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lownibble.serve.constraint import Matcher
from lownibble.serve.engine import QueueFullError
from lownibble.serve.protocol import Generation
from lownibble.serve.request import End, Event, Failed, Piece, Scored
from lownibble.serve.request import Request as EngineRequest
from lownibble.serve.sampling import Chosen, Sampling
from lownibble.serve.service import ApiError, Service, as_api
from lownibble.serve.tools import Call, CallForm, CallReader

_T = TypeVar("_T")

DEFAULT_TOKENS = 256
"""Default `max_tokens` of a chat completion (text completions: 16), limited by context and `limits.output`."""


@dataclass(frozen=True)
class Asked:
    """What is asked for besides the options that chat and text completions share.

    Attributes:
        prompts: token ids of each prompt. texts: what `echo` repeats of each; None: no echo.
        limit: tokens of each output; None: the default. logprobs: number of top tokens; None: no log probabilities.
        matcher: what outputs must follow. calls: how they may call tools; names: which; most: how many times (None: any).
        noted: what was taken and changes nothing.
    """

    prompts: list[list[int]]
    limit: int | None
    logprobs: int | None
    chat: bool
    texts: list[str] | None = None
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
class _Choice:
    """One completion choice while it is generated."""

    index: int
    request: EngineRequest
    echo: str | None
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


async def answer(service: Service, request: Request, body: Generation, asked: Asked) -> Response:
    """Generate for each prompt `body.n` times; returns a JSON or a streaming response.

    Raises:
        ApiError: a field does not fit the model, the queue is full, or the adapter cannot be used.
    """
    adapter = service.check_model(body.model)
    if adapter is None and body.lora_scale != 1:
        raise ApiError(400, "'lora_scale' is for adapters, and 'model' names the base.", param="lora_scale")
    form = _Form(service, body, asked)
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    choices: list[_Choice] = []
    if not asked.prompts:
        raise ApiError(400, "There is no prompt. Send at least one.", param=asked.param)
    stop, stop_tokens = _stops(service, body)
    score = max((top for top in (asked.logprobs if asked.texts else None, body.prompt_logprobs) if top is not None), default=None)
    for place, prompt in enumerate(asked.prompts):
        echo = None if asked.texts is None else asked.texts[place]
        tokens = _length_of_answer(service, asked, prompt)
        for number in range(body.n or 1):
            index = len(choices)

            def tell(event: Event, index: int = index) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: no listener
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            wanted = EngineRequest(
                prompt, tokens, tell, adapter, body.lora_scale, _sampling(service, body, asked.logprobs, number), stop,
                stop_tokens, body.ignore_eos, continues=not asked.chat,
                keeps_special=asked.calls is not None and asked.calls.special, score=score,
                constraint=None if asked.matcher is None else asked.matcher.copy(),
            )  # fmt: skip
            choices.append(_Choice(index, wanted, echo, asked.reader()))
    try:
        service.engine.submit(*(choice.request for choice in choices))
    except QueueFullError as error:
        service.metrics.refused()
        raise as_api(error) from None
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        first = await _unless_gone(request, _next(service, choices, events))
        return StreamingResponse(_stream(service, form, choices, events, first, usage), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})  # fmt: skip
    await _unless_gone(request, _rest(service, choices, events))
    return JSONResponse(form.whole(choices))


def _sampling(service: Service, body: Generation, logprobs: int | None, number: int) -> Sampling:
    """Sampling parameters of the choice of this number."""
    bias = tuple((body.logit_bias or {}).items())
    check_tokens(service, [token for token, _ in bias], "logit_bias")
    given = {name: getattr(body, name) for name in Sampling._fields if getattr(body, name, None) is not None}
    seed = None if body.seed is None else body.seed + number
    return Sampling(**{"temperature": 1.0, **given, "seed": seed, "logprobs": logprobs, "logit_bias": bias})


def _stops(service: Service, body: Generation) -> tuple[tuple[str, ...], frozenset[int]]:
    """Stop strings and stop tokens. A special token is never part of the text, so a stop string that is one is its token.

    Raises:
        ApiError: a token is not in the vocabulary, or a stop string has a special token and something else.
    """
    special = service.special_tokens
    tokens = list(body.stop_token_ids or ())
    check_tokens(service, tokens, "stop_token_ids")
    for text in body.stops:
        if text.strip() not in special and (inside := next((token for token in special if token in text), None)):
            raise ApiError(
                400, f"The stop string '{text[:64]}' has the special token '{inside}' within, which texts never have. Give the "
                "token alone.", param="stop",
            )  # fmt: skip
    tokens += [special[text.strip()] for text in body.stops if text.strip() in special]
    return tuple(text for text in body.stops if text.strip() not in special), frozenset(tokens)


def check_tokens(service: Service, tokens: list[int], param: str) -> None:
    """Reject tokens that are not in the vocabulary (ApiError)."""
    if tokens and max(tokens) >= service.vocabulary:
        raise ApiError(400, f"Token {max(tokens)} is not in the vocabulary of {service.vocabulary}.", param=param)


def _length_of_answer(service: Service, asked: Asked, prompt: list[int]) -> int:
    """Maximum tokens of a completion: the limit asked for, or the default.

    Raises:
        ApiError: the prompt is empty or holds a token outside the vocabulary, or prompt or completion is too long.
    """
    context, limits, limit = service.engine.cache.capacity, service.limits, asked.limit
    if not prompt:
        raise ApiError(400, "The prompt is empty. Send at least one token.", param=asked.param)
    check_tokens(service, prompt, asked.param)
    wanted, too_long = 1 if limit is None else limit, "context_length_exceeded"
    if limits.prompt and len(prompt) > limits.prompt:
        raise ApiError(400, f"The prompt has {len(prompt)} tokens; at most {limits.prompt} are read here. Shorten it.",
                       code=too_long, param=asked.param)  # fmt: skip
    if limits.output and wanted > limits.output:
        raise ApiError(400, f"{wanted} tokens are asked for; an answer has at most {limits.output} here. Ask for fewer.",
                       code=too_long, param="max_tokens")  # fmt: skip
    if len(prompt) + wanted > context:
        raise ApiError(400, f"The prompt has {len(prompt)} tokens and {wanted} more are asked for; the context is {context}.",
                       code=too_long, param=asked.param)  # fmt: skip
    return (
        limit if limit is not None else min(DEFAULT_TOKENS if asked.chat else 16, context - len(prompt), limits.output or context)
    )


def check_number(service: Service, body: Generation, prompts: int) -> None:
    """Reject more choices than queue and cache slots can hold, before any is built.

    Raises:
        ApiError: there are more.
    """
    most, wanted = service.engine.max_queue + service.engine.cache.slots, prompts * (body.n or 1)
    if wanted > most:
        raise ApiError(
            400, f"{wanted} answers are asked for at once; {most} are the most. Send several requests.", param="prompt"
        )


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of `work`; cancel it and raise `ApiError` (499) if the client disconnects meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=0.25)
            if not task.done() and await request.is_disconnected():
                raise ApiError(499, "The client is gone.")
        return task.result()
    finally:
        task.cancel()


async def _rest(service: Service, choices: list[_Choice], events: asyncio.Queue[tuple[int, Event]]) -> None:
    while any(choice.end is None for choice in choices):
        await _next(service, choices, events)


async def _next(
    service: Service, choices: list[_Choice], events: asyncio.Queue[tuple[int, Event]]
) -> tuple[_Choice, Event, list[str | Call]]:  # fmt: skip
    """Wait for the next event and add it to its choice; returns both, and what the event adds to the output. On failure or
    cancellation, cancel all unfinished requests."""
    try:
        index, event = await events.get()
        if isinstance(event, Failed):
            raise as_api(event.error)
    except BaseException:
        _cancel(service, choices)
        raise
    choice, new = choices[index], list[str | Call]()
    if isinstance(event, Scored):
        choice.scored = event.tokens
    else:
        new = choice.add(event)
    if isinstance(event, End):
        service.metrics.ended(choice.request.adapter or service.names[0], event)
    return choice, event, new


def _cancel(service: Service, choices: list[_Choice]) -> None:
    for choice in choices:
        if choice.end is None:
            service.engine.cancel(choice.request)


async def _stream(
    service: Service, form: _Form, choices: list[_Choice], events: asyncio.Queue[tuple[int, Event]],
    first: tuple[_Choice, Event, list[str | Call]], usage: bool,
) -> AsyncIterator[str]:  # fmt: skip
    try:
        for choice in choices:
            if form.asked.chat:
                yield _event(form.chunk(choice, {"role": "assistant", "content": ""}))
            elif choice.echo is not None and not form.logprobs:  # else it comes with its log probabilities
                yield _event(form.chunk(choice, {"content": choice.echo}))
        choice, event, new = first
        while True:
            if isinstance(event, Scored) and choice.echo is not None and form.logprobs:
                yield _event(form.chunk(choice, {"content": choice.echo}, told=form.told_prompt(choice)))
            told = form.told([event], choice) if isinstance(event, Piece) and event.token is not None and form.logprobs else None
            made = len(choice.calls) - sum(isinstance(part, Call) for part in new)
            for part in new:
                if isinstance(part, str):
                    delta: dict[str, Any] = {"content": part}
                else:
                    delta, made = {"tool_calls": [part.told(made)]}, made + 1
                yield _event(form.chunk(choice, delta, told=told))
                told = None
            if told is not None:
                yield _event(form.chunk(choice, {"content": ""}, told=told))
            if isinstance(event, End):
                yield _event(form.chunk(choice, {}, reason=choice.reason))
            if all(choice.end is not None for choice in choices):
                break
            try:
                choice, event, new = await _next(service, choices, events)
            except ApiError as error:
                yield _event(error.body)
                return
        if usage:
            yield _event({**form.head(chunk=True), "choices": [], "usage": form.usage(choices)})
        yield "data: [DONE]\n\n"
    finally:
        _cancel(service, choices)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


class _Form:
    """The response JSON of chat and text completions."""

    def __init__(self, service: Service, body: Generation, asked: Asked) -> None:
        self.model, self.asked, self.logprobs, self.scores = body.model, asked, asked.logprobs is not None, body.prompt_logprobs
        self.text, self.ignored = service.texts, [*body.noted, *asked.noted]
        self.id, self.created = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.asked.chat else "text_completion"
        noted = {"ignored": self.ignored} if self.ignored else {}
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **noted}

    def chunk(
        self, choice: _Choice, delta: dict[str, Any], *, reason: str | None = None, told: dict[str, Any] | None = None
    ) -> dict[str, Any]:  # fmt: skip
        said = {"delta": delta} if self.asked.chat else {"text": delta.get("content", "")}
        return {**self.head(chunk=True), "choices": [{"index": choice.index, **said, "logprobs": told, "finish_reason": reason}]}

    def whole(self, choices: list[_Choice]) -> dict[str, Any]:
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

    def usage(self, choices: list[_Choice]) -> dict[str, Any]:
        ends = [choice.end for choice in choices if choice.end is not None]
        prompts = {id(choice.request.prompt): len(choice.request.prompt) for choice in choices}  # n choices share a prompt
        made, reused = sum(end.completion_tokens for end in ends), sum(end.reused_tokens for end in ends)
        read = sum(prompts.values())
        return {
            "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": min(reused, read)},
        }  # fmt: skip

    def told(self, pieces: list[Piece], choice: _Choice) -> dict[str, Any]:
        """Log probabilities of the output's tokens."""
        tokens = [piece.token for piece in pieces if piece.token is not None]
        if self.asked.chat:
            return {"content": [{**self._token(one.token, one.logprob), "top_logprobs": [self._token(*top) for top in one.top]}
                                for one in tokens]}  # fmt: skip
        before = len(choice.echo or "")
        return self._lists(tokens, [before + piece.offset for piece in pieces if piece.token is not None])

    def told_prompt(self, choice: _Choice) -> dict[str, Any]:
        """Log probabilities of the prompt's tokens; the first has none."""
        ends = [0]
        for one in choice.scored:
            ends.append(ends[-1] + len(self.text(one.token)))
        lists = self._lists([one._replace(top=one.top[: self.asked.logprobs]) for one in choice.scored], ends[:-1])
        return {**lists, "top_logprobs": [None, *lists["top_logprobs"][1:]]}

    def _lists(self, tokens: list[Chosen], offsets: list[int]) -> dict[str, Any]:
        return {
            "tokens": [self.text(one.token) for one in tokens], "token_logprobs": [one.logprob for one in tokens],
            "text_offset": offsets, "top_logprobs": [{self.text(token): value for token, value in one.top} for one in tokens],
        }  # fmt: skip

    def _scores(self, choice: _Choice, top: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: of each token of the prompt, and of the `top` most probable ones in its place."""
        found: list[dict[str, Any] | None] = [None]
        for one in choice.scored[1:]:
            ranked = [(token, value, rank) for rank, (token, value) in enumerate(one.top[:top], 1)]
            entries = [(one.token, one.logprob, one.rank), *ranked]
            found.append({str(token): {"logprob": value, "rank": rank, "decoded_token": self.text(token)}
                          for token, value, rank in entries})  # fmt: skip
        return found

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
