"""Requests that a machine made up, from /openapi.json and against it. Oracle: schemathesis, and the shape of OpenAI's errors."""

import json
from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lownibble.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from lownibble.serve.responses import ResponsesRequest


@pytest.mark.slow
def test_the_server_does_not_fall_over(live):
    schema = schemathesis.openapi.from_url(f"{live(max_output=8).url}/openapi.json")
    seen = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        seen[operation.label] = answers_to(operation.as_strategy())
    assert {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/load_lora_adapter", "GET /v1/models"} <= seen.keys()
    assert {"POST /v1/responses", "POST /tokenize", "POST /detokenize", "GET /tokenizer_info"} <= seen.keys()
    assert seen["GET /v1/models"] == {200}
    assert 400 in seen["POST /v1/completions"] | seen["POST /v1/chat/completions"]


def answers_to(cases):
    """Statuses of the answers to such requests, each of which must be one that a client can use."""
    statuses = set()

    @settings(max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=cases)
    def ask(case):
        answer = case.call()
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    ask()
    return statuses


MODELS = {
    "/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest, "/v1/responses": ResponsesRequest,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
GOOD = {
    "messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "tools": [TOOL], "response_format": {"type": "json_object"},
    "tool_choice": "required", "logit_bias": {"5": 1.0}, "stop": ["<|im_end|>"], "stop_token_ids": [3], "stream": True, "n": 2,
    "logprobs": 1, "top_logprobs": 2, "prompt_logprobs": 1, "echo": True, "chat_template_kwargs": {"hint": "a"}, "tokens": [5],
    "input": [{"role": "user", "content": "Hi"}], "include": ["message.output_text.logprobs"],
    "text": {"format": {"type": "json_object"}},
}  # fmt: skip
NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**4000, 1e308, 1e-308, -0.0, 0.5, 96, 415, 416])
TEXTS = st.sampled_from(["\ud800", "\0", "{{ messages }}", "[" * 900])
KEYS = st.sampled_from(["type", "role", "content", "text", "function", "name", "parameters", "schema", "5", "$ref"])
ODD = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)


@st.composite
def bodies(draw):
    path = draw(st.sampled_from(sorted(MODELS)))
    names = [*MODELS[path].model_fields, "metadata", "guided_json", draw(st.text(max_size=5))]
    chosen = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    body = {"model": "bytes"} if path.startswith("/v1") else {}
    body |= {name: GOOD[name] for name in ("messages", "prompt", "tokens", "input") if name in MODELS[path].model_fields}
    if path == "/tokenize":
        del body[draw(st.sampled_from(["messages", "prompt"]))]
    for name in chosen:
        body[name] = GOOD[name] if name in GOOD and draw(st.integers(0, 3)) else draw(ODD)
    text = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(text)))
        text = draw(st.sampled_from([text[:at], text[:at] + b"\xff" + text[at:], text[at:], text + text]))
    return path, text.replace(b"1" + b"0" * 4000, b"1" + b"0" * 5000)  # more than Python reads


def test_hostile_bodies_are_answered_and_the_server_stays_up(live, bytes_base):
    """Broken JSON, wrong types, huge numbers, lone surrogates, in good company."""
    url, statuses = live(bytes_base, max_output=8, max_context=512).url, Counter()
    with httpx.Client(base_url=url, timeout=60) as client:

        @settings(max_examples=400, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
        @given(asked=bodies())
        def ask(asked):
            path, body = asked
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (body, answer.text)
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["message"]
            elif answer.headers["content-type"].startswith("text/event-stream"):
                lines = [line for line in answer.text.splitlines() if line]
                assert lines[-1] == "data: [DONE]" or json.loads(lines[-1].removeprefix("data: ")).keys() & {"error", "response"}

        ask()
        assert statuses.keys() >= {200, 400}
        assert statuses[200] > 40
        good = client.post("/v1/completions", json={"model": "bytes", "prompt": "Hi", "max_tokens": 2, "temperature": 0})
        assert good.status_code == 200
