"""Plans of models whose family the planner does not know, by tracing. Oracle: the same plan of a family that it does know."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from architectures import config_of, quiet
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lownibble as ln
from lownibble.arch import read_shape
from lownibble.cli.main import main
from lownibble.errors import ConfigError, ModelError, TargetError
from lownibble.models.head import check_head, check_head_unseen
from lownibble.rehearsal import plan as any_model

SMALL = {"gpu": "rtx-4090", "max_length": 32, "batch_size": 2, "r": 4, "torch_compile": False}


@pytest.fixture
def folder(tmp_path):
    def _folder(model_type):
        with quiet():
            config_of(model_type, 96).save_pretrained(tmp_path)
        return tmp_path

    return _folder


@pytest.mark.parametrize(("model_type", "options"), [
    ("qwen3", {}), ("llama", {"gradient_checkpointing": True}), ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"use_dora": True}),
], ids=str)  # fmt: skip
def test_a_traced_plan_is_that_of_the_family(folder, monkeypatch, model_type, options):
    known = any_model.plan(str(folder(model_type)), exact=True, **SMALL, **options)
    monkeypatch.setattr(any_model, "is_known", lambda _: False)
    traced = ln.plan(str(folder(model_type)), **SMALL, **options)
    assert traced.shape.parameters == known.shape.parameters
    assert traced.to_dict()["traced"] is True
    assert [row.verdict.method for row in traced.rows] == ["full", "lora", "qlora"] == [row.verdict.method for row in known.rows]
    for ours, theirs in zip(traced.rows, known.rows, strict=True):
        assert ours.verdict.memory.to_dict() == theirs.verdict.memory.to_dict()
        assert ours.speed.flops == theirs.speed.flops
        assert ours.verdict.words == theirs.verdict.words


@pytest.mark.parametrize("known", [True, False])
def test_a_calibration_pass_that_is_not_traced_is_refused_before_a_step_is(folder, monkeypatch, known):
    model, told = str(folder("llama")), []
    if not known:
        monkeypatch.setattr(any_model, "is_known", lambda _: False)
    with pytest.raises(
        ConfigError, match=r"knows the calibration pass of init_lora_weights='qera' .* Leave init_lora_weights out"
    ):
        any_model.plan(model, exact=True, tell=told.append, **SMALL, init_lora_weights="qera")
    assert not told
    rows = any_model.plan(model, exact=True, **SMALL, method="lora", init_lora_weights="qera").rows  # corrects a packed base only
    assert [row.verdict.method for row in rows] == ["lora"]


def test_experts_count_by_their_share_in_a_tokens_way(folder, monkeypatch):
    known = ln.plan(str(folder("qwen3_moe")), method="lora", **SMALL)
    monkeypatch.setattr(any_model, "is_known", lambda _: False)
    traced = ln.plan(str(folder("qwen3_moe")), method="lora", **SMALL)
    assert traced.shape.active_expert_parameters == known.shape.active_expert_parameters
    assert traced.rows[0].speed.flops == known.rows[0].speed.flops


@pytest.mark.parametrize("options", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}], ids=str)
def test_a_mixture_with_layers_of_another_kind_is_traced(folder, options):
    path = folder("qwen3_moe")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **options}))
    plan = ln.plan(str(path), method="lora", **SMALL)
    assert plan.to_dict()["traced"] is True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert plan.shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(ModelError, match=f"layers without experts .{next(iter(options))}"):
        read_shape(path)


@pytest.mark.parametrize("model_type", ["gpt_neox", "falcon", "gpt_oss", "mamba2", "deepseek_v3", "gpt2"])
def test_models_of_other_families_are_planned(folder, model_type):
    """mamba2: its configuration has an infinity, which config.json cannot; falcon: linears with a forward of their own; gpt2:
    weights held turned."""
    rows = ln.plan(str(folder(model_type)), **SMALL).rows
    assert {"lora", "qlora"} <= {row.verdict.method for row in rows}
    memory = {row.verdict.method: row.verdict.memory for row in rows}
    assert 0 < memory["qlora"].kinds["codes"] < memory["lora"].kinds["weights"]
    assert memory["lora"].trained_parameters == memory["qlora"].trained_parameters > 0


@pytest.mark.filterwarnings("ignore:8 weights of:UserWarning")  # JetMoE's experts stay dense, and get no adapter: said
def test_what_cannot_be_trained_is_refused_by_name(folder):
    with pytest.raises(ModelError, match=r"cannot be planned: BertLMHeadModel changes its logits in a way that is not known"):
        ln.plan(str(folder("bert")), **SMALL)
    with pytest.raises(ModelError, match=r"cannot be planned: its step cannot be traced without values \(DataDependent"):
        ln.plan(str(folder("jetmoe")), **SMALL)
    made = ln.plan(str(folder("rwkv")), **SMALL)
    assert [row.verdict.method for row in made.rows] == ["full", "lora"]
    assert "cannot be traced without values with these layers packed" in made.refused["qlora"]
    with pytest.raises(ModelError, match="cannot be traced without values with these layers packed"):
        ln.plan(str(folder("rwkv")), method="qlora", **SMALL)
    with pytest.raises(TargetError, match="nothing"):
        ln.plan(str(folder("gpt_neox")), target_modules=["nothing"], **SMALL)
    file = folder("gpt_neox") / "config.json"
    file.write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ModelError, match="This configuration is of no language model transformers knows"):
        ln.plan(str(file.parent), **SMALL)


class _Masked(LlamaForCausalLM):
    """Changes its logits where they are."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[:, :, 3:5] = -100.0
        return output


@pytest.mark.parametrize(("kind", "refused"), [(LlamaForCausalLM, False), (_Masked, True)])
def test_logits_changed_in_place_are_seen(kind, refused):
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = kind(config)
    for check in (check_head, check_head_unseen):
        with pytest.raises(ModelError, match="changes its logits") if refused else contextlib.nullcontext():
            check(model)


def test_the_command_says_that_it_traces(folder, capsys):
    assert main(["plan", str(folder("rwkv")), "--gpu", "rtx-4090", "--max-length", "16", "--batch-size", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["traced"] is True
    assert set(found["refused"]) == {"qlora"}
    assert "tracing lora: 1 x 16 tokens" in err
