"""The tiny model and data on disk."""

import json
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


@pytest.fixture
def rows_of(tmp_path):
    """`rows_of(n)`: a data set of n rows of text."""

    def _rows(n):
        lines = [json.dumps({"text": " ".join(f"w{(3 * i + j) % 90}" for j in range(9))}) for i in range(n)]
        (tmp_path / "data").mkdir(exist_ok=True)
        for side in ("train", "test"):
            (tmp_path / "data" / f"{side}.jsonl").write_text("\n".join(lines) + "\n")
        return ln.DataConfig(path=str(tmp_path / "data"))

    return _rows
