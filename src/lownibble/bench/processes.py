"""Contenders in processes of their own: all at once by turns, or one after another where a device does not hold them all.

On a CPU they take turns (`measuring/turns.py`): ratios are taken within a round, so drift of the machine cancels out. On CUDA
contenders do not all fit into the device's memory, so each runs alone, and the range of a ratio is the widest that the rounds of
its two contenders allow. There a contender that fails is recorded with its error, as peers are everywhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from lownibble.errors import TrainingError
from lownibble.measuring.turns import TurnTaker, play

GRACE_S = 10.0
"""Seconds in which a process must end after it was asked to (SIGTERM), before it is killed."""
ANSWER_S = 150.0
"""Seconds in which a contender that runs alone must be set up, and do a turn: one that hangs leaves time for others."""

Save = Callable[[dict[str, Any]], object]
"""Called with a benchmark's record as far as it is measured."""


class Command(NamedTuple):
    """A contender's program, its arguments, and whether the benchmark goes on where it fails, by turns too."""

    module: str
    arguments: tuple[str, ...] = ()
    may_fail: bool = False


class Measured(NamedTuple):
    """By contender: its facts, its answers of all rounds (warm-up first), or the error that it failed with."""

    facts: dict[str, dict[str, Any]]
    answers: dict[str, list[dict[str, Any]]]
    failed: dict[str, str]


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that has a session of its own, and all that it has started."""
    for number, patience in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nothing of its group is left
            process.wait()
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def in_turns(commands: dict[str, Command], repeats: int, steps: int) -> Measured:
    """All contenders at once. One that may fail is left out if it does, while it is set up or in its turns.

    Raises:
        TrainingError: another one failed.
    """
    failed: dict[str, str] = {}

    def give_up(taker: TurnTaker, error: TrainingError) -> None:
        if not commands[taker.name].may_fail:
            raise error
        failed[taker.name] = _told(error)

    with ExitStack() as stack:
        takers = []
        for name, command in commands.items():  # sequentially, so that loading does not disturb another's memory figures
            taker = stack.enter_context(TurnTaker(name, command.module, *command.arguments))
            try:
                taker.ready()
            except TrainingError as error:
                give_up(taker, error)
            else:
                takers.append(taker)
                print(f"bench: {name} is ready", file=sys.stderr)
        answers = play(takers, repeats, steps, give_up=give_up)
    return Measured({taker.name: taker.facts for taker in takers if taker.name in answers}, answers, failed)


def one_after_another(
    commands: dict[str, Command], repeats: int, steps: int, tell: Callable[[Measured], object]
) -> Measured:  # fmt: skip
    """One contender at a time; one that fails is left out. `tell` gets what is measured so far, after each."""
    found = Measured({}, {}, {})
    for name, command in commands.items():
        try:
            with TurnTaker(name, command.module, *command.arguments, limit_s=ANSWER_S) as taker:
                taker.ready()
                found.answers[name] = play([taker], repeats, steps)[name]
        except TrainingError as error:
            found.failed[name] = _told(error)
        else:
            found.facts[name] = taker.facts
            print(f"bench: {name} is measured", file=sys.stderr)
        tell(found)
    return found


def _told(error: TrainingError) -> str:
    print(f"bench: {error}", file=sys.stderr)
    return str(error)
