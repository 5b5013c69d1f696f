"""Chat templates of the field. Oracles: the `{% generation %}` marks of TRL's training templates, and `apply_chat_template`.

TRL ships templates of real models, most of them a second time with marks around what the assistant wrote. Where the two render
the same text, our spans in the unmarked one must be the marked ones. Some of TRL's marks begin with the turn's header, which is
the prompt's at inference: a header before our span is allowed, nothing else.
"""

import copy
import dataclasses
import json
import time
from pathlib import Path

import pytest

from lownibble.config import DataConfig
from lownibble.data import Dataset, Row, encode
from lownibble.data.chat import ChatRenderer
from lownibble.data.dialects import standard
from lownibble.data.forms import recipe_for
from lownibble.data.inspect import warnings_of
from lownibble.errors import ConfigError, DataError

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]  # fmt: skip
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ANSWER = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sunny"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **rest):
    return {"role": "assistant", "content": text, **rest}


CONVERSATIONS = {
    "one turn": ([user("Hi"), assistant("Hello there.")], None),
    "two turns": ([user("Hi"), assistant("Hello there."), user("Bye"), assistant("See you.")], None),
    "system": ([{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello there.")], None),
    "the assistant first": ([assistant("Welcome."), user("Hi"), assistant("Hello there.")], None),
    "reasoning in the text": ([user("Hi"), assistant("<think>\nhm\n</think>\n\nHello.")], None),
    "reasoning apart": ([user("Hi"), assistant("Hello.", reasoning_content="hm")], None),
    "tools": ([user("Weather?"), assistant("", tool_calls=[CALL]), ANSWER, assistant("It is sunny.")], TOOLS),
}


ALTERNATE, NO_TOOLS = "Conversation roles must alternate", "leaves out the tools"
REFUSED = {
    **{(name, "the assistant first"): ALTERNATE for name in ("cohere", "cohere2", "gemma", "gemma3")},
    **{(name, "tools"): ALTERNATE for name in ("cohere", "cohere2", "gemma", "gemma3")},
    **{
        (name, "tools"): NO_TOOLS
        for name in ("deepseek_r1_distill", "idefics3", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm")
    },
    ("gemma", "system"): "System role not supported",
    ("lfm2", "tools"): "does not render the tool calls of message 2",
    ("llava_next", "tools"): "Only user and assistant roles are supported",
}
"""Template and conversation -> why it cannot be rendered."""


def with_template(tokenizer, name):
    made = copy.deepcopy(tokenizer)
    made.chat_template = (FOLDER / f"{name}.jinja").read_text()
    made.bos_token = "<s>"
    return made


def encoded(tokenizer, messages, tools=None, **options):
    fields = {"messages": messages, **({"tools": tools} if tools else {})}
    return encode(Dataset("rows", [Row(fields, "rows:1")]), tokenizer, DataConfig(**options), 100_000).examples[0]


def trained_text(tokenizer, example):
    return tokenizer.decode([i for i, flag in zip(example.input_ids, example.is_label, strict=True) if flag])


@pytest.mark.peer
@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_spans_are_those_that_trl_marks(tokenizer, name, case):
    messages, tools = CONVERSATIONS[case]
    plain = ChatRenderer(with_template(tokenizer, name))
    if (name, case) in REFUSED:
        with pytest.raises(DataError, match=REFUSED[name, case]):
            plain.rendered(messages, tools)
        return
    found = plain.rendered(messages, tools)
    if tools is None:
        assert found.text == plain.tokenizer.apply_chat_template(plain._formed(messages), tokenize=False)
    assert not found.only_last
    if not (FOLDER / f"{name}_training.jinja").exists():
        return
    marked = ChatRenderer(with_template(tokenizer, f"{name}_training")).rendered(messages, tools)
    assert marked.marked
    if marked.text != found.text:
        return  # TRL's template keeps what the model's own drops
    header, answers = plain.generation_prompt.strip(), {number: "" for _, _, number in found.spans}
    theirs = dict(answers)
    for start, end, number in found.spans:
        answers[number] += found.text[start:end].strip()
    for start, end, number in marked.spans:
        theirs[number] += marked.text[start:end].strip()
    for number, text in answers.items():
        rest = theirs[number].removeprefix(header).strip()
        assert text.removesuffix("<|tool_response>") == rest, "but for the token that asks for a tool's answer"


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in NAMES if (FOLDER / f"{name}_training.jinja").exists()])
def test_marks_are_the_labels(tokenizer, name):
    made = with_template(tokenizer, f"{name}_training")
    messages, _ = CONVERSATIONS["two turns"]
    rendered = ChatRenderer(made)._formed(messages)
    theirs = made.apply_chat_template(rendered, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ours = encoded(made, messages)
    if list(ours.input_ids) == list(theirs["input_ids"]):  # else a token reached across a mark, and its pieces are apart
        assert [int(flag) for flag in ours.is_label] == theirs["assistant_masks"]
    assert trained_text(made, ours).count("Hello there.") == 1


PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("template", [PARTS, TEXT])
@pytest.mark.parametrize("as_parts", [False, True])
def test_contents_as_text_or_parts_give_the_same(tokenizer, template, as_parts):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    messages = [user("a film"), assistant("good")]
    if as_parts:
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    example = encoded(made, messages)
    assert made.decode(example.input_ids) == "user: a film<|im_end|>assistant: good<|im_end|>"
    assert trained_text(made, example) == "good<|im_end|>"


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


IN_PARTS = {
    "system": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello there.")],
    "user": CONVERSATIONS["one turn"][0],
    "assistant": CONVERSATIONS["one turn"][0],
    "tool": CONVERSATIONS["tools"][0],
}


@pytest.mark.peer
@pytest.mark.parametrize("role", IN_PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_part_is_the_text_whoever_says_it(tokenizer, name, role):
    made, tools = with_template(tokenizer, name), TOOLS if role == "tool" else None
    found = []
    for as_parts in (False, True):
        turns = [{**m, "content": parts(m["content"])} if as_parts and m["role"] == role else m for m in IN_PARTS[role]]
        try:
            rendered = ChatRenderer(made).rendered(turns, tools)
            found.append(("".join(rendered.text.split()), [rendered.text[start:end] for start, end, _ in rendered.spans]))
        except DataError as error:
            found.append(str(error))
    assert found[0] == found[1], "but for space that some templates print after a part"


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in NAMES if name != "llava_next"])  # it prints an answer's first part alone
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_several_parts_are_read(tokenizer, name, role):
    """Also where the template takes the space between them away."""
    made, said = with_template(tokenizer, name), parts("Look at this: ", "a film")
    turns = [user(said), assistant("good")] if role == "user" else [user("Hi"), assistant(said)]
    text = ChatRenderer(made).rendered(turns).text
    assert "Look at this:" in text
    assert "a film" in text
    assert "'type'" not in text


@pytest.mark.parametrize("key", ["weight", "train", "training"])
def test_turns_with_weight_0_are_not_trained(tokenizer, key):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEXT
    messages = [user("a"), assistant("bad", **{key: 0}), user("b"), assistant("good", **{key: 1})]
    assert trained_text(made, encoded(made, messages)) == "good<|im_end|>"
    with pytest.raises(DataError, match="no label token"):
        encoded(made, messages[:2])


def test_only_the_last_turn_is_trained_where_that_is_asked_for(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEXT
    messages = [user("a"), assistant("bad"), user("b"), assistant("good")]
    assert trained_text(made, encoded(made, messages)) == "bad<|im_end|>good<|im_end|>"
    assert trained_text(made, encoded(made, messages, trained_turns="last")) == "good<|im_end|>"
    assert trained_text(made, encoded(made, [*messages, user("c")], trained_turns="last")) == "good<|im_end|>"
    with pytest.raises(DataError, match="no label token"):
        encoded(made, [*messages[:3], assistant("good", weight=0)], trained_turns="last")
    with pytest.raises(
        ConfigError, match="'trained_turns' of DataConfig is for conversations; these rows are of the form prompt"
    ):
        recipe_for(Dataset("rows", [Row({"prompt": "a", "completion": "b"}, "rows:1")]), DataConfig(trained_turns="last"))
    with pytest.raises(ConfigError, match="mask_prompt = false trains all text"):
        encoded(made, messages, trained_turns="last", mask_prompt=False)


def test_tools_reach_the_template(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEXT
    for tools in (TOOLS, json.dumps(TOOLS)):
        example = encoded(made, [user("a"), assistant("b")], tools)
        assert made.decode(example.input_ids).startswith('[{"type": "function"')
        assert trained_text(made, example) == "b<|im_end|>"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_the_template_leaves_out_is_told(tokenizer, key):
    """Of the last turn; that of earlier ones many templates leave out by design."""
    turns = [user("a"), assistant("b", **{key: "hm\nwell"}), user("a"), assistant("b", **{key: "so"})]
    made = copy.deepcopy(tokenizer)
    prints = "{% if loop.last %}{{ m." + key + " }} {% endif %}{{ m.content }}"
    for template, count in ((TEXT, 1), (TEXT.replace("{{ m.content }}", prints), 0)):
        made.chat_template = template
        found = encode(Dataset("rows", [Row({"messages": turns}, "rows:1")]), made, DataConfig(), 512)
        assert found.n_unsaid == count
        told = "the chat template leaves out the reasoning of the last turn of 1 training conversations"
        assert (told in warnings_of([found, found], made, 512)) == bool(count)


def test_a_role_that_the_template_drops_is_an_error(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEXT.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}")
    with pytest.raises(DataError, match="leaves out message 1, whose role is 'developer'"):
        encoded(made, [{"role": "developer", "content": "Be brief."}, user("a"), assistant("b")])


def test_a_template_that_fails_is_an_error_of_the_row(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = "{% for m in messages %}{{ m.content + 1 }}{% endfor %}"
    with pytest.raises(DataError, match=r"rows:1: the chat template cannot render this conversation \(TypeError"):
        encoded(made, [user("a"), assistant("b")])


ROWS = {
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "sharegpt with a system": {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "conversations with roles": {"conversations": [user("a"), assistant("b")]},
    "text of json": {"messages": json.dumps([user("a"), assistant("b")])},
    "nulls": {"messages": [{**user("a"), "tool_calls": None}, {**assistant("b"), "tool_calls": None, "weight": None}]},
    "trl": {"prompt": [user("a")], "completion": [assistant("b")]},
    "trl, an answer in the prompt": {"prompt": [user("x"), assistant("y"), user("a")], "completion": [assistant("b")]},
}


@pytest.mark.parametrize("case", ROWS)
def test_conversations_of_other_tools(tokenizer, case):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEXT
    example = encode(Dataset("rows", [Row(ROWS[case], "rows:1")]), made, DataConfig(), 512).examples[0]
    assert made.decode(example.input_ids).endswith("user: a<|im_end|>assistant: b<|im_end|>")
    assert trained_text(made, example) == "b<|im_end|>"


@pytest.mark.parametrize("given", ["", "  the film  "])
def test_alpaca(tokenizer, given):
    row = Row({"instruction": "Judge.", "input": given, "output": "good"}, "rows:1")
    example = encode(Dataset("rows", [row]), tokenizer, DataConfig(), 512).examples[0]
    prompt = "Judge.\n\n" + ("the film\n\n" if given.strip() else "")
    assert tokenizer.decode(example.input_ids).removesuffix(tokenizer.eos_token) == f"{prompt}good"
    assert trained_text(tokenizer, example).removesuffix(tokenizer.eos_token) == "good"


def test_many_turns_cost_what_few_do(tokenizer):
    """The same text in 100 turns instead of 10: renderings and tokenisations are two, whatever the number of turns."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEXT
    calls = []
    render, made.apply_chat_template = made.apply_chat_template, lambda *a, **k: calls.append(1) or render(*a, **k)
    seconds = {}
    for turns in (10, 100):
        messages = [message for _ in range(turns) for message in (user("good " * (2000 // turns)), assistant("film"))]
        calls.clear()
        started = time.perf_counter()
        encoded(made, messages)
        seconds[turns] = time.perf_counter() - started
        assert len(calls) <= 5, "the conversation, and probes of the template"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BY_INDEX = (
    "{% for i in range(messages | length) %}<|im_start|>{{ messages[i].role }}\n{{ messages[i].content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_PROMPT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ENDS_LATE = (
    "{% for m in messages %}{{ '' if loop.first else '<|im_end|>\n' }}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "<|im_end|>"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, BY_INDEX, NO_PROMPT, ENDS_LATE])
@pytest.mark.parametrize("content", ["a", "d", "assistant", "im_start", "user", "\n a", "<|im_start|>", "."])
def test_contents_that_look_like_the_header(tokenizer, template, content):
    """A content that occurs in its turn's header, or is one: the label is the content and the token that ends the turn."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    messages = [user("what a day"), assistant(content), user("say a"), assistant("fine")]
    example = encoded(made, messages)
    assert made.decode(example.input_ids) == made.apply_chat_template(messages, tokenize=False)
    if (template, content) != (ENDS_LATE, "<|im_start|>"):  # there it cannot be told from the next turn's header
        assert "".join(trained_text(made, example).split()) == "".join(f"{content}<|im_end|>fine<|im_end|>".split())


QUESTION_INSIDE = (
    "{% set asked = namespace(text='') %}{% for m in messages %}{% if m.role == 'user' %}{% set asked.text = m.content %}"
    "{% else %}Q: {{ asked.text }}\nA: {{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("asks", ["", "{% if add_generation_prompt %}Q: {{ asked.text }}\nA: {% endif %}"])
@pytest.mark.parametrize("said", ["Hi", "A: yes", "yes", "Q", "a"])
def test_a_question_that_is_printed_inside_the_answer_s_turn_is_not_trained(tokenizer, said, asks):
    made = copy.deepcopy(tokenizer)
    made.chat_template = QUESTION_INSIDE + asks
    example = encoded(made, [user(said), assistant("yes"), user(said), assistant("no")])
    assert trained_text(made, example) == "yes<|im_end|>no<|im_end|>"


def test_a_template_that_changes_contents_trains_the_last_turn_and_says_so(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = BY_INDEX.replace("messages[i].content", "messages[i].content | replace('y', 'Y')")
    rows = Dataset("rows", [Row({"messages": [user("hi"), assistant("yo"), user("hi"), assistant("yes")]}, "rows:1")])
    found = encode(rows, made, DataConfig(), 512)
    assert found.n_last_only == 1
    assert "Yes<|im_end|>" in trained_text(made, found.examples[0])
    assert "of 1 training conversations only the last assistant turn is trained" in warnings_of([found, found], made, 512)[0]


TOOL_TURNS = [user("w?"), assistant("", tool_calls=[CALL]), {**ANSWER, "content": "Paris"}, assistant("ok done")]


@pytest.mark.peer
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1", "gptoss", "gemma4"])
def test_an_answer_that_repeats_the_call(tokenizer, name):
    made = with_template(tokenizer, name)
    found = ChatRenderer(made).rendered(TOOL_TURNS, TOOLS)
    by_turn = {number: found.text[start:end] for start, end, number in found.spans}
    assert "weather" in by_turn[1]
    assert "Paris" in by_turn[1]
    assert "ok done" in by_turn[3]
    assert "weather" not in by_turn[3]


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_no_content_beside_a_call_is_an_empty_one(tokenizer, name):
    """OpenAI's rows have null there."""
    made, found = with_template(tokenizer, name), []
    for content in ("", None):
        messages = [user("Weather?"), assistant(content, tool_calls=[CALL]), ANSWER, assistant("It is sunny.")]
        try:
            found.append(encoded(made, messages, TOOLS))
        except DataError as error:
            found.append(str(error))
    assert found[0] == found[1]


def with_arguments(arguments):
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    return [user("Weather?"), assistant("", tool_calls=[call]), ANSWER, assistant("It is sunny.")]


@pytest.mark.peer
@pytest.mark.parametrize("name", NAMES)
def test_arguments_as_text_are_those_of_an_object(tokenizer, name):
    """OpenAI's rows. Oracle: the same call with an object, as transformers documents it."""
    made = with_template(tokenizer, name)
    found = []
    for arguments in ({"city": "Paris"}, '{"city": "Paris"}'):
        try:
            found.append(ChatRenderer(made).rendered(with_arguments(arguments), TOOLS))
        except DataError as error:
            found.append(str(error))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("printed", "text"), [("a.arguments", '{"city":"Paris"}'), ("a.arguments | tojson", '{"city": "Paris"}')]
)
def test_arguments_stay_text_where_the_template_prints_them_as_they_are(tokenizer, printed, text):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEXT.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{% set a = c.function %}{{ a.name }}"
        + f"{{{{ {printed} }}}}"
        + "{% endfor %}",
    )
    example = encoded(made, with_arguments('{"city":"Paris"}'), TOOLS)
    assert trained_text(made, example).startswith(f"weather{text}<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([user("a"), assistant("b"), {"role": "critic", "content": "no"}, assistant("c")], None, "whose role is 'critic'"),
        ([user("a"), assistant("b", tool_calls=[CALL]), assistant("c")], None, "does not render the tool calls of message 2"),
        ([user("a"), assistant("weather", tool_calls=[CALL])], None, "does not render the tool calls of message 2"),
        ([user("a"), assistant("b")], TOOLS, "leaves out the tools"),
    ],
)
def test_what_a_template_leaves_out_is_an_error(tokenizer, messages, tools, message):
    made = copy.deepcopy(tokenizer)
    made.chat_template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'critic' %}")
    with pytest.raises(DataError, match=message):
        encoded(made, messages, tools)


def test_marks_belong_to_the_turn_that_printed_them(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content == 'one two' %}{% generation %}one{% endgeneration %} "
        "{% generation %}two{% endgeneration %}<|im_end|>{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    messages = [user("a"), assistant("one two"), user("b"), assistant("three", weight=0)]
    assert trained_text(made, encoded(made, messages)) == "onetwo"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"content": [{"type": "image"}]}, "has a part of type 'image', and only text can be trained"),
        ({"content": [{"type": "text", "text": ""}]}, "the content of message 2 is empty"),
        ({"content": [{"type": "text", "text": "\ud800"}]}, "half of a surrogate pair"),
        ({"content": "a", "reasoning_content": "\ud800"}, "half of a surrogate pair"),
        ({"content": "a", "tool_calls": 5}, "the tool_calls of message 2 must be a list"),
        ({"content": "a", "tool_calls": [{"function": None}]}, "the tool_calls of message 2 must be a list"),
        ({"content": "a", "tool_calls": ["x"]}, "the tool_calls of message 2 must be a list"),
    ],
)
def test_odd_turns_are_named(tokenizer, turn, message):
    made = copy.deepcopy(tokenizer)
    made.chat_template = CHATML
    with pytest.raises(DataError, match=f"rows:1: .*{message}"):
        encoded(made, [user("a"), {"role": "assistant", **turn}])


def test_reasoning_on_one_line_is_the_contents(tokenizer):
    made = with_template(tokenizer, "qwen3")
    example = encoded(made, [user("a"), assistant("<think>because</think>good")])
    assert trained_text(made, example).endswith("good<|im_end|>")


def test_nulls_that_parquet_adds_do_not_reach_the_template(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEXT.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")
    call = {"function": {"name": "weather", "arguments": {"city": "Paris", "date": None}}, "id": None}
    text = trained_text(made, encoded(made, [user("a"), assistant("b", tool_calls=[call])]))
    assert text == 'b[{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]<|im_end|>'


def nulls(*arguments):
    turns = [
        {**user("a")},
        assistant("b", tool_calls=[{"id": None, "function": {"name": "f", "arguments": a}} for a in arguments]),
    ]
    return {"messages": turns, "tools": [{"name": "f", "parameters": {"properties": dict.fromkeys(a)}} for a in arguments]}


def test_nulls_that_are_meant_stay():
    """Where calls differ in their keys no file has filled them up. A part of the rows is read as all of them were."""
    rows = [Row(nulls({"city": None}), "rows:1"), Row(nulls({"zip": "1"}), "rows:2")]
    found = Dataset("rows", rows)
    for dataset in (found, dataclasses.replace(found, rows=found.rows[:1])):
        assert dataset.rows[0].fields["messages"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"city": None}}}]
        assert dataset.rows[0].fields["tools"] == rows[0].fields["tools"]
    padded = Dataset(
        "rows", [Row(nulls({"city": "Paris", "zip": None}), "rows:1"), Row(nulls({"city": None, "zip": "1"}), "rows:2")]
    )
    assert [row.fields["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in padded.rows] == [
        {"city": "Paris"},
        {"zip": "1"},
    ]


def test_function_calls_are_tool_calls():
    """OpenAI's rows of before 2024. Oracle: the same conversation as it is written today."""
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    old = [
        user("w?"),
        assistant(None, function_call=call),
        {"role": "function", "name": "weather", "content": "sunny"},
        assistant("ok"),
    ]
    new = [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": "weather", "content": "sunny"},
    ]
    assert standard({"messages": old})["messages"] == [old[0], *new, old[3]]
    kept = [user("w?"), {"role": "function", "content": "sunny"}, assistant("ok")]
    assert standard({"messages": kept})["messages"] == kept, "a role that a template may know"


def test_a_function_call_that_no_template_prints_is_an_error(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = CHATML
    with pytest.raises(DataError, match="does not render the tool calls of message 2"):
        encoded(
            made, [user("a"), assistant("b", function_call={"name": "weather", "arguments": "{}"}), user("c"), assistant("d")]
        )


def test_nulls_beside_from_and_value_are_no_role():
    turn = {"from": "human", "value": "a", "role": None, "content": None}
    assert standard({"conversations": [turn]})["messages"] == [user("a")]
    padded = {"from": None, "value": None, **user("a")}
    assert standard({"conversations": [padded]})["messages"] == [user("a")]


def test_marks_of_unknown_turns_are_not_used(tokenizer):
    """A template that goes by index: whose mark is whose cannot be told, and the turns are found by what they say."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = BY_INDEX.replace(
        "{{ messages[i].content }}<|im_end|>",
        "{% if messages[i].role == 'assistant' %}{% generation %}{{ messages[i].content }}{% endgeneration %}"
        "{% generation %}<|im_end|>{% endgeneration %}{% else %}{{ messages[i].content }}<|im_end|>{% endif %}",
    )
    messages = [user("a"), assistant("bad", weight=0), user("b"), assistant("good")]
    assert trained_text(made, encoded(made, messages)) == "good<|im_end|>"


def test_rows_of_mixed_files_are_told_apart_by_what_they_hold():
    alpaca = {"messages": None, "prompt": None, "completion": None, "instruction": "Judge.", "input": None, "output": "good"}
    assert standard(alpaca)["completion"] == "good"
    assert standard({**alpaca, "prompt": "p", "completion": "c"})["completion"] == "c", "what is there already stays"
    assert standard({"messages": "[" * 100_000})["messages"] == "[" * 100_000
