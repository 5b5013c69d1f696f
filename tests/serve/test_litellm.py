"""litellm's calls with every option. Oracle: the same calls by the openai client. litellm is not among our dependencies."""

import json

import pytest

litellm = pytest.importorskip("litellm")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]  # litellm's and its dependencies'

SAID = [{"role": "user", "content": "Hi"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
BOTH = {
    "top_k": {"extra_body": {"top_k": 3}, "temperature": 1.0, "seed": 3},
    "min_p": {"extra_body": {"min_p": 0.2}, "temperature": 1.0, "seed": 3},
    "top_p": {"top_p": 0.5, "temperature": 1.0, "seed": 3},
    "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": 1.0},
    "repetition": {"extra_body": {"repetition_penalty": 1.5}},
    "logit_bias": {"logit_bias": {"70": 100}},
    "stop": {"stop": ["a", "e"], "max_tokens": 30},
    "stop_token_ids": {"extra_body": {"stop_token_ids": [*range(100, 220)]}, "max_tokens": 30},
    "ignore_eos": {"extra_body": {"ignore_eos": True}},
    "n": {"n": 2, "temperature": 1.0, "seed": 5},
}
CHATS = {
    **BOTH,
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "prompt_logprobs": {"extra_body": {"prompt_logprobs": 1}},
    "continue_final_message": {
        "messages": [*SAID, {"role": "assistant", "content": "So"}],
        "extra_body": {"continue_final_message": True, "add_generation_prompt": False},
    },
    "chat_template_kwargs": {"extra_body": {"chat_template_kwargs": {"hint": "x"}}},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, *SAID]},
    "content parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    "json_object": {"response_format": {"type": "json_object"}, "max_tokens": 200},
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, "max_tokens": 50},
    "tools": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200},
    "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 3},
}  # fmt: skip
TEXTS = {
    **BOTH,
    "logprobs": {"logprobs": 2}, "echo": {"echo": True, "logprobs": 1},
    "echo alone": {"echo": True, "logprobs": 1, "max_tokens": 0}, "tokens": {"prompt": [60, 61, 62]},
    "prompt_logprobs": {"extra_body": {"prompt_logprobs": 1}},
}  # fmt: skip


@pytest.fixture
def ask(live, bytes_base):
    """`ask(kind, **options)`: litellm's answer, and that of the openai client."""
    made = live(bytes_base, max_context=1024)
    client, url = made.client(), f"{made.url}/v1"

    def _ask(kind, **options):
        options = {name: value for name, value in {"temperature": 0, "max_tokens": 6, **options}.items() if value is not None}
        provider, call, ours = {
            "chat": ("openai", litellm.completion, client.chat.completions.create),
            "text": ("text-completion-openai", litellm.text_completion, client.completions.create),
            "response": ("openai", litellm.responses, client.responses.create),
        }[kind]
        return call(model=f"{provider}/bytes", api_base=url, api_key="none", **options), ours(model="bytes", **options)

    return _ask


def choices(answer):
    return [
        {**choice.model_dump(exclude_none=True, include={"text", "finish_reason", "index"}), **_message(choice)}
        for choice in answer.choices
    ]


def _message(choice):
    message = getattr(choice, "message", None)
    if message is None:
        return {}
    return {"content": message.content, "calls": [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]}


def test_chats(ask):
    for option, given in CHATS.items():
        theirs, ours = ask("chat", **{"messages": SAID, **given})
        assert choices(theirs) == choices(ours), option
        if "logprobs" in given:
            told = [[one.token for one in each.choices[0].logprobs.content] for each in (theirs, ours)]
            assert told[0] == told[1]


def test_completions(ask):
    for option, given in TEXTS.items():
        theirs, ours = ask("text", **{"prompt": "Hi", **given})
        assert choices(theirs) == choices(ours), option
        if "logprobs" in given:
            assert theirs.choices[0].logprobs.token_logprobs == ours.choices[0].logprobs.token_logprobs


def test_streams(ask):
    theirs, ours = ask("chat", messages=SAID, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in theirs) == "".join(
        chunk.choices[0].delta.content or "" for chunk in ours
    )


def test_responses(ask):
    options = {
        "input": "Hi",
        "instructions": "Be brief.",
        "max_tokens": None,
        "max_output_tokens": 20,
    }  # litellm asks for 16 at least
    theirs, ours = ask("response", **options)
    assert theirs.output[0].content[0].text == ours.output_text
    format_ = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}
    theirs, ours = ask("response", **{**options, "max_output_tokens": 50, "text": format_})
    assert json.loads(theirs.output[0].content[0].text) == json.loads(ours.output_text)
    theirs, ours = ask("response", **options, stream=True)
    deltas = [[event.delta for event in each if event.type == "response.output_text.delta"] for each in (theirs, ours)]
    assert "".join(deltas[0]) == "".join(deltas[1]) != ""
