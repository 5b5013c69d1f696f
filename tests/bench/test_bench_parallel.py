"""`bench parallel` in small: what is in its record follows from the runs that it starts."""

import pytest

from lownibble.bench import parallel
from lownibble.errors import ConfigError


def test_it_has_no_peers():
    with pytest.raises(ConfigError, match="no peers"):
        parallel.bench_parallel(peers=True)


@pytest.mark.slow
def test_ranks_against_processes_and_bytes_against_the_plan(monkeypatch):
    monkeypatch.setattr(parallel, "STEPS", 4)
    monkeypatch.setattr(parallel, "LENGTH", 32)
    record = parallel.bench_parallel(repeats=1)
    scaling = record["weak_scaling"]
    assert scaling["ratio"]["median"] == scaling["alone_s"][0] / scaling["ranks_s"][0] > 0
    for found in record["fsdp_memory"].values():
        assert [each["rank"] for each in found["held"]] == [0, 1]
        assert all(abs(each["error"]) < 0.02 for each in found["held"])  # the bound
