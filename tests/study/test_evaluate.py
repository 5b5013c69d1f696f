"""`lownibble eval`. Oracles: the scores of a training run on the same rows, lm-eval's own likelihoods by hand."""

import json

import pytest
import torch

import lownibble as ln
from lownibble.config import EvalConfig
from lownibble.decoding import CpuDecoder
from lownibble.decoding.modules import ModulesDecoder
from lownibble.errors import ConfigError, DataError, ModelError
from lownibble.study.answers import write_answers
from lownibble.study.evaluate import _figures, evaluate

TEMPLATES = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_scores_of_a_run_are_found_again_in_its_adapter(tiny_model, tiny_data, tmp_path, method):
    data = {"path": str(tiny_data), **TEMPLATES}
    train = {"max_steps": 3, "batch_size": 4, "max_length": 32, "learning_rate": 1e-2, "output_dir": str(tmp_path / "out")}
    run = ln.run(ln.RunConfig(model=str(tiny_model), data=data, method=method, quant={"block_size": 32}, train=train))
    last = run.record["evaluations"][-1]
    found = evaluate(EvalConfig(
        model=str(tiny_model), adapter=str(tmp_path / "out" / "adapter"), task="classification", data=data,
        quantized=method == "qlora", quant={"block_size": 32} if method == "qlora" else {},
        train={"batch_size": 4, "max_length": 32},
    ))  # fmt: skip
    scores = found["scores"]["classification"]
    assert scores["loss"]["value"] == pytest.approx(last["loss"], rel=1e-6)
    assert scores["accuracy"]["value"] == last["scores"]["accuracy"]
    assert found["row_scores"]["accuracy"] == [float(right) for right in last["correct"]]
    n, p = len(last["correct"]), last["scores"]["accuracy"]
    assert scores["accuracy"]["standard_error"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_all_rows_of_a_file_are_scored_that_are_not_too_long(tiny_model, tiny_data, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_data))
    config = EvalConfig(model=str(tiny_model), task="classification", data="~/test.jsonl", train={"max_length": 32})
    rows = [json.loads(line) for line in (tiny_data / "test.jsonl").read_text().splitlines()]
    whole = evaluate(config)
    assert whole["data"]["rows"] == len(rows)
    lengths = sorted(len(row["text"].split()) for row in rows)
    assert lengths[0] < lengths[-1]
    short = config.with_options(data=config.data.with_options(overlength="drop"), train=config.train.with_options(max_length=8))
    found = evaluate(short)
    assert 0 < len(found["row_scores"]["accuracy"]) < len(rows)


def test_a_program_is_completed_and_run(tiny_model, tmp_path, monkeypatch):
    """HumanEval's format, answers given: the right body passes, another does not."""
    from lownibble.study import answers

    row = {
        "prompt": "def double(x):\n", "canonical_solution": "    return 2 * x\n", "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    }  # fmt: skip
    for side in ("train", "test"):
        (tmp_path / f"{side}.jsonl").write_text("\n".join(json.dumps({**row, "task_id": i}) for i in range(2)))
    monkeypatch.setattr(answers, "write_answers", lambda *_, **__: ["    return 2 * x", "    return x"])
    found = evaluate(EvalConfig(model=str(tiny_model), task="code-completion", data=str(tmp_path)))
    assert found["row_scores"] == {"pass@1": [1.0, 0.0]}


TASK = """
task: small_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: ROWS
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["negative", "positive"]
doc_to_target: "{{['negative', 'positive'].index(label)}}"
metric_list:
  - metric: acc
"""


def test_figures_of_the_harness_that_are_not_finite():
    """A record of them can be written as JSON."""
    found = {"results": {"wiki": {"word_perplexity,none": float("inf"), "acc,none": 0.5, "acc_stderr,none": float("nan")}}}
    scores = _figures("wiki", found)
    assert [scores[name]["value"] for name in ("word_perplexity", "acc")] == [None, 0.5]
    assert json.loads(json.dumps(scores, allow_nan=False))["acc"]["standard_error"] is None


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # lm-eval's and its dependencies'
def test_the_harness_runs_on_our_layers(tiny_model, tiny_data, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "small.yaml").write_text(TASK.replace("ROWS", str(tiny_data / "test.jsonl")))
    found = evaluate(EvalConfig(
        model=str(tiny_model), harness=["small_choice"], harness_path=str(tmp_path), quantized=True, quant={"block_size": 32}
    ))  # fmt: skip
    model, tokenizer = ln.load(str(tiny_model), quant=ln.QuantConfig(block_size=32))
    right = 0
    rows = [json.loads(line) for line in (tiny_data / "test.jsonl").read_text().splitlines()]
    for row in rows:
        scores = []
        for label in ("negative", "positive"):
            ids = tokenizer(f"{row['text']} {label}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(float(model(ids).logits[0, -2].log_softmax(0)[ids[0, -1]]))
        right += ("negative", "positive")[scores.index(max(scores))] == row["label"]
    score = found["scores"]["small_choice"]["acc"]
    assert score["value"] == pytest.approx(right / len(rows))
    assert score["rows"] == len(rows)
    with pytest.raises(ConfigError, match=r"Did you mean .*hellaswag"):
        evaluate(EvalConfig(model=str(tiny_model), harness=["helaswag"]))


@pytest.mark.parametrize(("quant", "decoder"), [("nf4", CpuDecoder), (None, ModulesDecoder)])
def test_answers_are_those_of_each_prompt_alone(write, monkeypatch, quant, decoder):
    """Oracle: transformers' own loop. One row ends before the others, and takes no part in what follows."""
    model, tokenizer = ln.load(str(write()), quant=quant, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in ("w1 w5 w9", "w7", "w3 w3 w8 w2 w11")]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    stop, rows, step = expected[0].split()[1], [], decoder.step
    monkeypatch.setattr(decoder, "step", lambda self, tokens, *a, **k: rows.append(len(tokens)) or step(self, tokens, *a, **k))
    found = write_answers(model, tokenizer, prompts, max_new_tokens=8, stop=[stop])
    assert found == [text[: text.index(stop)] if stop in text else text for text in expected]
    assert 3 in rows
    assert rows[-1] < 3


def test_answers_end_with_the_turn_of_the_chat_template(write):
    """Another token than any configuration names."""
    model, tokenizer = ln.load(str(write()), quant="nf4")
    prompt = tokenizer("w1 w5 w9")["input_ids"]
    whole = write_answers(model, tokenizer, [prompt], max_new_tokens=8)[0].split()
    word = next(word for word in whole[1:] if word != whole[0])
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} " + word + "{% endfor %}"
    found = write_answers(model, tokenizer, [prompt], max_new_tokens=8)[0].split()
    assert found == whole[: whole.index(word)]


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({}, ConfigError, "either --task"),
        ({"task": "nli", "harness": ["hellaswag"]}, ConfigError, "either --task"),
        ({"task": "clasification"}, ConfigError, "Did you mean 'classification'"),
        ({"task": "nli"}, DataError, "lacks premise, hypothesis"),
        ({"task": "classification", "limit": 5}, ConfigError, "'limit' of EvalConfig makes no difference with --task"),
        ({"task": "classification", "quant": {"block_size": 32}}, ConfigError, "without --quantized"),
        ({"harness": ["hellaswag"]}, ConfigError, "'data' of EvalConfig makes no difference with --harness"),
        ({"task": "classification", "model": "/nowhere"}, ModelError, "There is no model"),
    ],
)
def test_what_cannot_be_scored_is_refused(tiny_model, tiny_data, options, kind, words):
    with pytest.raises(kind, match=words):
        evaluate(EvalConfig(**{"model": str(tiny_model), "data": str(tiny_data), **options}))


def test_rows_without_a_position_are_refused(write, tmp_path):
    folder = write("gpt2", n_positions=16, max_position_embeddings=16)
    (tmp_path / "rows.jsonl").write_text('{"text": "' + "w1 " * 17 + '"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: a row of \d+ tokens, and GPT2LMHeadModel has 16 positions"):
        evaluate(EvalConfig(model=str(folder), task="language-modelling", data=str(tmp_path / "rows.jsonl")))
