"""Request schemas: the supported OpenAI fields with their bounds, and the extensions `lora_scale` and `ignore_eos`.

An unsupported field that would change the output is rejected unless it has its default value; unknown fields are ignored, as
OpenAI's clients send more every year.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_N, MAX_STOPS, MAX_TOP, MAX_PARTS = 16, 4, 20, 4096

_T = TypeVar("_T")
_Many = Annotated[list[_T], Field(fail_fast=True)]  # report the first error only
_Token = Annotated[int, Field(ge=0)]

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []), "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}), "best_of": (None, 1), "suffix": (None, ""), "echo": (None, False),
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "modalities": (None, ["text"]), "audio": (None,),
}  # fmt: skip
"""Unsupported field -> values that have no effect and are accepted."""


class StreamOptions(BaseModel):
    """Options of a stream: whether a last chunk reports the token usage."""

    include_usage: bool = False


class Generation(BaseModel):
    """Fields that chat and text completions share."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1, max_length=512)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    lora_scale: Annotated[float, Field(ge=-10, le=10)] = 1.0

    @model_validator(mode="after")
    def _nothing_unsupported(self) -> Generation:
        for name, value in (self.model_extra or {}).items():
            if name in _UNSUPPORTED and value not in _UNSUPPORTED[name]:
                raise ValueError(f"'{name}' is not supported by this server. Leave it out.")
        if any(not text for text in self.stops):
            raise ValueError("'stop' must not hold an empty text.")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Part(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A chat message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS)]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """Number of top tokens to report with log probabilities; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    prompt: str | _Many[str] | _Many[_Token] | _Many[_Many[_Token]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def wanted_logprobs(self) -> int | None:
        """Number of top tokens to report with log probabilities; None: no log probabilities."""
        return self.logprobs


class LoadRequest(BaseModel):
    """The body of /v1/load_lora_adapter; `lora_path`, if given, must equal `lora_name`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_path: str | None = None
    pin: bool = False


class UnloadRequest(BaseModel):
    """The body of /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
