"""The studio's page in a headless Chromium, from first click to exported adapter. Oracle: the files that the jobs leave."""

import json
import os
import signal
import time
import tomllib
from pathlib import Path

import psutil
import pytest
from chromium import BINARY, Chromium
from driving import badge, check_quiet, choose, click, fill, studio, until, upload
from gguf import GGUFReader
from safetensors.torch import load_file

from lownibble.study.report import write


@pytest.fixture
def browser(tmp_path):
    if BINARY is None:
        pytest.skip("no chromium binary (Debian: apt-get install chromium)")
    with Chromium(tmp_path / "chromium") as chromium:
        yield chromium


@pytest.mark.slow
def test_from_the_first_click_to_an_exported_adapter(browser, tiny_model, tiny_data, tmp_path):
    with studio(tmp_path) as address:
        browser.open(address)
        until(browser, "document.querySelectorAll('.planned').length == 3")
        fill(browser, "model", str(tiny_model))
        upload(browser, tiny_data / "train.jsonl")
        assert (tmp_path / "runs" / "uploads" / "train.jsonl").read_bytes() == (tiny_data / "train.jsonl").read_bytes()
        fill(browser, "data.prompt_template", "review : {text} sentiment :")
        fill(browser, "data.completion_template", " {label}")
        fill(browser, "train.max_length", "32")
        click(browser, "Preview the rows")
        until(browser, "document.querySelector('.example mark')?.textContent.trim().startsWith('positive')")
        epochs = "document.querySelector('[data-option=\"train.num_train_epochs\"]').value"
        assert browser.value(epochs) == "10", "few rows: the page makes the run longer"
        fill(browser, "train.num_train_epochs", "")
        fill(browser, "train.max_steps", "60")
        fill(browser, "train.save_steps", "5")
        fill(browser, "lora.r", "2")
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


STUDY = """
name = "tiny"
seeds = [0]
[models]
tiny = "MODEL"
[methods]
lora = { method = "lora" }
[tasks.reviews]
kind = "classification"
data = { path = "DATA", prompt_template = "review : {text} sentiment :", completion_template = " {label}" }
train = { batch_size = 8, max_length = 32 }
[train]
max_steps = 4
"""


def open_report(browser, address):
    """Follow the page's link to the report; returns its headings."""
    href = browser.value("[...document.querySelectorAll('#j-buttons a')].find(e => e.textContent == 'Open the report').href")
    assert href.startswith(address)
    browser.open(href)
    check_quiet(browser, address)
    return browser.value("[...document.querySelectorAll('h1, h2')].map(e => e.textContent)")


@pytest.mark.slow
def test_a_comparison_and_a_study_are_watched_and_their_reports_opened(browser, tiny_model, tiny_data, tmp_path):
    with studio(tmp_path) as address:
        browser.open(address)
        until(browser, "document.querySelectorAll('.planned').length == 3")
        choose(browser, "compare")
        for name, text in (
            ("model", str(tiny_model)), ("data.path", str(tiny_data)), ("methods", "lora,qlora"), ("train.max_steps", "4"),
            ("data.prompt_template", "review : {text} sentiment :"), ("data.completion_template", " {label}"),
            ("train.max_length", "32"), ("lora.r", "2"),
        ):  # fmt: skip
            fill(browser, name, text)
        until(browser, "document.querySelector('#command').textContent.includes('--methods lora,qlora')")
        click(browser, "Start comparing")
        until(browser, "document.querySelectorAll('#c-loss li').length == 2")
        until(browser, badge("done"))
        summary = json.loads((tmp_path / "runs/compare-1/record.json").read_text())
        shown = browser.value("[...document.querySelectorAll('#j-result tbody th')].map(e => e.textContent)")
        assert shown == [each["method"] for each in summary["methods"]] == ["lora", "qlora"]
        check_quiet(browser, address)
        assert any("LoRA" in heading or "lora" in heading for heading in open_report(browser, address))

        browser.open(f"{address}#new", dark=True)
        until(browser, "document.querySelectorAll('.planned').length == 3")
        choose(browser, "study")
        toml = STUDY.replace("MODEL", str(tiny_model)).replace("DATA", str(tiny_data))
        browser.value(f"(() => {{ const e = document.querySelector('#toml'); e.value = {json.dumps(toml)}; "
                      "e.dispatchEvent(new Event('input')); })()")  # fmt: skip
        click(browser, "Start the study")
        until(browser, "document.querySelector('#j-progress')?.textContent.includes('it has begun')")
        until(browser, badge("done"))
        assert len(list((tmp_path / "runs/study-1/cells").glob("*.json"))) == 1
        check_quiet(browser, address)
        assert open_report(browser, address)


@pytest.mark.slow
def test_steps_of_ten_long_runs_are_seen_within_a_second(browser, tmp_path):
    """From the line in the file to the text on the page, with all ten runs' curves drawn; of three, the fastest."""

    def add(first, count):
        steps = range(first, first + count)
        text = "".join(
            json.dumps({"event": "Stepped", "step": n, "loss": 2.0, "tokens": 9, "seconds": 0.1}) + "\n" for n in steps
        )
        for n in range(10):
            (tmp_path / "runs" / f"long-{n}").mkdir(parents=True, exist_ok=True)
            with (tmp_path / "runs" / f"long-{n}" / "events.jsonl").open("a") as file:
                file.write(text)

    started = json.dumps({"event": "Started", "first_step": 0, "total_steps": 20_000}) + "\n"
    for n in range(10):
        (tmp_path / "runs" / f"long-{n}").mkdir(parents=True)
        (tmp_path / "runs" / f"long-{n}" / "events.jsonl").write_text(started)
    add(1, 10_000)
    shown = "document.querySelector('#beside table')?.textContent.split('{} of 20000').length == 11"
    with studio(tmp_path) as address:
        browser.open(f"{address}#runs")
        until(browser, "document.querySelectorAll('.run input').length == 10")
        browser.value("document.querySelectorAll('.run input').forEach(e => e.click())")
        until(browser, shown.format(10_000))
        waits = []
        for last in (10_001, 10_002, 10_003):
            began = time.monotonic()
            add(last, 1)
            until(browser, shown.format(last))
            waits.append(time.monotonic() - began)
        assert browser.value("document.querySelectorAll('#b-loss li').length") == 10
        check_quiet(browser, address)
    assert min(waits) < 1.0, waits


ODD_NAMES = ("my run", "50%off", "a%20b", "<b>&ü#?")


def steps(*numbers):
    """Lines of events."""
    return "".join(json.dumps({"event": "Stepped", "step": n, "loss": n, "tokens": 9, "seconds": 0.1}) + "\n" for n in numbers)


@pytest.fixture
def page(browser, tmp_path):
    """The page of a studio whose folder has runs of a terminal, with `ODD_NAMES`."""
    for name in ODD_NAMES:
        (tmp_path / "runs" / name).mkdir(parents=True)
        started = json.dumps({"event": "Started", "first_step": 0, "total_steps": 20_000}) + "\n"
        (tmp_path / "runs" / name / "events.jsonl").write_text(started + steps(1, 12_345))
    with studio(tmp_path) as address:
        browser.open(f"{address}#runs")
        until(browser, f"document.querySelectorAll('.run').length == {len(ODD_NAMES)}")
        yield address
        browser.open("about:blank")


FIGURES = "document.querySelector('#j-figures')?.textContent.includes('{}')"


def test_runs_of_any_name_are_opened_and_outlive_a_failed_request(browser, page, tmp_path):
    for place, name in enumerate(
        sorted(ODD_NAMES, key=lambda name: -(tmp_path / "runs" / name / "events.jsonl").stat().st_mtime)
    ):
        browser.value("location.hash = '#runs'")
        until(browser, "!document.querySelector('#runs').hidden")
        browser.value(f"document.querySelectorAll('.run a')[{place}].click()")
        until(browser, "!!document.querySelector('#j-badge')", 20)
        assert browser.value("document.querySelector('#job h1').textContent").endswith(name)
        check_quiet(browser, page)
    browser.value("location.hash = '#job/run:50%off'")  # as typed
    until(browser, "document.querySelector('#job h1')?.textContent.endsWith('50%off')")
    until(browser, FIGURES.format("6,173"))
    browser.value("document.querySelector('#c-loss svg').focus()")
    browser("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    assert browser.value("document.querySelector('#c-loss .tip').textContent").startswith("step 12,345:")
    browser.value("""(() => { const real = fetch; window.fetch = (url, more) => {
        if (!url.includes("jobs/run")) return real(url, more);
        window.fetch = real; window.failed = true; return Promise.reject(new TypeError("no")); }; })()""")
    with (tmp_path / "runs" / "50%off" / "events.jsonl").open("a") as file:
        file.write(steps(12_346))
    until(browser, "window.failed && !!document.querySelector('#j-badge')", 20)
    with (tmp_path / "runs" / "50%off" / "events.jsonl").open("a") as file:
        file.write(steps(*range(12_347, 12_400)))
    until(browser, FIGURES.format("12,390"), 20)
    check_quiet(browser, page)


def test_the_list_of_runs_stays_true(browser, page):
    browser.value("document.querySelector('.skip').click()")
    assert browser.value("location.hash + document.activeElement.id") == "#runsmain"
    assert browser.value("document.querySelector('#new').hidden && !document.querySelector('#runs').hidden")
    until(browser, "document.querySelector('.run p').textContent.includes('just now')")
    browser.value("(() => { const real = Date.now; Date.now = () => real() + 5 * 3600e3; })()")
    until(browser, "document.querySelector('.run p').textContent.includes('5 h ago')", 20)
    browser.value("""(() => { const real = fetch; window.fetch = async (url) => url != "/api/jobs" ? real(url)
        : new Response(JSON.stringify({ ...await (await real(url)).json(), left_out: 7 })); })()""")
    until(browser, "document.querySelector('#older').checkVisibility()", 20)
    assert browser.value("document.querySelector('#older').textContent") == "7 older ones are in the folder."
    browser.value("document.querySelectorAll('.run input').forEach(e => e.click())")
    until(browser, f"document.querySelectorAll('#beside thead a').length == {len(ODD_NAMES)}", 20)
    browser.resize(390)
    check_quiet(browser, page)


STUB = """(() => { const real = fetch; window.sent = []; window.fetch = async (url, more) => {
    if (url == "/api/jobs" && more?.body) { sent.push(more.body); return new Response('{"error": "no"}', { status: 400 }); }
    const answer = await real(url, more);
    if (more?.body?.includes('"lora.r":"0"')) await new Promise(done => setTimeout(done, 3000));
    return answer; }; })()"""


def test_forms_take_enter_and_only_their_last_answer(browser, page):
    browser.value("location.hash = '#new'")
    until(browser, "document.querySelectorAll('.planned').length == 3")
    browser.value(STUB)
    fill(browser, "lora.r", "0")
    time.sleep(0.6)
    fill(browser, "lora.r", "4")
    time.sleep(4)
    assert " --r 4 " in browser.value("document.querySelector('#command').textContent")
    assert browser.value("document.querySelector('#wrong').hidden && !document.querySelector('#start').disabled")
    fill(browser, "lora.r", "")
    browser.value("ask('merge', 'Merge', '', { adapter: 'some/adapter' })")
    browser.value("document.querySelector('#ask input').focus()")
    for kind in ("rawKeyDown", "char", "keyUp"):
        text = {"text": "\r"} if kind == "char" else {}
        browser("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, **text)
    until(browser, "sent.length == 1 && !document.querySelector('#refused').hidden", 20)
    assert json.loads(browser.value("sent[0]"))["values"] == {"adapter": "some/adapter"}
    assert browser.value("document.querySelector('#ask').open")
    click(browser, "Cancel")
    assert browser.value("[document.querySelector('#ask').open, sent.length]") == [False, 1]
    found = "{ suggested_epochs: 10, training: { rows: 10, tokens: 1000 } }"
    choose(browser, "compare")
    assert browser.value(f"lengthen({found})") == []
    assert browser.value(f"(() => {{ rows = {found}; return [tokens(), values[EPOCHS] || '']; }})()") == [48 * 16 * 100, ""]
    choose(browser, "train")
    assert browser.value(f"lengthen({found}).length") == 1
    assert browser.value(f"(() => {{ rows = {found}; return [tokens(), values[EPOCHS]]; }})()") == [10 * 1000, "10"]
    fill(browser, "train.max_steps", "3")
    fill(browser, "train.packing", "true")
    assert browser.value(f"(() => {{ rows = {found}; return tokens(); }})()") == 3 * 8 * 512
    fill(browser, "data.prompt_template", r"Q: {q}\nA:")
    choose(browser, "study")
    study = tomllib.loads(browser.value("document.querySelector('#toml').value"))
    assert study["tasks"]["mine"]["data"]["prompt_template"] == "Q: {q}\nA:", "as in the flag, \\n is a new line"


def test_a_report_is_saved_from(browser, page, tmp_path):
    """Its buttons work in the sandbox, and it has no links, which would not be answered."""
    made = json.loads((Path(__file__).parents[1] / "study" / "fixtures" / "comparison.json").read_text())
    write(tmp_path / "runs" / "my run" / "report.html", made["comparison"], made["runs"])
    browser.open(f"{page}api/jobs/run:my run/report")
    (tmp_path / "saved").mkdir()
    browser("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"))
    browser.value("document.querySelector('.save button').click()")
    end = time.monotonic() + 20
    while not list((tmp_path / "saved").glob("*.csv")):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert browser.value("document.querySelectorAll('a').length") == 0
    assert browser.value("document.querySelector('.records').textContent").count("record.json") == 1 + len(made["runs"])
    check_quiet(browser, page)
