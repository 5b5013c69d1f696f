"""One causal architecture of each kind, as benchmarks/results/models.json says, of which docs/models.md is made. (All: `make
models`.) Oracles: `from_pretrained`, PEFT."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from sweep import examine, read_record
from tiny_folders import write_data, write_model

RECORD = read_record()
VERSION = RECORD["environment"]["versions"]["transformers"]
KINDS = {
    "plain": ["llama"],
    "weights held turned; query, key and value in one": ["gpt2", "bloom"],
    "a layer's output changed in place": ["falcon"],
    "the decoder of an encoder-decoder": ["bart"],
    "logits capped or scaled": ["gemma2", "granite"],
    "a configuration inside of another": ["gemma3"],
    "experts: fused, with biases and turned, with shared ones, dense": ["mixtral", "gpt_oss", "deepseek_v3", "llama4_text"],
    "states: weights that its code reads itself, mixed with attention, linear attention": [
        "mamba",
        "bamba",
        "rwkv",
        "qwen3_next",
    ],
    "a head, or a body and head, that are not known": ["bert", "rembert"],
    "no gradient": ["reformer"],
    "not traced": ["jetmoe", "xlm"],
    "renamed by PEFT": ["laguna"],
}


def test_every_outcome_of_the_record_has_a_kind():
    rows = {tuple(row.items()) for row in RECORD["rows"].values() if "built" not in row}
    assert rows == {tuple(RECORD["rows"][name].items()) for names in KINDS.values() for name in names}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, data = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("data")
    write_model(base)
    return base, Path(write_data(data))


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.skipif(transformers.__version__ != VERSION, reason="the record is of another version")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for names in KINDS.values() for name in names])
def test_an_architecture_is_as_the_record_says(folders, tmp_path, model_type):
    assert examine(model_type, tmp_path, *folders) == RECORD["rows"][model_type]
