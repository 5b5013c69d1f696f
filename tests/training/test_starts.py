"""`init_lora_weights='auto'`. Oracles: what each case can do; runs that name the start and the rate."""

import json
from pathlib import Path

import pytest
from tiny_folders import WORDS, write_model, write_t5

import lownibble as ln
from lownibble.cli.main import main
from lownibble.config import COMPARE_TRAIN, CompareConfig, LoraConfig, QuantConfig, RunConfig
from lownibble.planning.plan import plan
from lownibble.study.cell import work
from lownibble.study.compare import compare
from lownibble.training.starts import decide

QUANT = QuantConfig(block_size=32)
AUTO = LoraConfig(r=2, init_lora_weights="auto")


@pytest.fixture
def base(tmp_path):
    return str(write_model(tmp_path / "base"))


@pytest.fixture
def rows(tmp_path):
    lines = (" ".join(WORDS[(i + j) % len(WORDS)] for j in range(6)) for i in range(60))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return {"path": str(tmp_path / "rows.jsonl"), "calibration_tokens": 256, "max_eval_rows": 4}


TRAIN = {"max_steps": 2, "batch_size": 4, "max_length": 32}


@pytest.mark.parametrize(
    ("options", "start", "rate"),
    [
        ({"method": "qlora"}, "qera", 9e-3), ({"method": "lora"}, True, 3.6e-2),
        ({"method": "qlora", "merge_aware": True}, True, 3.6e-2),
        ({"method": "qlora", "train": {"learning_rate": 1e-3}}, "qera", 1e-3),
    ],
)  # fmt: skip
def test_what_is_decided(base, options, start, rate):
    config = RunConfig(model=base, quant=QUANT, lora=AUTO, **options)
    decided, words = decide(config)
    assert (decided.lora.init_lora_weights, decided.train.learning_rate) == (start, rate)
    assert words.startswith(f"adapters start as {start!r}: ")
    assert words.endswith(f"learning rate {rate:g}")
    assert decided.with_options(lora=AUTO, train=config.train) == config
    assert decide(decided) == (decided, "")


def test_a_packed_checkpoint_is_corrected_where_its_dense_model_is_known(base, tmp_path):
    ln.quantize_model(base, tmp_path / "ours", rounding="rtn", quant=QUANT)
    ln.export(base, str(tmp_path / "others"), format="bnb-4bit", quant=QUANT)
    of = {name: decide(RunConfig(model=str(tmp_path / name), lora=AUTO, method="qlora")) for name in ("ours", "others")}
    assert of["ours"][0].lora.init_lora_weights == "qera"
    assert of["others"][0].lora.init_lora_weights is True
    assert "dense weights are not to be had" in of["others"][1]


def test_a_packed_checkpoint_whose_dense_model_is_gone_gets_the_plain_start(base, tmp_path):
    ln.quantize_model(base, tmp_path / "ours", rounding="rtn", quant=QUANT)
    Path(base).rename(tmp_path / "elsewhere")
    assert decide(RunConfig(model=str(tmp_path / "ours"), lora=AUTO, method="qlora"))[0].lora.init_lora_weights is True


def test_plans_are_of_what_is_decided(base, tmp_path):
    ln.quantize_model(base, tmp_path / "ours", rounding="rtn", quant=QUANT)
    ln.export(base, str(tmp_path / "others"), format="bnb-4bit", quant=QUANT)

    def peak(name, start):
        options = {"gpu": "cpu", "method": "qlora", "max_length": 32, "calibration_tokens": 4096}
        return plan(str(tmp_path / name), **options, init_lora_weights=start).rows[0].verdict.memory.to_dict()

    assert peak("ours", "auto") == peak("ours", "qera")
    assert peak("others", "auto") == peak("others", True) != peak("others", "qera")
    write_t5(tmp_path / "t5")
    assert peak("t5", "auto") == peak("t5", True)


def test_an_encoder_gets_the_plain_start(tmp_path):
    decided, words = decide(RunConfig(model=str(write_t5(tmp_path / "t5")), lora=AUTO, method="qlora", quant=QUANT))
    assert decided.lora.init_lora_weights is True
    assert "a text decoder alone" in words


def test_other_starts_and_full_fine_tuning_are_left_alone(base):
    for config in (RunConfig(model="missing"), RunConfig(model="missing", lora=AUTO, method="full")):
        assert decide(config) == (config, "")


def test_a_run_is_the_one_that_names_start_and_rate(base, rows):
    subject = {"model": base, "method": "qlora", "quant": QUANT, "data": rows}
    found = ln.run(RunConfig(**subject, lora=AUTO, train=TRAIN))
    named = ln.run(RunConfig(**subject, lora=AUTO.with_options(init_lora_weights="qera"), train={**TRAIN, "learning_rate": 9e-3}))
    assert found.losses == named.losses
    assert found.record["config"] == named.record["config"]


def test_add_lora_starts_by_qera_and_needs_rows(base):
    model, _ = ln.load(base, quant=QUANT)
    with pytest.raises(ln.errors.TargetError, match="'auto' looks at the inputs of the layers: give add_lora calibration rows"):
        ln.add_lora(model, AUTO)


@pytest.mark.slow
def test_a_comparison_keeps_its_rate_and_resumes(base, rows, tmp_path, forked):
    options = {"model": base, "methods": ["lora+auto", "qlora+auto"], "quant": QUANT, "data": rows}
    train = COMPARE_TRAIN.with_options(**TRAIN, eval_steps=2, output_dir=str(tmp_path / "out"))
    options |= {"train": train, "device": "cpu"}
    config = CompareConfig(**options)
    found = compare(config)
    runs = [json.loads((tmp_path / "out" / name / "record.json").read_text())["config"] for name in config.methods]
    assert [run["lora"]["init_lora_weights"] for run in runs] == [True, "qera"]
    assert {run["train"]["learning_rate"] for run in runs} == {COMPARE_TRAIN.learning_rate}
    resumed = CompareConfig(**{**options, "train": train.with_options(resume=True)})
    assert compare(resumed)["methods"] == found["methods"]


def test_a_cell_of_a_study_keeps_its_rate_and_says_its_start(base, rows):
    config = RunConfig(model=base, method="qlora", quant=QUANT, lora=AUTO, data=rows, train=TRAIN)
    spec = {"config": config.model_dump(mode="json", exclude_defaults=True), "tuning": True, "kind": "completion"}
    found = work(spec)["result"]
    named = config.with_options(lora=AUTO.with_options(init_lora_weights="qera"), train={**TRAIN, "learning_rate": 2e-4})
    assert found["start"] == "qera"
    assert found["losses"] == ln.run(named).losses


def test_the_command_says_what_was_decided(base, rows, tmp_path, capsys):
    given = {"model": base, "data": rows["path"], "calibration-tokens": 256, "output": tmp_path / "run", "max-steps": 1}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    start = ["--init-lora-weights", "auto", "--block-size", "32", "--batch-size", "4", "--max-length", "32"]
    assert main(["train", "--method", "qlora", *flags, *start]) == 0
    assert "adapters start as 'qera': it makes up for what packing lost; learning rate 0.009" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "record.json").read_text())["config"]["lora"]["init_lora_weights"] == "qera"
