"""GGUF files of families of another shape than Llama's. Oracles: transformers' GGUF loader, where it knows the family; else the
`gguf` reader, with llama.cpp's changes taken back here, into the model that it was."""

import json

import gguf
import pytest
import torch
from test_export import by_transformers, byte_level_bpe, logits
from transformers import AutoConfig, AutoModelForCausalLM

import lownibble as ln
from lownibble.errors import ModelError
from lownibble.exporting.gguf import ARCHITECTURES

NARROW = {"head_dim": 16, "query_pre_attn_scalar": 16}
FAMILIES = {
    "gemma": {"head_dim": 16}, "gemma2": NARROW, "gemma3_text": NARROW, "phi": {}, "phi3": {}, "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16}, "starcoder2": {"sliding_window": None}, "stablelm": {}, "olmo2": {}, "nemotron": {}, "gpt2": {},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}  # fmt: skip
READ_BY_TRANSFORMERS = ("gemma2", "gemma3_text", "phi3", "starcoder2", "stablelm", "nemotron", "gpt2")
CLOSE = 1e-4
"""Largest difference of logits relative to the largest: float32, and a norm's weight plus 1 minus 1."""


@pytest.fixture
def model_folder(tiny, tmp_path):
    """`model_folder(family, name, **options)`: a tiny model with a byte-level BPE tokenizer."""

    def _write(family, name="model", **options):
        folder = tmp_path / name
        folder.mkdir()
        size = byte_level_bpe(folder, "gpt-2")
        sizes = {"vocab_size": size, "hidden_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        if family != "gpt2":
            sizes["intermediate_size"] = 128
        tiny(family, **sizes, **options).save_pretrained(folder)
        return folder

    return _write


def taken_back(kind, name, values, config):
    """A tensor of llama.cpp's file as transformers has it: norms minus 1, rotary pairs as halves, Conv1D turned."""
    if kind in ("gemma", "gemma2", "gemma3_text", "nemotron") and name.endswith("norm.weight"):
        return values - 1
    if kind == "granite" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
    return values.t() if kind == "gpt2" and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and values.ndim == 2 else values


def read_back(file, folder, kind):
    """The model of the file, by the reader and the table of names."""
    reader, config = gguf.GGUFReader(file), AutoConfig.from_pretrained(folder)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind].name)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    model = AutoModelForCausalLM.from_config(config).eval()
    stored = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = stored.pop(table.get_name(name, try_suffixes=(".weight", ".bias")))
            parameter.copy_(taken_back(kind, name, values, config))
    assert not stored, "every tensor has a place"
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_same_logits_are_read_back(model_folder, batch, tmp_path, kind):
    folder, file = model_folder(kind, **FAMILIES[kind]), tmp_path / "model.gguf"
    ln.export(folder, file, "gguf", dtype="float32")
    expected = logits(ln.load(str(folder))[0], batch)
    models = [read_back(file, folder, kind)]
    if kind in READ_BY_TRANSFORMERS:
        models.append(by_transformers(file, config=AutoConfig.from_pretrained(folder)))
    for model in models:
        assert float((logits(model, batch) - expected).abs().max()) <= CLOSE * float(expected.abs().max())


def test_what_llama_cpp_needs_to_know_is_in_the_file(model_folder, tmp_path):
    wanted = {
        "granite": {"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0},
        "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 8,
                   "attention.key_length": 16, "attention.layer_norm_rms_epsilon": 1e-6},
        "gemma3_text": {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 8},
        "phi": {"rope.dimension_count": 4, "attention.layer_norm_epsilon": 1e-5, "feed_forward_length": 128},
        "gpt2": {"context_length": 128, "attention.layer_norm_epsilon": 1e-5},
    }  # fmt: skip
    for kind, facts in wanted.items():
        options = {**FAMILIES[kind], **({"sliding_window": 8} if "gemma" in kind else {})}
        if kind == "phi":
            options["partial_rotary_factor"] = 0.25
        if kind == "gpt2":
            options["max_position_embeddings"] = 128
        folder = model_folder(kind, name=kind, **options)
        ln.export(folder, tmp_path / f"{kind}.gguf", "gguf")
        reader = gguf.GGUFReader(tmp_path / f"{kind}.gguf")
        name = ARCHITECTURES[kind].name
        found = {key: reader.fields[f"{name}.{key}"].contents() for key in facts}
        assert found == pytest.approx(facts), kind


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_window_as_wide_as_the_model_is_said_where_llama_cpp_has_a_default(model_folder, tmp_path, kind):
    folder = model_folder(kind, **NARROW, sliding_window=8192, max_position_embeddings=8192)
    ln.export(folder, tmp_path / "model.gguf", "gguf")
    found = gguf.GGUFReader(tmp_path / "model.gguf").fields[f"{ARCHITECTURES[kind].name}.attention.sliding_window"]
    assert found.contents() == 8192


@pytest.mark.parametrize(("kind", "name"), [("gemma", "gelu"), ("llama", "swish")])
def test_other_names_of_the_same_function_are_written(model_folder, tmp_path, kind, name):
    """Gemma's own configurations say 'gelu' for the tanh approximation."""
    folder = model_folder(kind, **FAMILIES.get(kind, {}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": name}))
    assert ln.export(folder, tmp_path / "model.gguf", "gguf")["architecture"] == kind


def test_adapters_on_conv1d_are_read_back(model_folder, adapt, batch, tmp_path):
    folder = model_folder("gpt2")
    live, adapter = adapt(folder, None, target_modules=["c_attn", "c_fc", "c_proj"])
    ln.export(adapter, tmp_path / "adapter.gguf", "gguf")
    ln.export(tmp_path / "adapter.gguf", tmp_path / "again", "peft")
    again = ln.load_adapter(ln.load(str(folder))[0], tmp_path / "again").eval()
    torch.testing.assert_close(logits(again, batch), logits(live, batch), rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("gemma2", {"query_pre_attn_scalar": 64, "head_dim": 16}, "query_pre_attn_scalar = 16 only"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm = False only"),
        ("starcoder2", {"sliding_window": 8, "max_position_embeddings": 64}, "A sliding window cannot be written"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = False only"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act = 'gelu_pytorch_tanh' only, and this model's is 'relu'"),
        *(
            (kind, {"hidden_act": "gelu", "norm_topk_prob": True}, "hidden_act = 'silu' only, and this model's is 'gelu'")
            for kind in ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "granite", "phi3", "olmo2")
        ),
        *(
            ("gemma2", {**NARROW, key: None}, f"computes gemma2 with {key} always, and this model has none")
            for key in ("attn_logit_softcapping", "final_logit_softcapping")
        ),
    ],
)
def test_what_llama_cpp_has_otherwise_is_refused(model_folder, tmp_path, kind, options, says):
    with pytest.raises(ModelError, match=says):
        ln.export(model_folder(kind, **options), tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()
