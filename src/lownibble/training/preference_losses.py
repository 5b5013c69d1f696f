"""Preference objectives: DPO (Rafailov et al. 2023), ORPO (Hong et al. 2024), KTO (Ethayarajh et al. 2024).

The losses are TRL's, term by term, as functions of a few figures of each row; see `preference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lownibble.config import DataConfig
from lownibble.data import Dataset, Encoded, PreferenceBatch, encode_preferences
from lownibble.errors import ConfigError
from lownibble.models.attention import takes_prefixes
from lownibble.training.distributed import Ranks
from lownibble.training.passes import Passes
from lownibble.training.preference import Preferences, answers


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _rewards(chosen: Tensor, rejected: Tensor, logps: tuple[Tensor, Tensor]) -> tuple[dict[str, float], list[bool]]:
    correct = chosen > rejected
    found = {
        "rewards/chosen": _mean(chosen), "rewards/rejected": _mean(rejected), "rewards/accuracies": _mean(correct.float()),
        "rewards/margins": _mean(chosen - rejected), "logps/chosen": _mean(logps[0]), "logps/rejected": _mean(logps[1]),
    }  # fmt: skip
    return found, correct.tolist()


class Ratios(NamedTuple):
    """Log-ratios of policy and reference, (rows,), the lengths of the answers in tokens, and the options of the loss."""

    chosen: Tensor
    rejected: Tensor
    n_chosen: Tensor
    n_rejected: Tensor
    beta: float
    smoothing: float

    @property
    def margin(self) -> Tensor:
        """beta times the difference of the ratios."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def mean_margin(self) -> Tensor:
        """The difference of the ratios per token."""
        return self.chosen / self.n_chosen.clamp(min=1) - self.rejected / self.n_rejected.clamp(min=1)

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """beta times the ratios."""
        return self.beta * self.chosen, self.beta * self.rejected


def _exo_pair(r: Ratios) -> Tensor:
    q, log_wrong, log_right = r.margin.sigmoid(), math.log(r.smoothing), math.log1p(-r.smoothing)
    return q * (logsigmoid(r.margin) - log_right) + (1 - q) * (logsigmoid(-r.margin) - log_wrong)


def _robust(r: Ratios) -> Tensor:
    flipped = r.smoothing * logsigmoid(-r.margin)
    return (flipped - (1 - r.smoothing) * logsigmoid(r.margin)) / (1 - 2 * r.smoothing)


def _nca_pair(r: Ratios) -> Tensor:
    chosen, rejected = r.rewards
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


DPO_LOSSES: dict[str, Callable[[Ratios], Tensor]] = {
    "sigmoid": lambda r: -logsigmoid(r.margin),
    "hinge": lambda r: torch.relu(1 - r.margin),
    "ipo": lambda r: (r.mean_margin - 1 / (2 * r.beta)) ** 2,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": lambda r: -logsigmoid(r.rewards[0]) - logsigmoid(-r.rewards[1]),
    "sppo_hard": lambda r: (r.chosen - 0.5 / r.beta) ** 2 + (r.rejected + 0.5 / r.beta) ** 2,
    "apo_zero": lambda r: 1 - r.rewards[0].sigmoid() + r.rewards[1].sigmoid(),
    "apo_down": lambda r: r.rewards[0].sigmoid() + 1 - r.margin.sigmoid(),
    "sigmoid_norm": lambda r: -logsigmoid(r.beta * r.mean_margin),
}
"""Losses of DPO by TRL's names: (rows,) from the ratios."""


class Dpo(Preferences):
    """Direct preference optimisation and its variants (`loss_type`)."""

    name = "dpo"
    n_columns = 6

    def columns(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """Log-probabilities of chosen and rejected answers, the reference's, and the answers' lengths."""
        found = answers(model, batch)
        return torch.stack([*found.logps.chunk(2), *self.reference_of(batch).unbind(1), *found.n_tokens.chunk(2)], 1)

    def _ratios(self, table: Tensor) -> Ratios:
        chosen, rejected, of_chosen, of_rejected, n_chosen, n_rejected = table.unbind(1)
        config = self.config
        return Ratios(chosen - of_chosen, rejected - of_rejected, n_chosen, n_rejected, config.beta, config.label_smoothing)

    def losses(self, table: Tensor, of_step: Tensor | None) -> Tensor:
        """By `loss_type`."""
        return DPO_LOSSES[self.config.loss_type or "sigmoid"](self._ratios(table))

    def scores(self, table: Tensor, of_step: Tensor | None) -> tuple[dict[str, float], list[bool]]:
        """Rewards and log-probabilities."""
        return _rewards(*self._ratios(table).rewards, (table[:, 0], table[:, 1]))


class Orpo(Preferences):
    """Odds-ratio preference optimisation: likelihood of the chosen conversation, and the odds of both answers; no reference."""

    name = "orpo"
    has_reference = False
    n_columns = 4

    def columns(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """Mean log-probabilities of chosen and rejected answers, the chosen conversation's log-probability and its tokens."""
        found = answers(model, batch)
        means, half = found.logps / found.n_tokens.clamp(min=1), batch.n_rows
        return torch.stack([*means.chunk(2), found.whole_logps[:half], found.n_whole[:half]], 1)

    def tie(self, batches: list[PreferenceBatch], passes: Passes, ranks: Ranks) -> Tensor | None:
        """Rows of the step for each token in the likelihood."""
        tokens = [int((batch.labels[: batch.n_rows, 1:] >= 0).sum()) for batch in batches]
        n_tokens, n_rows = ranks.total(sum(tokens), sum(batch.n_rows for batch in batches))
        return torch.tensor(n_rows / max(1, n_tokens))

    def tie_of_rows(self, table: Tensor) -> Tensor | None:
        """The same of an evaluation."""
        return len(table) / table[:, 3].sum()

    def losses(self, table: Tensor, of_step: Tensor | None) -> Tensor:
        """Negative log-likelihood, and the log-sigmoid of the log odds ratio."""
        likelihood = table[:, 2] / (table[:, 3] if of_step is None else 1 / of_step)
        return -likelihood - self.config.beta * logsigmoid(_log_odds(table))

    def scores(self, table: Tensor, of_step: Tensor | None) -> tuple[dict[str, float], list[bool]]:
        """Rewards, log-probabilities, and both parts of the loss."""
        beta, odds = self.config.beta, _log_odds(table)
        found, correct = _rewards(beta * table[:, 0], beta * table[:, 1], (table[:, 0], table[:, 1]))
        found |= {"nll_loss": float(-table[:, 2].sum() / table[:, 3].sum())}
        return found | {"log_odds_ratio": _mean(logsigmoid(odds)), "log_odds_chosen": _mean(odds)}, correct


def _log_odds(table: Tensor) -> Tensor:
    chosen, rejected = table[:, 0], table[:, 1]
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012)."""
    x = x.clamp(max=-torch.finfo(torch.float32).tiny)
    near = x > -math.log(2)
    return torch.where(near, (-torch.expm1(torch.where(near, x, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, x).exp()))


class Kto(Preferences):
    """Kahneman-Tversky optimisation: answers that are good or bad, compared with the policy's divergence from the reference."""

    name = "kto"
    pairs = False
    n_columns = 4

    @property
    def has_kl(self) -> bool:
        """Whether the loss has the KL term."""
        return self.config.loss_type != "apo_zero_unpaired"

    def check_rows(self, dataset: Dataset, data: DataConfig) -> None:
        """Check the rows, and that a batch has more than one."""
        if self.has_kl and self.config.batch_size == 1:
            raise ConfigError(
                "The 'batch_size' of TrainConfig must be at least 2 with objective 'kto': prompts are paired with other rows' "
                "answers. Got 1. Use --batch-size 2, or loss_type apo_zero_unpaired."
            )
        super().check_rows(dataset, data)

    def encode(self, dataset: Dataset, tokenizer: Any, data: DataConfig, max_length: int) -> Encoded:
        """Tokenise the rows of a data set; without the KL term no answers are exchanged."""
        group = self.config.batch_size if self.has_kl else 0
        return encode_preferences(dataset, tokenizer, data, max_length, self.name, group)

    def references(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """Log-probabilities of the answers and of the mismatched ones."""
        return torch.stack(self._both(model, batch), 1)

    def _both(self, model: Any, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """The same, without gradients: in one pass if the prompt, which they share, is computed once."""
        if batch.mismatched is None or not takes_prefixes(model):
            return answers(model, batch).logps, self._mismatched(model, batch)
        both = batch.joined(batch.mismatched).to(batch.input_ids.device)
        logps, mismatched = answers(model, both).logps.chunk(2)
        return logps, mismatched

    def _mismatched(self, model: Any, batch: PreferenceBatch) -> Tensor:
        if batch.mismatched is None:
            return torch.zeros(batch.n_rows, device=batch.input_ids.device)
        return answers(model, batch.mismatched.to(batch.input_ids.device)).logps

    def columns(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """Log-probabilities of the answers, the reference's, and the labels."""
        return self._columns(answers(model, batch).logps, batch)

    def _columns(self, logps: Tensor, batch: PreferenceBatch) -> Tensor:
        label = torch.zeros_like(logps) if batch.desirable is None else batch.desirable.to(logps.dtype)
        return torch.stack([logps, self.reference_of(batch)[:, 0], label], 1)

    def evaluated_columns(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """And the log-ratio of the mismatched answer."""
        logps, mismatched = self._both(model, batch)
        ratio = mismatched - self.reference_of(batch)[:, 1]
        return torch.cat([self._columns(logps, batch), ratio.unsqueeze(1)], 1)

    def tie(self, batches: list[PreferenceBatch], passes: Passes, ranks: Ranks) -> Tensor | None:
        """The KL term: mean log-ratio of the step's mismatched answers, at least 0."""
        if not self.has_kl:
            return None

        def ratios() -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for batch in batches:
                with passes.frozen():
                    found = self._mismatched(passes.model, batch.to(passes.device))
                total += (found.cpu() - self.reference_of(batch)[:, 1]).sum(dtype=torch.float64)
            return total

        total = ranks.together(ratios)
        ranks.add_up([total])
        (rows,) = ranks.total(sum(batch.n_rows for batch in batches))
        return (total / max(1, rows)).clamp(min=0).float()

    def tie_of_rows(self, table: Tensor) -> Tensor | None:
        """The KL term of an evaluation."""
        return table[:, 3].mean().clamp(min=0) if self.has_kl else None

    def losses(self, table: Tensor, of_step: Tensor | None) -> Tensor:
        """By `loss_type`, and weighted by label."""
        config, good = self.config, table[:, 2] > 0
        kl = 0.0 if of_step is None else of_step
        away = config.beta * (table[:, 0] - table[:, 1] - kl)
        weights = torch.where(good, config.desirable_weight, config.undesirable_weight)
        return weights * (1 - torch.where(good, away, -away).sigmoid())

    def scores(self, table: Tensor, of_step: Tensor | None) -> tuple[dict[str, float], list[bool]]:
        """Rewards and log-probabilities of good and bad answers, where there are any; and the KL term."""
        rewards, good = self.config.beta * (table[:, 0] - table[:, 1]), table[:, 2] > 0
        found = {} if of_step is None else {"kl": float(of_step)}
        for name, rows in (("chosen", good), ("rejected", ~good)):
            if bool(rows.any()):
                found |= {f"rewards/{name}": _mean(rewards[rows]), f"logps/{name}": _mean(table[rows, 0])}
        if bool(good.any()) and not bool(good.all()):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found, []


DPO, ORPO, KTO = Dpo(), Orpo(), Kto()
