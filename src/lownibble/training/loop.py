"""The training loop: a generator of events. One loop for full, LoRA and QLoRA; the model says what is trained.

A step is `gradient_accumulation_steps` forward and backward passes whose losses are divided by the label tokens of all of them
(a mean over tokens, not a mean of means), clipping, and one optimiser step. Everything random is a function of the seed and the
position, so a run can be cut and resumed anywhere with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lownibble.config import TrainConfig, n_bytes
from lownibble.data import Batch, Choice, Example, collate, epoch_batches, flatten, stream
from lownibble.errors import ConfigError, TrainingError
from lownibble.lora import count_parameters
from lownibble.lora.inject import adapter_configs
from lownibble.models.attention import kernel_obstacle, segment_attention
from lownibble.optim import (
    close_states,
    learning_rate,
    make_optimizer,
    open_states,
    set_learning_rate,
    state_bytes,
    warmup_steps,
)
from lownibble.quant import QuantLinear
from lownibble.training import checkpoint, compiling, diagnose, memory
from lownibble.training.evaluate import Evaluator
from lownibble.training.events import Evaluated, Event, Finished, Saved, Skipped, Started, Stepped, Warned
from lownibble.training.interrupt import RunInterrupted
from lownibble.training.loss import check_head, check_packing, check_rows, label_loss

MAX_SKIPPED = 3
"""Steps in a row whose loss or gradient is not finite, after which a run ends: the weights do not change, so it would go on."""

_SEED_STRIDE = 1_000_003  # keeps the seeds of neighbouring runs' micro-batches apart


class Trainer:
    """One run over prepared examples. `events()` runs it; the attributes are for those who look on.

    Attributes:
        optimizer: the optimiser, from the start of `events()`.
        kinds: live bytes by kind when the first step ended, gradients and optimiser states included (those in memory).
        optimizer_state_bytes: of all optimiser states, in memory or not, at the same time.
        ledger: those bytes by kind and dtype, and what is held in more bits than the checkpoint had.
        stop_signal: called between steps; another number than 0 ends the run, saved, as by that signal.
        warnings: what `set_up` found that a user should know.
        saved_activation_bytes: what autograd kept in the first forward pass (the largest one with group_by_length or packing).
        attention_reason: why attention does not run on our kernel, or nothing where it does.
        compiled, compile_reason, compile_seconds, compile_peak_bytes: whether the layers are compiled, why, how long it took and
            the highest memory until then, after `set_up`.
        total_steps: optimiser steps of the whole run.
    """

    def __init__(
        self, model: Any, tokenizer: Any, train: list[Example], evaluation: list[Example], config: TrainConfig, *,
        choices: list[Choice] | None = None, cut_rows: int = 0, identity: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("The model has no trainable parameters. Call add_lora first, or load it dense to train it in full.")
        if any(isinstance(m, QuantLinear) for m in model.modules()) and not adapter_configs(model):
            raise ConfigError(
                "The model's weights are quantised and it has no adapter. Call add_lora, or load it with quant=None."
            )
        self.model, self.config, self.train_rows = model, config, train
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.evaluator = Evaluator(evaluation, choices, self.pad_token_id, 2 * config.batch_size, self.device)
        self._pack_to = config.max_length if config.packing else None
        self._attention = segment_attention if config.packing else nullcontext
        self.attention_reason = ""
        self._compiled: compiling.Compiled | type[nullcontext[None]] = nullcontext
        self.total_steps = config.max_steps or self._steps_of_epochs(config.num_train_epochs)
        self.cut_rows = cut_rows
        self.identity = {"train": config.to_dict(), **(identity or {})}
        self.optimizer = make_optimizer(
            config.optim, model.parameters(), config.learning_rate, config.weight_decay,
            page_budget=n_bytes(config.optim_page_budget) if config.optim_page_budget else None,
            folder=Path(config.output_dir) if config.output_dir else None,
        )  # fmt: skip
        self.optimizer_state_bytes = 0
        self.saved_activation_bytes = 0
        self.compiled, self.compile_reason, self.compile_seconds, self.compile_peak_bytes = False, "", 0.0, 0
        self.kinds, self.ledger = memory.bytes_by_kind(model, None), memory.ledger(model, None)
        self._measured = False
        self.stop_signal: Callable[[], int] = lambda: 0
        self.warnings: list[str] = []
        self.checkpoints = Path(config.output_dir) / "checkpoints" if config.output_dir else None

    def events(self) -> Iterator[Event]:
        """Run; yields `Started`, then `Stepped` or `Skipped`, `Evaluated` and `Saved`, then `Finished`. Closes paged states.

        Raises:
            TrainingError: the loss or gradient of several steps in a row was not finite (says where that began), or optimiser
                states cannot be paged any more.
            RunInterrupted: it was asked to stop; the steps taken are in a checkpoint, if there is an output folder.
        """
        try:
            yield from self._events()
        finally:
            close_states(self.optimizer)

    def _events(self) -> Iterator[Event]:
        config, began = self.config, time.perf_counter()
        first = self.set_up()
        for message in self.warnings:
            yield Warned(message)
        yield Started(
            self.total_steps, first, len(self.train_rows), self.cut_rows, *count_parameters(self.model),
            compiled=self.compiled, compile_seconds=self.compile_seconds, compile_reason=self.compile_reason,
        )  # fmt: skip
        if first in (0, self.total_steps):
            yield self.evaluate(first)
        skipped = 0
        for step, batches in zip(range(first, self.total_steps), self.batches(first), strict=False):
            taken = self.step(step, batches)
            yield taken
            skipped = skipped + 1 if isinstance(taken, Skipped) else 0
            if skipped in (MAX_SKIPPED, self.total_steps):
                raise TrainingError(self._gone_wrong(taken, skipped))
            done = step + 1
            last = done == self.total_steps
            if last or (config.eval_steps and done % config.eval_steps == 0):
                yield self.evaluate(done)
            stop = self.stop_signal()
            if self.checkpoints and (last or stop or (config.save_steps and done % config.save_steps == 0)):
                path = checkpoint.save(self.checkpoints, done, self.model, self.optimizer, self.identity)
                yield Saved(done, str(path))
            if stop and not last:
                raise RunInterrupted(self._stopped(done), stop)
        self.model.eval()
        yield Finished(self.total_steps, time.perf_counter() - began)

    def set_up(self) -> int:
        """Check that this model can be trained this way, restore it, compile its layers if that pays; before any step.

        Returns:
            the step to begin with: 0, or where the checkpoint in the output folder ended.
        Raises:
            ModelError, ConfigError, TrainingError: it cannot; nothing was trained.
        """
        check_head(self.model)
        open_states(self.optimizer)
        if self.config.packing:
            by_length = sorted((row.input_ids for row in self.train_rows), key=len)
            check_packing(self.model, [by_length[-1], by_length[0]])
            self.attention_reason = kernel_obstacle(self.model)
        else:
            self._choose_attention()
        self._set_checkpointing()
        option = self.config.torch_compile
        self.compiled, self.compile_reason = compiling.choose(option, self.model, self.device, self._planned_tokens())
        self.identity["compiled"] = self.compiled
        first = self._restore()
        if self.compiled and first < self.total_steps:
            try:
                self._compile()
            except TrainingError as error:
                if option is True or first:  # a run cut and resumed must go on as it began
                    raise
                self.compiled, self.compile_reason = False, f"{compiling.IMPOSSIBLE}{error}"
                self.identity["compiled"] = False
        return first

    def _choose_attention(self) -> None:
        """Our attention kernel, where this machine has it and the model's attention is what it computes."""
        batch = self._batch([self.train_rows[0], min(self.train_rows, key=lambda row: len(row.input_ids))]).to(self.device)
        self.attention_reason = check_rows(self.model, batch.input_ids, batch.attention_mask)
        if not self.attention_reason:
            self._attention = segment_attention

    def _compile(self) -> None:
        began = time.perf_counter()
        self._compiled = compiling.Compiled(self.model)
        try:
            with compiling.torchs_own_warnings_off():
                for batch in self._kinds_of_batches():
                    self._backward(batch, batch.n_label_tokens)
        except TrainingError:
            self._compiled = nullcontext
            raise
        finally:
            self.model.zero_grad(set_to_none=True)
        self.compile_seconds = time.perf_counter() - began
        self.compile_peak_bytes = memory.peak_bytes(self.device)
        memory.reset_peak(self.device)  # the compiler's memory is not the step's

    def _planned_tokens(self) -> int:
        """About how many tokens the run reads."""
        rows, config = self.train_rows, self.config
        mean = sum(len(row.input_ids) for row in rows) / len(rows)
        batch = config.batch_size * config.max_length if config.packing else min(config.batch_size, len(rows)) * mean
        return int(self.total_steps * config.gradient_accumulation_steps * batch)

    def _kinds_of_batches(self) -> list[Batch]:
        """A batch of each kind that is compiled apart (padded or full, of one row or of more), from the first hundred steps."""
        kinds: dict[tuple[bool, bool], Batch] = {}
        for batches in islice(self.batches(), min(100, self.total_steps)):
            for batch in batches:
                kinds.setdefault((bool(batch.attention_mask.all()), len(batch.input_ids) == 1), batch)
        return list(kinds.values())

    def batches(self, first_step: int = 0) -> Iterator[list[Batch]]:
        """The batches of each step from `first_step` on, without end."""
        config, count = self.config, self.config.gradient_accumulation_steps
        order = stream(
            self.train_rows, config.batch_size, config.seed, config.group_by_length, first_step * count, self._pack_to
        )  # fmt: skip
        while True:
            yield [self._batch([self.train_rows[i] for i in rows]) for rows in islice(order, count)]

    def _batch(self, rows: list[Example]) -> Batch:
        return flatten(rows) if self.config.packing else collate(rows, self.pad_token_id)

    def _steps_of_epochs(self, epochs: float) -> int:
        """Optimiser steps of so many epochs; packed epochs differ in their number of batches."""
        config = self.config
        whole, part = divmod(epochs, 1)
        steps = []
        for epoch in range(math.ceil(epochs)):
            batches = epoch_batches(self.train_rows, config.batch_size, config.seed, epoch, config.group_by_length, self._pack_to)
            steps.append(max(1, len(batches) // config.gradient_accumulation_steps))
        last = math.ceil(round(steps[-1] * part, 6)) if part else 0
        return sum(steps[: int(whole)]) + last

    def evaluate(self, step: int) -> Evaluated:
        """Loss and, for label data, accuracy on the evaluation rows."""
        began = time.perf_counter()
        found = self.evaluator(self.model)
        return Evaluated(step, found.loss, found.label_tokens, time.perf_counter() - began, found.scores, found.correct)

    def _loss(self, batch: Batch, n_total: int) -> torch.Tensor:
        batch = batch.to(self.device)
        return label_loss(self.model, batch.input_ids, batch.attention_mask, batch.labels, n_total, batch.segments)

    def _backward(self, batch: Batch, n_total: int, measured: bool = False) -> float:
        """Add the gradients of a batch; returns its loss. `measured`: count what autograd saves."""
        self.model.train()
        with self._attention(self.model), self._compiled():
            if measured:
                watch = memory.SavedActivations()
                with watch.watch(self.model):
                    loss = self._loss(batch, n_total)
                self.saved_activation_bytes = watch.bytes
            else:
                loss = self._loss(batch, n_total)
            torch.autograd.backward(loss)
        return float(loss.detach())

    def _gone_wrong(self, last: Skipped | Stepped, count: int) -> str:
        newest = checkpoint.complete(self.checkpoints) if self.checkpoints else []
        kept = f"The weights of step {last.step - count} are in '{newest[-1]}'" if newest else "Nothing was saved"
        reason = last.reason if isinstance(last, Skipped) else ""
        return (
            f"Steps {last.step - count + 1} to {last.step} were not taken: {reason}. {kept}. "
            "Lower the learning rate, or look for bad rows."
        )

    def _stopped(self, done: int) -> str:
        if self.checkpoints:
            return f"Stopped after step {done} of {self.total_steps}, which is saved. Go on with --resume."
        return f"Stopped after step {done} of {self.total_steps}. Nothing was saved: there is no output folder."

    def step(self, step: int, batches: list[Batch]) -> Stepped | Skipped:
        """Take optimiser step number `step` (0-based) on its batches, unless its loss or gradient is not finite."""
        began = time.perf_counter()
        config = self.config
        n_labels = sum(batch.n_label_tokens for batch in batches)
        loss = 0.0
        for index, batch in enumerate(batches):
            self._seed(step * len(batches) + index)
            loss += self._backward(batch, n_labels, measured=not self._measured and index == 0)
        norm = self._clip()
        if not math.isfinite(loss) or not math.isfinite(norm):
            reason = f"the loss is {loss} and the gradient's norm {norm}; {self._origin(step, batches, n_labels)}"
            self.optimizer.zero_grad(set_to_none=True)
            return Skipped(step + 1, reason, time.perf_counter() - began)
        warmup = warmup_steps(self.total_steps, config.warmup_ratio)
        rate = learning_rate(config.lr_scheduler_type, config.learning_rate, step, self.total_steps, warmup)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        if not self._measured:
            self.kinds, self._measured = memory.bytes_by_kind(self.model, self.optimizer), True
            self.optimizer_state_bytes = state_bytes(self.optimizer).total
            self.ledger = memory.ledger(self.model, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return Stepped(
            step + 1, loss, rate, norm, sum(b.n_tokens for b in batches), sum(b.input_ids.numel() for b in batches), n_labels,
            sum(b.n_rows for b in batches), time.perf_counter() - began,
        )  # fmt: skip

    def _seed(self, micro_batch: int) -> None:
        """Dropout's seed for one micro-batch of the run."""
        torch.manual_seed(self.config.seed * _SEED_STRIDE + micro_batch)

    def _origin(self, step: int, batches: list[Batch], n_labels: int) -> str:
        """Where the step's values stopped being finite."""

        def forward() -> torch.Tensor:
            losses = []
            for index, batch in enumerate(batches):
                self._seed(step * len(batches) + index)
                with self._attention(self.model):
                    losses.append(self._loss(batch, n_labels))
            return torch.stack(losses)

        return diagnose.origin(self.model, forward)

    def _clip(self) -> float:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(trained, self.config.max_grad_norm, norm)
        return float(norm)

    def _set_checkpointing(self) -> None:
        if self.config.gradient_checkpointing:  # transformers 5.23 renamed it
            new_name = getattr(self.model, "activation_checkpointing_enable", None)
            (new_name or self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    def _restore(self) -> int:
        if not (self.config.resume and self.checkpoints):
            return 0
        newest, damaged = checkpoint.newest(self.checkpoints)
        self.warnings += [f"{what}; the one before it is used" for what in damaged]
        return checkpoint.restore(newest, self.model, self.optimizer, self.identity) if newest else 0
