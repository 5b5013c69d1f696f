"""`lownibble bench contact`. Oracles: checks run as a stand-in, and fail on kernels with a fault; made-up processes for what
becomes of checks that hang, or end their process or its CUDA context."""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from triton_interpreter import INTERPRETED

from lownibble.bench import contact
from lownibble.bench.contact_kernels import Contact, SkippedError, WrongError
from lownibble.cli.main import main
from lownibble.errors import OutputError
from lownibble.kernels import ops, proven
from lownibble.lora import joined

NOT_ON_A_CPU = {"product-fp8", "offload", "graphs", "budget"}
WORKER = (
    "import json, os, sys, time\n"
    "print(json.dumps({}), flush=True)\n"
    "for name in map(str.strip, sys.stdin):\n"
    "    if name == 'hangs': time.sleep(600)\n"
    "    if name == 'dies': print('Segmentation fault, surely', file=sys.stderr); os._exit(3)\n"
    "    told = {'status': 'passed', 'seconds': 0.0, 'difference': 0.0, 'pid': os.getpid(), 'lost': name == 'loses'}\n"
    "    print(json.dumps(told), flush=True)\n"
)


def run(names, code=WORKER, seconds=60, tell=lambda *_: None):
    command = [sys.executable, "-c", code]
    return contact.run_all(names, command, os.environ, time.monotonic() + seconds, tell, processes=1)


@pytest.fixture
def at(tmp_path):
    return Contact(torch.device("cpu"), tmp_path)


def test_what_hangs_or_dies_or_loses_the_device_does_not_hide_the_rest(monkeypatch):
    monkeypatch.setattr(contact, "CHECK_S", 1.0)
    told = []
    found = run(["a", "hangs", "b", "dies", "loses", "c", "d"], tell=lambda outcomes, name: told.append((name, len(outcomes))))
    assert {name: each["status"] for name, each in found.items()} == {
        **dict.fromkeys(["a", "b", "loses", "c", "d"], "passed"), "hangs": "failed", "dies": "failed",
    }  # fmt: skip
    assert found["hangs"]["error"] == "It gave no answer within 1 s."
    assert found["dies"]["error"].startswith("The process ended with exit code 3")
    assert found["dies"]["error"].endswith("Segmentation fault, surely")
    assert len({found[name]["pid"] for name in ("a", "b", "loses", "c")}) == 4, "a new process each time"
    assert found["c"]["pid"] == found["d"]["pid"]
    assert told == [(name, number + 1) for number, name in enumerate(found)]


def test_checks_without_time_are_skipped(monkeypatch):
    found = run(["a", "hangs", "b"], seconds=3)
    assert [found[name]["status"] for name in ("a", "hangs", "b")] == ["passed", "skipped", "skipped"]
    assert found["hangs"]["reason"] == found["b"]["reason"] == "the time was up"


def test_where_no_process_starts_all_checks_have_failed():
    found = run(["a", "b"], "raise ImportError('no torch here')")
    assert {each["status"] for each in found.values()} == {"failed"}
    assert found["b"]["error"].endswith("ImportError: no torch here")


def test_if_nothing_was_checked_it_has_failed(monkeypatch):
    found = contact.bench_contact(stand_in=True, only="step", time_limit=0.1)
    assert found["status"] == "failed"
    assert found["error"] == "none of 1 checks passed; they were skipped: the time was up"


def test_a_record_that_cannot_be_written_is_an_error():
    def tell(*_):
        raise OutputError("no room")

    with pytest.raises(OutputError, match="no room"):
        run(["a", "b"], tell=tell)


def test_one_check_that_fails_is_told_with_where_and_by_how_much(at, monkeypatch):
    def wrong(at):
        at.near("y", torch.ones(2), torch.tensor([1.0, 2.0]), 0.1)

    def replaced(at):
        proven.refused["one_row"] = "it failed"

    def absent(at):
        raise SkippedError("no such device")

    monkeypatch.setattr(contact, "CHECKS", {"wrong": wrong, "replaced": replaced, "absent": absent, "well": lambda at: None})
    found = {name: contact.outcome_of(name, Contact(at.device, at.folder)) for name in contact.CHECKS}
    assert found["wrong"]["error"] == "WrongError: y: differs by 5.0e-01 of the largest value, where 1e-01 is allowed."
    assert found["wrong"]["difference"] == 0.5
    assert any("in wrong" in line for line in found["wrong"]["traceback"])
    assert "plain torch in place of the kernel 'one_row'" in found["replaced"]["error"]
    assert found["absent"]["reason"] == "no such device"
    assert found["well"]["status"] == "passed", "the kernel that was replaced is tried again"


@pytest.mark.parametrize(
    ("found", "expected"),
    [([1.0, float("nan")], [1.0, 2.0]), ([1.0], [1.0, 2.0]), ([1.0, 2.1], [1.0, 2.0]), ([0.0, 1e-9], [0.0, 0.0])],
)
def test_what_is_not_near(at, found, expected):
    at.near("y", torch.tensor([1.0, 2.01]), torch.tensor([1.0, 2.0]), 0.01)
    with pytest.raises(WrongError):
        at.near("y", torch.tensor(found), torch.tensor(expected), 0.01)


FAULTS = {
    "codec-nf4": ("triton", "dequantize_4bit"),
    "codec-int4": ("triton", "gemv_grouped"),
    "quantise": ("triton", "quantize_8bit"),
    "rows-8bit": ("triton", "quantize_rows"),
    "product-int8": ("triton", "matmul_8bit"),
    "low-rank-rows": ("triton", "add_low_rank_rows"),
    "attention-slots": ("triton", "attend_slots"),
    "experts-nf4": ("triton", "matmul_experts"),
    "experts-dense": ("triton", "outer_experts"),
    "cross-entropy": ("triton", "cross_entropy"),
    "adamw-8bit": ("triton", "adamw_8bit"),
    "step": ("cpu", "low_rank_backward"),
    "packing": ("cpu", "attention"),
    "decode-batch": ("cpu", "attend_slots"),
    "decode-adapters": ("cpu", "add_low_rank_rows"),
    "decode-windows": ("cpu", "attend_slots"),
    "engine": ("cpu", "attend_slots"),
}
"""Check -> (backend, an operation with a fault)."""


def spoiled(result, given):
    """What an operation with a fault gives, or leaves in its arguments."""
    if result is None:
        for tensor in (given[0][0].parameter,) if isinstance(given[0], list) else given[:1]:
            tensor.mul_(-1)
        return None
    first, *rest = result if isinstance(result, tuple) else [result]
    wrong = first.flip(0) + first.new_ones(())
    return wrong if not rest else type(result)(*(wrong, *rest)) if hasattr(result, "_fields") else (wrong, *rest)


@pytest.mark.skipif(not INTERPRETED, reason="without Triton's interpreter: no triton, or a GPU")
@pytest.mark.parametrize("name", FAULTS)
def test_a_check_passes_and_finds_a_fault(name, at, monkeypatch):
    assert contact.outcome_of(name, at)["status"] == "passed"
    backend, operation = FAULTS[name]
    module = ops.backend(backend)
    run = getattr(module, operation)
    monkeypatch.setattr(module, operation, lambda *given, **named: spoiled(run(*given, **named), given))
    found = contact.outcome_of(name, Contact(at.device, at.folder))
    assert found["status"] == "failed", found
    assert "WrongError" in found["error"]


@pytest.mark.slow
def test_rows_before_the_invocation_must_have_no_branch(at, monkeypatch):
    assert contact.outcome_of("activated-step", at)["status"] == "passed"
    monkeypatch.setattr(joined, "_in_active_rows", lambda graph, node, low: low)
    monkeypatch.setattr(joined.JoinLowRank, "uuid", lambda self: "with a fault")  # compiled graphs are cached by it
    torch._dynamo.reset()
    assert contact.outcome_of("activated-step", Contact(at.device, at.folder))["status"] == "failed"


def test_without_triton_its_checks_are_skipped_on_a_cpu(at, monkeypatch):
    def absent(name):
        raise contact.BackendError("triton is not installed")

    monkeypatch.setattr(ops, "backend", absent)
    assert contact.outcome_of("quantise", at)["reason"] == "triton is not installed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "'bench contact' checks what runs on a CUDA device, and torch sees none"),
        (["--stand-in", "--only", "step,steps"], "There is no check 'steps'. There are: codec-nf4, "),
        (["--model", "demo"], "--model is for"),
        (["--stand-in", "--peers"], "'bench contact' times nothing"),
        (["--stand-in", "--repeats", "3"], "'bench contact' times nothing"),
    ],
)
def test_what_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(contact, "pick_device", lambda: torch.device("cpu"))
    assert main(["bench", "contact", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_tells_of_each_check_and_fails_if_one_has(tmp_path, monkeypatch, capsys):
    given = {}

    def all_of_them(names, command, environment, until, tell):
        given.update(names=names, command=command, interpreted=environment.get("TRITON_INTERPRET"))
        outcomes = {
            "step": {"status": "passed", "seconds": 1.0, "difference": 0.1},
            "graphs": {"status": "skipped", "seconds": 0.0, "reason": "none here"},
            "engine": {"status": "failed", "seconds": 2.0, "error": "WrongError: no", "difference": None},
        }
        tell(outcomes, "engine")
        given["partial"] = json.loads(file.read_text())
        return outcomes

    file = tmp_path / "contact.json"
    monkeypatch.setattr(contact, "run_all", all_of_them)
    only = ["--stand-in", "--only", "step, graphs,engine", "--time-limit", "5", "--output", str(file)]
    assert main(["bench", "contact", *only, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["error"] == "1 of 3 checks failed: engine"
    assert (told["workload"]["stand_in"], told["workload"]["time_limit_s"]) == (True, 5)
    assert [(each["name"], each["status"]) for each in told["checks"]] == [
        ("step", "passed"), ("graphs", "skipped"), ("engine", "failed"),
    ]  # fmt: skip
    assert told["headlines"]["step"] == "passed, 1.0 s, largest difference 1e-01"
    assert json.loads(file.read_text())["status"] == "failed"
    assert given["partial"]["status"] == "partial"
    assert given["interpreted"] == "1"
    assert given["command"][1:3] == ["-m", "lownibble.bench.contact"]
    assert not Path(given["command"][3]).exists(), "what the processes wrote is gone"


@pytest.mark.slow
def test_every_check_passes_as_a_stand_in_or_says_why_it_cannot(tmp_path, capsys):
    """In processes of its own, as on a card."""
    assert main(["bench", "contact", "--stand-in", "--time-limit", "600", "--output", str(tmp_path / "c.json")]) == 0
    checks = json.loads(Path(tmp_path / "c.json").read_text())["checks"]
    assert [each["name"] for each in checks] == list(contact.CHECKS)
    skipped = {each["name"]: each["reason"] for each in checks if each["status"] == "skipped"}
    assert set(skipped) == NOT_ON_A_CPU if INTERPRETED else set(skipped) >= NOT_ON_A_CPU
    assert Counter(each["status"] for each in checks)["passed"] == len(checks) - len(skipped)
    assert all(len(reason) > 10 for reason in skipped.values())
