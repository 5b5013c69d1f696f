"""Response formats. Oracles: the json library, and jsonschema."""

import json
import sys

import httpx
import jsonschema
import openai
import pytest

from lownibble.serve.constraint import ConstraintError, Grammars

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "sex", "age", "tags", "at"],
    "properties": {
        "name": {"type": "string", "maxLength": 8}, "sex": {"enum": ["m", "f", None]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,3}$"}, "maxItems": 2},
        "at": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/place"}]},
    },
    "$defs": {
        "place": {
            "type": "object", "properties": {"x": {"type": "number", "minimum": 0, "maximum": 9}}, "required": ["x"],
            "additionalProperties": False,
        }
    },
}  # fmt: skip
SAID = [{"role": "user", "content": "Who?"}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def test_answers_follow_their_schema(live, bytes_base):
    """200 of 200, at a temperature at which a random model says anything, beside requests that follow nothing."""
    client = live(bytes_base, max_context=600, max_batch=8).client()
    plain = {"model": "bytes", "messages": SAID, "max_tokens": 20, "temperature": 0}
    alone = client.chat.completions.create(**plain).choices[0].message.content
    valid = 0
    for seed in range(0, 200, 10):
        asked = {"model": "bytes", "messages": SAID, "n": 10, "seed": seed, "temperature": 1.5, "max_tokens": 500}
        for choice in client.chat.completions.create(**asked, response_format=FORMAT).choices:
            assert choice.finish_reason == "stop"
            found = json.loads(choice.message.content)
            jsonschema.validate(found, SCHEMA)
            valid += 1
    assert valid == 200
    assert client.chat.completions.create(**plain).choices[0].message.content == alone


def test_any_object_whole_streamed_and_as_a_completion(live, bytes_base):
    client = live(bytes_base, max_context=1024).client()
    asked = {"model": "bytes", "seed": 3, "temperature": 1.0, "max_tokens": 900, "extra_body": {"logit_bias": {}}}
    whole = client.chat.completions.create(messages=SAID, response_format={"type": "json_object"}, **asked).choices[0]
    chunks = list(client.chat.completions.create(messages=SAID, response_format={"type": "json_object"}, stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert whole.finish_reason == "stop"
    assert isinstance(json.loads(whole.message.content), dict)
    asked["extra_body"] = {"response_format": FORMAT}
    text = client.completions.create(prompt="Who? ", **asked).choices[0].text
    jsonschema.validate(json.loads(text), SCHEMA)
    free = client.chat.completions.create(messages=SAID, response_format={"type": "text"}, model="bytes", max_tokens=5)
    assert free.choices


def test_the_end_token_ends_a_complete_answer(live, bytes_base):
    """Where more may follow (a longer number), the model decides by any of its end tokens."""
    made = live(bytes_base)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer", "minimum": 1}}}
    ends = sorted(made.service.engine.eos)
    assert len(ends) >= 2  # of the configuration and of the template
    for end in ends:
        answer = made.client().chat.completions.create(
            model="bytes", messages=SAID, response_format=form, logit_bias={str(end): 100}, max_tokens=40, temperature=0
        )
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == 2
        assert answer.choices[0].message.content in list("123456789")


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "objec"}, "Invalid type"), ({"type": "string", "pattern": "((("}, "regex"), ({"not": {}}, "Unimplemented"),
        ({"$ref": "#/nowhere"}, "nowhere"), ({"type": "integer", "minimum": 5, "maximum": 2}, "Unsatisfiable"),
        ({"$ref": "http://127.0.0.1:1/x"}, "followed"), ({"type": "string", "format": "nothing"}, "Unknown format"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_followed_are_refused(live, bytes_base, schema, says):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        live(bytes_base).client().chat.completions.create(model="bytes", messages=SAID, response_format=form)
    assert caught.value.param == "response_format"


def test_schemas_that_are_too_much_fail_their_own_request(live, bytes_base):
    made, asked = live(bytes_base), {"model": "bytes", "messages": SAID}
    heavy = {"type": "string", "pattern": "^(a{1,500}b{1,500}){1,500}$"}
    deep = {"type": "array", "items": {}}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    for schema in (heavy, deep):
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        answer = httpx.post(f"{made.url}/v1/chat/completions", json={**asked, "response_format": form, "max_tokens": 5})
        assert answer.status_code in (200, 400), answer.text
    assert made.client().chat.completions.create(**asked, max_tokens=2).choices


def test_without_the_library_the_extra_is_named(live, bytes_base, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"pip install 'lownibble\[serve\]'"):
        live(bytes_base).client().chat.completions.create(model="bytes", messages=SAID, response_format={"type": "json_object"})


def test_a_tokenizer_of_words_is_refused(tokenizer):
    with pytest.raises(ConstraintError, match="cannot be constrained"):
        Grammars(tokenizer, 96, frozenset({2})).json({"type": "object"})
