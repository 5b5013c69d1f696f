"""The studio's page in a headless Chromium, from first click to exported adapter. Oracle: the files that the jobs leave."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from chromium import BINARY, Chromium
from gguf import GGUFReader
from safetensors.torch import load_file


@pytest.fixture
def browser(tmp_path):
    if BINARY is None:
        pytest.skip("no chromium binary (Debian: apt-get install chromium)")
    with Chromium(tmp_path / "chromium") as chromium:
        yield chromium


@contextmanager
def studio(folder):
    """A studio's process in `folder`, and its address; killed in the end, as by a crash."""
    command = [sys.executable, "-m", "lownibble", "studio", "--port", "0", "--folder", "runs"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process.stderr.readline().split()[-1]
        finally:
            process.kill()


def until(browser, expression, seconds=300):
    end = time.monotonic() + seconds
    while not browser.value(expression):
        assert time.monotonic() < end, browser.value("document.body.innerText")
        time.sleep(0.1)


def fill(browser, name, text):
    browser.value(
        f"(() => {{ const e = document.querySelector('[data-option=\"{name}\"]'); e.value = {json.dumps(text)}; "
        "e.dispatchEvent(new Event(e.tagName == 'SELECT' ? 'change' : 'input')); })()"
    )


def click(browser, text):
    found = f"[...document.querySelectorAll('button, a')].find(e => e.textContent == {json.dumps(text)} && e.offsetParent)"
    until(browser, f"!!{found}")
    browser.value(f"{found}.click()")


def badge(words):
    return f"document.querySelector('#j-badge')?.textContent == '{words}'"


def check_quiet(browser, address):
    """No message on the console, nothing asked of elsewhere, nothing wider than the window."""
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert [e for e in browser.complaints() if e["method"] != "Network.requestWillBeSent"] == []
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_from_the_first_click_to_an_exported_adapter(browser, tiny_model, tiny_data, tmp_path):
    with studio(tmp_path) as address:
        browser.open(address)
        until(browser, "document.querySelectorAll('.planned').length == 3")
        fill(browser, "model", str(tiny_model))
        document = browser("DOM.getDocument")["root"]["nodeId"]
        node = browser("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
        browser("DOM.setFileInputFiles", nodeId=node, files=[str(tiny_data / "train.jsonl")])
        until(browser, "!document.querySelector('#preview').hidden && !document.querySelector('#look').disabled")
        assert (tmp_path / "runs" / "uploads" / "train.jsonl").read_bytes() == (tiny_data / "train.jsonl").read_bytes()
        fill(browser, "data.prompt_template", "review : {text} sentiment :")
        fill(browser, "data.completion_template", " {label}")
        fill(browser, "train.max_length", "32")
        fill(browser, "train.max_steps", "60")
        fill(browser, "train.save_steps", "5")
        fill(browser, "lora.r", "2")
        click(browser, "Preview the rows")
        until(browser, "document.querySelector('.example mark')?.textContent.trim().startsWith('positive')")
        until(browser, "document.querySelector('.planned.mine')?.textContent.includes('fits')")
        fill(browser, "lora.lora_dropout", "2")
        until(browser, "!document.querySelector('#wrong').hidden")
        assert "'lora_dropout' of LoraConfig" in browser.value("document.querySelector('#wrong').textContent")
        fill(browser, "lora.lora_dropout", "")
        until(browser, "!document.querySelector('#start').disabled")
        command = browser.value("document.querySelector('#command').textContent")
        click(browser, "Start training")
        until(browser, "document.querySelector('#j-progress p')?.textContent.match(/step ([6-9]|[1-5]\\d) of 60/) != null")
        (job,) = (tmp_path / "runs" / ".studio" / "jobs").iterdir()
        written = json.loads((job / "job.json").read_text())
        os.kill(written["pid"], signal.SIGSTOP)  # it waits for the next studio
        assert psutil.Process(written["pid"]).cmdline()[1:] == ["-m", "lownibble", *written["words"], "--json"]
        assert browser.value("document.querySelector('#job .command').textContent") == command
        check_quiet(browser, address)
        browser.open("about:blank")  # the page would ask after the studio that is killed now

    assert psutil.pid_exists(written["pid"]), "the job outlives the studio"
    with studio(tmp_path) as address:
        browser.open(f"{address}#job/{job.name}", width=390, dark=True)
        until(browser, badge("running"))
        os.kill(written["pid"], signal.SIGKILL)
        until(browser, badge("died"))
        assert "Resume goes on" in browser.value("document.querySelector('#j-note').textContent")
        click(browser, "Resume")
        until(browser, badge("done"))
        assert len({step["step"] for step in json.loads((tmp_path / "runs/qlora-1/record.json").read_text())["steps"]}) == 60
        until(browser, "document.querySelectorAll('#c-loss .line').length == 1")
        assert browser.value("document.querySelector('#c-memory .band') != null")
        check_quiet(browser, address)
        click(browser, "Export…")
        until(browser, "document.querySelector('#ask .command').textContent.includes('--output runs/export-1.gguf')")
        browser.value("document.querySelector('#go').click()")
        until(browser, "location.hash.includes('export')")
        until(browser, badge("done"))
        trained = load_file(tmp_path / "runs/qlora-1/adapter/adapter_model.safetensors")
        exported = {tensor.name for tensor in GGUFReader(tmp_path / "runs/export-1.gguf").tensors}
        assert len(exported) == len(trained)
        assert all(name.endswith((".lora_a", ".lora_b")) for name in exported)
        browser.value("location.hash = '#runs'")
        until(browser, "document.querySelectorAll('.run').length == 2")
        browser.value("document.querySelector('.run input').click()")
        until(browser, "document.querySelector('#beside table')?.textContent.includes('60 of 60')")
        check_quiet(browser, address)
