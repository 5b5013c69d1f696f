"""Preference rows: what the columns mean, how they are tokenised and padded, what is refused. Oracle: by hand."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_folders import tiny_model  # noqa: F401
from transformers import AutoTokenizer

from lownibble.config import DataConfig, TrainConfig
from lownibble.data import Dataset, Row, check_rows, collate_preferences, encode, encode_preferences, sequences_of
from lownibble.data.files import read_file
from lownibble.data.pairs import Preference, labelled_of, pair_of
from lownibble.errors import ConfigError, DataError

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "film"), ("assistant", "good"), ("assistant", "bad"))
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):  # noqa: F811
    return AutoTokenizer.from_pretrained(tiny_model)


def _encoded(tokenizer, rows, objective="dpo", *, max_length=32, group=2, **data):
    dataset = Dataset("d", [Row(fields, f"d:{n}") for n, fields in enumerate(rows, 1)])
    return encode_preferences(dataset, tokenizer, DataConfig(**data), max_length, objective, group)


def test_what_the_columns_mean():
    text = Preference("the film was", (" good", " bad"))
    assert pair_of({"prompt": "the film was", "chosen": " good", "rejected": " bad"}) == text
    assert pair_of({"chosen": "the film was good", "rejected": "the film was bad"}) == text  # TRL's extract_prompt
    chat = Preference([USER], ([GOOD], [BAD]))
    for fields in (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "film", "chosen": [GOOD], "rejected": [BAD]},
    ):  # fmt: skip
        assert pair_of(fields) == chat
    labelled = Preference("the film was", (" good",), None, True)
    assert labelled_of({"prompt": "the film was", "completion": " good", "label": True}) == [labelled]
    both = labelled_of({"chosen": "the film was good", "rejected": "the film was bad"})
    assert [(each.answers, each.label) for each in both] == [((" good",), True), ((" bad",), False)]
    joined = Row({"prompt": [USER], "completion": [GOOD], "label": False}, "x")
    fields = Dataset("d", [joined]).rows[0].fields
    assert labelled_of(fields) == [Preference([USER], ([GOOD],), None, False)]


def test_a_text_prompt_that_both_answers_repeat_is_taken_off():
    for prompt, answers in [("the film was", (" good", " bad")), ("Q: film?\nA:", ("good", "bad"))]:
        whole = {"prompt": prompt, "chosen": prompt + answers[0], "rejected": prompt + answers[1]}
        assert pair_of(whole) == Preference(prompt, answers)
        assert pair_of({**whole, "rejected": answers[1]}).answers == (prompt + answers[0], answers[1])
    for answers in [("apple", "avocado"), ("a", "a b")]:  # another word, or nothing after it
        assert pair_of({"prompt": "a", "chosen": answers[0], "rejected": answers[1]}).answers == answers


def test_conversations_as_text_are_read(tmp_path):
    """All cells of a CSV file are text. Oracle: the same rows as lists."""
    rows = [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "completion": [GOOD], "label": True},
    ]
    for fields in rows:
        text = {name: json.dumps(value) if isinstance(value, list) else value for name, value in fields.items()}
        assert Dataset("d", [Row(text, "d:1")]).rows == Dataset("d", [Row(fields, "d:1")]).rows
    literal = {"prompt": "List them.", "chosen": '["a"]', "rejected": '[{"role": "admin"}]'}
    assert Dataset("d", [Row(literal, "d:1")]).rows[0].fields == literal


def test_turns_of_a_completion_that_are_not_trained_are_no_prompt():
    fields = {"prompt": [USER], "completion": [GOOD, {**USER, "train": False}, BAD], "label": True}
    (found,) = labelled_of(Dataset("d", [Row(fields, "d:1")]).rows[0].fields)
    assert found.prompt == [USER]
    assert [turn["content"] for turn in found.answers[0]] == ["good", "film", "bad"]


def test_labels_of_a_csv_file_are_words(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\na,b,true\nc,d,False\ne,f,TRUE\n")
    found = check_rows(Dataset("d", read_file(path)), DataConfig(), "kto")
    assert [preference.label for _, preference in found] == [True, False, True]


def _call(arguments):
    return {**GOOD, "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}


def test_nulls_that_parquet_adds_are_not_said(tmp_path):
    """Parquet gives every object the keys of all others. Oracle: the rows before they were written."""
    tools = [{"name": "f", "parameters": {"city": {"type": "string"}}}, {"name": "f", "parameters": {"zip": {"type": "string"}}}]
    rows = [  # each column has keys of its own
        {"prompt": [USER], "chosen": [_call({name: "x"})], "rejected": [_call({"town": "x"})], "tools": tools}
        for name in ("city", "zip")
    ]
    labelled = [{"prompt": "film", "completion": [BAD, *row["chosen"]], "label": True, "tools": tools} for row in rows]
    implicit = [{name: [USER, *row[name]] for name in ("chosen", "rejected")} | {"tools": tools} for row in rows]
    for fields, read in (
        (rows, pair_of),
        (implicit, pair_of),
        (labelled, lambda fields: [fields["completion"], fields["tools"]]),
    ):
        pq.write_table(pa.Table.from_pylist(fields), tmp_path / "rows.parquet")
        found = Dataset("d", read_file(tmp_path / "rows.parquet")).rows
        assert [read(row.fields) for row in found] == [read(before) for before in fields]


BAD_ROWS = [
    ("dpo", {"prompt": "a", "chosen": "b"}, "the field 'rejected' is missing; the row has prompt, chosen"),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are the same"),
    ("orpo", {"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
    ("dpo", {"prompt": "a", "chosen": "b", "rejected": None}, "the field 'rejected' is null"),
    ("dpo", {"prompt": "a", "chosen": 3, "rejected": "b"}, r"'chosen' must be text or a list of messages, and is int \(3\)"),
    ("dpo", {"prompt": "a", "chosen": [GOOD], "rejected": "b"}, "one of 'chosen' and 'rejected' is text"),
    ("dpo", {"chosen": "b", "rejected": "c"}, "do not begin alike"),
    ("dpo", {"chosen": [GOOD], "rejected": [BAD]}, "begin with different messages"),
    ("dpo", {"prompt": "else", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "'prompt' is not what"),
    ("dpo", {"prompt": [GOOD], "chosen": [USER], "rejected": [BAD]}, "'chosen' must begin with an assistant's message"),
    ("dpo", {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [BAD]}, "'chosen': the content of message 1"),
    ("dpo", {"chosen": [USER], "rejected": [USER, BAD]}, "'chosen' has no message of its own"),
    ("kto", {"prompt": "a", "completion": "b", "label": 1}, "the label must be true or false, and is 1"),
    ("kto", {"prompt": "a", "completion": "b", "label": "good"}, "the label must be true or false, and is 'good'"),
    ("kto", {"prompt": "a", "completion": "b"}, "the field 'label' is missing"),
    ("kto", {"prompt": "a", "completion": " ", "label": True}, "'completion' is empty"),
    ("kto", {"prompt": "a", "completion": [GOOD], "label": True}, "one of 'prompt' and 'completion' is text"),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "fields", "message"), BAD_ROWS)
def test_a_bad_row_is_named_with_what_to_do(objective, fields, message):
    dataset = Dataset("d", [Row(fields, "d.jsonl:7")])
    with pytest.raises(DataError, match=f"^d.jsonl:7: .*{message}.*") as raised:
        check_rows(dataset, DataConfig(), objective)
    assert any(word in str(raised.value) for word in ("Give", "Mend", "Fill", "Write", "Make", "remove"))


def test_pairs_become_sequences(tokenizer):
    rows = [{"prompt": "the film was", "chosen": " very good", "rejected": " bad"}]
    (example,) = _encoded(tokenizer, rows).examples
    word = tokenizer.convert_tokens_to_ids
    chosen, rejected = word(["the", "film", "was", "very", "good", "<eos>"]), word(["the", "film", "was", "bad", "<eos>"])
    assert sequences_of(example) == [(chosen, [False] * 3 + [True] * 3), (rejected, [False] * 3 + [True] * 2)]
    assert len(example.input_ids) == 12  # what it takes in a batch
    batch = collate_preferences([example, example], 0, pairs=True)
    assert batch.input_ids.tolist() == [chosen, chosen, [*rejected, 0], [*rejected, 0]]
    assert (batch.n_rows, batch.n_tokens, batch.n_padded_tokens, batch.n_label_tokens) == (2, 22, 24, 10)
    (whole,) = _encoded(tokenizer, rows, "orpo").examples
    assert sequences_of(whole)[0][1] == [False] + [True] * 5
    assert sequences_of(whole)[1] == sequences_of(example)[1]
    dry = collate_preferences([whole._replace(beside=None)], 0, pairs=True)  # as for a dry run: gaps are tokens
    assert dry.n_tokens == 12


@pytest.mark.parametrize("answer", ["good", " good", "\ngood"])
@pytest.mark.parametrize("prompt", ["film:", "film:\n", "film: "])
def test_no_space_comes_between_prompt_and_answers(spacing_tokenizer, prompt, answer):
    """Oracle: the completion of the same prompt, and what the row decodes to."""
    (example,) = _encoded(spacing_tokenizer, [{"prompt": prompt, "chosen": answer, "rejected": "bad"}]).examples
    row = Dataset("d", [Row({"prompt": prompt, "completion": answer}, "d:1")])
    (chosen, _), (rejected, _) = sequences_of(example)
    assert chosen == encode(row, spacing_tokenizer, DataConfig(), 32).examples[0].input_ids
    assert spacing_tokenizer.decode(rejected, skip_special_tokens=True).lstrip() == f"{prompt}bad"


def test_ktos_answers_move_on_within_a_group(tokenizer):
    rows = [
        {"prompt": p, "completion": c, "label": True} for p, c in (("film", " good"), ("plot", " bad"), ("actor", " very fine"))
    ]
    examples = _encoded(tokenizer, rows, "kto").examples
    said = [tokenizer.decode(example.beside.mismatched.input_ids) for example in examples]
    assert said == ["film bad <eos>", "plot good <eos>", "actor very fine <eos>"]
    batch = collate_preferences(examples, 0, pairs=False)
    assert batch.desirable.tolist() == [True] * 3
    assert batch.mismatched.n_label_tokens == 2 + 2 + 3
    assert batch.mismatched.input_ids.shape == (3, 4)


def test_pairs_for_kto_are_taken_apart_as_trl_does(tokenizer):
    """All good answers before all bad ones: an exchanged answer is never one to the same prompt."""
    rows = [{"prompt": p, "chosen": " good", "rejected": " bad"} for p in ("film", "plot", "actor", "story")]
    examples = _encoded(tokenizer, rows, "kto").examples
    assert [example.beside.label for example in examples] == [True] * 4 + [False] * 4
    assert [example.origin for example in examples] == [f"d:{n}" for n in (1, 2, 3, 4)] * 2


def test_a_conversation_is_an_answer_after_the_templates_header(tokenizer):
    rows = [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}]
    chosen, rejected = sequences_of(_encoded(tokenizer, rows).examples[0])
    assert tokenizer.decode(chosen[0]) == "user : film <eos> assistant : good <eos>".replace("user", "<unk>").replace(
        "assistant", "<unk>"
    )
    for ids, flags in (chosen, rejected):
        assert tokenizer.decode([token for token, flag in zip(ids, flags, strict=True) if flag]).split()[-1] == "<eos>"
        assert sum(flags) == 2
    (wrapped,) = _encoded(tokenizer, [{"prompt": "film", "chosen": "good", "rejected": "bad"}], use_chat_template=True).examples
    assert sequences_of(wrapped) == [chosen, rejected]


def test_prompts_are_cut_alike_and_what_is_left_must_differ(tokenizer):
    rows = [{"prompt": "the film was a very very", "chosen": " good", "rejected": " bad film"}]
    found = _encoded(tokenizer, rows, max_length=5)
    assert (found.n_cut, found.n_answers_cut) == (1, 0)
    assert [tokenizer.decode(ids) for ids, _ in sequences_of(found.examples[0])] == [
        "very very good <eos>",
        "very very bad film <eos>",
    ]
    long = [{**rows[0], "chosen": " good" + " film" * 9, "rejected": " bad"}]
    found = _encoded(tokenizer, long, max_length=8)
    assert (found.n_cut, found.n_answers_cut) == (1, 1), "half is kept for the prompt, where TRL keeps all of it"
    assert [tokenizer.decode(ids) for ids, _ in sequences_of(found.examples[0])] == [
        "was a very very good film film film",
        "was a very very bad <eos>",
    ]
    same = [{"prompt": "film", "chosen": " a a a good", "rejected": " a a a bad"}]
    with pytest.raises(DataError, match=r"d:1: the answers are the same within max_length 3\. Raise it"):
        _encoded(tokenizer, same, max_length=3)
    with pytest.raises(DataError, match="All 1 rows of 'd' are longer than max_length 3"):
        _encoded(tokenizer, same, max_length=3, overlength="drop")


def test_options_that_do_not_go_with_preferences_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="'mask_prompt' of DataConfig is not for objective 'dpo'"):
        _encoded(tokenizer, [{"prompt": "a", "chosen": "b", "rejected": "c"}], mask_prompt=False)
    dataset = Dataset("d", [Row({"prompt": "a", "chosen": "b", "rejected": "c"}, "d:1")])
    with pytest.raises(ConfigError, match=r"'d' are preferences .* Train on them with --objective dpo, orpo or kto"):
        encode(dataset, tokenizer, DataConfig(), 32)
    for options, message in [
        ({"beta": 0.2}, "'beta' of TrainConfig is for objective dpo or orpo or kto. Got 'next-token'"),
        ({"objective": "orpo", "loss_type": "ipo"}, "'loss_type' of TrainConfig is for objective dpo or kto. Got 'orpo'"),
        ({"objective": "kto", "loss_type": "ipo"}, "must be one of kto, apo_zero_unpaired. Got 'ipo'"),
        ({"objective": "dpo", "label_smoothing": 0.1}, "goes with loss_type robust or exo_pair"),
        ({"objective": "dpo", "loss_type": "exo_pair"}, "exo_pair needs it"),
        ({"objective": "dpo", "packing": True}, "'packing' of TrainConfig cannot be done with objective 'dpo'"),
        ({"objective": "kto", "parallel": "fsdp"}, "does not run on shards"),
        ({"objective": "dpo", "desirable_weight": 2.0}, "'desirable_weight' of TrainConfig is for objective kto"),
    ]:
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**options)
