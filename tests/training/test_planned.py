"""Planned beside measured: the largest pass that is planned is the largest that is taken, and what is planned is what is run."""

import json
from dataclasses import replace

import pytest
import torch

from lownibble.arch import read_shape
from lownibble.config import DataConfig, LoraConfig, PlanConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError, InputError, ModelError
from lownibble.lora import add_lora, set_adapter
from lownibble.memory import planned
from lownibble.models.load import pack, uninitialised
from lownibble.planning import calibration, hardware
from lownibble.planning.memory import plan_memory
from lownibble.planning.plan import plan
from lownibble.planning.step import Batch
from lownibble.rehearsal.calibrate import calibrate
from lownibble.rehearsal.rehearse import rehearse
from lownibble.training import run
from lownibble.training.making import prepare


@pytest.fixture
def config(tiny_model, tiny_data):
    def make(method="lora", **train):
        options = {"max_steps": 6, "batch_size": 8, "max_length": 32} | train
        return RunConfig(
            model=str(tiny_model), method=method, lora=LoraConfig(r=4), quant=QuantConfig(block_size=32, double_quant=False),
            data=DataConfig(
                path=str(tiny_data), prompt_template="review : {text} sentiment :", completion_template=" {label}"
            ),
            train=TrainConfig(**options),
        )  # fmt: skip

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where calibrations are kept; what they measure first takes 16 times as long otherwise."""
    monkeypatch.setattr("lownibble.rehearsal.products.REPEATS", 1)
    monkeypatch.setattr("lownibble.rehearsal.calibrate.COPY_BYTES", 2**20)
    monkeypatch.setenv("LOWNIBBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("max_tokens", [None, 25])
@pytest.mark.parametrize("packing", [False, True])
def test_shapes_are_those_of_the_batches(config, packing, max_tokens):
    micro = prepare(config(packing=packing, batch_size=2, gradient_accumulation_steps=2))[0].micro
    micro.max_tokens = max_tokens
    for _, rows in zip(range(10), micro.steps(), strict=False):
        made = [Batch(*batch.input_ids.shape, batch.n_label_tokens) for batch in micro.batches(rows)]
        assert [micro.shape(batch) for batch in micro.dealt(rows)] == made
        assert [micro.tokens(batch) for batch in micro.dealt(rows)] == [shape.rows * shape.length for shape in made]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("train", [{}, {"packing": True, "optim": "paged_adamw_8bit"}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("skip", ["lm_head", "down_proj"])
def test_the_plan_is_of_the_run_as_configured(config, method, train, skip):
    asked = config(method, **train)
    asked = asked.with_options(quant=asked.quant.with_options(skip_modules=list({"lm_head", skip})))
    trainer, _ = prepare(asked)
    batch, found = planned.plan_of(trainer)
    shape = read_shape(trainer.model.config.to_dict())
    assert found == plan_memory(
        shape, hardware.this_machine(), method, quant=asked.quant, lora=asked.lora, train=asked.train, batch=batch
    )
    sizes = [
        b.input_ids.numel() for _, rows in zip(range(6), trainer.micro.steps(), strict=False) for b in trainer.micro.batches(rows)
    ]
    assert batch.rows * batch.length == max(sizes)


def test_the_adapter_that_is_trained_is_planned(config):
    """Of several."""
    asked, larger = config("lora"), LoraConfig(r=8)
    trainer, _ = prepare(asked)
    add_lora(trainer.model, larger, name="larger")
    set_adapter(trainer.model, "larger")
    shape, found = read_shape(trainer.model.config.to_dict()), planned.plan_of(trainer)
    plans = [
        plan_memory(shape, hardware.this_machine(), "lora", quant=asked.quant, lora=lora, train=asked.train, batch=found[0])
        for lora in (asked.lora, larger)
    ]
    assert plans[0] != found[1] == plans[1]


def test_a_record_has_both_and_the_error(config):
    record = run(config("qlora")).record
    found = record["memory"]["planned"]
    assert found["measured_bytes"] == record["memory"]["baseline_bytes"] + record["memory"]["train_peak_bytes"]
    assert found["error"] == pytest.approx(found["planned_bytes"]["likely"] / found["measured_bytes"] - 1)
    assert found["within"] == (found["planned_bytes"]["low"] <= found["measured_bytes"] <= found["planned_bytes"]["high"])


def test_a_model_that_the_planner_does_not_know_is_trained_all_the_same(config, monkeypatch):
    def unknown(contents):
        raise ModelError("'x' is a 'mamba', which the planner does not know.")

    monkeypatch.setattr(planned, "read_shape", unknown)
    assert run(config()).record["memory"]["planned"] == {"unknown": "'x' is a 'mamba', which the planner does not know."}


def test_a_packed_head_is_not_planned(config, widen):
    asked, untied = config("qlora"), widen(tie_word_embeddings=False)
    trainer, _ = prepare(asked.with_options(quant=asked.quant.with_options(skip_modules=[]), model=str(untied)))
    with pytest.raises(ConfigError, match=r"does not know a quantised head\. Leave 'lm_head' in skip_modules to plan the run"):
        planned.plan_of(trainer)


def test_a_run_larger_than_the_machine_warns_before_its_first_step(config, monkeypatch):
    small = replace(hardware.this_machine(), memory_bytes=2**20)
    monkeypatch.setattr(planned, "device_of", lambda device: small)
    asked = config()
    (warning,) = run(asked).record["warnings"]
    assert "--memory-budget" in warning
    trainer, _ = prepare(asked.with_options(train=asked.train.with_options(memory_budget="2GB")))
    assert planned.RunPlan(trainer).warnings() == []


@pytest.mark.parametrize("option", [pytest.param(True, marks=pytest.mark.slow), False])
def test_on_cuda_the_plan_is_of_layers_as_the_run_compiles_them(config, monkeypatch, option):
    """Also the one that warns, before anything is compiled."""
    monkeypatch.setattr(planned, "device_of", lambda device: hardware.device("h100"))
    made = []
    monkeypatch.setattr(planned.RunPlan, "warnings", lambda self: made.append(planned.plan_of(self._run)[1]) or [])
    found = run(config("qlora", torch_compile=option, max_steps=1)).record["memory"]["planned"]
    assert [plan.compiled for plan in made] == [found["plan"]["compiled"]] == [option]
    assert found["compiled"] is option


@pytest.mark.parametrize("optim", ["adamw", "paged_adamw"])
def test_a_dry_run_takes_the_largest_pass_and_writes_nothing(config, tmp_path, monkeypatch, optim):
    monkeypatch.chdir(tmp_path)
    asked = config("qlora", max_steps=9, batch_size=1, optim=optim, output_dir=str(tmp_path / "out"))
    found = rehearse(asked)
    assert list(tmp_path.iterdir()) == []
    assert found["run"]["longest_row"] == found["memory"]["planned"]["batch"]["length"]
    assert found["run"]["steps"] == 9
    rates, seconds = found["speed"]["tokens_per_s"], found["speed"]["run_s"]
    assert 0 < rates["low"] <= rates["median"] <= rates["high"]
    assert seconds["likely"] == pytest.approx(found["run"]["tokens"] / rates["median"])
    assert found["memory"]["planned"]["measured_bytes"] == found["memory"]["peak_bytes"]


def test_calibration_is_kept_and_used(tiny_model, cache):
    options = {"gpu": "cpu", "tokens": 10**6}
    assert plan(str(tiny_model), max_length=32, **options).rows[0].speed is None  # nothing is known of this CPU
    asked = PlanConfig(model=str(tiny_model), method="lora", train=TrainConfig(batch_size=2, max_length=32), **options)
    found = calibrate(asked)
    kept = json.loads((cache / "calibration.json").read_text())["cpu"]
    assert list(kept["efficiency"]) == ["lora"]
    low, likely, high = kept["efficiency"]["lora"]
    assert 0 < low < likely < high
    calibrate(asked.with_options(method="qlora"))
    assert calibration.calibrated(hardware.device("cpu")).efficiency.keys() == {"lora", "qlora"}
    (row,) = plan(asked).rows
    assert row.speed.step_s.low <= found["measured"]["lora"]["step_s"][1] <= row.speed.step_s.high


SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXTURE = {**SMALL, "model_type": "mixtral", "num_local_experts": 4}
CALIBRATED = {
    "mixture": (MIXTURE, "qlora", {}, {}),
    "text model": ({"model_type": "gemma3", "text_config": {**SMALL, "model_type": "gemma3_text"}}, "lora", {}, {}),
    "no list of kinds": ({**SMALL, "model_type": "qwen2", "layer_types": None, "text_config": None}, "lora", {}, {}),
    "preferences": ({**SMALL, "model_type": "llama"}, "lora", {"objective": "dpo", "beta": 0.2, "loss_type": "ipo"}, {}),
    "a start from rows": ({**SMALL, "model_type": "llama"}, "lora", {}, {"init_lora_weights": "eva"}),
    "a start from weights": ({**SMALL, "model_type": "llama"}, "qlora", {}, {"init_lora_weights": "loftq"}),
    "a budget": ({**SMALL, "model_type": "llama"}, "lora", {"memory_budget": "1MB"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CALIBRATED)
def test_what_can_be_calibrated_for(case, cache, tmp_path):
    """At most four layers are timed."""
    contents, method, train, lora = CALIBRATED[case]
    (tmp_path / "config.json").write_text(json.dumps(contents))
    asked = PlanConfig(
        model=str(tmp_path), gpu="cpu", method=method, lora=LoraConfig(r=2, **lora), quant=QuantConfig(block_size=32),
        train=TrainConfig(batch_size=2, max_length=16, **train),
    )  # fmt: skip
    measured = calibrate(asked)["measured"]
    assert measured.keys() == {method}
    assert measured[method]["layers"] == 4


@pytest.mark.parametrize(("contents", "other"), [
    (MIXTURE, "down_proj"), ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 96}, "c_fc"),
])  # fmt: skip
def test_layers_are_packed_as_they_are_while_loading(contents, other):
    """Experts, and layers whose weights are turned."""
    config = QuantConfig(block_size=32, pattern={other: {"quant_type": "int8"}})
    wanted, found = uninitialised(contents, config, torch.float32), uninitialised(contents, None, torch.float32)
    for parameter in found.parameters():
        torch.nn.init.ones_(parameter)
    pack(found, config)
    kinds = [
        {name: (m.quant_type, m.weight.shape) for name, m in model.named_modules() if hasattr(m, "quant_type")}
        for model in (found, wanted)
    ]
    assert kinds[0] == kinds[1]
    assert {kind for kind, _ in kinds[0].values()} == {"nf4", "int8"}


def test_calibration_in_bad_cases(tiny_model, cache):
    asked = PlanConfig(model=str(tiny_model), train=TrainConfig(batch_size=2, max_length=32))
    with pytest.raises(ConfigError, match="--gpu cpu"):
        calibrate(asked.with_options(gpu="rtx-4090"))
    with pytest.raises(ConfigError, match="one layer"):
        calibrate(asked.with_options(train=TrainConfig(batch_size=10**6, max_length=32)))
    cache.mkdir()
    for broken in ("", "{", "[]", '{"cpu": {}}', '{"cpu": 3}'):
        (cache / "calibration.json").write_text(broken)
        with pytest.raises(InputError, match=r"calibration\.json"):
            plan(asked.with_options(gpu="cpu"))
