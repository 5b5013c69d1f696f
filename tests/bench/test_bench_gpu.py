"""`lownibble bench gpu` with made-up parts. Oracle: what they wrote, and whether their processes are gone."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from shapes import write_shape

from lownibble.bench import gpu, processes
from lownibble.bench.gpu import Part, run_parts
from lownibble.cli.main import _parser, main


def _part(tmp_path, name, code, share=0.1):
    output = tmp_path / f"{name}-cuda.json"
    written = f"import json, os, subprocess, sys, time\nfrom pathlib import Path\noutput = Path({str(output)!r})\n{code}"
    return Part(name, [sys.executable, "-c", written], output, share)


def _run(parts, seconds):
    return run_parts(parts, time.monotonic() + seconds, seconds)


def _is_there(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WRITES = "output.write_text('{}')"
SLOW = (
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "output.write_text(json.dumps([os.getpid(), child.pid]))\n"
    "time.sleep(600)"
)


def test_parts_that_fail_or_write_nothing_do_not_stop_the_rest(tmp_path):
    (tmp_path / "old-cuda.json").write_text("{}")
    parts = [
        _part(tmp_path, "works", WRITES),
        _part(tmp_path, "fails", WRITES + "\nprint(json.dumps({'error': 'no room'}))\nsys.exit(1)"),
        _part(tmp_path, "dies", "print('{'); sys.exit(3)"),
        _part(tmp_path, "old", "pass"),
    ]
    found = _run(parts, 60)
    assert {name: each["status"] for name, each in found.items()} == {
        "works": "ok", "fails": "failed", "dies": "failed", "old": "ok",
    }  # fmt: skip
    assert found["fails"]["error"] == "no room"
    assert found["dies"]["error"] == "It ended with exit code 3. Its messages are above."
    assert found["works"]["record"] == str(tmp_path / "works-cuda.json")
    assert found["fails"]["record"], "what it had measured is kept"
    assert found["old"]["record"] is None, "the record of another day is not this part's"


@pytest.mark.slow
def test_a_part_out_of_time_is_ended_with_all_that_it_started_and_keeps_its_record(tmp_path):
    began = time.monotonic()
    found = _run([_part(tmp_path, "slow", SLOW), _part(tmp_path, "next", WRITES, share=0.6)], 14)
    assert time.monotonic() - began < 14
    assert (found["slow"]["status"], found["next"]["status"]) == ("out of time", "ok")
    assert found["slow"]["record"]
    deadline = time.monotonic() + 10
    numbers = json.loads((tmp_path / "slow-cuda.json").read_text())
    while any(map(_is_there, numbers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_there, numbers))


@pytest.mark.slow
def test_one_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLOW
    assert _run([_part(tmp_path, "deaf", deaf)], 6)["deaf"]["status"] == "out of time"
    assert not _is_there(json.loads((tmp_path / "deaf-cuda.json").read_text())[0])


def test_a_part_without_time_is_not_begun(tmp_path):
    assert _run([_part(tmp_path, "late", WRITES)], 1) == {"late": {"status": "not begun", "seconds": 0.0, "record": None}}
    assert not (tmp_path / "late-cuda.json").exists()


def test_shares_are_kept_for_later_parts_and_passed_on(tmp_path, monkeypatch):
    given = {}

    def run(part, seconds):
        given[part.name] = seconds
        return {"status": "ok", "seconds": 0.0, "record": None}

    monkeypatch.setattr(gpu, "_run", run)
    _run([_part(tmp_path, name, "", share) for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1))], 100)
    assert given == pytest.approx({"a": 60, "b": 90, "c": 100}, abs=1), "nothing was used: it goes to those after it"


def test_without_a_gpu_it_is_one_error(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "subject", lambda model: pytest.fail("nothing should be made"))
    monkeypatch.setattr(gpu, "run_parts", lambda *_: pytest.fail("nothing should run"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["bench", "gpu"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: 'bench gpu' measures a CUDA device, and torch sees none.")


def test_its_parts_are_commands_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    parts = gpu.parts_of("model", tmp_path, ["--batch-size", "4", "--max-length", "1024"], ["--peers", "--repeats", "3"])
    assert [part.name for part in parts] == ["train", "kernels", "plan", "decode", "gpu-tests"]
    assert sum(part.share for part in parts) == pytest.approx(1)
    for part in (first := gpu.contact_part(tmp_path, 480), *parts[:-1]):
        arguments = _parser().parse_args(part.command[3:])
        assert (arguments.command, arguments.what, arguments.output) == ("bench", part.name, str(part.output))
    assert _parser().parse_args(first.command[3:]).time_limit == 90
    assert _parser().parse_args(gpu.contact_part(tmp_path, 60).command[3:]).time_limit == 15, "a part of a short time"
    monkeypatch.chdir(tmp_path)
    assert [part.name for part in gpu.parts_of("model", tmp_path, [], [])][-1] == "decode", "no tests here"


def test_the_command_tells_what_became_of_each_part(tmp_path, monkeypatch, capsys):
    made = {}

    def parts_of(model, folder, work, asked):
        made.update(model=Path(model), work=work, asked=asked, there=Path(model, "model.safetensors").exists())
        return [_part(tmp_path, "works", WRITES), _part(tmp_path, "fails", "sys.exit(2)")]

    fails = WRITES + "\nprint(json.dumps({'error': '1 of 3 checks failed: step'})); sys.exit(1)"
    monkeypatch.setattr(gpu, "contact_part", lambda folder, limit: _part(tmp_path, "contact", fails))
    monkeypatch.setattr(gpu, "pick_device", lambda: type("Device", (), {"type": "cuda"}))
    monkeypatch.setattr(gpu.record, "environment", lambda device: {"device": "a card"})
    monkeypatch.setattr(gpu, "parts_of", parts_of)
    shape = write_shape(tmp_path)
    arguments = [
        "--model",
        shape,
        "--batch-size",
        "2",
        "--max-length",
        "64",
        "--time-limit",
        "60",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["bench", "gpu", *arguments, "--peers", "--json"]) == 1, "a part failed"
    told = json.loads(capsys.readouterr().out)
    assert made["there"]
    assert not made["model"].exists(), "the weights are gone"
    assert (made["work"], made["asked"]) == (["--batch-size", "2", "--max-length", "64"], ["--peers"])
    parts = {name: each["status"] for name, each in told["parts"].items()}
    assert parts == {"contact": "failed", "works": "ok", "fails": "failed"}, "what failed first does not end the rest"
    assert told["parts"]["contact"]["error"] == "1 of 3 checks failed: step"
    kept = json.loads((tmp_path / "out" / "parts-cuda.json").read_text())
    assert (kept["kind"], kept["parts"]) == ("bench-gpu", told["parts"])
    assert told["workload"] == {"model": shape, "random_weights": True, "time_limit_s": 60, "peers": True}


def test_outcomes_of_tests_are_read_as_they_come():
    lines = [
        "collected 3 items\n",
        "tests/kernels/test_triton.py::test_a[a b-cuda] PASSED                                      [ 33%]\n",
        "tests/kernels/test_triton.py::test_b FAILED                                                [ 66%]\n",
        "tests/kernels/test_triton.py::test_b[nf4, long rows] FAILED                                [ 67%]\n",
        "tests/lora/test_dora.py::test_c SKIPPED (no CUDA device)                                   [100%]\n",
        "FAILED tests/kernels/test_triton.py::test_b - AssertionError\n",
    ]
    assert gpu._outcomes(lines) == {
        "tests": {"passed": 1, "failed": 2, "skipped": 1},
        "failed": ["tests/kernels/test_triton.py::test_b", "tests/kernels/test_triton.py::test_b[nf4, long rows]"],
    }  # fmt: skip


@pytest.mark.slow
def test_tests_are_recorded_even_if_they_end_early(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_made_up.py").write_text(
        "import os, pytest\npytestmark = pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): os._exit(9)\n"
    )
    (tmp_path / "tests" / "test_of_others.py").write_text("import a_library_that_is_not_there\ndef test_d(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.chdir(tmp_path)
    assert gpu.run_tests(str(tmp_path / "record.json")) == 9
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["status"], record["tests"]) == ("failed", {"passed": 1, "failed": 1})
    assert os.path.basename(record["failed"][0]) == "test_made_up.py::test_b"  # noqa: PTH119 - a test's name, not a path
