"""Multiple choice. Oracle: the right candidate after the prompt is the training example without its end of sequence."""

import copy

import pytest

from lownibble.config import DataConfig
from lownibble.data import Dataset, Row, choices, encode


def data(*fields) -> Dataset:
    return Dataset("rows", [Row(dict(f), f"rows.jsonl:{n}") for n, f in enumerate(fields, 1)])


TRAIN = data(*[{"text": f"film {n}", "label": ("bad", "very good")[n % 2]} for n in range(8)])
EVAL = data({"text": "a very long film about a film", "label": "very good"}, {"text": "x", "label": "bad"})


@pytest.mark.parametrize("options", [{}, {"use_chat_template": True}, {"completion_template": "{label}"}])
def test_right_candidate_is_the_training_completion(any_tokenizer, options):
    config = DataConfig(**options)
    questions = choices(TRAIN, EVAL, any_tokenizer, config, 512)
    examples = encode(EVAL, any_tokenizer, config, 512).examples
    assert [q.answer for q in questions] == [1, 0]
    for question, example in zip(questions, examples, strict=True):
        scored = question.prompt_ids + question.candidates[question.answer]
        last = max(n for n, flag in enumerate(example.is_label) if flag)
        assert scored == example.input_ids[:last]
        assert question.origin == example.origin
        assert len(question.candidates) == 2


HEADED = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES = {
    "the generation prompt opens a reasoning": HEADED + "{% if add_generation_prompt %}assistant:\n<think>\n{% endif %}",
    "the end of sequence is printed after the loop": "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% else %}<|im_end|>{% endif %}",
    "the answer begins with a special token": HEADED.replace("{{ m.content }}", "{{ m.role == 'user' and m.content or "
    "'<|endoftext|>' + m.content }}") + "{% if add_generation_prompt %}assistant:\n{% endif %}",
    "marks that hold what follows the end": HEADED.replace("{{ m.content }}<|im_end|>\n", "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"),
}  # fmt: skip


@pytest.mark.parametrize("max_length", [512, 24])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_question_is_its_row_whatever_the_template_prints(tokenizer, template, max_length):
    """Oracle: the row's own labels, up to the token that ends the turn."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATES[template]
    config, ids = DataConfig(use_chat_template=True), own.convert_tokens_to_ids
    train, evaluation = (
        data(*[{**row.fields, "label": {"bad": "0", "very good": "1"}[row.fields["label"]]} for row in side.rows])
        for side in (TRAIN, EVAL)
    )
    questions = choices(train, evaluation, own, config, max_length)
    for question, example in zip(questions, encode(evaluation, own, config, max_length).examples, strict=True):
        first = example.is_label.index(True)
        assert question.prompt_ids == example.input_ids[:first]
        end = example.input_ids.index(ids("<|im_end|>"), first)
        answer = own.decode(example.input_ids[first:end]).rstrip()
        assert [own.decode(candidate).rstrip() for candidate in question.candidates] == [answer[:-1] + label for label in "01"]
        assert answer == own.decode(question.candidates[question.answer]).rstrip()
        assert ids("<|im_end|>") not in [token for candidate in question.candidates for token in candidate]


def test_a_label_may_be_a_special_token(any_tokenizer):
    rows = data(*[{"text": f"film {n}", "label": ("<|endoftext|>", "bad")[n % 2]} for n in range(8)])
    for options in ({"use_chat_template": True}, {"completion_template": "{label}"}):
        found = choices(rows, rows, any_tokenizer, DataConfig(**options), 512)
        special, front, behind = any_tokenizer(["<|endoftext|>", "0", "0bad"], add_special_tokens=False)["input_ids"]
        assert found[0].candidates == [special, behind[len(front) :]]


def test_long_prompt_leaves_room_for_the_longest_candidate(any_tokenizer):
    questions = choices(TRAIN, EVAL, any_tokenizer, DataConfig(), 16)
    longest = max(len(ids) for ids in questions[0].candidates)
    assert len(questions[0].prompt_ids) == 16 - longest - 1
    assert len(questions[1].prompt_ids) < 16


def test_a_label_seen_in_evaluation_only_is_a_candidate(tokenizer):
    questions = choices(TRAIN, data({"text": "a", "label": "absent"}), tokenizer, DataConfig(), 64)
    assert len(questions[0].candidates) == 3
    assert questions[0].answer == 0


def test_what_is_no_label_data(tokenizer):
    pairs = data(*[{"prompt": "a", "completion": str(n % 2)} for n in range(8)])
    assert choices(pairs, pairs, tokenizer, DataConfig(), 64) is None
    assert len(choices(pairs, pairs, tokenizer, DataConfig(completion_template="{completion}"), 64)) == 8
    values = [data(*[{"text": "a", "label": n} for n in range(start, start + 30)]) for start in (0, 30)]
    assert choices(*values, tokenizer, DataConfig(), 64) is None
    many = data(*[{"question": "a", "answer": n % 21} for n in range(100)])
    config = DataConfig(prompt_template="{question}", completion_template="{answer}")
    assert choices(many, many, tokenizer, config, 64) is None
    one_label = data(*[{"text": "a", "label": "x"}] * 4)
    assert choices(one_label, one_label, tokenizer, DataConfig(), 64) is None
    text = data({"text": "a"})
    assert choices(text, text, tokenizer, DataConfig(), 64) is None
