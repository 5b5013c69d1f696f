"""Runs under torchrun, as a user starts them: what is printed, what ends them, what goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import environment, free_port
from safetensors.torch import load_file
from torch.distributed import TCPStore

from lownibble.cli.main import main

pytestmark = pytest.mark.slow


def command(tiny_model, tiny_data, output, *extra, steps=6):
    return [
        "-m", "lownibble", "train", "--model", str(tiny_model), "--data", str(tiny_data), "--method", "lora", "--device", "cpu",
        "--batch-size", "6", "--max-length", "32", "--learning-rate", "1e-2", "--max-steps", str(steps), "--save-steps", "2",
        "--output", str(output), *extra,
    ]  # fmt: skip


def torchrun(*arguments, **options):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*line, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def by_hand(forked):
    """Starts two processes as torchrun does, which would end one as soon as the other has failed; with a store as its own."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []

    def start(*of_ranks):
        first, second = environment(2, store.port)
        for arguments, env in zip((of_ranks * 2)[:2], (first, second), strict=True):
            env["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            line = [sys.executable, *arguments]
            started.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def children(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def has_pending(pid, signal_number):
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("ShdPnd:")[1].split()[0], 16) >> (signal_number - 1) & 1)


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_data, tmp_path_factory):
    """(folder, output, messages) of a run that nothing ended."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run = torchrun(*command(tiny_model, tiny_data, folder, "--json", steps=60))
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return folder, out, errors


def test_one_document_and_one_record(whole):
    folder, out, errors = whole
    (line,) = out.splitlines()
    record = json.loads(line)
    assert record["parallel"]["ranks"] == 2
    assert record["parallel"]["mode"] == "ddp"  # by the plan it fits
    assert errors.count("60 steps in") == 1
    assert record == json.loads((folder / "record.json").read_text())


def test_a_killed_rank_and_max_restarts(whole, tiny_model, tiny_data, tmp_path):
    run = torchrun("--max-restarts", "1", *command(tiny_model, tiny_data, tmp_path / "out", steps=60))
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.02)
    os.kill(children(run)[1], signal.SIGKILL)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [event["first_step"] for event in events if event["event"] == "Started"][-1] > 0
    found, expected = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path / "out", whole[0]))
    assert all(found[key].equal(value) for key, value in expected.items())


def test_a_killed_rank_on_one_of_two_machines(whole, tiny_model, tiny_data, tmp_path, monkeypatch):
    """Two agents: the one whose rank is killed counts a restart, the other one does not."""
    monkeypatch.setenv("LOWNIBBLE_PARALLEL_TIMEOUT", "60")
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
               f"127.0.0.1:{free_port()}"]  # fmt: skip
    folders = [tmp_path / name for name in ("one", "two")]
    agents = []
    for folder in folders:
        folder.mkdir()
        agents.append(torchrun(*options, *command(tiny_model, tiny_data, "out", "--parallel", "ddp", steps=60), cwd=folder))
    deadline = time.monotonic() + 200
    while not (writes := [folder for folder in folders if list(folder.glob("out/checkpoints/step-*"))]):
        assert time.monotonic() < deadline
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.02)
    of_other = folders[0] in writes
    first, other = children(agents[not of_other])[0], children(agents[of_other])[0]
    os.kill(first, signal.SIGSTOP)  # so that it is alive when its agent hears of the other, whose failure it then does not count
    os.kill(other, signal.SIGKILL)
    while not has_pending(first, signal.SIGTERM):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first, signal.SIGCONT)
    ended = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ended
    events = [json.loads(line) for line in (writes[0] / "out/events.jsonl").read_text().splitlines()]
    assert [event["first_step"] for event in events if event["event"] == "Started"][-1] > 0
    found, expected = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (writes[0] / "out", whole[0]))
    assert all(found[key].equal(value) for key, value in expected.items())


def test_a_rank_that_was_asked_to_stop_is_not_started_again(tiny_model, tiny_data, tmp_path):
    run = torchrun("--max-restarts", "1", *command(tiny_model, tiny_data, tmp_path / "out", steps=2000))
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.02)
    os.kill(children(run)[1], signal.SIGTERM)  # torchrun itself is not told
    _, errors = run.communicate(timeout=300)
    assert run.returncode
    assert "The run was asked to stop, and is not started again. Resume with --resume." in errors
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("Started") == 1
    assert events[-1]["event"] == "Saved"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--batch-size", "3"], "must be a multiple of 2"),
        (["--lora-alpha", "x"], "lora_alpha"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_what_all_ranks_refuse_is_said_once(by_hand, tiny_model, tiny_data, tmp_path, extra, message):
    ranks = by_hand(command(tiny_model, tiny_data, tmp_path / "out", *extra))
    ended = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert message in ended[0]
    assert "error" not in ended[1]


def test_an_error_of_one_rank_names_it(by_hand, tiny_model, tiny_data, tmp_path):
    good = command(tiny_model, tiny_data, tmp_path / "out")
    ranks = by_hand(good, [*good, "--r", "0"])
    _, errors = ranks[1].communicate(timeout=200)
    assert ranks[1].returncode == 2
    assert "rank 1: error: The 'r' of LoraConfig" in errors


def test_a_rank_that_is_gone_ends_the_others_with_one_sentence(by_hand, tiny_model, tiny_data, tmp_path):
    ranks = by_hand(command(tiny_model, tiny_data, tmp_path / "out", steps=2000))
    while not list((tmp_path / "out").glob("checkpoints/step-*")):
        assert ranks[0].poll() is None
        time.sleep(0.02)
    ranks[1].kill()
    _, errors = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 1
    assert "Traceback" not in errors
    assert "Another process of the run ended or cannot be reached" in errors
    assert "--resume" in errors


def test_a_restart_does_not_take_over_another_run(by_hand, tiny_model, tiny_data, tmp_path, monkeypatch):
    kept = tmp_path / "out/adapter/adapter_model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("precious")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    ranks = by_hand(command(tiny_model, tiny_data, tmp_path / "out"))
    ended = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "holds another run" in ended[0]
    assert kept.read_text() == "precious"


def test_other_commands_say_what_torchrun_is_for(by_hand):
    rank, _ = by_hand(["-m", "lownibble", "doctor"])
    _, errors = rank.communicate(timeout=100)
    assert rank.returncode == 2
    assert "torchrun is for 'lownibble train'" in errors


def test_alone_there_is_nothing_to_share(tiny_model, tiny_data, tmp_path, capsys):
    assert main([*command(tiny_model, tiny_data, tmp_path / "out", "--parallel", "fsdp")][2:]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
