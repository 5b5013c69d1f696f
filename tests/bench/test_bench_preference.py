"""`bench preference`. Oracles: arithmetic by hand; of TRL's contender, the losses of ours."""

import io
import json
import sys
from pathlib import Path

import pytest

from lownibble.bench import preference, trl_preference
from lownibble.bench.processes import Measured
from lownibble.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lownibble.measuring import turns


def test_figures_and_what_each_contender_is_given(monkeypatch):
    given = {}

    def stand_ins(commands, repeats, steps):
        assert (repeats, steps) == (2, 1)
        (path,) = {command.arguments[0] for command in commands.values()}  # one specification for all
        spec = RunConfig(**json.loads(Path(path).read_text()))
        lines = [json.loads(line) for line in Path(spec.data.path, "train.jsonl").read_text().splitlines()]
        given[spec.train.objective, spec.method] = (
            spec,
            lines,
            {name: command.arguments[1:] for name, command in commands.items()},
        )
        seconds = {"ours": (9, 0.5, 1), "trl": (9, 2, 2), "trl_precomputed": (9, 1, 4)}
        answers = {
            name: [{"seconds": s, "losses": [s], "peak_bytes": 10 * s} for s in seconds[name]]
            for name in commands if (spec.train.objective, name) != ("kto", "trl")
        }  # fmt: skip
        return Measured({}, answers, {"trl": "no TRL"} if spec.train.objective == "kto" else {})

    monkeypatch.setattr(preference, "in_turns", stand_ins)
    record = preference.bench_preference(peers=True, repeats=2)
    found = record["objectives"]["dpo lora"]
    assert found["rows_per_s"]["ours"] == {"median": 3, "min": 2, "max": 4}
    assert found["ratios"]["trl"] == {"median": 3, "min": 2, "max": 4}
    assert found["ratios"]["trl_precomputed"] == {"median": 3, "min": 2, "max": 4}
    assert (found["peak_bytes"]["trl"], found["first_losses"]["trl"]) == (90, 9)
    assert record["failed"] == {"kto lora, trl": "no TRL", "kto qlora, trl": "no TRL"}
    assert record["headlines"]["orpo qlora: ours / trl (rows/s)"] == 3
    assert len(given) == 6
    for (objective, _), (spec, lines, commands) in given.items():
        assert commands["trl"] == ()
        assert commands.get("trl_precomputed") == (None if objective == "orpo" else ("precomputed",))
        assert spec.train.torch_compile is True, "as a run of some length"
        assert len({json.dumps(line) for line in lines}) == len(lines) >= spec.train.batch_size * spec.train.max_steps


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("objective", preference.OBJECTIVES)
def test_trl_takes_the_same_rows(objective, tiny_model, tmp_path, monkeypatch, capsys):
    """Losses of two steps; a contender's adapter begins without effect, and the rate is too small to matter."""
    pytest.importorskip("trl")
    words = ("film", "plot", "actor", "scene", "good", "very")
    pairs = [{"prompt": f"the {word} was" + " very" * n, "chosen": " good" * (n + 1), "rejected": f" bad {word}"}
             for n, word in enumerate(words)]  # fmt: skip
    if objective == "kto":
        pairs = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in pairs for name in ("chosen", "rejected")
        ]  # fmt: skip
    for side in ("train", "test"):
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    train = TrainConfig(
        objective=objective, batch_size=2, max_length=64, max_steps=2, learning_rate=1e-9, torch_compile=False,
    )  # fmt: skip
    config = RunConfig(
        model=str(tiny_model), method="lora", data=DataConfig(path=str(tmp_path)), lora=LoraConfig(r=2), train=train
    )
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(config.to_dict()))
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n1\n"))
    turns.main(str(spec))
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
    answers = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n1\n"))
    with pytest.raises(SystemExit):
        trl_preference.main(str(spec), answers, precomputed=objective != "orpo")
    theirs = [json.loads(line) for line in answers.getvalue().splitlines()][1:]
    assert [each["losses"] for each in theirs] == [pytest.approx(each["losses"], abs=1e-5) for each in told]
    assert all(each["seconds"] > 0 for each in theirs)
