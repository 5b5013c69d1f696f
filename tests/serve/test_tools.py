"""Calls of tools. Oracles: the templates of real models that TRL ships, and the calls that an output was made from."""

import copy
import json
from pathlib import Path

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from lownibble.data.chat import ChatRenderer
from lownibble.serve.constraint import Grammars
from lownibble.serve.protocol import Tool
from lownibble.serve.tools import Call, CallReader, call_form, call_grammar

NAMES = {"weather", "time"}
PARAMETERS = {
    "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}} for name in sorted(NAMES)]
SAID = [{"role": "user", "content": "Weather?"}]
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LLAMA = '{"name": "weather", "parameters": {"city": "Paris"}}'
MISTRAL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]'
MISTRAL_TEMPLATE = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}"
    "{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ']<|endoftext|>' }}{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}"
    "[/TOOL_RESULTS]{% else %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)
LLAMA_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role + ': ' }}{% if m.tool_calls %}"
    '{% set c = m.tool_calls[0].function %}{{ \'{"name": "\' + c.name + \'", "parameters": \' }}{{ c.arguments | tojson }}'
    "{{ '}<|eot_id|>' }}{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORMS = {"hermes": (None, HERMES), "llama": (LLAMA_TEMPLATE, LLAMA), "mistral": (MISTRAL_TEMPLATE, MISTRAL)}


@pytest.fixture
def speaks(bytes_base):
    """`speaks(form)`: the byte-level model's folder, whose template prints calls in that form; and its tokenizer."""

    def _speaks(form):
        tokenizer = AutoTokenizer.from_pretrained(bytes_base)
        tokenizer.chat_template = FORMS[form][0] or tokenizer.chat_template
        tokenizer.save_pretrained(bytes_base)
        return bytes_base, tokenizer

    return _speaks


KNOWN = {
    "qwen2_5": "hermes", "qwen3": "hermes", "qwen3_instruct_2507": "hermes", "qwen3_vl": "hermes", "llama3_1": "llama",
    "llama3_2": "llama",
}  # fmt: skip
UNKNOWN = ["phi3", "gemma", "deepseekv3", "qwen3_6", "gptoss", "glm4moe"]


@pytest.mark.peer
@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_forms_of_real_templates(speaks, name):
    trl = pytest.importorskip("trl")
    made = copy.deepcopy(speaks("hermes")[1])
    made.bos_token = "<s>"
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    form = call_form(ChatRenderer(made))
    if name in UNKNOWN:
        assert form is None
    elif KNOWN[name] == "hermes":
        assert (form.before.strip(), form.after.strip(), form.key, form.listed) == (
            "<tool_call>",
            "</tool_call>",
            "arguments",
            False,
        )
    else:
        assert (form.before, form.after, form.key, form.listed) == ("", "", "parameters", False)


CITY = '{"city": "Paris"}'
OUTPUTS = {
    "a call": ("hermes", HERMES, [("weather", CITY)], ""),
    "two": ("hermes", f"{HERMES}\n{HERMES.replace('weather', 'time')}\n", [("weather", CITY), ("time", CITY)], ""),
    "text before": ("hermes", f"I look.\n{HERMES}", [("weather", CITY)], "I look."),
    "text alone": ("hermes", "It is <b>sunny</b>. \n", [], "It is <b>sunny</b>. \n"),
    "not finished": ("hermes", HERMES[:-14], [], HERMES[:-14]),
    "no JSON": ("hermes", "<tool_call>\nweather\n</tool_call>", [], "<tool_call>\nweather\n</tool_call>"),
    "another function": ("hermes", HERMES.replace("weather", "rm"), [], HERMES.replace("weather", "rm")),
    "no name of a function": ("hermes", HERMES.replace('"weather"', '{"a": 1}'), [], HERMES.replace('"weather"', '{"a": 1}')),
    "white space and a mark": ("hermes", "5 \n<tool_call>\n", [], "5 \n<tool_call>\n"),
    "the mark in an argument": ("hermes", HERMES.replace("Paris", "</tool_call>"), [("weather", '{"city": "</tool_call>"}')], ""),
    "no arguments": ("hermes", '<tool_call>{"name": "time"}</tool_call>', [("time", "{}")], ""),
    "arguments as text": ("hermes", HERMES.replace(CITY, json.dumps(CITY)), [("weather", CITY)], ""),
    "an object": ("llama", LLAMA, [("weather", CITY)], ""),
    "several objects": ("llama", f" {LLAMA}; {LLAMA}", [("weather", CITY)] * 2, ""),
    "an object that is none": ("llama", '{"a": 1}', [], '{"a": 1}'),
    "an object and text": ("llama", f"{LLAMA} is it", [], f"{LLAMA} is it"),
    "text with an object": ("llama", f"So: {LLAMA}", [], f"So: {LLAMA}"),
    "deep": ("llama", '{"a":' * 5000, [], '{"a":' * 5000),
    "a list": ("mistral", MISTRAL, [("weather", CITY)], ""),
    "a list of two": ("mistral", MISTRAL.replace("}}]", "}}, " + LLAMA + "]"), [("weather", CITY)] * 2, ""),
    "a list that is not finished": ("mistral", MISTRAL[:-1], [], MISTRAL[:-1]),
}


@pytest.mark.parametrize("case", OUTPUTS)
@pytest.mark.parametrize("size", [1, 3, 10**6])
def test_calls_are_read_whole_and_in_pieces(speaks, case, size):
    form, text, calls, said = OUTPUTS[case]
    reader = CallReader(call_form(ChatRenderer(speaks(form)[1])), NAMES)
    parts = [part for at in range(0, len(text), size) for part in reader.feed(text[at : at + size])]
    parts += reader.feed("", last=True)
    assert [tuple(part) for part in parts if isinstance(part, Call)] == calls
    assert "".join(part for part in parts if isinstance(part, str)) == said


def test_text_is_not_held_back_longer_than_needed(speaks):
    reader = CallReader(call_form(ChatRenderer(speaks("hermes")[1])), NAMES)
    assert reader.feed("I look") == ["I look"]
    assert reader.feed(" <tool") == []
    assert reader.feed("s>") == [" <tools>"]
    limited = CallReader(call_form(ChatRenderer(speaks("hermes")[1])), NAMES, most=1)
    assert limited.feed(HERMES * 3) == [Call("weather", CITY)]


def scripted(made, monkeypatch, text):
    """The server's model says this text, token by token, and ends."""
    tokenizer = made.service.tokenizer
    script = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    take = "lownibble.serve.request.Running.take"
    from lownibble.serve.request import Running

    own = Running.take
    monkeypatch.setattr(take, lambda one, chosen, eos: own(one, chosen._replace(token=script[one.made]), eos))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("logprobs", [None, True])
def test_calls_in_answers_whole_and_streamed(live, speaks, monkeypatch, form, logprobs):
    made = live(speaks(form)[0], max_context=1024)
    text = ("" if form == "llama" else "I look. ") + FORMS[form][1]
    scripted(made, monkeypatch, text)
    asked = {"model": "bytes", "messages": SAID, "tools": TOOLS, "max_tokens": 150, "logprobs": logprobs}
    whole = made.client().chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    [call] = whole.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "weather", {"city": "Paris"})
    assert whole.message.content == (None if form == "llama" else "I look.")
    chunks = [chunk.choices[0] for chunk in made.client().chat.completions.create(**asked, stream=True)]
    [told] = [one for chunk in chunks for one in chunk.delta.tool_calls or []]
    assert (told.index, told.function.name, json.loads(told.function.arguments)) == (0, "weather", {"city": "Paris"})
    assert told.id
    assert "".join(chunk.delta.content or "" for chunk in chunks) == (whole.message.content or "")
    assert chunks[-1].finish_reason == "tool_calls"
    if logprobs:
        assert sum(len(chunk.logprobs.content) for chunk in chunks if chunk.logprobs) == len(whole.logprobs.content) > 5
    free = made.client().chat.completions.create(**asked, tool_choice="none").choices[0]
    assert free.finish_reason == "stop"
    assert free.message.tool_calls is None


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_is_required_is_made(live, speaks, form):
    """By a random model, with arguments that follow the function's schema."""
    pytest.importorskip("llguidance")
    client = live(speaks(form)[0], max_context=1024).client()
    named = {"type": "function", "function": {"name": "time"}}
    for seed in range(6):
        for choice, names in (("required", NAMES), (named, {"time"})):
            asked = {"model": "bytes", "messages": SAID, "tools": TOOLS, "tool_choice": choice, "seed": seed, "max_tokens": 300}
            found = client.chat.completions.create(**asked, temperature=1.0, parallel_tool_calls=False).choices[0]
            [call] = found.message.tool_calls
            assert call.function.name in names
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
            assert found.message.content is None
            assert found.finish_reason == "tool_calls"


TREE = {
    "type": "object", "properties": {"v": {"type": "integer"}, "child": {"$ref": "#"}}, "required": ["v"],
    "additionalProperties": False,
}  # fmt: skip
PLACED = {
    "type": "object", "properties": {"place": {"$ref": "#/$defs/Place"}}, "required": ["place"], "additionalProperties": False,
    "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "integer"}}, "additionalProperties": False}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_references_in_a_schema_are_to_that_schema(speaks, form):
    pytest.importorskip("llguidance")
    tokenizer = speaks(form)[1]
    of = call_form(ChatRenderer(tokenizer))
    tools = [
        Tool(type="function", function={"name": name, "parameters": schema}) for name, schema in (("tree", TREE), ("go", PLACED))
    ]
    matcher = Grammars(tokenizer, 416, frozenset([0])).lark(call_grammar(of, tools, several=False, tokenizer=tokenizer))

    def follows(name, arguments):
        call = json.dumps({"name": name, of.key: arguments})
        one, text = matcher.copy(), of.before + (f"[{call}]" if of.listed else call) + of.after
        return all(one.allowed()[token] and one.accept(token) in (True, False) for token in tokenizer(text).input_ids)

    assert follows("tree", {"v": 1, "child": {"v": 2, "child": {"v": 3}}})
    assert not follows("tree", {"v": 1, "child": {"name": "tree", of.key: {"v": 2}}})
    assert follows("go", {"place": {"x": 1}})
    assert not follows("go", {"place": {"v": 1}})
    assert not follows("go", {"v": 1})


def test_several_calls_may_be_required(speaks):
    tools = [Tool(**tool) for tool in TOOLS]
    tokenizer = speaks("hermes")[1]
    form = call_form(ChatRenderer(tokenizer))
    assert 'call ("\\n" call)*' in call_grammar(form, tools, several=True, tokenizer=tokenizer)
    assert "(" not in call_grammar(form, tools, several=False, tokenizer=tokenizer).splitlines()[0]


def test_a_conversation_with_tools(live, speaks, monkeypatch):
    """What the server told goes back to it, and reaches the template."""
    folder, tokenizer = speaks("hermes")
    made = live(folder, max_context=1024)
    scripted(made, monkeypatch, HERMES)
    client = made.client()
    said = client.chat.completions.create(model="bytes", messages=SAID, tools=TOOLS, max_tokens=150).choices[0].message
    messages = [*SAID, said.model_dump(), {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny"}]
    assert client.chat.completions.create(model="bytes", messages=messages, tools=TOOLS, max_tokens=3).choices
    ids = httpx.post(f"{made.url}/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = tokenizer.decode(ids)
    assert HERMES in text
    assert "sunny" in text
    assert '"name": "weather"' in text.partition("<|im_start|>")[0]
    bad = [*SAID, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "weather", "arguments": "{"}}]}]
    with pytest.raises(openai.BadRequestError, match="no JSON object"):
        client.chat.completions.create(model="bytes", messages=bad, tools=TOOLS)
    strict = copy.deepcopy(TOOLS)
    strict[0]["function"]["strict"] = True
    noted = client.chat.completions.create(model="bytes", messages=SAID, tools=strict, user="me", max_tokens=2)
    assert noted.model_extra["ignored"] == ["user", "tools.time.strict"]


def test_a_form_that_is_not_known_is_refused(live, speaks):
    folder, tokenizer = speaks("hermes")
    tokenizer.chat_template = tokenizer.chat_template.replace("call.function | tojson", "call.function.name")
    tokenizer.save_pretrained(folder)
    client = live(folder).client()
    with pytest.raises(openai.BadRequestError, match="in a form that this server does not read"):
        client.chat.completions.create(model="bytes", messages=SAID, tools=TOOLS)
    assert client.chat.completions.create(model="bytes", messages=SAID, tools=TOOLS, tool_choice="none", max_tokens=2).choices
