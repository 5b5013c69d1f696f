"""README and docs pages: figures come from records, commands parse, links lead somewhere. Oracles: records, parser, files."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lownibble.cli import commands, shipping
from lownibble.cli.main import _parser
from lownibble.config import (
    CompareConfig,
    EvalConfig,
    ExportConfig,
    MergeConfig,
    PlanConfig,
    PushConfig,
    QuantizeConfig,
    RunConfig,
    ServeConfig,
    StudioConfig,
)
from lownibble.flags import read

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")]
CONFIGS = {
    commands.train: RunConfig, commands.plan: PlanConfig, commands.compare: CompareConfig, commands.evaluate: EvalConfig,
    shipping.merge: MergeConfig, shipping.export: ExportConfig, shipping.quantize: QuantizeConfig, shipping.serve: ServeConfig,
    shipping.push: PushConfig,
    shipping.studio: StudioConfig,
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


@pytest.fixture
def rendering(tmp_path, monkeypatch):
    """tools/readme.py, with the records of a folder that is empty at first."""
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_without_records_of_cuda_nothing_is_rendered(rendering):
    assert rendering.cuda() == rendering.cuda_summary() == ""
    assert rendering._between("cuda", "") == "<!-- begin cuda --><!-- end cuda -->"


def test_preferences_are_rendered_once_they_are_measured(rendering):
    assert rendering.preference() == ""
    found = {
        "rows_per_s": {"ours": {"median": 1.5, "min": 1, "max": 2}}, "ratios": {"trl": {"median": 2.5, "min": 2, "max": 3}},
        "peak_bytes": {"ours": 2**30, "trl": 3 * 2**30},
    }  # fmt: skip
    record = {
        "environment": {"device": "A CPU", "threads": 2, "kernels": "cpu"}, "objectives": {"orpo lora": found},
        "failed": {"dpo lora, trl": "no\nmodule trl"},
        "workload": {"model": "demo", "batch_size": 2, "r": 16, "targets": "all-linear", "rounds": 3},
    }  # fmt: skip
    (rendering.RESULTS / "preference-cpu.json").write_text(json.dumps(record))
    text = rendering.preference()
    assert "| orpo lora | 1.50 (1.00 to 2.00) | 2.50 (2.00 to 3.00) | - | 1.00 | 3.00 |" in text
    assert "Not measured: dpo lora, trl (no module trl)." in text


def test_records_of_cuda_are_rendered_as_far_as_they_are_there(rendering):
    def spread(value):
        return {"median": value, "min": value - 1, "max": value + 1}

    def write(name, status="ok", **record):
        base = {
            "status": status,
            "environment": {"device": "A card", "kernels": "triton", "threads": 4, "versions": {"torch": "9"}},
        }
        (rendering.RESULTS / f"{name}-cuda.json").write_text(json.dumps({**base, **record}))

    figures = {
        "peak_bytes": 3 * 2**30,
        "reserved_bytes": 4 * 2**30,
        "first_step_s": 10.5,
        "launches_per_step": 7800,
        "device_ms": 250.4,
    }
    work = {"model": "llama-3-8b", "random_weights": True, "batch_size": 4, "length": 1024, "r": 16, "targets": "all-linear"}
    write(
        "train", "partial", workload=work, ratios={"qlora_vs_unsloth_qlora": spread(2)},
        contenders={
            "qlora": {**figures, "tokens_per_s": spread(14000), "limit_share": spread(0.5), "max_tokens": None},
            "lora": {**figures, "tokens_per_s": spread(9000), "limit_share": spread(0.5), "max_tokens": 2048},
            "unsloth_qlora": {**figures, "tokens_per_s": spread(7000)},
        },
        failed={"peft_lora": "OutOfMemoryError: CUDA\nout of memory"}, missing={"torchao_qlora": "not installed: torchao"},
    )  # fmt: skip
    text = rendering.cuda()
    assert "| Lownibble QLoRA | 14000 (13999 to 14001) | 3.0 | 4.0 | 10.5 | 7,800 | 250 / 293 | 0.50 |" in text
    assert "| Lownibble LoRA, in microbatches of 2048 tokens | 9000" in text, "memory ran out: that is said"
    assert "| Unsloth QLoRA | 7000 (6999 to 7001) | 3.0 | 4.0 | 10.5 | 7,800 | 250 / 585 |  |" in text
    assert "| Lownibble QLoRA / Unsloth QLoRA | 2.00 (1.00 to 3.00) |" in text
    absent = "PEFT LoRA (OutOfMemoryError: CUDA out of memory); PEFT + torchao NF4 (not installed: torchao)"
    assert f"Not measured: {absent}." in text
    assert "llama-3-8b, random weights, 4 x 1024 tokens a step" in text
    assert "`benchmarks/results/train-cuda.json`; ended before all was measured)" in text
    assert "decoding" not in text, "there is no record of it"
    summary = rendering.cuda_summary()
    assert "\n" not in summary
    assert "On A card, QLoRA trains llama-3-8b, random weights at 14,000 tokens/s in 3.0 GiB" in summary
    assert "; 2.00 of Unsloth QLoRA (" in summary
    path = rendering.RESULTS / "train-cuda.json"
    path.write_text(path.read_text().replace("qlora_vs_unsloth_qlora", "qlora_vs_lora"))
    assert rendering.cuda_summary() == "", "a figure beside no other says little"
    write("kernels", headlines={"dequantize 14336x4096 / fill of the same memory": 1.25, "absent": None})
    run = {"method": "qlora", "batch_size": 4, "max_length": 1024, "allocated_bytes": 3e9, "allocated_error": 0.002}
    run |= {"reserved_bytes": 4e9, "reserved_error": -0.01}
    write("plan", workload=work, runs=[run, {**run, "compiled": True}])
    write("decode", workload={**work, "new_tokens": 48}, contenders={"nf4_layers": {"tokens_per_s": spread(30)}}, ratios={},
          failed={}, missing={"nf4": "CPUs only"})  # fmt: skip
    write("gpu-tests", "failed", tests={"passed": 9, "failed": 1}, failed=["tests/a.py::b"])
    write("contact", "failed", checks=[{"name": "sampling", "status": "passed"}, {"name": "step", "status": "failed"}])
    parts = {"contact": {"status": "failed", "seconds": 71.2}, "train": {"status": "out of time", "seconds": 240.4}}
    write("parts", "failed", workload=work, parts=parts)
    text = rendering.cuda()
    assert "took: contact 71 s (failed), train 240 s (out of time). (llama-3-8b, random weights; A card, torch 9; " in text
    assert "Checks of `bench contact`: 1 passed, 1 failed (`step`). (A card, torch 9; " in text
    assert "| dequantize 14336x4096 / fill of the same memory | 1.25 |" in text
    assert "| qlora 4 x 1024, not compiled | 3.00 | +0.2% | 4.00 | -1.0% |" in text
    assert "| qlora 4 x 1024, compiled | 3.00 | +0.2% | 4.00 | -1.0% |" in text
    assert "| NF4, transformers `generate` | 30.0 (29.0 to 31.0) |" in text
    assert "Tests marked `gpu`: 9 passed, 1 failed (`tests/a.py::b`). (A card, torch 9; " in text


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


def test_llms_txt_is_in_its_form_and_names_every_page_and_command():
    """Oracle: llmstxt.org: a title, a quote, text without headings, then sections that are lists of links."""
    text = (ROOT / "llms.txt").read_text()
    title, quote, *_ = text.split("\n\n")
    assert re.fullmatch(r"# \w+", title)
    assert quote.startswith("> ")
    sections = text.split("\n## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == ["Docs", "Optional"]
    lines = [line for section in sections for line in section.splitlines()[1:] if line]
    assert all(re.fullmatch(r"- \[[^\]]+\]\([^)]+\)(: .+)?", line) for line in lines)
    assert {f"docs/{path.name}" for path in PAGES[1:]} <= set(re.findall(r"\]\(([^)]+)\)", text))
    for command in re.findall(r"`lownibble ([a-z]+)", text):
        with pytest.raises(SystemExit) as stopped:
            _parser().parse_args([command, "--help"])
        assert stopped.value.code == 0


def test_the_pages_show_commands():
    assert len(_command_lines()) > 30


def test_examples_in_python_and_toml_parse():
    for _, text in _blocks("python"):
        ast.parse(text)
    for _, text in _blocks("toml"):
        tomllib.loads(text)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "llms.txt"], ids=lambda p: p.name)
def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text()))
    files = [(path.parent / target.partition("#")[0]).resolve() for target in targets if "://" not in target and target[0] != "#"]
    assert [str(file) for file in files if not file.exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.name)
def test_records_say_what_was_run_and_where(path):
    record = json.loads(path.read_text())
    assert {"kind", "schema", "created", "command", "status", "environment"} <= record.keys()
    assert record["environment"]["versions"]["torch"]
