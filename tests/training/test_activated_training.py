"""Training of activated adapters. Oracles: PEFT; the same run in padded batches, packed, in parts, compiled, cut."""

import json
import shutil

import pytest
import torch

import lownibble as ln
from lownibble.config import DataConfig, EvalConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import collate
from lownibble.errors import ConfigError, DataError, OutputError
from lownibble.lora.activated import activated
from lownibble.models.load import load_tokenizer
from lownibble.models.sources import resolve
from lownibble.planning import tiles as lengths
from lownibble.study.evaluate import evaluate
from lownibble.training import run
from lownibble.training.loss import label_loss
from lownibble.training.making import prepare

DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}
TEXT = "sentiment :"


def config_of(model, data, lora=None, method="lora", **options):
    train = {"max_steps": 5, "batch_size": 4, "learning_rate": 1e-2, "max_length": 32} | options
    return RunConfig(
        model=str(model), method=method, data=DataConfig(path=str(data), **DATA),
        quant=QuantConfig(block_size=32, compute="exact"),
        lora=LoraConfig(**{"r": 4, "lora_alpha": 8, "alora_invocation_tokens": TEXT} | (lora or {})), train=TrainConfig(**train),
    )  # fmt: skip


def values(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters() if p.requires_grad])


def test_a_text_becomes_the_models_tokens_and_the_run_says_where(tiny_model, tiny_data, tmp_path):
    tokens = load_tokenizer(resolve(str(tiny_model)))(TEXT, add_special_tokens=False).input_ids
    result = run(config_of(tiny_model, tiny_data, output_dir=str(tmp_path / "out")))
    assert activated(result.model).tokens == tuple(tokens)
    assert result.record["config"]["lora"]["alora_invocation_tokens"] == tokens
    assert json.loads((result.adapter_dir / "adapter_config.json").read_text())["alora_invocation_tokens"] == tokens
    assert result.record["saved"]["equal_after_reading_back"]
    assert result.losses[-1] < result.losses[0]


def test_the_first_losses_and_gradients_are_pefts(tiny_model, tiny_data, tmp_path, peft):
    """The run's own batch, on PEFT's model with our adapter."""
    trainer, _ = prepare(config_of(tiny_model, tiny_data, {"init_lora_weights": False}))
    model = trainer.model
    ln.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(ln.load(str(tiny_model))[0], tmp_path, is_trainable=True)
    batch = collate(trainer.micro.rows[:4], 0)
    ours_loss = label_loss(model.train(), batch.input_ids, batch.attention_mask, batch.labels)
    logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    their_loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    torch.testing.assert_close(ours_loss, their_loss, rtol=1e-5, atol=1e-6)
    ours_loss.backward()
    their_loss.backward()
    grads = {key.replace("base_model.model.", "").replace(".default.weight", ""): p.grad for key, p in theirs.named_parameters()}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = grads[key.replace(".adapters.default", "")]
            assert float((parameter.grad - expected).norm() / expected.norm()) < 1e-4


CASES = {
    "checkpointing": {"gradient_checkpointing": True},
    "two microbatches": {"batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing, in tiles": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True},
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "compiled")) for c in CASES])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_other_ways_of_the_step_are_the_plain_one_but_for_rounding(case, method, widen, tiny_data, monkeypatch):
    model, base = widen(), {"packing": False}
    plain = run(config_of(model, tiny_data, {"init_lora_weights": False}, method, **base))
    if "tiles" in case:
        monkeypatch.setattr(lengths, "TILE_TOKENS", 5)
        monkeypatch.setattr(lengths, "LONG_TOKENS", 10)
    other = run(config_of(model, tiny_data, {"init_lora_weights": False}, method, **base, **CASES[case]))
    assert plain.losses == pytest.approx(other.losses, rel=1e-4)
    assert float((values(plain) - values(other)).norm() / values(plain).norm()) < 1e-3
    assert ("mlp" in (other.record["speed"]["tiled"] or ())) == ("tiles" in case)
    assert other.record["speed"]["compiled"] == (case == "compiled")


def test_packed_rows_train_what_padded_ones_do(tiny_model, tiny_data):
    """One pack of the batch's rows: the same step."""
    found = []
    for packing in (False, True):
        trainer, _ = prepare(
            config_of(tiny_model, tiny_data, {"init_lora_weights": False}, packing=packing, max_length=256, batch_size=1)
        )
        rows = trainer.micro.rows[:6]
        trainer.passes.check()
        batch = trainer.micro.batch(rows) if packing else collate(rows, 0)
        trainer.passes.backward(batch, batch.n_label_tokens)
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert float(found[0].norm()) > 0
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-4


def test_dropout_and_a_cut_run_give_the_same_bits(tiny_model, tiny_data, tmp_path):
    options = {"save_steps": 2, "max_steps": 4, "output_dir": str(tmp_path / "out")}
    config = config_of(tiny_model, tiny_data, {"lora_dropout": 0.2}, "qlora", **options)
    whole = run(config)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000004")
    resumed = run(config.with_options(train=config.train.with_options(resume=True)))
    assert torch.equal(values(whole), values(resumed))
    other = config.with_options(lora=config.lora.with_options(alora_invocation_tokens=[5]))
    with pytest.raises(OutputError, match="alora_invocation_tokens"):
        run(other.with_options(train=config.train.with_options(resume=True)))


def test_training_goes_on_from_an_activated_adapter(tiny_model, tiny_data, tmp_path):
    first = run(config_of(tiny_model, tiny_data, output_dir=str(tmp_path / "first")))
    config = config_of(tiny_model, tiny_data, max_steps=1)
    again = run(RunConfig(**{**config.to_dict(), "lora": {}, "adapter": str(first.adapter_dir)}))
    assert activated(again.model).tokens == activated(first.model).tokens
    assert again.losses[0] < first.losses[0]


def test_preferences(tiny_model, tmp_path):
    words = ("film", "plot", "actor", "scene")
    rows = [{"prompt": f"review : {word} sentiment :", "chosen": " positive", "rejected": " negative"} for word in words * 2]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tiny_model, tmp_path / "pairs.jsonl", objective="dpo", max_steps=4)
    config = config.with_options(data=DataConfig(path=str(tmp_path / "pairs.jsonl")))
    result = run(config)
    assert result.losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert result.losses[-1] < 0.69
    assert "activated" in str(result.record["shared_prefixes"])


def test_candidates_of_several_tokens_each_have_their_prompt(tiny_model, tiny_data):
    config = config_of(tiny_model, tiny_data, max_steps=1)
    config = config.with_options(data=config.data.with_options(completion_template=" very {label}"))
    assert "activated" in run(config).record["candidates"]["reason"]
    assert "candidates" not in run(config_of(tiny_model, tiny_data, max_steps=1)).record, "of one token each"


def test_rows_without_the_invocation(tiny_model, tiny_data):
    with pytest.raises(DataError, match="No training row has the tokens"):
        run(config_of(tiny_model, tiny_data, {"alora_invocation_tokens": "awful awful"}))
    result = run(config_of(tiny_model, tiny_data, {"alora_invocation_tokens": "very"}))
    assert any("training rows do not have the tokens that activate the adapter" in line for line in result.record["warnings"])


def test_an_invocation_that_padding_could_end_is_refused(tiny_model, tiny_data):
    with pytest.raises(ConfigError, match="the token that rows are padded with"):
        run(config_of(tiny_model, tiny_data, {"alora_invocation_tokens": [5, 0]}))


def test_an_evaluation_says_which_rows_are_the_bases(tiny_model, tiny_data, tmp_path):
    result = run(config_of(tiny_model, tiny_data, {"alora_invocation_tokens": "very"}, output_dir=str(tmp_path / "out")))
    assert any("evaluation rows do not have the tokens" in line for line in result.record["warnings"])
    data = {"path": str(tiny_data), **DATA}
    options = {"model": str(tiny_model), "task": "classification", "data": data, "train": {"batch_size": 4, "max_length": 32}}
    found = evaluate(EvalConfig(**options, adapter=str(result.adapter_dir)))
    assert "their scores are the base's" in found["warnings"][0]
    assert "warnings" not in evaluate(EvalConfig(**options))


def test_what_it_cannot_be_trained_with(tiny_model, tiny_data):
    config = config_of(tiny_model, tiny_data, method="qlora")
    with pytest.raises(Exception, match="plain LoRA"):
        run(config.with_options(merge_aware=True))
    with pytest.raises(ConfigError, match="no token"):
        run(config_of(tiny_model, tiny_data, {"alora_invocation_tokens": "   "}))


def test_auto_starts_at_the_base(tiny_model, tiny_data):
    result = run(config_of(tiny_model, tiny_data, {"init_lora_weights": "auto"}, "qlora", max_steps=1))
    assert result.record["config"]["lora"]["init_lora_weights"] is True


def test_a_plan_takes_a_text_for_the_tokens(tiny_model):
    """Only shapes matter; of a step an activated adapter keeps a byte a token more."""
    plain, activated_plan = (
        ln.plan(str(tiny_model), exact=True, method="lora", max_length=32, lora=lora).to_dict()["rows"]
        for lora in ({"r": 4}, {"r": 4, "alora_invocation_tokens": TEXT})
    )
    for one, two in zip(plain, activated_plan, strict=True):
        assert two["memory"]["allocated_bytes"] == pytest.approx(one["memory"]["allocated_bytes"], rel=0.01)
