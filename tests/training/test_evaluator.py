"""Evaluation of classification rows. Oracle: each row alone, by hand, up to its first label token."""

import json

import pytest
import torch

import lownibble as ln
from lownibble.config import DataConfig
from lownibble.data import choices, encode, load
from lownibble.training.evaluate import Evaluator
from lownibble.training.microbatches import collator

TURNS = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos> {% endfor %}"
TEMPLATES = {
    "reasoning": TURNS + "{% if add_generation_prompt %}assistant : <think>{% endif %}",
    "a long reasoning": TURNS + "{% if add_generation_prompt %}assistant : <think> good bad fine awful film plot{% endif %}",
    "text after the end": TURNS.replace("<eos> ", "<eos> . ") + "{% if add_generation_prompt %}assistant : {% endif %}",
    "the end after all turns": TURNS.replace("<eos> ", "")
    + "{% if add_generation_prompt %}assistant : {% else %}<eos>{% endif %}",
    "no generation prompt": TURNS,
}


def _random(folder):
    model, tokenizer = ln.load(str(folder), device="cpu")
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        weight.data.normal_(0, 0.6, generator=generator)
    return model.eval(), tokenizer


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("max_length", [64, 8])
@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_of_one_token_are_read_where_the_row_has_them(tiny_model, tiny_data, template, max_length, mask_prompt):
    model, tokenizer = _random(tiny_model)
    tokenizer.chat_template = TEMPLATES[template]
    data = DataConfig(path=str(tiny_data), use_chat_template=True)
    sides = load(data)
    asked = choices(*sides, tokenizer, data, max_length)
    rows = encode(sides[1], tokenizer, data.with_options(mask_prompt=mask_prompt), max_length).examples
    found = Evaluator(rows, asked, collator(model, tokenizer), 4, model.device)(model)
    correct, probabilities = [], []
    labels = tokenizer.convert_tokens_to_ids(["negative", "positive"])
    for example, row in zip(encode(sides[1], tokenizer, data, max_length).examples, sides[1].rows, strict=True):
        with torch.no_grad():
            prompt = example.input_ids[: example.is_label.index(True)]
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1, labels]
        answer = ["negative", "positive"].index(row.fields["label"])
        correct.append(int(logits.argmax()) == answer)
        probabilities.append(logits.softmax(0)[answer].item())
    assert found.correct == correct
    assert found.scores["label_probability"] == pytest.approx(sum(probabilities) / len(probabilities), rel=1e-5)


def test_questions_of_rows_that_were_dropped_are_left_out(tiny_model, tmp_path):
    rows = [{"text": "the film was good " * (1 + n % 3), "label": ("negative", "positive")[n % 2]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = _random(tiny_model)
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), eval_path=str(tmp_path / "rows.jsonl"), overlength="drop")
    sides = load(data)
    examples = encode(sides[1], tokenizer, data, 12).examples
    assert len(examples) == 8, "of 12"
    found = Evaluator(examples, choices(*sides, tokenizer, data, 12), collator(model, tokenizer), 4, model.device)(model)
    whole = encode(sides[1], tokenizer, data, 64).examples
    everything = Evaluator(whole, choices(*sides, tokenizer, data, 64), collator(model, tokenizer), 4, model.device)(model)
    kept = {example.origin for example in examples}
    assert found.correct == [right for right, row in zip(everything.correct, sides[1].rows, strict=True) if row.origin in kept]
