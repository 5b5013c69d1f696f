"""`lownibble eval`: the scores of one model on one task, or on standard tasks through lm-eval.

Scores by row come with their standard error over the rows, which measures the sampling of rows. (A study measures the variation
over training seeds.)
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lownibble import record
from lownibble.config import DataConfig, EvalConfig, QuantConfig
from lownibble.data import choices, end_tokens
from lownibble.errors import ConfigError, InputError, TrainingError
from lownibble.lora import load_adapter
from lownibble.lora.activated import activated, warning_of_evaluation
from lownibble.measuring import stats
from lownibble.models import load as load_model
from lownibble.study.answers import answer_rows
from lownibble.study.contents import check_rows, load_rows
from lownibble.study.tasks import KINDS, check_kind, with_templates
from lownibble.training.evaluate import Evaluator
from lownibble.training.microbatches import collator
from lownibble.training.objectives import check_positions, check_tokens

Scores = dict[str, dict[str, Any]]


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Load the model and score it; returns the record.

    Raises:
        InputError: the model, adapter, rows or task cannot be used.
        TrainingError: the evaluation loss is not finite.
    """
    if (config.task is None) == (not config.harness):
        raise ConfigError("Give either --task (with --data) or --harness, one of them.")
    unused = {
        "limit": config.task and config.limit, "num_fewshot": config.task and config.num_fewshot is not None,
        "harness_path": config.task and config.harness_path, "data": config.harness and config.data != DataConfig(),
        "quant": not config.quantized and config.quant != QuantConfig(), "any_base": config.adapter is None and config.any_base,
    }  # fmt: skip
    for name in (name for name, given in unused.items() if given):
        needs = {"quant": "without --quantized", "any_base": "without --adapter"}
        with_what = needs.get(name, "with --task" if config.task else "with --harness")
        raise ConfigError(f"The '{name}' of EvalConfig makes no difference {with_what}. Leave it out.")
    if config.task is not None:
        check_kind(config.task)
    run_harness = _harness(config) if config.harness else None
    model, tokenizer = load_model(
        config.model, quant=config.quant if config.quantized else None, dtype=config.dtype, device=config.device,
        revision=config.revision,
    )  # fmt: skip
    if config.adapter is not None:
        load_adapter(model, config.adapter, any_base=config.any_base)
    found = run_harness(model, tokenizer) if run_harness else _task(config, model, tokenizer)
    return {
        **record.new("eval"),
        "status": "ok",
        "config": config.to_dict(),
        "environment": record.environment(model.device),
        **found,
    }


def _task(config: EvalConfig, model: Any, tokenizer: Any) -> dict[str, Any]:
    kind = str(config.task)
    data, length = with_templates(kind, config.data), config.train.max_length
    if Path(data.path).expanduser().is_file() and data.eval_path is None:
        data = data.with_options(eval_path=data.path)  # all rows of a single file are scored
    sides = load_rows(kind, kind, data)
    encoded, rows = check_rows(kind, kind, sides, tokenizer, data, length), sides[1]
    asked = choices(*sides, tokenizer, data, length) if KINDS[kind].scored_by == "likelihood" else None
    check_tokens(model, [encoded])
    check_positions(model, [encoded])
    evaluator = Evaluator(encoded.examples, asked, collator(model, tokenizer), config.train.batch_size, model.device)
    variant = activated(model)
    without = "" if variant is None else warning_of_evaluation(variant.tokens, [e.input_ids for e in evaluator.examples])
    evaluated = evaluator(model)
    if not math.isfinite(evaluated.loss):
        raise TrainingError(f"The evaluation loss is {evaluated.loss}. Take --dtype float32, or look at the adapter.")
    scores: Scores = {"loss": _score(evaluated.loss), "perplexity": _score(math.exp(min(evaluated.loss, 50)))}
    by_row: dict[str, Sequence[float]] = {"accuracy": [float(right) for right in evaluated.correct]} if evaluated.correct else {}
    scores |= {name: _score(value) for name, value in evaluated.scores.items()}
    answered = answer_rows(model, tokenizer, kind, data, length, rows)
    by_row |= answered.get("row_scores", {})
    for name, values in by_row.items():
        scores[name] = _score(math.fsum(values) / len(values), stats.standard_error(values), len(values))
    return {
        "data": {"name": rows.name, "rows": len(rows.rows), "digest": rows.digest, "label_tokens": evaluated.label_tokens},
        "scores": {kind: scores}, "row_scores": by_row, "answers": answered.get("answers", []), **evaluator.facts(),
        **({"warnings": [without]} if without else {}),
    }  # fmt: skip


def _score(value: float | None, error: float | None = None, rows: int | None = None) -> dict[str, Any]:
    return {"value": value, "standard_error": error, "rows": rows}


def _harness(config: EvalConfig) -> Any:
    """A function that runs lm-eval's tasks on a model; task names are checked before a model is loaded.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("--harness needs lm-eval. Install it: pip install 'lownibble[harness]'.") from None
    manager = TaskManager(include_path=config.harness_path)
    unknown = [name for name in config.harness if name not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else " See 'lm-eval ls tasks'."
        raise ConfigError(f"lm-eval has no task '{unknown[0]}'.{hint}")

    def run(model: Any, tokenizer: Any) -> dict[str, Any]:
        kind = "seq2seq" if model.config.is_encoder_decoder else "causal"
        model.generation_config.eos_token_id = sorted(end_tokens(model, tokenizer)) or None
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend=kind, batch_size=config.train.batch_size)
        try:
            found = simple_evaluate(
                wrapped, tasks=list(config.harness), num_fewshot=config.num_fewshot, limit=config.limit, task_manager=manager,
                log_samples=False,
            )  # fmt: skip
        except (OSError, ImportError, ValueError) as error:
            raise InputError(f"lm-eval could not run {', '.join(config.harness)}: {error}") from error
        return {"scores": {task: _figures(task, found) for task in found["results"]}, "versions": found.get("versions", {})}

    return run


def _figures(task: str, found: dict[str, Any]) -> Scores:
    """Convert lm-eval's 'acc,none' and 'acc_stderr,none' to scores; a figure that is not finite, such as a perplexity of many
    words, has the value None, since records are JSON."""
    values = found["results"][task]
    rows = found.get("n-samples", {}).get(task, {}).get("effective")
    scores: Scores = {}
    for key, value in values.items():
        name, _, variant = key.partition(",")
        if isinstance(value, int | float) and variant and not name.endswith("_stderr"):
            error = values.get(f"{name}_stderr,{variant}")
            known = isinstance(error, int | float) and math.isfinite(error)
            finite = float(value) if math.isfinite(value) else None
            scores[name if variant == "none" else key] = _score(finite, float(error) if known else None, rows)
    return scores
