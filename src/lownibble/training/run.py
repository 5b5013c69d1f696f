"""A complete run: data, training loop, adapter, record.

`train` takes a model from the caller; `run` creates it from a `RunConfig`. Both write the same files (see `output.py`) and return
the same result.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lownibble import launch, record
from lownibble.config import DataConfig, RunConfig, TrainConfig
from lownibble.data import Dataset, Example
from lownibble.errors import OutputError
from lownibble.lora import save_adapter
from lownibble.lora.active import adapter_configs
from lownibble.memory import planned, usage
from lownibble.models import compute, pick_device
from lownibble.models.info import info, pass_device
from lownibble.training import facts, interrupt, verify
from lownibble.training.checkpoint import flat
from lownibble.training.distributed import ALONE, Ranks, code_facts, joined, local_device
from lownibble.training.events import Evaluated, Finished, Skipped, Stepped, Warned
from lownibble.training.making import load_sides, make_model, make_trainer, sharding_of
from lownibble.training.output import began, begin, claim, stop, stopped
from lownibble.training.sharding import check as check_sharded
from lownibble.training.sharding import gathered, mode_of, rest_gathered
from lownibble.training.sinks import JsonlSink, Sink, deliver, read_events
from lownibble.training.starts import decide
from lownibble.training.trackers import Trackers
from lownibble.training.trackers import check as check_trackers


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
        sharding = sharding_of(config, sides[0], device, ranks) if ranks.sharded else None
        usage.settle(device)  # what an earlier run has freed is no room for this one's loading
        usage.reset_peak(device)
        baseline = usage.used_bytes(device)
        model, tokenizer = make_model(config, sides[0], sharding)
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
    again = bool(ranks.most(launch.restarts()) and folder) and ranks.from_first(lambda: began(folder or ""))
    if again and (signal_number := ranks.from_first(lambda: stopped(folder or ""))):
        raise interrupt.RunInterrupted(
            "The run was asked to stop, and is not started again. Resume with --resume.", signal_number
        )
    found: RunConfig = config.with_options(train=config.train.with_options(resume=config.train.resume or again))
    return found


def _train(
    model: Any, tokenizer: Any, sides: tuple[Dataset, Dataset], data: DataConfig, config: TrainConfig, asked: dict[str, Any],
    sinks: Iterable[Sink], loaded: dict[str, int] | None = None, ranks: Ranks = ALONE,
) -> TrainResult:  # fmt: skip
    with ExitStack() as stack:
        stack.callback(compute.decide, model)  # undo 'auto' matmul precision after the run
        trainer, encoded = make_trainer(model, tokenizer, sides, data, config, ranks)
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
            "host_bytes": trainer.host_bytes,
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
            **trainer.evaluator.facts(),
            **({} if trainer.reference is None else {"reference": trainer.reference}),
            **({} if trainer.shared is None else {"shared_prefixes": trainer.shared}),
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
    usage.settle(pass_device(model))
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
