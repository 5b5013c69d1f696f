"""Shapes read from config.json. Oracle: transformers' own models, on the meta device."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lownibble.arch import _KEYS, FAMILIES, is_known, paths, read_shape
from lownibble.errors import ModelError

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 100,
}  # fmt: skip
MORE = {
    "mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4}, "phi3": {"pad_token_id": 0}, "qwen3": {"head_dim": 32},
    "t5": {"d_model": 64, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 100},
}  # fmt: skip


def config_of(model_type, **changes):
    sizes = {} if model_type == "t5" else SIZES
    return {"model_type": model_type, **sizes, **MORE.get(model_type, {}), **changes}


def model_of(config):
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        kind = AutoModelForSeq2SeqLM if config["model_type"] == "t5" else AutoModelForCausalLM
        return kind.from_config(AutoConfig.for_model(config["model_type"], **values))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}], ids=str)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_transformers(model_type, changes):
    config = config_of(model_type, **changes)
    shape, model = read_shape(config), model_of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    theirs = {
        path: (m.in_features, m.out_features, m.bias is not None)
        for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()
    }  # fmt: skip
    assert {path: (linear.in_features, linear.out_features, linear.bias) for path, linear in paths(shape)} == theirs


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_written_by_transformers_gives_the_same(model_type, tmp_path):
    config = config_of(model_type)
    model_of(config).config.save_pretrained(tmp_path)
    assert read_shape(tmp_path).parameters == read_shape(config).parameters


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(
        ModelError, match=r"'x' is a 'lama', which the planner does not know. The nearest that it knows is 'llama'"
    ):
        read_shape(config_of("lama"), "x")


def test_missing_fields_are_named():
    config = config_of("llama")
    del config["hidden_size"], config["num_hidden_layers"]
    with pytest.raises(ModelError, match="'x' lacks num_hidden_layers, hidden_size"):
        read_shape(config, "x")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_configuration_leaves_out_is_what_transformers_takes(model_type):
    """Oracle: the default configuration of transformers' class, with sizes that are its own default or far smaller."""
    whole = AutoConfig.for_model(model_type).to_dict()
    keys = {**_KEYS, **FAMILIES[model_type].names}
    least = {"model_type": model_type, **{keys[ours]: whole[keys[ours]] for ours in ("layers", "hidden")}}
    found, expected = read_shape(least, "x"), read_shape({**whole, "model_type": model_type}, "x")
    assert (found.parameters, found.window) == (expected.parameters, expected.window)


@pytest.mark.parametrize("changes", [
    {}, {"use_sliding_window": False}, {"use_sliding_window": True}, {"use_sliding_window": True, "max_window_layers": 3},
    {"use_sliding_window": True, "max_window_layers": 2}, {"use_sliding_window": True, "sliding_window": None},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe", "mistral", "gpt_oss"])
def test_windows_are_those_of_transformers(model_type, changes):
    config = config_of(model_type, **{"sliding_window": 16, **changes})
    theirs = AutoConfig.for_model(**config)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"]
    assert read_shape(config).window == (theirs.sliding_window if "sliding_attention" in kinds else None)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi", "phi3"])
def test_key_heads_that_are_null_are_as_many_as_heads(model_type):
    config = config_of(model_type, num_attention_heads=8, num_key_value_heads=None, head_dim=8)
    assert read_shape(config).key_heads == AutoConfig.for_model(**config).num_key_value_heads == 8


def test_norms_that_a_family_has_not_are_left_to_be_traced():
    config = config_of("phi", qk_layernorm=True)
    assert not is_known(config)
    with pytest.raises(ModelError, match=r"norms of query and key \(qk_layernorm\), which .* --exact"):
        read_shape(config, "x")


def test_the_text_model_of_a_wrapper_is_planned_and_said():
    published = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    shape = read_shape({"model_type": "gemma3", "text_config": published}, "gemma-3-4b")
    assert (shape.heads, shape.key_heads, shape.head_dim, shape.vocab, shape.wrapper) == (8, 4, 256, 262208, "gemma3")
    assert read_shape(published, "x").wrapper == ""
    assert read_shape({**published, "text_config": None}, "x").wrapper == ""
    assert is_known({**published, "text_config": None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, r"hidden_size = '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads = 3"),
    ],
)
def test_fields_that_make_no_sense_are_named(changes, message):
    with pytest.raises(ModelError, match=message):
        read_shape(config_of("llama", head_dim=16, **changes), "x")


@pytest.mark.parametrize(("content", "message"), [(None, "Cannot read"), ("{", "is not JSON"), ("[]", "is not a model's")])
def test_files_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ModelError, match=message):
        read_shape(file)


def test_a_text_model_inside_another():
    assert read_shape({"model_type": "gemma3", "text_config": config_of("gemma3_text")}).hidden == 64


def test_json_of_a_shape_is_read_without_torch(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of("llama")))
    assert read_shape(str(file)).name == str(file)
