"""The API as clients see it. Oracle: the official openai client, and raw requests where it would not send them."""

import http.client
import json
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

import lownibble as ln
from lownibble.errors import ConfigError
from lownibble.serve.engine import DeviceLostError

GREEDY = {"temperature": 0, "max_tokens": 8}
SAID = [{"role": "user", "content": "w1 w5 w9"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def reference(base, adapters, text, n, name=None):
    """What transformers says, greedily."""
    model, tokenizer = ln.load(str(base), quant="nf4")
    if name:
        ln.load_adapter(model, adapters / name)
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=n, do_sample=False, eos_token_id=None)
    return tokenizer.decode(out[0, ids.shape[1] :])


def test_models(live):
    client = live().client()
    names = [model.id for model in client.models.list()]
    assert names == ["model", "one", "three", "two"]
    assert client.models.retrieve("one").model_extra["parent"] == "model"
    with pytest.raises(openai.NotFoundError, match="There is no model 'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize("name", ["model", "base", "one", "two"])
def test_completions_are_what_transformers_says(live, base, adapters, name):
    client = live().client()
    answer = client.completions.create(model=name, prompt="w1 w5 w9", extra_body={"ignore_eos": True}, **GREEDY)
    expected = reference(base, adapters, "w1 w5 w9", 8, None if name in ("model", "base") else name)
    assert answer.choices[0].text.strip() == expected.strip()
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 8, 11)
    assert answer.object == "text_completion"
    tokens = client.completions.create(model=name, prompt=[5, 9, 13], extra_body={"ignore_eos": True}, **GREEDY)
    assert tokens.choices[0].text == answer.choices[0].text


def test_what_is_no_unicode_is_told_back_in_escapes(live, bytes_base):
    made = live(bytes_base)
    said = '"model": "bytes", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1'
    for path, body, status in (
        ("chat/completions", f'{{{said}, "chat_template_kwargs": {{"\\ud800": 1}}}}', 400),
        ("chat/completions", f'{{{said}, "\\ud800": 1}}', 400),
        ("responses", '{"model": "bytes", "input": "hi", "max_output_tokens": 1, "metadata": {"a": "\\ud800"}}', 200),
    ):
        answer = httpx.post(f"{made.url}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text
        assert answer.json()


def test_a_completion_goes_on_from_its_prompt(live, base):
    """Prompt and answer together are the text of all tokens, space between them and all; a chat's answer begins anew."""
    client = live().client()
    _, tokenizer = ln.load(str(base), quant="nf4")
    asked = {"model": "one", "logprobs": True, "extra_body": {"ignore_eos": True}, **GREEDY}
    answer = client.completions.create(prompt="w1 w5 w9", **asked).choices[0]
    assert "".join(answer.logprobs.tokens) == answer.text
    tokens = tokenizer("w1 w5 w9").input_ids + tokenizer.convert_tokens_to_ids(answer.text.split())
    assert "w1 w5 w9" + answer.text == tokenizer.decode(tokens)
    said = client.chat.completions.create(messages=SAID, **asked).choices[0].message.content
    assert said
    assert said == said.strip()


def test_chat_whole_and_streamed(live, base, adapters):
    client = live().client()
    whole = client.chat.completions.create(model="one", messages=SAID, extra_body={"ignore_eos": True}, **GREEDY)
    message = whole.choices[0].message
    assert (message.role, whole.object) == ("assistant", "chat.completion")
    assert message.content.strip() == reference(base, adapters, "w1 w5 w9 ", 8, "one").strip()
    chunks = list(
        client.chat.completions.create(
            model="one", messages=SAID, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
            **GREEDY,
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 8
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2  # the same prompt was there already
    plain = list(client.chat.completions.create(model="one", messages=SAID, stream=True, **GREEDY))
    assert all(chunk.choices for chunk in plain)
    parts = [{"role": "user", "content": [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w5 w9"}]}]
    again = client.chat.completions.create(model="one", messages=parts, extra_body={"ignore_eos": True}, **GREEDY)
    assert again.choices[0].message.content == message.content


def test_options(live):
    client = live().client()
    ask = client.chat.completions.create
    drawn = [ask(model="one", messages=SAID, seed=seed, max_completion_tokens=12, temperature=2) for seed in (5, 5, 6)]
    texts = [answer.choices[0].message.content for answer in drawn]
    assert texts[0] == texts[1] != texts[2]
    several = ask(model="one", messages=SAID, n=3, seed=5, max_tokens=12, temperature=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].message.content == texts[0]
    assert several.choices[1].message.content == texts[2]
    assert several.usage.prompt_tokens == 3
    told = ask(model="one", messages=SAID, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}, **GREEDY)
    content = told.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert token.top_logprobs[0].token == token.token
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert bytes(token.bytes).decode() == token.token
    plain = client.completions.create(model="one", prompt=["w1", "w2"], logprobs=2, extra_body={"ignore_eos": True}, **GREEDY)
    assert [len(choice.logprobs.tokens) for choice in plain.choices] == [8, 8]
    for choice in plain.choices:
        offsets = choice.logprobs.text_offset
        parts = [choice.text[begin:end] for begin, end in zip(offsets, [*offsets[1:], None], strict=True)]
        assert parts == choice.logprobs.tokens
    word = plain.choices[0].text.split()[2]
    stopped = client.completions.create(model="one", prompt="w1", stop=word, extra_body={"ignore_eos": True}, **GREEDY)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == plain.choices[0].text[: plain.choices[0].text.index(word)]
    unscaled = client.completions.create(model="one", prompt="w1", extra_body={"lora_scale": 0, "ignore_eos": True}, **GREEDY)
    of_base = client.completions.create(model="base", prompt="w1", extra_body={"ignore_eos": True}, **GREEDY)
    assert unscaled.choices[0].text == of_base.choices[0].text


BAD = {
    "no such model": ({"model": "../one"}, 404, "There is no model"),
    "no model": ({"model": None}, 400, "model"),
    "temperature": ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
    "max_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "too many tokens": ({"max_tokens": 255}, 400, "this server's context|the context is 256"),
    "n": ({"n": 1000}, 400, "n: Input"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools.0.function: Field required"),
    "tools of a template that knows none": ({"tools": [TOOL]}, 400, "leaves out the tools"),
    "a choice without tools": ({"tool_choice": "required"}, 400, "'tools' names none"),
    "a tool that is not there": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        400,
        "names 'x', which is not among",
    ),
    "tools twice": ({"tools": [TOOL, TOOL]}, 400, "two functions of the same name"),
    "format": ({"response_format": {"type": "json_object"}}, 400, "tokenizer cannot be constrained|need llguidance"),
    "a format without its schema": ({"response_format": {"type": "json_schema"}}, 400, "'json_schema' must be given"),
    "tools and a format": (
        {"tools": [TOOL], "response_format": {"type": "json_object"}},
        400,
        "'response_format' and 'tools' exclude each other",
    ),
    "unknown": (
        {"temprature": 0.5},
        400,
        "'temprature' is not supported by this server. Leave it out. Did you mean 'temperature'?",
    ),
    "of vLLM": ({"guided_json": {}}, 400, "'guided_json' is not supported"),
    "of vLLM, with an effect": ({"min_tokens": 5}, 400, "'min_tokens' is not supported"),
    "within": ({"stream": True, "stream_options": {"usage": True}}, 400, "'usage' is not supported"),
    "in a message": ({"messages": [{**SAID[0], "function_call": {"name": "x"}}]}, 400, "'function_call' is not supported"),
    "bias": ({"logit_bias": {"96": 1}}, 400, "Token 96 is not in the vocabulary of 96"),
    "bias by name": ({"logit_bias": {"w1": 1}}, 400, "logit_bias"),
    "stop token": ({"stop_token_ids": [2**31]}, 400, "stop_token_ids"),
    "stop with a special token": ({"stop": "w1 <eos>"}, 400, "has the special token '<eos>' within"),
    "scores in a stream": ({"stream": True, "prompt_logprobs": 1}, 400, "'prompt_logprobs' cannot be streamed"),
    "top without": ({"top_logprobs": 2}, 400, "'top_logprobs' needs 'logprobs'"),
    "both": ({"continue_final_message": True, "add_generation_prompt": True}, 400, "exclude each other"),
    "no variable": (
        {"chat_template_kwargs": {"enable_thinking": True}},
        400,
        "The chat template has no variable 'enable_thinking'",
    ),
    "an argument": ({"chat_template_kwargs": {"tokenize": True}}, 400, "The chat template has no variable 'tokenize'"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "'content' is missing"),
    "calls of a user": (
        {"messages": [{**SAID[0], "tool_call_id": "a"}]},
        400,
        "'tool_call_id' is not for messages of the role 'user'",
    ),
    "echo of a chat": ({"echo": True}, 400, "'echo' is not supported"),
    "role": ({"messages": [{"role": "wizard", "content": "w1"}]}, 400, "messages.0.role"),
    "no messages": ({"messages": []}, 400, "messages"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "a content part of type 'image_url' is"),
    "empty stop": ({"stop": ""}, 400, "'stop' must not"),
    "scale of the base": ({"model": "base", "lora_scale": 0.5}, 400, "'lora_scale' is for adapters"),
    "not finite": ({"temperature": float("nan")}, 400, "temperature"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    "seed": ({"seed": 2**70}, 400, "seed"),
}


def test_bad_requests_are_answered_in_openais_shape(live):
    url = live().url
    with httpx.Client(base_url=url) as client:
        for name, (change, status, message) in BAD.items():
            body = {"model": "one", "messages": SAID, **change}
            answer = client.post("/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"})
            assert answer.status_code == status, (name, answer.text)
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert any(text in error["message"] for text in message.split("|")), (name, error)
        raw = {
            "not JSON": b"{", "no object": b"[]", "empty": b"", "no text": b"\xff\xfe", "deep": b"[" * 100_000,
        }  # fmt: skip
        for name, content in raw.items():
            answer = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (name, answer.text)
            assert answer.json()["error"]["message"]
        for path, status in (("/nothing", 404), ("/v1/chat/completions", 405), ("/v1/models/..%2f..%2fetc", 404)):
            answer = client.get(path)
            assert answer.status_code == status
            assert answer.json()["error"]["message"]
        for prompt in ([], [96], [-1], [[5], []], "", 7, [["w1"]]):
            assert client.post("/v1/completions", json={"model": "one", "prompt": prompt}).status_code == 400, prompt
        assert client.post("/v1/completions", json={"model": "one", "prompt": "w1", "temperature": 0}).status_code == 200


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_that_is_not_said_to_be_json(live, kind):
    """As curl sends it where nothing else is said, and as pages of other sites can."""
    headers = {} if kind is None else {"content-type": kind}
    answer = httpx.post(f"{live().url}/v1/completions", content='{"model": "one", "prompt": "w1"}', headers=headers)
    assert answer.status_code == 415
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_giant_bodies_are_refused_announced_or_not(live):
    made = live(max_body="10KB")
    with httpx.Client(base_url=made.url) as client:
        assert client.post("/v1/completions", content=b"x" * 20_000).status_code == 413

        def parts():
            for _ in range(100):
                yield b" " * 1000

        assert client.post("/v1/completions", content=parts()).status_code == 413
        assert client.get("/health").json()["status"] == "ok"


def test_a_lost_gpu_is_told_to_clients_and_to_who_watches(live):
    made = live()
    made.service.engine.lost = DeviceLostError("The GPU cannot be used any more; start the server again.")
    with httpx.Client(base_url=made.url) as client:
        answers = client.get("/health"), client.post("/v1/completions", json={"model": "base", "prompt": [5, 6], "max_tokens": 2})
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(503, "device_lost")] * 2
        metrics = client.get("/metrics").text
        assert "lownibble_graphs 0.0" in metrics
        assert "lownibble_plain_kernel_calls 0.0" in metrics


def test_limits_of_prompt_and_answer(live):
    made = live(max_prompt=5, max_output=7)
    with httpx.Client(base_url=made.url) as client:

        def ask(words, tokens):
            body = {"model": "one", "prompt": " ".join(["w1"] * words), "max_tokens": tokens, "ignore_eos": True}
            return client.post("/v1/completions", json={k: v for k, v in body.items() if v is not None})

        assert ask(5, 7).json()["usage"]["completion_tokens"] == 7
        assert ask(5, None).json()["usage"]["completion_tokens"] == 7  # 16 are usual
        for words, tokens, says, param in ((6, 7, "at most 5", "prompt"), (5, 8, "at most 7", "max_tokens")):
            answer = ask(words, tokens)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
            assert says in error["message"]


def test_a_body_that_does_not_arrive_is_not_waited_for(live, monkeypatch):
    monkeypatch.setattr("lownibble.serve.http.BODY_SECONDS", 0.3)
    made = live()
    with socket.create_connection(("127.0.0.1", made.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
        connection.settimeout(10)
        assert b" 408 " in connection.recv(1000)


def test_requests_in_progress_are_limited(live):
    made = live(max_requests=2)
    waiting = [socket.create_connection(("127.0.0.1", made.port)) for _ in range(2)]
    for connection in waiting:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{")
    deadline = time.monotonic() + 10
    while (answer := httpx.get(f"{made.url}/v1/models")).status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (429, "too_many_requests", "1")
    assert httpx.get(f"{made.url}/health").status_code == 200  # who watches always gets in
    for connection in waiting:
        connection.close()
    while (answer := httpx.get(f"{made.url}/v1/models")).status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert answer.status_code == 200


def test_an_adapter_trained_on_another_codec_is_served_and_said(live, adapters, base, adapt):
    shutil.move(adapt(base, "fp4", name="fours")[1], adapters / "fours")
    made = live()
    load = {name: httpx.post(f"{made.url}/v1/load_lora_adapter", json={"lora_name": name}).json() for name in ("fours", "one")}
    assert "fp4" in load["fours"]["warning"]
    assert load["one"]["warning"] is None


def test_more_answers_than_can_ever_wait_are_refused_before_they_are_made(live):
    made = live(max_queue=5)
    body = {"model": "base", "n": 16, "prompt": [[1]] * 100_000}
    began = time.monotonic()
    answer = httpx.post(f"{made.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "1600000 answers are asked for at once; 9 are the most" in answer.json()["error"]["message"]
    assert time.monotonic() - began < 5


def test_other_names_for_this_machine_need_a_key(live):
    """A page of another site may have its name point here."""
    open_to_all, with_key = live(), live(api_key="secret")
    port = open_to_all.port
    for host, status in (("localhost", 200), (f"127.0.0.1:{port}", 200), ("[::1]:80", 200), ("evil.example", 403), ("", 403)):
        answer = httpx.get(f"{open_to_all.url}/v1/models", headers={"host": host})
        assert answer.status_code == status, host
    headers = {"host": "any.example", "authorization": "Bearer secret"}
    assert httpx.get(f"{with_key.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("name", ["LOWNIBBLE_API_KEY", "LOWNIBBLE_ADMIN_KEY"])
def test_an_empty_key_is_none_that_would_let_everyone_in(live, monkeypatch, name):
    monkeypatch.setenv("LOWNIBBLE_API_KEY", "secret")
    monkeypatch.setenv(name, "")
    with pytest.raises(ConfigError, match="A key is empty"):
        live()


@pytest.mark.slow
def test_a_client_that_does_not_read_is_let_go(live, monkeypatch):
    monkeypatch.setattr("lownibble.serve.http.SEND_SECONDS", 0.5)
    made = live(max_requests=1, max_context=2000)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", made.port))
        body = json.dumps({"model": "one", "prompt": "w1", "n": 16, "max_tokens": 1900, "stream": True, "logprobs": 20,
                           "ignore_eos": True}).encode()  # fmt: skip
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + 60
        while httpx.get(f"{made.url}/v1/models").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.05)  # not yet inside
        while httpx.get(f"{made.url}/v1/models").status_code == 429 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert httpx.get(f"{made.url}/v1/models").status_code == 200
        while made.service.engine.running and time.monotonic() < deadline:
            time.sleep(0.1)
        assert made.service.engine.running == 0


def test_keys(live):
    made = live(api_key="secret", admin_key="master")
    for key in ("none", "secre", "secret2", "sécret"):
        answer = httpx.get(f"{made.url}/v1/models", headers={"authorization": f"Bearer {key}".encode()})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert next(iter(made.client("secret").models.list())).id == "model"
    load = {"lora_name": "one"}
    of = {key: {"authorization": f"Bearer {key}"} for key in ("secret", "master")}
    assert httpx.post(f"{made.url}/v1/load_lora_adapter", json=load, headers=of["secret"]).status_code == 401
    assert httpx.post(f"{made.url}/v1/load_lora_adapter", json=load, headers=of["master"]).status_code == 200
    assert httpx.get(f"{made.url}/health").status_code == 200


def test_loading_and_unloading(live, adapters):
    made = live()
    client = made.client()
    with httpx.Client(base_url=made.url) as raw:
        loaded = raw.post("/v1/load_lora_adapter", json={"lora_name": "one", "pin": True}).json()
        assert loaded["id"] == "one"
        assert loaded["pinned"]
        assert made.service.registry.pinned == {"one"}
        assert raw.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 200
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="one", prompt="w1", **GREEDY)
        assert raw.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 404
        assert raw.post("/v1/load_lora_adapter", json={"lora_name": "one", "lora_path": "/etc"}).status_code == 400
        assert raw.post("/v1/load_lora_adapter", json={"lora_name": "one", "lora_path": "one"}).status_code == 200
        assert client.completions.create(model="one", prompt="w1", **GREEDY).choices
        for name in ("../one", "none", "one/../two"):
            assert raw.post("/v1/load_lora_adapter", json={"lora_name": name}).status_code == 404
        (adapters / "two" / "adapter_model.safetensors").write_bytes(b"damaged")
        answer = raw.post("/v1/load_lora_adapter", json={"lora_name": "two"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_adapter")
        assert str(adapters) not in answer.text
        with pytest.raises(openai.UnprocessableEntityError):
            client.completions.create(model="two", prompt="w1", **GREEDY)
        assert client.completions.create(model="one", prompt="w1", **GREEDY).choices


def test_clients_that_leave_free_their_slot(live, monkeypatch):
    made = live(max_batch=1, max_context=2048)
    slow(made, monkeypatch)
    long = {"model": "one", "prompt": "w1", "max_tokens": 2000, "ignore_eos": True, "temperature": 0}
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", made.port)
        connection.request(
            "POST", "/v1/completions", json.dumps({**long, "stream": stream}), {"content-type": "application/json"}
        )
        if stream:
            connection.getresponse().read(200)
        else:
            time.sleep(0.2)
        assert made.service.engine.running == 1
        connection.close()
        began = time.monotonic()
        assert made.client().completions.create(model="one", prompt="w2", max_tokens=2, temperature=0).choices
        assert time.monotonic() - began < 20
    assert made.service.registry.held["one"].users == 0
    assert 'lownibble_requests_total{model="one",reason="cancelled"} 2.0' in httpx.get(f"{made.url}/metrics").text


def slow(made, monkeypatch):
    step = made.service.engine.decoder.step
    monkeypatch.setattr(made.service.engine.decoder, "step", lambda *a, **k: (time.sleep(0.01), step(*a, **k))[1])


def test_a_full_queue_is_429_with_a_time_to_come_back(live, monkeypatch):
    made = live(max_batch=1, max_queue=0, max_context=2048)
    slow(made, monkeypatch)
    with httpx.Client(base_url=made.url) as client, client.stream(
        "POST", "/v1/completions",
        json={"model": "one", "prompt": "w1", "max_tokens": 2000, "stream": True, "ignore_eos": True},
    ) as running:  # fmt: skip
        pieces = running.iter_text()  # kept: a generator that is dropped closes the connection
        next(pieces)
        answer = httpx.post(f"{made.url}/v1/completions", json={"model": "two", "prompt": "w1"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"


def test_metrics(live):
    made = live()
    made.client().completions.create(model="one", prompt="w1 w2", extra_body={"ignore_eos": True}, **GREEDY)
    text = httpx.get(f"{made.url}/metrics").text
    for line in (
        'lownibble_requests_total{model="one",reason="length"} 1.0', 'lownibble_completion_tokens_total{model="one"} 8.0',
        'lownibble_prompt_tokens_total{model="one"} 2.0', "lownibble_adapters_held 1.0", "lownibble_adapter_loads 1.0",
        'lownibble_model_time_to_first_token_seconds_count{model="one"} 1.0', "lownibble_requests_running 0.0",
        "lownibble_time_to_first_token_seconds_count 1.0", 'lownibble_time_to_first_token_seconds_bucket{le="60.0"} 1.0',
    ):  # fmt: skip
        assert line in text.splitlines(), line


def test_many_clients_at_once(live, base, adapters):
    """Threads with adapters of their own get their own answers."""
    made = live(max_batch=3)
    expected = {name: reference(base, adapters, "w7 w8", 8, None if name == "base" else name).strip()
                for name in ("base", "one", "two", "three")}  # fmt: skip
    wrong = []

    def work(seed):
        client = made.client()
        for i in range(6):
            name = list(expected)[(seed + i) % 4]
            answer = client.completions.create(model=name, prompt="w7 w8", extra_body={"ignore_eos": True}, **GREEDY)
            if answer.choices[0].text.strip() != expected[name]:
                wrong.append(name)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert not wrong
