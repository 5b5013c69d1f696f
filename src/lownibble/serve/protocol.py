"""What requests look like: OpenAI's fields that are meant here, with their bounds; one extension, `lora_scale`.

A field that would change the answer and is not supported is refused if it is set to anything but its default; what is not known
is ignored, as OpenAI's clients send more every year.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_N, MAX_STOPS, MAX_TOP, MAX_PARTS = 16, 4, 20, 4096

_T = TypeVar("_T")
_Many = Annotated[list[_T], Field(fail_fast=True)]  # a million errors are no better than the first
_Token = Annotated[int, Field(ge=0)]

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []), "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}), "best_of": (None, 1), "suffix": (None, ""), "echo": (None, False),
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "modalities": (None, ["text"]), "audio": (None,),
}  # fmt: skip
"""Field -> values that ask for nothing."""


class StreamOptions(BaseModel):
    """What a stream tells besides."""

    include_usage: bool = False


class Generation(BaseModel):
    """What chat and plain completions have in common."""

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
        """The texts that end the output."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Part(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS)]

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many most probable tokens are told, None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    prompt: str | _Many[str] | _Many[_Token] | _Many[_Many[_Token]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each text or list of tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def wanted_logprobs(self) -> int | None:
        """How many most probable tokens are told, None: no probabilities."""
        return self.logprobs


class LoadRequest(BaseModel):
    """The body of /v1/load_lora_adapter; `lora_path`, where it is given, is the adapter's name again."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_path: str | None = None
    pin: bool = False


class UnloadRequest(BaseModel):
    """The body of /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
