"""/v1/responses. Oracles: the answers of /v1/chat/completions, and the openai client's own types."""

import json

import httpx
import jsonschema
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from lownibble.serve.responses import ResponsesRequest

EVENT = TypeAdapter(ResponseStreamEvent)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"],
          "additionalProperties": False}  # fmt: skip
TOOL = {"name": "weather", "description": "d", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False,
}}  # fmt: skip
FLAT = {"type": "function", **TOOL, "strict": True}


@pytest.fixture
def client(live, bytes_base):
    return live(bytes_base, max_context=1024).client()


def has_its_type(response):
    """The client does not check it."""
    return Response.model_validate(response.model_dump(warnings=False))


def test_it_says_what_a_chat_says(client):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    options = {"model": "bytes", "temperature": 0.8, "top_p": 0.9}
    chat = client.chat.completions.create(messages=said, max_tokens=6, seed=3, **options)
    more = {"max_output_tokens": 6, "extra_body": {"seed": 3}, **options}
    inputs = ("Hi", [said[1]], [{**said[1], "type": "message", "content": [{"type": "input_text", "text": "Hi"}]}])
    found = [client.responses.create(input=each, instructions="Be brief.", **more) for each in inputs]
    found.append(client.responses.create(input=said, **more))
    for each in found:
        assert has_its_type(each)
        assert each.output_text == chat.choices[0].message.content
        assert (each.usage.input_tokens, each.usage.output_tokens) == (chat.usage.prompt_tokens, 6)
        assert (each.status, each.incomplete_details.reason, each.output[0].status) == (
            "incomplete", "max_output_tokens", "incomplete",
        )  # fmt: skip
    again = [*found[0].output, {"role": "user", "content": "So?"}]
    reply = [*said, {"role": "assistant", "content": found[0].output_text}, {"role": "user", "content": "So?"}]
    chat = client.chat.completions.create(messages=reply, max_tokens=6, seed=3, **options)
    assert client.responses.create(input=[*said, *again], **more).output_text == chat.choices[0].message.content


def test_streams_are_the_whole_in_parts(client):
    asked = {"model": "bytes", "input": "Hi", "max_output_tokens": 12, "temperature": 0,
             "include": ["message.output_text.logprobs"], "top_logprobs": 2}  # fmt: skip
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    for event in events:
        EVENT.validate_python(event.model_dump(warnings=False))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-1].response.output_text
    [part] = whole.output[0].content
    assert [one.token for one in events[-4].logprobs] == [one.token for one in part.logprobs]
    assert sum(len(event.logprobs) for event in deltas) <= len(part.logprobs) == 12
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    plain = {name: value for name, value in asked.items() if name not in ("include", "top_logprobs")}
    with client.responses.stream(**plain) as stream:
        assert [event.snapshot for event in stream if event.type == "response.output_text.delta"][-1] == whole.output_text


def test_json_of_a_schema(client):
    pytest.importorskip("llguidance")
    format_ = {"type": "json_schema", "name": "number", "schema": SCHEMA, "strict": True}
    found = client.responses.create(model="bytes", input="Hi", text={"format": format_}, max_output_tokens=40)
    jsonschema.validate(json.loads(found.output_text), SCHEMA)
    assert (found.status, found.text.format.name) == ("completed", "number")
    loose = client.responses.create(model="bytes", input="Hi", text={"format": {"type": "json_object"}}, max_output_tokens=200)
    assert loose.output_text.startswith("{")


def test_tools_are_called_and_their_results_read(client):
    pytest.importorskip("llguidance")
    asked = {"model": "bytes", "tools": [FLAT], "max_output_tokens": 200, "temperature": 0}
    said = [{"role": "user", "content": "Weather?"}]
    found = client.responses.create(input=said, tool_choice={"type": "function", "name": "weather"}, parallel_tool_calls=False,
                                    **asked)  # fmt: skip
    assert has_its_type(found)
    [call] = found.output
    assert (call.type, call.name, call.status, found.status) == ("function_call", "weather", "completed", "completed")
    assert json.loads(call.arguments)["city"] in {"Paris", "Rome"}
    events = list(client.responses.create(input=said, tool_choice="required", parallel_tool_calls=False, stream=True, **asked))
    assert [event.type for event in events[2:]] == [
        "response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert events[3].delta == call.arguments == events[-1].response.output[0].arguments
    answered = client.responses.create(
        input=[*said, *found.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
        tool_choice="auto", **{**asked, "max_output_tokens": 5},
    )  # fmt: skip
    function = {"name": "weather", "arguments": call.arguments}
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    messages = [*said, called, {"role": "tool", "tool_call_id": "c", "content": "rain"}]
    chat = client.chat.completions.create(
        model="bytes", messages=messages, tools=[{"type": "function", "function": {**TOOL, "strict": True}}], max_tokens=5,
        temperature=0,
    )  # fmt: skip
    assert answered.output_text == chat.choices[0].message.content
    assert answered.usage.input_tokens == chat.usage.prompt_tokens
    assert answered.model_extra["ignored"] == ["tools.weather.strict"]


def test_text_before_a_call_is_an_item_of_its_own(client, live, bytes_base, monkeypatch):
    from lownibble.serve.request import Running

    made = live(bytes_base, max_context=1024)
    text = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    script = [*made.service.tokenizer(text, add_special_tokens=False).input_ids, made.service.tokenizer.eos_token_id]
    own = Running.take
    monkeypatch.setattr(Running, "take", lambda one, chosen, eos: own(one, chosen._replace(token=script[one.made]), eos))
    asked = {"model": "bytes", "tools": [FLAT], "input": "Hi", "include": ["message.output_text.logprobs"]}
    whole = made.client().responses.create(**asked)
    streamed = list(made.client().responses.create(**asked, stream=True))[-1].response
    for found in (whole, streamed):
        message, call = found.output
        assert (message.content[0].text, message.status) == ("I look.", "completed")
        assert (call.name, call.arguments) == ("weather", '{"city": "Paris"}')


REFUSED = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"store": True}, "store"),
    ({"background": True}, "background"), ({"conversation": "c"}, "conversation"),
    ({"max_tokens": 5}, "max_tokens"), ({"n": 2}, "'n'"),
    ({"tools": [{"type": "web_search"}]}, "function"), ({"input": []}, "input"), ({"top_logprobs": 2}, "include"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_text"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}], "tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "schema"), ({"max_output_tokens": 10**6}, "context"),
    ({"tools": [FLAT], "text": {"format": {"type": "json_object"}}}, "text.format"), ({"truncation": "auto"}, "truncation"),
]  # fmt: skip


def test_what_is_not_there_is_refused_by_name(client):
    for options, named in REFUSED:
        with pytest.raises(openai.BadRequestError, match=named):
            client.post("/responses", body={"model": "bytes", "input": "Hi", **options}, cast_to=httpx.Response)


def test_options_without_effect_and_about_the_account(client):
    found = client.responses.create(
        model="bytes", input="Hi", max_output_tokens=2, store=False, background=False, truncation="disabled",
        metadata={"a": "b"}, user="me", tool_choice="auto", include=[],
    )  # fmt: skip
    assert found.metadata == {"a": "b"}
    assert found.model_extra["ignored"] == ["user", "metadata"]
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="bytes", input="Hi", max_output_tokens=10**6)
    assert error.value.param == "input"


def test_every_option_of_a_chat_reaches_it():
    """But those that have another form here."""
    options = {"top_k": 3, "min_p": 0.1, "presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2,
               "logit_bias": {5: 1.0}, "seed": 4, "stop": ["a"], "stop_token_ids": [7], "ignore_eos": True, "stream": True,
               "lora_scale": 0.5, "parallel_tool_calls": False, "chat_template_kwargs": {"hint": "x"}, "temperature": 0.5,
               "top_p": 0.5}  # fmt: skip
    chat = ResponsesRequest.model_validate({"model": "m", "input": "Hi", **options}).as_chat()
    assert {name: getattr(chat, name) for name in options} == options
