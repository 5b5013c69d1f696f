"""Evaluation: loss over the label tokens of the held-out rows and, for classification data, accuracy.

The predicted label is the candidate completion with the highest likelihood after the prompt. If every candidate is one token,
the forward pass for the loss also gives the prediction (logits at the last prompt position); otherwise each candidate of each row
is another sequence to run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lownibble.data import Choice, Example, cut
from lownibble.models.head import Head, hidden_states
from lownibble.training.distributed import ALONE
from lownibble.training.loss import token_losses
from lownibble.training.microbatches import Collate
from lownibble.training.passes import Passes
from lownibble.training.sharding import rest_gathered


@dataclass
class Evaluation:
    """Mean loss over `label_tokens`; for classification data also the scores and, per row, whether the prediction is correct."""

    loss: float
    label_tokens: int
    scores: dict[str, float] = field(default_factory=dict)
    correct: list[bool] = field(default_factory=list)


@dataclass
class Sums:
    """What one rank adds to an evaluation: the sum of losses over its label tokens, and scores (rows, candidates), zero for the
    rows of others."""

    loss: float
    n_labels: int
    scores: Tensor


class Evaluator:
    """Evaluates a model on fixed rows; `choices` are the same rows as questions, or None.

    Attributes:
        ranks: the processes that share the rows.
        passes: the run's, for what is computed as in training; None outside of one.
        before_pass: called before each forward pass.
        max_tokens: maximum tokens per forward pass, padding included (a longer row runs alone); None: only `batch_size` applies.
    """

    def __init__(
        self, examples: list[Example], choices: list[Choice] | None, collate: Collate, batch_size: int, device: torch.device
    ) -> None:
        self.examples, self.choices, self.collate, self.device = examples, choices, collate, device
        self.batch_size = batch_size
        self.ranks = ALONE
        self.passes: Passes | None = None
        self.max_tokens: int | None = None
        self.before_pass: Callable[[], None] = lambda: None
        self.single_token = choices is not None and all(len(c) == 1 for c in choices[0].candidates)

    def halve(self) -> int:
        """Halve the size of forward passes; returns the new `max_tokens`, or 0 if a pass is already a single row."""
        longest = max(len(example.input_ids) for example in self.examples)
        tokens = min(self.max_tokens or sys.maxsize, min(self.batch_size, len(self.examples)) * longest)
        if tokens <= longest:
            return 0
        self.max_tokens = max(longest, tokens // 2)
        return self.max_tokens

    def __call__(self, model: Any) -> Evaluation:
        """Evaluate; restores the model's training mode."""
        with rest_gathered(model, self.ranks):
            sums = self.ranks.together(lambda: self._share(model))
        total, scores_NC = torch.tensor(sums.loss, dtype=torch.float64), sums.scores
        self.ranks.add_up([total, scores_NC] if scores_NC.numel() else [total])
        (n_labels,) = self.ranks.total(sums.n_labels)
        return self._result(float(total) / n_labels, n_labels, scores_NC)

    @torch.no_grad()
    def _share(self, model: Any) -> Sums:
        """Evaluate this rank's share of the rows."""
        was_training = model.training
        model.eval()
        try:
            return self._sums(model)
        finally:
            model.train(was_training)

    def _sums(self, model: Any) -> Sums:
        head, total, n_labels = Head(model), 0.0, 0
        scores_NC = torch.zeros(len(self.examples), len(self.choices[0].candidates) if self.choices else 0)
        for rows, counts in self._batches(self.examples):
            self.before_pass()
            batch = self.collate([self.examples[i] for i in rows]).to(self.device)
            hidden_BTH = hidden_states(model, batch.input_ids, batch.mask, source=batch.source)
            if not counts:
                continue
            is_label_BT = batch.labels[:, 1:] != -100
            losses_L = token_losses(head, hidden_BTH[:, :-1][is_label_BT], batch.labels[:, 1:][is_label_BT])
            total += float(losses_L.sum(dtype=torch.float64))
            n_labels += len(losses_L)
            if self.choices is not None and self.single_token:
                paired = batch.source is not None  # an encoder-decoder predicts the answer at the decoder's first position
                last_prompt = torch.tensor(
                    [0 if paired else len(self.choices[i].prompt_ids) - 1 for i in rows], device=self.device
                )
                logits_BV = head(hidden_BTH[torch.arange(len(rows), device=self.device), last_prompt]).float()
                candidates = torch.tensor([c[0] for c in self.choices[0].candidates], device=self.device)
                scores_NC[rows] = logits_BV.log_softmax(1)[:, candidates].cpu()
        if self.choices is not None and not self.single_token:
            scores_NC = self._candidate_likelihoods(model, head)
        return Sums(total, n_labels, scores_NC)

    def _batches(self, examples: list[Example]) -> list[tuple[list[int], bool]]:
        """This rank's batches, and whether they count: with sharded weights all ranks run as many passes."""
        batches = cut([len(example.input_ids) for example in examples], self.max_tokens, most=self.batch_size)
        mine = [(rows, True) for rows in batches[self.ranks.rank :: self.ranks.world]]
        missing = -(-len(batches) // self.ranks.world) - len(mine) if self.ranks.sharded else 0
        return mine + [(batches[-1][-1:], False)] * missing

    def _candidate_likelihoods(self, model: Any, head: Head) -> Tensor:
        """(rows, candidates): log-probability of each candidate's tokens after the prompt."""
        assert self.choices is not None
        rows = [
            Example(c.prompt_ids + candidate, [False] * len(c.prompt_ids) + [True] * len(candidate), c.origin)
            for c in self.choices for candidate in c.candidates
        ]  # fmt: skip
        scores = torch.zeros(len(rows))
        for batch_rows, counts in self._batches(rows):
            self.before_pass()
            batch = self.collate([rows[i] for i in batch_rows]).to(self.device)
            hidden_BTH = hidden_states(model, batch.input_ids, batch.mask, source=batch.source)[:, :-1]
            if not counts:
                continue
            is_label_BT = batch.labels[:, 1:] != -100
            losses_L = token_losses(head, hidden_BTH[is_label_BT], batch.labels[:, 1:][is_label_BT])
            owner_L = is_label_BT.nonzero()[:, 0]
            sums_B = torch.zeros(len(batch_rows), device=self.device).index_add_(0, owner_L, -losses_L)
            scores[batch_rows] = sums_B.cpu()
        return scores.view(len(self.choices), -1)

    def _result(self, loss: float, n_labels: int, scores_NC: Tensor) -> Evaluation:
        if self.choices is None:
            return Evaluation(loss, n_labels)
        answers = torch.tensor([choice.answer for choice in self.choices])
        correct = (scores_NC.argmax(1) == answers).tolist()
        probability = scores_NC.softmax(1).gather(1, answers.unsqueeze(1)).mean().item()
        accuracy = sum(correct) / len(correct)
        return Evaluation(loss, n_labels, {"accuracy": accuracy, "label_probability": probability}, correct)
