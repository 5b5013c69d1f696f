"""Routes of the OpenAI-compatible HTTP API (FastAPI) and access control; completions are generated in `answers.py`."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from jinja2 import TemplateError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from lownibble.errors import InputError
from lownibble.serve.answers import answer, check_number
from lownibble.serve.protocol import ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from lownibble.serve.service import ApiError, Service, as_api

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
        return {"status": "ok", "running": service.engine.running, "waiting": service.engine.waiting}

    @made.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(await run_in_threadpool(service.metrics.render, service.engine, service.registry))

    @made.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = await run_in_threadpool(service.registry.names)
        return {"object": "list", "data": [_model(service, name) for name in (service.names[0], *names)]}

    @made.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name)

    @made.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_number(service, body, 1)
        messages = [{"role": one.role, "content": one.text} for one in body.messages]
        try:
            text = service.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            raise ApiError(400, f"The model's chat template does not take these messages: {error}", param="messages") from None
        prompt = await run_in_threadpool(_encode, service, text, special=False)
        limit = body.max_completion_tokens or body.max_tokens
        return await answer(service, request, body, [prompt], limit, body.wanted_logprobs, chat=True)

    @made.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_number(service, body, len(body.prompts))
        prompts = []
        for one in body.prompts:
            prompts.append(await run_in_threadpool(_encode, service, one) if isinstance(one, str) else one)
        return await answer(service, request, body, prompts, body.max_tokens, body.wanted_logprobs, chat=False)

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


def _encode(service: Service, text: str, *, special: bool = True) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, "The text holds a lone surrogate. Send valid Unicode.", param="prompt") from None
    ids: list[int] = service.tokenizer(text, add_special_tokens=special).input_ids
    return ids


class _Gate:
    """Middleware: reads bodies; rejects those too large (announced or not) or too slow, requests under /v1 without a valid key,
    foreign Host headers if there is no API key, and requests beyond the limit (GET outside /v1, for monitoring, is exempt from
    it). Drops clients that do not read their response."""

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self.app, self.service, self.limits, self.inside = app, service, service.limits, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        counts = scope["method"] != "GET" or scope["path"].startswith("/v1/")
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
        if not service.api_key and not _is_address(host := headers.get("host", ""), service.host):
            raise ApiError(403, f"Without an API key this server answers to its address only, not to '{host[:100]}': a page of "
                           "that name could use it. Start it with --api-key, or with that name as --host.")  # fmt: skip
        if scope["path"].startswith("/v1/"):
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


def _is_address(host: str, own: str) -> bool:
    """Whether a Host header is localhost, an IP address, or the server's configured host."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name.lower() in ("localhost", own.lower()):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
