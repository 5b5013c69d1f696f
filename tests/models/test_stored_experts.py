"""Mixtures whose experts other tools have quantised. Oracles: the published layouts, written out in `quantised.py`, with the
dense weights that they stand for; transformers' own dequantisation."""

import json
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from mixtures import logits, some_ids
from quantised import awq, fp8, fp8_experts, gptq, mxfp4
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lownibble as ln
from lownibble import stored
from lownibble.cli.main import main
from lownibble.config import PlanConfig
from lownibble.errors import ConfigError, ModelError
from lownibble.lora import lora_layers
from lownibble.lora.experts import LoraExperts, named_experts
from lownibble.models import experts
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.formats import find
from lownibble.models.info import info
from lownibble.models.sources import ModelSource
from lownibble.planning.plan import as_stored
from lownibble.quant import QuantLinear, layouts
from lownibble.registry import CODECS

WEIGHTS = "model.safetensors"


@pytest.fixture
def oss(tokenizer, tmp_path):
    """A gpt-oss whose experts are stored in MXFP4: (folder, dense weights by name)."""
    folder = tmp_path / "oss"
    config = GptOssConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=96, pad_token_id=0, eos_token_id=1, sliding_window=32,
    )  # fmt: skip
    write(GptOssForCausalLM, config, folder, tokenizer)
    return folder, mxfp4(folder)


@pytest.fixture
def qwen(tokenizer, tmp_path):
    """A dense mixture whose experts are stored one by one."""
    folder = tmp_path / "qwen"
    config = Qwen3MoeConfig(
        hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, vocab_size=96, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    write(Qwen3MoeForCausalLM, config, folder, tokenizer)
    return folder


def write(kind, config, folder, tokenizer):
    """Every parameter random: biases and attention's sinks matter."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((1 if "norm" in name else 0) + 0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder, **options):
    """The model, and what was warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = ln.load(str(folder), **options)
    return model, [str(each.message) for each in caught if "is stored as" in str(each.message)]


def transformers_reading(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.float().eval()  # transformers 5.17 decodes MXFP4 into bfloat16


def dense_model(folder, dense):
    """The model of the folder's config with the given weights, those of experts fused or one by one."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    other = folder.with_name("dense")
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    given = {key.removesuffix(".weight") for key in dense}
    kept = {
        key: tensor for key, tensor in load_file(folder / WEIGHTS).items()
        if key not in given and not any(key.startswith((f"{path}.", f"{path}_")) for path in given if not key.endswith("bias"))
    }  # fmt: skip
    save_file({**kept, **{key: t.contiguous() for key, t in dense.items()}}, other / WEIGHTS, metadata={"format": "pt"})
    return transformers_reading(other)


def rows_in(file):
    file.write_text("".join(json.dumps({"prompt": "abcdefgh"[i:], "completion": "ijklmnop"[i:]}) + "\n" for i in range(8)))


def held(model):
    """Path -> (codec, block size, double_quant) of the packed weights of experts."""
    facts = {path: module.weight.facts() for path, module in named_experts(model).items() if isinstance(module, QuantLinear)}
    return {path: (each["quant_type"], each["block_size"], each["double_quant"]) for path, each in facts.items()}


def test_mxfp4_experts_keep_their_numbers(oss):
    folder, dense = oss
    tensors = load_file(folder / WEIGHTS)
    for quant in (None, "nf4"):
        model, said = load(folder, quant=quant)
        assert held(model) == dict.fromkeys(dense, ("mxfp4", 32, False)), "not one dense expert is left"
        assert sum(isinstance(module, QuantLinear) for module in model.modules()) == len(dense), "and nothing else is packed"
        for name, module in named_experts(model).items():
            decoded = module.weight.dequantize(torch.float32).transpose(1, 2)
            theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
            assert torch.equal(decoded, theirs)
            assert torch.equal(decoded, dense[name])
            assert module.weight.nbytes == tensors[f"{name}_blocks"].nbytes + tensors[f"{name}_scales"].nbytes
        torch.testing.assert_close(
            logits(model, some_ids()), logits(transformers_reading(folder), some_ids()), rtol=1e-4, atol=1e-4
        )
    assert said == [
        f"'{folder}' is stored as MXFP4 experts: its layers are kept as they are stored (as mxfp4), not packed as nf4."
    ]
    assert info(model).base["stored_as"] == "MXFP4 experts"


def test_any_code_and_exponent_is_transformers(oss):
    folder, _ = oss
    generator, tensors = torch.Generator().manual_seed(1), load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if key.endswith(("_blocks", "_scales")):
            low, high = (0, 256) if key.endswith("_blocks") else (10, 245)
            tensor.copy_(torch.randint(low, high, tensor.shape, generator=generator, dtype=torch.uint8))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model, _ = load(folder)
    for name, module in named_experts(model).items():
        theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
        assert torch.equal(module.weight.dequantize(torch.float32).transpose(1, 2), theirs)


def test_mxfp4_is_read_expert_by_expert(oss, monkeypatch):
    folder, dense = oss
    checkpoint = Checkpoint(ModelSource(folder, "oss"))
    layers = find(checkpoint, checkpoint.stored).layers
    assert {name: layer.shape for name, layer in layers.items()} == {name: tensor.shape for name, tensor in dense.items()}
    monkeypatch.setattr(checkpoint, "read", lambda key: pytest.fail(f"'{key}' was read whole"))
    for name, layer in layers.items():
        assert torch.equal(layer.packed(torch.bfloat16).dequantize(torch.float32).transpose(1, 2), dense[name])
        assert torch.equal(layer.dense(), dense[name])


def test_a_gpt_oss_as_published_trains_with_qlora(oss, peft, tmp_path, capsys):
    """Loaded, trained on experts and attention, saved, loaded again; PEFT has the same logits on the decoded model."""
    folder, dense = oss
    rows_in(tmp_path / "rows.jsonl")
    options = {"max-steps": 3, "batch-size": 2, "r": 2, "max-length": 16, "learning-rate": 0.02, "dtype": "float32"}
    given = {"model": folder, "data": tmp_path / "rows.jsonl", "method": "qlora", "output": tmp_path / "run", **options}
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["train", *arguments, "--device", "cpu", "--json"])
    assert code == 0, capsys.readouterr().err
    adapter, (model, _) = tmp_path / "run" / "adapter", load(folder)
    before = logits(model, some_ids())
    ln.load_adapter(model, adapter)
    expected = logits(model.eval(), some_ids())
    assert (expected - before).abs().max() > 1e-3, "it was trained"
    layers = dict(lora_layers(model, "default"))
    adapted = {path for path, layer in layers.items() if isinstance(layer, LoraExperts)}
    assert adapted == dense.keys()
    assert len(layers) == len(adapted) + 2 * 4, "attention's layers"
    saved = load_file(adapter / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for key, tensor in saved.items() if "experts" in key and "lora_B" in key)
    reference = peft.PeftModel.from_pretrained(transformers_reading(folder), adapter).eval()
    torch.testing.assert_close(logits(reference, some_ids()), expected, rtol=1e-4, atol=1e-4)
    ln.save_adapter(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)


def test_its_adapters_are_merged_and_it_is_exported(oss, adapt, tmp_path):
    folder, dense = oss
    live, adapter = adapt(folder, None)
    ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    merged = transformers_reading(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, some_ids()), logits(live, some_ids()), rtol=1e-3, atol=1e-3)
    ln.merge(adapter, tmp_path / "packed", onto="mxfp4", measure_tokens=0, force=True)
    packed, _ = load(tmp_path / "packed")
    assert held(packed) == dict.fromkeys(dense, ("mxfp4", 32, False))
    ln.export(str(folder), tmp_path / "dense", "safetensors")
    exported = load_file(tmp_path / "dense" / WEIGHTS)
    assert all(torch.equal(exported[name].float(), tensor) for name, tensor in dense.items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_are_refused_on_mxfp4(oss, method, tmp_path):
    folder, _ = oss
    how = stored.of_folder(folder)
    assert "stored as MXFP4 experts, on which qlora trains. Take qlora" in stored.why_not(how, method)
    assert not stored.why_not(how, "qlora")
    with pytest.raises(ConfigError, match="MXFP4 experts, on which qlora trains"):
        ln.plan(str(folder), gpu="rtx-4090", method=method)
    rows_in(tmp_path / "rows.jsonl")
    with pytest.raises(ModelError, match=r"holds quantised weights. Train it with --method qlora"):
        ln.run(ln.RunConfig(
            model=str(folder), method=method, data={"path": str(tmp_path / "rows.jsonl")}, train={"max_steps": 1}
        ))  # fmt: skip


def test_config_json_says_that_experts_alone_are_mxfp4(oss):
    how = stored.of_folder(oss[0])
    assert stored.codec(how) == ln.QuantConfig(quant_type="mxfp4")
    assert stored.is_quantised(how, "model.layers.0.mlp.experts.gate_up_proj")
    assert not stored.is_quantised(how, "model.layers.0.self_attn.q_proj")
    assert not stored.is_quantised({"quant_method": "mxfp4"}, "model.layers.0.mlp.router")


def test_a_plan_of_mxfp4_packs_experts_alone(oss):
    linears = {f"model.layers.0.self_attn.{name}_proj": 64 for name in "qkvo"}
    model = SimpleNamespace(counts=SimpleNamespace(linears=linears))
    config, said = as_stored(PlanConfig(model=str(oss[0])), model)
    assert said == "stored as MXFP4 experts, and trained on as it is, with qlora"
    shapes = {**dict.fromkeys(linears, (64, 64)), "model.layers.0.mlp.experts.down_proj": (4, 64, 96)}
    chosen = layouts.choose(shapes, config.quant, ["lm_head"])
    assert {path: how.quant_type for path, how in chosen.items()} == {"model.layers.0.mlp.experts.down_proj": "mxfp4"}


@pytest.mark.parametrize(
    "damage",
    [lambda t: t[:, :-1], lambda t: t.unsqueeze(-1), lambda t: t.to(torch.int32)],
    ids=["fewer rows", "more dimensions", "another type"],
)
def test_damaged_mxfp4_is_one_clear_error(oss, damage):
    folder, dense = oss
    tensors, name = load_file(folder / WEIGHTS), next(iter(dense))
    tensors[f"{name}_scales"] = damage(tensors[f"{name}_scales"]).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"'{name}' cannot be read: its blocks and scales do not belong together"):
        ln.load(str(folder))


def test_mxfp4_of_other_sizes_is_refused(oss):
    folder, _ = oss
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_local_experts": 3}))
    with pytest.raises(ModelError, match=r"experts\.down_proj' has shape \(4, 64, 96\); config.json says otherwise"):
        ln.load(str(folder))


LISTED = {
    "FP8 blocks": (fp8, {"block": (64, 64)}, ("fp8", 64, False)),
    "FP8 ragged blocks": (fp8, {"block": (48, 64)}, ("fp8", 64, False)),
    "FP8 tensors": (fp8, {"per": "tensor"}, ("fp8", "row", False)),
    "GPTQ": (gptq, {"symmetric": False}, ("int4", 32, False)),
    "GPTQ rows": (gptq, {"size": -1, "symmetric": False}, ("int4", "row", False)),
    "GPTQ 3 bits": (gptq, {"bits": 3, "symmetric": False, "version": "gptq_v2"}, ("int3", 32, False)),
    "GPTQ 8 bits": (gptq, {"bits": 8}, ("int8", 32, False)),
    "AWQ": (awq, {}, ("int4", 32, False)),
}


@pytest.mark.parametrize("case", LISTED)
def test_experts_stored_one_by_one_are_stacked_as_they_are(qwen, case):
    """Nothing is decoded: gate and up are rows of one packed weight, the experts entries of one stack."""
    writer, options, codec = LISTED[case]
    dense = writer(qwen, **options)
    model, said = load(qwen)
    assert held(model) == dict.fromkeys(experts.shapes(transformers_model(qwen)), codec)
    assert not said
    reference = dense_model(qwen, dense)
    for path, module in named_experts(model).items():
        torch.testing.assert_close(module.weight.dequantize(torch.float32), reference.get_parameter(path).data, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits(model, some_ids()), logits(reference, some_ids()), rtol=1e-4, atol=1e-4)


def transformers_model(folder):
    """The empty model of a folder."""
    from lownibble.models import skeleton

    return skeleton(ModelSource(folder, "model"), torch.float32)


def test_compressed_tensors_experts_are_stacked(qwen):
    from test_formats import SCHEMES, compressed

    dense = compressed(qwen, SCHEMES["int4 asymmetric"][0] | {"group_size": 32})
    model, said = load(qwen)
    assert set(held(model).values()) == {("int4", 32, False)}
    assert not said
    torch.testing.assert_close(logits(model, some_ids()), logits(dense_model(qwen, dense), some_ids()), rtol=1e-3, atol=1e-3)


def in_4_bits(folder, double_quant=True):
    """bitsandbytes' file of every linear layer; returns the dense weights."""
    config, tensors, dense = ln.QuantConfig(double_quant=double_quant), load_file(folder / WEIGHTS), {}
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        packed, path = ln.quantize(tensors.pop(key), config), key.removesuffix(".weight")
        dense[key] = packed.dequantize()
        tensors |= {name: tensor.clone() for name, tensor in CODECS["nf4"].write(path, packed).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    file = folder / "config.json"
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": how}))
    return dense


def test_4_bit_experts_whose_blocks_go_on_are_decoded_and_said(tokenizer, tmp_path):
    folder = tmp_path / "odd"
    config = Qwen3MoeConfig(
        hidden_size=40, intermediate_size=40, moe_intermediate_size=20, num_hidden_layers=1, num_attention_heads=4, head_dim=10,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=96, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    write(Qwen3MoeForCausalLM, config, folder, tokenizer)
    dense = in_4_bits(folder)
    model, said = load(folder)
    assert list(held(model)) == ["model.layers.0.mlp.experts.down_proj"]
    assert re.search(
        r"is stored as bitsandbytes: 1 tensors \(fused experts and the like; \d+% of the model\) were decoded", said[0]
    )
    torch.testing.assert_close(logits(model, some_ids()), logits(dense_model(folder, dense), some_ids()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_4_bit_experts_stored_one_by_one_are_stacked(qwen, double_quant):
    """bitsandbytes' files; doubly quantised constants of gate and up are joined decoded, with the same values."""
    dense = in_4_bits(qwen, double_quant)
    model, said = load(qwen)
    assert not said
    reference = dense_model(qwen, dense)
    for path, (quant_type, _, doubly) in held(model).items():
        assert (quant_type, doubly) == ("nf4", double_quant and path.endswith("down_proj"))
    for path, module in named_experts(model).items():
        assert torch.equal(module.weight.dequantize(torch.float32), reference.get_parameter(path).data)
    torch.testing.assert_close(logits(model, some_ids()), logits(reference, some_ids()), rtol=1e-4, atol=1e-4)


def test_act_order_that_gate_and_up_share_is_kept(qwen):
    """As GPTQ makes it: the order follows the inputs, which both have."""
    dense = gptq(qwen, act_order=True, order_of=lambda path: path.replace("up_proj", "gate_proj"))
    model, said = load(qwen)
    assert set(held(model).values()) == {("int4_act", 32, False)}
    assert len(held(model)) == 4
    assert not said
    torch.testing.assert_close(logits(model, some_ids()), logits(dense_model(qwen, dense), some_ids()), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_stacked_is_decoded_and_said(qwen):
    """The columns of gate and up are in different orders, so their rows are no rows of one weight."""
    dense = gptq(qwen, act_order=True)
    model, said = load(qwen)
    assert set(held(model)) == {f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)}
    share = sum(2 * 4 * 128 * 64 for _ in range(2)) / sum(p.numel() for p in transformers_model(qwen).parameters())
    assert f"2 tensors (fused experts and the like; {share:.0%} of the model) were decoded and are held in float32" in said[0]
    torch.testing.assert_close(logits(model, some_ids()), logits(dense_model(qwen, dense), some_ids()), rtol=1e-4, atol=1e-4)


def test_experts_with_different_options_are_decoded(qwen):
    before = load_file(qwen / WEIGHTS)
    dense = fp8(qwen, block=(64, 64))
    tensors, path = load_file(qwen / WEIGHTS), "model.layers.0.mlp.experts.2.down_proj"
    for end in ("weight", "weight_scale_inv"):
        del tensors[f"{path}.{end}"]
    dense[f"{path}.weight"] = tensors[f"{path}.weight"] = before[f"{path}.weight"]
    save_file(tensors, qwen / WEIGHTS, metadata={"format": "pt"})
    model, said = load(qwen)
    assert "model.layers.0.mlp.experts.down_proj" not in held(model)
    assert len(held(model)) == 3
    assert "1 tensors (fused experts and the like; " in said[0]
    torch.testing.assert_close(logits(model, some_ids()), logits(dense_model(qwen, dense), some_ids()), rtol=1e-4, atol=1e-4)


def test_experts_without_a_codec_are_packed_again_as_asked(qwen):
    gptq(qwen, bits=5, version="gptq_p")
    model, said = load(qwen, quant="nf4")
    assert set(held(model).values()) == {("nf4", 64, True)}
    assert "4 weights of experts were decoded and packed again as nf4" in said[0]


def test_experts_of_pairs_of_e2m1_codes_are_mxfp4(qwen):
    """As DeepSeek V4's: int8 bytes of two codes, exponents of 32 columns; other layers in FP8. Oracle: transformers' reading."""
    fp8(qwen, block=(64, 64))
    tensors, dense, generator = load_file(qwen / WEIGHTS), {}, torch.Generator().manual_seed(2)
    for key in [key for key in tensors if ".experts." in key and key.endswith(".weight")]:
        n_out, n_in = tensors[key].shape
        codes = torch.randint(-128, 128, (n_out, n_in // 2), generator=generator, dtype=torch.int8)
        scale = torch.randint(120, 124, (n_out, n_in // 32), generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        tensors |= {key: codes, f"{key}_scale_inv": scale}
        dense[key] = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    save_file(tensors, qwen / WEIGHTS, metadata={"format": "pt"})
    model, _ = load(qwen)
    assert set(held(model).values()) == {("mxfp4", 32, False)}
    assert model.model.layers[0].self_attn.q_proj.quant_type == "fp8"
    for path, module in named_experts(model).items():
        names = ("gate_proj", "up_proj") if path.endswith("gate_up_proj") else ("down_proj",)
        folder = path.rpartition(".")[0]
        expected = torch.stack([torch.cat([dense[f"{folder}.{expert}.{name}.weight"] for name in names]) for expert in range(4)])
        assert torch.equal(module.weight.dequantize(torch.float32), expected)


@pytest.mark.parametrize("block", [(64, 64), (64, 32), None], ids=str)
def test_fused_fp8_experts_keep_their_numbers(qwen, block):
    fuse(qwen)
    dense = fp8_experts(qwen, block)
    tensors, (model, said) = load_file(qwen / WEIGHTS), load(qwen)
    assert held(model) == dict.fromkeys(dense, ("fp8", block[1] if block else "row", False))
    assert not said
    for path, module in named_experts(model).items():
        theirs = Fp8Dequantize(None)._dequantize_one(tensors[path], tensors[f"{path}_scale_inv"], torch.float32)
        assert torch.equal(module.weight.dequantize(torch.float32), theirs)
        assert torch.equal(theirs, dense[path])
    torch.testing.assert_close(logits(model, some_ids()), logits(dense_model(qwen, dense), some_ids()), rtol=1e-4, atol=1e-4)


def fuse(folder):
    """Write the experts as the model holds them."""
    names, model = experts.shapes(transformers_model(folder)), transformers_reading(folder)
    tensors = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if ".experts." not in key}
    save_file(tensors | {name: model.get_parameter(name).data for name in names}, folder / WEIGHTS, metadata={"format": "pt"})


def test_scales_of_other_experts_are_refused(qwen):
    fuse(qwen)
    fp8_experts(qwen, (64, 64))
    tensors, name = load_file(qwen / WEIGHTS), "model.layers.1.mlp.experts.down_proj"
    tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:3].contiguous()
    save_file(tensors, qwen / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"scales of shape \(3, 2, 1\) do not belong to a weight of \(4, 128, 64\)"):
        ln.load(str(qwen))


@pytest.mark.parametrize("quant_type", sorted(CODECS))
def test_rows_of_several_weights_are_joined_by_every_codec(quant_type):
    """Joined, a weight has the values of its parts; with one zero point in four bits a part ends within a byte. Without
    statistics, columns are in the order of their places."""
    codec, generator = CODECS[quant_type], torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, 64, generator=generator) for rows in (3, 6)]
    for options in ({"block_size": 32}, {"block_size": 64, "double_quant": False}):
        config = ln.QuantConfig(quant_type=quant_type, **({} if quant_type == "mxfp4" else options))
        how = codec.below(config, [part.shape for part in parts])
        packed = [codec.quantize(part, config) for part in parts]
        whole = codec.join(packed)
        assert how == codec.options(whole.facts())
        assert torch.equal(whole.dequantize(), torch.cat([each.dequantize() for each in packed]))
        said = codec.layout(whole.shape, how)
        assert {name: tuple(t.shape) for name, t in whole.tensors().items()} == {name: spec.shape for name, spec in said.items()}


def test_blocks_that_go_on_in_the_next_weight_are_not_joined():
    assert CODECS["nf4"].below(ln.QuantConfig(), [(3, 48), (3, 48)]) is None
