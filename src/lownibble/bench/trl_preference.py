"""TRL's DPOTrainer, ORPOTrainer or KTOTrainer as a contender: `python -m lownibble.bench.trl_preference SPEC.json [precomputed]`.

SPEC.json is the `RunConfig` that our own contender gets: same model, rows in the same order, batch size, length, rank, targets
and learning rate. PEFT's LoRA on the dense model (method lora) or on bitsandbytes' 4-bit layers, otherwise the trainers' defaults
but for gradient checkpointing (on by default in TRL, and slower; ours run without it too). `precomputed`: with
precompute_ref_log_probs.

Turns and what is timed: as in `trl_run.py`. An answer has the losses of its steps, too.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lownibble.bench.trl_run import quantization, turns
from lownibble.config import RunConfig
from lownibble.data import epoch_batches
from lownibble.data import load as load_data
from lownibble.measuring.turns import reserved_stdout
from lownibble.memory import usage
from lownibble.models import load_tokenizer, pick_device, pick_dtype, resolve


def classes(objective: str) -> tuple[Any, Any]:
    """TRL's configuration and trainer of an objective; ORPO's have moved."""
    import trl

    if objective == "orpo":
        from trl.experimental import orpo

        return orpo.ORPOConfig, orpo.ORPOTrainer
    return getattr(trl, f"{objective.upper()}Config"), getattr(trl, f"{objective.upper()}Trainer")


def main(spec: str, out: Any, *, precomputed: bool) -> None:
    """Build the trainer and take turns until standard input ends; answers go to `out`."""
    import peft
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    config = RunConfig(**json.loads(Path(spec).read_text()))
    train, given = config.train, load_data(config.data)[0].rows
    order = epoch_batches(given, train.batch_size, train.seed, 0)  # type: ignore[arg-type]  # rows are only counted
    rows = [given[i].fields for batch in order for i in batch]
    source, device = resolve(config.model), pick_device()
    dtype = pick_dtype("auto", device)
    usage.reset_peak(device)
    baseline = usage.used_bytes(device)
    placed: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if config.method == "qlora":
        placed["quantization_config"] = quantization("bitsandbytes", dtype)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, **placed)

    losses: list[torch.Tensor] = []

    def answer(steps: int, seconds: float) -> None:
        found = {
            "seconds": seconds,
            "losses": [float(loss) for loss in losses],
            "peak_bytes": usage.peak_bytes(device) - baseline,
        }
        print(json.dumps(found), file=out, flush=True)

    arguments, trainer_class = classes(train.objective)

    class Told(trainer_class):  # type: ignore[misc,valid-type]
        def training_step(self, *given: Any, **named: Any) -> Any:
            losses.append(super().training_step(*given, **named).detach())
            return losses[-1]

    with TemporaryDirectory() as folder:
        trainer = Told(
            model=model,
            args=arguments(
                output_dir=folder, per_device_train_batch_size=train.batch_size, max_length=train.max_length,
                learning_rate=train.learning_rate, num_train_epochs=1e6, gradient_checkpointing=False,
                bf16=dtype == torch.bfloat16, use_cpu=device.type == "cpu", disable_tqdm=True, logging_strategy="no",
                save_strategy="no", report_to="none", train_sampling_strategy="sequential",
                **({"precompute_ref_log_probs": True} if precomputed else {}),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(source),
            peft_config=peft.LoraConfig(
                r=config.lora.r, lora_alpha=int(config.lora.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[turns(device, losses.clear, answer)],
        )  # fmt: skip
        print(json.dumps({"rows": len(rows)}), file=out, flush=True)
        trainer.train()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with reserved_stdout() as answers:
        main(sys.argv[1], answers, precomputed="precomputed" in sys.argv[2:])
