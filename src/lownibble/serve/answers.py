"""Completions: build engine requests from a request's body, and tell of their events (`replies.py`), whole or as they come.

A client that disconnects cancels its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from lownibble.serve.engine import DeviceLostError, QueueFullError
from lownibble.serve.protocol import Generation
from lownibble.serve.replies import Asked, Choice, Reply
from lownibble.serve.request import End, Event, Failed, Scored
from lownibble.serve.request import Request as EngineRequest
from lownibble.serve.sampling import Sampling
from lownibble.serve.service import ApiError, Json, Service, as_api
from lownibble.serve.tools import Call

_T = TypeVar("_T")

DEFAULT_TOKENS = 256
"""Default `max_tokens` of a chat completion (text completions: 16), limited by context and `limits.output`."""


async def answer(service: Service, request: Request, body: Generation, asked: Asked, reply: Reply | None = None) -> Response:
    """Generate for each prompt `body.n` times; returns a JSON or a streaming response, in the shape of `reply`.

    Raises:
        ApiError: a field does not fit the model, the queue is full, or the adapter cannot be used.
    """
    adapter = service.check_model(body.model)
    if adapter is None and body.lora_scale != 1:
        raise ApiError(400, "'lora_scale' is for adapters, and 'model' names the base.", param="lora_scale")
    reply = reply or Reply(service, body, asked)
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    choices: list[Choice] = []
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
                if isinstance(event, End):  # counted also when its client is gone
                    service.metrics.ended(adapter or service.names[0], event)
                with contextlib.suppress(RuntimeError):  # the loop is closed: no listener
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            wanted = EngineRequest(
                prompt, tokens, tell, adapter, body.lora_scale, _sampling(service, body, asked.logprobs, number), stop,
                stop_tokens, body.ignore_eos, continues=asked.continues,
                keeps_special=asked.calls is not None and asked.calls.special, score=score,
                constraint=None if asked.matcher is None else asked.matcher.copy(),
            )  # fmt: skip
            choices.append(Choice(index, wanted, echo, [] if asked.starts is None else asked.starts[place], asked.reader()))
    try:
        service.engine.submit(*(choice.request for choice in choices))
    except QueueFullError as error:
        service.metrics.refused()
        raise as_api(error) from None
    except DeviceLostError as error:
        raise as_api(error) from None
    if body.stream:
        first = await _unless_gone(request, _next(service, choices, events))
        return StreamingResponse(_stream(service, reply, choices, events, first), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})  # fmt: skip
    await _unless_gone(request, _rest(service, reply, choices, events))
    return Json(reply.whole(choices))


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


async def _rest(service: Service, reply: Reply, choices: list[Choice], events: asyncio.Queue[tuple[int, Event]]) -> None:
    while any(choice.end is None for choice in choices):
        reply.take(*await _next(service, choices, events))


async def _next(
    service: Service, choices: list[Choice], events: asyncio.Queue[tuple[int, Event]]
) -> tuple[Choice, Event, list[str | Call]]:  # fmt: skip
    """Wait for the next event and add it to its choice; returns both, and what the event adds to the output. On failure or
    cancellation, cancel all unfinished requests."""
    try:
        index, event = await events.get()
        if isinstance(event, Failed):
            raise as_api(event.error)
        choice, new = choices[index], list[str | Call]()
        if isinstance(event, Scored):
            choice.scored = event.tokens
        else:
            new = choice.add(event)
    except BaseException:
        _cancel(service, choices)
        raise
    return choice, event, new


def _cancel(service: Service, choices: list[Choice]) -> None:
    for choice in choices:
        if choice.end is None:
            service.engine.cancel(choice.request)


async def _stream(
    service: Service, reply: Reply, choices: list[Choice], events: asyncio.Queue[tuple[int, Event]],
    first: tuple[Choice, Event, list[str | Call]],
) -> AsyncIterator[str]:  # fmt: skip
    try:
        for said in reply.begun(choices):
            yield said
        step = first
        while True:
            for said in reply.on(*step):
                yield said
            if all(choice.end is not None for choice in choices):
                break
            try:
                step = await _next(service, choices, events)
            except ApiError as error:
                for said in reply.failed(error):
                    yield said
                return
        for said in reply.ended(choices):
            yield said
    finally:
        _cancel(service, choices)
