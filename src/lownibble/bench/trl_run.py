"""TRL's SFTTrainer as a contender on real rows: `python -m lownibble.bench.trl_run SPEC.json padded|packed [LAYERS]`.

SPEC.json is the `RunConfig` that our own contenders get: same model, rows, batch size, length, rank, targets and learning rate.
PEFT on bitsandbytes' 4-bit layers, or on ours through the drop-in (LAYERS: lownibble or lownibble-int8), float32 (bfloat16 on
CUDA), loss on every token, otherwise SFTConfig's defaults except gradient checkpointing (on by default in TRL, and slower; ours
run without it too). Packing is TRL's `bfd`.

A turn is some optimiser steps of a single `train()` call, which waits in a callback during the others' turns. Time is measured
from the start of a step to its end, without tokenisation and collation, as for ours; tokens exclude padding.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lownibble.config import RunConfig
from lownibble.data import load as load_data
from lownibble.memory import usage
from lownibble.models import load_tokenizer, pick_device, pick_dtype, resolve


def quantization(layers: str, dtype: torch.dtype) -> Any:
    """The quantisation of a contender's layers: bitsandbytes', or ours through the drop-in."""
    from transformers import BitsAndBytesConfig

    from lownibble.integrations.transformers import NF4Config

    name, _, compute = layers.partition("-")
    if name == "lownibble":
        return NF4Config(compute=compute or "auto")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def turns(device: torch.device, begin: Callable[[], object], answer: Callable[[int, float], object]) -> Any:
    """A callback of transformers' Trainer that waits for turns on standard input, and ends the process with it.

    Args:
        begin: called before a turn's first step. answer: called after its last with its number of steps and their seconds.
    """
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        left, steps, seconds, began = 0, 0, 0.0, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self.left == 0:
                line = sys.stdin.readline()
                if not line:
                    sys.exit(0)
                self.left = self.steps = int(line)
                self.seconds = 0.0
                begin()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.seconds += time.perf_counter() - self.began
            self.left -= 1
            if self.left == 0:
                answer(self.steps, self.seconds)

    return Turns()


def main(spec: str, packing: bool, layers: str = "bitsandbytes") -> None:
    """Build the trainer and take turns until standard input ends."""
    import peft
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config = RunConfig(**json.loads(Path(spec).read_text()))
    rows = [{"messages": row.fields["messages"]} for row in load_data(config.data)[0].rows]
    source, device = resolve(config.model), pick_device()
    dtype = pick_dtype("auto", device)
    usage.reset_peak(device)
    baseline = usage.used_bytes(device)
    how = quantization(layers, dtype)
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, quantization_config=how, **placed)

    class Timed(SFTTrainer):  # type: ignore[misc]
        tokens = padded_tokens = 0

        def training_step(self, model: Any, inputs: Any, *arguments: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.padded_tokens += inputs["input_ids"].numel()
            self.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *arguments)

    def forget() -> None:
        trainer.tokens = trainer.padded_tokens = 0

    def answer(steps: int, seconds: float) -> None:
        peak = usage.peak_bytes(device) - baseline
        found = {"tokens": trainer.tokens, "padded_tokens": trainer.padded_tokens}
        print(json.dumps({**found, "seconds": seconds, "peak_bytes": peak}), flush=True)

    with TemporaryDirectory() as folder:
        trainer = Timed(
            model,
            args=SFTConfig(
                folder, per_device_train_batch_size=config.train.batch_size, max_length=config.train.max_length, packing=packing,
                learning_rate=config.train.learning_rate, num_train_epochs=1e6, gradient_checkpointing=False,
                bf16=dtype == torch.bfloat16, use_cpu=device.type == "cpu", disable_tqdm=True, logging_strategy="no",
                save_strategy="no", report_to="none",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(source),
            peft_config=peft.LoraConfig(
                r=config.lora.r, lora_alpha=int(config.lora.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[turns(device, forget, answer)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # standard output carries the answers
        print(json.dumps({"rows": len(rows)}), flush=True)
        trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "packed", *sys.argv[3:])
