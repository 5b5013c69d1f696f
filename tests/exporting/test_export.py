"""GGUF and bitsandbytes files. Oracles: the `gguf` library's reader, transformers' own loading of both, the model they were."""

import json
import shutil

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GgufConfig, PreTrainedTokenizerFast

import lownibble as ln
from lownibble.errors import AdapterError, ConfigError, ModelError, OutputError
from lownibble.exporting.gguf_tokenizer import PRE_TOKENIZERS
from lownibble.lora.adapter_file import AdapterFile

TEXT = ["The film was good in 1984, wasn't it?", "  two  spaces\nand\ttabs", "naïve café №5", "x = [i**2 for i in range(10)]"]
F16 = 2e-3
"""Largest difference as a share of the largest logit, of weights rounded to 11 bits."""


def byte_level_bpe(folder, pre):
    """A byte-level BPE tokenizer that splits text in the way llama.cpp calls `pre`; returns its size."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = next(key[0] for key, name in PRE_TOKENIZERS.items() if name == pre)
    if pre == "gpt-2":
        backend.pre_tokenizer = byte_level
    elif pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    else:
        raw = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(first), "isolated", invert=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, raw])
    backend.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.fixture
def model_folder(tiny, tmp_path):
    """`model_folder(family, **options)`: a model with a byte-level BPE tokenizer."""

    def _write(family="llama", *, pre="gpt-2", name="model", **options):
        folder = tmp_path / name
        folder.mkdir()
        size = byte_level_bpe(folder, pre)
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        tiny(family, vocab_size=size + 5, hidden_size=64, intermediate_size=128, **ids, **options).save_pretrained(folder)
        return folder

    return _write


def logits(model, batch):
    ids, mask, _ = batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.float()


def by_transformers(file, **options):
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **options
    )
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_model_back(model_folder, batch, tmp_path, family, tied):
    folder = model_folder(family, tie_word_embeddings=tied, pre="qwen2" if "qwen" in family else "gpt-2")
    ln.export(folder, tmp_path / "model.gguf", "gguf")
    dense, tokenizer = ln.load(str(folder))
    expected, found = logits(dense, batch), logits(by_transformers(tmp_path / "model.gguf"), batch)
    assert float((found - expected).abs().max()) <= F16 * float(expected.abs().max())
    again, its_tokenizer = ln.load(str(tmp_path / "model.gguf"))
    assert again.config.vocab_size == dense.config.vocab_size
    for text in TEXT:
        assert its_tokenizer(text).input_ids == tokenizer(text).input_ids
    messages = [{"role": "user", "content": "Hi"}]
    assert its_tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert (its_tokenizer.bos_token_id, its_tokenizer.eos_token_id) == (0, 1)


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
}
CONTAINER = "model.layers.{}.mlp.experts.{}"


def in_llama_cpp(kind, values, name):
    """Names of llama.cpp's tensors of experts -> values, as conversion/llama.py, qwen.py and gpt_oss.py make them."""
    if kind == "gpt_oss":
        values = values if name.endswith("_bias") else values.transpose(-1, -2)
        axis = -1 if name.endswith("_bias") else -2
        pair = [values.index_select(axis, torch.arange(first, values.shape[axis], 2)) for first in (0, 1)]
    else:
        pair = values.chunk(2, 1)
    suffix = "bias" if name.endswith("_bias") else "weight"
    if name.startswith("gate_up_proj"):
        return {f"ffn_gate_exps.{suffix}": pair[0], f"ffn_up_exps.{suffix}": pair[1]}
    return {f"ffn_down_exps.{suffix}": values}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_are_laid_out_as_llama_cpp_does(model_folder, kind, tmp_path):
    folder = model_folder(kind, pre="gpt-4o" if kind == "gpt_oss" else "gpt-2", **MIXTURES[kind])
    ln.export(folder, tmp_path / "model.gguf", "gguf", dtype="float32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    model, found = ln.load(str(folder))[0], set()
    for layer in range(2):
        for name, values in model.model.layers[layer].mlp.experts.named_parameters():
            for last, wanted in in_llama_cpp(kind, values.detach(), name).items():
                found.add(f"blk.{layer}.{last}")
                assert torch.equal(stored[f"blk.{layer}.{last}"], wanted), (layer, last)
        router = model.model.layers[layer].mlp.router if kind == "gpt_oss" else model.model.layers[layer].mlp.gate
        assert torch.equal(stored[f"blk.{layer}.ffn_gate_inp.weight"], router.weight)
    assert {name for name in stored if "_exps." in name} == found
    architecture = reader.fields["general.architecture"].contents()
    assert architecture == {"mixtral": "llama", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}[kind]
    facts = {key: reader.fields[f"{architecture}.{key}"].contents() for key in ("expert_count", "expert_used_count")}
    assert facts == {"expert_count": 4, "expert_used_count": 2}
    if kind == "gpt_oss":
        assert torch.equal(stored["blk.1.attn_sinks.weight"], model.model.layers[1].self_attn.sinks)
        assert torch.equal(stored["blk.1.post_attention_norm.weight"], model.model.layers[1].post_attention_layernorm.weight)
        assert reader.fields["gpt-oss.rope.scaling.type"].contents() == "yarn"
    ln.export(folder, tmp_path / "small.gguf", "gguf", dtype="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    assert (kinds["blk.0.ffn_up_exps.weight"], kinds["blk.0.ffn_gate_inp.weight"]) == ("Q8_0", "F32")
    assert {how for name, how in kinds.items() if name.endswith(".bias")} <= {"F32"}


def test_transformers_reads_a_mixture_back(model_folder, batch, tmp_path):
    """Of packed experts, which are decoded on the way. transformers knows the names of Qwen3-MoE's experts."""
    folder = model_folder("qwen3_moe", pre="qwen2", **MIXTURES["qwen3_moe"])
    ln.quantize_model(str(folder), tmp_path / "packed", rounding="rtn", quant={"block_size": 32})
    ln.export(tmp_path / "packed", tmp_path / "model.gguf", "gguf", dtype="float32")
    expected = logits(ln.load(str(tmp_path / "packed"))[0], batch)
    config = AutoConfig.from_pretrained(folder)  # transformers reads neither the experts' width nor norm_topk_prob from GGUF
    found = logits(by_transformers(tmp_path / "model.gguf", config=config), batch)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", MIXTURES)
def test_adapters_on_experts_are_what_llama_cpp_adds(model_folder, kind, tmp_path):
    """For each expert alpha / rank * B A, of gate, up and down apart. Oracle: the merged weights in llama.cpp's layout."""
    folder = model_folder(kind, **MIXTURES[kind])
    model = ln.add_lora(
        ln.load(str(folder))[0],
        ln.LoraConfig(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"down_proj": 3}, init_lora_weights=False),
    )
    ln.save_adapter(model, tmp_path / "adapter")
    ln.export(tmp_path / "adapter", tmp_path / "adapter.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="original", measure_tokens=0)
    before, after = ln.load(str(folder))[0], ln.load(str(tmp_path / "merged"))[0]
    found = set()
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            values, changed = (m.get_parameter(CONTAINER.format(layer, name)).detach() for m in (before, after))
            for last, delta in in_llama_cpp(kind, changed - values, name).items():
                A, B = (stored[f"blk.{layer}.{last}.lora_{which}"] for which in "ab")
                assert A.shape[0] == B.shape[0] == 4
                torch.testing.assert_close(alpha / B.shape[-1] * B @ A, delta, rtol=1e-4, atol=1e-6)
                found |= {f"blk.{layer}.{last}.lora_a", f"blk.{layer}.{last}.lora_b"}
    assert {name for name in stored if "_exps." in name} == found
    assert any("attn_q" in name for name in stored)
    with pytest.raises(AdapterError, match=r"adapts experts \('blk.0.ffn_[a-z]+_exps.weight.lora_a'\), which is not read back"):
        ln.export(tmp_path / "adapter.gguf", tmp_path / "again", "peft")


def test_mixtures_that_llama_cpp_computes_otherwise_are_refused(model_folder, tmp_path):
    folder = model_folder("qwen3_moe", **{**MIXTURES["qwen3_moe"], "norm_topk_prob": False})
    with pytest.raises(ModelError, match=r"llama.cpp has qwen3_moe with norm_topk_prob = True only, and this model's is False"):
        ln.export(folder, tmp_path / "model.gguf", "gguf")
    folder = model_folder("olmoe", name="other", num_experts=4, num_experts_per_tok=2)
    with pytest.raises(ModelError, match=r"Models of type 'olmoe' cannot be written as GGUF here \(known: .*gpt_oss"):
        ln.export(folder, tmp_path / "model.gguf", "gguf")


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-5), ("bf16", 2e-2), ("Q8_0", 2e-2)])
def test_types(model_folder, batch, tmp_path, dtype, share):
    folder = model_folder(pre="smollm")
    ln.export(folder, tmp_path / "model.gguf", "gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == "smollm"
    stored = {tensor.name: tensor for tensor in reader.tensors}
    assert stored["blk.0.attn_q.weight"].tensor_type.name.lower() == {"float32": "f32"}.get(dtype, dtype.lower())
    assert stored["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    dense, _ = ln.load(str(folder))
    up = dense.model.layers[0].mlp.up_proj.weight.detach()
    again = torch.from_numpy(
        gguf.dequantize(stored["blk.0.ffn_up.weight"].data, stored["blk.0.ffn_up.weight"].tensor_type).copy()
    )
    assert float((again - up).abs().max()) <= share * float(up.abs().max())
    expected, found = logits(dense, batch), logits(by_transformers(tmp_path / "model.gguf"), batch)
    assert float((found - expected).abs().max()) <= 2 * share * float(expected.abs().max())


def test_llama3_frequencies_are_those_of_transformers(model_folder, tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    folder = model_folder(rope_parameters=rope, max_position_embeddings=256)
    ln.export(folder, tmp_path / "model.gguf", "gguf")
    factors = next(t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight").data
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    plain = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.from_numpy(factors.copy()), theirs, rtol=1e-5, atol=0)


def test_a_merged_model_of_a_packed_base(bitsandbytes, model_folder, adapt, batch, tmp_path):
    """A 4-bit checkpoint is decoded on the way."""
    folder = model_folder()
    ln.export(folder, tmp_path / "packed", "bnb-4bit")
    packed, _ = ln.load(str(tmp_path / "packed"))
    ln.export(tmp_path / "packed", tmp_path / "model.gguf", "gguf", dtype="float32")
    ln.export(tmp_path / "packed", tmp_path / "dense", "safetensors", dtype="float32")
    expected = logits(packed, batch)
    for found in (by_transformers(tmp_path / "model.gguf"), AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()):
        assert float((logits(found, batch) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_checkpoints_byte_for_byte(bitsandbytes, write, tokenizer, tmp_path, dtype, double_quant):
    """Ours equals theirs, transformers loads ours, and what it saves again is ours again."""
    folder = write("llama", hidden_size=64, intermediate_size=128, dtype=dtype)
    ln.export(folder, tmp_path / "ours", "bnb-4bit", quant={"double_quant": double_quant})
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=dtype
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    assert again.config.quantization_config.bnb_4bit_compute_dtype == dtype
    save_file(again.state_dict(), tmp_path / "again.safetensors")  # 5.23 cannot save a 4-bit model that it has loaded packed
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    for file in (tmp_path / "theirs" / "model.safetensors", tmp_path / "again.safetensors"):
        other = load_file(file)
        assert other.keys() == ours.keys()
        for key, value in other.items():
            if "quant_state" in key:
                assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(value.tolist())), key
            else:
                assert torch.equal(ours[key], value), key
    quant = ln.QuantConfig(double_quant=double_quant)
    shutil.copyfile(tmp_path / "again.safetensors", tmp_path / "theirs" / "model.safetensors")
    tokenizer.save_pretrained(tmp_path / "theirs")
    mine, loaded = ln.load(str(folder), quant=quant, dtype=dtype)[0], ln.load(str(tmp_path / "theirs"), dtype=dtype)[0]
    assert mine.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in mine.state_dict().items())


LORA = {
    "plain": {},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3.0}},
    "attention": {"target_modules": ["q_proj", "k_proj"]},
}


def test_an_activated_adapters_invocation_goes_to_gguf_and_back(model_folder, adapt, tmp_path):
    """Under llama.cpp's key; the matrices are those of an adapter that is always on."""
    folder = model_folder("llama")
    for name, options in (("plain", {}), ("activated", {"alora_invocation_tokens": [5, 7]})):
        ln.export(adapt(folder, None, name=name, **options)[1], tmp_path / f"{name}.gguf", "gguf")
    readers = [gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("plain", "activated")]
    for one, two in zip(*(reader.tensors for reader in readers), strict=True):
        assert one.name == two.name
        assert (one.data == two.data).all()
    invocation = readers[1].fields["adapter.alora.invocation_tokens"]
    assert [int(token) for token in invocation.contents()] == [5, 7]
    assert invocation.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32], "llama.cpp takes no other"
    assert "adapter.alora.invocation_tokens" not in readers[0].fields
    ln.export(tmp_path / "activated.gguf", tmp_path / "again", "peft")
    assert AdapterFile(tmp_path / "again").config.alora_invocation_tokens == [5, 7]
    ln.export(tmp_path / "plain.gguf", tmp_path / "plain again", "peft")
    assert AdapterFile(tmp_path / "plain again").config.alora_invocation_tokens is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("case", LORA)
def test_adapters_to_gguf_and_back(model_folder, adapt, batch, tmp_path, case, family):
    """What llama.cpp adds, alpha / rank * B A of the turned matrices, is the turned delta; read back it is the same adapter."""
    folder = model_folder(family)
    live, adapter = adapt(folder, None, **LORA[case])
    ln.export(adapter, tmp_path / "adapter.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    ln.merge(adapter, tmp_path / "merged", onto="original", measure_tokens=0)
    for name in ("model", "merged"):
        ln.export(tmp_path / name, tmp_path / f"{name}.gguf", "gguf", dtype="float32")
    base, merged = (
        {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors}
        for n in ("model", "merged")
    )
    assert stored
    for name in base:
        if f"{name}.lora_a" in stored:
            a, b = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
            torch.testing.assert_close(base[name] + alpha / b.shape[1] * b @ a, merged[name], rtol=0, atol=1e-5)
        else:
            assert torch.equal(base[name], merged[name])
    ln.export(tmp_path / "adapter.gguf", tmp_path / "again", "peft")  # the file says which base it is of
    plain, _ = ln.load(str(folder))
    ln.load_adapter(plain, tmp_path / "again")
    torch.testing.assert_close(logits(plain, batch), logits(live, batch), rtol=0, atol=1e-4)
    assert AdapterFile(tmp_path / "again").shapes == AdapterFile(adapter).shapes
    assert AdapterFile(tmp_path / "again").trained_on == AdapterFile(adapter).trained_on


def test_what_cannot_be_written_is_said(write, model_folder, adapt, tiny, tmp_path):
    folder, words = model_folder(), write("llama", name="words")
    _, adapter = adapt(folder, None, modules_to_save=["lm_head"], target_modules=["q_proj"])
    bloom = write("bloom", name="bloom")
    crowded = write("llama", name="crowded")
    byte_level_bpe(crowded, "gpt-2")
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    yarn = model_folder(name="yarn", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    cases = [
        (words, "gguf", {}, ModelError, r"is a WordLevel tokenizer; only BPE can be written as GGUF"),
        (bloom, "gguf", {}, ModelError, r"Models of type 'bloom' cannot be written as GGUF here \(known: llama"),
        (yarn, "gguf", {}, ModelError, r"Rotary scaling 'yarn' cannot be written"),
        (adapter, "gguf", {}, AdapterError, r"A GGUF adapter holds low-rank sums only"),
        (adapter, "bnb-4bit", {}, ConfigError, r"An adapter exports to gguf or peft-per-expert, not bnb-4bit. Merge it first"),
        (adapter, "peft", {}, ConfigError, r"is in that format already"),
        (crowded, "gguf", {}, ModelError, r"has \d+ tokens and the model 96 rows for them"),
        (folder, "peft", {}, ConfigError, r"--format peft is for adapters"),
        (folder, "safetensors", {"dtype": "q8_0"}, ConfigError, r"--dtype q8_0 is for --format gguf"),
        (folder, "gguf", {"quant": {"quant_type": "fp4"}}, ConfigError, r"are for --format bnb-4bit"),
        (tmp_path / "none.gguf", "gguf", {}, ModelError, r"There is no file"),
        (taken, "safetensors", {}, ModelError, r"Cannot read '.*taken.gguf'"),
    ]  # fmt: skip
    for source, form, options, error, message in cases:
        with pytest.raises(error, match=message):
            ln.export(source, tmp_path / "output", form, **options)
        assert not (tmp_path / "output").exists()
    with pytest.raises(OutputError, match="exists already"):
        ln.export(folder, taken, "gguf")
    assert taken.read_text() == "mine"
    big = model_folder(name="big")
    tensors = load_file(big / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, big / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight' does not fit float16: values overflow. Take --dtype bfloat16 or q8_0"):
        ln.export(big, tmp_path / "output", "gguf")
    narrow = model_folder(name="narrow", head_dim=10)
    tensors = load_file(narrow / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = 1e5
    save_file(tensors, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"o_proj.weight' does not fit float16: .* Take --dtype float32 or bfloat16\."):
        ln.export(narrow, tmp_path / "output", "gguf", dtype="q8_0")
    assert not list(tmp_path.glob(".*"))
