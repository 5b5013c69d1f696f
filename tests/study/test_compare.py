"""Comparisons on a tiny model, and the rules of the advice. Oracles: the runs' own records, arithmetic by hand."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from lownibble import record
from lownibble.cli.said import console_of
from lownibble.config import CompareConfig, DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import load
from lownibble.errors import ConfigError, DataError, OutputError, TargetError
from lownibble.exporting.convert import export
from lownibble.measuring import mixed
from lownibble.measuring.stats import crossing
from lownibble.study import advice
from lownibble.study import compare as comparing
from lownibble.study.compare import compare, computed_in
from lownibble.study.paired import paired_speed
from lownibble.study.processes import run_module
from lownibble.study.table import comparison_table, markdown
from lownibble.study.worker import failed
from lownibble.training.output import hold
from lownibble.training.run import run


def _config(tiny_model, tiny_data, output, **changes):
    data = DataConfig(path=str(tiny_data), prompt_template="review : {text} sentiment :", completion_template=" {label}")
    options = {
        "model": str(tiny_model), "data": data, "lora": LoraConfig(r=2), "quant": QuantConfig(block_size=32),
        "train": TrainConfig(max_steps=4, batch_size=8, max_length=32, eval_steps=2, output_dir=str(output)),
    }  # fmt: skip
    return CompareConfig(**(options | changes))


@pytest.mark.slow
def test_compare_runs_each_method_writes_its_files_and_resumes(tiny_model, tiny_data, tmp_path, forked):
    output = tmp_path / "cmp"
    config = _config(tiny_model, tiny_data, output, methods=["full", "lora", "qlora"])
    result = compare(config)
    assert [s["status"] for s in result["methods"]] == ["ok", "ok", "ok"]
    assert result["advice"]["method"] in ("full", "lora", "qlora")
    assert json.loads((output / "record.json").read_text()) == result
    for summary in result["methods"]:
        run = json.loads((output / summary["method"] / "record.json").read_text())
        assert summary["tokens_per_s"] == run["speed"]["tokens_per_s"]
        assert summary["eval_loss"] == run["evaluations"][-1]["loss"]
        assert sum(summary["bytes_by_kind"].values()) >= summary["peak_bytes"]
        assert summary["perplexity"] == pytest.approx(math.exp(summary["eval_loss"]))
        assert summary["target_loss"] >= min(e["loss"] for e in run["evaluations"])
    paired = result["paired_speed"]
    assert set(paired["ratios"]) == {"lora_vs_full", "qlora_vs_full", "qlora_vs_lora"}
    for name, ratio in paired["ratios"].items():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"], name
    assert set(paired["tokens_per_s"]) == {"full", "lora", "qlora"}
    assert all(s["paired_tokens_per_s"] == paired["tokens_per_s"][s["method"]] for s in result["methods"])
    page = (output / "report.html").read_text()
    assert "<svg" in page
    table = markdown(result["methods"]).splitlines()
    assert all(line.count("|") == 5 for line in table)  # a column a method, and the names
    [planned] = [line for line in table if "planned" in line]
    for summary in result["methods"]:
        error = f"({summary['planned']['error']:+.0%})"
        assert error in planned
        assert error in page
        quality = result["advice"]["quality"]
    assert set(quality) == {"lora_vs_full", "qlora_vs_full", "qlora_vs_lora"}
    with pytest.raises(OutputError, match="holds another run"):
        compare(config)
    again = compare(config.with_options(train=config.train.with_options(resume=True)))
    assert again["methods"] == result["methods"]


def test_summaries_of_preference_losses_and_of_shards_in_host_memory(tiny_model, tmp_path):
    pairs = [{"prompt": "the film was", "chosen": " good", "rejected": " bad"}] * 4
    for side in ("train", "test"):
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    output = str(tmp_path / "out")
    train = TrainConfig(objective="dpo", max_steps=1, batch_size=2, max_length=32, output_dir=output)
    trained = run(RunConfig(model=str(tiny_model), method="lora", data=DataConfig(path=str(tmp_path)), train=train))
    summary = comparing.summarize(trained.record)
    assert summary["eval_loss"] == trained.record["evaluations"][-1]["loss"]
    assert "perplexity" not in summary
    memory = trained.record["memory"]
    memory["host_bytes"] = memory["weights_bytes"]
    kinds = comparing.summarize(trained.record)["bytes_by_kind"]  # of the device alone
    assert kinds.pop("activations") + kinds.pop("other") == max(summary["peak_bytes"], memory["saved_activation_bytes"])
    assert set(kinds.values()) == {0}


def test_a_method_that_fails_is_recorded_and_the_others_go_on(tiny_model, tiny_data, tmp_path, forked, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "killed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(
        comparing, "run_module", lambda name, spec, **how: run_module("killed" if "spec-qlora" in spec else name, spec, **how)
    )
    result = compare(_config(tiny_model, tiny_data, tmp_path / "cmp", methods=["qlora", "lora"]))
    assert [s["status"] for s in result["methods"]] == ["failed", "ok"]
    assert "SIGKILL" in result["methods"][0]["error"]
    assert result["advice"]["method"] == "lora"
    assert "SIGKILL" in json.loads((tmp_path / "cmp" / "qlora" / "record.json").read_text())["error"]
    assert "SIGKILL" in (tmp_path / "cmp" / "report.html").read_text()


def test_methods_that_cannot_train_on_a_quantised_base_are_left_out_by_name(tiny_model, tiny_data, tmp_path, monkeypatch):
    four_bits = tmp_path / "four-bits"
    export(str(tiny_model), str(four_bits), format="bnb-4bit", quant=QuantConfig(block_size=32))
    monkeypatch.setattr(comparing, "run_in_processes", lambda run, ranks: failed(run, "killed by the test"))
    result = compare(_config(four_bits, tiny_data, tmp_path / "cmp", methods=["lora", "qlora"]))
    assert [s["status"] for s in result["methods"]] == ["left out", "failed"]
    assert "| result | left out: The weights are stored as nf4 (bitsandbytes), on which qlora trains." in markdown(
        result["methods"]
    )
    assert "left out: The weights are stored" in (tmp_path / "cmp" / "report.html").read_text()
    assert result["advice"]["reasons"][0].startswith("lora left out: The weights")
    with pytest.raises(
        ConfigError, match=r"cannot be trained with lora or full: .* nf4 \(bitsandbytes\), on which qlora trains\. Take"
    ):
        compare(_config(four_bits, tiny_data, tmp_path / "other", methods=["lora", "full"]))
    assert not (tmp_path / "other").exists()


def test_bad_input_is_an_error_before_any_run(tiny_model, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    config = _config(tiny_model, tmp_path, tmp_path / "cmp", data=DataConfig(path=str(tmp_path / "empty.jsonl")))
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        compare(config)
    assert not (tmp_path / "cmp").exists()


def test_targets_that_match_nothing_are_an_error_before_any_run(tiny_model, tiny_data, tmp_path):
    with pytest.raises(TargetError, match="q_proj"):
        compare(_config(tiny_model, tiny_data, tmp_path / "cmp", lora=LoraConfig(target_modules=["query"])))
    assert not (tmp_path / "cmp").exists()


def test_a_comparison_that_was_interrupted_is_refused_without_resume(tiny_model, tiny_data, tmp_path):
    (tmp_path / "cmp" / "lora").mkdir(parents=True)
    with pytest.raises(OutputError, match="holds another run"):
        compare(_config(tiny_model, tiny_data, tmp_path / "cmp"))


def test_a_comparison_in_a_folder_that_another_one_uses(tiny_model, tiny_data, tmp_path):
    config = _config(tiny_model, tiny_data, tmp_path / "cmp")
    with hold(tmp_path / "cmp"), pytest.raises(OutputError, match="Another process is using"):
        compare(config.with_options(train=config.train.with_options(resume=True)))
    assert [path.name for path in (tmp_path / "cmp").iterdir()] == [".lock"]


def test_a_comparison_of_other_rows_does_not_go_on(tiny_model, tiny_data, tmp_path, monkeypatch):
    shutil.copytree(tiny_data, tmp_path / "rows")
    ran = []

    def stand_in(run, ranks=1):
        rows = {f"{n}_digest": side.digest for n, side in zip(("train", "eval"), load(run.data), strict=True)}
        ran.append(run.method)
        status = "ok" if run.method == "lora" else "failed"
        found = {"status": status, "error": "boom", "config": run.to_dict(), "data": rows}
        record.write(Path(run.train.output_dir) / "record.json", found)
        raise OutputError("interrupted")

    monkeypatch.setattr(comparing, "run_in_processes", stand_in)
    config = _config(tiny_model, tmp_path / "rows", tmp_path / "cmp", methods=["lora", "qlora"])
    again = config.with_options(train=config.train.with_options(resume=True))
    with pytest.raises(OutputError, match="interrupted"):
        compare(config)
    with pytest.raises(OutputError, match="interrupted"):
        compare(again)
    assert ran == ["lora", "qlora"]
    [file] = (tmp_path / "rows").glob("train.*")
    file.write_text(file.read_text().replace("film", "book"))
    with pytest.raises(OutputError, match=r"other rows: those of .*rows' have changed"):
        compare(again)
    assert ran == ["lora", "qlora"]


def test_rows_that_change_while_it_runs_end_a_comparison(tiny_model, tiny_data, tmp_path, monkeypatch):
    rows = shutil.copytree(tiny_data, tmp_path / "rows")
    [file] = rows.glob("train.*")
    ran = []

    def stand_in(run, ranks=1):
        ran.append(run.method)
        if len(ran) == 2:
            file.write_text(file.read_text().replace("film", "book"))
        digests = {f"{n}_digest": side.digest for n, side in zip(("train", "eval"), load(run.data), strict=True)}
        return {"status": "failed", "error": "not run", "config": run.to_dict(), "data": digests}

    monkeypatch.setattr(comparing, "run_in_processes", stand_in)
    with pytest.raises(DataError, match="rows' changed while the comparison ran"):
        compare(_config(tiny_model, rows, tmp_path / "cmp", methods=["lora", "qlora"]))
    assert ran == ["lora", "qlora"]


def test_errors_with_brackets_are_shown_as_they_are(capsys):
    error = "ends with [/INST] [enforce fail at alloc_cpu.cpp:113]"
    console_of(Namespace(json=False)).print(comparison_table([{"method": "lora", "status": "failed", "error": error}]))
    shown = capsys.readouterr().out
    assert all(word in shown for word in error.split())


@pytest.mark.slow
def test_worker_exit_code_says_that_the_run_failed(tiny_model, tiny_data, tmp_path, forked):
    config = _config(tiny_model, tiny_data, tmp_path / "out")
    spec = {k: v for k, v in config.to_dict().items() if k not in ("methods", "seeds")} | {"method": "lora"}
    spec["train"]["learning_rate"] = 1e30
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert run_module("lownibble.study.worker", str(tmp_path / "spec.json")) == {0: 1}
    record = json.loads((tmp_path / "failed-0.json").read_text())
    assert record["status"] == "failed"
    assert "TrainingError" in record["error"]


@pytest.mark.parametrize(
    ("curve", "target", "step"),
    [
        ([(0, 4.0), (10, 2.0)], 3.0, 5.0),
        ([(0, 4.0), (10, 2.0)], 2.0, 10.0),
        ([(0, 4.0), (10, 5.0), (20, 1.0)], 3.0, 15.0),
        ([(0, 1.0), (10, 2.0)], 1.5, 0.0),
    ],
)
def test_crossing_is_linear_between_evaluations(curve, target, step):
    assert crossing(curve, target) == pytest.approx(step)


def _summary(method, peak, rate, correct=(), loss=1.0, status="ok"):
    if status != "ok":
        return {"method": method, "status": status, "error": "no memory"}
    return {
        "method": method, "status": "ok", "peak_bytes": peak, "tokens_per_s": rate, "correct": list(correct), "eval_loss": loss
    }  # fmt: skip


GOOD, MIXED = [True] * 100, [True, False] * 50


@pytest.mark.parametrize(
    ("summaries", "method"),
    [
        pytest.param([_summary("lora", 100, 10, GOOD), _summary("qlora", 60, 9, GOOD)], "qlora", id="equal quality: memory"),
        pytest.param([_summary("lora", 100, 10, GOOD), _summary("qlora", 98, 9, GOOD)], "lora", id="little saved: speed"),
        pytest.param([_summary("lora", 100, 10, GOOD), _summary("qlora", 60, 9, MIXED)], "lora", id="clearly better quality"),
        pytest.param([_summary("lora", 100, 10, loss=1.0), _summary("qlora", 60, 9, loss=1.2)], "qlora", id="loss without error"),
        pytest.param([_summary("lora", 0, 0, status="failed"), _summary("qlora", 60, 9)], "qlora", id="only one finished"),
        pytest.param([_summary("lora", 0, 0, status="failed")], None, id="none finished"),
    ],
)
def test_advice_follows_its_rules(summaries, method):
    found = advice.advise(summaries)
    assert found["method"] == method
    assert found["reasons"]
    assert all("no memory" in r for r, s in zip(found["reasons"], summaries, strict=False) if s["status"] == "failed")


def _results(**accuracy):
    """Results over seeds: method -> accuracy by seed, over 100 rows of which the first ones are right."""
    return {
        name.replace("_", "+"): {
            seed: {"scores": {"loss": 1.0}, "row_scores": {"accuracy": [1.0] * right + [0.0] * (100 - right)}}
            for seed, right in enumerate(of)
        }
        for name, of in accuracy.items()
    }  # fmt: skip


def test_losses_of_zero_are_told_apart():
    runs = [{"correct": [], "eval_loss": loss} for loss in (0.0, 0.25)]
    assert advice.better_in_quality(*runs)[1].startswith("evaluation loss differs by -100.0 %")
    assert advice.better_in_quality(*reversed(runs))[1].startswith("evaluation loss differs by +0.25, of one seed")


def test_over_seeds_only_what_is_shown_counts_and_what_could_have_been_is_told():
    """Oracle: the mixed model on the same rows. 4 points between noisy seeds are inside their error, 40 are not."""
    summaries = [_summary("lora", 100, 10), _summary("qlora+exact", 62, 5), _summary("qlora", 60, 9)]
    near = _results(lora=[84, 80, 88], qlora_exact=[83, 84, 86], qlora=[80, 84, 76])
    pairs = advice.over_seeds(near)
    found = advice.advise(summaries, {}, pairs)
    assert found["method"] == "qlora"  # no worse, and leaner
    by_names = {(pair["a"], pair["b"]): pair for pair in pairs}
    lora, qlora = (np.array([near[name][s]["row_scores"]["accuracy"] for s in range(3)]) for name in ("lora", "qlora"))
    expected = mixed.estimate(mixed.layout(lora - qlora))
    pair = by_names["lora", "qlora"]
    assert (pair["shown"], pair["seeds"], pair["rows"]) == (None, 3, 100)
    assert (pair["mean"], pair["high"]) == pytest.approx((0.04, 0.04 + expected.reach(0.025)))
    assert pair["detectable"] == pytest.approx(expected.reach(0.025 / 3) + expected.reach(0.2))
    assert f"from {100 * pair['detectable']:.1f} points on it would likely have been shown" in " ".join(found["reasons"])
    assert any(reason.startswith("Storage in 4 bits (qlora+exact less lora): no effect shown") for reason in found["reasons"])
    assert any("less qlora+exact): no effect shown (accuracy differs by -4.3" in reason for reason in found["reasons"])
    far = advice.over_seeds(_results(lora=[84, 85, 86], qlora_exact=[84, 84, 86], qlora=[44, 46, 43]))
    found = advice.advise(summaries, {}, far)
    assert found["method"] == "qlora+exact"
    assert found["quality"]["qlora_vs_lora"]["verdict"] == "worse than"


def test_one_that_is_not_faster_in_every_round_is_not_chosen_for_speed():
    summaries = [_summary("lora", 100, 10, GOOD), _summary("qlora", 98, 9, GOOD)]
    for low, chosen in ((0.9, "qlora"), (1.05, "lora")):
        assert advice.advise(summaries, {"lora_vs_qlora": {"median": 1.1, "min": low, "max": 1.2}})["method"] == chosen


def test_seeds_are_paired_and_exact_qlora_is_added_where_qlora_computes_in_8_bits(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Runs stand in for themselves: their records say which method and seed they were. Accuracies by seed."""
    asked = []

    def run(config, ranks):
        asked.append((Path(config.train.output_dir).relative_to(tmp_path / "cmp").as_posix(), config.train.seed))
        return {"config": config.to_dict(), "status": "failed", "error": "not run", "compute": config.quant.compute}

    def finished(run):
        return {"status": "ok", "model": {"compute": ["int8"]}, "evaluations": [{"correct": [], "scores": {}, "loss": 1.0}]}

    monkeypatch.setattr(comparing, "run_in_processes", run)
    config = _config(tiny_model, tiny_data, tmp_path / "cmp", seeds=3)
    compare(config)
    assert asked == [("lora", 0), ("qlora", 0)]  # both failed: no other seeds
    runs = {name: finished(name) for name in ("lora", "qlora")}
    assert comparing._is_added(config, runs)
    assert not comparing._is_added(config.with_options(seeds=1), runs)
    runs["qlora"]["model"]["compute"] = ["exact"]
    assert not comparing._is_added(config, runs)
    monkeypatch.setattr(comparing, "_run", lambda name, config, *_: asked.append((name, config.train)) or finished(name))
    asked.clear()
    configs = {name: comparing._run_config(config, name, tmp_path) for name in ("lora", "qlora+exact")}
    pairs = comparing._over_seeds(config, configs, configs, [finished(name) for name in configs], {}, 1)
    assert [(name, train.seed, Path(train.output_dir).name) for name, train in asked] == [
        (name, seed, f"seed-{seed}") for seed in (1, 2) for name in configs
    ]
    assert configs["qlora+exact"].quant.compute == "exact"
    [pair] = pairs
    assert (pair["seeds"], pair["metric"], pair["low"]) == (3, "loss", None)  # all seeds alike


@pytest.mark.parametrize(("ratios", "words"), [
    (
        {"qlora_vs_lora": {"median": 0.8, "min": 0.5, "max": 1.0}},
        "0.80 x lora's tokens/s (interleaved, 0.50 to 1.00), noticeably slower",
    ),
    ({"lora_vs_qlora": {"median": 0.8, "min": 0.5, "max": 1.0}}, "1.25 x lora's tokens/s (interleaved, 1.00 to 2.00)"),
    ({}, "0.90 x lora's tokens/s (one after the other"),
])  # fmt: skip
def test_speed_is_taken_from_turns_where_there_were_any(ratios, words):
    found = advice.advise([_summary("lora", 100, 10, GOOD), _summary("qlora", 60, 9, GOOD)], ratios)
    assert any(words in reason for reason in found["reasons"]), found["reasons"]


def test_what_the_base_was_computed_in_is_named():
    lora, qlora = _summary("lora", 100, 10, GOOD), _summary("qlora", 60, 15, GOOD)
    for summary, model in ((lora, {"dtype": "float32", "compute": []}), (qlora, {"dtype": "float32", "compute": ["int8"]})):
        summary["base_computed_in"] = computed_in(model)
    speed = [reason for reason in advice.advise([lora, qlora])["reasons"] if reason.startswith("Speed")]
    assert speed[0].startswith("Speed: qlora, with its frozen base in int8 instead of float32, runs at 1.50 x lora's tokens/s")
    assert computed_in({"dtype": "bfloat16", "compute": ["exact"]}) == "bfloat16"
    qlora["base_computed_in"] = "float32"
    assert "computed in" not in str(advice.advise([lora, qlora])["reasons"])


def test_turns_are_left_out_where_the_models_do_not_fit_at_once(tiny_model, tiny_data, tmp_path):
    config = RunConfig(model=str(tiny_model), device="cpu")
    found = paired_speed({"lora": config, "qlora": config}, [2**60, 2**60])
    assert "GiB are free" in found["skipped"]


def test_paired_difference_is_the_textbook_formula():
    found = advice.paired_difference([True, False, False, True], [True, True, True, False])
    differences = [0, 1, 1, -1]
    mean = sum(differences) / 4
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3 / 4)
    assert found == {"mean": mean, "standard_error": pytest.approx(error), "rows": 4}
    assert advice.paired_difference([], []) is None


@pytest.mark.slow
def test_activated_adapters_are_compared(tiny_model, tiny_data, tmp_path, forked):
    """The tokens' text becomes tokens in each method's run; before that only shapes are looked at."""
    lora = LoraConfig(r=2, alora_invocation_tokens="sentiment :")
    result = compare(_config(tiny_model, tiny_data, tmp_path / "cmp", methods=["lora"], lora=lora))
    assert [s["status"] for s in result["methods"]] == ["ok"]
    options = json.loads((tmp_path / "cmp" / "lora" / "record.json").read_text())["config"]["lora"]
    assert all(isinstance(token, int) for token in options["alora_invocation_tokens"])
