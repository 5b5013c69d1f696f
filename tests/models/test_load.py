"""Loading models. Oracles: transformers' own `from_pretrained` for dense weights, `quantize` for packed ones."""

import json

import pytest
import torch
from pairwise import pairwise
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lownibble as ln
from lownibble.errors import ConfigError, ModelError
from lownibble.lora import match_targets
from lownibble.models.load import quantizable
from lownibble.quant import QuantLinear

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {},
    "mistral": {},
    "phi": {},
}
LOGITS = {torch.float32: 2e-5, torch.bfloat16: 0.06}
"""Absolute, on logits of order 3: the same operations on the same values; bf16 sums may be split otherwise."""


def logits(model, batch):
    ids, mask, _ = batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def dequantised(model, reference):
    """`reference` with the values of `model`'s packed weights."""
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            linear = reference.get_submodule(path)
            linear.weight = nn.Parameter(module.weight.dequantize(linear.weight.dtype))
    return reference


@pytest.mark.parametrize(("family", "shards", "dtype"), pairwise(list(FAMILIES), [False, True], list(LOGITS)), ids=str)
def test_dense_equals_transformers(write, batch, family, shards, dtype):
    folder = write(family.split()[0], shards=shards, **FAMILIES[family])
    assert len(list(folder.glob("*.safetensors"))) > 1 if shards else (folder / "model.safetensors").exists()
    model, _ = ln.load(str(folder), dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(logits(model, batch), logits(theirs, batch))
    mine, other = model.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) and mine[key].dtype == other[key].dtype for key in mine)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), theirs.buffers(), strict=True))
    assert not model.training
    assert model.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("family", "shards", "dtype"), pairwise(list(FAMILIES), [False, True], list(LOGITS)), ids=str)
def test_quantised_equals_quantize_of_each_weight(write, batch, family, shards, dtype):
    folder = write(family.split()[0], shards=shards, **FAMILIES[family])
    config = ln.QuantConfig(quant_type="nf4", block_size=32)
    model, _ = ln.load(str(folder), quant=config, dtype=dtype)
    stored = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    packed = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    head = {"lm_head"}
    assert packed.keys() == {path for path, m in theirs.named_modules() if isinstance(m, nn.Linear)} - head
    for path, module in packed.items():
        expected = ln.quantize(stored[f"{path}.weight"], config)
        for part in ("codes", "absmax", "nested_absmax", "offset"):
            assert torch.equal(getattr(module, part), getattr(expected, part)), (path, part)
        assert (module.bias is None) == (theirs.get_submodule(path).bias is None)
        assert module.weight.dtype == dtype
        assert not any(p.requires_grad for p in module.parameters())
    atol = LOGITS[dtype]
    torch.testing.assert_close(logits(model, batch), logits(dequantised(model, theirs), batch), rtol=0, atol=atol)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("quant", [None, "nf4", ln.QuantConfig(skip_modules=[])])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_tied_embeddings_stay_tied(write, family, quant):
    folder = write(family, tie_word_embeddings=True)
    model, _ = ln.load(str(folder), quant=quant)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in {name for name, _ in model.named_parameters()}


def test_an_untied_head_is_quantised_when_asked(write):
    model, _ = ln.load(str(write(tie_word_embeddings=False)), quant=ln.QuantConfig(skip_modules=[]))
    assert isinstance(model.lm_head, QuantLinear)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["lm_head", "q_proj"], "q_proj"),
        (["model.layers.0"], "model.layers.0."),
        (["mlp.up_proj"], "mlp.up_proj"),
        (["self_attn"], "self_attn."),
    ],
)
def test_skip_modules(write, skip, left):
    model, _ = ln.load(str(write()), quant=ln.QuantConfig(skip_modules=skip))
    linears = {path for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    packed = {path for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {path for path in linears | packed if left in path} == linears - ({"lm_head"} if "lm_head" in skip else set())
    assert "lm_head" in (linears if "lm_head" in skip else packed)


def test_skip_modules_that_match_nothing(write):
    with pytest.raises(ConfigError, match=r"skip_modules 'c_attn' matches no linear module. Linear modules: down_proj, "):
        ln.load(str(write()), quant=ln.QuantConfig(skip_modules=["c_attn"]))


def test_quantizable_leaves_tied_heads(tiny):
    config = ln.QuantConfig(skip_modules=[])
    assert "lm_head" in quantizable(tiny(), config)
    assert "lm_head" not in quantizable(tiny(tie_word_embeddings=True), config)


def test_nothing_to_quantise(write):
    """A 4-bit model was asked for and would silently not be one."""
    with pytest.raises(ModelError, match=r"LlamaForCausalLM has no linear module to quantise .*Load it with quant=None"):
        ln.load(str(write()), quant=ln.QuantConfig(skip_modules=["self_attn", "mlp", "lm_head"]))


def test_conv1d_is_packed_by_output_rows(write, batch):
    """GPT-2 keeps weights as (in, out). Oracle: the same weights, turned, packed and decoded."""
    folder = write("gpt2")
    dense, _ = ln.load(str(folder))
    packed, _ = ln.load(str(folder), quant="nf4")
    layers = {path: m for path, m in packed.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 8
    for path, layer in layers.items():
        weight = dense.get_submodule(path).weight
        assert torch.equal(layer.weight.dequantize(torch.float32), ln.quantize(weight.t().contiguous(), "nf4").dequantize())
        weight.data.copy_(layer.weight.dequantize(torch.float32).t())
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = dense(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(packed(input_ids=ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4)


def test_linears_with_a_forward_of_their_own_are_left(tiny):
    """Routers derive from `nn.Linear` and return something else."""

    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).topk(2)

    model = tiny()
    model.model.layers[0].mlp.router = Router(32, 4)
    path = "model.layers.0.mlp.router"
    assert path not in quantizable(model, ln.QuantConfig())
    assert path not in match_targets(model, ln.LoraConfig())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_generation(write, batch, family):
    """Greedy tokens of the packed model equal those of the dense model that carries its values."""
    folder = write(family)
    model, _ = ln.load(str(folder), quant="nf4")
    theirs = dequantised(model, AutoModelForCausalLM.from_pretrained(folder))
    ids, _, _ = batch()
    tokens = [
        m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False) for m in (model, theirs)
    ]
    assert torch.equal(*tokens)
    assert tokens[0].shape[1] > ids.shape[1]


def test_lora_on_a_loaded_model_round_trips(write, batch, tmp_path):
    folder = str(write("qwen2", tie_word_embeddings=True))
    model = ln.add_lora(ln.load(folder, quant="nf4")[0], ln.LoraConfig(r=2, bias="lora_only", init_lora_weights=False))
    ln.save_adapter(model, tmp_path / "adapter")
    again = ln.load_adapter(ln.load(folder, quant="nf4")[0], tmp_path / "adapter")
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_weights_under_other_names_beside_the_model(write, batch):
    """Mistral's repositories hold `consolidated.safetensors` beside the weights: the same under other names."""
    folder = write()
    expected = logits(ln.load(str(folder))[0], batch)
    weights = load_file(folder / "model.safetensors")
    save_file({f"consolidated.{key}": value for key, value in weights.items()}, folder / "consolidated.safetensors")
    assert torch.equal(logits(ln.load(str(folder))[0], batch), expected)


@pytest.mark.parametrize("shards_left", [False, True])
def test_a_model_saved_over_its_shards(write, batch, shards_left):
    """transformers deletes the shards and leaves their index; other tools leave both."""
    folder = write(shards=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    if shards_left:
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        model.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    assert bool([*folder.glob("model-*")]) == shards_left
    expected = logits(AutoModelForCausalLM.from_pretrained(folder), batch)
    torch.testing.assert_close(logits(ln.load(str(folder))[0], batch), expected, rtol=0, atol=LOGITS[torch.float32])


@pytest.mark.parametrize("first", ["weight", "bias"])
def test_biases_in_another_shard_than_their_weights(write, batch, first):
    folder = write(attention_bias=True)
    expected = logits(ln.load(str(folder), quant="nf4")[0], batch)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {"one": {}, "two": {}}
    for key, value in weights.items():
        shards["one" if key.endswith(first) else "two"][key] = value
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    index = {"weight_map": {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(ln.load(str(folder), quant="nf4")[0], batch), expected)


UP = "model.layers.0.mlp.up_proj.weight"


def rewrite(folder, change):
    """Change the tensors of a folder's file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_values_beyond_float16_are_refused(write, stored, quant):
    folder = write(dtype=stored)
    rewrite(folder, lambda t: t[UP][0, :2].copy_(torch.tensor([-70000.0, 3])))
    with pytest.raises(ModelError, match=rf"'{UP}' has a value of 7\d+, and float16 ends at 65504\. Take --dtype bfloat16"):
        ln.load(str(folder), quant=quant, dtype="float16")
    ln.load(str(folder), quant=quant, dtype="bfloat16")
    rewrite(folder, lambda t: t[UP][0, 0].fill_(-65280))
    model, _ = ln.load(str(folder), quant=quant, dtype="float16")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.isfinite(weight if quant is None else weight.dequantize()).all()


@pytest.mark.parametrize("stored", [torch.float64, torch.float8_e4m3fn])
def test_other_types_are_packed_as_their_values(write, batch, stored):
    """Weights in a type that no codec takes, and no quantization_config that says so."""
    folder, plain = write(), write(name="plain")
    rewrite(folder, lambda t: t.update({key: value.to(stored) for key, value in t.items() if "proj" in key}))
    rewrite(plain, lambda t: t.update({key: value.to(stored).float() for key, value in t.items() if "proj" in key}))
    for quant in (None, "nf4"):
        expected = logits(ln.load(str(plain), quant=quant)[0], batch)
        assert torch.equal(logits(ln.load(str(folder), quant=quant)[0], batch), expected)


def test_a_missing_pad_token_becomes_the_end_token(write):
    _, tokenizer = ln.load(str(write()))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_loading_is_silent(write, capfd):
    folder = str(write(shards=True))
    capfd.readouterr()
    ln.load(folder, quant="nf4")
    assert capfd.readouterr() == ("", "")
