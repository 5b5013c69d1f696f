"""The page with sliders. Oracle: the plans themselves."""

import json
import re
from dataclasses import replace

import pytest
from chromium import BINARY, Chromium

from lownibble.cli.main import main
from lownibble.errors import OutputError
from lownibble.planning import page
from lownibble.planning.page import write_page
from lownibble.planning.plan import plan


@pytest.fixture(scope="module")
def planned():
    return plan("demo", gpu="t4", batch_size=2, max_length=192)


@pytest.mark.slow
def test_the_page_holds_the_plans(planned, tmp_path):
    text = write_page(planned, tmp_path / "new" / "plan.html").read_text()
    data = json.loads(re.search(r'type="application/json" id="data">(.*)</script>', text)[1])
    for row in planned.rows:
        grid = data["grid"][row.verdict.method]
        cell = grid[0][data["batch"].index(2)][data["length"].index(192)]
        assert cell["device"] == list(row.verdict.memory.device)
        assert sum(cell["kinds"].values()) == row.verdict.memory.allocated.likely
    assert "http://" not in text
    assert "https://" not in text


@pytest.mark.parametrize(
    "options", [{}, {"method": "qlora", "merge_aware": True}, {"method": "qlora", "init_lora_weights": "loftq"}], ids=str
)
def test_other_cells_are_plans_of_their_own(options, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "BATCHES", (4,))
    monkeypatch.setattr(page, "LENGTHS", (1024,))
    text = write_page(plan("demo", gpu="t4", batch_size=2, max_length=192, **options), tmp_path / "plan.html").read_text()
    data = json.loads(re.search(r'type="application/json" id="data">(.*)</script>', text)[1])
    for row in plan("demo", gpu="t4", batch_size=4, max_length=1024, **options).rows:
        cell = data["grid"][row.verdict.method][0][data["batch"].index(4)][data["length"].index(1024)]
        assert cell["device"] == list(row.verdict.memory.device)


@pytest.mark.parametrize(
    ("config", "more"), [({"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}, []), (None, ["--exact"])]
)
def test_no_page_of_plans_that_are_traced(config, more, tmp_path, capsys):
    """Said before anything is traced."""
    model = "demo"
    if config:
        model = str(tmp_path / "config.json")
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", model, "--gpu", "t4", *more, "--html", str(tmp_path / "plan.html")]) == 2
    said = capsys.readouterr()
    assert "each step of this one is traced" in " ".join(said.err.split())
    assert "fake tensors" not in said.err
    assert not said.out
    assert not (tmp_path / "plan.html").exists()


def test_names_are_text_and_sliders_say_their_values(tmp_path, monkeypatch):
    if BINARY is None:
        pytest.skip("no chromium binary (Debian: apt-get install chromium)")
    monkeypatch.setattr(page, "BATCHES", (4,))
    monkeypatch.setattr(page, "LENGTHS", ())
    name = "</script><!--<script>"
    made = plan("demo", gpu="t4,rtx-4090", batch_size=2, max_length=192)
    path = write_page(replace(made, shape=replace(made.shape, name=name)), tmp_path / "plan.html")
    with Chromium(tmp_path / "chromium") as browser:
        browser.open(path)
        assert browser.value("document.querySelector('h1').textContent").startswith(name)
        assert browser.value("document.querySelector('#batch').getAttribute('aria-valuetext')") == "2 rows"
        browser.value("(e => { e.value = 1; e.dispatchEvent(new Event('input')); })(document.querySelector('#batch'))")
        assert browser.value("document.querySelector('#batch').getAttribute('aria-valuetext')") == "4 rows"
        assert browser.value("document.querySelector('#length').getAttribute('aria-valuetext')") == "192 tokens"
        assert made.devices[0].title in browser.value("document.querySelector('#note').textContent")
        assert browser.complaints() == []


@pytest.mark.slow
def test_a_page_that_cannot_be_written(planned, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Give another --html"):
        write_page(planned, tmp_path / "file" / "plan.html")
