"""Evaluation: loss over the label tokens of the held-out rows and, for classification data, accuracy.

The predicted label is the candidate completion with the highest likelihood after the prompt. If every candidate is one token, and
every row begins with its question's prompt, the forward pass for the loss also gives the prediction (logits at the last prompt
position). Otherwise each candidate of a row is another sequence. What they begin with alike is computed once
(`models/prefixes.py`) where the model can, so that a row with three candidates takes about one pass, and not four.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lownibble.data import Choice, Example, cut
from lownibble.memory.usage import is_exhausted
from lownibble.models.attention import prefix_attention
from lownibble.models.head import Head, hidden_states
from lownibble.models.linears import on_own_kernels
from lownibble.models.prefixes import tree
from lownibble.training.distributed import ALONE
from lownibble.training.loss import check_prefixes, token_losses
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
    """Evaluates a model on fixed rows; `choices` are the same rows as questions, or None. Questions of other rows (such as those
    that were too long) are left out.

    Attributes:
        ranks: the processes that share the rows.
        passes: the run's, for what is computed as in training; None outside of one.
        before_pass: called before each forward pass.
        max_tokens: maximum tokens per forward pass, padding included (a longer row runs alone); None: only `batch_size` applies.
        prefix_reason: why a prompt is computed for each of its candidates, "" if it is computed once; None: not known yet.
    """

    def __init__(
        self, examples: list[Example], choices: list[Choice] | None, collate: Collate, batch_size: int, device: torch.device
    ) -> None:
        origins = {example.origin for example in examples}
        self.choices = None if choices is None else [choice for choice in choices if choice.origin in origins]
        self.examples, self.collate, self.device, self.batch_size = examples, collate, device, batch_size
        self.ranks = ALONE
        self.passes: Passes | None = None
        self.max_tokens: int | None = None
        self.before_pass: Callable[[], None] = lambda: None
        self.single_token = self.choices is not None and _predicted_by_rows(examples, self.choices)
        self.prefix_reason: str | None = None

    def facts(self) -> dict[str, Any]:
        """For records: whether a prompt is computed once for all its candidates, and why not; nothing where there are none."""
        if self.choices is None or self.single_token or self.prefix_reason is None:
            return {}
        return {"candidates": {"share_their_prompt": not self.prefix_reason, "reason": self.prefix_reason}}

    def halve(self) -> int:
        """Make forward passes smaller: candidates apart if they were together (even in a tree attention sees each whole), else of
        half the tokens. Returns the new `max_tokens`, or 0 if a pass is already a single row."""
        longest = max(len(example.input_ids) for example in self.examples)
        if self.prefix_reason == "":
            self.prefix_reason = "it took more memory than there is"
            self.max_tokens = max(longest, self.max_tokens or self.batch_size * longest)
            return self.max_tokens
        tokens = min(self.max_tokens or sys.maxsize, min(self.batch_size, len(self.examples)) * longest)
        if tokens <= longest:
            return 0
        self.max_tokens = max(longest, tokens // 2)
        return self.max_tokens

    def __call__(self, model: Any) -> Evaluation:
        """Evaluate; restores the model's training mode."""
        with rest_gathered(model, self.ranks):
            if self.choices is not None and not self.single_token and self.prefix_reason is None:
                reasons = self.ranks.of_all(self._against_prefixes(model))
                self.prefix_reason = next(filter(None, reasons), "")
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
            with on_own_kernels(model):
                return self._sums(model)
        finally:
            model.train(was_training)

    def _against_prefixes(self, model: Any) -> str:
        """Why a prompt cannot be computed once for all candidates here, or ""."""
        if model.config.is_encoder_decoder:
            return "it has an encoder"
        self.before_pass()
        by_length = sorted((example.input_ids for row in range(len(self.examples)) for example in self._sequences(row)), key=len)
        try:
            return check_prefixes(model, by_length[-1], by_length[0])
        except Exception as error:  # with shards, other ranks would wait for this one's part of the next pass
            if self.ranks.sharded or not is_exhausted(error):
                raise
            return "there is no memory to try it"

    def _sums(self, model: Any) -> Sums:
        if self.choices is not None and not self.single_token:
            return self._sums_of_candidates(model)
        head, total, n_labels = Head(model), 0.0, 0
        scores_NC = torch.zeros(len(self.examples), len(self.choices[0].candidates) if self.choices else 0)
        for rows, counts in self._batches([len(example.input_ids) for example in self.examples]):
            self.before_pass()
            batch = self.collate([self.examples[i] for i in rows]).to(self.device)
            hidden_BTH = hidden_states(model, batch.input_ids, batch.mask, source=batch.source)
            if not counts:
                continue
            is_label_BT = batch.labels[:, 1:] != -100
            losses_L = token_losses(head, hidden_BTH[:, :-1][is_label_BT], batch.labels[:, 1:][is_label_BT])
            total += float(losses_L.sum(dtype=torch.float64))
            n_labels += len(losses_L)
            if self.choices is not None:
                paired = batch.source is not None  # an encoder-decoder predicts the answer at the decoder's first position
                last_prompt = torch.tensor(
                    [0 if paired else len(self.choices[i].prompt_ids) - 1 for i in rows], device=self.device
                )
                logits_BV = head(hidden_BTH[torch.arange(len(rows), device=self.device), last_prompt]).float()
                candidates = torch.tensor([c[0] for c in self.choices[0].candidates], device=self.device)
                scores_NC[rows] = logits_BV.log_softmax(1)[:, candidates].cpu()
        return Sums(total, n_labels, scores_NC)

    def _batches(self, lengths: list[int]) -> list[tuple[list[int], bool]]:
        """This rank's batches, and whether they count: with sharded weights all ranks run as many passes."""
        batches = cut(lengths, self.max_tokens, most=self.batch_size)
        mine = [(rows, True) for rows in batches[self.ranks.rank :: self.ranks.world]]
        missing = -(-len(batches) // self.ranks.world) - len(mine) if self.ranks.sharded else 0
        return mine + [(batches[-1][-1:], False)] * missing

    def _sequences(self, row: int) -> list[Example]:
        """A row, and its prompt with each candidate."""
        assert self.choices is not None
        prompt_ids, candidates, _, origin = self.choices[row]
        flags = [False] * len(prompt_ids)
        return [self.examples[row], *(Example(prompt_ids + c, flags + [True] * len(c), origin) for c in candidates)]

    def _sums_of_candidates(self, model: Any) -> Sums:
        head, n_labels, rows = Head(model), 0, [self._sequences(row) for row in range(len(self.examples))]
        sequences, size = [each for row in rows for each in row], len(rows[0])
        together = size if self.prefix_reason == "" else 1  # sequences of a row that a pass takes as one
        units = [range(start, start + together) for start in range(0, len(sequences), together)]
        losses_S = torch.zeros(len(sequences), dtype=torch.float64)
        for chosen, counts in self._batches([self._n_computed([sequences[i] for i in unit]) for unit in units]):
            self.before_pass()
            of_pass = [i for unit in chosen for i in units[unit]]
            found_S = self._losses(model, head, [sequences[i] for i in of_pass])
            if counts:
                losses_S[of_pass] = found_S.cpu()
                n_labels += sum(sum(sequences[i].is_label[1:]) for i in of_pass if i % size == 0)
        losses_NS = losses_S.view(len(rows), size)
        return Sums(float(losses_NS[:, 0].sum()), n_labels, -losses_NS[:, 1:].float())

    @staticmethod
    def _n_computed(sequences: list[Example]) -> int:
        """Tokens that are computed of sequences that share a prompt, at most."""
        return len(sequences[0].input_ids) + sum(sum(example.is_label) for example in sequences[1:])

    def _losses(self, model: Any, head: Head, sequences: list[Example]) -> Tensor:
        """(S,) float64: the sum of the losses over each sequence's label tokens."""
        if self.prefix_reason == "":
            prefixes = tree([example.input_ids for example in sequences]).to(self.device)
            flags = [flag for example in sequences for flag in (False, *example.is_label[1:])]
            at_L = torch.tensor(flags, device=self.device).nonzero()[:, 0]
            with prefix_attention(model):
                hidden_UH = hidden_states(model, prefixes.input_ids, None, prefixes=prefixes)[0]
            hidden_LH, labels_L = hidden_UH[prefixes.spread[at_L - 1]], prefixes.input_ids[0, prefixes.spread[at_L]]
            owner_L = torch.searchsorted(prefixes.begins, at_L, right=True) - 1
        else:
            batch = self.collate(sequences).to(self.device)
            hidden_BTH = hidden_states(model, batch.input_ids, batch.mask, source=batch.source)[:, :-1]
            is_label_BT = batch.labels[:, 1:] != -100
            hidden_LH, labels_L = hidden_BTH[is_label_BT], batch.labels[:, 1:][is_label_BT]
            owner_L = is_label_BT.nonzero()[:, 0]
        sums_S = torch.zeros(len(sequences), dtype=torch.float64, device=self.device)
        return sums_S.index_add_(0, owner_L, token_losses(head, hidden_LH, labels_L).double())

    def _result(self, loss: float, n_labels: int, scores_NC: Tensor) -> Evaluation:
        if self.choices is None:
            return Evaluation(loss, n_labels)
        answers = torch.tensor([choice.answer for choice in self.choices])
        correct = (scores_NC.argmax(1) == answers).tolist()
        probability = scores_NC.softmax(1).gather(1, answers.unsqueeze(1)).mean().item()
        accuracy = sum(correct) / len(correct)
        return Evaluation(loss, n_labels, {"accuracy": accuracy, "label_probability": probability}, correct)


def _predicted_by_rows(examples: list[Example], choices: list[Choice]) -> bool:
    """Whether the passes over the rows themselves hold the logits of every question."""
    return all(len(candidate) == 1 for candidate in choices[0].candidates) and all(
        example.input_ids[: len(choice.prompt_ids)] == choice.prompt_ids
        for example, choice in zip(examples, choices, strict=True)
    )
