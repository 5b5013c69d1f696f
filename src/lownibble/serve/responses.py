"""OpenAI's Responses API on the code of chats: a request becomes one for a chat, and its reply has this API's items and events.

Nothing is kept between requests: `previous_response_id`, `conversation` and `store` true are refused by name, and a client sends
the earlier items again, as it got them. Options that the API does not have are those of chats (`seed`, `stop`, `top_k`, ...).
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from lownibble.serve.protocol import MAX_PARTS, MAX_TOOLS, MAX_TOP, ChatRequest, JsonSchema, Sampled, Strict
from lownibble.serve.replies import Asked, Choice, Reply, event_text
from lownibble.serve.request import End, Event, Piece
from lownibble.serve.service import ApiError, Service
from lownibble.serve.tools import Call

NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
"""Options of chats that have another name here."""

_LOGPROBS = "message.output_text.logprobs"
_Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict):
    """A part of an item's content; `annotations` and `logprobs` come back with an earlier output, and are not read."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


def _text_or_list(given: Any) -> str:
    return "text" if isinstance(given, str) else "list"  # errors are of the one that it is


_Text = Annotated[str, Tag("text")]
_Parts = Annotated[list[InputText], Field(fail_fast=True, max_length=MAX_PARTS), Tag("list")]
_Content = Annotated[_Text | _Parts, Discriminator(_text_or_list)]


class InputMessage(Strict):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content
    id: str | None = None
    status: _Status | None = None


class InputCall(Strict):
    """A call that the model has made; `arguments`: JSON text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: _Status | None = None


class InputOutput(Strict):
    """What a call has returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: _Content
    id: str | None = None
    status: _Status | None = None


def _kind(given: Any) -> Any:
    return given.get("type") or "message" if isinstance(given, dict) else getattr(given, "type", None)


Item = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputOutput, Tag("function_call_output")],
    Discriminator(_kind),
]  # fmt: skip


_Items = Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS), Tag("list")]


class TextFormat(Strict):
    """What the output must be; `name`, `schema`, ... are for the type `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=128)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("'schema' must be given for the type 'json_schema', and for no other.")
        return self


class TextOptions(Strict):
    """Options of text outputs."""

    format: TextFormat | None = None


class FlatTool(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class ResponsesRequest(Sampled):
    """The body of /v1/responses."""

    input: Annotated[_Text | _Items, Discriminator(_text_or_list)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=8)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=64)
    store: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.store:
            raise ValueError("'store' is not supported: this server keeps no responses. Set it to false, or leave it out.")
        if self.top_logprobs is not None and not self.include:
            raise ValueError(f"'top_logprobs' needs 'include': ['{_LOGPROBS}'].")
        return self

    def as_chat(self) -> ChatRequest:
        """The same for a chat.

        Raises:
            ApiError: the options do not go together.
        """
        given = {name: getattr(self, name) for name in (*Sampled.model_fields, "parallel_tool_calls", "chat_template_kwargs")}
        tools = [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()]
        chosen = self.tool_choice
        named = {"type": "function", "function": {"name": chosen.name}} if isinstance(chosen, FlatChoice) else chosen
        format_ = None if self.text is None else self.text.format
        try:
            return ChatRequest.model_validate({
                **given, **{name: (self.model_extra or {})[name] for name in self.noted},
                "messages": self._messages(), "max_completion_tokens": self.max_output_tokens, "tools": tools or None,
                "tool_choice": named,
                "response_format": None if format_ is None else _response_format(format_),
                "logprobs": bool(self.include) or None, "top_logprobs": self.top_logprobs,
            })  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            message, where = first["msg"].removeprefix("Value error, "), str((*first["loc"], "input")[0])
            raise ApiError(400, message.replace("'response_format'", "'text.format'"), param=NAMES.get(where, where)) from None

    def _messages(self) -> list[dict[str, Any]]:
        """The items as messages; calls belong to the assistant's message before them."""
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            match item:
                case InputMessage():
                    found.append({"role": item.role, "content": _text(item.content)})
                case InputOutput():
                    found.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
                case InputCall():
                    if not found or found[-1]["role"] != "assistant":
                        found.append({"role": "assistant", "content": None})
                    function = {"name": item.name, "arguments": item.arguments}
                    found[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
        return found


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _response_format(given: TextFormat) -> dict[str, Any]:
    schema = given.model_dump(by_alias=True, exclude_none=True, include={*JsonSchema.model_fields})
    return {"type": given.type, **({"json_schema": schema} if given.type == "json_schema" else {})}


class ResponsesReply(Reply):
    """The response: output items in the order in which the text and the calls of tools came."""

    def __init__(self, service: Service, body: ResponsesRequest, chat: ChatRequest, asked: Asked) -> None:
        super().__init__(service, chat, asked)
        self.body, self.id = body, f"resp_{uuid.uuid4().hex}"
        self.items: list[dict[str, Any]] = []
        self._number = 0  # of the next event
        self._told: list[dict[str, Any]] = []  # log probabilities of tokens whose text has not come yet

    def begun(self, choices: list[Choice]) -> list[str]:
        """As `Reply.begun`."""
        return [self._event(f"response.{name}", response=self._response("in_progress")) for name in ("created", "in_progress")]

    def take(self, choice: Choice, event: Event, new: list[str | Call]) -> None:
        """As `Reply.take`."""
        self.on(choice, event, new)

    def on(self, choice: Choice, event: Event, new: list[str | Call]) -> list[str]:
        """As `Reply.on`."""
        if isinstance(event, Piece) and event.token is not None and self.logprobs:
            self._told += self.told([event], choice)["content"]
        events: list[str] = []
        for part in new:
            events += self._call(part) if isinstance(part, Call) else self._text(part)
        if isinstance(event, End):
            events += [] if self.items else self._text("")
            events += self._close("incomplete" if choice.reason == "length" else "completed")
        return events

    def failed(self, error: ApiError) -> list[str]:
        """As `Reply.failed`."""
        told = {"code": "server_error", "message": error.body["error"]["message"]}
        return [self._event("response.failed", response={**self._response("failed"), "error": told})]

    def ended(self, choices: list[Choice]) -> list[str]:
        """As `Reply.ended`."""
        response = self.whole(choices)
        return [self._event(f"response.{response['status']}", response=response)]

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """As `Reply.whole`."""
        cut = choices[0].reason == "length"
        told = {"incomplete_details": {"reason": "max_output_tokens"} if cut else None, "usage": self.usage(choices)}
        return {**self._response("incomplete" if cut else "completed"), **told}

    def usage(self, choices: list[Choice]) -> dict[str, Any]:
        """As `Reply.usage`."""
        found = super().usage(choices)
        read, cached = found["prompt_tokens"], found["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": read, "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": read - cached},
            "output_tokens": found["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": found["total_tokens"],
        }  # fmt: skip

    def _response(self, status: str) -> dict[str, Any]:
        body, chosen = self.body, self.body.tool_choice or "auto"
        format_ = TextFormat(type="text") if body.text is None or body.text.format is None else body.text.format
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": self.model,
            "output": self.items, "error": None, "incomplete_details": None, "usage": None, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens, "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p, "top_logprobs": body.top_logprobs,
            "text": {"format": format_.model_dump(by_alias=True, exclude_none=True)},
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "tool_choice": chosen.model_dump() if isinstance(chosen, FlatChoice) else chosen,
            "parallel_tool_calls": body.parallel_tool_calls is not False, "store": False, "previous_response_id": None,
            "truncation": "disabled", "background": False, "metadata": (body.model_extra or {}).get("metadata", {}),
            **({"ignored": self.ignored} if self.ignored else {}),
        }  # fmt: skip

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return f"event: {kind}\n{event_text({'type': kind, 'sequence_number': self._number - 1, **fields})}"

    def _of_item(self, kind: str, **fields: Any) -> str:
        """An event of the last item."""
        return self._event(f"response.{kind}", item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)

    def _item(self, kind: str) -> str:
        return self._event(f"response.output_item.{kind}", output_index=len(self.items) - 1, item=self.items[-1])

    def _text(self, text: str) -> list[str]:
        events: list[str] = []
        if not self.items or self.items[-1]["status"] != "in_progress":
            message: dict[str, Any] = {"type": "message", "role": "assistant", "status": "in_progress", "content": []}
            self.items.append({"id": f"msg_{uuid.uuid4().hex}", **message})
            events.append(self._item("added"))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.items[-1]["content"] = [part]
            events.append(self._of_item("content_part.added", content_index=0, part=part))
        [part] = self.items[-1]["content"]
        told, self._told = self._told, []
        part["text"] += text
        part["logprobs"] += told
        return [*events, self._of_item("output_text.delta", content_index=0, delta=text, logprobs=told)]

    def _close(self, status: str) -> list[str]:
        """End the last item, if it is a message that goes on."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        message = self.items[-1]
        [part] = message["content"]
        part["logprobs"] += self._told
        self._told, message["status"] = [], status
        return [
            self._of_item("output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]),
            self._of_item("content_part.done", content_index=0, part=part), self._item("done"),
        ]  # fmt: skip

    def _call(self, call: Call) -> list[str]:
        """A tool call, streamed once it is complete; there are no log probabilities of its tokens."""
        events, self._told = self._close("completed"), []
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "call_id": f"call_{uuid.uuid4().hex[:24]}",
            "name": call.name,
        }
        self.items.append({**item, "arguments": "", "status": "in_progress"})
        events += [self._item("added"), self._of_item("function_call_arguments.delta", delta=call.arguments)]
        self.items[-1] |= {"arguments": call.arguments, "status": "completed"}
        return [*events, self._of_item("function_call_arguments.done", arguments=call.arguments), self._item("done")]
