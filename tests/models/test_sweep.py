"""Every causal architecture of transformers, as benchmarks/results/models.json says, of which docs/models.md is made. Oracles:
`from_pretrained`, PEFT."""

import sys
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from sweep import examine, model_types, read_record
from tiny_folders import write_data, write_model

RECORD = read_record()
VERSION = RECORD["environment"]["versions"]["transformers"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, data = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("data")
    write_model(base)
    return base, Path(write_data(data))


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.skipif(transformers.__version__ != VERSION, reason="the record is of another version")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", model_types())
def test_an_architecture_is_as_the_record_says(folders, tmp_path, model_type):
    assert examine(model_type, tmp_path, *folders) == RECORD["rows"][model_type]
