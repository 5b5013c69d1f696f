"""Contenders in processes, with made-up programs. Oracle: what those programs answer, and whether they are still there."""

import json
import sys

import pytest

from lownibble.bench import processes
from lownibble.bench.processes import Command, in_turns, one_after_another
from lownibble.errors import TrainingError

PROGRAM = """
import json, os, pathlib, signal, sys
mode, folder = sys.argv[1], pathlib.Path(sys.argv[2])
others = [path.name for path in folder.iterdir()]
(folder / mode).touch()
if mode == "dies":
    sys.exit(3)
if mode == "tells":
    print(json.dumps({"error": "OutOfMemoryError: too large"}), flush=True)
    sys.exit(1)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "hangs":
    signal.pause()
print(json.dumps({"others": others}), flush=True)
if mode == "gone":
    os.kill(os.getpid(), signal.SIGKILL)
for turn, line in enumerate(sys.stdin):
    if mode == "breaks":
        sys.exit(4)
    if mode == "halfway" and turn:
        print('{"mode": "half', end="", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    loss = {"losses": [float("nan")]} if mode == "nan" and turn else {}
    print(json.dumps({"mode": mode, "steps": int(line), **loss}), flush=True)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "made_up.py").write_text(PROGRAM)
    (tmp_path / "seen").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda mode, may_fail=False: Command("made_up", (mode, str(tmp_path / "seen")), may_fail)


def test_one_that_fails_alone_is_recorded_with_its_error_and_the_rest_go_on(command):
    saved = []
    commands = {name: command(name) for name in ("first", "dies", "tells", "breaks", "last")}
    found = one_after_another(commands, 2, 5, lambda so_far: saved.append(json.loads(json.dumps(so_far))))
    assert found.answers == {name: [{"mode": name, "steps": 5}] * 3 for name in ("first", "last")}
    assert sorted(found.facts["last"]["others"]) == ["breaks", "dies", "first", "tells"], "they had run before"
    assert found.failed["dies"].startswith("The process 'dies' ended with exit code 3")
    assert found.failed["tells"] == "'tells' failed: OutOfMemoryError: too large"
    assert found.failed["breaks"].startswith("The process 'breaks' ended with exit code 4")
    assert [len(answers) + len(failed) for _, answers, failed in saved] == [1, 2, 3, 4, 5]


def test_one_whose_loss_is_not_finite_or_that_hangs_is_left_out(command, monkeypatch):
    """A record of the first could not be written as JSON; the second would use up all the time there is."""
    commands, saved = {name: command(name, may_fail=True) for name in ("nan", "hangs", "last")}, []
    with monkeypatch.context() as patched:
        patched.setattr(processes, "ANSWER_S", 3.0)
        found = one_after_another(commands, 2, 5, lambda so_far: saved.append(json.dumps(so_far, allow_nan=False)))
    assert (list(found.answers), list(found.facts), len(saved)) == (["last"], ["last"], 3)
    assert found.failed["nan"].startswith("'nan' gave no answer that can be used (a value is NaN): {")
    assert found.failed["hangs"] == "'hangs' gave no answer within 3 s."
    del commands["hangs"]
    assert in_turns(commands, 2, 5).failed.keys() == {"nan"}


def test_by_turns_a_peer_may_fail_and_others_may_not(command):
    found = in_turns({"a": command("a"), "tells": command("tells", may_fail=True), "b": command("b")}, 1, 3)
    assert found.answers.keys() == found.facts.keys() == {"a", "b"}
    assert found.failed.keys() == {"tells"}
    with pytest.raises(TrainingError, match="too large"):
        in_turns({"a": command("a"), "tells": command("tells")}, 1, 3)


KILLED = "was ended by the signal SIGKILL, as the system does where memory runs out. Its messages are above."


def test_peers_that_are_killed_are_recorded_with_the_reason_and_the_rest_go_on(command):
    """While they are set up, between turns and in one."""
    modes = ("a", "killed", "gone", "halfway", "breaks", "b")
    found = in_turns({mode: command(mode, may_fail=len(mode) > 1) for mode in modes}, 2, 3)
    assert found.answers == {mode: [{"mode": mode, "steps": 3}] * 3 for mode in ("a", "b")}
    assert found.facts.keys() == found.answers.keys()
    assert found.failed == {
        **{mode: f"The process '{mode}' {KILLED}" for mode in ("killed", "gone", "halfway")},
        "breaks": "The process 'breaks' ended with exit code 4. Its messages are above.",
    }
    for mode in ("killed", "gone", "halfway"):
        with pytest.raises(TrainingError, match="SIGKILL"):
            in_turns({"a": command("a"), mode: command(mode)}, 1, 3)


@pytest.mark.slow
def test_what_a_library_prints_is_no_answer(tmp_path, forked, monkeypatch, capfd):
    (tmp_path / "chatty.py").write_text(
        "import os, sys\n"
        "from lownibble.measuring.turns import answer_turns, reserved_stdout\n"
        "with reserved_stdout() as out:\n"
        "    print('hello'); os.write(1, b'from C')\n"
        "    if sys.argv[1] == 'fails': raise ValueError('no')\n"
        "    answer_turns({}, lambda steps: {'steps': steps}, out)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    found = one_after_another(
        {"works": Command("chatty", ("works",)), "fails": Command("chatty", ("fails",))}, 1, 2, lambda so_far: None
    )
    assert found.answers == {"works": [{"steps": 2}] * 2}
    assert found.failed == {"fails": "'fails' failed: ValueError: no"}
    assert "from C" in capfd.readouterr().err
