"""`bench parallel` in small: what is in its record follows from the runs that it starts."""

import shutil

import pytest
from tiny_folders import write_data
from transformers import LlamaConfig, LlamaForCausalLM

from lownibble.bench import parallel
from lownibble.errors import ConfigError


def test_it_has_no_peers():
    with pytest.raises(ConfigError, match="no peers"):
        parallel.bench_parallel(peers=True)


@pytest.mark.slow
def test_ranks_against_processes_and_bytes_against_the_plan(forked, tiny_model, tmp_path, monkeypatch):
    """A model of 16 MB: beside it, what is rounded up is little."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64}
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, **sizes)).save_pretrained(folder)
    for name, value in {"MODEL": str(folder), "DATA": str(write_data(tmp_path)), "STEPS": 4, "LENGTH": 32}.items():
        monkeypatch.setattr(parallel, name, value)
    record = parallel.bench_parallel(repeats=1)
    scaling = record["weak_scaling"]
    assert scaling["ratio"]["median"] == scaling["alone_s"][0] / scaling["ranks_s"][0] > 0
    for found in record["fsdp_memory"].values():
        assert [each["rank"] for each in found["held"]] == [0, 1]
        assert all(abs(each["error"]) < 0.02 for each in found["held"])  # the bound
