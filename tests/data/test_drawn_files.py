"""A thousand drawn data files: each is encoded, or refused by one of our errors. Oracle: labels lie within what the rows say."""

import json

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny_folders import write_model
from transformers import AutoTokenizer

from lownibble.config import DataConfig
from lownibble.data import encode, load
from lownibble.errors import InputError

TEMPLATES = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}",
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] | trim + ' <eos>' }}{% endfor %}",
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins.') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}<eos>{% else %}[ {{ m.content }} ]"
    "{% endif %}{% endfor %}",
)
TEXT = st.one_of(
    st.text(max_size=12), st.sampled_from(["good film", "", " ", "\ud800", "<eos>", "</think> bad", "{x}", "a\u0301\u200d"])
)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["type", "text", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "developer", "human", "gpt", "", "x"])
CALLS = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "arguments": VALUE})}),
    max_size=2,
)
TURN = st.one_of(
    st.fixed_dictionaries({"role": ROLE, "content": st.one_of(TEXT, VALUE)}, optional={"weight": VALUE, "tool_calls": CALLS}),
    st.fixed_dictionaries({"from": ROLE, "value": TEXT}),
    VALUE,
)
TURNS = st.one_of(st.lists(TURN, max_size=5), VALUE)
ROW = st.one_of(
    st.fixed_dictionaries({"messages": st.one_of(TURNS, TURNS.map(json.dumps))}, optional={"tools": VALUE, "source": VALUE}),
    st.fixed_dictionaries({"conversations": TURNS}, optional={"system": VALUE}),
    st.fixed_dictionaries({"prompt": st.one_of(TEXT, TURNS), "completion": st.one_of(TEXT, TURNS)}),
    st.fixed_dictionaries({"instruction": VALUE, "output": VALUE}, optional={"input": VALUE, "system": VALUE}),
    st.fixed_dictionaries({"text": VALUE}, optional={"label": VALUE}),
    st.dictionaries(TEXT, VALUE, max_size=3),
    VALUE,
)


MOSTLY = st.one_of(*[st.sampled_from(["good film", "bad plot", "very good", "not bad ?"])] * 3, TEXT)


def _alternating(texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


TALK = st.lists(MOSTLY, min_size=2, max_size=6).map(_alternating)
FORMS = [
    st.fixed_dictionaries({"messages": TALK}),
    st.fixed_dictionaries({"messages": TALK, "tools": VALUE}),
    st.fixed_dictionaries({"messages": TALK.map(json.dumps)}),
    st.fixed_dictionaries({"messages": st.tuples(MOSTLY, TALK).map(lambda t: [{"role": "system", "content": t[0]}, *t[1]])}),
    st.fixed_dictionaries(
        {
            "conversations": TALK.map(
                lambda t: [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in t]
            )
        }
    ),
    st.fixed_dictionaries({"prompt": MOSTLY, "completion": MOSTLY}),
    st.fixed_dictionaries({"prompt": TALK.map(lambda t: t[:1]), "completion": MOSTLY.map(lambda t: _alternating(["", t])[1:])}),
    st.fixed_dictionaries({"instruction": MOSTLY, "output": MOSTLY}, optional={"input": MOSTLY}),
    st.fixed_dictionaries({"text": MOSTLY, "label": MOSTLY}),
    st.fixed_dictionaries({"text": MOSTLY}),
]
ROWS = st.one_of(*(st.lists(form, min_size=1, max_size=3) for form in FORMS), st.lists(ROW, min_size=1, max_size=3))
"""Nine files of one sound form, with odd texts here and there, to one of anything."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return AutoTokenizer.from_pretrained(write_model(folder)), tmp_path_factory.mktemp("rows") / "rows.jsonl"


@pytest.mark.slow
@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=ROWS, template=st.sampled_from(TEMPLATES), array=st.booleans(), chat=st.booleans())
def test_a_drawn_file_is_encoded_or_refused(made, rows, template, array, chat):
    tokenizer, path = made
    tokenizer.chat_template = template
    path.write_text(json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(path=str(path), eval_path=str(path), use_chat_template=chat)
    try:
        encoded = encode(load(config)[0], tokenizer, config, 64)
    except InputError as error:
        event(f"refused: {type(error).__name__}")
        return
    event("encoded")
    assert len(encoded.examples) == len(rows)
    for example in encoded.examples:
        assert any(example.is_label)
        assert not example.is_label[0]
        assert len(example.input_ids) == len(example.is_label) <= 64
