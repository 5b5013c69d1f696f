"""The pages that teach (docs/guide/) and the example notebook, run as they are written: every command, in order, in one folder.

The embedded model is replaced by a tiny one. Oracles: exit codes, the files that the pages speak of, the server's answers.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_folders import write_model

from lownibble.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))
NOTEBOOK = ROOT / "examples" / "first_finetune.ipynb"
BLOCK = re.compile(r"(?:<!-- file: (\S+) -->\n)?^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LEFT = {
    "1-first-fine-tune.md": ["runs/first/adapter/adapter_model.safetensors", "runs/first/record.json"],
    "2-my-data.md": [],
    "3-method-and-card.md": ["runs/compare/report.html"],
    "4-production.md": ["runs/merged/model.safetensors", "adapter.gguf"],
    "5-reading-a-study.md": ["runs/study/report.html", "runs/study/report.md"],
}
"""Page -> the files that its commands leave."""


def smaller(text, model):
    """The tiny model for the embedded one, few steps, one seed."""
    text = text.replace("seeds = [0, 1]", "seeds = [0]")
    text = re.sub(r"--max-steps \d+", "--max-steps 2", re.sub(r"\bmax_steps(\s*)=(\s*)\d+", r"max_steps\1=\g<2>2", text))
    return re.sub(r"\beval_steps = \d+", "eval_steps = 1", re.sub(r"(?<![\w-])demo(?![\w-])", str(model), text))


def serving(command, log):
    """The server of a page, once it answers."""
    with log.open("w") as told:
        server = subprocess.Popen([sys.executable, "-m", "lownibble", *command[1:]], stderr=told, stdout=told)
    port = command[command.index("--port") + 1]
    health = ["curl", "-sf", f"http://127.0.0.1:{port}/health"]
    until = time.monotonic() + 120
    while subprocess.run(health, capture_output=True, check=False).returncode != 0:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < until
        time.sleep(0.2)
    return server


@pytest.mark.slow
def test_every_command_of_the_pages(tmp_path, forked, monkeypatch, capfd):
    before = psutil.Process().children(recursive=True)
    monkeypatch.chdir(tmp_path)
    model, servers, answers = write_model(tmp_path / "tiny"), [], []
    try:
        for page in PAGES:
            for file, language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
                text = smaller(text, model)
                if file:
                    Path(file).write_text(text, encoding="utf-8")
                elif language == "python":
                    exec(compile(text, page.name, "exec"), {})
                elif language == "bash":
                    for line in text.splitlines():
                        command = shlex.split(line)
                        if command[:2] == ["lownibble", "serve"]:
                            servers.append(serving(command, tmp_path / "server.log"))
                        elif command[0] == "lownibble":
                            assert main(command[1:]) == 0, f"{page.name}: {line}\n{capfd.readouterr().err[-2000:]}"
                        else:
                            assert command[0] == "curl", f"{page.name}: {line}"
                            answers.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
                else:
                    raise AssertionError(f"{page.name}: a block of '{language}' that this test does not run")
            assert [name for name in LEFT[page.name] if not Path(name).is_file()] == []
    finally:
        for server in servers:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    models, completion = answers
    assert {entry["id"] for entry in models["data"]} >= {"adapter"}
    assert completion["model"] == "adapter"
    assert completion["usage"]["completion_tokens"] >= 1
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.slow
def test_notebook(tmp_path, forked, monkeypatch):
    """Its code cells, in order. (No Jupyter is needed: nothing in them is IPython's.)"""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    model, names = write_model(tmp_path / "tiny"), {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "figures of one machine do not belong into the file"
            exec(compile(smaller("".join(cell["source"]), model), NOTEBOOK.name, "exec"), names)
    assert Path("runs/notebook/adapter/adapter_model.safetensors").is_file()
    assert names["after"] != names["before"]
