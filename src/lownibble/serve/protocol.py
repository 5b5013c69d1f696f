"""Request schemas: the options of OpenAI's and vLLM's clients with their bounds, and the extension `lora_scale`.

An option that is not known is refused by name, unless its value is one in `_WITHOUT_EFFECT`. What cannot change an output
(`NOTED`) is accepted, and the response names it in `ignored`. Null is as if the option were not there.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_N, MAX_STOPS, MAX_TOP, MAX_PARTS, MAX_BIASES, MAX_TOOLS = 16, 16, 20, 4096, 1024, 128

_T = TypeVar("_T")
_Many = Annotated[list[_T], Field(fail_fast=True)]  # report the first error only
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Top = Annotated[int, Field(ge=0, le=MAX_TOP)]
_Count = Annotated[int, Field(ge=0, lt=2**31)]

NOTED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Options about the account and not the output."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "functions": ([],), "function_call": ("none",), "best_of": (1,), "suffix": ("",), "echo": (False,), "audio": (),
    "modalities": (["text"],), "use_beam_search": (False,), "length_penalty": (1.0,), "early_stopping": (False,),
    "min_tokens": (0,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "priority": (0,),
    "include_stop_str_in_output": (False,), "return_tokens_as_token_ids": (False,), "return_token_ids": (False,),
    "bad_words": ([],), "add_special_tokens": (False,),
    "background": (False,), "truncation": ("disabled",), "annotations": ([],), "include_obfuscation": (False,),
    "continuous_usage_stats": (False,),
}  # fmt: skip
"""Option that is not supported -> values of it that have no effect."""


class Strict(BaseModel):
    """Refuses options that it does not know, but for those without effect."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _nothing_unknown(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value in _WITHOUT_EFFECT.get(name, ()) or (name in NOTED and isinstance(self, Sampled)):
                continue
            near = difflib.get_close_matches(name[:64], type(self).model_fields, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"'{name[:64]}' is not supported by this server. Leave it out.{hint}")
        return self


class StreamOptions(Strict):
    """Options of a stream: whether a last chunk reports the token usage."""

    include_usage: bool = False


class JsonSchema(Strict):
    """A named JSON schema; `strict` or not, it is followed."""

    name: Annotated[str, Field(max_length=128)] = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the output must be: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' must be given for the type 'json_schema', and for no other.")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The JSON schema; None where the output is free."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_


class Sampled(Strict):
    """Fields that all completions share."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[_Token, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[_Token], Field(max_length=128)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    lora_scale: Annotated[float, Field(ge=-10, le=10)] = 1.0

    @model_validator(mode="after")
    def _no_empty_stop(self) -> Self:
        if any(not text for text in self.stops):
            raise ValueError("'stop' must not hold an empty text.")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def noted(self) -> list[str]:
        """Options that were accepted and change nothing."""
        return [name for name in NOTED if name in (self.model_extra or {})]


class Generation(Sampled):
    """Fields that chat and text completions share."""

    max_tokens: _Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    prompt_logprobs: _Top | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("'prompt_logprobs' cannot be streamed. Leave out 'stream'.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is for streams. Set 'stream', or leave it out.")
        return self


class Part(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """The function of a call, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call that an assistant's message made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """A chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    name: Annotated[str, Field(max_length=128)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, given: Any) -> Any:
        content = given.get("content") if isinstance(given, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
                raise ValueError(f"a content part of type '{part['type'][:64]}' is not supported: this server reads text.")
        return given

    @model_validator(mode="after")
    def _of_its_role(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("'content' is missing.")
        for name, roles in (("tool_calls", ("assistant",)), ("reasoning_content", ("assistant",)), ("tool_call_id", ("tool",))):
            if getattr(self, name) is not None and self.role not in roles:
                raise ValueError(f"'{name}' is not for messages of the role '{self.role}'.")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """A function by name."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


_Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]


class Rendering(Strict):
    """How the chat template renders messages."""

    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=64)

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("'continue_final_message' and 'add_generation_prompt' exclude each other. Set one of them.")
        return self

    @property
    def generation(self) -> bool:
        """Whether the header of the assistant's next turn is added."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class ChatRequest(Generation, Rendering):
    """The body of /v1/chat/completions."""

    messages: _Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: _Top | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _consistent_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true.")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("'tool_choice' asks for a tool, and 'tools' names none.")
        known = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in known:
            raise ValueError(f"'tool_choice' names '{self.tool_choice.function.name[:64]}', which is not among the tools.")
        if len(set(known)) != len(known):
            raise ValueError("'tools' has two functions of the same name.")
        if self.tools_shown and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("'response_format' and 'tools' exclude each other: set 'tool_choice' to 'none', or leave one out.")
        return self

    @property
    def tools_shown(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def tools_required(self) -> list[Tool]:
        """The tools of which the output must call one; [] where it need not."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools_shown if tool.function.name == self.tool_choice.function.name]
        return self.tools_shown if self.tool_choice == "required" else []

    @property
    def noted(self) -> list[str]:
        """Options that were accepted and change nothing."""
        free = [tool for tool in self.tools_shown if tool.function.strict and tool not in self.tools_required]
        return [*super().noted, *(f"tools.{tool.function.name}.strict" for tool in free)]

    @property
    def wanted_logprobs(self) -> int | None:
        """Number of top tokens to report with log probabilities; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Prompt(Strict):
    """A text or tokens, or several of either."""

    prompt: str | _Many[str] | _Many[_Token] | _Many[_Many[_Token]]
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class CompletionRequest(Generation, Prompt):
    """The body of /v1/completions."""

    logprobs: _Top | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _something_to_say(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("'max_tokens' of 0 is for 'echo' and 'prompt_logprobs'. Ask for a token, or for one of them.")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        """Number of top tokens to report with log probabilities; None: no log probabilities."""
        return self.logprobs


class TokenizeRequest(Rendering):
    """The body of /tokenize: a text, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: _Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("Give either 'prompt' or 'messages'.")
        return self


class DetokenizeRequest(Strict):
    """The body of /detokenize."""

    model: str | None = None
    tokens: _Many[_Token]


class LoadRequest(Strict):
    """The body of /v1/load_lora_adapter; `lora_path`, if given, must equal `lora_name`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_path: str | None = None
    pin: bool = False


class UnloadRequest(Strict):
    """The body of /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
