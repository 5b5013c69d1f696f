"""`lownibble bench train`: the training step of LoRA and QLoRA, next to PEFT and PEFT + bitsandbytes.

Each contender lives in its own process (`contender.py`) and they take turns: a round is one turn of each, in an order that
rotates. A ratio is taken within a round, so that both of its sides saw the same machine; the record gives the median over
rounds and the spread. The first round warms up and is not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from typing import IO, Any

from lownibble.errors import BackendError

OURS, PEERS = ("lora", "qlora"), ("peft_lora", "peft_bnb_qlora")
RATIOS = (("qlora", "lora"), ("lora", "peft_lora"), ("qlora", "peft_bnb_qlora"), ("qlora", "peft_lora"))


class _Contender:
    """A contender's process, and its figures."""

    def __init__(self, name: str, batch_size: int, length: int) -> None:
        command = [sys.executable, "-m", "lownibble.bench.contender", name, str(batch_size), str(length)]
        self.name, self.rates, self.losses = name, list[float](), list[float]()
        self.tokens_a_step = batch_size * length
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        stdout: IO[str] = self.process.stdout  # type: ignore[assignment]
        line = stdout.readline()
        if not line:
            raise BackendError(f"The contender '{self.name}' ended with exit code {self.process.wait()}. Its messages are above.")
        return json.loads(line)  # type: ignore[no-any-return]

    def turn(self, steps: int, counted: bool) -> None:
        """Do some steps; keep the round's rate if it counts."""
        stdin: IO[str] = self.process.stdin  # type: ignore[assignment]
        stdin.write(f"{steps}\n")
        stdin.flush()
        answer = self._answer()
        self.losses += answer["losses"]
        self.facts["train_peak_bytes"] = answer["train_peak_bytes"]
        if counted:
            self.rates.append(self.tokens_a_step * steps / sum(answer["seconds"]))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def bench_train(
    *, peers: bool = False, repeats: int = 5, steps: int = 2, batch_size: int = 4, length: int = 256
) -> dict[str, Any]:
    """Measure training steps of `batch_size` x `length` tokens, all of them labels, on the embedded model.

    Args:
        peers: measure PEFT and PEFT + bitsandbytes too (they must be installed).
        repeats: counted rounds, of `steps` steps a contender.
    Raises:
        BackendError: a contender's process failed.
    """
    names = OURS + (PEERS if peers else ())
    with ExitStack() as stack:
        contenders = []
        for name in names:
            contenders.append(_Contender(name, batch_size, length))
            stack.callback(contenders[-1].close)
            print(f"bench train: {name} is ready", file=sys.stderr)
        for round_index in range(repeats + 1):
            shift = round_index % len(contenders)
            for contender in contenders[shift:] + contenders[:shift]:
                contender.turn(steps, counted=round_index > 0)
            print(f"bench train: round {round_index} of {repeats} done", file=sys.stderr)
    by_name = {c.name: c for c in contenders}
    ratios = {
        f"{a}_vs_{b}": _spread([x / y for x, y in zip(by_name[a].rates, by_name[b].rates, strict=True)])
        for a, b in RATIOS if a in by_name and b in by_name
    }  # fmt: skip
    figures = {
        c.name: {
            "tokens_per_s": _spread(c.rates),
            "peak_bytes": max(c.facts["train_peak_bytes"], c.facts["load_peak_bytes"]),
            **c.facts,
            "losses": c.losses,
        }
        for c in contenders
    }
    workload = {"model": "demo", "batch_size": batch_size, "length": length, "r": 16, "targets": "all-linear", "rounds": repeats}
    headlines = {f"{n}: tokens/s": f["tokens_per_s"]["median"] for n, f in figures.items()}
    headlines |= {f"{n}: peak GiB": f["peak_bytes"] / 2**30 for n, f in figures.items()}
    headlines |= {f"{n} (tokens/s)": r["median"] for n, r in ratios.items()}
    return {"workload": {**workload, "steps_per_round": steps}, "contenders": figures, "ratios": ratios, "headlines": headlines}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
