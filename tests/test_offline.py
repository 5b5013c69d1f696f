"""`tools/offline.py`, without a network. Oracles: wheels made by hand, the commands and the path of a made-up Python."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
LIBRARIES = ("__init__.py", "libbitsandbytes_cpu.so", "libbitsandbytes_cuda128.so", "libbitsandbytes_cuda130.so")
WHEELS = {
    "bitsandbytes": [f"bitsandbytes/{file}" for file in LIBRARIES],
    "unsloth": ["unsloth/__init__.py", "unsloth-1.dist-info/METADATA", "studio/backend/x.py", "unsloth_cli/__init__.py"],
    "rich": ["made_up/__init__.py", "rich-1.data/scripts/x"],
}
"""Of some packages, the files of their wheels."""


@pytest.fixture
def offline():
    spec = importlib.util.spec_from_file_location("offline_tool", ROOT / "tools" / "offline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fetched(offline, monkeypatch):
    """What would have been fetched, of which there are the wheels above."""
    found = {}

    def download(wanted, python, folder):
        found.update(wanted, python=python)
        for name in wanted.keys() & WHEELS.keys():
            with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as file:
                for path in WHEELS[name]:
                    file.writestr(path, "x = 1\n")

    monkeypatch.setattr(offline, "download", download)
    return found


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_has_the_source_and_what_it_needs(offline, fetched, tmp_path):
    out = tmp_path / "out"
    assert offline.main([str(out), "--python", "3.13"]) == 0
    assert fetched == {**offline.CARRIED, "python": "3.13"}
    assert {path.name for path in out.iterdir()} == {"run.sh", "src", "site"}
    assert files(out / "site") == {"made_up/__init__.py"}
    source = files(ROOT / "src" / "lownibble")
    wanted = {path for path in source if path.endswith((".py", ".toml", ".html", ".js", ".css", ".md", ".typed"))}
    assert files(out / "src" / "lownibble") == {path for path in wanted if "__pycache__" not in path}


def test_peers_and_tests_in_a_tarball(offline, fetched, tmp_path, capsys):
    assert offline.main([str(tmp_path / "deep" / "pack.tar.gz"), "--peers", "--tests"]) == 0
    assert fetched == {**offline.CARRIED, **offline.TESTS, **offline.PEERS, "python": "3.12"}
    with tarfile.open(tmp_path / "deep" / "pack.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    pack = tmp_path / "pack"
    assert files(pack / "peers") == {
        "bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so",
        "unsloth/__init__.py", "unsloth-1.dist-info/METADATA",
    }  # fmt: skip
    assert (pack / "tests" / "kernels" / "conftest.py").exists()
    assert (pack / "pyproject.toml").exists()
    assert re.search(r"^\d+\.\d MiB; unpacked \d+\.\d MiB, of them src \d+\.\d, tests \d", capsys.readouterr().err)


def test_run_sh_finds_what_is_carried(offline, fetched, tmp_path):
    out = tmp_path / "out"
    assert offline.main([str(out), "--python", HERE, "--peers", "--tests"]) == 0
    told = tmp_path / "python"
    told.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec "{sys.executable}" -\necho "$PYTHONPATH"; echo "$@"\n')
    told.chmod(0o755)

    def run(*arguments, path=""):
        environment = {**os.environ, "PYTHON": str(told), "PYTHONPATH": path}
        done = subprocess.run([out / "run.sh", *arguments], env=environment, capture_output=True, text=True, check=True, cwd="/")
        return done.stdout.splitlines()

    src, site, peers = (str(out / name) for name in ("src", "site", "peers"))
    assert run("bench", "contact", "--only", "a b") == [f"{src}:{site}", "-m lownibble bench contact --only a b"]
    assert run("bench", "train", "--peers", path="/x") == [f"{peers}:{src}:{site}:/x", "-m lownibble bench train --peers"]
    path, command = run("pytest", "-x")
    assert path == f"{src}:{site}"
    assert command.startswith("-m pytest -m gpu -p no:cacheprovider --continue-on-collection-errors tests/")
    assert command.endswith(" -x")
    named = command.split()[7:-1]
    assert "tests/kernels" in named, "its conftest sets the mark"
    assert "tests/training/test_graphs.py" in named
    assert not any(name.startswith(("tests/kernels/", "tests/serve")) for name in named)
    assert all((out / name).exists() for name in named)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_run_sh_runs_the_packed_source(offline, fetched, tmp_path):
    out = tmp_path / "out"
    assert offline.main([str(out), "--python", HERE]) == 0
    (out / "src" / "lownibble" / "__main__.py").write_text("import lownibble; print(lownibble.__file__)\n")
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([out / "run.sh", "plan"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(out / "src" / "lownibble" / "__init__.py")


def test_run_sh_refuses_another_python_and_says_what_is_missing(offline, fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "ASSUMED", {"torch": "", "nothing_of_that_name": "wishes"})
    for version in (HERE, "3.99"):
        out = tmp_path / version
        assert offline.main([str(out), "--python", version]) == 0
        environment = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run([out / "run.sh", "--version"], env=environment, capture_output=True, text=True, check=False)
        if version == HERE:
            assert done.returncode == 0
            assert done.stderr == "Not on this machine, and not carried: nothing_of_that_name (for wishes)\n"
        else:
            assert done.returncode == 2
            assert done.stderr == f"This is Python {HERE}, and the wheels are for 3.99. Set PYTHON.\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--limit", "10KiB"], "and the limit is 0.0 MiB (--limit)"),
        (["--limit", "much"], "--limit must be a size such as"),
        (["--python", "latest"], "--python must be like 3.12. Got 'latest'"),
    ],
)
def test_what_is_refused_leaves_nothing(arguments, told, offline, fetched, tmp_path, capsys):
    assert offline.main([str(tmp_path / "out.tar.gz"), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_kept(offline, fetched, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert offline.main([str(tmp_path / "out")]) == 2
    assert "is there. Remove it" in capsys.readouterr().err
    assert not fetched


def test_wheels_are_fetched_for_the_machine_and_pinned(offline, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(offline.subprocess, "call", lambda command: given.append(command) or len(given) - 1)
    offline.download({"rich": "15.0.0"}, "3.12", tmp_path)
    [command] = given
    assert command[1:4] == ["-m", "pip", "download"]
    assert command[-1] == "rich==15.0.0"
    assert {"--no-deps", "--only-binary=:all:", "manylinux_2_28_x86_64"} <= {*command}
    assert command[command.index("--python-version") + 1] == "3.12"
    with pytest.raises(offline.InputError, match="pip could not fetch the wheels"):
        offline.download({"rich": "15.0.0"}, "3.12", tmp_path)


def test_pins_are_those_of_the_tests_but_for_what_a_peer_refuses(offline):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    carried = offline.CARRIED | offline.TESTS | offline.PEERS
    assert {name for name in carried.keys() & pins.keys() if carried[name] != pins[name]} == {"trl", "datasets"}
    assert not offline.CARRIED.keys() & offline.PEERS.keys()
