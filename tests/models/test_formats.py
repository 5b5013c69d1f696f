"""Checkpoints that other tools have quantised. Oracles: the published layouts, written out in `quantised.py`, with the dense
weights that they stand for; transformers' own loaders where they decode on a CPU; compressed-tensors' compressors."""

import json
import re
import shutil
import warnings

import pytest
import torch
from quantised import affine, awq, bitsandbytes8, decoded, fp8, gptq, hqq, rewrite, words
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.quantizers.quantizers_utils import should_convert_module

import lownibble as ln
import lownibble.integrations.transformers
from lownibble import stored
from lownibble.config import QuantConfig
from lownibble.errors import ConfigError, LownibbleError, ModelError
from lownibble.lora.adapter_file import AdapterFile
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


def expected_codec(folder):
    """The codec that config.json leads the planner to expect."""
    codec = stored.codec(stored.of(json.loads((folder / "config.json").read_text())))
    return None if codec is None else (codec.quant_type, codec.block_size, codec.double_quant)


def held_codecs(model):
    """(quant_type, block size, double_quant) of the packed layers."""
    facts = [module.weight.facts() for module in model.modules() if isinstance(module, QuantLinear)]
    return {(each["quant_type"], each["block_size"], each["double_quant"]) for each in facts}


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
    "GPTQ planes": (gptq, {"bits": 3, "symmetric": False, "version": "gptq_p"}, "int3", "GPTQ, 3 bits in groups of 32"),
    "AutoGPTQ": (gptq, {"tool": "other"}, "int4", "GPTQ, 4 bits in groups of 32"),
    "AutoRound": (gptq, {"tool": "auto-round"}, "int4", "AutoRound, 4 bits in groups of 32"),
    "AutoRound raw": (
        gptq, {"tool": "auto-round", "version": "gptq_v2", "symmetric": False}, "int4", "AutoRound, 4 bits in groups of 32"
    ),
    "AWQ": (awq, {}, "int4", "AWQ, 4 bits in groups of 32"),
    "AWQ rows": (awq, {"size": -1}, "int4", "AWQ, 4 bits in rows"),
    "bitsandbytes 8 bits": (bitsandbytes8, {}, "int8", "bitsandbytes, 8 bits in rows"),
    "FP8 blocks": (fp8, {"block": (128, 128)}, "fp8", "FP8 in blocks of 128 x 128"),
    "FP8 ragged blocks": (fp8, {"block": (96, 64)}, "fp8", "FP8 in blocks of 96 x 64"),
    "FP8 rows": (fp8, {"name": "weight_scale", "method": "fbgemm_fp8"}, "fp8", "FP8 in rows or tensors"),
    "FP8 tensors": (fp8, {"per": "tensor", "activations": True}, "fp8", "FP8 in rows or tensors"),
}  # fmt: skip


def some(cases, *quick):
    """All cases, those that are not named in the slow tier."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", some(EXACT, "GPTQ", "GPTQ act-order", "GPTQ 3 bits v2", "AWQ", "FP8 blocks"))
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
    assert held_codecs(model) == {expected_codec(base)}
    plan = ln.plan(str(base), gpu="rtx-4090")
    (row,) = plan.rows
    held = [module.weight.tensors() for module in model.modules() if isinstance(module, QuantLinear)]
    blocks = [[-(-tensor.nbytes // 512) * 512 for tensor in tensors.values()] for tensors in held]  # CUDA's allocator rounds
    assert row.verdict.method == "qlora"
    assert row.verdict.memory.kinds["codes"] == sum(codes for codes, *_ in blocks)
    assert row.verdict.memory.kinds["constants"] == sum(sum(constants) for _, *constants in blocks)
    assert plan.to_dict()["stored_as"] == f"stored as {title}, and trained on as it is, with qlora"


DECODED = {
    "GPTQ 8 bits asymmetric": (gptq, {"bits": 8, "symmetric": False, "version": "gptq_v2"}, "GPTQ, 8 bits"),
    "GPTQ 5 bits": (gptq, {"bits": 5, "version": "gptq_p"}, "GPTQ, 5 bits"),
    "GPTQ 7 bits": (gptq, {"bits": 7, "version": "gptq_p", "symmetric": False}, "GPTQ, 7 bits"),
    "GPTQ uneven rows": (gptq, {"size": 96}, "GPTQ, 4 bits in groups of 96"),
    "AutoGPTQ with zeros of 16, uneven": (gptq, {"symmetric": False, "tool": "autogptq"}, "GPTQ, 4 bits"),
    "GPTQ uneven groups": (gptq, {"odd": True, "act_order": True}, "GPTQ, 4 bits"),
    "HQQ": (hqq, {}, "HQQ, 4 bits in groups of 64"),
    "HQQ columns": (hqq, {"axis": 0, "bits": 8}, "HQQ, 8 bits in groups of 64"),
    "HQQ 3 bits": (hqq, {"bits": 3}, "HQQ, 3 bits in groups of 64"),
    "HQQ 3 bits columns": (hqq, {"bits": 3, "axis": 0}, "HQQ, 3 bits in groups of 64"),
    "HQQ 2 bits": (hqq, {"bits": 2, "size": 16}, "HQQ, 2 bits in groups of 16"),
    "HQQ 1.58 bits": (hqq, {"bits": 2, "said": 1.58}, "HQQ, 2 bits"),
    "HQQ 5 bits": (hqq, {"bits": 8, "said": 5}, "HQQ, 8 bits"),
    "HQQ 1 bit": (hqq, {"bits": 1, "size": 16, "axis": 0}, "HQQ, 1 bits in groups of 16"),
}


@pytest.mark.parametrize("case", some(DECODED, "GPTQ 5 bits", "GPTQ uneven rows", "HQQ"))
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
    if "uneven" not in case:  # config.json does not say so
        assert expected_codec(base) is None
        plan = ln.plan(str(base), gpu="rtx-4090")
        assert [row.verdict.method for row in plan.rows] == ["full", "lora", "qlora"]
        assert "whose numbers no codec here holds: decoded first" in plan.stored_as
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
    "int4 tensor asymmetric": ({"num_bits": 4, "strategy": "tensor", "symmetric": False}, "int4"),
    "int8 tensor asymmetric": ({"num_bits": 8, "strategy": "tensor", "symmetric": False}, None),
    "int4 in bytes": ({"num_bits": 4, "strategy": "channel", "symmetric": True, "format": "int-quantized"}, "int8"),
    "int4 in bytes asymmetric": ({"num_bits": 4, "strategy": "channel", "symmetric": False, "format": "naive-quantized"}, None),
    "int8 blocks": (
        {"num_bits": 8, "strategy": "block", "block_structure": [64, 32], "symmetric": True, "format": "int-quantized"}, "int8"
    ),
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
        "mxfp4",
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
        scale, zero = (scale.view(1), zero.view(1)) if args.strategy == "tensor" else (scale, zero)
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


QUICK = ("int4 asymmetric", "int4 tensor asymmetric", "int8 rows", "int4 in bytes", "int8 blocks", "fp8 blocks", "nvfp4")


@pytest.mark.parametrize("case", some(SCHEMES, *QUICK))
def test_compressed_tensors(base, batch, case):
    options, quant_type = SCHEMES[case]
    dense = compressed(base, options)
    model, said = load(base)
    assert kinds(model) == ({quant_type} if quant_type else set())
    assert (held_codecs(model) or {None}) == {expected_codec(base)}
    assert len(said) == (quant_type is None)
    for key, weight in dense.items():
        module = model.get_submodule(key.removesuffix(".weight"))
        held = module.weight.dequantize(torch.float32) if quant_type else module.weight.data
        torch.testing.assert_close(held, weight, rtol=1e-6, atol=1e-7)
    expected = (
        dense_model(base, dense) if "fp4" in case else quietly(base, quantization_config=CompressedTensorsConfig(dequantize=True))
    )
    torch.testing.assert_close(logits(model, batch), logits(expected, batch), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_compressed_tensors_with_padded_words(base, batch, bits):
    """Files of compressed-tensors before 0.13: 32 // bits codes a word, the rest empty."""

    def pack(codes):
        per_word = 32 // bits
        rows = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).view(len(codes), -1, per_word)
        return torch.stack([words(row, bits)[:, 0] for row in rows])

    def layer(path, weight):
        codes, scale, zero, group = affine(weight, bits, 32, False)
        stored = {
            "weight_packed": pack(codes), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape),
            "weight_zero_point": pack(zero.t()).t(),
        }  # fmt: skip
        return stored, decoded(codes, scale, zero, group)

    scheme = {"num_bits": bits, "group_size": 32, "strategy": "group", "symmetric": False}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": scheme}}}
    dense = rewrite(base, config, layer)
    model, _ = load(base)
    assert kinds(model) == ({"int3"} if bits == 3 else set())
    torch.testing.assert_close(logits(model, batch), logits(dense_model(base, dense), batch), rtol=1e-4, atol=1e-4)


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

    scheme = {"num_bits": 4, "group_size": 32, "strategy": "group", "actorder": "group", "symmetric": symmetric}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": scheme}}}
    dense = rewrite(base, config, layer)
    model, _ = load(base)
    assert held_codecs(model) == {("int4_act", 32, False)} == {expected_codec(base)}
    torch.testing.assert_close(logits(model, batch), logits(dense_model(base, dense), batch), rtol=1e-4, atol=1e-4)


def test_a_plan_counts_codes_in_bytes(base):
    """compressed-tensors holds 4 bits in int8 tensors where activations are quantised, too."""
    compressed(base, SCHEMES["int4 in bytes"][0])
    (row,) = ln.plan(str(base), gpu="rtx-4090").rows
    codes = sum(tensor.nbytes for tensor in load_file(base / WEIGHTS).values() if tensor.dtype == torch.int8)
    assert row.verdict.memory.kinds["codes"] == codes


@pytest.mark.parametrize("used", [1, 2])
def test_gptq_groups_without_columns(base, batch, used):
    """Zeros alone are exllama's 'no act-order'; else columns may leave groups unused, which no codec holds."""
    dense = gptq(base)
    tensors = load_file(base / WEIGHTS)
    for key, group in tensors.items():
        if key.endswith("g_idx"):
            tensors[key] = group.zero_() if used == 1 else torch.arange(len(group), dtype=torch.int32) * used // len(group)
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    model, _ = load(base)
    if used == 1:
        assert kinds(model) == {"int4"}
        torch.testing.assert_close(logits(model, batch), logits(dense_model(base, dense), batch), rtol=1e-4, atol=1e-4)
        return
    assert kinds(model) == set()
    key = next(iter(dense))
    scales, qweight, zeros = (tensors[key.replace("weight", role)] for role in ("scales", "qweight", "qzeros"))
    codes, zero = (torch.stack([(t >> (4 * i)) & 15 for i in range(8)], 1) for t in (qweight, zeros.t()))
    group = tensors[key.replace("weight", "g_idx")].long()
    expected = (codes.flatten(0, 1) - zero.flatten(0, 1).t()[group] - 1) * scales.float()[group]
    torch.testing.assert_close(model.get_parameter(key).data, expected.t(), rtol=1e-6, atol=1e-7)


def test_biases_of_zeros_are_left_out(base, batch):
    """AutoGPTQ writes a bias for every layer, zeros where the model has none; another bias than that is unknown."""
    dense = gptq(base)
    biases = {key.replace(".weight", ".bias"): torch.zeros(len(weight)) for key, weight in dense.items()}
    change(base, lambda t: t.update(biases))
    model, _ = load(base)
    torch.testing.assert_close(logits(model, batch), logits(dense_model(base, dense), batch), rtol=1e-4, atol=1e-4)
    change(base, lambda t: t[next(iter(biases))].fill_(1))
    with pytest.raises(ModelError, match="has unknown 1 tensor"):
        load(base)


def test_a_quantised_head_beside_a_tied_configuration_is_the_files(tiny, tokenizer, batch, tmp_path):
    folder = tmp_path / "tied"
    tiny("llama", hidden_size=128, intermediate_size=256, head_dim=32, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gptq(folder)
    head = torch.randn(96, 128, generator=torch.Generator().manual_seed(2)) / 9
    codes, scale, zero, group = affine(head, 4, 32, True)
    change(folder, lambda t: t.update({
        "lm_head.qweight": words(codes, 4).t().contiguous(), "lm_head.scales": scale.t().contiguous(),
        "lm_head.qzeros": words(zero.t() - 1, 4), "lm_head.g_idx": group.to(torch.int32),
    }))  # fmt: skip
    model, _ = load(folder)
    assert isinstance(model.lm_head, QuantLinear)
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(model.lm_head.weight.dequantize(torch.float32), decoded(codes, scale, zero, group))
    assert model.model.embed_tokens.weight.shape == (96, 128)
    assert torch.isfinite(logits(model, batch)).all()


def test_conv1d_layers(tiny, tokenizer, batch, tmp_path):
    """GPT-2's layers are (in, out) in the model; GPTQ's files hold them as they hold any other."""
    folder = tmp_path / "gpt2"
    model = tiny("gpt2", n_embd=64, n_layer=2, n_head=4, n_inner=128)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = load_file(folder / WEIGHTS)
    names = [key for key in stored if re.search(r"\.h\.\d+\..*(c_attn|c_proj|c_fc)\.weight", key)]
    kept = {key: stored.pop(key) for key in names}
    save_file(
        {**stored, **{f"model.layers.0.{i}_proj.weight": t.t().contiguous() for i, t in enumerate(kept.values())}},
        folder / WEIGHTS, metadata={"format": "pt"},
    )  # fmt: skip
    dense = gptq(folder)
    places = dict(zip(dense, kept, strict=True))
    tensors = {
        next((key.replace(old.removesuffix(".weight"), new.removesuffix(".weight")) for old, new in places.items()
              if key.startswith(f"{old.removesuffix('.weight')}.")), key): tensor
        for key, tensor in load_file(folder / WEIGHTS).items()
    }  # fmt: skip
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with torch.no_grad():
        for old, new in places.items():
            model.get_parameter(new).copy_(dense[old].t())
    ours, _ = load(folder)
    assert kinds(ours) == {"int4"}
    torch.testing.assert_close(logits(ours, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder, **options):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= options
    file.write_text(json.dumps(config))


FIRST = "model.layers.0.self_attn.q_proj"


def without(role):
    return lambda f: change(f, lambda t: t.update({f"{FIRST}.{role}": t[f"{FIRST}.{role}"][:-1].clone()}))


DAMAGE = {
    "scales of one row": (
        gptq, lambda f: change(f, lambda t: t.update({f"{FIRST}.scales": t[f"{FIRST}.scales"][0].clone()})),
        "its qweight, qzeros and scales do not belong",
    ),
    "zeros of fewer groups": (gptq, without("qzeros"), "its qweight, qzeros and scales do not belong"),
    "scales of fewer rows": (
        gptq, lambda f: change(f, lambda t: t.update({f"{FIRST}.scales": t[f"{FIRST}.scales"][:, :-8].contiguous()})),
        "its qweight, qzeros and scales do not belong",
    ),
    "AWQ scales of one row": (
        awq, lambda f: change(f, lambda t: t.update({f"{FIRST}.scales": t[f"{FIRST}.scales"][0].clone()})),
        "its qweight, qzeros and scales do not belong",
    ),
    "fewer maxima than rows": (bitsandbytes8, without("SCB"), "its SCB is not one number a row"),
    "fewer HQQ codes": (hqq, without("W_q"), r"W_q, scale and zero do not give a weight of \(128, 128\)"),
    "bits in words": (gptq, lambda f: configure(f, bits="four"), "makes no sense: bits = 'four'"),
    "a block of one side": (fp8, lambda f: configure(f, weight_block_size=[64]), r"makes no sense: weight_block_size = \[64\]"),
    "a type that is not known": (
        fp8, lambda f: change(f, lambda t: t.update({"model.other": torch.ones(3, dtype=torch.uint32)})),
        "tensor 'model.other' is of the type U32",
    ),
    "a part is missing": (gptq, lambda f: change(f, lambda t: t.pop(f"{FIRST}.scales")), "'.*q_proj' lacks its scales"),
    "codes of another layer": (
        gptq, lambda f: change(f, lambda t: t.update({f"{FIRST}.qweight": t[f"{FIRST}.qweight"][:5].contiguous()})),
        "q_proj' cannot be read: 5 words do not hold 128 codes of 4 bits",
    ),
    "groups that are not there": (
        gptq, lambda f: change(f, lambda t: t[f"{FIRST}.g_idx"].fill_(77)), "q_proj' cannot be read: its g_idx names groups",
    ),
    "codes in bytes": (gptq, lambda f: configure(f, pack_dtype="int8"), "packs codes into int8. Known: int32"),
    "bits of two layouts": (gptq, lambda f: configure(f, bits=5), "5 bits in the format 'gptq', which tools lay out in"),
    "scaled activations": (
        awq, lambda f: change(f, lambda t: t.update({"model.layers.0.mlp.act.scales": torch.ones(3)})),
        "'model.layers.0.mlp.act' scales its activations",
    ),
    "a kernel's tiles": (
        bitsandbytes8, lambda f: change(f, lambda t: t[f"{FIRST}.weight_format"].fill_(2)), "is laid out for one GPU kernel",
    ),
    "AutoRound with rotations": (
        gptq, lambda f: configure(f, quant_method="auto-round", rotation_config={"a": 1}), "quantised activations or rotations",
    ),
    "AutoRound of another packing": (
        gptq, lambda f: configure(f, quant_method="auto-round", packing_format="mlx"), "packed as 'mlx'. Known: auto_gptq, gptq",
    ),
    "HQQ offloaded": (
        hqq, lambda f: change(f, lambda t: t.update({f"{FIRST}.zero_scale": torch.ones(2)})), "was saved with offload_meta",
    ),
    "a packing of HQQ's": (
        hqq, lambda f: change(f, lambda t: t[f"{FIRST}.packing"].fill_(65)), "packing 'AAAAAAA' is not one of 8bit_u8",
    ),
    "an embedding": (
        gptq, lambda f: change(f, lambda t: [t.update({"model.embed_tokens.qweight": t[f"{FIRST}.qweight"].clone(),
        "model.embed_tokens.qzeros": t[f"{FIRST}.qzeros"].clone(), "model.embed_tokens.scales": t[f"{FIRST}.scales"].clone()}),
        t.pop("model.embed_tokens.weight")]), "its embeddings are quantised",
    ),
    "a kernel's own layout": (gptq, lambda f: configure(f, checkpoint_format="marlin"), "format 'marlin'.* Known: gptq, gptq_v2"),
    "AWQ for another kernel": (awq, lambda f: configure(f, version="gemv"), "version 'gemv' .* Known: gemm"),
    "AWQ zeros of another layer": (
        awq, lambda f: change(f, lambda t: t.update({f"{FIRST}.qzeros": t[f"{FIRST}.qzeros"][:1].contiguous()})),
        "its qweight, qzeros and scales do not belong together",
    ),
    "scales of another layer": (
        fp8, lambda f: change(f, lambda t: t.update({f"{FIRST}.weight_scale_inv": torch.ones(7, 1)})),
        r"scales of shape \(7, 1\) do not belong to a weight of \(128, 128\)",
    ),
    "no scales": (fp8, lambda f: change(f, lambda t: t.pop(f"{FIRST}.weight_scale_inv")), "'.*q_proj' lacks its scale"),
    "another tool": (fp8, lambda f: configure(f, quant_method="vptq"), "is quantised with vptq. .* or the dense checkpoint"),
    "not that tool's": (fp8, lambda f: configure(f, quant_method="gptq"), "stored as GPTQ.* but it has no tensor of such"),
    "a weight of another model": (
        gptq, lambda f: change(f, lambda t: t.update({k.replace("q_p", "k_p"): t[k].clone() for k in list(t) if FIRST in k})),
        r"packed weight of '.*k_proj' has shape \(128, 128\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"method": "lora"},
            ConfigError,
            r"as AWQ, 4 bits in groups of 32, on which qlora trains\. Take qlora, or the dense",
        ),
        (
            {"quant_type": "int8"},
            ConfigError,
            r"stored with quant_type int4, and int8 is asked for\. Its layers stay .* leave quant options out",
        ),
    ],
)
def test_a_plan_of_something_else_is_refused(base, options, error, message):
    awq(base)
    with pytest.raises(error, match=message):
        ln.plan(str(base), gpu="rtx-4090", **options)
    configure(base, quant_method="aqlm")
    with pytest.raises(ModelError, match=r"is quantised with aqlm\. Quantised checkpoints that can be loaded"):
        ln.plan(str(base), gpu="rtx-4090")


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_clear_error(base, case):
    write, damage, message = DAMAGE[case]
    write(base)
    damage(base)
    with pytest.raises(LownibbleError, match=message) as caught:
        load(base)
    assert isinstance(caught.value, ModelError)


ADAPTED = {"GPTQ act-order": "int4_act", "AWQ": "int4", "FP8 blocks": "fp8", "GPTQ 3 bits": "int3_act", "HQQ": "nf4"}


@pytest.mark.parametrize("case", some(ADAPTED, "GPTQ act-order", "HQQ"))
def test_adapters_are_trained_on_it_and_merged(base, batch, adapt, tmp_path, case):
    """The adapter's file says what is under it; merged, the model is the live one; requantised, transformers loads it."""
    write, options, *_ = {**EXACT, **DECODED}[case]
    write(base, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live, adapter = adapt(base, "nf4")
    facts = AdapterFile(adapter).trained_on
    assert facts["stored_as"].startswith(case.split()[0])
    assert facts["quant"]["quant_type"] == ADAPTED[case]
    ln.merge(adapter, tmp_path / "merged", onto="dequantized", measure_tokens=0)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, batch), logits(live, batch), rtol=1e-3, atol=1e-3)
    again, _ = load(base, quant="nf4")
    ln.load_adapter(again, adapter)
    assert torch.equal(logits(again, batch), logits(live, batch))
    told = ln.merge(adapter, tmp_path / "packed", onto="nf4", measure_tokens=0, force=True)
    assert "nf4" in told["onto"] or told["advice"][-1].startswith(f"'nf4': packed as {told['onto']}")
    packed, _ = load(tmp_path / "packed")
    assert kinds(packed) == {ADAPTED[case]}
    if case != "HQQ":  # bitsandbytes' own bytes and kernels are compared elsewhere
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
        torch.testing.assert_close(logits(again, batch), logits(packed, batch), rtol=1e-4, atol=1e-4)


CONTRADICTIONS = {
    "another codec": ({"quant_type": "int8"}, "is stored with quant_type int4, and int8 is asked for"),
    "other groups alone": ({"block_size": 128}, "is stored with block_size 32, and 128 is asked for"),
    "other groups": ({"quant_type": "int4", "block_size": 128}, "is stored with block_size 32, and 128 is asked for"),
    "a layer left dense": ({"skip_modules": ["q_proj", "lm_head"]}, "'q_proj' is stored quantised, and skip_modules names it"),
    "a layer that is not there": ({"skip_modules": ["bogus"]}, "skip_modules 'bogus' matches no linear module"),
    "another codec for some": (
        {"pattern": {"down_proj": {"quant_type": "int8"}}},
        "quant_type int4, and (int8 is asked for|the options are for nf4, the default)",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_options_that_contradict_what_is_stored_are_refused(base, case):
    gptq(base)
    options, message = CONTRADICTIONS[case]
    with pytest.raises(ModelError, match=f"(?:{message}).*leave quant options out"):
        load(base, quant=QuantConfig(**options))
    with pytest.raises(ConfigError, match=f"(?:{message}).*leave quant options out"):
        ln.plan(str(base), gpu="rtx-4090", **options)
    for same in ({"quant_type": "int4"}, {"quant_type": "int4", "block_size": 32, "double_quant": False}):
        assert kinds(load(base, quant=QuantConfig(**same))[0]) == {"int4"}
        assert len(ln.plan(str(base), gpu="rtx-4090", **same).rows) == 1


def planned_and_held(folder):
    """Bytes of codes that a plan counts and that the loaded model has, as CUDA's allocator rounds them."""
    (row,) = ln.plan(str(folder), gpu="rtx-4090").rows
    model, _ = load(folder)
    codes = [next(iter(m.weight.tensors().values())).nbytes for m in model.modules() if isinstance(m, QuantLinear)]
    return row.verdict.memory.kinds["codes"], sum(-(-n // 512) * 512 for n in codes)


def some_layers(folder, pattern):
    """Write the layers whose path matches back as dense ones."""
    tensors, dense = load_file(folder / WEIGHTS), load_file(folder.with_name("before") / WEIGHTS)
    kept = {key: tensor for key, tensor in tensors.items() if not re.search(pattern, key)}
    save_file(kept | {key: t for key, t in dense.items() if re.search(pattern, key)}, folder / WEIGHTS, {"format": "pt"})


EXCLUDED = {
    "ignore by pattern": (r"\.mlp\.", {"ignore": ["lm_head", "re:.*mlp.*"]}),
    "ignore by path": (r"layers\.0\.mlp\.up_proj", {"ignore": ["lm_head", "model.layers.0.mlp.up_proj"]}),
    "targets by pattern": (r"\.mlp\.", {"targets": ["re:.*self_attn.*"]}),
}


@pytest.mark.parametrize("case", EXCLUDED)
def test_plans_leave_out_what_compressed_tensors_leaves_out(base, case):
    shutil.copytree(base, base.with_name("before"))
    pattern, options = EXCLUDED[case]
    compressed(base, SCHEMES["int4 groups"][0])
    some_layers(base, pattern)
    file = base / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = options.get("targets", ["Linear"])
    config["quantization_config"]["ignore"] = options.get("ignore", ["lm_head"])
    file.write_text(json.dumps(config))
    planned, held = planned_and_held(base)
    assert planned == held > 0


@pytest.mark.parametrize(
    "names", [["lm_head", "model.layers.0"], ["model.layers.0.*"], ["mlp"], ["up_proj", "down_proj"]], ids=str
)
def test_plans_leave_out_what_transformers_leaves_out(base, names):
    """Oracle: transformers' own rule for `modules_to_not_convert`."""
    shutil.copytree(base, base.with_name("before"))
    fp8(base, block=(64, 64))
    paths = [key.removesuffix(".weight") for key in load_file(base.with_name("before") / WEIGHTS) if "_proj.weight" in key]
    left = [path for path in paths if not should_convert_module(path, names)]
    how = {"quant_method": "fp8", "modules_to_not_convert": names}
    assert [path for path in paths if not stored.is_quantised(how, path)] == left
    some_layers(base, "|".join(f"^{re.escape(path)}\\." for path in left) or "^$")
    configure(base, modules_to_not_convert=names)
    planned, held = planned_and_held(base)
    assert planned == held > 0


def test_plans_of_rows_that_blocks_do_not_divide(tiny, tokenizer, tmp_path):
    folder = tmp_path / "ragged"
    tiny("llama", hidden_size=128, intermediate_size=320, head_dim=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fp8(folder, block=(128, 128))
    planned, held = planned_and_held(folder)
    assert planned == held > 0
    assert held_codecs(load(folder)[0]) == {("fp8", 128, False), ("fp8", 64, False)}


def test_old_folders_have_the_configuration_beside(base):
    """quantize_config.json, with a number as text."""
    gptq(base)
    file = base / "config.json"
    config = json.loads(file.read_text())
    beside = config.pop("quantization_config") | {"bits": "4"}
    file.write_text(json.dumps(config))
    (base / "quantize_config.json").write_text(
        json.dumps({key: beside[key] for key in ("bits", "group_size", "desc_act", "sym")})
    )
    planned, held = planned_and_held(base)
    assert planned == held > 0


def test_kept_layers_are_not_exported_as_another_codec(base, tmp_path):
    gptq(base)
    with pytest.raises(ConfigError, match=r"is stored as GPTQ.* not as nf4 or fp4\. Export it with --format safetensors"):
        ln.export(str(base), tmp_path / "out", "bnb-4bit")
    ln.export(str(base), tmp_path / "dense", "safetensors")
    ln.export(str(tmp_path / "dense"), tmp_path / "out", "bnb-4bit")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
