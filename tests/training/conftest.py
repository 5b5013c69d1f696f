"""The tiny model and data on disk."""

import shutil

import pytest
import torch
from tiny_folders import tiny_data, tiny_model  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

import lownibble as ln


@pytest.fixture(scope="module")
def widen(tiny_model, tmp_path_factory):  # noqa: F811
    """The tiny model as wide as the kernels want, with other changes to its configuration."""

    def make(**changes):
        folder = tmp_path_factory.mktemp("wide") / "model"
        shutil.copytree(tiny_model, folder)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, **sizes, **changes)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def tiny_run(tiny_model, tiny_data):  # noqa: F811
    """(dense model, tokenizer, data) as a Python user has them."""
    model, tokenizer = ln.load(str(tiny_model), device="cpu")
    return model, tokenizer, ln.DataConfig(path=str(tiny_data))
