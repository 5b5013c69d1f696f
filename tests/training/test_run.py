"""Runs end to end on a tiny model. Oracles: the same run again, the run not interrupted, PEFT, a mean over all tokens by hand."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import choices, encode
from lownibble.data import load as load_data
from lownibble.errors import AdapterError, ConfigError, ModelError, OutputError, TargetError, TrainingError
from lownibble.lora.active import adapter_configs
from lownibble.training import Evaluated, Finished, JsonlSink, Saved, Sink, Started, Stepped, evaluate, run, sinks
from lownibble.training.making import ONLY_WARM_UP
from lownibble.training.microbatches import collator
from lownibble.training.output import claim

DATA_TEMPLATES = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}


def _config(tiny_model, tiny_data, method="lora", lora=None, **options):
    train = {
        "max_steps": 6, "batch_size": 8, "learning_rate": 5e-3, "max_length": 32, "eval_steps": 3, "group_by_length": True
    } | options  # fmt: skip
    return RunConfig(
        model=str(tiny_model), method=method, data=DataConfig(path=str(tiny_data), **DATA_TEMPLATES),
        lora=LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.1} | (lora or {})), quant=QuantConfig(block_size=32),
        train=TrainConfig(**train),
    )  # fmt: skip


class _Keep(Sink):
    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_run_learns_and_leaves_its_files(tiny_model, tiny_data, tmp_path, method):
    sink = _Keep()
    rate = 5e-3 if method == "full" else 5e-2  # adapters take about ten times the rate of full fine-tuning
    config = _config(tiny_model, tiny_data, method, max_steps=30, learning_rate=rate, output_dir=str(tmp_path / "out"))
    result = run(config, sinks=[sink])
    kinds = [type(event) for event in sink.events]
    assert kinds[0] is Started
    assert kinds[-1] is Finished
    assert kinds.count(Stepped) == 30
    assert kinds.count(Evaluated) == 11
    assert kinds.count(Saved) == 1
    # the base is random and frozen under the adapters, so they cannot get as far as full fine-tuning: 0.85 to 0.91 in four seeds,
    # at a rate at which another rounding changes the third digit
    assert result.eval_loss < (0.6 if method == "full" else 0.95) * result.record["evaluations"][0]["loss"]
    if method == "full":
        assert result.record["evaluations"][-1]["scores"]["accuracy"] > 0.7
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record == result.record
    assert RunConfig(**record["config"]).method == method
    artefact = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / artefact).stat().st_size > 0
    assert len((tmp_path / "out" / "events.jsonl").read_text().splitlines()) == len(sink.events)
    assert record["memory"]["codes_bytes"] > 0 if method == "qlora" else record["memory"]["codes_bytes"] == 0


def test_the_same_seed_gives_the_same_bits(tiny_model, tiny_data, tmp_path):
    for name in ("a", "b"):
        run(_config(tiny_model, tiny_data, "qlora", output_dir=str(tmp_path / name)))
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_cut_and_resumed_gives_the_same_bits(tiny_model, tiny_data, tmp_path, method, accumulation):
    class _Stop(Sink):
        def __call__(self, event):
            if isinstance(event, Stepped) and event.step == 5:
                raise KeyboardInterrupt

    options = {"max_steps": 8, "save_steps": 2, "gradient_accumulation_steps": accumulation}
    whole = run(_config(tiny_model, tiny_data, method, output_dir=str(tmp_path / "whole"), **options))
    cut = _config(tiny_model, tiny_data, method, output_dir=str(tmp_path / "cut"), **options)
    with pytest.raises(KeyboardInterrupt):
        run(cut, sinks=[_Stop()])
    resumed = run(cut.with_options(train=cut.train.with_options(resume=True)))
    assert resumed.losses == whole.losses
    assert [e["loss"] for e in resumed.record["evaluations"]] == [e["loss"] for e in whole.record["evaluations"]]
    trained = [dict(r.model.named_parameters()) for r in (whole, resumed)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_dora_resumes_to_the_same_bits_and_trains_on(tiny_model, tiny_data, tmp_path, method, dropout):
    lora, options = {"use_dora": True, "lora_dropout": dropout}, {"save_steps": 2, "gradient_checkpointing": True}
    whole = run(_config(tiny_model, tiny_data, method, lora, output_dir=str(tmp_path / "whole"), **options))
    plain = run(_config(tiny_model, tiny_data, method, lora))
    assert plain.losses == whole.losses, "checkpointing changes nothing"
    folder = tmp_path / "whole" / "checkpoints"
    shutil.rmtree(folder / "step-000006")
    again = _config(tiny_model, tiny_data, method, lora, output_dir=str(tmp_path / "whole"), resume=True, **options)
    resumed = run(again)
    trained = [dict(r.model.named_parameters()) for r in (whole, resumed)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert whole.record["saved"]["equal_after_reading_back"]
    more = RunConfig(
        **{**again.to_dict(), "lora": {}, "adapter": str(whole.adapter_dir), "train": {"max_steps": 1, "max_length": 32}}
    )
    assert run(more).record["evaluations"][0]["loss"] == pytest.approx(whole.eval_loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "paged_adamw", "adamw_8bit"])
def test_loraplus_resumes_to_the_same_bits_and_not_with_another_ratio(tiny_model, tiny_data, tmp_path, optim):
    options = {"loraplus_lr_ratio": 4, "save_steps": 2, "max_steps": 4, "optim": optim, "max_grad_norm": None}
    config = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "out"), **options)
    whole = run(config)
    slow = run(_config(tiny_model, tiny_data, **{**options, "loraplus_lr_ratio": None}))
    assert slow.losses[:2] == whole.losses[:2], "the first step warms up at a rate of 0"
    assert slow.losses[2:] != whole.losses[2:]
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000004")
    resumed = run(config.with_options(train=config.train.with_options(resume=True)))
    trained = [dict(r.model.named_parameters()) for r in (whole, resumed)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    with pytest.raises(OutputError, match=r"train.loraplus_lr_ratio: 4.0 -> 8.0"):
        run(config.with_options(train=config.train.with_options(resume=True, loraplus_lr_ratio=8)))


@pytest.mark.slow
def test_resuming_a_complete_run_keeps_what_was_measured(tiny_model, tiny_data, tmp_path):
    config = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "out"), max_steps=3)
    whole = run(config)
    again = run(config.with_options(train=config.train.with_options(resume=True)))
    assert again.record["memory"] == whole.record["memory"], "no step was taken to measure"
    assert again.losses == whole.losses
    (tmp_path / "out" / "record.json").unlink()
    lost = run(config.with_options(train=config.train.with_options(resume=True)))
    assert lost.record["memory"]["planned"] == {"unknown": "no step was taken in this process"}


def test_resume_refuses_other_options(tiny_model, tiny_data, tmp_path):
    config = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "out"))
    run(config)
    changed = config.with_options(train=config.train.with_options(resume=True, learning_rate=1e-4))
    with pytest.raises(OutputError, match="learning_rate"):
        run(changed)


def test_a_run_of_fewer_steps_than_its_checkpoint_says_so(tiny_model, tiny_data, tmp_path):
    config = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "out"), max_steps=3, lr_scheduler_type="constant")
    run(config)
    for steps, told in ((3, 0), (2, 1)):
        again = run(config.with_options(train=config.train.with_options(resume=True, max_steps=steps)))
        warnings = [w for w in again.record["warnings"] if "is of step 3, and the run has 2 steps: nothing more is trained" in w]
        assert len(warnings) == told


@pytest.mark.slow
def test_resume_refuses_another_mask_and_tells_of_other_tokens(tiny_model, tiny_data, tmp_path, monkeypatch):
    config = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "out"), max_steps=4, lr_scheduler_type="constant")
    run(config)
    resumed = config.with_options(train=config.train.with_options(resume=True, max_steps=6))
    with pytest.raises(OutputError, match=r"rows\.mask_prompt: True -> False"):
        run(resumed.with_options(data=config.data.with_options(mask_prompt=False)))
    monkeypatch.setattr(sys.modules["lownibble.training.making"], "digest_of", lambda sides: "of another template")
    told = run(resumed)
    assert [m for m in told.record["warnings"] if m.startswith("the rows have other tokens or labels than when the run began")]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_trains_on_from_an_adapter(tiny_model, tiny_data, tmp_path, method):
    """It starts where the adapter ended, with the adapter's own configuration, and may be resumed."""
    first = run(_config(tiny_model, tiny_data, method, output_dir=str(tmp_path / "first"), max_steps=8, learning_rate=5e-2))
    config = _config(tiny_model, tiny_data, method, output_dir=str(tmp_path / "second"), max_steps=4, save_steps=2)
    config = config.with_options(lora=LoraConfig(), adapter=str(tmp_path / "first" / "adapter"))
    second = run(config)
    assert second.record["evaluations"][0]["loss"] == pytest.approx(first.eval_loss, rel=1e-5)
    assert adapter_configs(second.model)["default"].r == 4
    again = run(config.with_options(train=config.train.with_options(resume=True)))
    assert again.losses == second.losses
    other = config.with_options(adapter=str(tmp_path / "second" / "adapter"))
    with pytest.raises(OutputError, match="started_from"):
        run(other.with_options(train=config.train.with_options(resume=True)))


def test_an_adapter_to_train_on_from_brings_its_options(tiny_model, tiny_data, tmp_path):
    config = _config(tiny_model, tiny_data)
    with pytest.raises(ConfigError, match=r"has its own configuration\. Leave the lora options out"):
        config.with_options(adapter=str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be trained with method 'full'"):
        config.with_options(lora=LoraConfig(), adapter=str(tmp_path), method="full")
    with pytest.raises(AdapterError, match="holds no adapter"):
        run(config.with_options(lora=LoraConfig(), adapter=str(tmp_path)))


@pytest.mark.parametrize("overlength", ["cut", "drop"])
def test_rows_that_are_too_long_are_told(tiny_model, tiny_data, tmp_path, overlength):
    config = _config(tiny_model, tiny_data, max_steps=1, max_length=11)
    result = run(config.with_options(data=config.data.with_options(overlength=overlength)))
    what = {"cut": "cut", "drop": "dropped"}[overlength]
    told = [message for message in result.record["warnings"] if "longer than max_length 11" in message]
    assert told
    assert all(message.endswith(f"rows are longer than max_length 11 and are {what}") for message in told)


@pytest.mark.parametrize(("steps", "ratio", "told"), [(1, 0.03, True), (2, 1.0, True), (2, 0.03, False), (1, 0.0, False)])
def test_a_run_of_warm_up_alone_is_told(tiny_model, tiny_data, steps, ratio, told):
    found = run(_config(tiny_model, tiny_data, max_steps=steps, warmup_ratio=ratio, eval_steps=None))
    assert (ONLY_WARM_UP in found.record["warnings"]) is told


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_a_run_at_a_constant_rate_can_be_given_more_steps(tiny_model, tiny_data, tmp_path, warmup):
    """Resumed with more steps, it is the longer run: to the bit without a warm-up; with one, the short one's steps differ."""
    options = {"lr_scheduler_type": "constant", "warmup_ratio": warmup}
    short = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "short"), max_steps=4, **options)
    run(short)
    longer = run(short.with_options(train=short.train.with_options(resume=True, max_steps=6)))
    whole = run(_config(tiny_model, tiny_data, output_dir=str(tmp_path / "whole"), max_steps=6, **options))
    assert len(longer.losses) == 6
    assert (longer.losses == whole.losses) == (warmup == 0)


@pytest.mark.parametrize("options", [{"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "constant", "warmup_ratio": 1.0}])
def test_other_runs_cannot_be_given_more_steps(tiny_model, tiny_data, tmp_path, options):
    config = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "out"), max_steps=3, **options)
    run(config)
    with pytest.raises(OutputError, match=r"max_steps: 3 -> 5.*Only a run with lr_scheduler_type='constant' .*after its warm-up"):
        run(config.with_options(train=config.train.with_options(resume=True, max_steps=5)))


def test_an_adapter_file_has_the_same_bytes_each_time(tiny_model, tiny_data, tmp_path):
    result = run(_config(tiny_model, tiny_data, "qlora", output_dir=str(tmp_path / "out")))
    first = (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    for number in range(4):
        saved = ln.save_adapter(result.model, tmp_path / str(number))
        assert (saved / "adapter_model.safetensors").read_bytes() == first


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits(tiny_model, tiny_data, tmp_path, forked):
    options = {"max_steps": 40, "save_steps": 5, "eval_steps": 40}
    whole = run(_config(tiny_model, tiny_data, output_dir=str(tmp_path / "whole"), **options))
    cut = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "cut"), **options)
    code = f"from lownibble.config import RunConfig; from lownibble.training import run; run(RunConfig(**{cut.to_dict()!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    checkpoints = tmp_path / "cut" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run(cut.with_options(train=cut.train.with_options(resume=True)))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_a_folder_with_a_run_is_refused(tiny_model, tiny_data, tmp_path):
    config = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "out"))
    run(config)
    before = (tmp_path / "out" / "record.json").read_bytes()
    with pytest.raises(OutputError, match="holds another run"):
        run(config)
    assert (tmp_path / "out" / "record.json").read_bytes() == before


def test_two_runs_in_one_folder_are_refused(tmp_path, forked):
    with claim(tmp_path / "out", resume=False):
        code = f"from lownibble.training.output import claim; claim({str(tmp_path / 'out')!r}, resume=False).__enter__()"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Another process is using" in second.stderr


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"), claim(tmp_path / "file" / "out", resume=False):
        pass


def test_accumulation_equals_one_large_batch(tiny_model, tiny_data):
    config = {"max_steps": 3, "group_by_length": False, "max_grad_norm": None, "eval_steps": None}
    no_dropout = LoraConfig(r=4, lora_alpha=8)
    one = _config(tiny_model, tiny_data, batch_size=12, **config).with_options(lora=no_dropout)
    four = _config(tiny_model, tiny_data, batch_size=3, gradient_accumulation_steps=4, **config).with_options(lora=no_dropout)
    # the same rows in the same order: batches of 3 are quarters of batches of 12
    assert run(one).losses == pytest.approx(run(four).losses, rel=1e-5)


def test_gradient_checkpointing_changes_memory_and_nothing_else(tiny_model, tiny_data):
    plain, checkpointed = (
        run(_config(tiny_model, tiny_data, "qlora", gradient_checkpointing=flag)) for flag in (False, True)
    )  # fmt: skip
    assert plain.losses == pytest.approx(checkpointed.losses, rel=1e-6)
    saved = [r.record["memory"]["saved_activation_bytes"] for r in (plain, checkpointed)]
    assert saved[1] < 0.5 * saved[0]


def test_a_loss_that_is_not_finite_stops_with_the_step(tiny_model, tiny_data, tmp_path):
    model, tokenizer = ln.load(str(tiny_model))
    ln.add_lora(model, LoraConfig(r=4))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    data = DataConfig(path=str(tiny_data), **DATA_TEMPLATES)
    with pytest.raises(TrainingError, match=r"Steps 1 to 2 were not taken.*'model\.norm\.weight' is not finite"):
        ln.train(model, tokenizer, data, TrainConfig(max_steps=2, max_length=32, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_model_without_anything_to_train_is_refused(tiny_model, tiny_data):
    data = DataConfig(path=str(tiny_data), **DATA_TEMPLATES)
    model, tokenizer = ln.load(str(tiny_model), quant="nf4")
    with pytest.raises(ConfigError, match="add_lora"):
        ln.train(model, tokenizer, data, TrainConfig(max_steps=1))
    model, tokenizer = ln.load(str(tiny_model))
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        ln.train(model, tokenizer, data, TrainConfig(max_steps=1))


def test_inputs_that_cannot_be_used_are_named_before_training(tiny_model, tiny_data, tmp_path):
    good = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "out"))
    with pytest.raises(TargetError, match="q_proj"):
        run(good.with_options(lora=LoraConfig(target_modules=["nothing_here"])))
    with pytest.raises(ModelError, match="There is no model"):
        run(good.with_options(model=str(tmp_path / "absent")))
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_evaluation_is_the_mean_over_label_tokens(tiny_model, tiny_data):
    result = run(_config(tiny_model, tiny_data, max_steps=1))
    model, tokenizer = result.model.eval(), result.tokenizer
    total, count, right = 0.0, 0, 0
    for line in (tiny_data / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"review : {row['text']} sentiment :")["input_ids"]
        answer = [*tokenizer(f" {row['label']}")["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
        candidates = [tokenizer.convert_tokens_to_ids(label) for label in ("negative", "positive")]
        right += ("negative", "positive")[int(logits[0, candidates].argmax())] == row["label"]
    last = result.record["evaluations"][-1]
    assert last["loss"] == pytest.approx(total / count, rel=1e-5)
    assert last["label_tokens"] == count
    assert last["scores"]["accuracy"] == pytest.approx(right / len(last["correct"]))


@pytest.mark.parametrize("shared", [True, False])
def test_longer_candidates_are_scored_by_all_their_tokens(tiny_model, tiny_data, monkeypatch, shared):
    """Prompts computed once for all candidates, or for each of them; oracle: each sequence alone."""
    if not shared:
        monkeypatch.setattr(evaluate, "check_prefixes", lambda *_: "its hidden states are not the same so")
    templates = {"prompt_template": "review : {text} sentiment :", "completion_template": " very {label}"}
    config = _config(tiny_model, tiny_data, max_steps=1)
    result = run(config.with_options(data=DataConfig(path=str(tiny_data), **templates)))
    model, tokenizer = result.model.eval(), result.tokenizer
    right, probabilities, of_answers = [], [], []

    def logps(prompt, answer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        return [logits[i, token].item() for i, token in enumerate(answer)]

    for line in (tiny_data / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"review : {row['text']} sentiment :")["input_ids"]
        answers = {label: tokenizer(f" very {label}")["input_ids"] for label in ("negative", "positive")}
        scores = {label: sum(logps(prompt, answer)) for label, answer in answers.items()}
        right.append(max(scores, key=scores.get) == row["label"])
        probabilities.append(torch.tensor(list(scores.values())).softmax(0)[list(scores).index(row["label"])].item())
        of_answers += logps(prompt, [*answers[row["label"]], tokenizer.eos_token_id])
    last = result.record["evaluations"][-1]
    assert last["correct"] == right
    assert last["scores"]["label_probability"] == pytest.approx(sum(probabilities) / len(probabilities), rel=1e-5)
    assert last["loss"] == pytest.approx(-sum(of_answers) / len(of_answers), rel=1e-5)
    assert last["label_tokens"] == len(of_answers)


def test_a_prompt_is_computed_once_for_all_its_candidates(tiny_model, tiny_data):
    templates = {"prompt_template": "review : {text} sentiment :", "completion_template": " very {label}"}
    data = DataConfig(path=str(tiny_data), **templates)
    model, tokenizer = ln.load(str(tiny_model))
    train_rows, rows = load_data(data)
    asked = choices(train_rows, rows, tokenizer, data, 32)
    examples = encode(rows, tokenizer, data, 32).examples
    found = evaluate.Evaluator(examples, asked, collator(model, tokenizer), 4, model.device)
    found(model)
    computed = []
    model.model.register_forward_pre_hook(lambda _, __, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True)
    found(model)
    assert sum(computed) <= sum(len(example.input_ids) + 2 for example in examples), "a row, and the end of its other answer"
    assert found.facts() == {"candidates": {"share_their_prompt": True, "reason": ""}}


def test_an_evaluation_without_memory_for_all_candidates_takes_them_apart(tiny_model, tiny_data):
    templates = {"prompt_template": "review : {text} sentiment :", "completion_template": " very {label}"}
    data = DataConfig(path=str(tiny_data), **templates)
    model, tokenizer = ln.load(str(tiny_model))
    rows = load_data(data)
    examples = encode(rows[1], tokenizer, data, 32).examples
    found = evaluate.Evaluator(examples, choices(*rows, tokenizer, data, 32), collator(model, tokenizer), 1, model.device)
    before, longest = found(model), max(len(example.input_ids) for example in examples)
    assert found.prefix_reason == ""
    assert found.halve() == longest
    assert found.prefix_reason
    after = found(model)
    assert after.loss == pytest.approx(before.loss, rel=1e-6)
    assert (after.correct, after.label_tokens) == (before.correct, before.label_tokens)
    assert found.halve() == 0
    assert found.facts() == {"candidates": {"share_their_prompt": False, "reason": "it took more memory than there is"}}


def test_training_goes_on_from_a_loaded_adapter(tiny_model, tiny_data, tmp_path):
    first = run(_config(tiny_model, tiny_data, max_steps=20, output_dir=str(tmp_path / "out")))
    model, tokenizer = ln.load(str(tiny_model))
    ln.load_adapter(model, tmp_path / "out" / "adapter", trainable=True)
    data = DataConfig(path=str(tiny_data), **DATA_TEMPLATES)
    again = ln.train(model, tokenizer, data, TrainConfig(max_steps=2, max_length=32, learning_rate=1e-4))
    assert again.record["evaluations"][0]["loss"] == pytest.approx(first.eval_loss, rel=1e-5)


@pytest.mark.parametrize(("limit", "said"), [(24, True), (25, False)])
def test_a_long_first_evaluation_is_announced(limit, said, tiny_model, tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sinks, "MANY_ROWS", limit)
    config = _config(tiny_model, tiny_data, max_steps=2, save_steps=1, output_dir=str(tmp_path / "out"))
    run(config, sinks=[sinks.ProgressSink("lora")])
    lines = capsys.readouterr().err.splitlines()
    announced = [line for line in lines if "evaluating 24 rows first" in line]
    assert len(announced) == said
    if said:
        assert lines.index(announced[0]) < next(i for i, line in enumerate(lines) if "step 0: evaluation loss" in line)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000002")
    run(config.with_options(train=config.train.with_options(resume=True)), sinks=[sinks.ProgressSink("lora")])
    assert "rows first" not in capsys.readouterr().err, "a resumed run goes on with its next step"


def test_the_jsonl_sink_writes_each_event_at_once(tmp_path):
    path = tmp_path / "deep" / "events.jsonl"
    with JsonlSink(path) as sink:
        sink(Saved(3, "x"))
        assert json.loads(path.read_text()) == {"event": "Saved", "step": 3, "path": "x"}
