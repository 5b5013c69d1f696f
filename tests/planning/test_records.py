"""Recommendations that go by what was measured. Oracle: the rules, worked out by hand for made-up comparisons."""

import json

import pytest

from lownibble.errors import ConfigError
from lownibble.planning import records
from lownibble.planning.plan import plan

MODEL = "smollm2-135m"


def write(folder, verdict, speed=0.9, model=MODEL, created="2026-11-22T00:00:00+00:00", **changes):
    folder.mkdir(parents=True)
    record = {
        "kind": "compare", "created": created, "config": {"model": model},
        "paired_speed": {"ratios": {"qlora_vs_lora": {"median": speed}}},
        "advice": {"quality": {"qlora_vs_lora": {"verdict": verdict, "words": "accuracy differs by +1.0 ± 2.0 points"}}},
    } | changes  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("verdict", "speed", "gpu", "method"),
    [
        ("not distinguishable from", 0.97, "rtx-4090", "qlora"),  # less memory decides
        ("not distinguishable from", 0.8, "rtx-4090", "lora"),  # too slow
        ("better than", 0.5, "rtx-4090", "qlora"),
        ("worse than", 1.5, "rtx-4090", "lora"),
        ("better than", 1.0, "memory=0.5,bandwidth=1000,tflops=100", None),  # nothing fits
    ],
)
def test_what_was_measured_decides(tmp_path, verdict, speed, gpu, method):
    write(tmp_path / "a", verdict, speed)
    advice = plan(MODEL, gpu=gpu, batch_size=1, max_length=128, records=str(tmp_path)).advice[gpu]
    assert advice[0] == method
    told = [reason for reason in advice[1] if "Measured" in reason]
    assert len(told) == (method is not None)
    if told:
        assert f"QLoRA is {verdict} LoRA" in told[0]
        assert f"{speed:.2f}" in told[0]


def test_without_a_record_of_this_model_nothing_was_measured(tmp_path):
    write(tmp_path / "other", "better than", model="llama-2-7b")
    write(tmp_path / "kind", "better than", kind="train")
    write(tmp_path / "old", "better than", advice={"method": "lora"})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "record.json").write_text("{")
    assert records.find(str(tmp_path), MODEL) is None
    assert plan(MODEL, gpu="rtx-4090", batch_size=1, records=str(tmp_path)).advice["rtx-4090"][0] == "lora"


def test_the_newest_counts_and_a_file_can_be_named(tmp_path):
    write(tmp_path / "new", "worse than", created="2026-11-22T09:00:00+00:00")
    write(tmp_path / "old", "better than", created="2026-11-21T09:00:00+00:00")
    assert records.find(str(tmp_path), MODEL).quality == "worse than"
    assert records.find(str(tmp_path / "old" / "record.json"), MODEL).quality == "better than"


def test_the_default_folder_need_not_be_there_and_another_must(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert records.find(None, MODEL) is None
    write(tmp_path / "runs" / "compare", "better than")
    assert records.find(None, MODEL).path == "runs/compare/record.json"
    with pytest.raises(ConfigError, match="There is no folder"):
        records.find("nowhere", MODEL)
