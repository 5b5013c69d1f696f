"""Multiple choice. Oracle: the right candidate after the prompt is the training example without its end of sequence."""

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
