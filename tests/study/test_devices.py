"""Cells on GPUs of their own and on several. Oracles: the same run in this process, what processes say of their environment.

There are no GPUs here: lists of devices are made up, and ranks are two processes over gloo.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lownibble.cli.main import main
from lownibble.config import CompareConfig, DataConfig, LoraConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.study import cell, devices, executors, jobs, processes
from lownibble.study.compare import compare
from lownibble.study.tasks import with_templates
from lownibble.training import run


def options(tiny_model, tiny_data, **train):
    return {
        "model": str(tiny_model), "method": "qlora", "device": "cpu", "lora": LoraConfig(r=2),
        "data": DataConfig(path=str(tiny_data), prompt_template="review : {text} sentiment :", completion_template=" {label}"),
        "train": TrainConfig(**{
            "max_steps": 4, "batch_size": 4, "max_length": 32, "eval_steps": 2, "learning_rate": 1e-2, "torch_compile": False,
            **train,
        }),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "named", "found"),
    [(0, None, []), (2, None, ["0", "1"]), (2, "3, 5", ["3", "5"]), (1, "GPU-ab,9", ["GPU-ab"]), (0, "", []), (0, "0", [])],
)
def test_visible_devices_have_the_names_of_the_environment(monkeypatch, count, named, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert devices.visible() == found


@pytest.mark.parametrize(
    ("there", "n_jobs", "gpus", "found"),
    [
        ("", 3, 1, [None, None, None]),
        ("", 2, 4, [None, None]),
        ("ab", 2, 1, [["a"], ["b"]]),
        ("ab", 3, 1, [["a"], ["b"], ["a"]]),  # cells of one GPU share
        ("abcd", 2, 2, [["a", "b"], ["c", "d"]]),
        ("abc", 1, 2, [["a", "b"]]),
    ],
)
def test_jobs_have_devices_of_their_own(monkeypatch, there, n_jobs, gpus, found):
    monkeypatch.setattr(devices, "visible", lambda: list(there))
    assert devices.slots(n_jobs, gpus) == found


def test_too_few_devices_are_an_error(monkeypatch):
    monkeypatch.setattr(devices, "visible", lambda: ["0", "1", "2"])
    with pytest.raises(ConfigError, match=r"2 x 2 GPUs are needed .*, and there are 3\. Lower --jobs or --gpus-per-cell"):
        next(executors.local([{"job": "cell"}], 2, 2))


def test_jobs_that_run_at_a_time_never_have_the_same_device(monkeypatch):
    monkeypatch.setattr(devices, "visible", lambda: ["0", "1", "2", "3"])
    held, most, lock = [], [], threading.Lock()

    def perform(job):
        with lock:
            held.extend(job["devices"])
            most.append(list(held))
        time.sleep(0.02)
        with lock:
            for device in job["devices"]:
                held.remove(device)
        return {"status": "ok"}

    monkeypatch.setattr(jobs, "perform", perform)
    assert sorted(index for index, _ in executors.local([{}] * 6, 2, 2)) == list(range(6))
    assert all(len(set(at_once)) == len(at_once) for at_once in most)
    assert max(len(at_once) for at_once in most) == 4


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that processes can run."""

    def write(text):
        (tmp_path / "of_the_test.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        return "of_the_test"

    return write


def test_processes_see_their_devices_and_their_rank(module, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    name = module(
        "import json, os, sys\n"
        f"found = {{name: os.environ.get(name) for name in {names!r}}}\n"
        "open(sys.argv[1] + input(), 'w').write(json.dumps(found))"
    )
    codes = processes.run_module(name, f"{tmp_path}/told", ranks=2, devices=["4", "GPU-ab"], line=str)
    assert codes == {0: 0, 1: 0}
    for rank in range(2):
        told = json.loads((tmp_path / f"told{rank}").read_text())
        assert told == dict(zip(names, ("4,GPU-ab", str(rank), str(rank), "2", "2"), strict=True))
    processes.run_module(name, f"{tmp_path}/alone", devices=["7"], line=str)
    assert json.loads((tmp_path / "alone0").read_text()) == dict(zip(names, ("7", None, None, None, None), strict=True))


def test_a_rank_that_dies_ends_the_others_and_is_named(module, monkeypatch):
    name = module("import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(600)")
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    codes = processes.run_module(name, ranks=2)
    assert codes == {1: -signal.SIGKILL}
    assert not processes.alive
    assert processes.why_failed(codes, {}, 2).startswith("Rank 1 of 2: The process ended with SIGKILL")


@pytest.mark.parametrize(
    ("codes", "errors", "message"),
    [
        ({0: 1, 1: 1}, {0: "ConfigError: no", 1: "ConfigError: no"}, "ConfigError: no"),
        ({0: 1, 1: 1}, {0: "RankLostError: gone", 1: "OSError: full"}, "Rank 1 of 2: OSError: full"),
        ({0: 1, 1: -9}, {0: "RankLostError: gone"}, "Rank 1 of 2: The process ended with SIGKILL"),
        ({0: 1}, {0: "RankLostError: gone"}, "RankLostError: gone"),
        ({0: 0, 1: 0}, {}, "The process ended with exit code 0 and left no record."),
    ],
)
def test_the_cause_is_told_and_not_its_consequences(codes, errors, message):
    assert processes.why_failed(codes, errors, 2).startswith(message)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_its_parent(module, tmp_path, how):
    name = module(
        "import os, sys, time\nfrom lownibble.study.processes import end_with_standard_input\n"
        "end_with_standard_input()\nopen(sys.argv[1] + os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"from lownibble.study.processes import run_module; run_module({name!r}, {str(tmp_path / 'pid')!r}, ranks=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, start_new_session=True)
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    try:
        assert _becomes_true(lambda: all(file.exists() and file.read_text() for file in files))
        parent.send_signal(how)
        parent.wait(60)
        assert _becomes_true(lambda: not any(_runs(int(file.read_text())) for file in files))
    finally:
        parent.kill()
        parent.wait()


def _becomes_true(said, seconds=90):
    deadline = time.monotonic() + seconds
    while not said() and time.monotonic() < deadline:
        time.sleep(0.05)
    return said()


def _runs(pid):
    """Whether the process is there, and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("changed", "train", "gpus", "message"),
    [
        ({}, {}, 0, "integer >= 1. Got 0"),
        ({}, {}, 3, "must be a multiple of 3"),
        ({}, {"parallel": "ddp"}, 1, "--gpus-per-cell"),
        ({}, {"parallel": "fsdp", "gradient_checkpointing": "offload"}, 2, "gradient_checkpointing='offload'"),
        ({"device": "cuda:1"}, {}, 2, "all would share 'cuda:1'"),
    ],
)
def test_what_cannot_be_trained_on_so_many_is_refused(tiny_model, tiny_data, changed, train, gpus, message):
    config = RunConfig(**options(tiny_model, tiny_data, **train) | changed)
    with pytest.raises(ConfigError, match=message):
        devices.check(config, gpus)


def test_compare_refuses_before_anything_is_run(tiny_model, tiny_data, tmp_path):
    shared = {
        key: value for key, value in options(tiny_model, tiny_data, output_dir=str(tmp_path / "out")).items() if key != "method"
    }
    with pytest.raises(ConfigError, match="must be a multiple of 3"):
        compare(CompareConfig(**shared), gpus_per_cell=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--gpus-per-cell", "0"], "Argument --gpus-per-cell: must be an integer >= 1. Got '0'"),
        (["study", "report", "somewhere", "--gpus-per-cell", "2"], "--gpus-per-cell is for 'study run'"),
    ],
)
def test_the_command_refuses_numbers_of_gpus(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_compare_on_two_ranks_is_that_of_one_process(tiny_model, tiny_data, tmp_path, forked):
    shared = {
        key: value for key, value in options(tiny_model, tiny_data, output_dir=str(tmp_path / "out")).items() if key != "method"
    }
    found = compare(CompareConfig(**shared, methods=["lora"]), gpus_per_cell=2)
    one = run(RunConfig(**options(tiny_model, tiny_data) | {"method": "lora"}))
    record = json.loads((tmp_path / "out/lora/record.json").read_text())
    assert [step["loss"] for step in record["steps"]] == pytest.approx(one.losses, abs=1e-5)
    assert [e["loss"] for e in record["evaluations"]] == pytest.approx([e["loss"] for e in one.record["evaluations"]], abs=1e-5)
    [summary] = found["methods"]
    assert summary["parallel"] == {"mode": "ddp", "ranks": 2}
    peaks = [max(memory["train_peak_bytes"], memory["load_peak_bytes"]) for memory in record["parallel"]["memory"]]
    assert summary["peak_bytes"] == max(peaks)
    assert found["gpus_per_cell"] == 2
    assert found["paired_speed"] == {"skipped": devices.ALONE}


@pytest.fixture
def asked(tiny_model, tmp_path, monkeypatch):
    """A job of question answering, which is scored by generation."""
    for side in ("train", "test"):
        rows = [{"context": f"the film was good {i}", "question": "was the film good", "answer": "good"} for i in range(6)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = options(tiny_model, tmp_path)
    given["data"] = with_templates("question-answering", DataConfig(path=str(tmp_path)))

    def make(**train):
        given["train"] = given["train"].with_options(**train)
        return {"job": "cell", "kind": "question-answering", "tuning": False, "config": RunConfig(**given).to_dict()}

    return make


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_cell_on_two_ranks_is_that_of_one_process(asked, forked, mode):
    one = cell.work(asked())
    two = jobs.perform({**asked(parallel=mode), "ranks": 2})
    assert two["status"] == "ok", two
    assert two["result"]["losses"] == pytest.approx(one["result"]["losses"], abs=1e-5)
    assert two["result"]["answers"] == one["result"]["answers"]
    assert two["result"]["scores"] == pytest.approx(one["result"]["scores"], abs=1e-4)  # perplexity is e to the loss
    assert (two["measured"]["parallel"]["mode"], two["measured"]["parallel"]["ranks"]) == (mode, 2)
    assert two["measured"]["memory"] in two["measured"]["parallel"]["memory"]


@pytest.mark.slow
def test_the_message_of_the_rank_that_failed_is_in_the_record(asked, forked, monkeypatch):
    usual, wrong = processes.environment, {"LOWNIBBLE_PARALLEL_TIMEOUT": "soon"}
    monkeypatch.setattr(processes, "environment", lambda rank, *others: usual(rank, *others) | (wrong if rank == 1 else {}))
    monkeypatch.setattr(processes, "GRACE_S", 1)
    found = jobs.perform({**asked(), "ranks": 2})
    assert found["status"] == "failed"
    assert found["error"].startswith("Rank 1 of 2: ConfigError: ")
    assert "LOWNIBBLE_PARALLEL_TIMEOUT must be a number of seconds" in found["error"]
    assert not processes.alive


@pytest.mark.parametrize(
    ("nodes", "gpus", "found"),
    [
        ([{"CPU": 8.0}], 1, {"num_cpus": 1}),
        ([{"CPU": 8.0}], 4, {"num_cpus": 4}),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], 4, {"num_gpus": 4}),
    ],
)
def test_a_task_requests_its_gpus_of_ray(nodes, gpus, found):
    assert executors._requests([{"Alive": True, "Resources": node} for node in nodes], gpus) == found


def test_what_no_machine_of_a_cluster_has_is_an_error_and_not_a_wait():
    nodes = [{"Alive": True, "Resources": {"GPU": 2.0}}] * 2 + [{"Alive": False, "Resources": {"GPU": 8.0}}]
    with pytest.raises(ConfigError, match="No machine of the Ray cluster has 4 GPUs; the largest has 2"):
        executors._requests(nodes, 4)


@pytest.mark.slow
def test_ray_gives_each_task_its_gpus(monkeypatch):
    ray = pytest.importorskip("ray")

    def perform(job):  # runs in Ray's worker
        import os
        import time

        time.sleep(0.5)
        return {"status": "ok", "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}

    monkeypatch.setattr(jobs, "perform", perform)
    ray.init(num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False)
    try:
        found = dict(executors.on_ray([{}, {}], 2, 2))
    finally:
        ray.shutdown()
    given = [record["devices"].split(",") for record in found.values()]
    assert sorted(device for devices_ in given for device in devices_) == ["0", "1", "2", "3"]
