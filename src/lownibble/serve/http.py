"""The engine behind OpenAI's HTTP API (FastAPI), with its error shape and status codes.

The same code answers whole and in a stream: `_Choice` gathers what the engine tells, and a stream sends it on as it comes. A
client that goes away ends its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from lownibble.errors import InputError
from lownibble.serve import engine as engines
from lownibble.serve.engine import End, Engine, Failed, Piece, QueueFullError
from lownibble.serve.metrics import Metrics
from lownibble.serve.protocol import ChatRequest, CompletionRequest, Generation, LoadRequest, UnloadRequest
from lownibble.serve.registry import NoRoomError, Registry, UnknownAdapterError
from lownibble.serve.sampling import Chosen, Sampling

_T = TypeVar("_T")

DEFAULT_TOKENS = 256
"""Tokens of an answer where the request does not say, as far as the context reaches."""


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """The HTTP response."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse(self.body, self.status, headers)


@dataclass(frozen=True)
class Service:
    """What the routes need. `names`: of the base; keys are compared in constant time, None: none is asked for."""

    engine: Engine
    registry: Registry
    tokenizer: Any
    names: tuple[str, ...]
    api_key: str | None = None
    admin_key: str | None = None
    max_body: int = 4 << 20
    created: int = field(default_factory=lambda: int(time.time()))
    metrics: Metrics = field(default_factory=Metrics)

    def check_model(self, name: str) -> str | None:
        """The adapter that a request's `model` names, None for the base.

        Raises:
            ApiError: neither the base nor an adapter.
        """
        if name in self.names:
            return None
        if name not in self.registry:
            raise ApiError(404, f"There is no model '{name[:128]}'. GET /v1/models lists what there is.", code="model_not_found",
                           param="model")  # fmt: skip
        return name


def app(service: Service) -> FastAPI:
    """The application."""
    made = FastAPI(title="Lownibble", docs_url=None, redoc_url=None)
    made.add_middleware(_BodyLimit, limit=service.max_body)

    @made.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @made.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if part != "body")
        message = first["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{where}: {message}" if where else message, param=where or None).response()

    @made.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{error.detail}. See /openapi.json for what there is.").response()

    @made.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return ApiError(500, f"An error of the server's own: {type(error).__name__}.").response()

    def client(request: Request) -> None:
        _check_key(request, service.api_key, service.admin_key)

    def admin(request: Request) -> None:
        _check_key(request, service.admin_key or service.api_key)

    @made.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "running": service.engine.running, "waiting": service.engine.waiting}

    @made.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.render(service.engine, service.registry))

    @made.get("/v1/models", dependencies=[Depends(client)])
    async def models() -> dict[str, Any]:
        names = await run_in_threadpool(service.registry.names)
        return {"object": "list", "data": [_model(service, name) for name in (service.names[0], *names)]}

    @made.get("/v1/models/{name:path}", dependencies=[Depends(client)])
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name)

    @made.post("/v1/chat/completions", dependencies=[Depends(client)])
    async def chat(body: ChatRequest, request: Request) -> Response:
        messages = [{"role": one.role, "content": one.text} for one in body.messages]
        try:
            text = service.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            raise ApiError(400, f"The model's chat template does not take these messages: {error}", param="messages") from None
        prompt = await run_in_threadpool(_encode, service, text, special=False)
        limit = body.max_completion_tokens or body.max_tokens
        return await _answer(service, request, body, [prompt], limit, body.wanted_logprobs, chat=True)

    @made.post("/v1/completions", dependencies=[Depends(client)])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        prompts = []
        for one in body.prompts:
            prompts.append(await run_in_threadpool(_encode, service, one) if isinstance(one, str) else one)
        return await _answer(service, request, body, prompts, body.max_tokens, body.wanted_logprobs, chat=False)

    @made.post("/v1/load_lora_adapter", dependencies=[Depends(admin)])
    async def load(body: LoadRequest) -> dict[str, Any]:
        if body.lora_path not in (None, body.lora_name):
            raise ApiError(400, "'lora_path' must be the adapter's name: adapters are folders in --adapters.", param="lora_path")
        loaded = await _guarded(run_in_threadpool(service.registry.load, body.lora_name, pin=body.pin))
        return {"id": loaded.name, "object": "model", "bytes": loaded.nbytes, "digest": loaded.digest, "pinned": loaded.pinned}

    @made.post("/v1/unload_lora_adapter", dependencies=[Depends(admin)])
    async def unload(body: UnloadRequest) -> dict[str, Any]:
        await _guarded(run_in_threadpool(service.registry.unload, body.lora_name))
        return {"id": body.lora_name, "object": "model", "unloaded": True}

    return made


def _check_key(request: Request, *keys: str | None) -> None:
    known = [key for key in keys if key is not None]
    if keys[0] is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    same = [hmac.compare_digest(given, key.encode()) for key in known]  # all of them, so that the time tells nothing
    if not any(same):
        raise ApiError(401, "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.", code="invalid_api_key")


def _model(service: Service, name: str) -> dict[str, Any]:
    is_base = name in service.names
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "lownibble",
        "parent": None if is_base else service.names[0],
    }  # fmt: skip


async def _guarded(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except InputError as error:
        raise _as_api(error) from None


def _as_api(error: Exception) -> ApiError:
    if isinstance(error, UnknownAdapterError):
        return ApiError(404, str(error), code="model_not_found", param="model")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, NoRoomError):
        return ApiError(429, str(error), code="no_room")
    if isinstance(error, InputError):
        return ApiError(422, str(error), code="bad_adapter", param="model")
    return ApiError(500, f"An error of the server's own: {type(error).__name__}.")


def _encode(service: Service, text: str, *, special: bool = True) -> list[int]:
    if max(text, default="") >= "\ud800" and any("\ud800" <= c <= "\udfff" for c in text):
        raise ApiError(400, "The text holds a lone surrogate, which is no character. Send valid Unicode.", param="prompt")
    ids: list[int] = service.tokenizer(text, add_special_tokens=special).input_ids
    return ids


@dataclass(eq=False)
class _Choice:
    """One answer as it grows."""

    index: int
    events: asyncio.Queue[tuple[int, Piece | End | Failed]]
    request: engines.Request
    text: list[str] = field(default_factory=list)
    tokens: list[Chosen] = field(default_factory=list)
    end: End | None = None


async def _answer(
    service: Service, request: Request, body: Generation, prompts: list[list[int]], limit: int | None, logprobs: int | None, *,
    chat: bool,
) -> Response:  # fmt: skip
    adapter = service.check_model(body.model)
    if adapter is None and body.lora_scale != 1:
        raise ApiError(400, "'lora_scale' is for adapters, and 'model' names the base.", param="lora_scale")
    context = service.engine.cache.capacity
    vocabulary = service.engine.decoder.model.get_input_embeddings().num_embeddings
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, Piece | End | Failed]] = asyncio.Queue()
    choices: list[_Choice] = []
    if not prompts:
        raise ApiError(400, "There is no prompt. Send at least one.", param="prompt")
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, "The prompt is empty. Send at least one token.", param="prompt")
        if max(prompt) >= vocabulary:
            raise ApiError(400, f"Token {max(prompt)} is not in the vocabulary of {vocabulary}.", param="prompt")
        if len(prompt) + (limit or 1) > context:
            raise ApiError(
                400, f"The prompt has {len(prompt)} tokens and {limit or 1} more are asked for; the context is {context}.",
                code="context_length_exceeded", param="messages" if chat else "prompt",
            )  # fmt: skip
        tokens = limit or min(DEFAULT_TOKENS if chat else 16, context - len(prompt))
        for number in range(body.n or 1):
            index = len(choices)

            def tell(event: Piece | End | Failed, index: int = index) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            seed = None if body.seed is None else body.seed + number
            temperature = 1.0 if body.temperature is None else body.temperature
            sampling = Sampling(temperature, body.top_p or 1.0, seed, logprobs)
            choices.append(
                _Choice(index, events, engines.Request(prompt, tokens, tell, adapter, body.lora_scale, sampling, body.stops,
                                                       body.ignore_eos))
            )  # fmt: skip
    try:
        service.engine.submit(*(choice.request for choice in choices))
    except QueueFullError as error:
        service.metrics.refused()
        raise _as_api(error) from None
    form = _Form(service, body.model, chat, logprobs is not None)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        first = await _unless_gone(request, _next(service, choices, events))
        return StreamingResponse(_stream(service, form, choices, events, first, usage), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})  # fmt: skip
    await _unless_gone(request, _rest(service, choices, events))
    return JSONResponse(form.whole(choices))


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns; ends it where the client goes away meanwhile."""
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
    """The next thing told, noted in its choice; cancels all where one has failed or nobody waits any more."""
    try:
        index, event = await events.get()
        if isinstance(event, Failed):
            raise _as_api(event.error)
    except BaseException:
        _cancel(service, choices)
        raise
    choice = choices[index]
    if isinstance(event, Piece):
        choice.text.append(event.text)
        if event.token is not None:
            choice.tokens.append(event.token)
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
                yield _event(form.chunk(choice.index, {"role": "assistant", "content": ""}, None))
        choice, event = first
        while True:
            if isinstance(event, End):
                yield _event(form.chunk(choice.index, {}, event.reason))
            elif event.text or (event.token is not None and form.logprobs):
                yield _event(form.chunk(choice.index, {"content": event.text}, None, event.token))
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
    """The JSON of chat and of plain completions."""

    def __init__(self, service: Service, model: str, chat: bool, logprobs: bool) -> None:
        self.service, self.model, self.chat, self.logprobs = service, model, chat, logprobs
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def head(self, *, chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def chunk(self, index: int, delta: dict[str, Any], reason: str | None, token: Chosen | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        told = self._told([token]) if token is not None and self.logprobs else None
        return {**self.head(chunk=True), "choices": [{"index": index, **said, "logprobs": told, "finish_reason": reason}]}

    def whole(self, choices: list[_Choice]) -> dict[str, Any]:
        found = []
        for choice in choices:
            text = "".join(choice.text)
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            told = self._told(choice.tokens) if self.logprobs else None
            assert choice.end is not None
            found.append({"index": choice.index, **said, "logprobs": told, "finish_reason": choice.end.reason})
        return {**self.head(chunk=False), "choices": found, "usage": self.usage(choices)}

    def usage(self, choices: list[_Choice]) -> dict[str, Any]:
        ends = [choice.end for choice in choices if choice.end is not None]
        prompts = {id(choice.request.prompt): len(choice.request.prompt) for choice in choices}  # n answers share a prompt
        made, reused = sum(end.completion_tokens for end in ends), sum(end.reused_tokens for end in ends)
        read = sum(prompts.values())
        return {
            "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": min(reused, read)},
        }  # fmt: skip

    def _told(self, tokens: list[Chosen]) -> dict[str, Any]:
        if self.chat:
            return {"content": [{**self._token(one.token, one.logprob), "top_logprobs": [self._token(*top) for top in one.top]}
                                for one in tokens]}  # fmt: skip
        return {
            "tokens": [self._text(one.token) for one in tokens], "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [{self._text(token): value for token, value in one.top} for one in tokens], "text_offset": [],
        }  # fmt: skip

    def _text(self, token: int) -> str:
        return str(self.service.tokenizer.decode([token]))

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class _BodyLimit:
    """Refuses bodies of more than `limit` bytes, announced or not."""

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = ApiError(413, f"The body is larger than {self.limit} bytes. Send less.", code="body_too_large")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.limit:
            await error.response()(scope, receive, send)
            return
        body, more = b"", True
        while more:  # whole before anything is done: requests are small
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit:
                await error.response()(scope, receive, send)
                return
        told = False

        async def again() -> Any:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)
