"""README and docs pages: figures come from records, commands parse, links lead somewhere. Oracles: records, parser, files."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lownibble.cli import commands
from lownibble.cli.flags import read
from lownibble.cli.main import _parser
from lownibble.config import (
    CompareConfig,
    EvalConfig,
    ExportConfig,
    MergeConfig,
    PlanConfig,
    QuantizeConfig,
    RunConfig,
    ServeConfig,
)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")]
CONFIGS = {
    commands.train: RunConfig, commands.plan: PlanConfig, commands.compare: CompareConfig, commands.evaluate: EvalConfig,
    commands.merge: MergeConfig, commands.export: ExportConfig, commands.quantize: QuantizeConfig, commands.serve: ServeConfig,
}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def _blocks(language):
    """(page, text) of every fenced block of that language."""
    return [(path, text) for path in PAGES for found, text in FENCE.findall(path.read_text()) if found == language]


def _command_lines():
    lines = [(path, line) for path, text in _blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    return [(path.name, line) for path, line in lines if line.startswith("lownibble ")]


def test_the_pages_are_what_the_records_say():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_readme_shows_two_commands_for_setting_up():
    text = "\n".join(text for path, text in _blocks("bash") if path.name == "README.md")
    assert re.findall(r"^(make \w+|pip install .*|git clone .*)", text, re.MULTILINE) == ["make demo", "make test"]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_no_figure_is_typed_outside_the_rendered_sections(path):
    text = re.sub(r"<!-- begin ([\w-]+) -->.*?<!-- end \1 -->", "", path.read_text(), flags=re.DOTALL)
    text = FENCE.sub("", text)
    text = re.sub(r"`[^`\n]*`", "", text)  # values of options
    measured = re.findall(r"\d[\d.,]*\s*(?:tokens/s|[GM]i?B\b|x faster|times (?:faster|as fast)|%)", text)
    assert not measured


@pytest.mark.parametrize(("page", "line"), _command_lines())
def test_commands_are_accepted_by_the_command_line(page, line):
    arguments = _parser().parse_args(shlex.split(line, comments=True)[1:])
    config = CONFIGS.get(arguments.run)
    if config is not None:
        read(arguments, config)  # values too; files that a command names need not exist


def test_the_pages_show_commands():
    assert len(_command_lines()) > 30


def test_examples_in_python_and_toml_parse():
    for _, text in _blocks("python"):
        ast.parse(text)
    for _, text in _blocks("toml"):
        tomllib.loads(text)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text()))
    files = [(path.parent / target.partition("#")[0]).resolve() for target in targets if "://" not in target and target[0] != "#"]
    assert [str(file) for file in files if not file.exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.name)
def test_records_say_what_was_run_and_where(path):
    record = json.loads(path.read_text())
    assert {"kind", "schema", "created", "command", "status", "environment"} <= record.keys()
    assert record["environment"]["versions"]["torch"]
