"""State that the routes share (engine, registry, limits, metrics), and errors in OpenAI's format."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi.responses import JSONResponse, Response

from lownibble.data.chat import ChatRenderer
from lownibble.errors import InputError
from lownibble.serve.constraint import ConstraintError, Grammars
from lownibble.serve.engine import DeviceLostError, Engine, QueueFullError
from lownibble.serve.metrics import Metrics
from lownibble.serve.registry import NoRoomError, Registry, UnknownAdapterError
from lownibble.serve.texts import TokenTexts
from lownibble.serve.tools import CallForm, call_form


class Json(JSONResponse):
    """A JSON response. Lone surrogates, which a client may have sent, are escaped: UTF-8 has no encoding of them."""

    def render(self, content: Any) -> bytes:
        """The body."""
        try:
            return super().render(content)
        except UnicodeEncodeError:
            return json.dumps(content, allow_nan=False).encode()


class ApiError(Exception):
    """An error response in OpenAI's format."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def rename(self, names: dict[str, str]) -> None:
        """Give the option that is to blame the name that the client knows."""
        error = self.body["error"]
        error["param"] = names.get(error["param"] or "", error["param"])

    def response(self) -> Response:
        """The HTTP response."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return Json(self.body, self.status, headers)


def as_api(error: Exception) -> ApiError:
    """Convert an engine or registry error to the one sent to the client."""
    if isinstance(error, UnknownAdapterError):
        return ApiError(404, str(error), code="model_not_found", param="model")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, DeviceLostError):
        return ApiError(503, str(error), code="device_lost")
    if isinstance(error, NoRoomError):
        return ApiError(429, str(error), code="no_room")
    if isinstance(error, ConstraintError):
        return ApiError(400, str(error), code="cannot_constrain")
    if isinstance(error, InputError):
        return ApiError(422, str(error), code="bad_adapter", param="model")
    return ApiError(500, f"An error of the server's own: {type(error).__name__}.")


@dataclass(frozen=True)
class Limits:
    """Limits of a request: bytes of its body, tokens of its prompt and output (None: up to the context). `requests`: maximum in
    progress, including those still being received."""

    body: int = 1 << 20
    prompt: int | None = None
    output: int | None = None
    requests: int = 1024


@dataclass(frozen=True)
class Service:
    """What the routes need. `names`: of the base; `host`: the configured host. Keys are compared in constant time; without a
    configured key, none is required."""

    engine: Engine
    registry: Registry
    tokenizer: Any
    names: tuple[str, ...]
    api_key: str | None = None
    admin_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    host: str = "127.0.0.1"
    created: int = field(default_factory=lambda: int(time.time()))
    metrics: Metrics = field(default_factory=Metrics)

    @cached_property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.engine.decoder.model.get_input_embeddings().num_embeddings)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special tokens and their ids."""
        return {token.content: id_ for id_, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def chat(self) -> ChatRenderer:
        """The chat template."""
        return ChatRenderer(self.tokenizer)

    @cached_property
    def texts(self) -> TokenTexts:
        """Texts of single tokens."""
        return TokenTexts(self.tokenizer)

    @cached_property
    def grammars(self) -> Grammars:
        """Compiler of grammars for outputs."""
        return Grammars(self.tokenizer, self.vocabulary, frozenset(self.engine.eos))

    @cached_property
    def calls(self) -> CallForm | None:
        """How the chat template prints calls of tools; None where that is not known."""
        return call_form(self.chat)

    def check_model(self, name: str) -> str | None:
        """The adapter that a request's `model` names, None for the base.

        Raises:
            ApiError: it names neither the base nor an adapter.
        """
        if name in self.names:
            return None
        if name not in self.registry:
            raise ApiError(404, f"There is no model '{name[:128]}'. GET /v1/models lists what there is.", code="model_not_found",
                           param="model")  # fmt: skip
        return name
