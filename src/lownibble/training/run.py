"""A complete run: data, training loop, adapter, record.

`train` takes a model from the caller; `run` creates it from a `RunConfig`. Both write the same files (see `output.py`) and return
the same result.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lownibble import launch, record, stored
from lownibble.calibration import join_rows, row_length
from lownibble.config import PREFERENCE, DataConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.data import Choice, Dataset, Encoded, Example, digest_of, sequences_of
from lownibble.data import load as load_data
from lownibble.data.inspect import warnings_of
from lownibble.errors import ModelError, OutputError
from lownibble.lora import add_lora, load_adapter, match_targets, read_config, save_adapter
from lownibble.lora.active import adapter_configs
from lownibble.lora.init import find
from lownibble.lora.merge_aware import check_adapter, facts_of, held_as
from lownibble.lora.portable import WEIGHTS_FILE
from lownibble.lora.variants import variant_of
from lownibble.memory import planned, usage
from lownibble.models import compute, load, pick_device, resolve, skeleton
from lownibble.models.head import Head
from lownibble.models.info import info
from lownibble.models.load import load_tokenizer
from lownibble.quant import QuantLinear
from lownibble.registry import OBJECTIVES
from lownibble.training import facts, interrupt, verify
from lownibble.training.checkpoint import CHECKPOINTS, complete, flat
from lownibble.training.distributed import ALONE, Ranks, code_facts, joined, local_device
from lownibble.training.events import Evaluated, Finished, Skipped, Stepped, Warned
from lownibble.training.loop import Trainer
from lownibble.training.objectives import Objective
from lownibble.training.output import began, begin, claim, stop, stopped
from lownibble.training.sharding import Sharding, gathered, mode_of, rest_gathered
from lownibble.training.sharding import check as check_sharded
from lownibble.training.sinks import JsonlSink, Sink, deliver, read_events
from lownibble.training.starts import decide
from lownibble.training.trackers import Trackers
from lownibble.training.trackers import check as check_trackers

ROW_OPTIONS = ("prompt_template", "completion_template", "use_chat_template", "mask_prompt", "trained_turns", "overlength")
"""Options that decide what of a row is trained; a resumed run needs the same ones."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a run: the trained model, its record, and the adapter's folder (None without output folder or adapter)."""

    model: Any
    tokenizer: Any
    record: dict[str, Any]
    adapter_dir: Path | None

    @property
    def losses(self) -> list[float]:
        """Training loss of each step."""
        return [step["loss"] for step in self.record["steps"]]

    @property
    def eval_loss(self) -> float:
        """Loss of the last evaluation."""
        return float(self.record["evaluations"][-1]["loss"])


def train(
    model: Any, tokenizer: Any, data: DataConfig | None = None, config: TrainConfig | None = None, *,
    sinks: Iterable[Sink] = (),
) -> TrainResult:  # fmt: skip
    """Train a model's adapters (or a dense model in full), in place.

    Args:
        model, tokenizer: from `load`, with `add_lora` for LoRA and QLoRA; or any causal transformers model.
        data: the data source; default: the embedded demo.
        config: the training options.
        sinks: receive every event (a progress bar, a file).
    Raises:
        InputError: the data, options or output folder cannot be used, or the saved result is not what was trained.
        TrainingError: see `Trainer.events`; or the trained model's logits are not finite.
        RunInterrupted: a signal stopped the run.
    """
    data, config = data or DataConfig(), config or TrainConfig()
    check_trackers(config)
    asked = {"model": getattr(model.config, "_name_or_path", ""), "data": data.to_dict(), "train": config.to_dict()}
    sides = load_sides(data, config)
    return _train(model, tokenizer, sides, data, config, asked, sinks)


def run(config: RunConfig, *, sinks: Iterable[Sink] = ()) -> TrainResult:
    """Load, adapt and train as `config` says; sinks receive every event. Raises as `load`, `add_lora` and `train`.

    Under torchrun each process trains its share of the rows (`distributed.py`); the first one's sinks receive the events, and it
    writes the files. Every process returns a result.
    """
    check_trackers(config.train)
    config, _ = decide(config)
    config = config.with_options(device=local_device(config.device))
    device = pick_device(config.device)

    def same() -> dict[str, Any]:
        return {**code_facts(), **flat(config.with_options(device="").to_dict())}

    with joined(config.train, device, partial(mode_of, config, device), same) as ranks:
        if ranks.several:
            config = _for_ranks(config, ranks)
        sides = load_sides(config.data, config.train)
        ranks.check_equal({f"the data's {side.name} side": side.digest for side in sides})
        sharding = _sharding(config, sides[0], device, ranks) if ranks.sharded else None
        usage.settle(device)  # what an earlier run has freed is no room for this one's loading
        usage.reset_peak(device)
        baseline = usage.used_bytes(device)
        model, tokenizer = _make_model(config, sides[0], sharding)
        loaded = {"baseline_bytes": baseline, "load_peak_bytes": max(0, usage.peak_bytes(device) - baseline)}
        if sharding:
            loaded["largest_group_bytes"] = sharding.largest_bytes
        return _train(model, tokenizer, sides, config.data, config.train, config.to_dict(), sinks, loaded, ranks)


def _for_ranks(config: RunConfig, ranks: Ranks) -> RunConfig:
    """The configuration of a run on several ranks; processes that torchrun has started again resume.

    Raises:
        ConfigError: an option is not for several.
        RunInterrupted: the processes were asked to stop before they were started again.
    """
    if ranks.sharded:
        check_sharded(config)
    ranks.deal(config.train)
    folder = config.train.output_dir
    again = bool(launch.restarts() and folder) and ranks.from_first(lambda: began(folder or ""))
    if again and (signal_number := ranks.from_first(lambda: stopped(folder or ""))):
        raise interrupt.RunInterrupted(
            "The run was asked to stop, and is not started again. Resume with --resume.", signal_number
        )
    found: RunConfig = config.with_options(train=config.train.with_options(resume=config.train.resume or again))
    return found


def load_sides(data: DataConfig, config: TrainConfig) -> tuple[Dataset, Dataset]:
    """The rows of both splits, checked for the run's objective. Raises as `load` and `Objective.check_rows`."""
    sides, objective = load_data(data), OBJECTIVES[config.objective].of(config)
    for side in sides:
        objective.check_rows(side, data)
    return sides


def _sharding(config: RunConfig, rows: Dataset, device: torch.device, ranks: Ranks) -> Sharding:
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
    model, tokenizer = _make_model(config, sides[0])
    return _trainer(model, tokenizer, sides, config.data, config.train)[0], baseline


def _make_model(config: RunConfig, rows: Dataset, sharding: Sharding | None = None) -> tuple[Any, Any]:
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
        weights = Path(config.adapter) / WEIGHTS_FILE
        with weights.open("rb") as file:
            info(model).started_from = hashlib.file_digest(file, "sha256").hexdigest()
    elif config.method != "full" and sharding is None:
        restored = _is_restored(config)
        ids = None if restored else _calibration(config, rows, model, tokenizer)
        add_lora(model, config.lora, seed=config.train.seed, calibration=ids, restored=restored)
    elif config.method == "full":
        model.requires_grad_(True)
        if model.device.type == "cuda" and config.dtype == "auto":
            info(model).autocast = torch.bfloat16
    usage.settle(model.device)  # frees temporaries of loading and quantising
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


def _trainer(
    model: Any, tokenizer: Any, sides: tuple[Dataset, Dataset], data: DataConfig, config: TrainConfig, ranks: Ranks = ALONE
) -> tuple[Trainer, list[Encoded]]:
    """The trainer over the rows of both splits, and the encoded rows."""
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
        choices=_kept(objective.choices(*sides, tokenizer, data, config.max_length), encoded[1]), cut_rows=encoded[0].n_cut,
        identity=identity, ranks=ranks,
    )  # fmt: skip
    trainer.warnings += warnings_of(encoded, tokenizer, config.max_length)
    return trainer, encoded


def _kept(choices: list[Choice] | None, evaluation: Encoded) -> list[Choice] | None:
    """The questions of the rows that were not dropped."""
    if choices is None or not evaluation.n_dropped:
        return choices
    kept = {example.origin for example in evaluation.examples}
    return [choice for choice in choices if choice.origin in kept]


def _train(
    model: Any, tokenizer: Any, sides: tuple[Dataset, Dataset], data: DataConfig, config: TrainConfig, asked: dict[str, Any],
    sinks: Iterable[Sink], loaded: dict[str, int] | None = None, ranks: Ranks = ALONE,
) -> TrainResult:  # fmt: skip
    with ExitStack() as stack:
        stack.callback(compute.decide, model)  # undo 'auto' matmul precision after the run
        trainer, encoded = _trainer(model, tokenizer, sides, data, config, ranks)
        ranks.check_equal({"the rows' tokens": trainer.identity["tokens"], "the model": str(info(model).base)})
        # for the plan of the warnings; `set_up` chooses again, by the checkpoint if there is one
        trainer.passes.choose_compilation(config.torch_compile, trainer.micro.planned_tokens(trainer.total_steps))
        claimed = stack.enter_context(_claimed(config, ranks)) if config.output_dir else None
        folder = claimed if ranks.is_first else None
        names = config.report_to if ranks.is_first else []
        trackers = Trackers(names, asked, folder, resumed=config.resume)
        stack.enter_context(trackers)
        file = [JsonlSink(folder / "events.jsonl", append=config.resume)] if folder else []
        baseline = loaded["baseline_bytes"] if loaded else usage.used_bytes(trainer.device)
        usage.reset_peak(trainer.device)
        past = read_events(folder / "events.jsonl") if folder and config.resume else []
        plan = planned.RunPlan(trainer)
        trainer.warnings += plan.warnings()
        trainer.stop_signal = stack.enter_context(interrupt.requests())
        try:
            # the trackers' end is after the record
            taken = list(deliver(trainer.events(), [*sinks, *file, nullcontext(trackers)] if ranks.is_first else []))
        except interrupt.RunInterrupted as error:
            _note_stop(folder, error.signal, ranks)
            raise
        events = facts.history(past, taken)
        peak = usage.peak_bytes(trainer.device)
        warned = [*(e.message for e in events if isinstance(e, Warned)), *trackers.failures]
        memory = {
            "baseline_bytes": baseline,
            **(loaded or {}),
            "train_peak_bytes": max(0, peak - baseline),
            "compile_peak_bytes": max(0, trainer.passes.compile_peak_bytes - baseline),
            "saved_activation_bytes": None if ranks.sharded else trainer.passes.saved_activation_bytes,
            **{f"{kind}_bytes": n for kind, n in trainer.kinds.items()},
            "optimizer_state_bytes": trainer.optimizer_state_bytes,
            "ledger": trainer.ledger,
            **facts.of_budget(trainer, warned),
            "planned": plan.beside_measured(peak),
        }
        if not any(isinstance(event, Stepped) for event in taken):  # nothing of a step was measured
            memory = facts.memory_of_record(folder) or {**memory, "planned": {"unknown": "no step was taken in this process"}}
        result = {
            **record.new("train"),
            "status": "ok",
            "config": asked,
            "environment": record.environment(trainer.device),
            "data": facts.of_data(sides, encoded),
            "model": facts.of_model(model),
            "memory": memory,
            "speed": {**facts.of_compilation(trainer.passes), **facts.of_speed([e for e in events if isinstance(e, Stepped)])},
            "steps": [asdict(e) for e in events if isinstance(e, Stepped)],
            "skipped": [asdict(e) for e in events if isinstance(e, Skipped)],
            "warnings": warned,
            "evaluations": [asdict(e) for e in events if isinstance(e, Evaluated)],
            **({} if trainer.reference is None else {"reference": trainer.reference}),
            "seconds": next((e.seconds for e in events if isinstance(e, Finished)), None),
        }
        told = len(result["warnings"])
        if ranks.several:
            result["parallel"] = {"mode": ranks.mode, "ranks": ranks.world, "memory": ranks.of_all(memory)}
        if ranks.sharded:
            with rest_gathered(model, ranks):
                verify.check_finite(model)
        adapter = None
        with gathered(model, ranks) if ranks.sharded else nullcontext():
            if folder:
                adapter = _save(model, tokenizer, folder, result, encoded[0].examples, sharded=ranks.sharded)
        if folder:
            trackers.finish("finished", [folder / "record.json", *([adapter] if adapter else [])])
        ranks.wait()
        for message in result["warnings"][told:]:
            print(f"warning: {message}", file=sys.stderr)
    trained = TrainResult(model, tokenizer, result, adapter)
    if signal_number := ranks.most(trainer.stop_signal()):  # requested after the last step: let the caller stop too
        _note_stop(folder, signal_number, ranks)
        where = f"saved in '{folder}'" if folder else "the exception's `result`"
        raise interrupt.RunInterrupted(
            f"Asked to stop when no step was left: the run is complete, {where}.", signal_number, trained
        )
    return trained


def _note_stop(folder: Path | None, signal_number: int, ranks: Ranks) -> None:
    """Note a stop for processes that torchrun starts again, before one ends."""
    if folder and ranks.several:
        stop(folder, signal_number)
    ranks.wait()


def _subject(model: Any) -> dict[str, Any]:
    """Model identity that must match on resume, and the matmul precision, which may differ on another machine."""
    quantized, leaves = [m for m in model.modules() if isinstance(m, QuantLinear)], info(model).merge_aware
    return {
        "base": getattr(model.config, "_name_or_path", ""),
        "lora": {name: config.to_dict() for name, config in adapter_configs(model).items()},
        "quant": sorted({m.codec for m in quantized}),
        "compute": ", ".join(sorted({m.compute for m in quantized})),
        "head_compute": Head(model).compute,
        "started_from": info(model).started_from,
        **({"merge_aware": facts_of(leaves)} if leaves else {}),
    }


@contextmanager
def _claimed(config: TrainConfig, ranks: Ranks) -> Iterator[Path]:
    """The run's output folder, which the first rank claims; others may be on machines that do not see it, and keep there what a
    paged optimiser pages out."""
    assert config.output_dir is not None
    if not ranks.several:
        with claim(config.output_dir, resume=config.resume) as folder:
            yield folder
        return
    with ExitStack() as stack:
        folder = Path(config.output_dir)
        ranks.from_first(lambda: str(stack.enter_context(claim(folder, resume=config.resume))))
        if ranks.is_first:
            begin(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Rank {ranks.rank} cannot write to '{folder}': {error.strerror}.") from None
        yield folder


def _save(
    model: Any, tokenizer: Any, folder: Path, result: dict[str, Any], examples: list[Example], *, sharded: bool = False
) -> Path | None:  # fmt: skip
    usage.settle(model.device)
    adapter = bool(adapter_configs(model))
    saved = folder / ("adapter" if adapter else "model")
    with usage.oom_becomes_error(lambda: "Memory ran out while saving the result. Resume with --resume to save it again."):
        if not sharded:
            verify.check_finite(model)
        if adapter:
            save_adapter(model, saved)
        else:
            model.save_pretrained(saved)
            tokenizer.save_pretrained(saved)
    check = verify.check_adapter if adapter else verify.check_model
    try:
        result["saved"], told = check(model, saved, examples, tokenizer.eos_token_id, runs=not sharded)
    except (RuntimeError, MemoryError, OSError) as error:
        if not usage.is_exhausted(error):
            raise
        told = [f"'{saved}' is saved, but there was no memory left to read it back and check it"]
    result["adapter_bytes"] = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    result["warnings"] += told
    record.write(folder / "record.json", result)
    return saved if adapter else None
