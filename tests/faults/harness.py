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
ranks      runs on several ranks: SIGKILL of one or all (the others are ended as torchrun does), SIGTERM on one

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
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
    ranks: int = 1


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
        **{
            f"{mode} ranks": Subject(
                f"small, {method}, two ranks, {mode}", [*small, "--method", method, "--r", "4", "--parallel", mode], 1, 2
            )
            for mode, method in (("ddp", "lora"), ("fsdp", "qlora"))
        },
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


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Rank:
    """Makes a process a rank of several; to be called in it."""

    def __init__(self, rank: int, world: int, port: int) -> None:
        self.environment = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }  # fmt: skip

    def __call__(self) -> None:
        os.environ |= {key: str(value) for key, value in self.environment.items()}


class Run:
    """A training process on an output folder, or one for each rank."""

    def __init__(self, subject: Subject, output: Path, *extra: str, before: Callable[[], None] | None = None) -> None:
        self.output = output
        now, port = time.monotonic_ns(), free_port()
        self._messages = [output.with_name(f"{output.name}.{now}.{rank}.txt") for rank in range(subject.ranks)]
        flags = [*subject.flags, "--output", str(output), *extra]
        self.processes = []
        for rank, messages in enumerate(self._messages):
            first = Rank(rank, subject.ranks, port) if subject.ranks > 1 else before
            self.processes.append(_processes.Process(target=train, args=(flags, str(messages), subject.threads, first)))
            self.processes[-1].start()

    @property
    def process(self) -> multiprocessing.process.BaseProcess:
        """The first process."""
        return self.processes[0]

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, of several the largest, or None after so many seconds."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else max(codes, key=abs)

    def signal(self, number: int, ranks: Sequence[int] = (0,)) -> int:
        """Send a signal; returns the exit code. Others of a killed rank get SIGTERM, and later SIGKILL, as torchrun does."""
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)
        if number == signal.SIGKILL:
            self.processes[ranks[0]].join()
            self._end_others()
        return int(self.wait() or 0)

    def _end_others(self) -> None:
        for how, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, None)):
            for process in self.processes:
                if process.is_alive():
                    os.kill(process.pid, how)
            for process in self.processes:
                process.join(seconds)

    @property
    def said(self) -> str:
        """What the processes wrote."""
        return "".join(each.read_text(errors="replace") for each in self._messages if each.exists())

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
    """The run that is left alone, and the bytes of all files it leaves."""

    files: dict[str, bytes]
    losses: list[float]
    seconds: float
    n_bytes: int

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
    folder.mkdir()
    began = time.perf_counter()
    run = Run(subject, folder / "out")
    if run.wait() != 0:
        raise SystemExit(f"The undisturbed run failed: {run.said}")
    seconds = time.perf_counter() - began
    return Reference(*result(run.output), seconds, sum(file.stat().st_size for file in run.output.rglob("*") if file.is_file()))


class Trial(NamedTuple):
    """One run to be disturbed: what it must come to, a folder for it, its number, outcomes still wanted, and its chance."""

    subject: Subject
    truth: Reference
    folder: Path
    number: int
    left: int
    draw: random.Random

    @property
    def output(self) -> Path:
        """The run's output folder."""
        return self.folder / "out"

    def run(self, *extra: str, before: Callable[[], None] | None = None) -> Run:
        """Start it, or start it again."""
        return Run(self.subject, self.output, *extra, before=before)

    def resumed(self) -> str:
        """What becomes of it when it is resumed and left alone."""
        run = self.run("--resume")
        return self.truth.outcome(self.output) if run.wait() == 0 else wrong(run)


def wrong(run: Run) -> str:
    """The outcome of a run that ended as it must not."""
    return f"WRONG: exit code {run.wait()}: {run.said[-300:]}"


Outcomes = Iterator[str]


def kills(trial: Trial) -> Outcomes:
    """Killed at random moments, resumed, killed again; one outcome for each kill, known when the run is through."""
    moments: list[str] = []
    while True:
        run = trial.run("--resume")
        if run.wait(trial.draw.uniform(0, trial.truth.seconds) if len(moments) < trial.left else None) is not None:
            break
        moments.append(_moment(run))
        ranks = trial.draw.choice([[0], [1], [0, 1]]) if trial.subject.ranks > 1 else [0]
        run.signal(signal.SIGKILL, ranks)
        if "Traceback" in run.said:
            yield wrong(run)
    end = trial.truth.outcome(trial.output) if run.wait() == 0 else wrong(run)
    yield from (f"{end} (killed {moment})" for moment in moments)


def _moment(run: Run) -> str:
    """Where in its life a process is."""
    if list((run.output / "checkpoints").glob(".*.part")):
        return "while it wrote a checkpoint"
    if (run.output / "adapter").exists() or (run.output / "model").exists():
        return "while it saved the result"
    return "between checkpoints" if run.checkpoints() else "before the first checkpoint"


def stops(trial: Trial) -> Outcomes:
    """SIGTERM at a random moment, then resumed."""
    run = trial.run()
    run.wait_for_checkpoints(1)
    run.wait(trial.draw.uniform(0, trial.truth.seconds / 2))
    ranks = [trial.draw.randrange(trial.subject.ranks)]
    code = run.signal(signal.SIGTERM, ranks) if run.wait(0) is None else run.wait()
    yield trial.resumed() if code in (0, 128 + signal.SIGTERM) else wrong(run)


def full_disks(trial: Trial) -> Outcomes:
    """A disk of random size fills; then there is space, and the run is resumed."""
    folder, size = trial.folder, trial.draw.randint(8, trial.truth.n_bytes // 1024)
    (folder / "disk").mkdir()
    command = shlex.join(
        [sys.executable, "-m", "lownibble.cli.main", "train", *trial.subject.flags, "--output", f"{folder}/disk/run"]
    )
    script = f"""
        export OMP_NUM_THREADS={trial.subject.threads or os.cpu_count()}
        mount -t tmpfs -o size={size}k none {folder}/disk || exit 99
        {command} 2> {folder}/full.txt; echo $? > {folder}/full.code
        mount -o remount,size=1g {folder}/disk || exit 99
        {command} --resume 2> {folder}/again.txt || exit 98
        cp -r {folder}/disk/run {trial.output}
    """
    done = subprocess.run(["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 99 or not (folder / "full.code").exists():
        raise SystemExit(f"No tmpfs can be mounted in a namespace here: {done.stderr}")
    first, said = int((folder / "full.code").read_text()), (folder / "full.txt").read_text()
    if first == 0:
        yield "the disk sufficed"
    elif first != 2 or "Free some space, then go on with --resume" not in said or "Traceback" in said:
        yield f"WRONG: exit code {first}: {said[-300:]}"
    elif done.returncode:
        yield f"WRONG: not resumed: {(folder / 'again.txt').read_text()[-300:]}"
    else:
        yield f"one error, then {trial.truth.outcome(trial.output)}"


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


def corruptions(trial: Trial) -> Outcomes:
    """The newest checkpoint damaged; every fifth time all of them."""
    run, all_of_them = trial.run(), trial.number % 5 == 4
    run.wait_for_checkpoints(2)
    run.wait(trial.draw.uniform(0, trial.truth.seconds / 4))
    run.process.kill()
    run.wait()
    for checkpoint in run.checkpoints() if all_of_them else run.checkpoints()[-1:]:
        _damage(checkpoint / trial.draw.choice(["state.json", "state.safetensors"]), trial.draw)
    again = trial.run("--resume")
    code = again.wait()
    if all_of_them and code == 2 and "There is no whole checkpoint to resume from" in again.said:
        yield "all damaged: refused, with the damage named"
    elif not all_of_them and code == 0 and "is damaged" in again.said:
        yield f"the one before is used, {trial.truth.outcome(trial.output)}"
    else:
        yield wrong(again)


class Poison:
    """Makes a module of the model give NaN in training steps from `first` to `last`; to be called in the training process."""

    def __init__(self, first: int, last: float, place: float) -> None:
        self.first, self.last, self.place = first, last, place

    def __call__(self) -> None:
        import torch

        run = importlib.import_module("lownibble.training.run")  # the name in the package is the function
        make = run.make_model

        def poisoned(*arguments: Any) -> Any:
            model, tokenizer = make(*arguments)
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

        run.make_model = poisoned


def poisons(trial: Trial) -> Outcomes:
    """NaN in one step; every third time for good."""
    first, for_good = trial.draw.randint(15, 200), trial.number % 3 == 2
    run = trial.run(before=Poison(first, float("inf") if for_good else first, trial.draw.random()))
    code = run.wait()
    place = run.said.split("poisoned ")[1].split()[0] if "poisoned " in run.said else "?"
    if for_good:
        named = f"'{place}'" in run.said and "were not taken" in run.said and "The last checkpoint is" in run.said
        unfinished = not (trial.output / "record.json").exists() and bool(run.checkpoints())
        ended = code == 1 and named and unfinished
        yield "for good: ends with the last good checkpoint, module named" if ended else wrong(run)
        return
    skipped = json.loads((trial.output / "record.json").read_text())["skipped"] if code == 0 else []
    right = len(skipped) == 1 and f"'{place}'" in skipped[0]["reason"]
    yield "the step is skipped, module named" if right else wrong(run)


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


def cramps(trial: Trial) -> Outcomes:
    """An address space too small for the batch."""
    run = trial.run(before=Cramp(trial.draw.randint(250, 600) << 20))
    if run.wait() != 0:
        yield wrong(run)
        return
    warnings = json.loads((trial.output / "record.json").read_text())["warnings"]
    if not any("ran out" in warning for warning in warnings):
        yield "there was room enough"
    elif not trial.truth.near(trial.output):
        yield "WRONG: other losses"
    elif any("no memory left to read it back" in warning for warning in warnings):
        yield "smaller passes, the same losses to rounding; saved, with a warning that it could not be read back"
    else:
        yield "smaller passes, the same losses to rounding"


def budgets(trial: Trial) -> Outcomes:
    """Begun within a large memory budget, stopped, resumed within a small one."""
    run = trial.run("--memory-budget", "6GB")
    run.wait_for_checkpoints(1)
    run.wait(trial.draw.uniform(0, trial.truth.seconds / 4))
    run.signal(signal.SIGTERM)
    again = trial.run("--resume", "--memory-budget", f"{trial.draw.randint(1150, 1500)}MB")
    if again.wait() != 0:
        yield wrong(again)
        return
    fit = json.loads((trial.output / "record.json").read_text())["memory"]["budget"]
    if fit["highest_bytes"] > fit["budget_bytes"]:
        yield f"WRONG: {fit['highest_bytes']} bytes of {fit['budget_bytes']}"
    else:
        near = trial.truth.near(trial.output)
        yield "within the smaller budget, the same losses to rounding" if near else "WRONG: other losses"


def doubles(trial: Trial) -> Outcomes:
    """A second process on a folder in which one trains."""
    run = trial.run()
    run.wait_for_checkpoints(1)
    run.wait(trial.draw.uniform(0, trial.truth.seconds / 8))
    second = trial.run(*["--resume"] * (trial.number % 2))
    code, still = second.wait(), run.wait(0) is None
    refused = code == 2 and "Another process is using" in second.said
    if not refused and still:
        yield wrong(second)
    elif run.wait() != 0:
        yield wrong(run)
    else:
        yield f"{'refused' if refused else 'came too late'}, the first run has the {trial.truth.outcome(trial.output)}"


class Fault(NamedTuple):
    """A kind of fault: what it is called, what does it, to whom, how often."""

    name: str
    do: Callable[[Trial], Outcomes]
    subject: str
    count: int


FAULTS = (
    Fault("SIGKILL at a random moment", kills, "lora", 60),
    Fault("SIGKILL at a random moment", kills, "full", 40),
    Fault("SIGKILL at a random moment", kills, "embedded", 10),
    Fault("SIGTERM at a random moment", stops, "lora", 10),
    Fault("SIGKILL of a rank or all at a random moment", kills, "ddp ranks", 15),
    Fault("SIGKILL of a rank or all at a random moment", kills, "fsdp ranks", 15),
    Fault("SIGTERM on a rank at a random moment", stops, "ddp ranks", 4),
    Fault("SIGTERM on a rank at a random moment", stops, "fsdp ranks", 4),
    Fault("full disk", full_disks, "full", 8),
    Fault("damaged checkpoint", corruptions, "lora", 20),
    Fault("NaN from a module", poisons, "lora", 9),
    Fault("memory runs out", cramps, "large batches", 5),
    Fault("smaller memory budget on resuming", budgets, "large batches", 3),
    Fault("two processes on one folder", doubles, "full", 6),
)


def inflict(fault: Fault, subject: Subject, truth: Reference, folder: Path, count: int) -> Counter[str]:
    """Do one kind of fault so often; outcome -> how many."""
    outcomes: Counter[str] = Counter()
    draw, number = random.Random(f"{fault.name}, {fault.subject}"), 0
    while outcomes.total() < count:
        folder.mkdir()
        outcomes.update(fault.do(Trial(subject, truth, folder, number, count - outcomes.total(), draw)))
        shutil.rmtree(folder)
        number += 1
    return outcomes


def main() -> int:
    """All faults, or those whose name contains `--only`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="write the record to this .json file")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    options = parser.parse_args()
    from lownibble import record

    _processes.set_forkserver_preload(["lownibble.cli.main", "lownibble.training"])
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        who, truths = subjects(folder), {}
        for fault in (fault for fault in FAULTS if options.only in fault.name):
            if fault.subject not in truths:
                truths[fault.subject] = reference(who[fault.subject], folder / fault.subject)
            outcomes = inflict(fault, who[fault.subject], truths[fault.subject], folder / "trial", fault.count)
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
