"""Routes of the OpenAI-compatible HTTP API (FastAPI) and access control; completions are generated in `answers.py`."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from lownibble.errors import InputError
from lownibble.listening import is_address
from lownibble.serve.answers import answer, check_number, check_tokens
from lownibble.serve.constraint import ConstraintError, Matcher
from lownibble.serve.prompts import conversation_text, encode
from lownibble.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    LoadRequest,
    TokenizeRequest,
    UnloadRequest,
)
from lownibble.serve.replies import Asked
from lownibble.serve.responses import NAMES, ResponsesReply, ResponsesRequest
from lownibble.serve.service import ApiError, Service, as_api
from lownibble.serve.tools import call_grammar

PAGE = Path(__file__).with_name("page.html")
BODY_SECONDS, SEND_SECONDS = 30.0, 60.0
"""Timeouts in seconds: for receiving a request's whole body, and for each message sent to a client."""

_POLICY = "default-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"


def app(service: Service) -> FastAPI:
    """Build the FastAPI application."""
    made = FastAPI(title="Lownibble", docs_url=None, redoc_url=None)
    made.add_middleware(_Gate, service=service)

    @made.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @made.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if "json" not in request.headers.get("content-type", ""):  # a cross-origin page can send it without a CORS preflight
            return ApiError(415, "The body is not said to be JSON. Send the header 'Content-Type: application/json'.").response()
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

    def admin(request: Request) -> None:  # `_Gate` has checked client keys
        _check_key(request.headers, service.admin_key or service.api_key)

    @made.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": _POLICY})

    @made.get("/health")
    async def health() -> dict[str, Any]:
        if service.engine.lost:
            raise as_api(service.engine.lost)
        return {"status": "ok", "running": service.engine.running, "waiting": service.engine.waiting}

    @made.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(await run_in_threadpool(service.metrics.render, service.engine, service.registry))

    @made.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = await run_in_threadpool(service.registry.names)
        refused = [{"id": name, "reason": why} for name, why in sorted(service.registry.not_taken.items())]
        return {"object": "list", "data": [_model(service, name) for name in (service.names[0], *names)], "not_taken": refused}

    @made.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name)

    @made.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_number(service, body, 1)
        return await answer(service, request, body, await run_in_threadpool(_asked_in_chat, service, body))

    @made.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_number(service, body, len(body.prompts))
        return await answer(service, request, body, await run_in_threadpool(_asked, service, body))

    @made.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        chat = body.as_chat()
        try:
            asked = await run_in_threadpool(_asked_in_chat, service, chat)
            return await answer(service, request, chat, asked, ResponsesReply(service, body, chat, asked))
        except ApiError as error:
            error.rename(NAMES)
            raise

    @made.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        names = ("bos_token", "eos_token", "pad_token", "chat_template")
        return {"tokenizer_class": type(service.tokenizer).__name__, **{name: getattr(service.tokenizer, name) for name in names}}

    @made.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        ids = await run_in_threadpool(_tokens, service, body)
        strings = {"token_strs": [service.texts(token) for token in ids]} if body.return_token_strs else {}
        return {"count": len(ids), "max_model_len": service.engine.cache.capacity, "tokens": ids, **strings}

    @made.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        _check_name(service, body.model)
        check_tokens(service, body.tokens, "tokens")
        return {"prompt": service.texts.all(body.tokens)}

    @made.post("/v1/load_lora_adapter", dependencies=[Depends(admin)])
    async def load(body: LoadRequest) -> dict[str, Any]:
        if body.lora_path not in (None, body.lora_name):
            raise ApiError(400, "'lora_path' must be the adapter's name: adapters are folders in --adapters.", param="lora_path")
        loaded = await _guarded(run_in_threadpool(service.registry.load, body.lora_name, pin=body.pin))
        return {
            "id": loaded.name, "object": "model", "bytes": loaded.nbytes, "digest": loaded.digest, "pinned": body.pin,
            "warning": loaded.note,
        }  # fmt: skip

    @made.post("/v1/unload_lora_adapter", dependencies=[Depends(admin)])
    async def unload(body: UnloadRequest) -> dict[str, Any]:
        await _guarded(run_in_threadpool(service.registry.unload, body.lora_name))
        return {"id": body.lora_name, "object": "model", "unloaded": True}

    return made


def _check_key(headers: Headers, *keys: str | None) -> None:
    known = [key for key in keys if key]
    if not keys[0]:
        return
    given = headers.get("authorization", "").removeprefix("Bearer ").encode()
    same = [hmac.compare_digest(given, key.encode()) for key in known]  # compare all: constant time
    if not any(same):
        raise ApiError(401, "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.", code="invalid_api_key")


def _model(service: Service, name: str) -> dict[str, Any]:
    is_base = name in service.names
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "lownibble",
        "parent": None if is_base else service.names[0], "max_model_len": service.engine.cache.capacity,
    }  # fmt: skip


async def _guarded(work: Awaitable[Any]) -> Any:
    try:
        return await work
    except InputError as error:
        raise as_api(error) from None


def _asked(service: Service, body: CompletionRequest) -> Asked:
    given = body.prompts
    prompts = [encode(service.tokenizer, one, special=body.add_special_tokens) if isinstance(one, str) else one for one in given]
    for prompt in prompts:
        check_tokens(service, prompt, "prompt")
    texts = [one if isinstance(one, str) else service.texts.all(one) for one in given] if body.echo else None
    starts = None
    if body.echo and body.wanted_logprobs is not None:
        starts = [service.texts.starts(one, special=body.add_special_tokens) for one in given]
    return Asked(
        prompts, body.max_tokens, body.wanted_logprobs, chat=False, texts=texts, starts=starts, continues=True,
        matcher=_matcher(service, body),
    )  # fmt: skip


def _asked_in_chat(service: Service, body: ChatRequest) -> Asked:
    text = conversation_text(service.chat, body, body.messages, body.tools_shown)
    prompt = encode(service.tokenizer, text, special=False)
    limit, matcher, form = body.max_completion_tokens or body.max_tokens, _matcher(service, body), None
    several = body.parallel_tool_calls is not False
    if body.tools_shown:
        form = service.calls
        if form is None:
            raise ApiError(400, "The chat template prints calls of tools in a form that this server does not read. Leave 'tools' "
                           "out, or set 'tool_choice' to 'none'.", param="tools")  # fmt: skip
        if body.tools_required:
            grammar = call_grammar(form, body.tools_required, several=several, tokenizer=service.tokenizer)
            matcher = _compiled(service.grammars.lark, grammar, "tools")
    names = frozenset(tool.function.name for tool in body.tools_shown)
    noted = (
        f"messages.{n}.name" for n, one in enumerate(body.messages) if one.name and one.role != "tool" and one.name not in text
    )
    return Asked(
        [prompt], limit, body.wanted_logprobs, chat=True, continues=body.continue_final_message, matcher=matcher, calls=form,
        names=names, most=None if several else 1, noted=tuple(noted),
    )  # fmt: skip


def _matcher(service: Service, body: Generation) -> Matcher | None:
    """What outputs must follow by `response_format`."""
    schema = None if body.response_format is None else body.response_format.schema_wanted
    return None if schema is None else _compiled(service.grammars.json, schema, "response_format")


def _compiled(compile_: Callable[[Any], Matcher], grammar: Any, param: str) -> Matcher:
    try:
        return compile_(grammar)
    except ConstraintError as error:
        raise ApiError(400, str(error), code="cannot_constrain", param=param) from None


def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    _check_name(service, body.model)
    if body.messages is None:
        special = body.add_special_tokens is not False
        return encode(service.tokenizer, body.prompt or "", special=special)
    text = conversation_text(service.chat, body, body.messages, body.tools or [])
    return encode(service.tokenizer, text, special=bool(body.add_special_tokens))


def _check_name(service: Service, name: str | None) -> None:
    if name is not None:
        service.check_model(name)


class _Gate:
    """Middleware: reads bodies; rejects those too large (announced or not) or too slow, requests without a valid key, foreign
    Host headers if there is no API key, and requests beyond the limit. GET of pages and of what monitors watch needs no key and
    does not count. Drops clients that do not read their response."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self.app, self.service, self.limits, self.inside = app, service, service.limits, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        counts = scope["method"] != "GET" or scope["path"].startswith(("/v1/", "/tokenizer_info"))
        self.inside += counts
        try:
            body = await self._enter(scope, receive, counts)
        except ApiError as refused:
            await refused.response()(scope, receive, send)
        else:
            if body is not None:
                await self._pass(body, scope, receive, send)
        finally:
            self.inside -= counts

    async def _enter(self, scope: Any, receive: Any, counts: bool) -> bytes | None:
        """The body of an admitted request; None if the client disconnected."""
        headers, service = Headers(scope=scope), self.service
        if counts and self.inside > self.limits.requests:
            raise ApiError(
                429, f"{self.limits.requests} requests are in progress. Try again in a while.", code="too_many_requests"
            )
        if not service.api_key and not is_address(host := headers.get("host", ""), service.host):
            raise ApiError(403, f"Without an API key this server answers to its address only, not to '{host[:100]}': a page of "
                           "that name could use it. Start it with --api-key, or with that name as --host.")  # fmt: skip
        if counts:
            _check_key(headers, service.api_key, service.admin_key)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._body(scope, receive)
        except TimeoutError:
            message = f"The body did not arrive within {BODY_SECONDS} seconds. Send it at once."
            raise ApiError(408, message, code="body_too_slow") from None

    async def _body(self, scope: Any, receive: Any) -> bytes | None:
        """The whole body (requests are small); None if the client disconnected."""
        error = ApiError(413, f"The body is larger than {self.limits.body} bytes. Send less.", code="body_too_large")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.limits.body:
            raise error
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limits.body:
                raise error
        return bytes(body)

    async def _pass(self, body: bytes, scope: Any, receive: Any, send: Any) -> None:
        told = False

        async def again() -> Any:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_soon(message: Any) -> None:
            async with asyncio.timeout(SEND_SECONDS):  # drop a client that does not read
                await send(message)

        await self.app(scope, again, send_soon)
