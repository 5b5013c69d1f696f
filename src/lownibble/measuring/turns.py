"""Interleaved measurement: processes that take turns, so that machine drift affects all of them alike.

A child answers each line `N` on its standard input with one JSON line on its standard output; the parent gives turns in an order
that rotates from round to round. Ratios are taken within a round; their median, minimum and maximum are reported. An answer
`{"error": ...}` says why a child cannot go on; one with a value that is not finite is an error, too. A child may be given a time
within which it must answer.

Run as a program (`python -m lownibble.measuring.turns SPEC.json`), this module is such a child: a training run that takes steps
until it is stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from lownibble.config import RunConfig
from lownibble.errors import TrainingError


class TurnTaker:
    """Context manager for a child process that works only during its turns; `facts` is its first answer.

    limit_s: seconds for each answer, or None.
    """

    def __init__(self, name: str, module: str, *arguments: str, limit_s: float | None = None) -> None:
        self.name, self.limit_s = name, limit_s
        command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> TurnTaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ready(self) -> None:
        """Wait until the child is set up, and read its `facts`."""
        self.facts = self._answer()

    def turn(self, steps: int) -> dict[str, Any]:
        """Let the child do `steps` steps; returns its answer."""
        stdin: IO[str] = self.process.stdin  # type: ignore[assignment]
        with suppress(BrokenPipeError):  # it has ended: so does its output
            stdin.write(f"{steps}\n")
            stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout: IO[str] = self.process.stdout  # type: ignore[assignment]
        if self.limit_s is not None and not select.select([stdout], [], [], self.limit_s)[0]:
            raise TrainingError(f"'{self.name}' gave no answer within {self.limit_s:.0f} s.")
        line = stdout.readline()
        if not line.endswith("\n"):
            raise TrainingError(f"The process '{self.name}' {_ended(self.process.wait())}. Its messages are above.")
        try:
            answer: dict[str, Any] = json.loads(line, parse_constant=_not_finite)
        except ValueError as error:
            raise TrainingError(f"'{self.name}' gave no answer that can be used ({error}): {line[:200]}") from None
        if "error" in answer:
            raise TrainingError(f"'{self.name}' failed: {answer['error']}")
        return answer


def _not_finite(constant: str) -> float:
    raise ValueError(f"a value is {constant}")


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    why = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by the signal {signal.Signals(-code).name}{why}"


def answer_turns(facts: dict[str, Any], do: Callable[[int], dict[str, Any]], out: IO[str] | None = None) -> None:
    """Child side: print `facts`, then answer every turn with `do(steps)` until standard input ends. `out`: default sys.stdout."""
    print(json.dumps(facts), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(do(int(line))), file=out, flush=True)


@contextmanager
def reserved_stdout() -> Iterator[IO[str]]:
    """Child side: a file for the answers, on what was standard output; whatever else is printed there goes to standard error.

    Libraries print when they are imported. An exception inside the block is an answer, too: `{"error": ...}`.
    """
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            yield out
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]}), file=out, flush=True)
            raise


def play(
    takers: Sequence[TurnTaker], rounds: int, steps: int, warmup: int = 1,
    give_up: Callable[[TurnTaker, TrainingError], object] | None = None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Give turns for `warmup` + `rounds` rounds; returns name -> answers of all rounds, warm-up first.

    Args:
        give_up: called when a child fails, which is then left out, its answers too; by default the error is raised.
    """
    answers: dict[str, list[dict[str, Any]]] = {taker.name: [] for taker in takers}
    for index in range(warmup + rounds):
        playing = [taker for taker in takers if taker.name in answers]
        shift = index % max(1, len(playing))
        for taker in [*playing[shift:], *playing[:shift]]:
            try:
                answers[taker.name].append(taker.turn(steps))
            except TrainingError as error:
                if give_up is None:
                    raise
                give_up(taker, error)
                del answers[taker.name]
    return answers


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of the per-round ratios a / b."""
    return spread([x / y for x, y in zip(a, b, strict=True)])


def ratio_apart(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Ratio a / b of values that were not measured in the same rounds: of the medians, and the least and largest there can be."""
    return {"median": statistics.median(a) / statistics.median(b), "min": min(a) / max(b), "max": max(a) / min(b)}


def main(spec: str) -> None:
    """Build the training run of the specification and take turns training it; `tokens` exclude padding."""
    from lownibble.lora import count_parameters
    from lownibble.memory import usage
    from lownibble.training.events import Stepped
    from lownibble.training.making import prepare

    config = RunConfig(**json.loads(Path(spec).read_text()))
    trainer, baseline = prepare(config.with_options(train=config.train.with_options(output_dir=None, resume=False)))
    steps = enumerate(trainer.micro.steps())

    def do(count: int) -> dict[str, Any]:
        taken = [trainer.step(index, rows) for index, rows in islice(steps, count)]
        done = [step for step in taken if isinstance(step, Stepped)]
        if len(done) < len(taken):
            raise TrainingError("A step's loss or gradient was not finite, so it cannot be timed. Lower the learning rate.")
        return {
            "tokens": sum(s.tokens for s in done),
            "padded_tokens": sum(s.padded_tokens for s in done),
            "seconds": sum(s.seconds for s in done),
            "losses": [s.loss for s in done],
            "peak_bytes": usage.peak_bytes(trainer.device) - baseline,
            "digest": _digest(trainer.model),
        }

    with usage.kept_heap():  # as in a training run
        trainer.set_up()
        passes = trainer.passes
        facts = {
            "method": config.method, "compiled": passes.compiled, "compile_seconds": passes.compile_seconds,
            "trainable_parameters": count_parameters(trainer.model)[0],
        }  # fmt: skip
        answer_turns(facts, do)


def _digest(model: nn.Module) -> str:
    """SHA-256 of the bytes of all trained parameters."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            found.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1])
