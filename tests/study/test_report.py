"""The report. Oracles: the records it is made from; an HTML parser of its own; the drawing made in Python, for the one that the
script makes in Chromium (its console, its requests and the width of the page are watched there).

`fixtures/comparison.json` is a real comparison of ten steps, its scored rows cut to 32.
"""

import base64
import copy
import csv
import json
import math
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chromium import BINARY, Chromium
from fixtures.html_page import Page
from hypothesis import given
from hypothesis import strategies as st

from lownibble.study import table
from lownibble.study.report import curves, memory, write

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "comparison.json").read_text())
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<!--"


def failed(method: str, error: str) -> tuple[dict[str, Any], dict[str, Any]]:
    run = {"kind": "train", "status": "failed", "error": error, "config": {"method": method}}
    return {"method": method, "status": "failed", "error": error}, run


def _two():
    return copy.deepcopy(FIXTURE["comparison"]), copy.deepcopy(FIXTURE["runs"])


def _one():
    comparison, runs = _two()
    return {**comparison, "methods": comparison["methods"][1:]}, runs[1:]


def _three():
    comparison, runs = _two()
    comparison["methods"].append({**copy.deepcopy(comparison["methods"][0]), "method": "full"})
    return comparison, [*runs, copy.deepcopy(runs[0])]


def _seven():
    comparison, runs = _two()
    names = ["lora", "qlora", "lora+dora", "qlora+int3", "qlora+nf4+exact", "full", "qlora+int8"]
    comparison["methods"] = [{**copy.deepcopy(comparison["methods"][i % 2]), "method": name} for i, name in enumerate(names)]
    return comparison, [copy.deepcopy(runs[i % 2]) for i in range(len(names))]


def _one_failed():
    comparison, runs = _two()
    summary, run = failed("full", "MemoryError: " + "no room " * 40)
    comparison["advice"]["reasons"].insert(0, f"full failed: {summary['error']}")
    return {**comparison, "methods": [*comparison["methods"], summary]}, [*runs, run]


def _all_failed():
    comparison, _ = _two()
    summaries, runs = zip(failed("lora", "TrainingError: not finite"), failed("qlora", HOSTILE), strict=True)
    advice = {"method": None, "reasons": [f"{s['method']} failed: {s['error']}" for s in summaries]}
    return {**comparison, "methods": list(summaries), "status": "failed", "advice": advice, "environment": {}}, list(runs)


def _hostile():
    comparison, runs = _two()
    comparison["config"]["model"] = comparison["config"]["data"]["path"] = HOSTILE
    comparison["command"] = ["lownibble", HOSTILE]
    comparison["advice"] = {"method": HOSTILE, "reasons": [HOSTILE, f"Quality: {HOSTILE}"]}
    comparison["methods"][0]["method"] = HOSTILE
    runs[0]["data"]["name"] = runs[0]["environment"]["device"] = HOSTILE
    for summary, run in zip(comparison["methods"], runs, strict=True):
        for scores in (summary["scores"], summary["scores_before"], *(e["scores"] for e in run["evaluations"])):
            scores[HOSTILE] = 0.5
    return comparison, runs


def _no_scores():
    comparison, runs = _two()
    for side in [*comparison["methods"], *(e for run in runs for e in run["evaluations"])]:
        side.update(scores={}, correct=[])
        side.pop("scores_before", None)
    return comparison, runs


def _bare():
    comparison, runs = _two()
    for key in ("advice", "environment", "command", "config", "created"):
        del comparison[key]
    return comparison, [{"status": "ok"} for _ in runs]


def _long():
    comparison, runs = _two()
    for run in runs:
        run["steps"] = [{**run["steps"][5], "step": i + 1, "loss": 4 / (1 + i / 100)} for i in range(1500)]
    return comparison, runs


CASES = {
    "two": _two, "one": _one, "three": _three, "seven": _seven, "one-failed": _one_failed, "all-failed": _all_failed,
    "hostile": _hostile, "no-scores": _no_scores, "bare": _bare, "long": _long,
}  # fmt: skip


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """name of a case -> (path of its page, comparison, runs)."""

    def make(name: str):
        comparison, runs = CASES[name]()
        path = tmp_path_factory.mktemp(name) / "report.html"
        assert write(path, comparison, runs) == path
        return path, comparison, runs

    return make


@pytest.mark.parametrize("case", CASES)
def test_page_holds_all_it_needs(page_of, case):
    path, comparison, _ = page_of(case)
    text = path.read_text()
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|fetch\(|XMLHttpRequest|WebSocket", text.replace("\n//", ""))
    for tag, has in page.elements:
        assert not has.keys() & {"src", "srcset", "action", "style", "data"}, tag
        assert not any(name.startswith("on") for name in has), tag
        address = has.get("href", has.get("fill") if "url(" in (has.get("fill") or "") else None)
        if address is not None:
            assert address.startswith(("#", "url(#")) or re.search(r"(^|/)record\.json$", address), address
            assert ":" not in address
            assert not address.startswith("/")
    assert "url(" not in "".join(page.all("style"))
    assert len(page.all("h1")) == 1
    assert len(page.all("a")) == 1 + len(comparison["methods"])


def test_records_of_all_seeds_are_linked_and_none_of_what_did_not_run(tmp_path):
    comparison, runs = _two()
    names = [summary["method"] for summary in comparison["methods"]]
    files = [f"{names[0]}/record.json", *(f"{names[0]}/seed-{seed}/record.json" for seed in (2, 11))]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    comparison["methods"][1] = {"method": names[1], "status": "left out", "error": "its weights are packed"}
    runs[1] = {"status": "left out", "error": "its weights are packed", "config": {"method": names[1]}}
    page = Page(write(tmp_path / "report.html", comparison, runs).read_text())
    assert [has["href"] for tag, has in page.elements if tag == "a"] == ["record.json", *files]


@pytest.mark.parametrize("case", ["hostile", "all-failed"])
def test_names_from_outside_are_text(page_of, case):
    path, _, _ = page_of(case)
    page = Page(path.read_text())
    tags = [tag for tag, _ in page.elements]
    assert "img" not in tags
    assert tags.count("script") == len(page.all("script", id="curves")) + 1
    assert any(HOSTILE in text for text in page.all("li"))
    if case == "hostile":
        assert HOSTILE in page.all("h1")[0]
        assert HOSTILE in json.loads(page.all("script", id="curves")[0])["methods"]


@pytest.mark.parametrize("case", ["two", "one", "three", "no-scores", "long"])
def test_table_is_the_terminals(page_of, case):
    path, comparison, _ = page_of(case)
    cells = Page(path.read_text()).all("td")
    wanted = [cell for _, row in table.rows(comparison["methods"]) for cell in row]
    found = [c.replace("→", "->").replace("\N{NO-BREAK SPACE}", " ") for c in cells]
    assert found[1 : 1 + len(wanted)] == wanted


def test_recommendation_comes_first_and_failures_show_their_error(page_of):
    path, comparison, _ = page_of("one-failed")
    page = Page(path.read_text())
    assert page.all("h2")[0] == f"Use {comparison['advice']['method']}"
    reasons = page.all("section", class_="advice")[0]
    assert all(reason in reasons for reason in comparison["advice"]["reasons"])
    assert page.all("td", class_="failed") == [f"failed: {comparison['methods'][2]['error']}"]
    path, comparison, _ = page_of("all-failed")
    page = Page(path.read_text())
    assert page.all("h2")[0] == "No method finished"
    assert page.all("td", class_="failed") == [f"failed: {s['error']}" for s in comparison["methods"]]


def test_memory_bars_are_the_records_bytes(page_of):
    path, comparison, _ = page_of("three")
    page = Page(path.read_text())
    bars = memory.build(comparison["methods"], [{}] * 3)
    stretches = [has for tag, has in page.elements if tag == "rect" and "x" in has and has.get("class", "").startswith("k-")]
    widths = [float(has["width"].removesuffix("%")) for has in stretches]
    bytes_ = [n for s in comparison["methods"] for n in s["bytes_by_kind"].values() if n]
    assert widths == pytest.approx([100 * n / 2**30 / bars.axis.hi for n in bytes_], abs=6e-4)
    assert [f"{s['peak_bytes'] / 2**30:.2f} GiB" for s in comparison["methods"]] == [b.peak for b in bars.bars]


def test_curves_are_the_records_values(page_of):
    path, comparison, runs = page_of("two")
    page = json.loads(Page(path.read_text()).all("script", id="curves")[0])
    for i, run in enumerate(runs):
        evaluation, training, accuracy, _, speed = ([s for s in p["series"] if s["method"] == i] for p in page["panels"])
        assert evaluation[0]["y"] == pytest.approx([e["loss"] for e in run["evaluations"]], rel=1e-5)
        assert training[0]["y"] == pytest.approx([s["loss"] for s in run["steps"]], rel=1e-5)
        warmup = run["speed"]["warmup_steps"]
        rates = [s["tokens"] / s["seconds"] for s in run["steps"]]
        assert speed[0]["y"][:warmup] + speed[1]["y"][warmup:] == pytest.approx(rates, rel=1e-5)
        assert speed[2]["y"][-1] == pytest.approx(run["speed"]["tokens_per_s_quartiles"][1], rel=1e-5)
        p = [e["scores"]["accuracy"] for e in run["evaluations"]]
        assert accuracy[0]["error"] == pytest.approx([math.sqrt(q * (1 - q) / 32) for q in p], rel=1e-5)
        track = page["tracks"][i]
        assert track["train"]["seconds"][-1] == pytest.approx(sum(s["seconds"] for s in run["steps"]), rel=1e-5)
        before = [[s for s in run["steps"] if s["step"] <= e["step"]] for e in run["evaluations"]]
        assert track["eval"]["tokens"] == [sum(s["tokens"] for s in steps) for steps in before]
    assert page["panels"][0]["target"] == comparison["methods"][0]["target_loss"]


def test_long_runs_are_thinned_without_losing_tokens():
    _, runs = _long()
    points, size = curves.thin(runs[0]["steps"])
    assert len(points) <= curves.POINTS
    assert size == 4
    assert sum(p["tokens"] for p in points) == sum(s["tokens"] for s in runs[0]["steps"])
    assert points[0]["loss"] == pytest.approx(sum(s["loss"] for s in runs[0]["steps"][:4]) / 4)


def test_runs_under_different_conditions_are_named(tmp_path):
    comparison, runs = _two()
    assert "same conditions" not in write(tmp_path / "a.html", comparison, runs).read_text()
    runs[1]["environment"]["threads"] = 64
    warning = Page(write(tmp_path / "b.html", comparison, runs).read_text()).all("p", class_="warning")[0]
    assert "threads" in warning


def test_options_that_differ_come_before_the_rest(page_of):
    path, comparison, _ = page_of("two")
    changed = [label for label in Page(path.read_text()).all("code") if "." in label][:4]
    assert changed == ["data.max_eval_rows", "train.max_steps", "train.eval_steps", "train.output_dir"]
    assert " ".join(comparison["command"]) in Page(path.read_text()).all("pre")


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_linear_ticks_are_few_inside_and_even(lo, span):
    axis = curves.linear(lo, lo + span)
    values = [v for v, _ in axis.ticks]
    assert 2 <= len(values) <= 7
    assert all(-1e-6 <= axis.share(v) <= 1 + 1e-6 for v in values)
    steps = [b - a for a, b in pairwise(values)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e9))
def test_log_ticks_are_few_and_inside(lo, factor):
    axis = curves.logarithmic(lo, lo * factor)
    assert 2 <= len(axis.ticks) <= 17
    assert all(-1e-6 <= axis.share(v) <= 1 + 1e-6 for v, _ in axis.ticks)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(1, 9))
def test_smoothing_is_the_mean_of_the_last_values(values, window):
    wanted = [sum(v := values[max(0, i + 1 - window) : i + 1]) / len(v) for i in range(len(values))]
    assert curves.smooth(values, window) == pytest.approx(wanted, abs=1e-9)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        pytest.skip("no chromium binary (Debian: apt-get install chromium)")
    with Chromium(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


MARKS = """[...document.querySelectorAll('.series')].map(g => [
    ...[...g.querySelectorAll('path')].map(p => p.getAttribute('d')),
    ...[...g.querySelectorAll('use')].map(u => u.getAttribute('x') + u.getAttribute('y')),
    ...[...g.querySelectorAll('line')].map(l => ['x1', 'x2', 'y1', 'y2'].map(k => l.getAttribute(k)).join())])"""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_page_opens_without_complaint_and_fits(page_of, browser, case, width, dark):
    path, *_ = page_of(case)
    browser.open(path, width=width, dark=dark)
    assert browser.value("document.documentElement.dataset.charts") == "ready"
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    paper = browser.value("getComputedStyle(document.documentElement).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert len(base64.b64decode(browser("Page.printToPDF")["data"])) > 10_000
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= width


def test_script_draws_what_python_drew(page_of, browser):
    path, *_ = page_of("three")
    browser.open(path, script=False)
    assert browser.value("[...document.querySelectorAll('.needs-script')].every(e => !e.checkVisibility())")
    drawn = _positions(browser.value(MARKS))
    assert len(drawn) > 100
    browser.open(path)
    assert _positions(browser.value(MARKS)) == pytest.approx(drawn, abs=0.11)


def _positions(marks: list[list[str]]) -> list[float]:
    return [float(n) for series in marks for text in series for n in re.findall(r"-?[\d.]+", text)]


def test_every_method_is_drawn(page_of, browser):
    """Six looks of lines, marks that are there, and no more than that: the seventh method looks as the first."""
    path, comparison, _ = page_of("seven")
    browser.open(path)
    looks = browser.value(
        "[...document.querySelectorAll('.methods .stroke')].map(e => getComputedStyle(e)).map(e => e.stroke + e.strokeDasharray)"
    )
    assert len(looks) == len(comparison["methods"])
    assert len(set(looks[:6])) == 6
    assert looks[6] == looks[0]
    assert not any(look.startswith("none") for look in looks)
    assert browser.value(
        "[...document.querySelectorAll('.series use')].every(e => document.querySelector(e.getAttribute('href')))"
    )
    assert browser.value("[...document.querySelectorAll('.series .stroke')].every(e => getComputedStyle(e).stroke != 'none')")


def test_axes_scales_and_methods_switch(page_of, browser):
    path, comparison, runs = page_of("two")
    page = curves.build(comparison["methods"], runs)
    browser.open(path)
    for name in ("tokens", "linear"):
        browser.value(f"document.querySelector('input[value={name}]').click()")
    browser.value("document.querySelector('input[data-method=\"1\"]').click()")
    x, y = page.x["tokens"], page.panels[0].scales["linear"]
    points = zip(page.tracks[0]["eval"]["tokens"], page.panels[0].series[0].y, strict=True)
    wanted = [n for tokens, loss in points for n in (100 * x.share(tokens), 100 - 100 * y.share(loss))]
    uses = browser.value(
        "[...document.querySelector('.series').querySelectorAll('use')].map(u => u.getAttribute('x') + u.getAttribute('y'))"
    )
    assert [float(n) for text in uses for n in text.split("%") if n] == pytest.approx(wanted, abs=0.01)
    assert browser.value("[...document.querySelectorAll('.m1.series')].every(g => getComputedStyle(g).display == 'none')")
    assert browser.value("document.querySelector('.axis').textContent").startswith("tokens")
    assert browser.complaints() == []


def test_every_table_is_saved(page_of, browser, tmp_path):
    """Oracle: the terminal's table. A method's error stands in its column, and moves no other's figures."""
    path, comparison, _ = page_of("one-failed")
    browser.open(path)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    names = browser.value("[...document.querySelectorAll('table')].map(e => e.getAttribute('aria-label'))")
    assert names[:2] == ["Figures", "Memory by kind"]
    browser("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for name in names:
        browser.value(f"document.querySelector('[aria-label=\"Save {name} as CSV\"]').click()")
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("*.csv"))) < len(names) and time.monotonic() < deadline:
        time.sleep(0.05)
    with (tmp_path / "figures.csv").open(newline="") as file:
        head, *found = csv.reader(file)
    assert [cell.removesuffix(" recommended") for cell in head] == ["", *(s["method"] for s in comparison["methods"])]
    wanted = table.rows(comparison["methods"])
    assert [row[3] for row in found] == [f"failed: {comparison['methods'][2]['error']}".strip(), *[""] * (len(wanted) - 1)]
    said = [[" ".join(cell.replace("→", "->").split()).removeprefix("'") for cell in row[1:3]] for row in found]
    assert said == [[" ".join(cell.split()) for cell in cells[:2]] for _, cells in wanted]


@pytest.mark.parametrize("by", ["pointer", "keys"])
def test_values_are_read_out(page_of, browser, by):
    path, _, runs = page_of("two")
    browser.open(path)
    for selector, wanted in ((".plot", [f"{run['evaluations'][-1]['loss']:.4g}" for run in runs]), (".bar svg", ["other: "])):
        left, top, width, height = browser.value(
            f"(e => {{ e.scrollIntoView(); const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] }})"
            f"(document.querySelector('{selector}'))"
        )
        if by == "pointer":
            browser("Input.dispatchMouseEvent", type="mouseMoved", x=left + width - 20, y=top + height / 2)
        else:
            browser.value(f"document.querySelector('{selector}').focus()")
            for _ in range(8):
                browser("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        tip = browser.value(f"document.querySelector('{selector}').closest('figure').querySelector('.tip').textContent")
        assert all(text in tip for text in wanted), tip
    assert browser.complaints() == []
