"""Checkpoints that other tools have quantised. Oracles: the published layouts, written out in `quantised.py`, with the dense
weights that they stand for; transformers' own loaders where they decode on a CPU; compressed-tensors' compressors."""

import json
import re
import warnings

import pytest
import torch
from quantised import affine, awq, bitsandbytes8, decoded, e2m1, fp8, gptq, hqq, nearest_e2m1, rewrite
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import lownibble as ln
from lownibble.errors import LownibbleError, ModelError
from lownibble.models.info import info
from lownibble.quant import QuantLinear

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tiny, tokenizer, tmp_path):
    """A dense Llama whose rows are whole numbers of groups and blocks."""
    folder = tmp_path / "base"
    tiny("llama", hidden_size=128, intermediate_size=256, num_attention_heads=4, head_dim=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model, batch):
    ids, mask, _ = batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.float()


def dense_model(folder, dense):
    """The model of the folder's config with the given weights."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    tensors = load_file(folder / WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if "_proj." not in key}
    other = folder.with_name("dense")
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps(config))
    save_file({**kept, **{key: t.contiguous() for key, t in dense.items()}}, other / WEIGHTS, metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()


def load(folder, **options):
    """The model, and what was warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = ln.load(str(folder), **options)
    return model, [str(each.message) for each in caught if "is stored as" in str(each.message)]


def kinds(model):
    return {module.weight.facts()["quant_type"] for module in model.modules() if isinstance(module, QuantLinear)}


EXACT = {
    "GPTQ": (gptq, {}, "int4", "GPTQ, 4 bits in groups of 32"),
    "GPTQ v2": (gptq, {"version": "gptq_v2", "symmetric": False}, "int4", "GPTQ, 4 bits in groups of 32"),
    "GPTQ asymmetric": (gptq, {"symmetric": False, "size": 64}, "int4", "GPTQ, 4 bits in groups of 64"),
    "GPTQ act-order": (gptq, {"act_order": True}, "int4_act", "GPTQ, 4 bits in groups of 32, act-order"),
    "GPTQ rows": (gptq, {"size": -1}, "int4", "GPTQ, 4 bits in rows"),
    "GPTQ 2 bits": (gptq, {"bits": 2, "symmetric": False, "version": "gptq_v2"}, "int2", "GPTQ, 2 bits in groups of 32"),
    "GPTQ 3 bits": (gptq, {"bits": 3, "act_order": True}, "int3_act", "GPTQ, 3 bits in groups of 32, act-order"),
    "GPTQ 3 bits v2": (gptq, {"bits": 3, "symmetric": False, "version": "gptq_v2"}, "int3", "GPTQ, 3 bits in groups of 32"),
    "GPTQ 8 bits": (gptq, {"bits": 8, "size": 128}, "int8", "GPTQ, 8 bits in groups of 128"),
    "GPTQ 8 bits act-order": (gptq, {"bits": 8, "act_order": True}, "int8_act", "GPTQ, 8 bits in groups of 32, act-order"),
    "AWQ": (awq, {}, "int4", "AWQ, 4 bits in groups of 32"),
    "AWQ rows": (awq, {"size": -1}, "int4", "AWQ, 4 bits in rows"),
    "bitsandbytes 8 bits": (bitsandbytes8, {}, "int8", "bitsandbytes, 8 bits in rows"),
    "FP8 blocks": (fp8, {"block": (128, 128)}, "fp8", "FP8 in blocks of 128 x 128"),
    "FP8 ragged blocks": (fp8, {"block": (96, 64)}, "fp8", "FP8 in blocks of 96 x 64"),
    "FP8 rows": (fp8, {"name": "weight_scale", "method": "fbgemm_fp8"}, "fp8", "FP8 in rows or tensors"),
    "FP8 tensors": (fp8, {"per": "tensor", "activations": True}, "fp8", "FP8 in rows or tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_stored_numbers_are_kept(base, batch, case):
    """The layers decode to exactly the weights that the file stands for, without a quant option and with the default one; the
    adapter's file says what it was trained on."""
    write, options, quant_type, title = EXACT[case]
    dense = write(base, **options)
    expected = logits(dense_model(base, dense), batch)
    for quant in (None, "nf4"):
        model, said = load(base, quant=quant)
        assert kinds(model) == {quant_type}
        for key, weight in dense.items():
            held = model.get_submodule(key.removesuffix(".weight")).weight.dequantize(torch.float32)
            torch.testing.assert_close(held, weight, rtol=2e-7, atol=0)
        torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)
        assert bool(said) == (quant is not None)
        assert all(f"is stored as {title}: its layers are kept as they are stored (as {quant_type})" in each for each in said)
    assert info(model).base["stored_as"] == title


DECODED = {
    "GPTQ 8 bits asymmetric": (gptq, {"bits": 8, "symmetric": False, "version": "gptq_v2"}, "GPTQ, 8 bits"),
    "GPTQ 5 bits": (gptq, {"bits": 5, "version": "gptq_v2"}, "GPTQ, 5 bits"),
    "GPTQ uneven groups": (gptq, {"odd": True, "act_order": True}, "GPTQ, 4 bits"),
    "HQQ": (hqq, {}, "HQQ, 4 bits in groups of 64"),
    "HQQ columns": (hqq, {"axis": 0, "bits": 8}, "HQQ, 8 bits in groups of 64"),
    "HQQ 3 bits": (hqq, {"bits": 3}, "HQQ, 3 bits in groups of 64"),
    "HQQ 3 bits columns": (hqq, {"bits": 3, "axis": 0}, "HQQ, 3 bits in groups of 64"),
    "HQQ 2 bits": (hqq, {"bits": 2, "size": 16}, "HQQ, 2 bits in groups of 16"),
    "HQQ 1 bit": (hqq, {"bits": 1, "size": 16, "axis": 0}, "HQQ, 1 bits in groups of 16"),
}


@pytest.mark.parametrize("case", DECODED)
def test_other_numbers_are_decoded_and_packed_again(base, batch, case):
    write, options, title = DECODED[case]
    dense = write(base, **options)
    model, said = load(base)
    for key, weight in dense.items():
        torch.testing.assert_close(model.get_parameter(key).data, weight, rtol=1e-6, atol=1e-7)
    assert kinds(model) == set()
    assert re.search(
        rf"is stored as {title}.*: no codec here holds these numbers, so 14 weights were decoded and held in", said[0]
    )
    model, said = load(base, quant="nf4")
    assert kinds(model) == {"nf4"}
    assert "14 weights were decoded and packed again as nf4" in said[0]
    key = next(iter(dense))
    packed = model.get_submodule(key.removesuffix(".weight")).weight
    torch.testing.assert_close(packed.dequantize(), ln.quantize(dense[key], "nf4").dequantize(), rtol=1e-3, atol=1e-3)


def quietly(folder, **options):
    """transformers' own model of the folder, decoded on a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("case", ["FP8 blocks", "FP8 tensors"])
def test_fp8_is_transformers_reading(base, batch, case):
    write, options, *_ = EXACT[case]
    write(base, **options)
    if case == "FP8 tensors":  # transformers reads a static activation scale by another name
        tensors = load_file(base / WEIGHTS)
        save_file({k.replace("input_scale", "activation_scale"): t for k, t in tensors.items()}, base / WEIGHTS, {"format": "pt"})
    model, _ = load(base)
    torch.testing.assert_close(logits(model, batch), logits(quietly(base), batch), rtol=1e-4, atol=1e-4)


SCHEMES = {
    "int4 groups": ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}, "int4"),
    "int4 asymmetric": ({"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}, "int4"),
    "int4 rows": ({"num_bits": 4, "strategy": "channel", "symmetric": True}, "int4"),
    "int3 groups": ({"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": True}, "int3"),
    "int2 rows": ({"num_bits": 2, "strategy": "channel", "symmetric": False}, "int2"),
    "int8 packed": ({"num_bits": 8, "strategy": "group", "group_size": 128, "symmetric": True}, "int8"),
    "int6 packed": ({"num_bits": 6, "strategy": "group", "group_size": 32, "symmetric": True}, None),
    "int8 rows": ({"num_bits": 8, "strategy": "channel", "symmetric": True, "format": "int-quantized"}, "int8"),
    "int8 tensor": ({"num_bits": 8, "strategy": "tensor", "symmetric": True, "format": "int-quantized"}, "int8"),
    "int8 asymmetric": ({"num_bits": 8, "strategy": "channel", "symmetric": False, "format": "int-quantized"}, None),
    "fp8 tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "format": "float-quantized"}, "fp8"),
    "fp8 rows": ({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "format": "float-quantized"}, "fp8"),
    "fp8 blocks": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 64], "symmetric": True,
         "format": "float-quantized"},
        "fp8",
    ),
    "mxfp4": (
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "scale_dtype": "torch.uint8",
         "format": "mxfp4-pack-quantized"},
        None,
    ),
    "nvfp4": (
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
         "scale_dtype": "torch.float8_e4m3fn", "format": "nvfp4-pack-quantized"},
        None,
    ),
}  # fmt: skip


def compressed(folder, options):
    """The folder's layers compressed by compressed-tensors itself, and what it decompresses them to."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    options = dict(options)
    form = options.pop("format", "pack-quantized")
    args = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)

    def layer(path, weight):
        n_out, n_in = weight.shape
        state = {}
        if args.strategy == "block":
            a, b = args.block_structure
            groups = weight.view(n_out // a, a, n_in // b, b).transpose(1, 2).flatten(2)
        elif args.group_size:
            groups = weight.view(n_out, -1, args.group_size)
        else:
            groups = weight.view(n_out, 1, n_in) if args.strategy == "channel" else weight.view(1, 1, -1)
        more = {}
        if args.strategy == "tensor_group":
            more["global_scale"] = state["weight_global_scale"] = (448 * 6 / weight.abs().max()).view(1)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, **more)
        scale = scale.view(1) if args.strategy == "tensor" else scale
        state |= {"weight": weight, "weight_scale": scale.float(), "weight_zero_point": zero.to(args.zp_dtype or zero.dtype)}
        stored = compressor.compress(state, scheme)
        again = compressor.decompress({key: t.clone() for key, t in stored.items()}, scheme)["weight"].float()
        if "fp4" in form:  # decompressed in bfloat16; the same from its codes and scales, in float32
            exponents = stored["weight_scale"].dtype == torch.uint8
            scale = (stored["weight_scale"].float() - 127).exp2() if exponents else stored["weight_scale"].float()
            scale = scale / stored.get("weight_global_scale", torch.ones(1))
            exact = unpack_fp4_from_uint8(stored["weight_packed"], n_out, n_in).float() * scale.repeat_interleave(
                args.group_size, 1
            )
            torch.testing.assert_close(again, exact, rtol=8e-3, atol=1e-5)
            again = exact
        return stored, again

    config = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "format": form}},
    }  # fmt: skip
    return rewrite(folder, config, layer)


@pytest.mark.parametrize("case", SCHEMES)
def test_compressed_tensors(base, batch, case):
    options, quant_type = SCHEMES[case]
    dense = compressed(base, options)
    model, said = load(base)
    assert kinds(model) == ({quant_type} if quant_type else set())
    assert len(said) == (quant_type is None)
    for key, weight in dense.items():
        module = model.get_submodule(key.removesuffix(".weight"))
        held = module.weight.dequantize(torch.float32) if quant_type else module.weight.data
        torch.testing.assert_close(held, weight, rtol=1e-6, atol=1e-7)
    expected = (
        dense_model(base, dense) if "fp4" in case else quietly(base, quantization_config=CompressedTensorsConfig(dequantize=True))
    )
    torch.testing.assert_close(logits(model, batch), logits(expected, batch), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_with_act_order(base, batch, symmetric):
    """compressed-tensors no longer writes weight_g_idx; files that have it are about: codes packed by its own function."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(5)

    def layer(path, weight):
        group = (torch.arange(weight.shape[1]) // 32)[torch.randperm(weight.shape[1], generator=generator)]
        codes, scale, zero, group = affine(weight, 4, 32, symmetric, group)
        stored = {
            "weight_packed": pack_to_int32((codes - 8).to(torch.int8), 4), "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape), "weight_g_idx": group.to(torch.int32),
        }  # fmt: skip
        if not symmetric:
            stored["weight_zero_point"] = pack_to_int32((zero - 8).to(torch.int8), 4, packed_dim=0)
        return stored, decoded(codes, scale, zero, group)

    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    dense = rewrite(base, config, layer)
    model, _ = load(base)
    assert kinds(model) == {"int4_act"}
    torch.testing.assert_close(logits(model, batch), logits(dense_model(base, dense), batch), rtol=1e-4, atol=1e-4)
