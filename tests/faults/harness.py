"""Faults done to real training processes, and what became of them: `python tests/faults/harness.py --output RECORD.json`.

Every fault comes at a random moment or place, from a fixed seed. What counts is the end: the run goes on to the same bits as one
that was left alone (adapter or model file, and every loss), or it refuses with one error that says what to do. Anything else is
an outcome called "WRONG", and the harness exits with 1.

kill       SIGKILL, again and again, until the run is through
stop       SIGTERM: saves and exits with 143, then resumed
disk       a full disk (a tmpfs of random size in a namespace of its own), then space and --resume
corrupt    the newest checkpoint damaged while the run is dead; all of them damaged
nan        a module that gives NaN in one step, or from some step on
memory     an address space that is too small for the batch (RLIMIT_AS), once set up
budget     a resumption within a smaller memory budget
two runs   a second process on the same folder

Processes are forked from one that has imported torch, so that a fault lands in the work and not in the imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SAME = "same bits as an undisturbed run"
_processes = multiprocessing.get_context("forkserver")


class Subject(NamedTuple):
    """What is trained: a name, the flags, and the threads (0: all cores; two are slower than one for a small model)."""

    name: str
    flags: list[str]
    threads: int = 0


def subjects(folder: Path) -> dict[str, Subject]:
    """The small model (with dropout, unpaged and paged), and the embedded one."""
    from tiny_folders import write_data, write_model

    for name in ("model", "data"):
        (folder / name).mkdir()
    files = ["--model", str(write_model(folder / "model")), "--data", str(write_data(folder / "data"))]
    small = [*files, *shlex.split("--batch-size 8 --max-length 24 --max-steps 240 --save-steps 10 --learning-rate 1e-2")]
    embedded = shlex.split("--method qlora --batch-size 4 --max-length 64 --max-steps 16 --save-steps 2 --max-eval-rows 8")
    return {
        "lora": Subject("small, lora", [*small, *shlex.split("--method lora --r 4 --lora-dropout 0.1")], 1),
        "full": Subject(
            "small, full, paged 8-bit optimiser", [*small, *shlex.split("--method full --optim paged_adamw_8bit")], 1
        ),
        "embedded": Subject("embedded, qlora", [*embedded, "--torch-compile", "false"]),
        "large batches": Subject("embedded, qlora, batches of 16", [*embedded, *shlex.split("--batch-size 16 --max-steps 6")]),
    }


def train(flags: list[str], messages: str, threads: int, before: Callable[[], None] | None = None) -> None:
    """The body of a training process: the command line, its output in a file."""
    import torch

    from lownibble.cli.main import main

    if threads:
        torch.set_num_threads(threads)

    with Path(messages).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if before:
        before()
    sys.exit(main(["train", *flags]))


class Run:
    """A training process on an output folder."""

    def __init__(self, subject: Subject, output: Path, *extra: str, before: Callable[[], None] | None = None) -> None:
        self.output = output
        self._messages = output.with_name(f"{output.name}.{time.monotonic_ns()}.txt")
        flags = [*subject.flags, "--output", str(output), *extra]
        self.process = _processes.Process(target=train, args=(flags, str(self._messages), subject.threads, before))
        self.process.start()

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, or None after so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode

    def signal(self, number: int) -> int:
        """Send a signal; returns the exit code."""
        os.kill(self.process.pid, number)
        return int(self.wait() or 0)

    @property
    def said(self) -> str:
        """What the process wrote."""
        return self._messages.read_text(errors="replace") if self._messages.exists() else ""

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted((self.output / "checkpoints").glob("step-*"))

    def wait_for_checkpoints(self, count: int) -> None:
        """Until there are so many."""
        while self.wait(0.005) is None and len(self.checkpoints()) < count:
            pass


def result(output: Path) -> tuple[dict[str, bytes], list[float]]:
    """What a finished run left: the bytes of its tensors, and its losses."""
    record = json.loads((output / "record.json").read_text())
    files = sorted([*output.glob("adapter/*.safetensors"), *output.glob("model/*.safetensors")])
    return {file.name: file.read_bytes() for file in files}, [step["loss"] for step in record["steps"]]


class Reference(NamedTuple):
    """The run that is left alone."""

    files: dict[str, bytes]
    losses: list[float]
    seconds: float

    def outcome(self, output: Path) -> str:
        """What became of a run, held against this one."""
        files, losses = result(output)
        if files == self.files and losses == self.losses:
            return SAME
        return "WRONG: other bits"

    def near(self, output: Path) -> bool:
        """Whether a run has the same losses to rounding."""
        losses = result(output)[1]
        pairs = zip(losses, self.losses, strict=False)
        return len(losses) == len(self.losses) and all(abs(a - b) <= 1e-3 * abs(b) for a, b in pairs)


def reference(subject: Subject, folder: Path) -> Reference:
    """Run it undisturbed."""
    began = time.perf_counter()
    run = Run(subject, folder / "reference")
    if run.wait() != 0:
        raise SystemExit(f"The undisturbed run failed: {run.said}")
    seconds = time.perf_counter() - began
    return Reference(*result(folder / "reference"), seconds)


Outcomes = Iterator[str]


def kills(subject: Subject, folder: Path, count: int, draw: random.Random) -> Outcomes:
    """Killed at random moments, resumed, killed again; one outcome for each kill, known when its run is through."""
    truth = reference(subject, folder)
    killed = chain = 0
    while killed < count:
        chain, moments = chain + 1, []
        output = folder / f"killed-{chain}"
        while True:
            run = Run(subject, output, "--resume")
            code = run.wait(draw.uniform(0, truth.seconds) if killed < count else None)
            if code is not None:
                break
            moments.append(_moment(run))
            run.signal(signal.SIGKILL)
            killed += 1
        end = truth.outcome(output) if code == 0 else f"WRONG: exit code {code}: {run.said[-300:]}"
        yield from (f"{end} (killed {moment})" for moment in moments)
        shutil.rmtree(output)


def _moment(run: Run) -> str:
    """Where in its life a process is."""
    if list((run.output / "checkpoints").glob(".*.part")):
        return "while it wrote a checkpoint"
    if (run.output / "adapter").exists() or (run.output / "model").exists():
        return "while it saved the result"
    return "between checkpoints" if run.checkpoints() else "before the first checkpoint"


def stops(subject: Subject, folder: Path, count: int, draw: random.Random) -> Outcomes:
    """SIGTERM at random moments, then resumed."""
    truth = reference(subject, folder)
    for number in range(count):
        output = folder / f"stopped-{number}"
        run = Run(subject, output)
        run.wait_for_checkpoints(1)
        run.wait(draw.uniform(0, truth.seconds / 2))
        code = run.signal(signal.SIGTERM) if run.wait(0) is None else run.wait()
        if code not in (0, 128 + signal.SIGTERM):
            yield f"WRONG: exit code {code}: {run.said[-300:]}"
            continue
        again = Run(subject, output, "--resume")
        yield truth.outcome(output) if again.wait() == 0 else f"WRONG: {again.said[-300:]}"


def full_disks(subject: Subject, folder: Path, count: int, draw: random.Random) -> Outcomes:
    """A disk of random size fills; then there is space, and the run is resumed."""
    truth = reference(subject, folder)
    whole = sum(file.stat().st_size for file in (folder / "reference").rglob("*") if file.is_file())
    for number in range(count):
        disk, saved = folder / f"disk-{number}", folder / f"saved-{number}"
        disk.mkdir()
        command = " ".join([sys.executable, "-m", "lownibble.cli.main", "train", *subject.flags, "--output", f"{disk}/run"])
        script = f"""
            export OMP_NUM_THREADS={subject.threads or os.cpu_count()}
            mount -t tmpfs -o size={draw.randint(8, int(whole / 1024))}k none {disk} || exit 99
            {command} 2> {folder}/full-{number}.txt; echo $? > {folder}/full-{number}.code
            mount -o remount,size=1g {disk} || exit 99
            {command} --resume 2> {folder}/again-{number}.txt || exit 98
            cp -r {disk}/run {saved}
        """
        done = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True)
        if done.returncode == 99 or not (folder / f"full-{number}.code").exists():
            raise SystemExit(f"No tmpfs can be mounted in a namespace here: {done.stderr}")
        first = int((folder / f"full-{number}.code").read_text())
        said = (folder / f"full-{number}.txt").read_text()
        if first == 0:
            yield "the disk sufficed"
        elif first != 2 or "Free some space, then go on with --resume" not in said or "Traceback" in said:
            yield f"WRONG: exit code {first}: {said[-300:]}"
        elif done.returncode:
            yield f"WRONG: not resumed: {(folder / f'again-{number}.txt').read_text()[-300:]}"
        else:
            yield f"one error, then {truth.outcome(saved)}"


def _damage(file: Path, draw: random.Random) -> None:
    """One of the things that happen to files."""
    content = bytearray(file.read_bytes())
    kind = draw.choice(["a flipped bit", "cut short", "emptied", "zeroed", "gone"])
    if kind == "gone":
        file.unlink()
        return
    if kind == "a flipped bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut short":
        del content[draw.randrange(len(content)) :]
    elif kind == "emptied":
        content.clear()
    else:
        start = draw.randrange(len(content))
        stop = min(len(content), start + 4096)
        content[start:stop] = bytes(b ^ 0xFF for b in content[start:stop])
    file.write_bytes(content)


def corruptions(subject: Subject, folder: Path, count: int, draw: random.Random) -> Outcomes:
    """The newest checkpoint damaged; every fifth time all of them."""
    truth = reference(subject, folder)
    for number in range(count):
        output = folder / f"damaged-{number}"
        run = Run(subject, output)
        run.wait_for_checkpoints(2)
        run.wait(draw.uniform(0, truth.seconds / 4))
        run.process.kill()
        run.wait()
        damaged = run.checkpoints() if number % 5 == 4 else run.checkpoints()[-1:]
        for checkpoint in damaged:
            _damage(checkpoint / draw.choice(["state.json", "state.safetensors"]), draw)
        again = Run(subject, output, "--resume")
        code = again.wait()
        if number % 5 == 4:
            refused = code == 2 and "There is no whole checkpoint to resume from" in again.said
            yield "all damaged: refused, with the damage named" if refused else f"WRONG: {again.said[-300:]}"
        elif code != 0 or "is damaged" not in again.said:
            yield f"WRONG: exit code {code}: {again.said[-300:]}"
        else:
            yield f"the one before is used, {truth.outcome(output)}"


class Poison:
    """Makes a module of the model give NaN in training steps from `first` to `last`; to be called in the training process."""

    def __init__(self, first: int, last: float, place: float) -> None:
        self.first, self.last, self.place = first, last, place

    def __call__(self) -> None:
        import torch

        run = importlib.import_module("lownibble.training.run")  # the name in the package is the function
        make = run._make_model

        def poisoned(config: Any) -> Any:
            model, tokenizer = make(config)
            layers = [name for name, module in model.named_modules() if name.endswith("_proj")]
            seen = 0

            def count(*_: Any) -> None:
                nonlocal seen
                seen += model.training and torch.is_grad_enabled()  # not when the trainer looks for where it began

            def spoil(module: Any, inputs: Any, output: Any) -> Any:
                return output * float("nan") if model.training and self.first <= seen <= self.last else output

            name = layers[int(self.place * len(layers))]
            model.base_model.register_forward_pre_hook(count)
            model.get_submodule(name).register_forward_hook(spoil)
            print(f"poisoned {name}", file=sys.stderr)
            return model, tokenizer

        run._make_model = poisoned


def poisons(subject: Subject, folder: Path, count: int, draw: random.Random) -> Outcomes:
    """NaN in one step; every third time for good."""
    for number in range(count):
        output, first = folder / f"poisoned-{number}", draw.randint(15, 200)
        for_good = number % 3 == 2
        run = Run(subject, output, before=Poison(first, float("inf") if for_good else first, draw.random()))
        code = run.wait()
        place = run.said.split("poisoned ")[1].split()[0] if "poisoned " in run.said else "?"
        if for_good:
            named = f"'{place}'" in run.said and "were not taken" in run.said and "The weights of step" in run.said
            unfinished = not (output / "record.json").exists() and bool(run.checkpoints())
            ended = code == 1 and named and unfinished
            yield "for good: ends with the last good checkpoint, module named" if ended else f"WRONG: {run.said[-300:]}"
            continue
        skipped = json.loads((output / "record.json").read_text())["skipped"] if code == 0 else []
        right = len(skipped) == 1 and f"'{place}'" in skipped[0]["reason"]
        yield "the step is skipped, module named" if right else f"WRONG: exit code {code}: {run.said[-300:]}"


class Cramp:
    """Leaves the process so many bytes of address space more than it has when the first step begins."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self) -> None:
        from lownibble.training.loop import Trainer

        before = Trainer.set_up

        def cramped(trainer: Trainer) -> int:
            first = before(trainer)
            trainer.passes.backward(trainer.micro.largest(16), 16)  # threads and libraries have their memory
            trainer.model.zero_grad(set_to_none=True)
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + self.room, resource.RLIM_INFINITY))
            return first

        Trainer.set_up = cramped


def cramps(subject: Subject, folder: Path, count: int, draw: random.Random) -> Outcomes:
    """An address space too small for the batch."""
    truth = reference(subject, folder)
    for number in range(count):
        output = folder / f"cramped-{number}"
        run = Run(subject, output, before=Cramp(draw.randint(250, 600) << 20))
        code = run.wait()
        if code != 0:
            yield f"WRONG: exit code {code}: {run.said[-300:]}"
            continue
        told = [warning for warning in json.loads((output / "record.json").read_text())["warnings"] if "ran out" in warning]
        if not told:
            yield "there was room enough"
        else:
            yield "smaller passes, the same losses to rounding" if truth.near(output) else "WRONG: other losses"


def budgets(subject: Subject, folder: Path, count: int, draw: random.Random) -> Outcomes:
    """Begun within a large memory budget, stopped, resumed within a small one."""
    truth = reference(subject, folder)
    for number in range(count):
        output = folder / f"shrunk-{number}"
        run = Run(subject, output, "--memory-budget", "6GB")
        run.wait_for_checkpoints(1)
        run.wait(draw.uniform(0, truth.seconds / 4))
        run.signal(signal.SIGTERM)
        again = Run(subject, output, "--resume", "--memory-budget", f"{draw.randint(1150, 1500)}MB")
        if again.wait() != 0:
            yield f"WRONG: {again.said[-300:]}"
            continue
        fit = json.loads((output / "record.json").read_text())["memory"]["budget"]
        if fit["highest_bytes"] > fit["budget_bytes"]:
            yield f"WRONG: {fit['highest_bytes']} bytes of {fit['budget_bytes']}"
        else:
            yield "within the smaller budget, the same losses to rounding" if truth.near(output) else "WRONG: other losses"


def doubles(subject: Subject, folder: Path, count: int, draw: random.Random) -> Outcomes:
    """A second process on a folder in which one trains."""
    truth = reference(subject, folder)
    for number in range(count):
        output = folder / f"doubled-{number}"
        run = Run(subject, output)
        run.wait_for_checkpoints(1)
        run.wait(draw.uniform(0, truth.seconds / 8))
        second = Run(subject, output, *["--resume"] * (number % 2))
        code, still = second.wait(), run.wait(0) is None
        refused = code == 2 and "Another process is training in" in second.said
        if not refused and still:
            yield f"WRONG: exit code {code}: {second.said[-300:]}"
        elif run.wait() != 0:
            yield f"WRONG: the first run failed: {run.said[-300:]}"
        else:
            yield f"{'refused' if refused else 'came too late'}, the first run has the {truth.outcome(output)}"


class Fault(NamedTuple):
    """A kind of fault: what it is called, what does it, to whom, how often."""

    name: str
    do: Callable[[Subject, Path, int, random.Random], Outcomes]
    subject: str
    count: int


FAULTS = (
    Fault("SIGKILL at a random moment", kills, "lora", 60),
    Fault("SIGKILL at a random moment", kills, "full", 40),
    Fault("SIGKILL at a random moment", kills, "embedded", 10),
    Fault("SIGTERM at a random moment", stops, "lora", 10),
    Fault("full disk", full_disks, "full", 8),
    Fault("damaged checkpoint", corruptions, "lora", 20),
    Fault("NaN from a module", poisons, "lora", 9),
    Fault("memory runs out", cramps, "large batches", 5),
    Fault("smaller memory budget on resuming", budgets, "large batches", 3),
    Fault("two processes on one folder", doubles, "full", 6),
)


def inflict(fault: Fault, who: dict[str, Subject], folder: Path, count: int) -> Counter[str]:
    """Do one kind of fault so often; outcome -> how many."""
    folder.mkdir()
    outcomes = Counter(fault.do(who[fault.subject], folder, count, random.Random(f"{fault.name}, {fault.subject}")))
    shutil.rmtree(folder)
    return outcomes


def main() -> int:
    """All faults, or those whose name contains `--only`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="write the record to this .json file")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    options = parser.parse_args()
    from lownibble.training import record

    _processes.set_forkserver_preload(["lownibble.cli.main", "lownibble.training"])
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        who = subjects(folder)
        for number, fault in enumerate(fault for fault in FAULTS if options.only in fault.name):
            outcomes = inflict(fault, who, folder / f"fault-{number}", fault.count)
            found.append({"fault": fault.name, "run": who[fault.subject].name, "outcomes": dict(sorted(outcomes.items()))})
            print(json.dumps(found[-1], indent=1), flush=True)
    wrong = sum(n for each in found for outcome, n in each["outcomes"].items() if outcome.startswith("WRONG"))
    if options.output:
        record.write(
            options.output,
            {
                **record.new("faults"),
                "status": "failed" if wrong else "ok",
                "environment": record.environment(),
                "faults": found,
                "wrong": wrong,
            },
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
