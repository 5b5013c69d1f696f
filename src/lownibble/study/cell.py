"""One job of a study in a separate process: `python -m lownibble.study.cell`.

The first line of standard input is the job (sent by `jobs.py`); the record is written to the file that it names. The process
exits when standard input closes: its parent has then ended or been killed. A cell on several ranks trains on all of them; the
first one scores it, with the others only if they hold parts of the model.

A record separates what the configuration determines (`result`: reproducible on the same machine) from what depends on the
machine (`measured`: time and memory).
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import ExitStack
from typing import Any

from lownibble import launch
from lownibble.config import RunConfig
from lownibble.errors import LownibbleError, TrainingError
from lownibble.study.bases import pack
from lownibble.study.processes import end_with_standard_input


def _with_its_rate(config: RunConfig) -> RunConfig:
    """The run with the study's learning rate as if it were given, so that a start of 'auto' takes no other."""
    changed: RunConfig = config.with_options(train=config.train.with_options(learning_rate=config.train.learning_rate))
    return changed


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """Train a cell's run, and score it; returns the record.

    Raises:
        LownibbleError: as `run` and `answer_rows`, or an evaluation loss is not finite.
    """
    from lownibble import record
    from lownibble.data import load
    from lownibble.memory.usage import kept_heap
    from lownibble.models import pick_device
    from lownibble.study.answers import answer_rows
    from lownibble.study.devices import memory_of
    from lownibble.training import run
    from lownibble.training.distributed import joined, local_device

    started, answered = time.perf_counter(), {}
    config = _with_its_rate(RunConfig(**spec["config"]))
    with ExitStack() as group:
        group.enter_context(joined(config.train, pick_device(local_device(config.device)), lambda _: "ddp"))
        with kept_heap():
            trained = run(config)
        told = trained.record
        sharded = told.get("parallel", {}).get("mode") == "fsdp"
        wrong = next((e for e in told["evaluations"] if not math.isfinite(e["loss"])), None)
        if wrong is not None:
            raise TrainingError(f"The evaluation loss at step {wrong['step']} is {wrong['loss']}. Lower the learning rate.")
        trained_s = time.perf_counter() - started
        if not sharded:
            group.close()
        if not spec["tuning"] and (sharded or launch.rank() == 0):
            answered = answer_rows(
                trained.model, trained.tokenizer, spec["kind"], config.data, config.train.max_length, load(config.data)[1]
            )
        answered_s = time.perf_counter() - started - trained_s
    first, last = told["evaluations"][0], told["evaluations"][-1]
    result: dict[str, Any] = {
        "losses": trained.losses,
        "skipped": len(told["skipped"]),
        "evaluations": [{name: e[name] for name in ("step", "loss", "scores")} for e in told["evaluations"]],
        "label_tokens": last["label_tokens"],
        "scores_before": _with_perplexity(first),
        "scores": _with_perplexity(last),
        **({"start": told["config"]["lora"]["init_lora_weights"]} if config.lora.init_lora_weights == "auto" else {}),
        "row_scores": {"accuracy": [float(right) for right in last["correct"]]} if last["correct"] else {},
    }
    result |= answered
    if not spec["tuning"]:
        result["scores"] |= {name: math.fsum(rows) / len(rows) for name, rows in result["row_scores"].items()}
    return {
        **record.new("study-cell"),
        "status": "ok",
        **{name: told[name] for name in ("environment", "data", "model")},
        "result": result,
        "measured": {
            "memory": memory_of(told),
            **({"parallel": told["parallel"]} if "parallel" in told else {}),
            "speed": told["speed"],
            "step_seconds": [step["seconds"] for step in told["steps"]],
            "training_s": told["seconds"],
            "seconds": trained_s + answered_s,
            "answers_s": answered_s,
            "warnings": told["warnings"],
        },
    }


def take_turns(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure the interleaved speed of several methods, each in its own process; returns the record."""
    from lownibble import record
    from lownibble.study.paired import paired_speed

    configs = {name: RunConfig(**config) for name, config in spec["configs"].items()}
    try:
        found = paired_speed(configs, spec["peaks"])
    except (TrainingError, BrokenPipeError) as error:
        found = {"skipped": str(error)}
    return {**record.new("study-speed"), "status": "ok", "environment": record.environment(), **found}


WORK = {"cell": work, "speed": take_turns, "base": pack}


def _with_perplexity(evaluation: dict[str, Any]) -> dict[str, float]:
    return {**evaluation["scores"], "loss": evaluation["loss"], "perplexity": math.exp(min(evaluation["loss"], 50))}


def main() -> int:
    """Run the job given on standard input; returns the exit code."""
    spec = json.loads(sys.stdin.readline())
    end_with_standard_input()
    from lownibble import record

    try:
        found = WORK[spec["job"]](spec)
    except Exception as error:  # every failure is a recorded result; the study continues
        if not isinstance(error, LownibbleError):
            import traceback

            traceback.print_exc()
        found = {**record.new(f"study-{spec['job']}"), "status": "failed", "error": f"{type(error).__name__}: {error}"}
        found["environment"] = record.environment()
    record.write(spec["record"], found)
    return 0 if found["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
