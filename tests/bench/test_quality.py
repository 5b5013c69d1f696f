"""`lownibble bench quality`. Oracle: figures worked out by hand from made-up runs."""

from types import SimpleNamespace

import pytest

from lownibble.bench import quality
from lownibble.errors import ConfigError, DataError

LOSSES = {
    ("demo", "exact"): [1.0, 2.0, 3.0],
    ("demo", "int8"): [1.5, 2.5, 3.5],
    ("nli", "exact"): [4.0, 4.0, 4.1],
    ("nli", "int8"): [4.2] * 3,
}


@pytest.fixture
def made_up_runs(monkeypatch):
    asked = []

    def run(config):
        key = (config.data.path, config.quant.compute)
        asked.append((*key, config.train.seed, config.method))
        evaluation = {"loss": LOSSES[key][config.train.seed], "scores": {"accuracy": 0.5}}
        model = {"head_compute": config.quant.compute}
        return SimpleNamespace(record={"evaluations": [{"loss": 9.0, "scores": {}}, evaluation], "model": model})

    monkeypatch.setattr(quality, "run", run)
    monkeypatch.setattr(quality, "load_data", lambda config: None)
    return asked


def test_runs_of_one_seed_are_compared_in_pairs_with_the_seeds_as_yardstick(made_up_runs):
    found = quality.bench_quality(repeats=3, data="nli")
    tasks = [(path, compute, seed, "qlora") for path in ("demo", "nli") for seed in range(3) for compute in ("exact", "int8")]
    assert made_up_runs == tasks
    demo, nli = (found["tasks"][path]["figures"]["loss"] for path in ("demo", "nli"))
    assert demo["differences"] == [0.5, 0.5, 0.5]
    assert (demo["exact_mean"], demo["exact_sd"], demo["int8_mean"], demo["difference_mean"]) == (2.0, 1.0, 2.5, 0.5)
    assert demo["within"], "half a standard deviation of the seeds"
    assert demo["difference_se"] == 0
    assert nli["difference_mean"] == pytest.approx(0.5 / 3)
    assert not nli["within"], "three standard deviations"
    assert found["tasks"]["nli"]["figures"]["accuracy"]["within"]
    assert found["headlines"]["differences smaller than between seeds"] == "False"
    assert found["workload"]["head"] == "int8", "the int8 runs' head, not that of the exact ones"


@pytest.mark.parametrize("options", [{"peers": True}, {"repeats": 1}])
def test_what_it_cannot_do_is_refused(options):
    with pytest.raises(ConfigError, match="at least two seeds"):
        quality.bench_quality(**options)


def test_rows_of_another_kind_are_refused_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "run", lambda config: pytest.fail("nothing should be trained"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n' * 30)
    with pytest.raises(DataError, match="premise"):
        quality.bench_quality(data=str(tmp_path / "rows.jsonl"))
