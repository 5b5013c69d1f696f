"""Merging, quantising and exporting mixtures. Oracles: PEFT's `merge_and_unload`, the live model, the model packed on loading."""

import copy
import json

import pytest
import torch
from mixtures import ATTENTION, MIXTURES, dense_experts, folder_of, logits, some_ids, theirs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lownibble as ln
from lownibble.config import QuantConfig
from lownibble.errors import AdapterError, ConfigError
from lownibble.lora.experts import named_experts
from lownibble.models import experts
from lownibble.quant import QuantLinear

WEIGHTS = ["gate_up_proj", "down_proj"]
FP32 = {"rtol": 1e-4, "atol": 5e-5}
"""The same sums in another order, through two layers with routers."""


def keys_of(folder):
    return {key for file in folder.glob("*.safetensors") for key in load_file(file)}


def random_adapter(model, folder, **options):
    """A live model with a random adapter on experts and attention, which is saved to `folder`."""
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False, **options), seed=3)
    ln.save_adapter(model, folder)
    return model.eval()


@pytest.mark.parametrize("targets", [WEIGHTS, ["down_proj"]])
@pytest.mark.parametrize("kind", MIXTURES)
def test_onto_the_dense_base_it_is_pefts_merge(peft, kind, targets, tokenizer, tmp_path):
    base = theirs(folder_of(kind, tmp_path / "model", tokenizer))
    names = {path.rpartition(".")[2] for path, _ in base.named_modules()}
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[name for name in ATTENTION if name in names], target_parameters=targets,
        init_lora_weights=False,
    )  # fmt: skip
    before = logits(base, some_ids())
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    ln.merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "model"), onto="original", measure_tokens=0)
    assert keys_of(tmp_path / "merged") == keys_of(tmp_path / "model"), "the base's own names"
    expected = model.merge_and_unload()
    merged = theirs(tmp_path / "merged")
    assert (logits(merged, some_ids()) - before).abs().max() > 0.1, "the adapter matters"
    torch.testing.assert_close(logits(merged, some_ids()), logits(expected, some_ids()), **FP32)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=0, atol=1e-5)


def test_a_routers_buffer_is_the_adapters(tokenizer, tmp_path):
    """DeepSeek's correction of scores, which PEFT's files hold beside the weight of a trained router."""
    model, _ = ln.load(str(folder_of("deepseek_v3", tmp_path / "model", tokenizer)))
    random_adapter(model, tmp_path / "adapter", target_modules=["o_proj"], modules_to_save=["gate"])
    (router,) = (module for path, module in model.named_modules() if path.endswith("mlp.gate"))
    correction = router.current.e_score_correction_bias
    correction.copy_(torch.linspace(-1, 1, len(correction)))
    ln.save_adapter(model, tmp_path / "adapter")
    ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="original", measure_tokens=0)
    torch.testing.assert_close(logits(theirs(tmp_path / "merged"), some_ids()), logits(model, some_ids()), **FP32)


@pytest.mark.parametrize("kind", MIXTURES)
def test_onto_the_decoded_base_it_computes_what_the_live_model_does(kind, tokenizer, tmp_path):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    live = random_adapter(ln.load(str(folder), quant="nf4")[0], tmp_path / "adapter")
    ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert keys_of(tmp_path / "merged") == keys_of(folder)
    torch.testing.assert_close(logits(theirs(tmp_path / "merged"), some_ids()), logits(live, some_ids()), **FP32)
    torch.testing.assert_close(logits(ln.load(str(tmp_path / "merged"))[0], some_ids()), logits(live, some_ids()), **FP32)


@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_packed_again_it_is_the_decoded_merge_packed_on_loading(kind, quant_type, tokenizer, tmp_path):
    folder, quant = folder_of(kind, tmp_path / "model", tokenizer), QuantConfig(quant_type=quant_type, block_size=32)
    random_adapter(ln.load(str(folder), quant=quant)[0], tmp_path / "adapter")
    result = ln.merge(tmp_path / "adapter", tmp_path / "merged", onto=quant_type, measure_tokens=0, force=True)
    ln.merge(tmp_path / "adapter", tmp_path / "dense", onto="dequantized", measure_tokens=0)
    assert set(result["targets"]) == {"dequantized", "original", quant_type}
    expected, found = ln.load(str(tmp_path / "dense"), quant=quant)[0], ln.load(str(tmp_path / "merged"))[0]
    same_packed(found, expected)
    assert torch.equal(logits(found, some_ids()), logits(expected, some_ids()))


def same_packed(found, expected):
    """All of the layers and experts that one model has packed, the other has, with the same bytes."""
    ours, theirs_ = (
        {path: m.weight for path, m in model.named_modules() if isinstance(m, QuantLinear)} for model in (found, expected)
    )
    assert ours.keys() == theirs_.keys()
    assert not dense_experts(found), "no dense expert is left"
    assert named_experts(found).keys() <= ours.keys()
    for path, weight in ours.items():
        assert weight.facts() == theirs_[path].facts()
        for name, tensor in weight.tensors().items():
            assert torch.equal(tensor, theirs_[path].tensors()[name]), (path, name)


def test_untouched_experts_keep_their_bytes(tokenizer, tmp_path):
    folder = folder_of("mixtral", tmp_path / "model", tokenizer)
    live = random_adapter(ln.load(str(folder), quant="nf4")[0], tmp_path / "adapter", target_modules=["q_proj"])
    ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="nf4", measure_tokens=0, force=True)
    merged = named_experts(ln.load(str(tmp_path / "merged"))[0])
    for path, module in named_experts(live).items():
        for name, tensor in module.weight.tensors().items():
            assert torch.equal(tensor, merged[path].weight.tensors()[name])


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_measurement_reads_experts(kind, rows, tokenizer, tmp_path):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    random_adapter(ln.load(str(folder), quant="nf4")[0], tmp_path / "adapter", target_modules=[], target_parameters=WEIGHTS)
    result = ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="auto", data={"path": rows}, measure_tokens=300)
    models, layers = result["measured"]["models"], result["measured"]["layers"]
    assert models["dequantized"]["kept"] > 0.999 > models["original"]["kept"]
    assert set(layers["nf4"]["by_layer"]) == set(experts.shapes(theirs(folder)))
    assert layers["dequantized"]["error_over_delta_worst"] < 1e-3 < layers["original"]["error_over_delta_worst"]
    assert result["onto"] == "dequantized"


@pytest.mark.parametrize(
    "quant",
    [QuantConfig(block_size=32), QuantConfig(quant_type="int4", block_size="row"),
     QuantConfig(pattern={"gate_up_proj": {"quant_type": "int8", "block_size": "row"}})],
    ids=["nf4", "int4", "mixed"],
)  # fmt: skip
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_quantised_checkpoint_has_all_experts_packed(kind, quant, tokenizer, tmp_path):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    record = ln.quantize_model(str(folder), tmp_path / "out", rounding="rtn", quant=quant)
    assert (record["format"], record["dense_experts"]) == ("lownibble", 0)
    expected, found = ln.load(str(folder), quant=quant)[0], ln.load(str(tmp_path / "out"))[0]
    same_packed(found, expected)
    assert torch.equal(logits(found, some_ids()), logits(expected, some_ids()))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["quant_type"]) == ("lownibble", quant.quant_type)


def test_an_adapter_of_a_packed_checkpoint_is_merged_onto_it(peft, tokenizer, tmp_path):
    folder = folder_of("gpt_oss", tmp_path / "model", tokenizer)
    ln.quantize_model(str(folder), tmp_path / "packed", rounding="rtn", quant=QuantConfig(block_size=32))
    live = random_adapter(ln.load(str(tmp_path / "packed"))[0], tmp_path / "adapter")
    result = ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized", dtype="float32", measure_tokens=0)
    assert result["targets"] == ["dequantized", "nf4"]
    torch.testing.assert_close(logits(theirs(tmp_path / "merged"), some_ids()), logits(live, some_ids()), **FP32)
    ln.merge(tmp_path / "adapter", tmp_path / "again", onto="nf4", measure_tokens=0, force=True)
    expected = ln.load(str(tmp_path / "merged"), quant=QuantConfig(block_size=32))[0]
    same_packed(ln.load(str(tmp_path / "again"))[0], expected)


def test_gptq_leaves_experts_to_rounding_and_says_so(rows, tokenizer, tmp_path):
    folder, quant = folder_of("qwen3_moe", tmp_path / "model", tokenizer), QuantConfig(quant_type="int3", block_size=32)
    options = {"calibration": rows, "calibration_tokens": 256, "max_length": 16, "device": "cpu"}
    record = ln.quantize_model(str(folder), tmp_path / "out", quant=quant, **options)
    nearest, found = ln.load(str(folder), quant=quant)[0], ln.load(str(tmp_path / "out"))[0]
    assert record["rounded_to_nearest"] == sorted(named_experts(nearest))
    assert not dense_experts(found)
    for path, module in named_experts(nearest).items():
        assert torch.equal(named_experts(found)[path].weight.dequantize(), module.weight.dequantize())
    changed = found.model.layers[1].self_attn.q_proj.weight.dequantize()
    assert not torch.equal(changed, nearest.model.layers[1].self_attn.q_proj.weight.dequantize())


def test_experts_that_were_left_dense_stay_so(tokenizer, tmp_path):
    """By name: in the checkpoint, in what an adapter says of its base, and in the merge."""
    folder, quant = folder_of("qwen3_moe", tmp_path / "model", tokenizer), QuantConfig(skip_modules=["lm_head", "experts"])
    record = ln.quantize_model(str(folder), tmp_path / "out", rounding="rtn", quant=quant)
    assert record["format"] == "bnb-4bit"
    assert 0 < record["dense_experts"] < 1
    live, _ = ln.load(str(folder), quant=quant)
    assert torch.equal(logits(ln.load(str(tmp_path / "out"))[0], some_ids()), logits(live, some_ids()))
    random_adapter(live, tmp_path / "adapter")
    ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized", measure_tokens=0)
    torch.testing.assert_close(logits(theirs(tmp_path / "merged"), some_ids()), logits(live, some_ids()), **FP32)


def test_what_formats_of_others_cannot_hold_is_refused_by_name(tokenizer, tmp_path):
    folder, out = str(folder_of("mixtral", tmp_path / "model", tokenizer)), tmp_path / "out"
    said = r"experts of a mixture \(model.layers.0.mlp.experts.down_proj, ...\)?.*--skip-modules lm_head experts"
    for name in ("bnb-4bit", "compressed-tensors", "gptq"):
        with pytest.raises(ConfigError, match=said):
            ln.quantize_model(
                folder,
                out,
                rounding="rtn",
                format=name,
                quant=QuantConfig(quant_type="nf4" if "bnb" in name else "int4", block_size=32),
            )
    with pytest.raises(ConfigError, match=r"its experts \(model.layers.0.mlp.experts.down_proj, ...\) are \d+% of the model"):
        ln.quantize_model(folder, out, bits=4.5)
    with pytest.raises(ConfigError, match=r"no place for the experts of a mixture \(model.layers.0.mlp.experts.down_proj"):
        ln.export(folder, out, "bnb-4bit")
    assert not out.exists()


def test_an_adapter_of_other_experts_is_not_merged(tokenizer, tmp_path):
    model, _ = ln.load(str(folder_of("mixtral", tmp_path / "model", tokenizer)), quant="nf4")
    random_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"
    save_file({**tensors, key: tensors[key][:-4]}, file)
    with pytest.raises(AdapterError, match=r"experts.base_layer.lora_A.weight' has shape \(12, 64\), not \(16, 64\)"):
        ln.merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "model"), onto="original", measure_tokens=0)


def test_dense_experts_beside_packed_layers_are_told(tokenizer, tmp_path):
    """As bitsandbytes leaves them: its file does not name them."""
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    ln.quantize_model(str(folder), tmp_path / "out", rounding="rtn", quant=QuantConfig(skip_modules=["lm_head", "experts"]))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"weights of experts dense \(model.layers.0.mlp.experts.gate_up_proj, ...: \d+% of the"):
        ln.load(str(tmp_path / "out"))


def test_transformers_is_told_what_it_cannot_load(tokenizer, tmp_path):
    from lownibble.integrations.transformers import NF4Config

    folder = folder_of("mixtral", tmp_path / "model", tokenizer)
    ln.quantize_model(str(folder), tmp_path / "packed", rounding="rtn", quant=QuantConfig(block_size=32))
    with pytest.raises(ConfigError, match=r"experts of a mixture packed \(model.layers.0.mlp.experts.down_proj, ...\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    with pytest.warns(UserWarning, match=r"experts of MixtralForCausalLM .* stay dense: NF4Config packs linear layers"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config())
