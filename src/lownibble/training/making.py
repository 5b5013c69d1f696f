"""What a run is made of, by its configuration: rows, model with adapters, trainer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lownibble import stored
from lownibble.calibration import join_rows, row_length
from lownibble.config import PREFERENCE, DataConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import Dataset, Encoded, digest_of, sequences_of
from lownibble.data import load as load_data
from lownibble.data.inspect import SHORT_RUN, suggested_epochs, warnings_of
from lownibble.errors import ConfigError, ModelError
from lownibble.lora import add_lora, load_adapter, match_targets, read_config
from lownibble.lora.activated import activated, check_rows, warning_of_evaluation
from lownibble.lora.active import adapter_configs
from lownibble.lora.init import find
from lownibble.lora.merge_aware import check_adapter, facts_of, held_as
from lownibble.lora.portable import WEIGHTS_FILE
from lownibble.lora.provenance import base_facts
from lownibble.lora.variants import variant_of
from lownibble.memory import usage
from lownibble.models import compute, load, pick_device, resolve, skeleton
from lownibble.models.head import Head
from lownibble.models.info import info, pass_device
from lownibble.models.kept import KEPT
from lownibble.models.load import load_tokenizer
from lownibble.optim import warmup_steps
from lownibble.quant import QuantLinear
from lownibble.registry import OBJECTIVES
from lownibble.training.checkpoint import CHECKPOINTS, complete
from lownibble.training.distributed import ALONE, Ranks
from lownibble.training.loop import Trainer
from lownibble.training.microbatches import padding
from lownibble.training.objectives import Objective
from lownibble.training.sharding import Sharding
from lownibble.training.starts import decide

ROW_OPTIONS = ("prompt_template", "completion_template", "use_chat_template", "mask_prompt", "trained_turns", "overlength")
"""Options that decide what of a row is trained; a resumed run needs the same ones."""


def load_sides(data: DataConfig, config: TrainConfig) -> tuple[Dataset, Dataset]:
    """The rows of both splits, checked for the run's objective. Raises as `load` and `Objective.check_rows`."""
    sides, objective = load_data(data), OBJECTIVES[config.objective].of(config)
    for side in sides:
        objective.check_rows(side, data)
    return sides


def sharding_of(config: RunConfig, rows: Dataset, device: torch.device, ranks: Ranks) -> Sharding:
    """How the model is to be sharded while it is loaded. `rows`: the training rows, for starts that look at layers' inputs."""
    restored, start = ranks.from_first(lambda: _is_restored(config)), find(config.lora.init_lora_weights)
    if restored or not start.calibrated or config.adapter is not None or (config.method != "qlora" and start.corrects):
        return Sharding(ranks, device, config, restored=restored)

    def calibration(model: Any) -> torch.Tensor:
        tokenizer = load_tokenizer(resolve(config.model, config.revision))
        length = row_length(model, config.train.max_length)
        return calibration_rows(config, rows, tokenizer, config.data.calibration_tokens, length, config.train.seed)

    return Sharding(ranks, device, config, calibration=calibration)


def prepare(config: RunConfig) -> tuple[Trainer, int]:
    """The trainer of a run before `set_up`, and the bytes in use before its model was loaded; for measurements."""
    config, _ = decide(config)
    device = pick_device(config.device)
    sides = load_sides(config.data, config.train)
    usage.reset_peak(device)
    baseline = usage.used_bytes(device)
    model, tokenizer = make_model(config, sides[0])
    return make_trainer(model, tokenizer, sides, config.data, config.train)[0], baseline


def make_model(config: RunConfig, rows: Dataset, sharding: Sharding | None = None) -> tuple[Any, Any]:
    """Load the model and prepare it for the method; returns it and its tokenizer. `rows`: the training rows.

    Raises:
        TrainingError: out of memory. Also raises as `load` and `add_lora`.
    """
    with usage.oom_becomes_error(
        lambda: f"Memory ran out while '{config.model}' was loaded. Take --method qlora, or a smaller model."
    ):
        return _make(config, rows, sharding)


def _make(config: RunConfig, rows: Dataset, sharding: Sharding | None) -> tuple[Any, Any]:
    quant = None if config.method != "qlora" else _held_quant(config) if config.merge_aware else config.quant
    # in full fine-tuning an update is often smaller than bfloat16 can resolve
    dtype = "float32" if config.method == "full" and config.dtype == "auto" else config.dtype
    model, tokenizer = load(
        config.model, quant=quant, dtype=dtype, device=config.device, revision=config.revision, by_layer=sharding
    )  # fmt: skip
    packed = any(isinstance(module, QuantLinear) for module in model.modules())
    if packed and config.method != "qlora":
        raise ModelError(f"'{config.model}' holds quantised weights. Train it with --method qlora, or give a dense checkpoint.")
    info(model).merge_aware = config.quant if config.merge_aware else None
    if config.adapter is not None and sharding is None:
        load_adapter(model, config.adapter, trainable=True)
        weights = Path(config.adapter).expanduser() / WEIGHTS_FILE
        with weights.open("rb") as file:
            info(model).started_from = hashlib.file_digest(file, "sha256").hexdigest()
    elif config.method != "full" and sharding is None:
        restored = _is_restored(config)
        ids = None if restored else _calibration(config, rows, model, tokenizer)
        add_lora(model, config.lora, seed=config.train.seed, calibration=ids, restored=restored)
    elif config.method == "full":
        model.requires_grad_(True)
        if pass_device(model).type == "cuda" and config.dtype == "auto":
            info(model).autocast = torch.bfloat16
    usage.settle(pass_device(model))  # frees temporaries of loading and quantising
    return model, tokenizer


def _calibration(config: RunConfig, rows: Dataset, model: Any, tokenizer: Any) -> torch.Tensor | None:
    """Training rows for an initialisation that looks at layers' inputs, joined, as token ids (rows, tokens); None for others."""
    if not find(config.lora.init_lora_weights).calibrated:
        return None
    length = row_length(model, config.train.max_length)
    return calibration_rows(config, rows, tokenizer, config.data.calibration_tokens, length, config.train.seed)


def calibration_rows(config: RunConfig, rows: Dataset, tokenizer: Any, n_tokens: int, length: int, seed: int) -> torch.Tensor:
    """Rows as the run would train on them, joined: token ids (rows, tokens) of about `n_tokens` tokens.

    Raises:
        DataError: there are too few.
    """
    order = torch.randperm(len(rows.rows), generator=torch.Generator().manual_seed(seed)).tolist()
    some = replace(rows, rows=[rows.rows[i] for i in order[: n_tokens // 4]])  # not all are needed
    longest = n_tokens if config.data.overlength == "cut" else config.train.max_length  # joined first, cut then
    encoded = OBJECTIVES[config.train.objective].of(config.train).encode(some, tokenizer, config.data, longest)
    return join_rows([ids for example in encoded.examples for ids, _ in sequences_of(example)], n_tokens, length, seed)


def _is_restored(config: RunConfig) -> bool:
    """Whether A and B come from a checkpoint, so that an initialisation that leaves the base alone need not be repeated."""
    train = config.train
    there = train.resume and train.output_dir is not None and complete(Path(train.output_dir) / CHECKPOINTS)
    fresh = config.train.objective in PREFERENCE  # whose reference is the model as it begins
    return bool(there) and find(config.lora.init_lora_weights).keeps_base and not fresh


def _held_quant(config: RunConfig) -> QuantConfig:
    """How a merge-aware run packs its base; see `merge_aware.held_as`.

    Raises:
        ModelError: the checkpoint stores its weights quantised.
    """
    source = resolve(config.model, config.revision)
    if how := stored.of_folder(source.folder):
        raise ModelError(
            f"'{config.model}' is stored quantised, as {stored.title(how) or stored.method(how)}; merge-aware training rounds "
            "dense weights. Give the checkpoint that it was made from, or train without --merge-aware."
        )
    empty = skeleton(source, torch.float32)
    lora = config.lora if config.adapter is None else read_config(config.adapter)
    check_adapter(lora, variant_of(lora))
    return held_as(empty, config.quant, match_targets(empty, lora, of_file=config.adapter is not None))


def make_trainer(
    model: Any, tokenizer: Any, sides: tuple[Dataset, Dataset], data: DataConfig, config: TrainConfig, ranks: Ranks = ALONE
) -> tuple[Trainer, list[Encoded]]:
    """The trainer over the rows of both splits, and the encoded rows."""
    KEPT.pop(model, None)
    objective: Objective = OBJECTIVES[config.objective].of(config)
    encoded = [objective.encode(side, tokenizer, data, config.max_length) for side in sides]
    objective.check(model, encoded, data)
    compute.decide(model, training=True)
    identity = {
        "data": {"train": sides[0].digest, "eval": sides[1].digest},
        "rows": {key: getattr(data, key) for key in ROW_OPTIONS},
        "tokens": digest_of(encoded),
        **_subject(model),
    }
    trainer = Trainer(
        model, tokenizer, encoded[0].examples, encoded[1].examples, config,
        choices=objective.choices(*sides, tokenizer, data, config.max_length), cut_rows=encoded[0].n_cut,
        identity=identity, ranks=ranks,
    )  # fmt: skip
    if (variant := activated(model)) is not None:
        trainer.warnings += _warnings_of_invocation(variant.tokens, tokenizer, encoded)
    trainer.warnings += warnings_of(encoded, tokenizer, config.max_length)
    if epochs := suggested_epochs(rows := len(encoded[0].examples), config):
        trainer.warnings.append(SHORT_RUN.format(rows, epochs))
    if 0 < trainer.total_steps <= warmup_steps(trainer.total_steps, config.warmup_ratio):
        trainer.warnings.append(ONLY_WARM_UP)
    return trainer, encoded


ONLY_WARM_UP = (
    "every step is one of the warm-up, whose first has a learning rate of 0: set warmup_ratio = 0, or train for more steps"
)


def _warnings_of_invocation(tokens: tuple[int, ...], tokenizer: Any, encoded: list[Encoded]) -> list[str]:
    """Warnings about rows, for an activated adapter.

    Raises:
        ConfigError: padding could be the invocation's end. DataError: no training row has the invocation.
    """
    if tokens[-1] == padding(tokenizer):
        raise ConfigError(
            f"alora_invocation_tokens ends with {tokens[-1]}, which is the token that rows are padded with. End it with another "
            "one, or give the tokenizer another pad_token."
        )
    training, evaluation = ([each for example in side.examples for each in sequences_of(example)] for side in encoded)
    without = warning_of_evaluation(tokens, [ids for ids, _ in evaluation])
    return check_rows(tokens, training) + ([without] if without else [])


def _subject(model: Any) -> dict[str, Any]:
    """Model identity that must match on resume, and dtype and matmul precision, which may differ on another machine."""
    quantized, leaves = [m for m in model.modules() if isinstance(m, QuantLinear)], info(model).merge_aware
    facts = base_facts(model)
    packed = facts["quant"] or {}
    return {
        "base": getattr(model.config, "_name_or_path", ""),
        "weights": facts["digest"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "lora": {name: config.to_dict() for name, config in adapter_configs(model).items()},
        "quant": sorted({m.codec for m in quantized}),
        "double_quant": packed.get("double_quant"),
        "skip_modules": packed.get("skip_modules"),
        "pattern": json.dumps(packed.get("pattern", {}), sort_keys=True),
        "compute": ", ".join(sorted({m.compute for m in quantized})),
        "head_compute": Head(model).compute,
        "started_from": info(model).started_from,
        **({"merge_aware": facts_of(leaves)} if leaves else {}),
    }
