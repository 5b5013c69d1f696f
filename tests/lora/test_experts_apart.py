"""Adapters whose experts are stored one by one. Oracles: PEFT's own conversion of such files, and the fused adapter."""

import copy
import json
import re
import warnings

import pytest
import torch
from mixtures import folder_of, logits, some_ids, theirs
from safetensors.torch import load_file, save_file

import lownibble as ln
from lownibble.cli.main import main
from lownibble.errors import AdapterError
from lownibble.exporting.convert import export

LOGITS = {"rtol": 1e-5, "atol": 2e-5}
APART = ("mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe")


def per_expert(folder, model, kind, r=3):
    """An adapter as transformers 4 and PEFT wrote it: a pair of matrices for each expert's layer, all of them random."""
    names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    hidden, ffn, drawn, tensors = 64, 96 if kind == "mixtral" else 32, torch.Generator().manual_seed(0), {}
    for layer in range(2):
        block = "block_sparse_moe" if kind == "mixtral" else "mlp"
        if not hasattr(model.model.layers[layer].mlp, "experts"):
            continue
        for expert in range(4):
            for name, (n_out, n_in) in zip(names, ((ffn, hidden), (ffn, hidden), (hidden, ffn)), strict=True):
                path = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(r, n_in, generator=drawn) / n_in**0.5
                tensors[f"{path}.lora_B.weight"] = torch.randn(n_out, r, generator=drawn)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": list(names), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters_of_experts_one_by_one_load_as_in_peft(peft, kind, quant, tokenizer, tmp_path):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    base = theirs(folder)
    per_expert(tmp_path / "old", base, kind)
    expected = logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old").eval(), some_ids())
    ours = ln.load(str(folder), quant=quant)[0]
    if quant:
        from mixtures import decode_into

        decode_into(base, ours)
        expected = logits(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "old").eval(), some_ids())
    assert (expected - logits(base, some_ids())).abs().max() > 0.1
    ln.load_adapter(ours, tmp_path / "old")
    torch.testing.assert_close(logits(ours.eval(), some_ids()), expected, rtol=1e-4, atol=5e-5)
    ln.save_adapter(ours, tmp_path / "fused")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "fused").eval()
    torch.testing.assert_close(logits(again, some_ids()), expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("kind", APART)
def test_an_adapter_is_written_expert_by_expert_and_read_again(kind, tokenizer, tmp_path):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    model, _ = ln.load(str(folder))
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False, rank_pattern={"down_proj": 2}))
    expected = logits(model.eval(), some_ids())
    ln.save_adapter(model, tmp_path / "fused")
    made = export(tmp_path / "fused", tmp_path / "apart", "peft-per-expert")
    tensors = load_file(tmp_path / "apart" / "adapter_model.safetensors")
    assert len(tensors) == made["tensors"]
    config = json.loads((tmp_path / "apart" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    wanted = {"w1", "w2", "w3"} if kind == "mixtral" else {"gate_proj", "up_proj", "down_proj"}
    assert wanted <= set(config["target_modules"])
    for key, tensor in tensors.items():  # each is what a plain LoRA layer of that expert would have
        if found := re.search(r"experts\.(\d+)\.(\w+)\.lora_(A|B)", key):
            assert tensor.ndim == 2
            assert tensor.shape[found[3] == "B"] == 4, "filled with zeros"
    again, _ = ln.load(str(folder))
    ln.load_adapter(again, tmp_path / "apart")
    torch.testing.assert_close(logits(again.eval(), some_ids()), expected, **LOGITS)


PATTERNS = {
    "of experts": {"rank_pattern": {"experts.gate_up_proj": 5}, "alpha_pattern": {"experts.down_proj": 7.0}},
    "of one layer": {"rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 5}, "alpha_pattern": {r".*\.1\.mlp\..*": 7.0}},
    "of shared experts": {"rank_pattern": {"gate_proj": 5}, "alpha_pattern": {"shared_experts.up_proj": 7.0, "up_proj": 9.0}},
    "of both": {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"down_proj": 7.0, "o_proj": 9.0}},
    "none, of rsLoRA": {"use_rslora": True},
    "an alpha that is no whole number": {"r": 3, "lora_alpha": 4, "rank_pattern": {"down_proj": 5}},
    "of some experts' numbers": {"alpha_pattern": {r".*\.1\..*": 7.0}, "rank_pattern": {r"experts\.gate_up_proj": 5}},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_one_scale_for_all_layers_gives_the_deltas_of_the_fused_adapter(case, tokenizer, tmp_path):
    """As vLLM reads adapter_config.json (lora/peft_helper.py): lora_alpha / r alone, patterns unknown. Also where patterns for
    other layers match an expert's path, or a fused weight's. Oracle: the weights that a merge of the fused adapter adds to."""
    folder = folder_of("deepseek_v3", tmp_path / "model", tokenizer)
    model, _ = ln.load(str(folder))
    ln.add_lora(model, ln.LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": False, **PATTERNS[case]}))
    expected = logits(model.eval(), some_ids())
    ln.save_adapter(model, tmp_path / "fused")
    export(tmp_path / "fused", tmp_path / "apart", "peft-per-expert")
    written = json.loads((tmp_path / "apart" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert not written["use_rslora"]
    tensors = load_file(tmp_path / "apart" / "adapter_model.safetensors")
    scale, paths = written["lora_alpha"] / written["r"], {key.rpartition(".lora_")[0] for key in tensors}
    deltas = {path: scale * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"] for path in paths}
    assert {len(tensors[f"{path}.lora_A.weight"]) for path in paths} == {written["r"]}
    ln.merge(tmp_path / "fused", tmp_path / "merged", onto="original", measure_tokens=0)
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "merged"))
    changed = {key.removesuffix(".weight") for key in before if not torch.equal(before[key], after[key])}
    assert {path.removeprefix("base_model.model.") for path in paths} == changed
    for path, delta in deltas.items():
        key = f"{path.removeprefix('base_model.model.')}.weight"
        torch.testing.assert_close(before[key] + delta, after[key], rtol=1e-5, atol=1e-6)
    again, _ = ln.load(str(folder))
    ln.load_adapter(again, tmp_path / "apart")
    torch.testing.assert_close(logits(again.eval(), some_ids()), expected, **LOGITS)


BOTH = ["gate_up_proj", "down_proj"]
FOR_PEFT = {
    "all": ("qwen3_moe", {}, None),
    "experts and attention beside dense and shared layers": (
        "deepseek_v3", {"target_modules": ["q_a_proj"], "target_parameters": BOTH}, None
    ),
    "one layer": ("qwen3_moe", {"layers_to_transform": [1]}, None),
    "down": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}, None),
    "others' pattern": ("qwen3_moe", {"rank_pattern": {"q_proj": 4}}, None),
    "shared experts": ("deepseek_v3", {}, "takes linear layers called down_proj, gate_proj, up_proj for experts'"),
    "gate and up": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]}, "wants down adapted"),
    "rank": ("qwen3_moe", {"rank_pattern": {"down_proj": 4}}, None),
    "alpha": ("qwen3_moe", {"alpha_pattern": {"gate_up_proj": 400.0}}, None),
    "rslora": ("qwen3_moe", {"use_rslora": True}, None),
    "another model": ("phimoe", {}, "does not fuse the experts of phimoe"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("case", FOR_PEFT)
def test_what_peft_cannot_read_is_said_and_nothing_else(peft, case, tokenizer, tmp_path):
    kind, options, said = FOR_PEFT[case]
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    model, _ = ln.load(str(folder))
    ln.add_lora(model, ln.LoraConfig(**{"r": 2, "init_lora_weights": False, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    expected = logits(model.eval(), some_ids())
    ln.save_adapter(model, tmp_path / "fused")
    made = export(tmp_path / "fused", tmp_path / "apart", "peft-per-expert")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = ln.load_adapter(ln.load(str(folder))[0], tmp_path / "apart")
    assert not [str(warning.message) for warning in told if "match nothing" in str(warning.message)]
    torch.testing.assert_close(logits(ours.eval(), some_ids()), expected, **LOGITS)
    try:
        theirs_adapted = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "apart").eval()
        read = torch.allclose(logits(theirs_adapted, some_ids()), expected, rtol=1e-4, atol=5e-5)
    except RuntimeError:  # sizes
        read = False
    assert read == (said is None)
    if said is None:
        assert "warning" not in made
    else:
        assert said in made["warning"]


def test_targets_are_names_only_where_they_select_nothing_else(tokenizer, tmp_path):
    folder = folder_of("deepseek_v3", tmp_path / "model", tokenizer)
    for name, options in {"all": {}, "some": {"target_modules": r".*\.0\..*q_a_proj", "target_parameters": BOTH}}.items():
        model, _ = ln.load(str(folder))
        ln.add_lora(model, ln.LoraConfig(r=2, **options))
        ln.save_adapter(model, tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name} apart", "peft-per-expert")
        targets = json.loads((tmp_path / f"{name} apart" / "adapter_config.json").read_text())["target_modules"]
        if name == "all":
            assert "down_proj" in targets
            assert not any("." in target for target in targets)
        else:
            experts = [f"model.layers.1.mlp.experts.{e}.{n}_proj" for e in range(4) for n in ("down", "gate", "up")]
            assert targets == ["model.layers.0.self_attn.q_a_proj", *experts]


def test_the_command_says_what_peft_cannot_read(tokenizer, tmp_path, capsys):
    model, _ = ln.load(str(folder_of("qwen3_moe", tmp_path / "model", tokenizer)))
    options = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj"]}
    ln.save_adapter(ln.add_lora(model, ln.LoraConfig(r=2, **options)), tmp_path / "fused")
    assert main(["export", str(tmp_path / "fused"), "--format", "peft-per-expert", "--output", str(tmp_path / "apart")]) == 0
    printed = capsys.readouterr()
    assert "PEFT does not read this file as it is meant: it wants down adapted" in printed.out + printed.err


def test_a_file_of_experts_one_by_one_is_loaded_saved_and_written_again(tokenizer, tmp_path):
    """The rank of gate and up doubles each time, and the scale stays."""
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    per_expert(tmp_path / "old", theirs(folder), "qwen3_moe")
    again = ln.load_adapter(ln.load(str(folder))[0], tmp_path / "old")
    expected = logits(again.eval(), some_ids())
    ln.save_adapter(again, tmp_path / "fused again")
    export(tmp_path / "fused again", tmp_path / "apart again", "peft-per-expert", base=str(folder))
    again, _ = ln.load(str(folder))
    ln.load_adapter(again, tmp_path / "apart again")
    torch.testing.assert_close(logits(again.eval(), some_ids()), expected, **LOGITS)


def test_a_merge_of_experts_one_by_one_is_that_of_the_fused_adapter(tokenizer, tmp_path):
    folder = folder_of("mixtral", tmp_path / "model", tokenizer)
    model, _ = ln.load(str(folder))
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False))
    ln.save_adapter(model, tmp_path / "fused")
    export(tmp_path / "fused", tmp_path / "apart", "peft-per-expert")
    for name in ("fused", "apart"):
        ln.merge(tmp_path / name, tmp_path / f"merged {name}", onto="original", measure_tokens=0)
    fused, apart = (load_file(tmp_path / f"merged {name}" / "model.safetensors") for name in ("fused", "apart"))
    assert fused.keys() == apart.keys()
    for key, tensor in fused.items():
        torch.testing.assert_close(apart[key], tensor, rtol=1e-5, atol=1e-6)


def test_what_vllm_reads_of_experts():
    """Transcribed from vLLM (vllm/lora/model_manager.py, `_stack_moe_lora_weights`): of models that hold experts fused,
    `experts.base_layer` is gate_up_proj, `experts` down_proj; A is cut into (E, r, in), B (out, r E) into (out, r, E)."""
    from lownibble.lora.experts import ExpertsLoRA, file_paths

    n_experts, r, n_in, n_out = 3, 2, 5, 4
    paths = file_paths((), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    assert paths == {"mlp.experts.gate_up_proj": "mlp.experts.base_layer", "mlp.experts.down_proj": "mlp.experts"}
    A, B = torch.randn(n_experts, r, n_in), torch.randn(n_experts, n_out, r)
    variant = ExpertsLoRA(n_experts)
    in_file = variant.to_file("lora_A", A), variant.to_file("lora_B", B)
    assert torch.equal(in_file[0].reshape(n_experts, -1, n_in), A)
    assert torch.equal(in_file[1].reshape(n_out, -1, n_experts).permute(2, 0, 1), B)


def test_files_that_lack_an_expert_are_refused_by_name(tokenizer, tmp_path):
    folder = folder_of("mixtral", tmp_path / "model", tokenizer)
    tensors = per_expert(tmp_path / "old", theirs(folder), "mixtral")
    kept = {key: value for key, value in tensors.items() if ".layers.1.block_sparse_moe.experts.2.w3." not in key}
    save_file(kept, tmp_path / "old" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"'w3' of 3 of the 4 experts of 'model.layers.1.mlp.experts.gate_up_proj'; expert 2"):
        ln.load_adapter(ln.load(str(folder))[0], tmp_path / "old")
    save_file({**tensors, "base_model.model.model.layers.0.block_sparse_moe.experts.9.w1.lora_A.weight": torch.ones(3, 64)},
              tmp_path / "old" / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(AdapterError, match=r"has no place for '.*experts.9.w1.lora_A.weight'"):
        ln.load_adapter(ln.load(str(folder))[0], tmp_path / "old")


ONE = "base_model.model.model.layers.1.mlp.experts.2.up_proj"
DAMAGE = {
    "no A": ({f"{ONE}.lora_A.weight": None}, f"lacks '{ONE}.lora_A.weight'"),
    "no B": ({f"{ONE}.lora_B.weight": None}, f"lacks '{ONE}.lora_B.weight'"),
    "inputs": ({f"{ONE}.lora_A.weight": (3, 7)}, rf"'{ONE}.lora_A.weight' has shape \(3, 7\), not \(3, 64\)"),
    "one number": ({f"{ONE}.lora_A.weight": ()}, rf"'{ONE}.lora_A.weight' has shape \(\), not \(3, 64\)"),
    "rows": ({f"{ONE}.lora_B.weight": (1, 3)}, rf"'{ONE}.lora_B.weight' has shape \(1, 3\), not \(32, 3\)"),
    "rank of B": ({f"{ONE}.lora_B.weight": (32, 1)}, rf"'{ONE}.lora_B.weight' has shape \(32, 1\), not \(32, 3\)"),
    "rank of both": ({f"{ONE}.lora_A.weight": (2, 64), f"{ONE}.lora_B.weight": (32, 2)}, "lora_A.*; and 1 more. Load it on"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_by_name_before_anything_is_changed(case, tokenizer, tmp_path):
    changes, said = DAMAGE[case]
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    tensors = per_expert(tmp_path / "old", theirs(folder), "qwen3_moe")
    model, _ = ln.load(str(folder))
    expected, before = logits(model.eval(), some_ids()), [(name, p.requires_grad) for name, p in model.named_parameters()]
    for key, shape in changes.items():
        del tensors[key]
        if shape is not None:
            tensors[key] = torch.ones(shape)
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=said):
        ln.load_adapter(model, tmp_path / "old")
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    assert torch.equal(logits(model, some_ids()), expected)
    with pytest.raises(AdapterError, match=said):
        ln.merge(tmp_path / "old", tmp_path / "merged", base=str(folder), onto="original", measure_tokens=0)


def test_what_cannot_be_written_expert_by_expert_is_said(tokenizer, tmp_path):
    folder = folder_of("gpt_oss", tmp_path / "model", tokenizer)
    for name, options in {"experts": {}, "attention": {"target_experts": False}}.items():
        model, _ = ln.load(str(folder))
        ln.add_lora(model, ln.LoraConfig(r=2, **options))
        ln.save_adapter(model, tmp_path / name)
    with pytest.raises(AdapterError, match=r"store 'model.layers.0.mlp.experts.gate_up_proj' fused, and so do servers"):
        export(tmp_path / "experts", tmp_path / "apart", "peft-per-expert")
    with pytest.raises(AdapterError, match="it has no experts"):
        export(tmp_path / "attention", tmp_path / "apart", "peft-per-expert")


def test_dropout_in_a_file_of_experts_matters_in_training_alone(tokenizer, tmp_path):
    folder = folder_of("mixtral", tmp_path / "model", tokenizer)
    per_expert(tmp_path / "old", theirs(folder), "mixtral")
    expected = logits(ln.load_adapter(ln.load(str(folder))[0], tmp_path / "old").eval(), some_ids())
    file = tmp_path / "old" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_dropout": 0.05}))
    assert torch.equal(logits(ln.load_adapter(ln.load(str(folder))[0], tmp_path / "old").eval(), some_ids()), expected)
    with pytest.raises(AdapterError, match=r"lora_dropout = 0.05, which experts cannot be trained with. Set lora_dropout to 0"):
        ln.load_adapter(ln.load(str(folder))[0], tmp_path / "old", trainable=True)


def test_patterns_keep_their_order_in_a_file(tokenizer, tmp_path):
    model, _ = ln.load(str(folder_of("mixtral", tmp_path / "model", tokenizer)))
    ln.add_lora(model, ln.LoraConfig(r=4, rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, ".*q_proj": 3}))
    ln.save_adapter(model, tmp_path / "adapter")
    ln.load_adapter(model, tmp_path / "adapter", name="again")
