"""Lownibble's contenders of the training benchmark, each in a process: `python -m lownibble.bench.contender NAME MODEL B T`.

They are what `lownibble train` does with default flags in a long run: its `Trainer`, so its attention, compiled layers (where
`torch_compile='auto'` compiles), gradient clipping, optimiser, and smaller microbatches where memory runs out (`max_tokens`).
Only the learning rate is constant, and compute is stated. See `steps.py` for what is measured.
"""

from __future__ import annotations

import sys
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lownibble.bench.steps import ALPHA, CLIP, LEARNING_RATE, Built, R, take_turns
from lownibble.config import LoraConfig, QuantConfig, TrainConfig
from lownibble.data import Example
from lownibble.errors import TrainingError
from lownibble.lora import add_lora
from lownibble.measuring.turns import reserved_stdout
from lownibble.memory import usage
from lownibble.models import load
from lownibble.training.events import Stepped
from lownibble.training.loop import Trainer

LONG = 10_000
"""Optimiser steps of the run that is begun: on any model of use, long enough for compiling to pay."""


class Ours(NamedTuple):
    """How a contender is trained; `compute` is None with a dense base."""

    compute: Literal["exact", "int8", "fp8"] | None
    torch_compile: bool | Literal["auto"] = "auto"


CONTENDERS = {
    "lora": Ours(None), "qlora": Ours("exact"), "qlora_again": Ours("exact"),
    "qlora_int8": Ours("int8"), "qlora_fp8": Ours("fp8"),
    "lora_eager": Ours(None, torch_compile=False), "qlora_eager": Ours("exact", torch_compile=False),
    "qlora_int8_eager": Ours("int8", torch_compile=False),
}  # fmt: skip
"""Name -> how it is trained. `qlora_again` is `qlora` once more, at the end: the difference is the machine's drift."""


def build(name: str, model: str, ids_NBT: Tensor) -> Built:
    """The contender `name`; its first step compiles."""
    how = CONTENDERS[name]
    N, B, T = ids_NBT.shape
    batches = [[Example(row, [True] * T, "bench") for row in batch] for batch in ids_NBT.tolist()]
    loaded, tokenizer = load(model, quant=QuantConfig(compute=how.compute) if how.compute else None)
    add_lora(loaded, LoraConfig(r=R, lora_alpha=ALPHA))
    config = TrainConfig(
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_ratio=0.0, max_grad_norm=CLIP, batch_size=B,
        max_length=T, max_steps=LONG, torch_compile=how.torch_compile,
    )  # fmt: skip
    trainer = Trainer(loaded, tokenizer, [row for batch in batches for row in batch], batches[0][:1], config)

    def step(number: int) -> float:
        if number == 0:
            trainer.set_up()
        taken = trainer.step(number, [batches[number % N]])
        if not isinstance(taken, Stepped):
            raise TrainingError(f"The step cannot be timed: {taken.reason}")
        return taken.loss

    def facts() -> dict[str, Any]:
        passes = trainer.passes
        return {
            "compute": how.compute or "dense", "compiled": passes.compiled, "compile_reason": passes.compile_reason,
            "compile_seconds": passes.compile_seconds, "max_tokens": trainer.micro.max_tokens,
            "cuda_graphs": passes.graph_reason if passes.graphs is None else passes.graphs.obstacle or len(passes.graphs),
        }  # fmt: skip

    return Built(step, loaded, facts)


def main(name: str, model: str, batch_size: int, length: int) -> None:
    """Build the contender `name` and take turns until standard input ends."""
    with reserved_stdout() as out, usage.kept_heap():  # the heap setting of a run
        take_turns(lambda *work: build(name, *work), model, batch_size, length, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
