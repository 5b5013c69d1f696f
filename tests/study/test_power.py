"""Plans of studies. Oracles: the closed form of a t-test's power, simulated studies, arithmetic on made-up records."""

import json

import numpy as np
import pytest
from scipy import integrate, stats
from test_study_report import CURVES, made

from lownibble.errors import ConfigError
from lownibble.measuring import mixed
from lownibble.study import durations, jobs, power
from lownibble.study.decide import EQUIVALENT, is_shown, tails
from lownibble.study.runner import run_study

STUDY = """
name = "planned"
seeds = [0, 1, 2]
[models]
m = "MODEL"
[methods]
lora = "lora"
qlora = "qlora"
[tasks]
reviews = { kind = "classification", data = "ROWS" }
[decide]
"""


def test_power_without_rows_is_that_of_two_one_sided_t_tests():
    sd, margin, seeds = 0.02, 0.03, 6
    error, at = sd / seeds**0.5, stats.t.isf(0.05, seeds - 1)

    def shown(s):  # given the standard deviation s of chi's distribution
        room = margin - at * sd * s / seeds**0.5
        return (
            max(0.0, 2 * stats.norm.cdf(room / error) - 1) * stats.chi.pdf(s * (seeds - 1) ** 0.5, seeds - 1) * (seeds - 1) ** 0.5
        )

    closed, _ = integrate.quad(shown, 0, 5)
    found, until = power.expected(mixed.Variances(sd**2, 0.0, 0.0), (seeds,), 1, margin, 1, studies=20000)
    assert found == pytest.approx(closed, abs=0.012)
    assert until == seeds


def test_looks_save_seeds_and_little_power_and_comparisons_cost_some():
    of = mixed.Variances(0.01**2, 0.05**2, 0.05)
    once, _ = power.expected(of, (12,), 400, 0.03, 1)
    looked, until = power.expected(of, (4, 8, 12), 400, 0.03, 1)
    assert once - 0.05 < looked <= once + 0.02
    assert until < 11
    assert power.expected(of, (12,), 400, 0.03, 12)[0] < once
    shows = power.detectable(of, 12, 400, 0.025)
    drawn = mixed.estimate(mixed.draw(of, 12, 400, 4000, np.random.default_rng(5), shows))
    assert np.mean(drawn.mean > drawn.reach(0.025)) == pytest.approx(0.8, abs=0.03)


def test_looks_that_are_not_reached_keep_their_share_of_the_error():
    """Time for six seeds of eight. Oracle: the study that such time allows, decided by the tails of all its looks."""
    of, looks, margin = mixed.Variances(0.01**2, 0.0, 0.0), (4, 8), 0.015
    drawn = mixed.estimate(mixed.draw(of, 4, 1, 4000, np.random.default_rng(1)))
    shown = np.mean(is_shown(EQUIVALENT, drawn, margin, tails(EQUIVALENT, looks, 1)[0]))
    found, until = power.expected(of, looks, 1, margin, 1, seeds=6)
    assert found == pytest.approx(shown, abs=0.04)
    assert until == pytest.approx(6 - 2 * found)
    assert found < power.expected(of, (4, 6), 1, margin, 1)[0] - 0.1
    assert power.expected(of, looks, 1, margin, 1, seeds=3) == (0.0, 3.0)


def test_a_pilots_margins_are_its_own(tmp_path):
    """Of a loss the margin is a share of it, whatever the pilot took."""
    made(tmp_path / "pilot", methods=("lora", "qlora"))
    file = tmp_path / "pilot" / "study.json"
    study = json.loads(file.read_text())
    study["spec"]["tasks"]["reviews"] |= {"kind": "completion", "margin": 0.5}
    study["cells"] = [{**cell, "kind": "completion"} for cell in study["cells"]]
    file.write_text(json.dumps(study))
    [found] = power._Earlier(tmp_path / "pilot").comparisons
    assert found.margin == pytest.approx(0.01 * (CURVES["lora"][0][-1] + CURVES["qlora"][0][-1]) / 2)


@pytest.fixture
def planned(tiny_model, tiny_data, tmp_path):
    """Write a study file with these lines in [decide]."""
    made(tmp_path / "pilot", methods=("lora", "qlora"))

    def write(decide):
        (tmp_path / "study.toml").write_text(STUDY.replace("MODEL", str(tiny_model)).replace("ROWS", str(tiny_data)) + decide)
        return tmp_path / "study.toml"

    return write


def test_a_plan_says_cells_hours_and_power_from_a_pilot(planned, tmp_path):
    plan = power.plan_study(planned('pilot = "pilot"\nhours = 0.045'), tmp_path / "out")
    assert (plan["cells"], plan["left"], plan["started"]) == (6, 6, False)
    assert plan["hours"] == pytest.approx(6 * 36 / 3600)
    assert plan["seeds_in_time"] == 2  # 2 x 2 x 36 s are 0.04 h
    [task] = plan["tasks"]
    assert (task["seeds"], task["margin"], task["source"]) == (2, 0.02, "records of these comparisons: 1 x 3 seeds")
    assert task["variances"]["seed"] == pytest.approx(np.var([0.01, 0.0, 0.01], ddof=1))
    assert plan["told"][0].startswith("In 0.045 hours 2 of 3 seeds end")
    [first] = power.plan_study(planned('pilot = "pilot"\nhours = 0.045\nlooks = [2]'), tmp_path / "out")["tasks"]
    assert first["power"] < task["power"]  # the look at two seeds has a part of the error
    assert first["detectable"] > task["detectable"]
    assert power.plan_study(planned("hours = 1e-6"), tmp_path / "out")["tasks"][0]["power"] == 0
    own = power.plan_study(planned(""), tmp_path / "pilot")
    assert (own["left"], own["hours"]) == (0, 0)


def test_a_plan_without_records_says_what_it_assumes(planned, tmp_path, monkeypatch):
    plan = power.plan_study(planned("hours = 1"), tmp_path / "out")
    assert (plan["hours_estimated"], plan["seeds_in_time"], plan["tasks"][0]["source"]) == (True, 3, "assumed")
    assert plan["hours"] == pytest.approx(6 * durations.START_S / 3600, rel=0.05)  # the model is tiny
    assert mixed.Variances(**plan["tasks"][0]["variances"]) == power.ASSUMED
    assert not any("Nothing is known" in text for text in plan["told"])
    assert power.plan_study(planned("hours = 0.01"), tmp_path / "out")["seeds_in_time"] == 2
    monkeypatch.setattr(durations, "is_known", lambda contents: False)  # a family that the planner has not written down
    plan = power.plan_study(planned("hours = 1"), tmp_path / "out")
    assert (plan["hours"], plan["hours_estimated"]) == (None, False)
    assert any("Nothing is known of how long" in text for text in plan["told"])


def test_a_plan_counts_what_has_run_with_these_options(planned, tmp_path, monkeypatch):
    """Runs stand in for themselves; the study goes on by digests, which the plan does not have."""
    text = "looks = []\n[tuning]\nlearning_rates = [1e-4, 1e-3]\n[train]\nmax_steps = 2"
    file = planned(text)
    random = np.random.default_rng(0)
    measured = {"memory": {"train_peak_bytes": 1, "load_peak_bytes": 1}, "seconds": 2.0, "speed": {"tokens_per_s": 1.0}}

    def stand_in(job):
        rows = random.integers(0, 2, 20).astype(float).tolist()
        scores = {"loss": random.random(), "accuracy": float(np.mean(rows))}
        result = {"scores": scores, "row_scores": {"accuracy": rows}, "evaluations": [{"step": 0, "loss": 1.0, "scores": {}}]}
        return {"status": "ok", "result": result, "measured": measured}

    monkeypatch.setitem(jobs.JOBS, "cell", stand_in)
    monkeypatch.setitem(jobs.JOBS, "speed", lambda job: {"status": "ok", "skipped": "left out by the test"})
    run_study(file, tmp_path / "out")
    for changed, left in {"": 0, "max_steps = 3": 10, "max_steps = 2\neval_steps = 1": 10}.items():
        planned(text.replace("max_steps = 2", changed or "max_steps = 2"))
        assert power.plan_study(file, tmp_path / "out")["left"] == left
    file.write_text(file.read_text().replace("kind = ", "train = { max_length = 64 }, kind = "))
    assert power.plan_study(file, tmp_path / "out")["left"] == 10


def test_a_plan_counts_bases_that_were_packed_otherwise(planned, tmp_path, monkeypatch):
    text = planned("looks = []").read_text().replace('= "qlora"', '= { method = "qlora", quantize = { rounding = "gptq" } }')
    (tmp_path / "study.toml").write_text(text)
    scores = {"loss": 1.0, "accuracy": 0.5}
    measured = {"memory": {"train_peak_bytes": 1, "load_peak_bytes": 1}, "seconds": 2.0, "speed": {"tokens_per_s": 1.0}}
    result = {"scores": scores, "row_scores": {}, "evaluations": []}
    monkeypatch.setitem(jobs.JOBS, "base", lambda job: {"status": "ok"})
    monkeypatch.setitem(jobs.JOBS, "cell", lambda job: {"status": "ok", "result": result, "measured": measured})
    monkeypatch.setitem(jobs.JOBS, "speed", lambda job: {"status": "ok", "skipped": "left out by the test"})
    run_study(tmp_path / "study.toml", tmp_path / "out")
    for options, left in {'"gptq"': 0, '"gptq", calibration_tokens = 512': 3}.items():
        (tmp_path / "study.toml").write_text(text.replace('"gptq"', options))
        plan = power.plan_study(tmp_path / "study.toml", tmp_path / "out")
        assert (plan["left"], plan["tasks"][0]["detectable"]) == (left, None)  # all seeds alike


def test_a_number_of_jobs_that_is_none_is_refused(planned, tmp_path):
    with pytest.raises(ConfigError, match=r"must be an integer >= 1. Got 0"):
        power.plan_study(planned(""), tmp_path / "out", jobs=0)


def test_a_study_that_cannot_reach_its_power_is_refused_before_it_starts(planned, tmp_path):
    words = r"2 of 3 seeds end(.|\n)*power is \d+% and should be 90%(.|\n)*3 seeds x \d+ rows(.|\n)*Nothing was run"
    with pytest.raises(ConfigError, match=words):
        run_study(planned('pilot = "pilot"\npower = 0.9\nhours = 0.045'), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="holds no study"):
        power.plan_study(planned('pilot = "nothing"'), tmp_path / "out")


def test_options_of_decide_are_checked(planned):
    for line, words in {"looks = [3]": "below the 3 seeds", 'pairs = [["lora", "full"]]': "two of the methods"}.items():
        with pytest.raises(ConfigError, match=words):
            power.plan_study(planned(line), "nowhere")


def test_the_record_is_json(planned, tmp_path):
    assert json.loads(json.dumps(power.plan_study(planned('pilot = "pilot"'), tmp_path / "out")))["kind"] == "study-plan"
