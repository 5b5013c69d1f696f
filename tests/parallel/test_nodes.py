"""Two machines, as network namespaces joined by a virtual cable: they train, and end clearly when the cable is cut."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from forked import Forked
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
NAMES, ADDRESSES = ("lownibble-a", "lownibble-b"), ("10.77.0.1", "10.77.0.2")


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture
def started():
    """Ranks that a test has started; they end with it."""
    ranks = []
    yield ranks
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        with suppress(ValueError):  # the test has read all
            rank.communicate()


@pytest.fixture
def machines():
    """The two namespaces; yields a function that cuts the cable, or mends it."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces need iproute2 and root")
    for name in NAMES:
        ip("netns", "del", name)
        if made := ip("netns", "add", name).stderr:
            pytest.skip(f"no network namespaces here: {made.strip()}")
    ip("link", "add", "cable0", "netns", NAMES[0], "type", "veth", "peer", "name", "cable1", "netns", NAMES[1])
    for end, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", f"cable{end}")
        for device in ("lo", f"cable{end}"):
            ip("-n", name, "link", "set", device, "up")
    yield lambda state: ip("-n", NAMES[1], "link", "set", "cable1", state)
    for name in NAMES:
        ip("netns", "del", name)


def start(model, data, folder, *extra, timeout="20", apart=True):
    """A rank on each machine (or both on this one), in working folders of their own: what the second writes to 'out' the first
    does not see."""
    ranks = []
    for rank, name in enumerate(NAMES):
        where = folder / name
        where.mkdir(exist_ok=True)
        env = {
            **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": ADDRESSES[0] if apart else "127.0.0.1", "MASTER_PORT": "29511",
            "GLOO_SOCKET_IFNAME": f"cable{rank}" if apart else "lo", "LOWNIBBLE_PARALLEL_TIMEOUT": timeout,
        }  # fmt: skip
        command = [
            *(["ip", "netns", "exec", name] if apart else []), sys.executable, "-m", "lownibble", "train",
            "--model", str(model), "--data", str(data),
            "--method", "lora", "--device", "cpu", "--batch-size", "6", "--max-length", "32", "--save-steps", "2",
            "--parallel", "fsdp", "--output", "out", *extra,
        ]  # fmt: skip
        ranks.append(Forked(command, cwd=where, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return ranks


def test_two_machines_train_and_survive_a_cut_cable(machines, started, tiny_model, tiny_data, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole").mkdir()
    started += (ranks := start(tiny_model, tiny_data, tmp_path / "cut", "--max-steps", "60"))
    out = tmp_path / "cut" / NAMES[0] / "out"
    while not list(out.glob("checkpoints/step-*")):
        assert all(rank.poll() is None for rank in ranks), [rank.communicate()[1] for rank in ranks]
        time.sleep(0.02)
    machines("down")
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 1, errors
        assert "Another process of the run ended or cannot be reached" in errors
        assert "Traceback" not in errors
    machines("up")
    started += (again := start(tiny_model, tiny_data, tmp_path / "cut", "--max-steps", "60", "--resume", timeout="200"))
    assert all(rank.communicate(timeout=400) and rank.returncode == 0 for rank in again)
    assert not list((tmp_path / "cut" / NAMES[1] / "out").iterdir())  # the second machine needed nothing
    started += (whole := start(tiny_model, tiny_data, tmp_path / "whole", "--max-steps", "60", timeout="200", apart=False))
    assert all(rank.communicate(timeout=400) and rank.returncode == 0 for rank in whole)
    found, expected = (
        load_file(tmp_path / name / NAMES[0] / "out/adapter/adapter_model.safetensors") for name in ("cut", "whole")
    )
    assert all(found[key].equal(value) for key, value in expected.items())
    record = json.loads((out / "record.json").read_text())
    assert record["parallel"]["ranks"] == 2
