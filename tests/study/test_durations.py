"""How long cells take. Oracles: the tokens and evaluations of a real run, arithmetic on made-up times."""

import pytest

from lownibble.arch import read_shape
from lownibble.errors import DataError
from lownibble.planning.speed import flops_per_token, forward_flops_per_token
from lownibble.study import durations
from lownibble.study.durations import Durations, Kind, kind_of
from lownibble.study.power import plan_study
from lownibble.study.runner import run_study
from lownibble.study.spec import cells, read_study, tuning_cells
from lownibble.study.tasks import KINDS
from lownibble.training import run

STUDY = """
name = "timed"
seeds = [0, 1]
[models]
m = "MODEL"
[methods]
full = "full"
lora = "lora"
[tasks]
reviews = { kind = "classification", data = { path = "ROWS", max_eval_rows = 5 } }
asked = { kind = "question-answering", data = "QUESTIONS" }
[train]
max_length = 32
batch_size = 3
max_steps = 5
eval_steps = 2
[tuning]
learning_rates = [1e-3]
train = { max_steps = 2 }
"""

RATE = 1e6


@pytest.fixture
def timed(tiny_model, tiny_data, tmp_path, monkeypatch):
    """The cells of a study, on a CPU of `RATE` FLOP/s."""
    monkeypatch.setattr(durations, "flops_per_s", lambda device: RATE)
    rows = [f'{{"context": "It is {n}.", "question": "What is it?", "answer": "{n}"}}' for n in range(8)]
    for side in ("train", "test"):
        (tmp_path / "questions").mkdir(exist_ok=True)
        (tmp_path / "questions" / f"{side}.jsonl").write_text("\n".join(rows))
    text = STUDY.replace("MODEL", str(tiny_model)).replace("ROWS", str(tiny_data))
    (tmp_path / "study.toml").write_text(text.replace("QUESTIONS", str(tmp_path / "questions")))
    spec = read_study(tmp_path / "study.toml")
    return {kind_of(cell): cell for cell in (*tuning_cells(spec), *cells(spec))}


@pytest.mark.parametrize("tuning", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_estimate_counts_what_a_run_computes(timed, method, tuning):
    kind = Kind("m", "reviews", method, tuning)
    ran = run(timed[kind].config).record
    tokens = sum(step["padded_tokens"] for step in ran["steps"])
    steps, evaluations = len(ran["steps"]), len(ran["evaluations"])
    assert (steps, evaluations) == ((2, 2) if tuning else (5, 4))
    length = round(sum(step["tokens"] for step in ran["steps"]) / steps / 3)
    shape, train = read_shape(timed[kind].config.model), timed[kind].config.train.with_options(max_length=length)
    evaluated = evaluations * sum(len(row.input_ids) for row in Durations([])._encoded(timed[kind])[1])
    work = tokens * flops_per_token(shape, method, 0, train) + evaluated * forward_flops_per_token(shape, 0, length)
    found = Durations([*timed.values()]).seconds(kind) - durations.START_S
    assert found == pytest.approx(work / RATE / durations.SHARE["cpu"], rel=1e-3)  # short batches at the end of an epoch


def test_answers_take_their_time_in_compared_cells_alone(timed, monkeypatch):
    def difference(tuning):
        kind = Kind("m", "asked", "lora", tuning)
        long = Durations([*timed.values()]).seconds(kind)
        with monkeypatch.context() as patch:
            patch.setitem(KINDS, "question-answering", KINDS["question-answering"]._replace(max_new_tokens=0))
            return long - Durations([*timed.values()]).seconds(kind)

    assert difference(tuning=True) == 0
    assert difference(tuning=False) > 0


def test_finished_cells_count_and_correct_the_estimates_of_others(timed):
    of = Durations([*timed.values()])
    before = {kind: of.seconds(kind) for kind in timed}
    assert all(map(of.is_estimated, timed))
    first, *others = timed
    for seconds in (1.0, 2.0):
        of.learn(first, seconds * before[first])
    assert of.seconds(first) == pytest.approx(1.5 * before[first])
    for kind in others:
        assert of.seconds(kind) == pytest.approx(1.5 * before[kind])
    assert not any(map(of.is_estimated, timed))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_without_estimates_the_most_similar_cells_count(timed, monkeypatch, elsewhere):
    monkeypatch.setattr(durations, "is_known", lambda contents: elsewhere)
    of = Durations([*timed.values()], here=not elsewhere)
    wanted = Kind("m", "asked", "lora", False)
    assert of.seconds(wanted) is None
    for kind, seconds in (
        (Kind("m", "asked", "lora", True), 9.0), (Kind("m", "reviews", "full", False), 8.0),
        (Kind("m", "asked", "full", False), 7.0), (Kind("another", "asked", "lora", False), 6.0), (wanted, 5.0),
    ):  # fmt: skip
        of.learn(kind, seconds)
        assert of.seconds(wanted) == seconds
    assert not of.is_estimated(wanted)


def test_a_gpu_that_is_not_in_the_table_has_no_estimate(timed, monkeypatch):
    of = Durations([*timed.values()])
    of.__dict__["_device"] = ("cuda", None)
    assert of.seconds(next(iter(timed))) is None
    of.__dict__["_device"], of._estimates = ("cuda", 1e30), {}
    assert of.seconds(Kind("m", "reviews", "lora", False)) == durations.START_S + 5 * 2 * durations.STEP_S_OF_LAYER["cuda"]


def test_rows_that_cannot_be_encoded_are_told_before_anything_runs(timed, tmp_path):
    study, output = tmp_path / "study.toml", tmp_path / "output"
    study.write_text(study.read_text().replace('/questions"', '/questions", overlength = "error" }').replace(
        '"question-answering", data = ', '"question-answering", train = { max_length = 8 }, data = { path = '
    ))  # fmt: skip
    for act in (plan_study, run_study):
        with pytest.raises(DataError, match="it has 14 tokens, and max_length is 8"):
            act(study, output)
    assert not list(output.rglob("*.json"))
