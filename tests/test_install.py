"""`tools/install.py`: which versions it allows. Oracles: constraints.txt and pyproject.toml."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture
def versions():
    spec = importlib.util.spec_from_file_location("install_tool", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.versions


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
