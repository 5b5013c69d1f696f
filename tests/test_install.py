"""`tools/install.py`: which versions it allows. Oracles: constraints.txt and pyproject.toml."""

import importlib.util
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("install_tool", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def versions(tool):
    return tool.versions


def test_pinned_and_newest(versions):
    lines = (ROOT / "constraints.txt").read_text().split()
    assert [f"{name}{allowed}" for name, allowed in versions(("--dev",)).items()] == [line.replace("_", "-") for line in lines]
    assert versions(("--dev", "--newest")) == {}


def test_the_lowest_of_each_dependency_and_the_pins_of_the_tests_own_tools(versions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = versions(("--lowest",))
    for requirement in map(Requirement, project["dependencies"]):
        (bound,) = requirement.specifier
        expected = "4.7" if requirement.name == "datasets" else bound.version  # TRL's, which is declared with the peers
        assert lowest[requirement.name.replace("_", "-")] == f"=={expected}.*"
    assert lowest["peft"].endswith(".*")
    assert lowest["pytest"] == versions(())["pytest"]
    assert not lowest.keys() & {"setuptools", "triton"}, "torch says which"


@pytest.mark.parametrize(
    ("version", "allowed", "fits"),
    [
        ("2.13.0", "==2.13.0", True), ("2.11.0", "==2.13.0", False), ("", "==2.13.0", False), ("2.11.1", "==2.11.*", True),
        ("2.1.1", "==2.11.*", False), ("2.110.0", "==2.11.*", False), ("2.15.0", "", True), ("", "", False),
    ],
)  # fmt: skip
def test_another_torch_than_the_pinned_one_is_no_torch(tool, version, allowed, fits):
    assert tool._fits(version, allowed) is fits


def test_what_an_interrupted_set_up_left_is_mended(tool, tmp_path, monkeypatch):
    """Every pip is a stub; venv and ensurepip are real."""
    ran, run = [], subprocess.call
    monkeypatch.setattr(tool, "_version_of_torch", lambda python: "2.13.0")
    monkeypatch.setattr(tool.subprocess, "call", lambda words: ran.append(words) or ("install" not in words and run(words)))
    folder = tmp_path / "with space"
    venv.create(folder, with_pip=False)
    (folder / "kept").touch()
    assert tool.main(str(folder)) == 0
    assert tool._runs(folder / "bin" / "python", "-m", "pip", "--version"), "pip is there"
    assert (folder / "kept").exists()
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").symlink_to(tmp_path / "gone")
    assert tool.main(str(folder)) == 0
    assert tool._runs(folder / "bin" / "python", "-m", "pip", "--version"), "made anew"
