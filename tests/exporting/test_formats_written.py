"""Checkpoints of `lownibble quantize` in others' layouts. Oracles: what was packed in memory; compressed-tensors, through
transformers; GPTQModel's decoding, transcribed."""

import json
import re
import warnings

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from safetensors.torch import load_file
from tiny_folders import WORDS, write_model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

import lownibble as ln
from lownibble import stored
from lownibble.config import QuantConfig
from lownibble.errors import ConfigError, QuantizationError
from lownibble.exporting import quantize as quantizing
from lownibble.models.formats.write import WRITERS
from lownibble.quant import QuantLinear
from lownibble.quant.bits import pack_words, unpack_words

OPTIONS = {"calibration_tokens": 600, "max_length": 32, "device": "cpu"}


def base_of(folder, dtype):
    """A model in `dtype` whose rows are whole groups of 64; each layer of other shapes."""
    write_model(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(WORDS) + 3, tie_word_embeddings=True, eos_token_id=1, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def base(request, tmp_path):
    return base_of(tmp_path / "base", request.param)


@pytest.fixture
def base16(tmp_path):
    return base_of(tmp_path / "base", torch.bfloat16)


@pytest.fixture
def rows(tmp_path):
    generator = torch.Generator().manual_seed(4)
    file = tmp_path / "rows.jsonl"
    drawn = torch.randint(0, len(WORDS), (60, 14), generator=generator)
    file.write_text("".join(json.dumps({"text": " ".join(WORDS[i] for i in row)}) + "\n" for row in drawn.tolist()))
    return file


def layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def dense_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    return {key.removesuffix(".weight"): tensor for key, tensor in tensors.items() if "_proj." in key}


def nearest(folder, name, quant):
    """Path -> the packed weight that `--method rtn` is to write."""
    writer = WRITERS[name]
    quant = writer.options(quant)
    return {
        path: writer.quantize(weight, quant.for_layer(path), weight.dtype, name=path)
        for path, weight in dense_weights(folder).items()
    }


def dtype_of(folder):
    return next(iter(dense_weights(folder).values())).dtype


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[3, 4, 5, 9, 7, 3]])).logits.float()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def by_library(folder, path):
    """compressed-tensors' decoding of a layer, by the scheme that its own matching gives."""
    config = CompressedTensorsConfig(**config_of(folder)).quantization_config
    groups = [group for group in config.config_groups.values() if path in group.targets]
    (scheme,) = groups or config.config_groups.values()
    tensors = load_file(folder / "model.safetensors")
    parts = {key.removeprefix(f"{path}."): tensor for key, tensor in tensors.items() if key.startswith(f"{path}.")}
    weight = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
    return weight.to(next(iter(tensors.values())).dtype) if scheme.format == "mxfp4-pack-quantized" else weight


def transcribed(parts, bits):
    """GPTQModel 7.7 `BaseQuantLinear.dequantize_weight` for one layer, for 2, 4 and 8 bits and for 3 (not planar); (K, N)."""
    qweight, qzeros, scales, g_idx = (parts[name] for name in ("qweight", "qzeros", "scales", "g_idx"))
    if bits == 3:
        wf = torch.tensor(
            [[0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0], [0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31],
             [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0]], dtype=torch.int32,
        ).reshape(1, 3, 12)  # fmt: skip
        zeros = qzeros.reshape(qzeros.shape[0], qzeros.shape[1] // 3, 3, 1).expand(-1, -1, -1, 12)
        zeros = zeros >> wf.unsqueeze(0)
        zeros[:, :, 0, 10] = (zeros[:, :, 0, 10] & 0x3) | ((zeros[:, :, 1, 0] << 2) & 0x4)
        zeros[:, :, 1, 11] = (zeros[:, :, 1, 11] & 0x1) | ((zeros[:, :, 2, 0] << 1) & 0x6)
        zeros = zeros & 0x7
        zeros = torch.cat([zeros[:, :, 0, :11], zeros[:, :, 1, 1:12], zeros[:, :, 2, 1:11]], dim=2).reshape(scales.shape)
        weight = qweight.reshape(qweight.shape[0] // 3, 3, 1, qweight.shape[1]).expand(-1, -1, 12, -1)
        weight = (weight >> wf.unsqueeze(-1)) & 0x7
        weight[:, 0, 10] = (weight[:, 0, 10] & 0x3) | ((weight[:, 1, 0] << 2) & 0x4)
        weight[:, 1, 11] = (weight[:, 1, 11] & 0x1) | ((weight[:, 2, 0] << 1) & 0x6)
        weight = weight & 0x7
        weight = torch.cat([weight[:, 0, :11], weight[:, 1, 1:12], weight[:, 2, 1:11]], dim=1)
    else:
        held, wf = torch.int16 if bits == 8 else torch.int8, torch.arange(0, 32, bits, dtype=torch.int32).unsqueeze(0)
        zeros = (qzeros.unsqueeze(2).expand(-1, -1, 32 // bits) >> wf.unsqueeze(0)).to(held) & (2**bits - 1)
        zeros = zeros.reshape(zeros.shape[0], -1)
        weight = (qweight.unsqueeze(1).expand(-1, 32 // bits, -1) >> wf.unsqueeze(-1)).to(held) & (2**bits - 1)
    weight = weight.reshape(weight.shape[0] * weight.shape[1], weight.shape[2])
    return scales[g_idx.long()] * (weight - zeros[g_idx.long()])


def test_words_are_read_as_they_were_written():
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (3, 45), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        words = pack_words(codes, bits)
        assert words.shape == (3, -(-45 * bits // 32))
        assert torch.equal(unpack_words(words, bits, 45), codes)


COMPRESSED_NAME = "compressed-tensors"

COMPRESSED = {
    "int4": QuantConfig(quant_type="int4", block_size=32),
    "int4 rows": QuantConfig(quant_type="int4", block_size="row"),
    "int3": QuantConfig(quant_type="int3"),
    "int2": QuantConfig(quant_type="int2", block_size=32),
    "int8": QuantConfig(quant_type="int8"),
    "fp8 rows": QuantConfig(quant_type="fp8", block_size="row"),
    "fp8": QuantConfig(quant_type="fp8", block_size=32),
    "mxfp4": QuantConfig(quant_type="mxfp4"),
    "mixed, integers": QuantConfig(
        quant_type="int4", pattern={"down_proj": {"quant_type": "int8"}, "o_proj": {"quant_type": "int3"}}
    ),
    "mixed, int4 and fp8": QuantConfig(quant_type="int4", pattern={"down_proj": {"quant_type": "fp8", "block_size": "row"}}),
    "mixed floats": QuantConfig(quant_type="int8", pattern={"down_proj": {"quant_type": "fp8", "block_size": "row"}}),
    "some dense": QuantConfig(quant_type="int4", skip_modules=["lm_head", "o_proj", "model.layers.1.mlp.up_proj"]),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(base, tmp_path, case):
    """Read by us and by transformers, as config.json says and decoded while loading, it is what was packed."""
    quant, out = COMPRESSED[case], tmp_path / "out"
    record = ln.quantize_model(
        str(base), out, rounding="rtn", quant=quant, format="auto" if case != "mixed, integers" else COMPRESSED_NAME
    )
    assert record["format"] == COMPRESSED_NAME
    expected = nearest(base, "compressed-tensors", quant)
    ours, _ = ln.load(str(out), dtype=dtype_of(base))
    held = layers(ours)
    skipped = quant.skip_modules[1:]
    assert held.keys() == {path for path in expected if not any(f".{name}." in f".{path}." for name in skipped)}
    for path, layer in held.items():
        assert torch.equal(layer.weight.dequantize(torch.float32), expected[path].dequantize(torch.float32)), path
        assert layer.weight.facts()["quant_type"] == quant.for_layer(path).quant_type
        assert torch.equal(by_library(out, path), layer.weight.dequantize()), path
    if "mixed, " in case:  # transformers 5.23 loads no mixture with zero points
        return
    theirs = [AutoModelForCausalLM.from_pretrained(out)]
    if case != "mixed floats":  # while loading it decodes all layers by one scheme
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it takes nothing else from the configuration that it is given
            how = CompressedTensorsConfig(dequantize=True)
            theirs.append(AutoModelForCausalLM.from_pretrained(out, quantization_config=how))
    tolerance = 2e-5 if dtype_of(base) == torch.float32 else 0.02
    for model in theirs:
        same_type = model.to(dtype_of(base)) if case == "mxfp4" else model  # transformers 5.17 decodes it into bfloat16
        torch.testing.assert_close(logits(ours), logits(same_type), rtol=0, atol=tolerance)
        for path, layer in held.items():
            weight = model.get_submodule(path).weight
            assert weight.dtype == layer.weight.dtype
            assert torch.equal(weight, layer.weight.dequantize()), path


GPTQ = {
    "int4": QuantConfig(quant_type="int4", block_size=32),
    "int4 rows": QuantConfig(quant_type="int4", block_size="row"),
    "int3": QuantConfig(quant_type="int3"),
    "int2": QuantConfig(quant_type="int2", block_size=32),
    "int8": QuantConfig(quant_type="int8"),
    "act-order": QuantConfig(quant_type="int4_act", block_size=32),
    "mixed": QuantConfig(quant_type="int4", pattern={"down_proj": {"quant_type": "int8"}, "o_proj": {"block_size": 32}}),
    "some dense": QuantConfig(quant_type="int4", skip_modules=["lm_head", "o_proj", "model.layers.1.mlp.up_proj"]),
}


@pytest.mark.parametrize("case", GPTQ)
def test_gptq(base, tmp_path, case):
    quant, out = GPTQ[case], tmp_path / "out"
    record = ln.quantize_model(str(base), out, rounding="rtn", format="gptq", quant=quant)
    assert record["format"] == "gptq"
    expected, tensors = nearest(base, "gptq", quant), load_file(out / "model.safetensors")
    held, config = layers(ln.load(str(out), dtype=dtype_of(base))[0]), config_of(out)
    for path, layer in held.items():
        parts = {name: tensors[f"{path}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
        bits = stored.of_path(config, path)["bits"]
        weight = expected[path].dequantize(torch.float32)
        assert torch.equal(layer.weight.dequantize(torch.float32), weight), path
        assert torch.equal(transcribed({**parts, "scales": parts["scales"].float()}, bits).t(), weight), path
        assert torch.equal(transcribed(parts, bits).t(), weight.half()), path
        lost = parts["scales"].float() - parts["scales"].to(layer.weight.dtype).float()  # loaders give scales the model's dtype
        assert not lost.any()
    assert config["checkpoint_format"] == "gptq_v2"
    assert {path for path in expected if stored.is_quantised(config, path)} == held.keys()
    assert len(held) == (11 if case == "some dense" else 14)


@pytest.mark.parametrize(("format", "quant_type"), [("compressed-tensors", "int4"), ("gptq", "int4"), ("gptq", "int4_act")])
def test_codes_are_chosen_for_the_scales_that_are_stored(base16, rows, tmp_path, monkeypatch, format, quant_type):
    """What GPTQ made is what others decode."""
    made, by_gptq = {}, quantizing._by_gptq

    def kept(weight, moments, nearest, path):
        made[path] = by_gptq(weight, moments, nearest, path)
        return made[path]

    monkeypatch.setattr(quantizing, "_by_gptq", kept)
    quant = QuantConfig(quant_type=quant_type, block_size=32)
    ln.quantize_model(str(base16), tmp_path / "out", format=format, calibration=str(rows), quant=quant, **OPTIONS)
    held, tensors = layers(ln.load(str(tmp_path / "out"))[0]), load_file(tmp_path / "out" / "model.safetensors")
    assert held.keys() == made.keys()
    for path, packed in made.items():
        assert torch.equal(held[path].weight.dequantize(torch.float32), packed.dequantize(torch.float32))
        if format == "gptq":
            parts = {name: tensors[f"{path}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
            assert torch.equal(parts["g_idx"], parts["g_idx"].sort().values) == (quant_type == "int4"), (
                "in order without act-order"
            )
            weight = transcribed({**parts, "scales": parts["scales"].float()}, 4).t()
            assert torch.equal(weight, packed.dequantize(torch.float32))
        scale = packed.steps().scale
        assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_no_other_code_is_nearer_with_the_scales_that_are_stored(base16, format):
    weight, quant = dense_weights(base16)["model.layers.0.mlp.up_proj"].float(), QuantConfig(quant_type="int4", block_size=32)
    packed = nearest(base16, format, quant)["model.layers.0.mlp.up_proj"]
    steps = packed.steps()
    levels = ((torch.arange(16) - steps.zero[:, None]) * steps.scale[:, None]).view(*weight.shape[:1], -1, 16)
    distance = (weight.view(len(weight), -1, 32, 1) - levels[:, :, None]).abs()
    taken = (weight - packed.dequantize(torch.float32)).abs().view(distance.shape[:-1])
    torch.testing.assert_close(taken, distance.amin(-1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_bits_in_layouts_of_others(base16, rows, tmp_path, format):
    """Each layer's codec is read back, and the planner knows it from config.json."""
    quant = QuantConfig(quant_type="int4", block_size=32)
    options = {"calibration": str(rows), "rounding": "rtn", "quant": quant, "format": format, **OPTIONS}
    record = ln.quantize_model(str(base16), tmp_path / "out", bits=4.5, **options)
    codecs, found = record["mixed"]["codecs"], layers(ln.load(str(tmp_path / "out"))[0])
    assert record["format"] == format
    assert {path: layer.quant_type for path, layer in found.items()} == codecs
    assert len(set(codecs.values())) > 1
    planned = stored.codec(config_of(tmp_path / "out"))
    assert {path: planned.for_layer(path).quant_type for path in codecs} == codecs
    assert record["mixed"]["bits"] <= 4.5


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_it_trains_as_a_quantised_base(base16, rows, tmp_path, format):
    quant = QuantConfig(quant_type="int4", block_size=32)
    ln.quantize_model(str(base16), tmp_path / "out", format=format, calibration=str(rows), quant=quant, **OPTIONS)
    model, _ = ln.load(str(tmp_path / "out"))
    assert {layer.quant_type for layer in layers(model).values()} == {"int4"}
    ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights="loftq"))  # reads the dense model that config.json names
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    ln.save_adapter(model, tmp_path / "adapter")
    merged = ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert merged["onto"] == "dequantized"


def test_what_no_other_layout_holds_is_in_our_own(base16, tmp_path):
    for number, (quant, why) in enumerate({
        "nf3": (QuantConfig(quant_type="nf3"), r"compressed-tensors: it holds int2, .*, and 'model.layers.0.mlp.*' is nf3"),
        "nf4 and fp4": (QuantConfig(pattern={"q_proj": {"quant_type": "fp4"}}), "bnb-4bit: its layers are all packed alike"),
        "nested": (
            QuantConfig(quant_type="int4", pattern={"q_proj": {"double_quant": True}}), "double_quant is asked for in"
        ),
    }.values()):  # fmt: skip
        record = ln.quantize_model(str(base16), tmp_path / f"out{number}", rounding="rtn", quant=quant)
        assert record["format"] == "lownibble"
        assert re.search(why, record["other_formats"])
        assert len(layers(ln.load(str(tmp_path / f"out{number}"))[0])) == 14


def test_what_a_layout_does_not_hold_is_refused(base16, tmp_path):
    def refused(format, quant, match):
        with pytest.raises(ConfigError, match=match):
            ln.quantize_model(str(base16), tmp_path / "out", rounding="rtn", format=format, quant=quant)
        assert not (tmp_path / "out").exists()

    refused(
        "gptq", QuantConfig(), r"--format gptq does not hold this model: it holds int8, .* is nf4. Take --format bnb-4bit or lown"
    )
    refused("gptq", QuantConfig(quant_type="fp8"), r"is fp8\. Take --format compressed-tensors or lownibble\.")
    refused("compressed-tensors", QuantConfig(quant_type="int4_act"), r"is int4_act\. Take --format gptq or lownibble\.")
    refused(
        "bnb-4bit",
        QuantConfig(quant_type="int4"),
        r"it holds nf4, fp4, and .* is int4\. Take --format compressed-tensors or gptq",
    )
    nested = QuantConfig(quant_type="int4", pattern={"q_proj": {"double_quant": True}})
    refused("gptq", nested, "its scales are not quantised, and double_quant is asked for in 'model.layers.0.self_attn.q_proj'")


def test_scales_that_do_not_fit_are_named(tmp_path):
    weight = torch.full((32, 64), 1e6)
    with pytest.raises(QuantizationError, match="Cannot quantise 'x': a scale is too large for the file format"):
        WRITERS["gptq"].quantize(weight, QuantConfig(quant_type="int2", double_quant=False), torch.float32, name="x")


def test_our_own_layout_of_nf4(base16, tmp_path):
    record = ln.quantize_model(str(base16), tmp_path / "out", rounding="rtn", format="lownibble", quant=QuantConfig())
    assert config_of(tmp_path / "out")["quant_method"] == record["format"] == "lownibble"
    plain = ln.quantize_model(str(base16), tmp_path / "bnb", rounding="rtn", quant=QuantConfig())
    assert config_of(tmp_path / "bnb")["quant_method"] == "bitsandbytes"
    assert plain["format"] == "bnb-4bit"
    ours, theirs = (layers(ln.load(str(tmp_path / name))[0]) for name in ("out", "bnb"))
    assert all(torch.equal(ours[path].weight.dequantize(), theirs[path].weight.dequantize()) for path in theirs)
