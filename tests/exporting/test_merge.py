"""Merging. Oracles: the live adapter's own logits; PEFT's merge on a dense base; the model loaded again by transformers."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pairwise import pairwise
from safetensors.torch import load_file, save_file
from tiny_folders import write_t5
from transformers import AutoModelForCausalLM, AutoTokenizer

import lownibble as ln
from lownibble.bench.merge import write_large
from lownibble.cli.main import main
from lownibble.config import MergeConfig
from lownibble.errors import AdapterError, ConfigError, ModelError, OutputError
from lownibble.exporting import merge as module
from lownibble.exporting.merge import run_merge
from lownibble.exporting.weights import Weights
from lownibble.lora.adapter_file import AdapterFile
from lownibble.models import resolve
from lownibble.quant import QuantLinear

FP32, BF16 = 4e-5, 0.03
"""Largest difference as a share of the largest logit: the same sums in another order (up to 1.9e-5 on one of two processors that
this has run on, below 1e-5 on the other); weights rounded to 8 bits of mantissa."""


def logits(model, batch):
    ids, mask, _ = batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.float()


def assert_same(found, expected, share=FP32):
    assert float((found - expected).abs().max()) <= share * float(expected.abs().max())


def by_transformers(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_dequantized_merge_computes_what_the_live_adapter_does(write, adapt, batch, tmp_path, family, shards):
    folder = write(family, shards=shards)
    live, adapter = adapt(folder, "nf4")
    result = ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert result["onto"] == "dequantized"
    assert_same(logits(by_transformers(tmp_path / "merged"), batch), logits(live, batch))
    again, _ = ln.load(str(tmp_path / "merged"))
    assert_same(logits(again, batch), logits(live, batch))
    names = [sorted(file.name for file in path.glob("model*")) for path in (folder, tmp_path / "merged")]
    assert names[0] == names[1]


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_plain_float8_is_merged_in_the_models_type(write, adapt, batch, tmp_path, onto):
    """8 bits would lose the sum."""
    folder = write()
    tensors = load_file(folder / "model.safetensors")
    small = {key: value.to(torch.float8_e4m3fn) if "_proj" in key else value for key, value in tensors.items()}
    save_file(small, folder / "model.safetensors", {"format": "pt"})
    live, adapter = adapt(folder, None if onto == "original" else "nf4")
    ln.merge(adapter, tmp_path / "merged", onto=onto, measure_tokens=0)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.float32}, "the one that config.json names"
    assert_same(logits(ln.load(str(tmp_path / "merged"))[0], batch), logits(live, batch))


NUMBERED = {
    "gemma3n_text": (
        {
            "head_dim": 8, "laurel_rank": 4, "altup_num_inputs": 3, "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
        },
        ["lm_head", "altup_projections", "altup_unembed_projections", "correction_coefs", "prediction_coefs"],
        {"target_modules": ["q_proj", "down_proj"]},
    ),
    "zamba2": (
        {
            "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_hidden_layers": 4, "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid"] * 2, "adapter_rank": 8, "attention_hidden_size": 64,
            "attention_head_dim": 16, "kv_channels": 8,
        },
        ["lm_head"], {"target_modules": ["in_proj", "out_proj"]},
    ),
}  # fmt: skip
"""Family -> options, skip_modules and options of an adapter: models whose dense layers have numbers as last names (of lists)."""


@pytest.mark.parametrize("family", list(NUMBERED))
def test_a_dense_layer_named_by_a_number_leaves_no_decoder_layer_dense(write, adapt, batch, tmp_path, family):
    """The record has last names, '0' among them, which is a whole name in the path of every layer of `layers.0`, too."""
    options, skip, lora = NUMBERED[family]
    live, adapter = adapt(write(family, **options), ln.QuantConfig(skip_modules=skip), **lora)
    recorded = AdapterFile(adapter).trained_on["quant"]["skip_modules"]
    assert {"0", "1"} & set(recorded)
    weights = Weights(
        resolve(str(tmp_path / "model")), AdapterFile(adapter), ln.QuantConfig(skip_modules=recorded), ln.QuantConfig()
    )
    packed = {path for path, module in live.named_modules() if isinstance(module, QuantLinear)}
    assert weights.quantized == {path.removesuffix(".base") for path in packed}
    ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert_same(logits(by_transformers(tmp_path / "merged"), batch), logits(live, batch))


LORA = {
    "all": {},
    "patterns": {"rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 5.0}},
    "rslora": {"use_rslora": True, "r": 8},
    "biases": {"bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "layers": {"layers_to_transform": [1]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "dora": {"use_dora": True, "target_modules": ["lm_head", "q_proj", "down_proj"], "bias": "lora_only"},
    "copies": {"modules_to_save": ["embed_tokens", "norm"], "target_modules": ["q_proj"]},
    "trained head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "both ends": {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["up_proj"]},
}


@pytest.mark.parametrize(("case", "quant", "tied"), pairwise(list(LORA), ["nf4", None], [False, True]))
def test_every_kind_of_adapter(write, adapt, batch, tmp_path, quant, case, tied):
    folder = write("llama", shards=True, attention_bias=True, tie_word_embeddings=tied)
    live, adapter = adapt(folder, quant, **LORA[case])
    ln.merge(adapter, tmp_path / "merged", onto="dequantized" if quant else "original", measure_tokens=0)
    merged = by_transformers(tmp_path / "merged")
    assert_same(logits(merged, batch), logits(live, batch))
    both = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert both == (
        tied and not {"lm_head", "embed_tokens"} & {*LORA[case].get("modules_to_save", []), *LORA[case].get("target_modules", [])}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_peft_on_a_dense_base(peft, write, batch, tmp_path, dtype):
    folder = write("llama", shards=True, dtype=dtype)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, rank_pattern={"q_proj": 3}, use_rslora=True
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    theirs.save_pretrained(tmp_path / "adapter")
    result = ln.merge(tmp_path / "adapter", tmp_path / "merged", base=str(folder), onto="original", measure_tokens=0)
    expected = theirs.merge_and_unload().eval()
    merged = by_transformers(tmp_path / "merged")
    assert {t.dtype for t in load_file(next((tmp_path / "merged").glob("*.safetensors"))).values()} == {dtype}
    assert_same(logits(merged, batch), logits(expected, batch), FP32 if dtype == torch.float32 else BF16)
    own = expected.state_dict()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value.to(dtype), own[key].to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)
    assert result["base"]["stored"] == "dense"


def test_bfloat16_is_one_rounding_of_the_float32_sum(write, adapt, tmp_path):
    """The cast comes last: it equals rounding the merge that was written in float32."""
    folder = write("llama", dtype=torch.bfloat16)
    _, adapter = adapt(folder, "nf4")
    for dtype in ("auto", "float32"):
        ln.merge(adapter, tmp_path / dtype, onto="dequantized", dtype=dtype, measure_tokens=0)
    exact, rounded = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "auto"))
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(rounded[key], exact[key].bfloat16()) for key in exact)
    untouched = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(untouched, rounded["model.norm.weight"])


def test_packed_again_keeps_untouched_layers_byte_for_byte(bitsandbytes, write, adapt, batch, tmp_path):
    folder = write("llama", hidden_size=64, intermediate_size=128)
    live, adapter = adapt(folder, "nf4", target_modules=["q_proj"])
    ln.merge(adapter, tmp_path / "merged", onto="nf4", measure_tokens=0, force=True)
    packed, _ = ln.load(str(tmp_path / "merged"))
    changed = 0
    for path, layer in packed.named_modules():
        if isinstance(layer, ln.QuantLinear):
            base = live.get_submodule(path)
            base = getattr(base, "base", base)
            same = all(torch.equal(a, b) for a, b in zip(layer.flat, base.flat, strict=True))
            changed += not same
            assert same != ("q_proj" in path)
    assert changed == 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, device_map="cpu").train()
    torch.testing.assert_close(logits(theirs, batch), logits(packed, batch), rtol=0, atol=2e-5)


def test_a_packed_base_is_merged_into_dense_weights(bitsandbytes, write, adapt, batch, tmp_path):
    folder = write("llama", hidden_size=64, intermediate_size=128)
    _, nothing = adapt(folder, "nf4", size=0.0, init_lora_weights=True)
    ln.merge(nothing, tmp_path / "packed", onto="nf4", measure_tokens=0, force=True)
    live, adapter = adapt(tmp_path / "packed", None, name="second")
    ln.merge(adapter, tmp_path / "merged", measure_tokens=0, onto="dequantized")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert_same(logits(by_transformers(tmp_path / "merged"), batch), logits(live, batch))
    with pytest.raises(
        ConfigError, match=r"Cannot merge onto 'original': .* holds quantised weights only\. Name the dense model"
    ):
        ln.merge(adapter, tmp_path / "no", onto="original", measure_tokens=0)


def test_a_resized_vocabulary(peft, write, batch, tmp_path):
    folder = write("llama", tie_word_embeddings=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    ln.merge(tmp_path / "adapter", tmp_path / "merged", base=str(folder), onto="original", measure_tokens=0)
    merged = by_transformers(tmp_path / "merged")
    assert merged.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 98
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_same(logits(merged, batch), logits(theirs.merge_and_unload().eval(), batch))


def test_measured_against_the_live_adapter(write, adapt, rows, tmp_path, monkeypatch):
    """Figures computed again from the models themselves, loaded whole; the 96 words are gone through in three slices."""
    monkeypatch.setattr("lownibble.exporting.measure.SLICE", 40)
    folder = write("llama", dtype=torch.bfloat16)
    live, adapter = adapt(folder, "nf4", target_modules=["q_proj", "lm_head"])
    result = ln.merge(adapter, tmp_path / "merged", data={"path": rows, "eval_path": rows})
    measured = result["measured"]
    assert measured["rows"] == 24
    models = measured["models"]
    assert set(models) == {"live", "base", "dequantized", "original", "nf4"}
    assert result["onto"] == "dequantized"
    merged, tokenizer = ln.load(str(tmp_path / "merged"))
    total, same, count, loss = 0.0, 0, 0, 0.0
    for line in Path(rows).read_text().splitlines():
        row = json.loads(line)
        prompt, completion = (tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", "completion"))
        ids = torch.tensor([prompt + completion + [tokenizer.eos_token_id]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(1) for model in (live, merged))
        total += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(1) == q.argmax(1)).sum())
        loss -= float(p.gather(1, ids[0, len(prompt) :, None]).sum())
        count += len(p)
    assert measured["label_tokens"] == count
    found = models["dequantized"]["label_tokens"]
    assert found["kl"] == pytest.approx(total / count, rel=1e-3)
    assert found["top1_agreement"] == same / count
    assert models["live"]["label_tokens"]["perplexity"] == pytest.approx(torch.tensor(loss / count).exp().item(), rel=1e-5)
    assert found["kl"] < models["original"]["label_tokens"]["kl"] < models["base"]["label_tokens"]["kl"]
    assert found["kl"] < models["nf4"]["label_tokens"]["kl"]
    assert models["dequantized"]["kept"] == 1 - found["kl"] / models["base"]["label_tokens"]["kl"]
    by_layer = measured["layers"]["nf4"]["by_layer"]
    assert set(by_layer) == {"lm_head.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))}
    base = ln.load(str(folder), quant="nf4")[0].model.layers[0].self_attn.q_proj
    branch = live.model.layers[0].self_attn.q_proj.adapter("default")
    delta = (branch.scale * branch.lora_B @ branch.lora_A).detach()
    exact = base.weight.dequantize(torch.float32) + delta
    again = ln.quantize(exact).dequantize(torch.float32)
    assert by_layer["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(
        float((again - exact).norm() / delta.norm()), rel=1e-4
    )
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == result


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_resized_vocabulary_that_was_trained(peft, write, batch, tmp_path, saved, tied):
    """PEFT saves such embeddings several times."""
    folder = write("llama", tie_word_embeddings=tied)
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(98, mean_resizing=False)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=saved)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ln.merge(tmp_path / "adapter", tmp_path / "merged", base=str(folder), onto="original", measure_tokens=0)
    merged = by_transformers(tmp_path / "merged")
    assert merged.config.vocab_size == 98
    assert_same(logits(merged, batch), logits(theirs.merge_and_unload().eval(), batch))


@torch.no_grad()
def test_an_adapted_head_of_a_base_in_another_type(peft, write, batch, tmp_path):
    """PEFT saves the base's head too: rounded, where the base was loaded in fewer bits."""
    folder = write("llama")
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False),
    )
    theirs.save_pretrained(tmp_path / "adapter")
    ln.merge(tmp_path / "adapter", tmp_path / "merged", base=str(folder), onto="original", measure_tokens=0)
    merged, expected = by_transformers(tmp_path / "merged").lm_head.weight, theirs.merge_and_unload().lm_head.weight
    plain = by_transformers(folder).lm_head.weight
    assert float((merged - expected.float()).norm()) < 0.1 * float((merged - plain).norm())


def test_a_fresh_adapter_merges_into_its_base(write, adapt, rows, tmp_path):
    """Every B is zero: nothing to measure an error by, and the merge is the base."""
    folder = write("llama")
    model, _ = ln.load(str(folder))
    ln.save_adapter(ln.add_lora(model, ln.LoraConfig(r=4)), tmp_path / "fresh")
    result = ln.merge(tmp_path / "fresh", tmp_path / "merged", data={"path": rows, "eval_path": rows})
    assert result["onto"] == "original"
    assert result["measured"]["layers"]["nf4"]["error_over_delta_worst"] is None
    assert any("hardly changes what the base says" in line for line in result["advice"])
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged"))
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_other_inputs_start_over(write, adapt, tmp_path, monkeypatch):
    """Nothing of an interrupted merge of something else is left in the result."""
    _, adapter = adapt(write("llama", shards=True), "nf4")
    real = module._write_rest
    monkeypatch.setattr(module, "_write_rest", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="finished shards are kept"):
        ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    aside = tmp_path / ".merged.merging"
    assert list(aside.glob("*.safetensors"))
    (aside / "model-00009-of-00009.safetensors.part").write_text("half")
    monkeypatch.setattr(module, "_write_rest", real)
    small = write("llama", name="small")
    model, _ = ln.load(str(small), quant="nf4")
    ln.save_adapter(ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights=False)), tmp_path / "other")
    ln.merge(tmp_path / "other", tmp_path / "merged", onto="dequantized", measure_tokens=0)
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {name for name in names if "model" in name} == {"model.safetensors"}
    assert not any(name.startswith(".") for name in names)


def test_outputs_that_cannot_be_made(write, adapt, tmp_path, monkeypatch):
    _, adapter = adapt(write("llama"), "nf4")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "real")
    for output, message in (("../link", "cannot be replaced"), (".", "cannot be replaced"), ("../file/deeper", "Cannot make")):
        with pytest.raises(OutputError, match=message):
            ln.merge(adapter, output, onto="dequantized", measure_tokens=0)
    ln.merge(adapter, "../new/deep/merged", onto="dequantized", measure_tokens=0)
    assert (tmp_path / "new" / "deep" / "merged" / "config.json").is_file()


def test_a_shard_of_another_name_keeps_its_index(write, adapt, batch, tmp_path):
    folder = write("llama")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    keys = load_file(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(keys, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    live, adapter = adapt(folder, "nf4")
    ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert_same(logits(by_transformers(tmp_path / "merged"), batch), logits(live, batch))


def test_weights_and_configuration_that_differ(write, adapt, tmp_path):
    folder = write("llama")
    _, adapter = adapt(folder, "nf4")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 88}))
    with pytest.raises((ModelError, AdapterError), match="shape"):
        ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)


def test_a_tune_that_four_bits_would_lose_is_refused(write, adapt, rows, tmp_path):
    _, adapter = adapt(write("llama"), "nf4", size=0.0, init_lora_weights="gaussian")
    tensors = load_file(adapter / "adapter_model.safetensors")
    metadata = _metadata(adapter)
    tiny = {key: value if "lora_A" in key else torch.full_like(value, 1e-3) for key, value in tensors.items()}
    save_file(tiny, adapter / "adapter_model.safetensors", metadata=metadata)
    options = {"data": {"path": rows, "eval_path": rows}, "onto": "nf4"}
    with pytest.raises(
        OutputError, match=r"Packed into 4 bits again, the model retains \d+% of the fine-tuning gain .* Merge onto dequantized"
    ):
        ln.merge(adapter, tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".*"))
    assert ln.merge(adapter, tmp_path / "merged", **options, force=True)["onto"] == "nf4"
    ln.merge(adapter, tmp_path / "faithful", **options | {"onto": "dequantized"})
    ln.export(tmp_path / "faithful", tmp_path / "copy", "safetensors")
    for model in ("faithful", "copy"):
        with pytest.raises(OutputError, match=r"holds a merged adapter, which retains \d+% of its fine-tuning gain in 4 bits"):
            ln.export(tmp_path / model, tmp_path / "packed", "bnb-4bit")
        assert not (tmp_path / "packed").exists()
    ln.export(tmp_path / "copy", tmp_path / "packed", "bnb-4bit", force=True)


def _metadata(adapter):
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


def rewritten(change):
    def _apply(adapter):
        path, metadata = adapter / "adapter_model.safetensors", _metadata(adapter)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata=metadata)

    return _apply


A_KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
DAMAGE = {
    "NaN": (rewritten(lambda t: t[A_KEY].fill_(float("nan"))), r"'.*up_proj.lora_A.weight' of .* holds NaN or infinite values"),
    "no place": (
        rewritten(lambda t: t.update({A_KEY.replace("up_proj", "side_proj"): t[A_KEY].clone()})),
        r"has no place for '.*side_proj",
    ),
    "missing": (rewritten(lambda t: t.pop(A_KEY)), r"lacks '.*up_proj.lora_A.weight'"),
    "shape": (rewritten(lambda t: t.update({A_KEY: torch.zeros(4, 5)})), r"has shape \(4, 5\), not \(4, 32\)"),
    "pickled": (
        lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"),
        r"Only safetensors adapters are read; convert others with PEFT",
    ),
    "cut": (
        lambda a: (a / "adapter_model.safetensors").write_bytes((a / "adapter_model.safetensors").read_bytes()[:-9]),
        r"is damaged",
    ),
    "empty folder": (lambda a: (a / "adapter_config.json").unlink(), r"holds no adapter: adapter_config.json is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_adapters_are_refused_and_nothing_is_written(write, adapt, tmp_path, case):
    _, adapter = adapt(write("llama"), "nf4")
    damage, message = DAMAGE[case]
    damage(adapter)
    with pytest.raises(AdapterError, match=message):
        ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}


def test_an_adapter_of_another_base_is_refused(write, adapt, tiny, tmp_path):
    folder, other = write("llama"), write("llama", name="other", seed=7)
    _, adapter = adapt(folder, "nf4")
    with pytest.raises(
        AdapterError, match=r"adapter of another base: it was trained on '.*model' \(weights \w{12}\), and this is '.*other'"
    ):
        ln.merge(adapter, tmp_path / "merged", base=str(other), onto="dequantized", measure_tokens=0)
    model, _ = ln.load(str(other), quant="nf4")
    with pytest.raises(AdapterError, match="adapter of another base"):
        ln.load_adapter(model, adapter)
    ln.load_adapter(model, adapter, any_base=True)
    ln.merge(adapter, tmp_path / "merged", base=str(other), onto="dequantized", measure_tokens=0, any_base=True)
    dense, _ = ln.load(str(folder))
    with pytest.warns(UserWarning, match="it was trained on nf4/64 double-quantised weights, and these are dense"):
        ln.load_adapter(dense, adapter)


def test_a_missing_shard(write, adapt, tmp_path):
    folder = write("llama", shards=True)
    _, adapter = adapt(folder, "nf4")
    sorted(folder.glob("model-*"))[1].unlink()
    with pytest.raises(ModelError, match=r"shard model-00002-of-.* is missing"):
        ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert not (tmp_path / "merged").exists()


def test_what_does_not_fit_the_type_is_refused(write, adapt, tmp_path):
    _, adapter = adapt(write("llama"), "nf4")
    rewritten(lambda t: [v.mul_(1e4) for v in t.values()])(adapter)
    with pytest.raises(AdapterError, match=r"merged does not fit torch.float16: values overflow\. Take --dtype bfloat16"):
        ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0, dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_options_that_contradict_the_adapter(write, adapt, peft, tmp_path):
    folder = write("llama")
    _, adapter = adapt(folder, None)
    cases = [
        ({"onto": "dequantized"}, r"Cannot merge onto 'dequantized': the adapter was trained on dense weights"),
        ({"trained_on": "quantized"}, r"says that it was trained on dense weights. Leave --trained-on out"),
        ({"onto": "auto"}, r"--onto auto goes by the measurement"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            ln.merge(adapter, tmp_path / "merged", measure_tokens=0, **options)
    with pytest.raises(OutputError, match="was not measured and may have lost the fine-tuning gain"):
        ln.merge(adapter, tmp_path / "merged", measure_tokens=0, onto="nf4")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something already"):
        ln.merge(adapter, tmp_path / "merged", measure_tokens=0, onto="original")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "silent")
    with pytest.raises(ConfigError, match=r"does not say whether its base was in 4 bits in training. Say --trained-on"):
        ln.merge(tmp_path / "silent", tmp_path / "other", base=str(folder))


def test_an_interrupted_merge_goes_on(write, adapt, tmp_path, monkeypatch):
    """Shards that were finished are not written again, and the result has the same bytes; another merge starts over."""
    folder = write("llama", shards=True)
    _, adapter = adapt(folder, "nf4")
    ln.merge(adapter, tmp_path / "whole", onto="dequantized", measure_tokens=0)
    written, real = [], module._write_shard

    def failing(weights, onto, path, entries):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        real(weights, onto, path, entries)
        written.append(path.name)

    monkeypatch.setattr(module, "_write_shard", failing)
    with pytest.raises(OutputError, match=r"No space left on device. Free some space and run the same command again"):
        ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert not (tmp_path / "merged").exists()
    first = list(written)
    written.clear()
    monkeypatch.setattr(module, "_write_shard", lambda *a: (written.append(a[2].name), real(*a)))
    ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert not set(written) & set(first)
    assert len(written) + len(first) == len(list((tmp_path / "merged").glob("*.safetensors")))
    for file in (tmp_path / "whole").iterdir():
        if file.name != "merge.json":
            assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes(), file.name
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter", "whole", "merged"}


def test_a_full_disk_is_noticed_before_anything_is_written(write, adapt, tmp_path, monkeypatch):
    _, adapter = adapt(write("llama"), "nf4")
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"needs 0.00 GB in .* where 0.00 GB are free. Nothing was written"):
        ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert not (tmp_path / "merged").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "adapter"}


@pytest.mark.parametrize("family", ["mistral", "gemma2", "t5"])
def test_the_exact_merge_is_measured_as_exact(write, adapt, rows, tmp_path, family):
    """In float32 the decoded merge is the live adapter, whatever the architecture does to its logits: only rounding differs."""
    folder = tmp_path / "model"
    if family == "t5":
        folder.mkdir()
        write_t5(folder)
        data = tmp_path / "pairs.jsonl"
        pairs = [{"prompt": "the film was good", "completion": " positive"}, {"prompt": "a bad plot", "completion": " not"}] * 4
        data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        rows = str(data)
    else:
        write(family)
    _, adapter = adapt(folder, "nf4")
    result = ln.merge(adapter, tmp_path / "merged", data={"path": rows, "eval_path": rows})
    models = result["measured"]["models"]
    assert result["onto"] == "dequantized"
    assert models["dequantized"]["kept"] == pytest.approx(1, abs=1e-4)
    assert models["dequantized"]["label_tokens"]["top1_agreement"] == 1
    assert models["nf4"]["label_tokens"]["kl"] > 100 * models["dequantized"]["label_tokens"]["kl"]
    assert max(result["measured"]["layers"]["dequantized"]["by_layer"].values()) < 1e-5


def test_encoder_decoder_with_a_trained_head_is_refused(adapt, tmp_path):
    """T5 cannot store its shared embeddings apart."""
    folder = tmp_path / "model"
    folder.mkdir()
    _, adapter = adapt(write_t5(folder), None, modules_to_save=["lm_head"], target_modules=["q"])
    with pytest.raises(AdapterError, match=r"which share one tensor in a way that this architecture cannot store apart"):
        ln.merge(adapter, tmp_path / "merged", onto="original", measure_tokens=0)


def test_a_t5_merged_onto_nf4_loads_in_transformers(tmp_path, monkeypatch):
    """transformers keeps T5's `wo` out of 4 bits whatever a checkpoint says, so it is written dense."""
    folder = tmp_path / "t5"
    folder.mkdir()
    write_t5(folder)
    model, _ = ln.load(str(folder), quant="nf4")
    ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights=False), seed=1)
    ln.save_adapter(model, tmp_path / "adapter")
    ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="nf4", measure_tokens=0, force=True)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert stored["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape == (32, 64)
    assert stored["encoder.block.0.layer.0.SelfAttention.q.weight"].dtype == torch.uint8
    again, _ = ln.load(str(tmp_path / "merged"))
    assert {path.rpartition(".")[2] for path, m in again.named_modules() if hasattr(m, "facts")} >= {"q", "v", "wi_0"}


@pytest.mark.parametrize("name", [".", "~/run/adapter", "link"])
def test_an_adapter_by_another_name_has_the_record_of_its_run(write, adapt, rows, tmp_path, monkeypatch, name):
    folder = write()
    _, adapter = adapt(folder, None, name="run/adapter")
    (tmp_path / "run" / "record.json").write_text(json.dumps({"config": {"data": {"path": rows}}}))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(adapter)
    if name == "link":
        (tmp_path / "link").symlink_to(adapter)
        name = str(tmp_path / "link")
    result = ln.merge(name, "~/merged", onto="original", measure_tokens=64)
    assert result["measured"]["data"] == f"{rows} (of the run that made the adapter)"
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert ln.load_adapter(ln.load(str(folder))[0], name)


def test_additional_chat_templates_go_with_the_tokenizer(write, adapt, tmp_path):
    folder, several = write(), "additional_chat_templates"
    _, adapter = adapt(folder, None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for where, text in ((folder, "of the base"), (adapter, "of the adapter")):
        tokenizer.chat_template = {"default": "plain", "tool_use": text}
        tokenizer.save_pretrained(where)
        left = tmp_path / ".merged.merging" / several
        left.mkdir(parents=True)  # of one that was interrupted
        (left / "old.jinja").write_text("old")
        ln.merge(adapter, tmp_path / "merged", onto="original", measure_tokens=0)
        assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
        shutil.rmtree(tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SIGKILL")
def test_killed_it_goes_on(tmp_path, tokenizer, forked):
    """kill -9 while shards are written; the same command again ends with the bytes of an undisturbed merge."""
    large = write_large(tmp_path / "large")
    tokenizer.save_pretrained(large.folder)
    options = {"onto": "dequantized", "measure_tokens": 0, "trained_on": "quantized"}
    program = f"import sys, lownibble as ln; ln.merge({str(large.adapter)!r}, sys.argv[1], **{options!r})"
    running = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "merged")])
    aside = tmp_path / ".merged.merging"
    try:
        deadline = time.monotonic() + 120
        while len(list(aside.glob("*.safetensors"))) < 3:
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        running.kill()
        running.wait()
    assert not (tmp_path / "merged").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in aside.glob("*.safetensors")}
    assert kept
    ln.merge(large.adapter, tmp_path / "merged", **options)
    assert not aside.exists()
    assert {name: (tmp_path / "merged" / name).stat().st_mtime_ns for name in kept} == kept
    ln.merge(large.adapter, tmp_path / "whole", **options)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes()
    assert not list((tmp_path / "merged").glob(".*"))


def test_it_tells_how_far_it_is(write, adapt, rows, tmp_path):
    _, adapter = adapt(write("llama", shards=True), "nf4")
    told = []
    options = {"adapter": str(adapter), "output": str(tmp_path / "merged"), "data": {"path": rows, "eval_path": rows}}
    run_merge(MergeConfig(**options), lambda *now: told.append(now))
    shards = len(list((tmp_path / "merged").glob("*.safetensors")))
    assert told == [("measuring", i, 5) for i in range(6)] + [("writing shards", i, shards) for i in range(shards + 1)]


def test_from_the_command_line(write, adapt, rows, tmp_path, capsys):
    _, adapter = adapt(write("llama"), "nf4")
    arguments = ["merge", str(adapter), "--output", str(tmp_path / "merged"), "--data", rows, "--eval-data", rows]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Merged onto dequantized" in printed
    assert "fine-tuning gain" in printed
    assert main([*arguments, "--json"]) == 2  # it is there
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kind"] == "OutputError"
    arguments = ["export", str(tmp_path / "merged"), "--output", str(tmp_path / "packed"), "--format", "bnb-4bit", "--json"]
    assert main(arguments) == 2
    assert "which retains 85% of its fine-tuning gain in 4 bits" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert main([*arguments, "--force"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "ok"
    assert ln.load(str(tmp_path / "packed"))[0].model.layers[0].mlp.up_proj.quant_type == "nf4"
    assert main(["merge", str(tmp_path / "nowhere"), "--output", str(tmp_path / "other")]) == 2
    assert "holds no adapter" in capsys.readouterr().err
