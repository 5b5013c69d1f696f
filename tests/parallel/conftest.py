"""Two ranks that stay for all tests, a tiny model, a wider one, and data."""

import shutil

import pytest
import torch
from ranks import Workers
from tiny_folders import tiny_data, tiny_model  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM


@pytest.fixture(scope="session")
def two():
    workers = Workers(2)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def wider_model(tiny_model, tmp_path_factory):  # noqa: F811
    """Folder of a four-layer Llama whose weights are most of it."""
    folder = tmp_path_factory.mktemp("wider") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_model, hidden_size=64, intermediate_size=256, num_hidden_layers=4, head_dim=16)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def deep_model(tiny_model, tmp_path_factory):  # noqa: F811
    """Folder of a Llama of twelve layers of 4 MB, in which a layer is little beside the model."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "head_dim": 64}
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mixture(tiny_model, tmp_path_factory):  # noqa: F811
    """Folder of a two-layer Mixtral with four experts."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    sizes = LlamaConfig.from_pretrained(tiny_model).to_dict()
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "eos_token_id",
            "bos_token_id", "pad_token_id")  # fmt: skip
    config = MixtralConfig(**{key: sizes[key] for key in kept}, intermediate_size=64, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder
