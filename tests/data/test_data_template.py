"""Encoding. Oracles: `apply_chat_template` for ids, its {% generation %} masks for labels, hand concatenation for pairs."""

import copy
from datetime import date, time
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lownibble.config import DataConfig, RunConfig
from lownibble.data import Dataset, Row, encode
from lownibble.data.demo import COMPLETION_TEMPLATE, PROMPT_TEMPLATE
from lownibble.data.template import TokenCoder
from lownibble.errors import ConfigError, DataError, ModelError
from lownibble.training import starts

MARKED = (
    "{{ bos_token or '' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be good"},
    {"role": "user", "content": "a film"},
    {"role": "assistant", "content": "positive"},
    {"role": "user", "content": "a bad film"},
    {"role": "assistant", "content": "negative, I think"},
]


def data(*fields, **templates) -> Dataset:
    return Dataset("rows", [Row(dict(f), f"rows.jsonl:{n}") for n, f in enumerate(fields, 1)], **templates)


def one(tokenizer, fields, max_length=512, **options):
    encoded = encode(data(fields), tokenizer, DataConfig(**options), max_length)
    return encoded.examples[0]


def labels(example) -> list[int]:
    return [index for index, flag in zip(example.input_ids, example.is_label, strict=True) if flag]


def plain(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def going_on(tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on after another."""
    front, whole = tokenizer(["0", f"0{text}"], add_special_tokens=False)["input_ids"]
    assert whole[: len(front)] == front
    return whole[len(front) :]


def test_prompt_and_completion_as_at_inference(any_tokenizer):
    fields = {"prompt": "Review: good film\n", "completion": "\npositive"}
    example = one(any_tokenizer, fields)
    prompt = any_tokenizer(fields["prompt"])["input_ids"]
    completion = [*going_on(any_tokenizer, fields["completion"]), any_tokenizer.eos_token_id]
    assert example.input_ids == prompt + completion
    assert example.is_label == [False] * len(prompt) + [True] * len(completion)
    assert example.origin == "rows.jsonl:1"
    assert any_tokenizer(fields["prompt"] + fields["completion"])["input_ids"] != prompt + completion[:-1]  # "\n\n" would merge


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("film:\n", "good film"), ("film:", " positive"), ("film: ", "positive"), ("(", "a film)"), ("a\n", "\nb"), ("<s>", "film")],
)
def test_no_space_comes_between_prompt_and_completion(any_tokenizer, prompt, completion):
    """Oracle: what the row decodes to, and the whole text's tokens where none reaches across."""
    example = one(any_tokenizer, {"prompt": prompt, "completion": completion})
    rest = example.input_ids[example.is_label.index(True) : -1]
    front = any_tokenizer.tokenize(prompt)
    tokens = any_tokenizer.tokenize(prompt + completion)
    if tokens[: len(front)] == front:
        assert any_tokenizer.convert_ids_to_tokens(rest) == tokens[len(front) :]
    whole = any_tokenizer.decode(any_tokenizer(prompt + completion, add_special_tokens=False)["input_ids"])
    assert any_tokenizer.decode(example.input_ids[:-1]).removeprefix("<s>").lstrip() == whole.removeprefix("<s>").lstrip()


def test_an_encoders_tokenizer_gives_the_decoder_a_text_of_its_own(spacing_tokenizer):
    """As T5's, which end every text: a completion is tokenised as its `text_target` is."""
    t5 = copy.deepcopy(spacing_tokenizer)
    end = (t5.eos_token, t5.eos_token_id)
    t5.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    example = one(t5, {"prompt": "film:", "completion": "positive"})
    assert labels(example) == t5("positive")["input_ids"]


def test_end_of_sequence_is_trained_once_although_it_is_the_padding(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for completion in ("yes", "yes<|im_end|>"):
        ids = labels(one(tokenizer, {"prompt": "a", "completion": completion}))
        assert ids == [*plain(tokenizer, "yes"), tokenizer.eos_token_id]


def test_bos_is_not_doubled(bos_tokenizer):
    example = one(bos_tokenizer, {"text": "film", "label": "x"}, prompt_template="<s>{text}", completion_template="{label}")
    assert example.input_ids.count(bos_tokenizer.bos_token_id) == 1
    for fields, options in (({"messages": CHAT}, {}), ({"prompt": "a", "completion": "b"}, {"use_chat_template": True})):
        assert one(bos_tokenizer, fields, **options).input_ids.count(bos_tokenizer.bos_token_id) == 1


def test_text_label_default_and_own_templates(tokenizer):
    fields = {"text": "a film", "label": 1}
    assert tokenizer.decode(one(tokenizer, fields).input_ids) == "a film\nLabel: 1<|im_end|>"
    example = one(tokenizer, fields, prompt_template="{text}?", completion_template=" {label:02d}")
    assert tokenizer.decode(example.input_ids) == "a film? 01<|im_end|>"
    assert tokenizer.decode(one(tokenizer, fields, prompt_template="Q {text}").input_ids) == "Q a film 1<|im_end|>"


def test_templates_of_the_data_set_and_of_the_configuration(tokenizer):
    demo = data({"text": "good", "label": "positive"}, prompt_template=PROMPT_TEMPLATE, completion_template=COMPLETION_TEMPLATE)
    encoded = encode(demo, tokenizer, DataConfig(), 64)
    assert tokenizer.decode(encoded.examples[0].input_ids) == "Review: good\nSentiment: positive<|im_end|>"
    encoded = encode(demo, tokenizer, DataConfig(prompt_template="{text} is"), 64)
    assert tokenizer.decode(encoded.examples[0].input_ids) == "good is positive<|im_end|>"


def test_text_alone_is_language_modelling(any_tokenizer):
    example = one(any_tokenizer, {"text": "a good film"})
    assert example.input_ids == [*any_tokenizer("a good film")["input_ids"], any_tokenizer.eos_token_id]
    assert example.is_label == [False] + [True] * (len(example.input_ids) - 1)


def test_unmasked_prompt(tokenizer):
    for fields in ({"prompt": "a good", "completion": "film"}, {"messages": CHAT}):
        example = one(tokenizer, fields, mask_prompt=False)
        assert example.is_label == [False] + [True] * (len(example.input_ids) - 1)


def with_marks(tokenizer):
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = MARKED
    return marked


def test_messages_equal_apply_chat_template_and_its_generation_mask(any_tokenizer):
    example = one(any_tokenizer, {"messages": CHAT, "id": 3})
    oracle = with_marks(any_tokenizer).apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert example.input_ids == oracle["input_ids"]
    assert example.is_label == [bool(flag) for flag in oracle["assistant_masks"]]
    assert any_tokenizer.decode(labels(example)) == "positive<|im_end|>negative, I think<|im_end|>"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=4))
def test_messages_of_any_text_train_just_what_the_assistant_said(tokenizer, contents):
    chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    example = one(tokenizer, {"messages": chat}, max_length=100_000)
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(labels(example)) == "".join(text + "<|im_end|>" for text in contents[1::2])


def test_a_merge_over_the_border_is_tokenised_in_pieces(tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nfilm"}]
    merged = tokenizer.apply_chat_template(chat, return_dict=False)
    example = one(tokenizer, {"messages": chat})
    assert example.input_ids != merged
    header = plain(tokenizer, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    assert example.input_ids[: len(header)] == header
    assert labels(example) == plain(tokenizer, "\nfilm<|im_end|>")


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("content", ["film", "  film", "\n a bad film", "?"])
def test_a_merge_over_the_space_at_a_header_s_end_is_tokenised_in_pieces(content, trim):
    """Also where places of tokens leave out their space (GPT-NeoX, Pythia)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|im_end|>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["a bad film ? film"] * 2, trainer)
    core.decoder = decoders.ByteLevel()
    bare = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    assert bare.tokenize("assistant: film")[-1] == "Ġfilm"
    bare.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    example = one(bare, {"messages": chat})
    asked = bare.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert example.input_ids[: len(asked)] == asked
    answer = plain(bare, f"{content}<|im_end|>")
    assert example.input_ids[len(asked) :] == answer + plain(bare, "\n")
    assert labels(example) == answer


@pytest.mark.parametrize("content", ["film", "a film: ", "\nfilm", "(good)"])
@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] {% else %}{{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_start|>{% else %}{{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}",
    ],
)
def test_pieces_of_a_conversation_have_no_space_between_them(spacing_tokenizer, template, content):
    """Oracle: what `apply_chat_template` decodes to; its tokens where none reaches across."""
    made = copy.deepcopy(spacing_tokenizer)
    made.chat_template = template
    chat = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(("a", content, "film?", "a film"))]
    example = one(made, {"messages": chat})
    whole = made.apply_chat_template(chat, return_dict=False)
    assert made.decode(example.input_ids) == made.decode(whole)
    assert made.decode(labels(example)).replace(" ", "") == f"{content}<|im_end|>a film<|im_end|>".replace(" ", "")


LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
    "<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("text", "template", "data_options"),
    [
        ("[/INST]", LLAMA2, {}),
        (" [/INST]", LLAMA2, {}),
        ("assistant\n", None, {}),
        ("<|im_start|>assistant\n", None, {}),
        ("\nSentiment:", None, {"prompt_template": "{prompt}\nSentiment:", "completion_template": " {completion}"}),
        ("Sentiment:", None, {"prompt_template": "Film. Sentiment:", "completion_template": " {completion}"}),
    ],
)
def test_the_text_that_activates_an_adapter_has_the_tokens_of_the_rows(
    spacing_tokenizer, monkeypatch, text, template, data_options
):
    made = copy.deepcopy(spacing_tokenizer)
    made.chat_template = template or made.chat_template
    monkeypatch.setattr(starts, "load_tokenizer", lambda source: made)
    monkeypatch.setattr(starts, "resolve", lambda *of: None)
    config = RunConfig(
        model="m", data=data_options, method="lora", lora={"alora_invocation_tokens": text, "init_lora_weights": True}
    )
    tokens = starts.decide(config)[0].lora.alora_invocation_tokens
    example = one(made, {"prompt": "(x)", "completion": "good"}, use_chat_template=not data_options, **data_options)
    end = example.is_label.index(True)
    assert example.input_ids[end - len(tokens) : end] == tokens


def test_chat_template_around_prompt_and_completion(any_tokenizer):
    example = one(any_tokenizer, {"prompt": "a good ", "completion": " film"}, use_chat_template=True)
    chat = [{"role": "user", "content": "a good"}, {"role": "assistant", "content": "film"}]
    assert example.input_ids == any_tokenizer.apply_chat_template(chat, return_dict=False)
    assert any_tokenizer.decode(labels(example)) == "film<|im_end|>"


def test_end_of_turn_without_a_token_is_trained(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "film"}]
    assert bare.decode(labels(one(bare, {"messages": chat}))) == "film\n"


def test_a_long_prompt_is_cut_from_its_left(any_tokenizer):
    fields = {"prompt": "abcdefghijkl", "completion": " yes"}
    whole = one(any_tokenizer, fields)
    front = 1 if any_tokenizer.bos_token_id is not None else 0
    encoded = encode(data(fields, {"prompt": "a", "completion": "b"}), any_tokenizer, DataConfig(), 9)
    cut = encoded.examples[0]
    assert encoded.n_cut == 1
    assert len(cut.input_ids) == 9
    assert labels(cut) == labels(whole)
    assert cut.input_ids == whole.input_ids[:front] + whole.input_ids[len(whole.input_ids) - 9 + front :]


def test_a_completion_longer_than_all_keeps_one_prompt_token(tokenizer):
    whole = one(tokenizer, {"prompt": "xyz", "completion": "qrstuvw"})
    cut = one(tokenizer, {"prompt": "xyz", "completion": "qrstuvw"}, max_length=4)
    assert cut.input_ids == whole.input_ids[2:6]
    assert cut.is_label == [False, True, True, True]


@pytest.mark.parametrize("fields", [{"text": "a good film, I think it is"}, {"messages": CHAT[1:3] * 3}])
def test_text_and_messages_are_cut_at_their_end(tokenizer, fields):
    whole = one(tokenizer, fields)
    encoded = encode(data(fields), tokenizer, DataConfig(), 20)
    assert encoded.n_cut == (len(whole.input_ids) > 20)
    assert encoded.examples[0].input_ids == whole.input_ids[:20]
    assert encoded.examples[0].is_label == whole.is_label[:20]


def test_rows_without_a_label_token(tokenizer):
    with pytest.raises(DataError, match=r"rows.jsonl:1: no label token is left of its \d+ tokens within max_length 8. Raise"):
        one(tokenizer, {"messages": CHAT}, max_length=8)
    with pytest.raises(DataError, match=r"rows.jsonl:1: no label token: it has no assistant turn"):
        one(tokenizer, {"messages": CHAT[:2]})


def test_missing_chat_template_and_end_of_sequence(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for fields, options in (({"messages": CHAT}, {}), ({"prompt": "a", "completion": "b"}, {"use_chat_template": True})):
        with pytest.raises(ModelError, match="no chat template"):
            one(bare, fields, **options)
    bare.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        one(bare, {"prompt": "a", "completion": "b"})


def test_templates_that_rewrite_or_refuse(tokenizer):
    odd = copy.deepcopy(tokenizer)
    odd.chat_template = "{% for m in messages %}{{ m.role }}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}<|im_end|>"
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template leaves out message 1, whose role is 'system'"):
        one(odd, {"messages": CHAT})
    odd.chat_template = "{% for m in messages %}{{ m.role }}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template renders nothing of message 3, an assistant"):
        one(odd, {"messages": CHAT})
    odd.chat_template = "{{ raise_exception('roles must alternate.') }}"
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template refuses this conversation: roles must alternate"):
        one(odd, {"messages": CHAT})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "must be a list"),
        ({"messages": "hi"}, "must be a list"),
        ({"messages": [3]}, "message 1 must be an object"),
        ({"messages": [{"content": "a"}]}, "message 1 must be an object"),
        ({"messages": [{"role": "user", "content": None}]}, "the content of message 1 is null"),
        (
            {"messages": [{"role": "user", "content": [3]}]},
            r"the content of message 1 has a part that is no .type, .... object",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "the content of message 1 is an empty list"),
        ({"messages": [*CHAT[:2], {**CHAT[2], "weight": 0.5}]}, "the 'weight' of message 3 must be 0 or 1, and is 0.5"),
        ({"messages": [*CHAT, {"role": "user", "content": " "}]}, "the content of message 6 is empty"),
        ({"text": ""}, "the field 'text' is empty"),
        ({"text": 3}, "the field 'text' must be text, not int"),
        ({"text": None}, "the field 'text' is null"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        ({"text": "a", "label": float("nan")}, "the field 'label' is nan"),
        ({"text": "a", "label": ["x"]}, "the field 'label' must be text, a number or a date, not list"),
        ({"text": "a", "label": ("x",)}, "the field 'label' must be text, a number or a date, not tuple"),
        ({"text": "a", "label": b"x"}, "the field 'label' must be text, a number or a date, not bytes"),
        ({"text": "a", "label": Decimal("nan")}, "the field 'label' is NaN"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, r"the field 'prompt' must be text, not list \(\['x'\]\)"),
        ({"instruction": "a", "output": {"x": 1}}, "the field 'completion' must be text, not dict"),
        ({"text": "a", "label": ""}, "the completion is empty"),
        ({"prompt": "a", "completion": "\n"}, "the field 'completion' is empty"),
    ],
)
def test_bad_values(tokenizer, fields, message):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{message}"):
        one(tokenizer, fields)


@pytest.mark.parametrize(
    ("label", "text"),
    [
        (1, "1"),
        (True, "True"),
        (0.5, "0.5"),
        (Decimal("1.10"), "1.10"),
        (date(2026, 5, 1), "2026-05-01"),
        (time(7, 5), "07:05:00"),
    ],
)
def test_labels_that_a_template_prints(tokenizer, label, text):
    assert tokenizer.decode(labels(one(tokenizer, {"text": "a", "label": label}))) == f" {text}<|im_end|>"


def test_alpaca_with_numbers(tokenizer):
    example = one(tokenizer, {"instruction": "Add 1.", "input": 2, "output": 3})
    assert tokenizer.decode(example.input_ids) == "Add 1.\n\n2\n\n3<|im_end|>"
    example = one(tokenizer, {"instruction": "Add 1.", "input": float("nan"), "output": 3})  # pandas' for nothing
    assert tokenizer.decode(example.input_ids) == "Add 1.\n\n3<|im_end|>"


def test_a_column_without_a_value_in_any_row_does_not_decide_the_form(tokenizer):
    rows = [{"messages": None, "prompt": "a", "completion": text} for text in "bc"]
    assert encode(data(*rows), tokenizer, DataConfig(), 64).form == "prompt-completion"
    with pytest.raises(DataError, match=r"rows.jsonl:1: 'messages' must be a list"):
        encode(data(rows[0], {"messages": CHAT}), tokenizer, DataConfig(), 64)


def test_turns_that_are_not_trained_do_not_go_with_all_text(tokenizer):
    bad = [*CHAT[:2], {**CHAT[2], "weight": 0}, *CHAT[3:]]
    with pytest.raises(DataError, match=r"rows.jsonl:1: message 3 is not to be trained, and mask_prompt = false trains all text"):
        one(tokenizer, {"messages": bad}, mask_prompt=False)
    example = one(tokenizer, {"prompt": CHAT[:4], "completion": CHAT[4:]}, mask_prompt=False)
    assert sum(example.is_label) == len(example.input_ids) - 1, "a prompt of messages is text like any other"


def test_unused_fields_may_be_anything(tokenizer):
    one(tokenizer, {"text": "a", "score": float("nan"), "note": "", "tags": None})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": "b", "label": "x"}], "rows.jsonl:2: a text-label row among text rows"),
        ([{"text": "b", "label": "x"}, {"text": "a"}], "rows.jsonl:2: the field 'label' is missing; the row has text"),
        ([{"messages": CHAT}, {"prompt": "a", "completion": "b"}], "rows.jsonl:2: the field 'messages' is missing"),
        ([{"x": 1}], "rows.jsonl:1: cannot tell what these rows are; their fields are x"),
    ],
)
def test_mixed_and_unknown_forms(tokenizer, rows, message):
    with pytest.raises(DataError, match=message):
        encode(data(*rows), tokenizer, DataConfig(), 64)


def test_bad_rows_are_reported_together_up_to_five(tokenizer):
    with pytest.raises(DataError) as caught:
        encode(data(*[{"text": ""}] * 8), tokenizer, DataConfig(), 64)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"rows.jsonl:{n}" for n in range(1, 6)]
    assert lines[5:] == ["and 3 more bad rows in rows"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_template": "{nope}"}, DataError, "rows.jsonl:1: the field 'nope' is missing; the row has text, label"),
        ({"prompt_template": "{text"}, ConfigError, "malformed"),
        ({"prompt_template": "{}"}, ConfigError, "no plain field name"),
        ({"prompt_template": "{text.__class__}"}, ConfigError, "no plain field name"),
        ({"completion_template": "{label:d}"}, DataError, "rows.jsonl:1: the template does not fit"),
        ({"completion_template": "{label:{width}}"}, DataError, "rows.jsonl:1: the field 'width' is missing"),
        ({"completion_template": "{label:{}}"}, ConfigError, "no plain field name"),
        ({"completion_template": "{label:1000000000000000}"}, DataError, "rows.jsonl:1: the template does not fit"),
    ],
)
def test_bad_templates(tokenizer, options, error, message):
    with pytest.raises(error, match=message):
        one(tokenizer, {"text": "a", "label": "b"}, **options)


def test_templates_without_a_partner(tokenizer):
    with pytest.raises(ConfigError, match="'completion_template' of DataConfig is missing"):
        one(tokenizer, {"text": "a"}, prompt_template="{text}")
    with pytest.raises(ConfigError, match="'prompt_template' of DataConfig is missing"):
        one(tokenizer, {"messages": CHAT}, completion_template="{messages}")
    with pytest.raises(ConfigError, match="use_chat_template"):
        one(tokenizer, {"text": "a"}, use_chat_template=True)


def test_no_rows(tokenizer):
    with pytest.raises(DataError, match="'rows' has no rows"):
        encode(data(), tokenizer, DataConfig(), 64)


def test_rows_that_are_too_long(tokenizer):
    rows = data({"text": "a b"}, {"text": "a " * 50}, {"text": "c"})
    cut = encode(rows, tokenizer, DataConfig(), 16)
    assert (len(cut.examples), cut.n_cut, cut.n_dropped) == (3, 1, 0)
    dropped = encode(rows, tokenizer, DataConfig(overlength="drop"), 16)
    assert ([e.origin for e in dropped.examples], dropped.n_cut, dropped.n_dropped) == (["rows.jsonl:1", "rows.jsonl:3"], 0, 1)
    with pytest.raises(DataError, match=r"rows.jsonl:2: it has \d+ tokens, and max_length is 16"):
        encode(rows, tokenizer, DataConfig(overlength="error"), 16)
    with pytest.raises(DataError, match="All 3 rows of 'rows' are longer than max_length 2"):
        encode(data(*[{"text": "a b c d"}] * 3), tokenizer, DataConfig(overlength="drop"), 2)


def _unigram(end=""):
    """A tokenizer of SentencePiece's unigram kind that makes a space of a new line, as XGLM's and mBART's do."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.Replace(Regex(" {2,}"), " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    words = ["Answer: table of rows", "Year 1 (x)", "a Z 1 ("] * 4
    special = ["<s>", "</s>", "<unk>", "<mask>", "en"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    core.train_from_iterator(words, trainer)
    ends = [(token, core.token_to_id(token)) for token in ("<s>", "</s>", "en")]
    if end:
        core.post_processor = processors.TemplateProcessing(single=end, special_tokens=ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def test_a_texts_own_space_is_kept_where_new_lines_become_spaces():
    coder = TokenCoder(_unigram("<s> $A"))
    assert coder.opens
    for prompt, completion in (("Answer:", " Year 1"), ("Answer:", " (x)"), ("Answer", ": table"), ("Year:", " Z")):
        whole = coder.tokenizer.decode(coder.batch([prompt])[0] + coder.after([prompt], [completion])[0])
        assert whole == prompt + completion


@pytest.mark.parametrize("end", ["$A </s>", "$A </s> en", "<s> $A </s>"])
def test_what_an_encoder_decoder_writes_begins_a_text(end):
    coder = TokenCoder(_unigram(end))
    assert not coder.opens
    assert coder.after(["Year"], ["table of rows"]) == coder.batch(["table of rows"])
