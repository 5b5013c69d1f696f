"""The training loop: a generator of events. One loop for full, LoRA and QLoRA; the model says what is trained.

A step is `gradient_accumulation_steps` microbatches whose losses are divided by the label tokens of all of them (a mean over
tokens, not a mean of means), gradient clipping, and one optimiser step. All randomness is a function of the seed and the step, so
resuming at any step is bit-identical to an uninterrupted run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from lownibble.config import FOR_ADAPTERS, TrainConfig
from lownibble.data import Batch, Choice, Example
from lownibble.errors import ConfigError, TrainingError
from lownibble.lora import count_parameters
from lownibble.lora.active import adapter_configs
from lownibble.lora.experts import adapted_layers
from lownibble.memory import usage
from lownibble.memory.budget import Fit, Setting
from lownibble.models.head import check_head
from lownibble.models.info import info, pass_device
from lownibble.optim import (
    close_states,
    learning_rate,
    make_optimizer,
    open_states,
    paged_name,
    planned_bytes,
    set_learning_rate,
    skipped,
    spec,
    state_bytes,
    step_if_finite,
    warmup_steps,
)
from lownibble.options import n_bytes
from lownibble.quant import QuantLinear, dense
from lownibble.registry import OBJECTIVES
from lownibble.training import balance, checkpoint, compiling, diagnose, gradients, reference, sharding
from lownibble.training.distributed import ALONE, AllExhaustedError, Ranks
from lownibble.training.events import Evaluated, Event, Finished, Fitted, Saved, Skipped, Started, Stepped, Warned
from lownibble.training.fitting import Fitting, MemoryGoneError, recorded_fit
from lownibble.training.interrupt import RunInterrupted
from lownibble.training.microbatches import MicroBatches, Rows
from lownibble.training.objectives import Objective
from lownibble.training.passes import Passes
from lownibble.training.preference import Preferences
from lownibble.training.stream import on_own_stream

_T = TypeVar("_T")

MAX_SKIPPED = 3
"""Consecutive skipped steps (loss or gradient not finite) after which a run ends: the weights no longer change."""

COUNTED_STEPS = 20
"""Steps at the beginning of a run over which it is counted how many tokens are computed once."""

COMPILER_BYTES = 10**9
"""Free bytes within the memory budget required for compiling. A guess from its use on the embedded model."""

_STEP_STRIDE, _RANK_STRIDE, _RUN_STRIDE = 10_007, 5_000_011, 1_000_000_007  # keep seeds of neighbours distinct


class Counts(NamedTuple):
    """What a step's microbatches hold, on all ranks: tokens without and with padding, label tokens, rows, and the loss's divisor
    (label tokens, unless the objective says otherwise)."""

    tokens: int
    padded_tokens: int
    labels: int
    rows: int
    weight: int


class Trainer:
    """One run over prepared examples. `events()` runs it; the attributes are for inspection.

    Attributes:
        objective: the training objective (`objectives.py`).
        micro: the microbatches of each step.
        passes: runs forward and backward passes; whether layers are compiled, and why.
        fitting: memory management.
        device, parameter_device: where passes run, and where parameters, gradients and optimiser states are: the same, but for
            shards that are offloaded to the host.
        optimizer: the optimiser; `set_up` replaces it if the memory budget chose paging.
        kinds: live bytes by kind after the first optimiser step, with gradients and resident optimiser states.
        optimizer_state_bytes: bytes of all optimiser states at that point, resident or not.
        host_bytes: of the bytes in `kinds`, those in host memory while passes run on a GPU.
        ledger: those bytes by kind and dtype, and what is held in more bits than in the checkpoint.
        stop_signal: called between steps; a non-zero signal number saves and ends the run.
        warnings: messages for the user that no event has reported yet.
        reference: how the reference model's log-probabilities were computed, or None.
        shared: of preferences, a number of first steps, the tokens of their sequences, and those that are computed in their
            microbatches as fitted; or why all are computed. None: no preferences.
        stream: the CUDA stream on which the run works, or None.
        total_steps: optimiser steps of the whole run.
    """

    def __init__(
        self, model: Any, tokenizer: Any, train: list[Example], evaluation: list[Example], config: TrainConfig, *,
        choices: list[Choice] | None = None, cut_rows: int = 0, identity: dict[str, Any] | None = None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("The model has no trainable parameters. Call add_lora first, or load it dense to train it in full.")
        if any(isinstance(m, QuantLinear) for m in model.modules()) and not adapter_configs(model):
            raise ConfigError(
                "The model's weights are quantised and it has no adapter. Call add_lora, or load it with quant=None."
            )
        if config.loraplus_lr_ratio is not None and not adapter_configs(model):
            raise ConfigError(FOR_ADAPTERS.format("a model without one", "call add_lora"))
        if model.dtype == torch.float16:
            raise ConfigError(
                "Training in float16 is not done: small gradients would be lost without loss scaling. Use --dtype bfloat16, or "
                "float32 where the device has no bfloat16."
            )
        if ranks.sharded:
            sharding.check_training(config)
        self.model, self.config, self.cut_rows, self.ranks = model, config, cut_rows, ranks
        self.device = pass_device(model)
        self.parameter_device: torch.device = model.get_input_embeddings().weight.device
        if model.config.is_encoder_decoder and config.memory_budget:
            raise ConfigError(f"The 'memory_budget' is not for {type(model).__name__}, which has an encoder. Leave it out.")
        self.objective: Objective = OBJECTIVES[config.objective].of(config)
        collate = self.objective.collate(model, tokenizer)
        self.micro = MicroBatches(train, config, collate, ranks)
        self.passes = Passes(model, self.micro, self.device, self.objective.loss)
        self.evaluator = self.objective.evaluator(evaluation, choices, collate, 2 * self.micro.batch_size, self.device)
        self.evaluator.ranks, self.evaluator.passes = ranks, self.passes
        self.reference: dict[str, Any] | None = None
        self.shared: dict[str, int] | str | None = None
        self.total_steps = config.max_steps or self.micro.steps_of_epochs(config.num_train_epochs)
        self.identity = {"train": config.to_dict(), "total_steps": self.total_steps, **(identity or {})}
        self.fitting = Fitting(config, self.micro, self.passes, self.evaluator, self.device, ranks)
        if ranks.sharded:
            sharding.check_blocks(model, config.optim)
        self.parts = sharding.parts(model)
        self.warnings = self.fitting.warnings
        self.evaluator.before_pass = self.fitting.make_room
        self.optimizer = self._make_optimizer(self.fit.paged)
        self.optimizer_state_bytes = self.host_bytes = 0
        self.kinds, self.ledger = usage.bytes_by_kind(model, None), usage.ledger(model, None)
        self._measured = False
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.stop_signal: Callable[[], int] = lambda: 0
        self.checkpoints = Path(config.output_dir) / checkpoint.CHECKPOINTS if config.output_dir else None

    def _make_optimizer(self, paged: bool) -> torch.optim.Optimizer:
        config = self.config
        kind = (paged_name(config.optim) if paged else None) or config.optim
        ratio = config.loraplus_lr_ratio
        fast = [] if ratio is None else [part.parameter for name, part in self.parts.items() if name.endswith(".lora_B")]
        return make_optimizer(
            kind, [part.parameter for part in self.parts.values()], config.learning_rate, config.weight_decay,
            page_budget=n_bytes(config.optim_page_budget) if config.optim_page_budget else None,
            folder=Path(config.output_dir) if config.output_dir else None, fast=fast, ratio=ratio or 1.0,
            sizes={part.parameter: math.prod(part.shape) for part in self.parts.values() if part.is_shard},
        )  # fmt: skip

    @property
    def _offloaded(self) -> bool:
        return self.parameter_device.type != self.device.type

    def _planned_state_bytes(self, setting: Setting) -> int:
        """Bytes of optimiser states on the passes' device."""
        if self._offloaded:
            return 0
        return self.ranks.most(planned_bytes(self.config.optim, self._make_optimizer(setting.paged)))

    @property
    def fit(self) -> Fit:
        """The configuration after fitting it to the memory budget, or unchanged without one."""
        return self.fitting.fit

    def events(self) -> Iterator[Event]:
        """Run the training; yields `Fitted` (with a memory budget) and `Started`, then `Stepped` or `Skipped`, `Evaluated` and
        `Saved`, then `Finished`; `Warned` at any time. Releases paged states at the end.

        Raises:
            ConfigError: no step fits into the memory budget.
            TrainingError: the loss or gradient of several consecutive steps was not finite (says where that began), memory ran
                out even with the smallest microbatches, or paging optimiser states failed.
            RunInterrupted: a signal stopped the run; the steps taken are in a checkpoint, if there is an output folder.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            # dropout draws from torch's global generators, whose state is restored for the caller
            with usage.oom_becomes_error(self._out_of_memory), torch.random.fork_rng(devices):
                yield from self._events()
        finally:
            close_states(self.optimizer)
            self.fitting.close()
            info(self.model).balance = None

    def _events(self) -> Iterator[Event]:
        config, began = self.config, time.perf_counter()
        first = self.set_up()
        if self.config.memory_budget:
            yield Fitted(
                n_bytes(self.config.memory_budget), self.fit.peak_bytes, self.fit.max_tokens, self.micro.whole, self.fit.paged,
                self.fit.gradient_checkpointing, time.perf_counter() - began,
            )  # fmt: skip
        yield from self._told()
        evaluates = first in (0, self.total_steps)
        yield Started(
            self.total_steps, first, len(self.micro.rows), self.cut_rows, *count_parameters(self.model),
            compiled=self.passes.compiled, compile_seconds=self.passes.compile_seconds,
            compile_reason=self.passes.compile_reason, compute=info(self.model).compute, adapted=adapted_layers(self.model),
            shared=self.shared if isinstance(self.shared, dict) else {}, eval_rows=len(self.evaluator.examples) * evaluates,
        )  # fmt: skip
        if evaluates:
            yield self.evaluate(first)
        skipped, done = 0, first
        try:
            for step, rows in zip(range(first, self.total_steps), self.micro.steps(first), strict=False):
                taken = self.step(step, rows)
                yield taken
                yield from self._told()
                skipped = skipped + 1 if isinstance(taken, Skipped) else 0
                if skipped in (MAX_SKIPPED, self.total_steps):
                    raise TrainingError(self._gone_wrong(taken, skipped))
                done = step + 1
                last = done == self.total_steps
                if last or (config.eval_steps and done % config.eval_steps == 0):
                    yield self.evaluate(done)
                stop = self.ranks.most(self.stop_signal())
                if last or stop or (config.save_steps and done % config.save_steps == 0):
                    yield from self._save(done)
                if stop and not last:
                    raise RunInterrupted(self._stopped(done), stop)
        except MemoryGoneError:
            yield from self._save(done)
            raise
        self.model.eval()
        yield Finished(self.total_steps, time.perf_counter() - began)

    def _told(self) -> Iterator[Event]:
        """Yield and clear the pending warnings."""
        while self.warnings:
            yield Warned(self.warnings.pop(0))

    def _save(self, done: int) -> Iterator[Event]:
        if self.checkpoints:
            self.fitting.make_room()
            path = checkpoint.save(
                self.checkpoints, done, self.parts, self.optimizer, self.identity, self.fit.to_dict(), self.ranks
            )
            self.ranks.wait()  # a rank that ended now would make torchrun end the one that writes
            yield Saved(done, str(path))

    @on_own_stream
    def set_up(self) -> int:
        """Prepare the first step: check the model, choose compilation, fit the run into the memory budget, restore a checkpoint,
        allocate optimiser states, and compile.

        Returns:
            the first step: 0, or the step of the checkpoint in the output folder.
        Raises:
            ModelError, ConfigError, OutputError, TrainingError: the run is not possible; nothing was trained.
        """
        dense.forget()
        with sharding.rest_gathered(self.model, self.ranks):
            check_head(self.model)
            self.passes.check()
            balanced = balance.set_up(self.model, self.config.router_aux_loss_coef)
        plain_loss = type(self.objective).loss is Objective.loss and not balanced
        self.passes.refuse_graphs(self.config.cuda_graphs, plain_loss)
        self.passes.check_outputs()
        past = self._past()
        over = past is not None and past.step >= self.total_steps
        self._choose_compilation(past)
        fit = self.fit if over else self.fitting.choose(recorded_fit(self.config, past, self.ranks), self._planned_state_bytes)
        if fit.paged != self.fit.paged:
            self.optimizer = self._make_optimizer(fit.paged)
        self.fitting.take(fit)
        self.shared = self._count_shared() if self.micro.shares else self.passes.prefix_reason
        self._refer(past is not None)
        if past:
            checkpoint.restore(past, self.parts, self.optimizer, self.identity, self.ranks)
            self.warnings += checkpoint.changed(past, self.identity)
            if past.step > self.total_steps:
                self.warnings.append(
                    f"The checkpoint is of step {past.step}, and the run has {self.total_steps} steps: nothing more is trained, "
                    f"and its result is that of step {past.step}."
                )
        elif not self.ranks.sharded:  # as they are by the seed, but for machines that round otherwise
            self.ranks.as_first(part.parameter.detach() for part in self.parts.values())
        open_states(self.optimizer)
        if self.passes.compiled and not over:
            self._compile(past)
        self.passes.choose_graphs(self.config.cuda_graphs, plain_loss, self.config.memory_budget is not None)
        return past.step if past else 0

    def _count_shared(self) -> dict[str, int]:
        steps = min(COUNTED_STEPS, self.total_steps)
        batches = [batch for rows in islice(self.micro.steps(), steps) for batch in self.micro.batches(rows)]
        tokens, computed = sum(batch.n_tokens for batch in batches), sum(map(self.micro.computed, batches))
        return {"steps": steps, **dict(zip(("tokens", "computed_tokens"), self.ranks.total(tokens, computed), strict=True))}

    def _refer(self, resumed: bool) -> None:
        """Compute the reference model's log-probabilities, if the objective has one; the model is as it begins."""
        objective, evaluator = self.objective, self.evaluator
        if not (isinstance(objective, Preferences) and objective.has_reference):
            return
        if not self.config.precompute_ref_log_probs:
            reference.check_steps(self.model)
            self.reference = {"computed": "with each step", "adapter": "off"}
            return
        packed = ("quant", "double_quant", "skip_modules", "pattern", "compute", "head_compute", "merge_aware")
        identity = {key: self.identity.get(key) for key in ("tokens", "lora", "started_from", *packed)} | {
            "seed": self.config.seed
        }
        self.reference = self._retry(
            lambda: reference.before(
                objective, self.passes, self.micro, evaluator.examples, evaluator.collate,
                lambda: (evaluator.batch_size, evaluator.max_tokens), self.total_steps, identity,
                Path(self.config.output_dir) if self.config.output_dir else None, self.ranks, self.fitting.make_room, resumed,
            ),
            lambda: self.fitting.shrink_evaluation(0), "the evaluation before the first step",
        )  # fmt: skip

    def _past(self) -> checkpoint.Facts | None:
        """The checkpoint to resume from, or None."""
        if not (self.config.resume and self.checkpoints):
            return None
        found, damaged = checkpoint.newest_for(self.checkpoints, self.ranks)
        self.warnings += [f"{what}; the one before it is used" for what in damaged]
        return found

    def _choose_compilation(self, past: checkpoint.Facts | None) -> None:
        """Choose compilation; for 'auto', as in the checkpoint, else by run length and free memory in the budget."""
        option: bool | Literal["auto"] = self.config.torch_compile
        if option == "auto" and past and "compiled" in past.config:
            option = bool(past.config["compiled"])
        self.passes.choose_compilation(option, self.micro.planned_tokens(self.total_steps))
        if option == "auto" and self.passes.compiled and self.config.memory_budget:
            free = n_bytes(self.config.memory_budget) - self.ranks.most(usage.used_bytes(self.device))
            if self.device.type == "cpu" and free < COMPILER_BYTES:
                self.passes.do_not_compile("the compiler takes more memory than the budget leaves")
        self.identity["compiled"] = self.passes.compiled

    def _compile(self, past: checkpoint.Facts | None) -> None:
        """Compile for the kinds of batches in the first 100 steps of the run."""
        steps = islice(self.micro.steps(), min(100, self.total_steps))
        try:
            self.passes.compile([batch for rows in steps for batch in self.micro.batches(rows)])
        except TrainingError as error:
            if self.config.torch_compile is True or past:  # a resumed run must stay compiled
                raise
            self.passes.do_not_compile(f"{compiling.IMPOSSIBLE}{error}")
            self.identity["compiled"] = False
        if self.passes.compiled and not self.passes.is_any_compiled:
            self.passes.do_not_compile("all forward passes run in tiles of tokens, which are not compiled")
            self.identity["compiled"] = False

    @on_own_stream
    def evaluate(self, step: int) -> Evaluated:
        """Loss and, for classification data, accuracy on the evaluation rows; restarts with smaller passes on OOM.

        Raises:
            MemoryGoneError: a pass is already a single row.
        """
        began = time.perf_counter()
        found = self._retry(
            lambda: self.evaluator(self.model), lambda: self.fitting.shrink_evaluation(step), f"the evaluation after step {step}"
        )
        return Evaluated(step, found.loss, found.label_tokens, time.perf_counter() - began, found.scores, found.correct)

    def _out_of_memory(self) -> str:
        return (
            f"Memory ran out outside of a forward pass. {self._kept()}. Free some memory, or take --optim paged_adamw_8bit or "
            "--method qlora; --resume continues from a checkpoint."
        )

    def _kept(self) -> str:
        """Sentence on the last saved checkpoint."""
        newest = checkpoint.complete(self.checkpoints) if self.checkpoints else []
        return f"The last checkpoint is '{newest[-1]}'" if newest else "Nothing was saved"

    def _gone_wrong(self, last: Skipped | Stepped, count: int) -> str:
        reason = last.reason if isinstance(last, Skipped) else ""
        return (
            f"Steps {last.step - count + 1} to {last.step} were not taken: {reason}. {self._kept()}. "
            "Lower the learning rate, or look for bad rows."
        )

    def _stopped(self, done: int) -> str:
        if self.checkpoints:
            return f"Stopped after step {done} of {self.total_steps}, which is saved. Resume with --resume."
        return f"Stopped after step {done} of {self.total_steps}. Nothing was saved: there is no output folder."

    @on_own_stream
    def step(self, step: int, rows: Rows) -> Stepped | Skipped:
        """Take optimiser step `step` (0-based), or skip it if its loss or gradient is not finite. On out-of-memory, the step
        restarts with smaller microbatches, which later steps keep.

        The host waits for the device once, at the end: whether a step is skipped is decided on the device by optimisers that can.

        Raises:
            MemoryGoneError: microbatches cannot get smaller; the step was not taken.
        """
        began = time.perf_counter()
        config = self.config
        batches, counts, values = self._retry(
            lambda: self._gradients(step, rows), lambda: self._shrink(step, rows), f"step {step + 1}"
        )
        warmup = warmup_steps(self.total_steps, config.warmup_ratio)
        rate = learning_rate(config.lr_scheduler_type, config.learning_rate, step, self.total_steps, warmup)
        set_learning_rate(self.optimizer, rate)
        step_if_finite(self.optimizer, values, on_device=spec(config.optim).skips_on_device)
        if not self._measured and bool(values.isfinite().all()):
            self.kinds, self._measured = usage.bytes_by_kind(self.model, self.optimizer), True
            self.optimizer_state_bytes = state_bytes(self.optimizer).total
            self.host_bytes = sum(self.kinds.values()) if self._offloaded else 0
            stepped = {part.of: part.parameter for part in self.parts.values()}
            self.ledger = usage.ledger(self.model, self.optimizer, stepped)
        *losses, norm = values.tolist()
        loss = sum(losses)
        if not math.isfinite(loss) or not math.isfinite(norm):
            if spec(config.optim).skips_on_device:
                skipped(self.optimizer)
            origins = self.ranks.of_all(self._origin(step, batches, counts.weight))
            where = origins[0] if len(set(origins)) == 1 else "; ".join(f"rank {r}: {each}" for r, each in enumerate(origins))
            reason = f"the loss is {loss} and the gradient's norm {norm}; {where}"
            sharding.drop_gradients(self.parts.values())
            return Skipped(step + 1, reason, time.perf_counter() - began)
        sharding.drop_gradients(self.parts.values())
        if lost := self.passes.lost_graphs():
            self.warnings.append(f"passes are no longer replayed as CUDA graphs: {lost}")
        self.fitting.keep_within(rows)
        return Stepped(
            step + 1, loss, rate, norm, counts.tokens, counts.padded_tokens, counts.labels, counts.rows,
            time.perf_counter() - began,
        )  # fmt: skip

    def _gradients(self, step: int, rows: Rows) -> tuple[list[Batch], Counts, torch.Tensor]:
        """Accumulate and clip gradients; returns the microbatches, what all ranks' hold, and float32 on the parameters' device:
        the loss of each (of several ranks: their sum), and the gradient's norm before clipping."""
        batches, ranks = self.micro.batches(rows), self.ranks
        counts = Counts(*ranks.total(
            sum(batch.n_tokens for batch in batches),
            sum(batch.n_tokens if self.micro.shares else batch.n_padded_tokens for batch in batches),
            sum(batch.n_label_tokens for batch in batches), sum(batch.n_rows for batch in batches),
            sum(self.objective.weight(batch) for batch in batches),
        ))  # fmt: skip
        self.objective.prepare(batches, self.passes, ranks)
        if ranks.sharded:
            batches += [self.micro.empty()] * (ranks.most(len(batches)) - len(batches))
        losses = ranks.together(lambda: self._backward(step, batches, counts.weight))
        sharding.give_gradients(self.parts.values())
        if ranks.several:
            losses = [gradients.add_up(losses, self.parts.values(), ranks, self.device)]
        norm = gradients.clip(self.parts.values(), ranks, self.config.max_grad_norm, self.parameter_device)
        return batches, counts, torch.stack([value.to(self.parameter_device, torch.float32) for value in (*losses, norm)])

    def _backward(self, step: int, batches: list[Batch], weight: int) -> list[torch.Tensor]:
        losses, measured = [], not (self._measured or self.ranks.sharded)  # gathered weights are saved too, and freed
        for index, batch in enumerate(batches):
            self._seed(step, index)
            self.fitting.make_room()
            losses.append(self.passes.backward(batch, weight, measured=measured and index == 0, replay=True))
        return losses

    def _retry(self, attempt: Callable[[], _T], shrink: Callable[[], None], where: str) -> _T:
        """Return `attempt()`; whenever memory runs out, on all ranks that know of it, `shrink` and begin again.

        Raises:
            TrainingError: it ran out on this rank alone (in a pass with shards, or between passes): the others wait for it in
                the middle of the attempt, and it cannot begin again without them.
        """

        def known_to_all() -> _T:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if not self.ranks.several or isinstance(error, AllExhaustedError) or not usage.is_exhausted(error):
                    raise
                raise TrainingError(
                    f"Memory ran out on rank {self.ranks.rank} in {where}. {self._kept()}. Lower --batch-size, set "
                    "--gradient-checkpointing true, or take more GPUs; --resume continues from a checkpoint."
                ) from error

        return usage.retry_on_oom(known_to_all, shrink)

    def _shrink(self, step: int, rows: Rows) -> None:
        sharding.drop_gradients(self.parts.values())
        self.fitting.shrink_step(step, rows)

    def _seed(self, step: int, index: int) -> None:
        """Set the dropout seed of microbatch `index` of a step, another one on each rank."""
        rank = self.ranks.rank * _RANK_STRIDE
        torch.manual_seed(self.config.seed * _RUN_STRIDE + step * _STEP_STRIDE + rank + index)

    def _origin(self, step: int, batches: list[Batch], weight: int) -> str:
        """Where the step's values became non-finite."""
        if self.ranks.sharded or not batches:
            return "where that began is not looked for" if batches else "it had no rows"

        def forward() -> torch.Tensor:
            losses = []
            for index, batch in enumerate(batches):
                self._seed(step, index)
                losses.append(self.passes.loss(batch, weight))
            return torch.stack(losses)

        return diagnose.origin(self.model, forward)
