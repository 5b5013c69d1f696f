"""Running studies. Oracles: the same study run without interruption, the records on the disk, answers known beforehand."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_folders import write_t5

from lownibble.config import QuantConfig
from lownibble.errors import ConfigError, DataError, ModelError, OutputError, TargetError
from lownibble.exporting.convert import export
from lownibble.study import bases, cell, devices, executors, jobs, processes
from lownibble.study.analysis import analyse
from lownibble.study.records import read_record
from lownibble.study.report import study_page
from lownibble.study.runner import run_study
from lownibble.study.tasks import KINDS

STUDY = """
name = "small"
seeds = [0, 1]
[models]
tiny = "MODEL"
[methods]
lora = { method = "lora", lora = { r = 4 } }
qlora = { method = "qlora", lora = { r = 4 }, quant = { block_size = 32 } }
[tasks]
sentiment = { kind = "classification", data = "ROWS" }
[train]
max_steps = 3
batch_size = 4
max_length = 32
eval_steps = 1
[tuning]
learning_rates = [1e-3, 1e-2]
train = { max_steps = 1 }
"""


@pytest.fixture
def study(tiny_model, tiny_data, tmp_path):
    """Write a study file; `replaced` texts differ from STUDY."""

    def write(name="study.toml", **replaced):
        text = STUDY
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        text = text.replace("MODEL", str(tiny_model)).replace("ROWS", str(tiny_data))
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def records(folder):
    """Digest -> what a cell's record says that the machine has no part in."""
    found = {}
    for file in Path(folder).glob("cells/*.json"):
        record = json.loads(file.read_text())
        for aside in ("created", "command", "measured", "environment"):
            record.pop(aside, None)
        found[file.stem] = record
    return found


@pytest.fixture
def no_turns(monkeypatch):
    """Methods do not take turns: that takes longer than all the rest."""
    monkeypatch.setitem(jobs.JOBS, "speed", lambda job: {"status": "ok", "skipped": "left out by the test"})


@pytest.fixture
def here(no_turns, monkeypatch):
    """Cells are worked on in this process, without waiting for one to start."""
    monkeypatch.setitem(jobs.JOBS, "cell", cell.work)


@pytest.mark.slow
def test_cells_are_run_once_and_learning_rates_found_first(study, tmp_path, here, capsys):
    told = run_study(study(), tmp_path / "out")
    found = records(tmp_path / "out")
    assert len(found) == 8
    assert all(record["status"] == "ok" for record in found.values())
    assert {c["digest"] for c in told["cells"]} | {c["digest"] for c in told["tuning"]} == set(found)
    for rate in told["learning_rates"]:
        grid = [c for c in told["tuning"] if c["method"] == rate["method"]]
        losses = {c["learning_rate"]: found[c["digest"]]["result"]["scores"]["loss"] for c in grid}
        assert rate["learning_rate"] == min(losses, key=losses.get)
        assert {c["learning_rate"] for c in told["cells"] if c["method"] == rate["method"]} == {rate["learning_rate"]}
    one = found[told["cells"][0]["digest"]]
    assert [e["step"] for e in one["result"]["evaluations"]] == [0, 1, 2, 3]
    assert len(one["result"]["row_scores"]["accuracy"]) == one["data"]["eval_rows"]
    assert one["cell"]["config"]["train"]["max_steps"] == 3
    shown = capsys.readouterr().err
    assert "[8/8]" in shown
    assert "left" in shown
    begun = [line.split(": ")[0] for line in shown.splitlines() if "it has begun" in line]
    kinds = [f"sentiment x {method} x {which}" for which in ("learning rate 0.001", "seed 0") for method in ("lora", "qlora")]
    assert "it has begun; it takes about 8 s" in shown  # of the first kind, a tiny model; others are corrected by it
    assert begun == kinds  # the first of each method's search, and of its compared runs

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("cells/*.json")}
    run_study(study("moved.toml", small="renamed"), tmp_path / "out")  # another name is the same study
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("cells/*.json")} == before
    run_study(study("more.toml", **{"seeds = [0, 1]": "seeds = [0, 1, 2]"}), tmp_path / "out")  # it runs what is new
    assert len(records(tmp_path / "out")) == 10


@pytest.mark.slow
def test_finished_cells_run_once_more_agree(study, tmp_path, here, monkeypatch):
    few = {"learning_rates = [1e-3, 1e-2]": "learning_rates = []", "max_steps = 3": "max_steps = 1"}
    run_study(study(**few), tmp_path / "out")
    before = records(tmp_path / "out")
    run_study(study(**few), tmp_path / "out", again=2)
    files = sorted((tmp_path / "out" / "again").iterdir())
    ran = [json.loads(file.read_text()) for file in files]
    assert {run["cell"]["method"] for run in ran} == {"lora", "qlora"}  # spread over the methods
    assert [file.name for file in files] == sorted(f"{run['cell']['digest']}-1.json" for run in ran)
    assert records(tmp_path / "out") == before
    found = analyse(tmp_path / "out")["again"]
    assert all(run["same"] and of["difference"] == 0 and of["agrees"] for run in found for of in run["scores"].values())

    other = jobs.JOBS["cell"]  # a machine of other numbers, far beyond what seeds differ by, and one that fails
    monkeypatch.setitem(jobs.JOBS, "cell", lambda job: _elsewhere(other(job)))
    run_study(study(**few), tmp_path / "out", again=1)
    monkeypatch.setitem(jobs.JOBS, "cell", lambda job: {"status": "failed", "error": "no memory"})
    run_study(study(**few), tmp_path / "out", again=1)
    found = [run for run in analyse(tmp_path / "out")["again"] if run["digest"] == ran[0]["cell"]["digest"]]
    assert [run.get("same") for run in found] == [True, False, None]
    assert found[1]["scores"]["loss"]["difference"] == pytest.approx(100)
    assert not found[1]["scores"]["loss"]["agrees"]
    page = study_page.write(tmp_path / "out") and (tmp_path / "out" / "report.md").read_text()
    assert "Of 4 repeated runs 2 gave the same numbers throughout. 1 failed." in page
    assert "failed: no memory" in page


def _elsewhere(found):
    found["result"]["scores"]["loss"] += 100
    return found


def test_the_number_of_gpus_is_in_the_records_and_no_part_of_a_cell(study, tmp_path, here, monkeypatch):
    few = {"learning_rates = [1e-3, 1e-2]": "learning_rates = []", "seeds = [0, 1]": "seeds = [0]"}
    asked, worked_on = [], jobs.JOBS["cell"]
    monkeypatch.setitem(jobs.JOBS, "cell", lambda job: asked.append(job["ranks"]) or worked_on(job))
    told = run_study(study(**few), tmp_path / "out", gpus_per_cell=2)
    assert asked == [2, 2]
    assert told["gpus_per_cell"] == 2
    [speed] = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("speed/*.json")]
    assert speed["skipped"] == devices.ALONE
    again = run_study(study(**few), tmp_path / "out")
    assert len(asked) == 2  # another number of GPUs is the same cell
    assert again["cells"] == told["cells"]


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_records_of_an_uninterrupted_run(study, tmp_path, here, forked):
    path = study(**{"seeds = [0, 1]": "seeds = [0, 1, 2]", "learning_rates = [1e-3, 1e-2]": "learning_rates = [1e-2]"})
    run_study(path, tmp_path / "whole")
    program = (
        "from lownibble.study import cell, jobs; from lownibble.study.runner import run_study\n"
        "jobs.JOBS.update(cell=cell.work, speed=lambda job: {'status': 'ok', 'skipped': 'test'})\n"
        f"run_study({str(path)!r}, {str(tmp_path / 'cut')!r})"
    )
    chance, cut, done = random.Random(7), tmp_path / "cut", []
    while len(done) < 10:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True
        )  # fmt: skip
        assert "study: 8 cells" in process.stderr.readline()
        started, deadline = len(records(cut)), time.monotonic() + 60
        while len(done) % 2 and len(records(cut)) == started and time.monotonic() < deadline:
            time.sleep(0.05)  # every other time it gets a cell done
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, 2))
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        process.communicate()
        done.append(len(records(cut)))
        if done[-1] > 4:  # leave something to do for the kills that are left
            for file in sorted(cut.glob("cells/*.json"))[:3]:
                file.unlink()
    assert len(set(done)) > 1, done
    run_study(path, cut)
    assert records(cut) == records(tmp_path / "whole")


@pytest.mark.slow
def test_no_cell_outlives_a_runner_that_was_killed(study, tmp_path, forked):
    program = f"from lownibble.study.runner import run_study; run_study({str(study())!r}, {str(tmp_path / 'cut')!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "study: 8 cells" in process.stderr.readline()
    deadline = time.monotonic() + 30
    while not _cells_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    started = _cells_of(process.pid)
    assert started
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def _cells_of(parent):
    """Processes of cells that this one has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes()
                its_parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if b"lownibble.study.cell" in command and its_parent == parent:
                found.append(int(entry.name))
    return found


in_process = jobs.JOBS["cell"]
"""A process for each cell, as outside of tests."""


@pytest.mark.slow
def test_a_failed_cell_is_a_record_and_the_others_go_on(study, tmp_path, here, forked, monkeypatch):
    path = study(**{"learning_rates = [1e-3, 1e-2]": "learning_rates = []"})
    alone, calls = jobs.JOBS["cell"], []

    def sometimes(job):
        calls.append(job)
        broken = job["config"]["method"] == "qlora" and len(calls) < 5
        return in_process({**job, "job": "no such job"}) if broken else alone(job)

    monkeypatch.setitem(jobs.JOBS, "cell", sometimes)
    run_study(path, tmp_path / "out")
    found = records(tmp_path / "out")
    assert sorted((r["cell"]["method"], r["status"]) for r in found.values()) == [("lora", "ok")] * 2 + [("qlora", "failed")] * 2
    failed = next(r for r in found.values() if r["status"] == "failed")
    assert "no such job" in failed["error"]
    assert any("Traceback" in line for line in failed["log"])
    run_study(path, tmp_path / "out")
    assert len(calls) == 4  # it is not run again
    run_study(path, tmp_path / "out", retry_failed=True)
    assert len(calls) == 6
    assert {r["status"] for r in records(tmp_path / "out").values()} == {"ok"}


def test_a_killed_process_is_a_failed_cell(study, tmp_path, no_turns, forked):
    path = study(**{"learning_rates = [1e-3, 1e-2]": "learning_rates = []", "seeds = [0, 1]": "seeds = [0]"})

    def killer():
        while not processes.alive:
            time.sleep(0.01)
        os.kill(next(iter(processes.alive)).pid, signal.SIGKILL)

    threading.Thread(target=killer).start()
    run_study(path, tmp_path / "out")
    errors = [r["error"] for r in records(tmp_path / "out").values() if r["status"] == "failed"]
    assert len(errors) == 1
    assert "SIGKILL (the system's out-of-memory killer sends it)" in errors[0]


def test_a_damaged_record_is_made_again(study, tmp_path, here):
    path = study(**{"learning_rates = [1e-3, 1e-2]": "learning_rates = []", "seeds = [0, 1]": "seeds = [0]"})
    run_study(path, tmp_path / "out")
    before = records(tmp_path / "out")
    damaged = next((tmp_path / "out").glob("cells/*.json"))
    damaged.write_text(damaged.read_text()[:100])
    assert read_record(damaged) is None
    run_study(path, tmp_path / "out")
    assert records(tmp_path / "out") == before


def test_long_runs_go_on_from_their_checkpoint(study, tmp_path, here):
    few = {"learning_rates = [1e-3, 1e-2]": "learning_rates = []", "seeds = [0, 1]": "seeds = [0]"}
    run_study(study(**few), tmp_path / "whole")
    run_study(study("saved.toml", **few, **{"max_steps = 3": "max_steps = 3\nsave_steps = 1"}), tmp_path / "saved")
    assert {k: r["result"] for k, r in records(tmp_path / "saved").items()} == {
        k: r["result"] for k, r in records(tmp_path / "whole").items()
    }
    assert not list((tmp_path / "saved").glob("work/*"))  # no longer needed


@pytest.mark.slow
def test_every_kind_is_scored_and_encoder_decoders_too(study, tmp_path, here, monkeypatch):
    for kind, found in KINDS.items():
        monkeypatch.setitem(KINDS, kind, found._replace(max_new_tokens=min(found.max_new_tokens, 6)))

    def rows(name, fields):
        folder = tmp_path / name
        folder.mkdir()
        for side in ("train", "test"):
            lines = [
                json.dumps(
                    {
                        k: v.format(i=i, label=("negative", "positive")[i % 2]) if isinstance(v, str) else v
                        for k, v in fields.items()
                    }
                )
                for i in range(6)
            ]
            (folder / f"{side}.jsonl").write_text("\n".join(lines))
        return folder

    made = {
        "question-answering": {"context": "the film was good {i}", "question": "was the film good", "answer": "good"},
        "summarisation": {"document": "the film was a very good film {i}", "summary": "good film"},
        "code": {"prompt": "a film {i}", "completion": "film = 1", "tests": ["assert film"], "setup": ""},
        "instruction": {"messages": [{"role": "user", "content": "good"}, {"role": "assistant", "content": "film"}]},
        "language-modelling": {"text": "the film was good {i}"},
        "nli": {"premise": "the film was good {i}", "hypothesis": "the film was bad", "label": "{label}"},
    }
    tasks = "".join(f'"{kind}" = {{ kind = "{kind}", data = "{rows(kind, fields)}" }}\n' for kind, fields in made.items())
    write_t5(tmp_path / "t5")
    few = {
        "learning_rates = [1e-3, 1e-2]": "learning_rates = []", "seeds = [0, 1]": "seeds = [0]",
        "max_steps = 3": "max_steps = 1", "[methods]\nlora": "[methods]\n# lora", "max_length = 32": "max_length = 96",
    }  # fmt: skip
    run_study(study(**few, **{"[train]": f"{tasks}[train]"}), tmp_path / "out")
    found = {r["cell"]["kind"]: r for r in records(tmp_path / "out").values()}
    assert {kind: r["status"] for kind, r in found.items()} == dict.fromkeys([*made, "classification"], "ok")
    scored = {kind: set(r["result"]["scores"]) - {"loss", "perplexity"} for kind, r in found.items()}
    assert scored["question-answering"] == {"f1", "exact_match"}
    assert scored["summarisation"] == {"rouge1", "rouge2", "rougeL"}
    assert scored["code"] == {"pass@1"}
    assert scored["instruction"] == scored["language-modelling"] == set()
    assert all(len(found[kind]["result"]["answers"]) == 6 for kind in ("question-answering", "summarisation", "code"))

    paired = {"[train]": f'asked = {{ kind = "question-answering", data = "{tmp_path / "question-answering"}" }}\n[train]'}
    text = study("t5.toml", **few, **paired).read_text()
    model = next(line for line in text.splitlines() if line.startswith("tiny = "))
    (tmp_path / "t5.toml").write_text(text.replace(model, f'tiny = "{tmp_path / "t5"}"'))
    run_study(tmp_path / "t5.toml", tmp_path / "paired")
    assert {r["cell"]["kind"]: r["status"] for r in records(tmp_path / "paired").values()} == {
        "classification": "ok", "question-answering": "ok",
    }  # fmt: skip


def test_one_study_in_a_folder_at_a_time(study, tmp_path, no_turns):
    from lownibble.training.output import claim

    with claim(tmp_path / "out", resume=True), pytest.raises(OutputError, match="Another process"):
        run_study(study(), tmp_path / "out")


@pytest.mark.parametrize(
    ("replaced", "options", "kind", "words"),
    [
        ({}, {"executor": "slurm"}, ConfigError, "local, ray"),
        ({}, {"jobs": 0}, ConfigError, ">= 1"),
        ({}, {"gpus_per_cell": 0}, ConfigError, ">= 1. Got 0"),
        ({}, {"gpus_per_cell": 3}, ConfigError, "must be a multiple of 3"),
        ({'"classification"': '"nli"'}, {}, DataError, r"'sentiment' \(nli\) lacks premise, hypothesis. Expected: premise"),
        (
            {"lora = { r = 4 }, quant": 'lora = { target_modules = ["nothing"] }, quant'},
            {},
            TargetError,
            "match no linear module",
        ),
        (
            {'data = "ROWS"': 'data = { path = "ROWS", completion_template = " {text}" }'},
            {},
            DataError,
            "no labels to choose from",
        ),
        ({'tiny = "': 'tiny = "/nowhere'}, {}, ModelError, "There is no model"),
        (
            {
                'data = "ROWS"': 'data = { path = "ROWS", overlength = "drop" }',
                "block_size = 32 } }": "block_size = 32 }, train = { max_length = 9 } }",
            },
            {},
            ConfigError,
            "'lora' and 'qlora' cannot be compared on the task 'sentiment': with max_length 32 and 9",
        ),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_run(study, tmp_path, replaced, options, kind, words):
    with pytest.raises(kind, match=words):
        run_study(study(**replaced), tmp_path / "out", **options)
    assert not (tmp_path / "out" / "cells").exists()


FEW = {"seeds = [0, 1]": "seeds = [0]", "max_steps = 3": "max_steps = 1", "qlora = {": "# qlora = {"}
NO_SEARCH = {"learning_rates = [1e-3, 1e-2]": "learning_rates = []"}


def changing(monkeypatch, at, change):
    """Let `change` happen before the run with this index."""
    worked_on, runs = jobs.JOBS["cell"], []

    def work(job):
        runs.append(job)
        if len(runs) == at + 1:
            change()
        return worked_on(job)

    monkeypatch.setitem(jobs.JOBS, "cell", work)


@pytest.mark.parametrize("searched", [False, True])
def test_rows_that_change_while_it_runs_end_a_study(study, tiny_data, tmp_path, here, monkeypatch, searched):
    """Also in the search, whose evaluation rows are fewer. Oracle: every record that is kept is of the rows it names."""
    rows = shutil.copytree(tiny_data, tmp_path / "rows")
    test = rows / "test.jsonl"
    search = "learning_rates = [1e-3, 1e-2]\nmax_eval_rows = 8" if searched else "learning_rates = []"
    file = study(**{"max_steps = 3": "max_steps = 1", "qlora = {": "# qlora = {", "learning_rates = [1e-3, 1e-2]": search})
    file.write_text(file.read_text().replace(str(tiny_data), str(rows)))
    changing(monkeypatch, 1, lambda: test.write_text(test.read_text().replace("positive", "negative", 3)))
    with pytest.raises(DataError, match="The rows of the task 'sentiment' changed while the study ran"):
        run_study(file, tmp_path / "out")
    [kept] = records(tmp_path / "out").values()
    assert kept["data"]["eval_rows"] == (8 if searched else len(test.read_text().splitlines()))
    run_study(file, tmp_path / "out")  # with the rows as they are now
    assert {record["status"] for record in records(tmp_path / "out").values()} == {"ok"}
    assert len(records(tmp_path / "out")) == 1 + (4 if searched else 2)


def test_a_model_that_changes_while_it_runs_ends_a_study(study, tiny_model, tmp_path, here, monkeypatch):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = study(**FEW, **NO_SEARCH)
    file.write_text(file.read_text().replace(str(tiny_model), str(model)))
    changing(monkeypatch, 0, lambda: (model / "generation_config.json").touch())  # the same bytes
    run_study(file, tmp_path / "touched")
    changing(monkeypatch, 0, lambda: (model / "generation_config.json").write_text("{}"))
    with pytest.raises(ModelError, match="model' changed while the study ran"):
        run_study(file, tmp_path / "out")
    assert records(tmp_path / "out") == {}


def test_a_base_that_was_packed_of_changed_rows_is_removed(study, tiny_data, tmp_path, here, monkeypatch):
    rows = shutil.copytree(tiny_data, tmp_path / "rows")
    train = rows / "train.jsonl"
    gptq = 'g = { method = "qlora", quantize = { rounding = "gptq", calibration_tokens = 256 }, quant = { block_size = 32 } }\n#'
    file = study(**{**FEW, "qlora = {": gptq, "lora = { method": "# lora = { method"}, **NO_SEARCH)
    file.write_text(file.read_text().replace(str(tiny_data), str(rows)))

    def packing(job):
        train.write_text(train.read_text().replace("positive", "negative", 3))
        return bases.pack(job)

    monkeypatch.setitem(jobs.JOBS, "base", packing)
    with pytest.raises(DataError, match="The rows of the task 'sentiment' changed"):
        run_study(file, tmp_path / "out")
    assert list((tmp_path / "out" / "bases").iterdir()) == []
    assert records(tmp_path / "out") == {}


def test_methods_may_differ_in_the_prompts_that_they_see(study, tmp_path, here):
    """A shorter length that leaves rows and labels as they are cuts prompts alone."""
    short = {
        "block_size = 32 } }": "block_size = 32 }, train = { max_length = 9 } }",
        'data = "ROWS"': 'data = { path = "ROWS", overlength = "cut" }',
    }
    run_study(
        study(**short, **NO_SEARCH, **{"seeds = [0, 1]": "seeds = [0]", "max_steps = 3": "max_steps = 1"}), tmp_path / "out"
    )
    assert {record["status"] for record in records(tmp_path / "out").values()} == {"ok"}


def test_a_method_that_cannot_train_on_quantised_weights_is_refused(study, tiny_model, tmp_path):
    export(str(tiny_model), str(tmp_path / "four-bits"), format="bnb-4bit", quant=QuantConfig(block_size=32))
    file = study()
    file.write_text(file.read_text().replace(str(tiny_model), str(tmp_path / "four-bits")))
    with pytest.raises(ConfigError, match=r"four-bits' cannot be trained with the method 'lora': The weights are stored as nf4"):
        run_study(file, tmp_path / "out")


@pytest.mark.slow
def test_a_cluster_of_two_workers_gives_the_records_of_this_machine(study, tmp_path, no_turns):
    ray = pytest.importorskip("ray")
    path = study(**{"learning_rates = [1e-3, 1e-2]": "learning_rates = [1e-2]", "qlora = {": "# qlora = {"})
    run_study(path, tmp_path / "here")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run_study(path, tmp_path / "there", jobs=2, executor="ray")
        job = {"job": "cell", "kind": "classification", "tuning": True, "config": {"model": "/nowhere"}}
        found = dict(executors.on_ray([job, job], 2))
        assert {record["status"] for record in found.values()} == {"failed"}
    finally:
        ray.shutdown()
    assert records(tmp_path / "there") == records(tmp_path / "here")


@pytest.fixture
def far_apart(monkeypatch):
    """Cells with scores by hand: the two methods differ by far."""
    worked_on = jobs.JOBS["cell"]

    def scored(job):
        found = worked_on(job)
        seed, own = job["config"]["train"]["seed"], 0.9 if job["config"]["method"] == "lora" else 0.1
        found["result"]["row_scores"], found["result"]["scores"]["accuracy"] = {}, own * (1 + 1e-3 * seed)
        return found

    monkeypatch.setitem(jobs.JOBS, "cell", scored)


def test_numbers_of_seeds_at_which_a_study_was_decided_are_kept(study, tmp_path, no_turns, monkeypatch):
    """Not those of one seed, which decides nothing, nor of other cells. Cells are stood in for."""

    def scored(job):
        result = {"scores": {"loss": 1.0, "accuracy": 0.5}, "row_scores": {}, "evaluations": []}
        memory = {"train_peak_bytes": 1, "load_peak_bytes": 1}
        return {"status": "ok", "result": result, "measured": {"seconds": 1.0, "memory": memory}}

    def told(seeds, steps=3):
        changes = {"seeds = [0, 1]": f"seeds = {seeds}", "max_steps = 3": f"max_steps = {steps}"}
        return run_study(study(**NO_SEARCH, **changes), tmp_path / "out")["decided"]

    monkeypatch.setitem(jobs.JOBS, "cell", scored)
    assert told([0]) == []
    assert told([0, 1]) == told([0, 1]) == [[2]]
    assert told([0, 1, 2]) == [[2], [3]]
    assert told([0, 1, 2], steps=4) == [[3]]


@pytest.mark.slow
def test_without_looks_no_seed_is_left_out(study, tmp_path, here, far_apart):
    """Also where a study is extended, or was interrupted, after seeds that would decide."""
    short = {"learning_rates = [1e-3, 1e-2]": "learning_rates = []", "max_steps = 3": "max_steps = 1"}
    for seeds in ("[0, 1]", "[0, 1, 2]"):
        run_study(study(**short, **{"seeds = [0, 1]": f"seeds = {seeds}"}), tmp_path / "out")
    assert {record["cell"]["seed"] for record in records(tmp_path / "out").values()} == {0, 1, 2}


@pytest.mark.slow
def test_cells_of_comparisons_that_are_decided_are_not_run(study, tmp_path, here, far_apart):
    """The look after three of five seeds decides."""
    looks = {
        "seeds = [0, 1]": "seeds = [0, 1, 2, 3, 4]", "learning_rates = [1e-3, 1e-2]": "learning_rates = []",
        "[train]": "[decide]\nlooks = [3]\n[train]", "max_steps = 3": "max_steps = 1",
    }  # fmt: skip
    run_study(study(**looks), tmp_path / "out")
    summary = analyse(tmp_path / "out")
    found = summary["groups"][0]["pairs"][0]["decision"]
    assert (found["shown"], found["seeds"], found["looked"]) == ("different", 3, 1)
    assert summary["counts"] | {"hours": 0} == {
        "cells": 10, "finished": 6, "failed": 0, "stopped": 4, "missing": 0, "hours": 0
    }  # fmt: skip
    assert {record["cell"]["seed"] for record in records(tmp_path / "out").values()} == {0, 1, 2}
