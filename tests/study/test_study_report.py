"""A study's summary and report. Oracles: scipy's tests and arithmetic on records with known figures; an HTML parser; Chromium."""

import csv
import json
import math
import statistics
import time
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from chromium import BINARY, Chromium
from fixtures.html_page import Page
from scipy import stats as theirs

from lownibble.errors import ConfigError
from lownibble.measuring import mixed
from lownibble.measuring.survival import mean_of_censored
from lownibble.study.analysis import analyse
from lownibble.study.claims import _answer, compare_claims
from lownibble.study.decide import DIFFERENT, tails
from lownibble.study.report import study_page
from lownibble.study.report.methods import methods
from lownibble.study.report.sizes import sizes
from lownibble.study.spec import read_study

HOSTILE = "</script><img src=x onerror=alert(1)>|\"'&"
CURVES = {
    "full": {0: [3.0, 1.0, 0.50], 1: [3.0, 1.2, 0.60], 2: [3.0, 1.1, 0.70]},
    "lora": {0: [3.0, 1.5, 0.60], 1: [3.0, 1.6, 0.62], 2: [3.0, 1.4, 0.80]},
    "qlora": {0: [3.0, 1.6, 0.61], 1: [3.0, 1.8, 0.66], 2: [3.0, 1.5, 0.79]},
}
"""Evaluation losses at steps 0, 10 and 20, by method and seed."""

ACCURACY = {"full": [0.90, 0.90, 0.80], "lora": [0.80, 0.82, 0.79], "qlora": [0.79, 0.82, 0.78]}
PEAKS = {"full": 4000, "lora": 2000, "qlora": 1000}
RATES = {"full": 50.0, "lora": 100.0, "qlora": 80.0}


def made(
    folder,
    *,
    methods=("full", "lora", "qlora"),
    seeds=(0, 1, 2),
    leave_out=(),
    fail=(),
    task="reviews",
    turns=True,
    no_trace=False,
    bits=None,
    of=None,
):
    """A study's folder with these records; `leave_out` and `fail` are (method, seed); `bits`: of packed bases; `of`: codecs."""
    study = {
        "kind": "study", "schema": 1, "status": "ok", "created": "2026-01-01T00:00:00+00:00", "name": f"made {task}",
        "command": ["lownibble", "study", "run", "x.toml"], "jobs": 1, "executor": "local", "environment": environment(),
        "spec": {
            "name": f"made {task}", "seeds": list(seeds), "models": {"m": "demo"}, "methods": {m: {"method": m} for m in methods},
            "tasks": {task: {"kind": "classification", "data": {"path": "demo"}, "margin": 0.03}}, "train": {"max_steps": 20},
        },
        "cells": [], "tuning": [], "speed": [{"model": "m", "task": task, "digest": "turns"}],
    }  # fmt: skip
    (folder / "cells").mkdir(parents=True)
    (folder / "speed").mkdir()
    for method in methods:
        for rate, loss in ((1e-4, 0.9), (1e-3, 0.5 if method != "full" else 1.5)):
            label = label_of(method, task, 1000, rate, tuning=True)
            study["tuning"].append(label)
            write(folder, label, record_of(method, 0, loss=loss))
        for seed in seeds:
            label = label_of(method, task, seed, 1e-3)
            study["cells"].append(label)
            if (method, seed) in fail:
                write(folder, label, {"kind": "study-cell", "status": "failed", "error": f"boom {task}", "log": ["x"]})
            elif (method, seed) not in leave_out:
                write(folder, label, record_of(method, seed))
    for method, quant_type in (of or {}).items():
        study["spec"]["methods"][method] = {"method": "qlora", "quant": {"quant_type": quant_type}}
    for file in (folder / "cells").iterdir() if bits else ():
        found = json.loads(file.read_text())
        if packed := bits.get(found["cell"]["method"]):
            found["model"]["quantized_parameters"] = 8000
            found["measured"]["memory"] |= {"codes_bytes": 1000 * packed - 125, "constants_bytes": 125}
            file.write_text(json.dumps(found))
    (folder / "study.json").write_text(json.dumps(study))
    if no_trace:  # the first run was killed: nothing but an error is known of it
        write(folder, study["tuning"][0], {"kind": "study-cell", "status": "failed", "error": "SIGKILL", "log": []})
    if turns:
        rates = {m: {"median": RATES[m], "min": RATES[m] - 1, "max": RATES[m] + 1} for m in methods}
        names = list(methods)
        ratios = {
            f"{b}_vs_{a}": {"median": RATES[b] / RATES[a], "min": RATES[b] / RATES[a] - 0.01, "max": RATES[b] / RATES[a] + 0.01}
            for i, a in enumerate(names) for b in names[i + 1 :]
        }  # fmt: skip
        (folder / "speed" / "turns.json").write_text(json.dumps({"status": "ok", "tokens_per_s": rates, "ratios": ratios}))
    return folder


def environment():
    return {
        "device": "a machine", "device_type": "cpu", "threads": 2, "cpu_capability": "AVX512", "kernels": "cpu",
        "kernel_isa": "avx512", "platform": "here", "python": "3.11", "versions": {"torch": "2"},
    }  # fmt: skip


def label_of(method, task, seed, rate, tuning=False):
    return {
        "model": "m", "method": method, "task": task, "kind": "classification", "seed": seed, "tuning": tuning,
        "learning_rate": rate, "digest": f"{method}-{seed}-{rate}",
    }  # fmt: skip


def write(folder, label, record):
    (folder / "cells" / f"{label['digest']}.json").write_text(json.dumps({**record, "cell": label}))


def record_of(method, seed, loss=None):
    losses = CURVES[method][seed]
    accuracy = ACCURACY[method][seed]
    memory = dict.fromkeys(
        ("weights", "codes", "constants", "adapters", "gradients", "optimizer"), 10
    )  # fmt: skip
    return {
        "kind": "study-cell", "status": "ok", "environment": environment(),
        "data": {"name": "rows", "train_rows": 5, "eval_rows": 100, "train_digest": "a", "eval_digest": "b"},
        "model": {"parameters": 1000, "trainable_parameters": 10},
        "result": {
            "losses": [2.0, 1.0], "scores_before": {"accuracy": 0.5, "label_probability": 0.5, "loss": 3.0, "perplexity": 20.0},
            "scores": {
                "accuracy": accuracy, "label_probability": 0.7, "loss": loss or losses[-1],
                "perplexity": math.exp(loss or losses[-1]),
            },
            "evaluations": [{"step": 10 * i, "loss": value, "scores": {}} for i, value in enumerate(losses)],
            "row_scores": {},
        },
        "measured": {
            "seconds": 36.0, "speed": {"tokens_per_s": 400.0, "step_s": 0.5},
            "memory": {
                "train_peak_bytes": PEAKS[method] + seed, "load_peak_bytes": 1, **{f"{k}_bytes": v for k, v in memory.items()},
            },
        },
    }  # fmt: skip


def pair(summary, a, b):
    return next(p for p in summary["groups"][0]["pairs"] if (p["a"], p["b"]) == (a, b))


def test_differences_are_paired_over_seeds(tmp_path):
    summary = analyse(made(tmp_path / "s"))
    found = pair(summary, "lora", "qlora")["scores"]["accuracy"]
    expected = theirs.ttest_rel(ACCURACY["lora"], ACCURACY["qlora"])
    low, high = expected.confidence_interval(0.95)
    assert found["mean"] == pytest.approx(statistics.fmean(ACCURACY["lora"]) - statistics.fmean(ACCURACY["qlora"]))
    assert (found["low"], found["high"], found["p"]) == pytest.approx((low, high, expected.pvalue))
    assert found["rows"] == 1


def test_differences_are_over_rows_where_these_are_scored(tmp_path):
    """An interval over seeds and rows is that of the mixed model, at the look that the study ended with."""
    folder = made(tmp_path / "s", methods=("lora", "qlora"))
    study = json.loads((folder / "study.json").read_text())
    study["spec"]["decide"] = {"looks": [2]}
    (folder / "study.json").write_text(json.dumps(study))
    rows = np.random.default_rng(0).integers(0, 2, (2, 3, 40)).astype(float)
    for file in folder.glob("cells/*.json"):
        found = json.loads(file.read_text())
        if not found["cell"]["tuning"]:
            of = rows[("lora", "qlora").index(found["cell"]["method"]), found["cell"]["seed"]]
            found["result"]["row_scores"]["accuracy"] = of.tolist()
            file.write_text(json.dumps(found))
    summary = analyse(folder)
    found = pair(summary, "lora", "qlora")
    expected = mixed.estimate(mixed.layout(rows[0] - rows[1]))
    reach = expected.reach(tails(DIFFERENT, (2, 3), 1)[-1])
    accuracy = found["scores"]["accuracy"]
    assert (accuracy["rows"], accuracy["mean"]) == (40, pytest.approx(expected.mean))
    assert (accuracy["low"], accuracy["high"]) == (pytest.approx(expected.mean - reach), pytest.approx(expected.mean + reach))
    assert found["detectable"] == pytest.approx(expected.reach(0.025) + expected.reach(0.2))
    assert found["decision"] == {"shown": None, "seeds": 3, "looked": 2}
    assert any("looks after 2 and 3 seeds" in text for text in methods(summary))


def test_convergence_is_the_ratio_of_steps_to_a_common_loss(tmp_path):
    group = analyse(made(tmp_path / "s", methods=("lora", "qlora")))["groups"][0]
    for seed in range(3):
        assert group["target_loss"][seed] == max(CURVES["lora"][seed][-1], CURVES["qlora"][seed][-1])
    lora = group["methods"][0]
    assert lora["seconds_to_target"]["mean"] == pytest.approx(lora["steps_to_target"]["mean"] * 400 * 0.5 / RATES["lora"])
    assert lora["area"]["values"][0] == pytest.approx((10 * (3.0 + 1.5) / 2 + 10 * (1.5 + 0.6) / 2) / 20)

    found, curves = pair({"groups": [group]}, "lora", "qlora")["steps_ratio"], CURVES
    loss = 1.01 * max(statistics.fmean(curve[-1] for curve in curves[name].values()) for name in ("lora", "qlora"))
    assert found["loss"] == pytest.approx(loss)

    def steps(curve):
        _, middle, last = curve
        return 10 + 10 * (middle - loss) / (middle - last) if last <= loss else None

    both = [(steps(curves["lora"][seed]), steps(curves["qlora"][seed])) for seed in range(3)]
    ratios = [math.log(a / b) for a, b in both if a and b]
    assert found["ended_before"] == [sum(not a for a, _ in both), sum(not b for _, b in both)]
    expected = mean_of_censored(ratios, [], [math.log(a / 20) for a, b in both if a and not b])
    assert (found["mean"], found["low"], found["high"]) == pytest.approx([math.exp(v) for v in expected[:3]])


def test_memory_speed_grid_and_front(tmp_path):
    summary = analyse(made(tmp_path / "s"))
    group = summary["groups"][0]
    assert pair(summary, "lora", "qlora")["memory_ratio"]["mean"] == pytest.approx(2.0, rel=1e-2)
    assert pair(summary, "lora", "qlora")["speed_ratio"] == pytest.approx(
        {"median": 100 / 80, "min": 1 / (0.8 + 0.01), "max": 1 / (0.8 - 0.01)}
    )
    assert group["pareto"] == ["full", "lora", "qlora"]  # best score, fastest, leanest
    by_name = {m["method"]: m for m in group["methods"]}
    assert [(e["learning_rate"], e["loss"]) for e in by_name["full"]["grid"]] == [(1e-4, 0.9), (1e-3, 1.5)]
    assert all(m["at_edge"] for m in by_name.values())  # a grid of two has nothing but edges
    assert group["advice"] == "qlora"  # no difference shown, least memory
    assert summary["counts"] == {
        "cells": 15,
        "finished": 15,
        "failed": 0,
        "stopped": 0,
        "missing": 0,
        "hours": pytest.approx(0.15),
    }


@pytest.mark.slow
def test_a_difference_beyond_its_interval_decides(tmp_path, monkeypatch):
    monkeypatch.setitem(ACCURACY, "qlora", [0.60, 0.61, 0.60])
    summary = analyse(made(tmp_path / "s"))
    assert summary["groups"][0]["advice"] == "lora"
    assert "qlora shown to be worse in accuracy" in summary["groups"][0]["reason"]
    claims = {c["text"]: c for c in compare_claims(summary["groups"])}
    assert next(c for t, c in claims.items() if t.startswith("SST-2"))["verdict"] == "disagrees"


def test_what_is_worse_in_a_comparison_that_was_not_planned_is_not_recommended(tmp_path, monkeypatch):
    def advised(planned):
        folder = made(tmp_path / f"{len(planned)}")
        study = json.loads((folder / "study.json").read_text())
        study["spec"]["decide"] = {"pairs": planned}
        (folder / "study.json").write_text(json.dumps(study))
        return analyse(folder)["groups"][0]

    monkeypatch.setitem(ACCURACY, "lora", [0.70, 0.80, 0.60])  # too scattered to be told from either
    monkeypatch.setitem(ACCURACY, "full", [0.80, 0.82, 0.81])
    monkeypatch.setitem(ACCURACY, "qlora", [0.60, 0.61, 0.62])
    group = advised([["full", "lora"], ["lora", "qlora"]])
    assert all(found["decision"]["shown"] is None for found in group["pairs"] if found["decision"])
    assert group["advice"] == "lora"
    assert "qlora worse by the 95% interval of a comparison that was not planned" in group["reason"]
    assert "no difference in accuracy shown to full" in group["reason"]


def test_claims_are_judged_by_intervals(tmp_path):
    claims = {c["text"]: c for c in compare_claims(analyse(made(tmp_path / "s"))["groups"])}
    speed = claims["LoRA trains 33 to 66% faster than QLoRA"]
    assert speed["verdict"] == "disagrees"  # 1.23 to 1.27
    assert speed["figures"] == ["reviews: lora / qlora 1.25 (1.23 to 1.27)"]
    assert next(c for t, c in claims.items() if t.startswith("SST-2"))["verdict"] == "agrees"  # within 0.03
    memory = claims["QLoRA reduces memory by 75%, LoRA by 70%"]
    assert memory["verdict"] == "disagrees"  # QLoRA's quarter is right, LoRA's half is not
    assert claims["LLaMA-65B, LoRA: peak 48 GB"]["basis"] == "planner: impossible"
    assert all(c["verdict"] and c["basis"] for c in claims.values())
    one_seed = {c["text"]: c for c in compare_claims(analyse(made(tmp_path / "one", seeds=(0,)))["groups"])}
    assert "could not be tested" in one_seed["QLoRA needs 20 to 30% more steps"]["verdict"]


def test_open_ends_of_a_claims_figure_are_said_and_names_left_alone():
    wanted = {"figure": "steps_ratio", "a": "qlora", "b": "lora", "low": 1.2, "high": 1.3}
    ratio = {"mean": 0.5, "low": None, "high": 0.9}
    group = {"label": "inference", "pairs": [{"a": "lora", "b": "qlora", "steps_ratio": ratio}]}
    assert _answer(wanted, group) == ("not decided", "inference: qlora / lora 2.00 (1.11 to no bound)")
    turned = {**wanted, "a": "lora", "b": "qlora"}
    assert _answer(turned, group) == ("disagrees", "inference: lora / qlora 0.50 (no bound to 0.90)")


def test_what_is_smaller_than_the_margin_decides_nothing(tmp_path, monkeypatch):
    """An interval that leaves out zero, and equivalence: better, but not by what matters."""
    monkeypatch.setitem(ACCURACY, "qlora", [0.790, 0.809, 0.778])
    summary = analyse(made(tmp_path / "s", methods=("lora", "qlora")))
    found = pair(summary, "lora", "qlora")
    assert found["scores"]["accuracy"]["low"] > 0
    assert found["equivalence"]["p"] < 0.05
    assert summary["groups"][0]["advice"] == "qlora"


def test_a_third_method_changes_no_pair(tmp_path):
    two = pair(analyse(made(tmp_path / "two", methods=("lora", "qlora"))), "lora", "qlora")
    three = pair(analyse(made(tmp_path / "three", leave_out=[("full", 1)])), "lora", "qlora")
    assert two["steps_ratio"] == three["steps_ratio"]


def test_turns_that_were_left_out_decide_nothing(tmp_path, monkeypatch):
    summary = analyse(made(tmp_path / "s", turns=False))
    group = summary["groups"][0]
    assert group["advice"] == "qlora"
    assert "least memory" in group["reason"]
    monkeypatch.setitem(PEAKS, "qlora", 1990)  # too little saved to matter, and nothing known of speed
    group = analyse(made(tmp_path / "near", turns=False))["groups"][0]
    assert (group["advice"], group["reason"].rpartition("; ")[2]) == ("qlora", "least memory among these.")


@pytest.mark.slow
def test_models_are_told_apart(tmp_path):
    folder = made(tmp_path / "s")
    study = json.loads((folder / "study.json").read_text())
    for kind in ("cells", "tuning", "speed"):
        study[kind] += [{**each, "model": "n"} for each in study[kind]]
    (folder / "study.json").write_text(json.dumps(study))
    study_page.write(folder)
    text = (folder / "report.md").read_text()
    assert "reviews on m" in text
    assert "reviews on n" in text


def edited(folder, change, which="*"):
    """Change the records of these cells in place."""
    for file in folder.glob(f"cells/{which}.json"):
        found = json.loads(file.read_text())
        if "result" in found:
            change(found)
            file.write_text(json.dumps(found))
    return folder


def test_decisions_before_the_last_seed_are_provisional(tmp_path, monkeypatch):
    """Each report of a study without looks has the whole 5%."""
    monkeypatch.setitem(ACCURACY, "qlora", [0.60, 0.61, 0.60])
    summary = study_page.write(made(tmp_path / "part", leave_out=[("full", 2)]))
    assert pair(summary, "lora", "qlora")["decision"] == {"shown": DIFFERENT, "seeds": 3, "looked": 1, "provisional": True}
    assert study_page.verdict(pair(summary, "lora", "qlora")) == "lora better (provisional)"
    assert "qlora shown to be worse in accuracy so far" in summary["groups"][0]["reason"]
    for page in ("report.md", "report.html"):
        text = (tmp_path / "part" / page).read_text()
        assert "Decisions are provisional while runs are missing" in text
        assert "lora better, provisional" in text
        assert "0 of 3 planned comparisons are decided" in text
    study_page.write(made(tmp_path / "whole", fail=[("full", 2)]))  # a failed run has ended
    assert "provisional" not in (tmp_path / "whole" / "report.html").read_text()


def test_a_study_that_was_decided_with_fewer_seeds_says_so(tmp_path):
    folder = made(tmp_path / "s")
    study = json.loads((folder / "study.json").read_text())
    for decided in ([[3]], [[2], [3]]):
        (folder / "study.json").write_text(json.dumps({**study, "decided": decided}))
        study_page.write(folder)
        for page in ("report.md", "report.html"):
            said = "This study was decided before, after 2 seeds" in (folder / page).read_text()
            assert said == (len(decided) > 1)


def test_what_cannot_be_compared_is_named_and_counted_as_planned(tmp_path):
    fail = [("qlora", seed) for seed in range(3)]
    summary = study_page.write(made(tmp_path / "s", fail=fail))
    assert summary["groups"][0]["not_compared"] == [
        {"a": name, "b": "qlora", "why": "no seed finished with both"} for name in ("full", "lora")
    ]
    text = (tmp_path / "s" / "report.md").read_text()
    assert " of 3 planned comparisons are decided" in text
    assert "not compared; no seed finished with both" in text


def test_methods_without_a_common_seed_are_not_recommended_over_one_another(tmp_path):
    apart = [("lora", 0), ("qlora", 1), ("qlora", 2)]
    summary = study_page.write(made(tmp_path / "two", methods=("lora", "qlora"), fail=apart))
    group = summary["groups"][0]
    assert (group["advice"], group["reason"]) == (None, "lora, qlora: not compared with one another.")
    assert "**No recommendation**" in (tmp_path / "two" / "report.md").read_text()
    group = analyse(made(tmp_path / "three", fail=apart))["groups"][0]  # full shares seeds with both
    assert group["advice"] == "lora"
    assert group["reason"] == "no difference in accuracy shown to full; fastest among these; not compared with qlora."


def test_runs_of_different_rows_are_not_compared(tmp_path):
    """Of an older version: fewer rows were scored, other tokens, or others that were as many."""

    def rows(n, **data):
        def change(found):
            found["result"]["row_scores"]["accuracy"] = [1.0] * n
            found["data"] |= data

        return change

    for name, change in {"fewer": rows(3), "others": rows(5, eval_digest="c")}.items():
        folder = edited(edited(made(tmp_path / name), rows(5)), change, "qlora-2-*")
        group = study_page.write(folder)["groups"][0]
        assert [(p["a"], p["b"]) for p in group["pairs"]] == [("full", "lora")]
        assert {each["why"] for each in group["not_compared"]} == {"their runs are of different rows"}
    folder = edited(made(tmp_path / "tokens"), lambda found: found["result"].update(label_tokens=7), "qlora-*")
    assert len(analyse(folder)["groups"][0]["not_compared"]) == 2


def test_a_seed_that_is_at_the_loss_before_training_is_counted(tmp_path):
    def start(found):
        found["result"]["evaluations"][0]["loss"] = 0.4

    summary = study_page.write(edited(made(tmp_path / "s"), start, "lora-1-0.001"))
    assert pair(summary, "lora", "qlora")["steps_ratio"]["at_start"] == 1
    assert "1 seed left out, at that loss before training" in (tmp_path / "s" / "report.md").read_text()
    assert pair(summary, "full", "qlora")["steps_ratio"]["at_start"] == 0


def test_a_front_without_speed_is_not_said_to_have_it(tmp_path):
    for turns, words in {True: "(quality, memory, speed)", False: "(quality, memory)"}.items():
        study_page.write(made(tmp_path / str(turns), turns=turns))
        assert f"on the Pareto front {words}" in (tmp_path / str(turns) / "report.html").read_text()


def test_losses_of_zero_are_drawn(tmp_path):
    """Their margin is a share of them."""
    folder = made(tmp_path / "s")
    study = json.loads((folder / "study.json").read_text())
    study["spec"]["tasks"] = {"reviews": {"kind": "completion", "data": {"path": "demo"}}}
    study["cells"] = [{**cell, "kind": "completion"} for cell in study["cells"]]
    (folder / "study.json").write_text(json.dumps(study))
    edited(folder, lambda found: found["result"]["scores"].update(loss=0.0, perplexity=1.0))
    edited(folder, lambda found: found["result"]["scores"].update(loss=0.5), "qlora-2-*")
    summary = study_page.write(folder)
    assert pair(summary, "lora", "qlora")["equivalence"]["margin"] == 0
    assert "-0.167 (-0.884 to +0.550)" in (folder / "report.html").read_text()


def test_what_one_comparison_would_show_is_told_by_its_look(tmp_path):
    """A p-value that one look would have called equivalence, and the first of two does not."""
    found = {
        "a": "x", "b": "y", "scores": {"loss": {"mean": 0.0, "low": -1.0, "high": 1.0}},
        "equivalence": {"metric": "loss", "margin": 2.0, "p": 0.04, "level": 0.05}, "decision": {"shown": None},
    }  # fmt: skip
    assert "(equivalence if it were the only comparison)" in study_page.verdict(found)
    folder = made(tmp_path / "s")
    study = json.loads((folder / "study.json").read_text())
    study["spec"]["decide"] = {"looks": [2]}
    (folder / "cells" / "lora-2-0.001.json").unlink()
    (folder / "study.json").write_text(json.dumps(study))
    level = pair(analyse(folder), "lora", "qlora")["equivalence"]["level"]
    assert level == pytest.approx(0.05 * (2 / 3) ** 3, rel=1e-3)
    found["equivalence"]["level"] = level
    assert "only comparison" not in study_page.verdict(found)


def test_no_study_is_said(tmp_path):
    with pytest.raises(ConfigError, match="holds no study"):
        analyse(tmp_path)


CASES = {
    "whole": {},
    "first failed": {"no_trace": True, "fail": [("full", 0)]},
    "hostile": {"task": HOSTILE},
    "cut": {"leave_out": [("lora", 1), ("qlora", 0), ("qlora", 1)], "fail": [("full", 0)], "turns": False},
    "one seed": {"seeds": (0,)},
    "nothing": {"leave_out": [(m, s) for m in CURVES for s in range(3)]},
    "one method": {"methods": ("lora",)},
    "sizes": {"bits": {"qlora": 4.5, "lora": 3.25, "full": 2.25}, "of": {"qlora": "nf4", "lora": "nf3"}},
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Each case's report, written once."""
    found = {}
    for name, options in CASES.items():
        folder = made(tmp_path_factory.mktemp("study") / "s", **options)
        found[name] = (folder, study_page.write(folder))
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_well_formed_and_its_figures_are_the_summarys(pages, case):
    folder, summary = pages[case]
    page = Page((folder / "report.html").read_text())
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    text = " ".join(page.texts)
    for group in summary["groups"]:
        for made_pair in group["pairs"]:
            test = made_pair["equivalence"]
            assert study_page.signed(made_pair["scores"][test["metric"]]) in text
        for m in group["methods"]:
            if m["scores"]:
                assert study_page.span(m["scores"]["accuracy"]) in text
    assert not [tag for tag, _ in page.elements if tag == "img"]
    for claim in summary["claims"]:
        assert claim["text"] in text
    for _, attributes in page.elements:
        assert not attributes.get("src")
        assert not (attributes.get("href") or "").startswith("http")
    if case == "cut":
        assert "boom reviews" in text
        assert "The study is not complete: 3 of its runs are missing" in text


@pytest.mark.parametrize("case", CASES)
def test_markdown_tables_have_as_many_cells_as_their_heads(pages, case):
    folder, _ = pages[case]
    columns = None
    for line in (folder / "report.md").read_text().splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        count = line.replace("\\|", "").count("|")
        columns = columns or count
        assert count == columns, line
        assert "<img" not in line


def test_the_study_file_on_the_page_makes_the_same_study(pages, tmp_path):
    folder, _ = pages["whole"]
    page = Page((folder / "report.html").read_text())
    (tmp_path / "again.toml").write_text(page.all("pre", class_="file")[0])
    again = read_study(tmp_path / "again.toml")
    assert again.model_dump(mode="json", exclude_unset=True) == json.loads((folder / "study.json").read_text())["spec"]


def test_a_page_elsewhere_links_to_the_records(pages, tmp_path):
    folder, _ = pages["whole"]
    study_page.write(folder, tmp_path / "docs" / "it")
    page = Page((tmp_path / "docs" / "it" / "report.html").read_text())
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert len(links) == 11
    files = [link for link in links if not link.startswith("#")]
    assert all((tmp_path / "docs" / "it" / unquote(link)).resolve().is_file() for link in files)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        pytest.skip("no chromium binary (Debian: apt-get install chromium)")
    with Chromium(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@pytest.mark.parametrize("case", CASES)
def test_chromium_shows_it_without_complaint(pages, case, browser):
    path = pages[case][0] / "report.html"
    for width, dark in ((1200, False), (360, True)):
        browser.open(path, width=width, dark=dark)
        assert browser.value("document.documentElement.dataset.charts") == "ready"
        assert browser.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert browser.complaints() == []
    browser.open(path, script=False)
    assert browser.value("document.querySelectorAll('.forest, .panel, .advice').length") >= 1


def test_losses_stand_at_the_sizes_of_their_bases(pages):
    """Oracle: the records' bytes. One line: two methods that differ in their codec alone."""
    folder, summary = pages["sizes"]
    assert {m["method"]: m["bits"] for m in summary["groups"][0]["methods"]} == CASES["sizes"]["bits"]
    assert {m["bits"] for m in pages["whole"][1]["groups"][0]["methods"]} == {None}
    text = (folder / "report.html").read_text()
    assert text.count('class="joined"') == 2  # after training and before it
    assert text.count("bits a weight</p>") == 2
    assert "qlora: 4.50 bits, 0.687" in text
    assert "lora: 3.25 bits, 3.000" in text
    assert 'class="joined"' not in (pages["whole"][0] / "report.html").read_text()
    assert "| reviews | qlora | 4.50 | 3.000 | 0.687 (" in (folder / "report.md").read_text()
    group = {**summary["groups"][0], "methods": summary["groups"][0]["methods"][1:]}
    assert sizes(group, json.loads((folder / "study.json").read_text())["spec"]["methods"], ["full", "lora", "qlora"]) == []


def test_of_many_methods_those_against_the_first_are_shown(tmp_path, monkeypatch):
    folder = made(tmp_path / "s")
    monkeypatch.setattr(study_page, "MAX_METHODS", 2)
    study_page.write(folder)
    page = Page((folder / "report.html").read_text())
    assert "Other pairs: 1" in page.all("summary")
    assert len(page.all("h3")) >= 3


def test_methods_switch_and_losses_are_read_out(pages, browser):
    folder, summary = pages["whole"]
    browser.open(folder / "report.html")
    browser.value("document.querySelector('input[data-method=\"1\"]').click()")
    assert browser.value("[...document.querySelectorAll('.curve.m1')].every(g => getComputedStyle(g).display == 'none')")
    assert browser.value("getComputedStyle(document.querySelector('.curve.m0')).display") != "none"
    browser.value("document.querySelector('.plot').focus()")
    for _ in range(3):
        browser("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    tip = browser.value("document.querySelector('.panel .tip').textContent")
    curve = summary["groups"][0]["methods"][2]["curve"]
    assert "step 20" in tip
    assert f"qlora: {curve['mean'][2]:.3f} ({curve['low'][2]:.3f} to {curve['high'][2]:.3f})" in tip
    assert browser.complaints() == []


def test_plots_and_tables_are_saved(pages, browser, tmp_path):
    """As a reader does it: buttons, files. The plot is well-formed and drawn without complaint on its own."""
    folder, summary = pages["whole"]
    browser.open(folder / "report.html")
    browser("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for name in ("reviews as SVG", "reviews as CSV", "Decisions as CSV", "Claims as CSV"):
        browser.value(f"document.querySelector('[aria-label=\"Save {name}\"]').click()")
    files = [tmp_path / name for name in ("reviews.svg", "reviews.csv", "decisions.csv", "claims.csv")]
    deadline = time.monotonic() + 20
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    with files[1].open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:5] == ["method", "step", "mean", "low", "high"]
    for method in summary["groups"][0]["methods"]:
        of = [[float(v or "nan") for v in row[1:]] for row in rows if row[0] == method["method"]]
        curve = method["curve"]
        assert [row[0] for row in of] == curve["steps"]
        assert [row[1] for row in of] == curve["mean"]
        assert [row[4:] for row in of] == curve["values"]
    with files[2].open(newline="") as file:
        assert next(csv.reader(file)) == ["task, score", "lora and qlora", "full and lora", "full and qlora"]
    with files[3].open(newline="") as file:
        _, *rows = csv.reader(file)
    assert [row[2] for row in rows] == ["; ".join(claim["figures"]) for claim in summary["claims"]]
    assert any(len(claim["figures"]) > 5 for claim in summary["claims"])  # the list is closed then
    text = [element.text for element in ElementTree.parse(files[0]).iter("{http://www.w3.org/2000/svg}text")]
    assert {"reviews", "full", "lora", "qlora", "optimiser steps"} <= set(text)
    browser.open(files[0])
    assert browser.value("document.querySelectorAll('.stroke').length") >= 3
    assert browser.complaints() == []


def test_what_is_open_has_a_bound_and_decisions_come_first(tmp_path, monkeypatch):
    monkeypatch.setitem(ACCURACY, "qlora", [0.60, 0.61, 0.60])
    folder = made(tmp_path / "s")
    study_page.write(folder)
    text, found = (folder / "report.md").read_text(), analyse(folder)
    first = next(line for line in text.splitlines() if line.startswith("| reviews |"))
    of = pair(found, "full", "lora")["scores"]["accuracy"]
    assert f"open; at most {max(-of['low'], of['high']):.2g} apart" in first
    assert "**lora better**; +0.2" in first
    assert "2 of 3 planned comparisons are decided" in text or "1 of 3 planned comparisons are decided" in text
