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

from lownibble.serve.engine import QueueFullError
from lownibble.serve.protocol import Generation
from lownibble.serve.request import End, Failed, Piece
from lownibble.serve.request import Request as EngineRequest
from lownibble.serve.sampling import Sampling
from lownibble.serve.service import ApiError, Service, as_api

_T = TypeVar("_T")

DEFAULT_TOKENS = 256
"""Default `max_tokens` of a chat completion (text completions: 16), limited by context and `limits.output`."""


@dataclass(eq=False)
class _Choice:
    """One completion choice while it is generated."""

    index: int
    request: EngineRequest
    pieces: list[Piece] = field(default_factory=list)
    end: End | None = None


async def answer(
    service: Service, request: Request, body: Generation, prompts: list[list[int]], limit: int | None, logprobs: int | None, *,
    chat: bool,
) -> Response:  # fmt: skip
    """Generate for each prompt `body.n` times, at most `limit` tokens each; returns a JSON or a streaming response.

    Raises:
        ApiError: a field does not fit the model, the queue is full, or the adapter cannot be used.
    """
    adapter = service.check_model(body.model)
    if adapter is None and body.lora_scale != 1:
        raise ApiError(400, "'lora_scale' is for adapters, and 'model' names the base.", param="lora_scale")
    form = _Form(service, body.model, chat, logprobs is not None)
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, Piece | End | Failed]] = asyncio.Queue()
    choices: list[_Choice] = []
    if not prompts:
        raise ApiError(400, "There is no prompt. Send at least one.", param=form.param)
    for prompt in prompts:
        tokens = _length_of_answer(service, form, prompt, limit)
        for number in range(body.n or 1):
            index = len(choices)

            def tell(event: Piece | End | Failed, index: int = index) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: no listener
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            seed = None if body.seed is None else body.seed + number
            temperature = 1.0 if body.temperature is None else body.temperature
            sampling = Sampling(temperature, body.top_p or 1.0, seed, logprobs)
            wanted = EngineRequest(
                prompt, tokens, tell, adapter, body.lora_scale, sampling, body.stops, body.ignore_eos, continues=not chat
            )
            choices.append(_Choice(index, wanted))
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


def _length_of_answer(service: Service, form: _Form, prompt: list[int], limit: int | None) -> int:
    """Maximum tokens of a completion: `limit`, or the default.

    Raises:
        ApiError: the prompt is empty or holds a token outside the vocabulary, or prompt or completion is too long.
    """
    context, limits = service.engine.cache.capacity, service.limits
    vocabulary = service.engine.decoder.model.get_input_embeddings().num_embeddings
    if not prompt:
        raise ApiError(400, "The prompt is empty. Send at least one token.", param=form.param)
    if max(prompt) >= vocabulary:
        raise ApiError(400, f"Token {max(prompt)} is not in the vocabulary of {vocabulary}.", param=form.param)
    wanted, too_long = limit or 1, "context_length_exceeded"
    if limits.prompt and len(prompt) > limits.prompt:
        raise ApiError(400, f"The prompt has {len(prompt)} tokens; at most {limits.prompt} are read here. Shorten it.",
                       code=too_long, param=form.param)  # fmt: skip
    if limits.output and wanted > limits.output:
        raise ApiError(400, f"{wanted} tokens are asked for; an answer has at most {limits.output} here. Ask for fewer.",
                       code=too_long, param="max_tokens")  # fmt: skip
    if len(prompt) + wanted > context:
        raise ApiError(400, f"The prompt has {len(prompt)} tokens and {wanted} more are asked for; the context is {context}.",
                       code=too_long, param=form.param)  # fmt: skip
    return limit or min(DEFAULT_TOKENS if form.chat else 16, context - len(prompt), limits.output or context)


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


async def _rest(
    service: Service, choices: list[_Choice], events: asyncio.Queue[tuple[int, Piece | End | Failed]]
) -> None:  # fmt: skip
    while any(choice.end is None for choice in choices):
        await _next(service, choices, events)


async def _next(
    service: Service, choices: list[_Choice], events: asyncio.Queue[tuple[int, Piece | End | Failed]]
) -> tuple[_Choice, Piece | End]:
    """Wait for the next event and add it to its choice; on failure or cancellation, cancel all unfinished requests."""
    try:
        index, event = await events.get()
        if isinstance(event, Failed):
            raise as_api(event.error)
    except BaseException:
        _cancel(service, choices)
        raise
    choice = choices[index]
    if isinstance(event, Piece):
        choice.pieces.append(event)
    else:
        choice.end = event
        service.metrics.ended(choice.request.adapter or service.names[0], event)
    return choice, event


def _cancel(service: Service, choices: list[_Choice]) -> None:
    for choice in choices:
        if choice.end is None:
            service.engine.cancel(choice.request)


async def _stream(
    service: Service, form: _Form, choices: list[_Choice],
    events: asyncio.Queue[tuple[int, Piece | End | Failed]], first: tuple[_Choice, Piece | End], usage: bool,
) -> AsyncIterator[str]:  # fmt: skip
    try:
        if form.chat:
            for choice in choices:
                yield _event(form.chunk(choice, {"role": "assistant", "content": ""}, None))
        choice, event = first
        while True:
            if isinstance(event, End):
                yield _event(form.chunk(choice, {}, event.reason))
            elif event.text or (event.token is not None and form.logprobs):
                yield _event(form.chunk(choice, {"content": event.text}, None, event))
            if all(choice.end is not None for choice in choices):
                break
            try:
                choice, event = await _next(service, choices, events)
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

    def __init__(self, service: Service, model: str, chat: bool, logprobs: bool) -> None:
        self.service, self.model, self.chat, self.logprobs = service, model, chat, logprobs
        self.param = "messages" if chat else "prompt"
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def chunk(self, choice: _Choice, delta: dict[str, Any], reason: str | None, piece: Piece | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        told = self._told([piece]) if piece is not None and self.logprobs else None
        return {**self.head(chunk=True), "choices": [{"index": choice.index, **said, "logprobs": told, "finish_reason": reason}]}

    def whole(self, choices: list[_Choice]) -> dict[str, Any]:
        found = []
        for choice in choices:
            text = "".join(piece.text for piece in choice.pieces)
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            told = self._told(choice.pieces) if self.logprobs else None
            assert choice.end is not None
            found.append({"index": choice.index, **said, "logprobs": told, "finish_reason": choice.end.reason})
        return {**self.head(chunk=False), "choices": found, "usage": self.usage(choices)}

    def usage(self, choices: list[_Choice]) -> dict[str, Any]:
        ends = [choice.end for choice in choices if choice.end is not None]
        prompts = {id(choice.request.prompt): len(choice.request.prompt) for choice in choices}  # n choices share a prompt
        made, reused = sum(end.completion_tokens for end in ends), sum(end.reused_tokens for end in ends)
        read = sum(prompts.values())
        return {
            "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": min(reused, read)},
        }  # fmt: skip

    def _told(self, pieces: list[Piece]) -> dict[str, Any]:
        tokens = [piece.token for piece in pieces if piece.token is not None]
        if self.chat:
            return {"content": [{**self._token(one.token, one.logprob), "top_logprobs": [self._token(*top) for top in one.top]}
                                for one in tokens]}  # fmt: skip
        return {
            "tokens": [self._text(one.token) for one in tokens], "token_logprobs": [one.logprob for one in tokens],
            "text_offset": [piece.offset for piece in pieces if piece.token is not None],
            "top_logprobs": [{self._text(token): value for token, value in one.top} for one in tokens],
        }  # fmt: skip

    def _text(self, token: int) -> str:
        return str(self.service.tokenizer.decode([token]))

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
