"""Encoder-decoder models, on a small randomly made T5. Oracles: the model's own loss on `labels`, PEFT, its own `generate`."""

import json

import peft
import pytest
import torch
from tiny_folders import write_data, write_t5
from transformers import AutoModelForSeq2SeqLM

import lownibble as ln
from lownibble.data import Example, collate_pairs, encode, split_pair
from lownibble.data import load as load_data
from lownibble.errors import ConfigError, DataError, ModelError
from lownibble.models.head import check_head
from lownibble.study.answers import write_answers
from lownibble.training.loss import label_loss

DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}
TRAIN = {"max_steps": 3, "batch_size": 4, "max_length": 32, "learning_rate": 1e-2}


@pytest.fixture(scope="module", params=[True, False], ids=["scaled", "unscaled"])
def t5(request, tmp_path_factory):
    # what T5 calls tying decides whether its decoder's outputs are scaled before the head
    options = {} if request.param else {"tie_word_embeddings": False}
    return write_t5(tmp_path_factory.mktemp("t5"), **options)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("rows"))


def _batch(tokenizer, rows):
    config = ln.DataConfig(path=str(rows), **DATA)
    examples = encode(load_data(config)[0], tokenizer, config, 32).examples
    return collate_pairs([examples[0], examples[5], examples[9]], tokenizer.pad_token_id, 0, tokenizer.eos_token_id)


def test_a_row_is_split_where_its_labels_begin():
    assert split_pair(Example([5, 6, 7, 1], [False, False, True, True], "r:1")) == ([5, 6], [7, 1])
    for flags in ([True, True, True, True], [False, True, False, True], [False] * 4):
        with pytest.raises(DataError, match="r:1: an encoder-decoder model needs a prompt and one completion"):
            split_pair(Example([5, 6, 7, 1], flags, "r:1"))
    batch = collate_pairs([Example([5, 6, 7, 1], [False, False, True, True], ""), Example([5, 7], [False, True], "")], 0, 9, 1)
    assert batch.source_ids.tolist() == [[5, 6, 1], [5, 1, 0]]
    assert batch.source_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.input_ids.tolist() == [[9, 7, 1], [9, 7, 0]]
    assert batch.labels.tolist() == [[-100, 7, 1], [-100, 7, -100]]
    assert (batch.n_tokens, batch.n_padded_tokens, batch.n_label_tokens) == (10, 12, 3)


def test_the_loss_and_its_gradients_are_the_models_own(t5, rows):
    model, tokenizer = ln.load(str(t5))
    batch = _batch(tokenizer, rows)
    own = model(input_ids=batch.source_ids, attention_mask=batch.source_mask, labels=batch.labels[:, 1:].contiguous()).loss
    ours = label_loss(model, batch.input_ids, batch.attention_mask, batch.labels, source=batch.source)
    assert ours.item() == pytest.approx(own.item(), rel=1e-6)
    found = []
    for loss in (own, ours):
        model.zero_grad()
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
    check_head(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_lora_gives_pefts_logits_and_its_files(t5, rows, tmp_path):
    model, tokenizer = ln.load(str(t5))
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False))
    ln.save_adapter(model, tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["task_type"] == "SEQ_2_SEQ_LM"
    assert not any("lm_head" in name for name in described["target_modules"])
    theirs = peft.PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(t5), tmp_path)
    batch = _batch(tokenizer, rows)
    inputs = {"input_ids": batch.source_ids, "attention_mask": batch.source_mask, "decoder_input_ids": batch.input_ids}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_every_method_trains_and_evaluates(t5, rows, method, tmp_path):
    config = ln.RunConfig(
        model=str(t5), data={"path": str(rows), **DATA}, method=method, quant={"block_size": 32}, lora={"r": 4},
        train={**TRAIN, "output_dir": str(tmp_path / "out")},
    )  # fmt: skip
    result = ln.run(config)
    first, last = result.record["evaluations"][0], result.record["evaluations"][-1]
    assert last["loss"] < first["loss"]
    assert len(last["correct"]) == result.record["data"]["eval_rows"]
    assert result.record["saved"]["equal_after_reading_back"]
    assert "plan" in result.record["memory"]["planned"]
    again = ln.run(config.with_options(train=config.train.with_options(output_dir=str(tmp_path / "again"))))
    assert again.losses == result.losses


def test_likelihoods_of_answers_are_the_decoders(t5, rows):
    """Labels of one token take the shared pass, longer ones a pass each: both are the probability the model gives."""
    model, tokenizer = ln.load(str(t5))
    config = ln.RunConfig(model=str(t5), data={"path": str(rows), **DATA}, method="full", train={**TRAIN, "max_steps": 1})
    scored = ln.run(config).record["evaluations"][0]
    sides = load_data(config.data)
    labels = [" negative", " positive"]
    right = []
    for row in sides[1].rows:
        source = tokenizer(DATA["prompt_template"].format(**row.fields) + " <eos>", return_tensors="pt")
        with torch.no_grad():
            logits = model(**source, decoder_input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0]
        ids = [tokenizer(label)["input_ids"][0] for label in labels]
        right.append(labels[int(logits[ids].argmax())].strip() == row.fields["label"])
    assert scored["correct"] == right


def test_answers_are_what_generate_gives(t5):
    model, tokenizer = ln.load(str(t5))
    prompts = [tokenizer(text)["input_ids"] for text in ("review : the film was good sentiment :", "the plot was bad :")]
    found = write_answers(model, tokenizer, prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, found, strict=True):
        ended = torch.tensor([[*prompt, tokenizer.eos_token_id]])  # as in training
        alone = model.generate(input_ids=ended, max_new_tokens=6, do_sample=False)
        assert answer == tokenizer.decode(alone[0, 1:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"train": {**TRAIN, "packing": True}}, ModelError, "has an encoder"),
        ({"train": {**TRAIN, "memory_budget": "8GB"}}, ConfigError, "memory_budget"),
        ({"train": {**TRAIN, "torch_compile": True}}, ConfigError, "has an encoder"),
        ({"data": {"mask_prompt": False}}, ConfigError, "reads the prompt"),
    ],
)
def test_what_cannot_be_done_is_refused(t5, rows, options, kind, words):
    data = {"path": str(rows), **DATA, **options.get("data", {})}
    config = ln.RunConfig(model=str(t5), data=data, method="lora", train=options.get("train", TRAIN))
    with pytest.raises(kind, match=words):
        ln.run(config)
