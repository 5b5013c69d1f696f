"""What preference objectives have in common; the objectives are in `preference_losses.py`.

Each row becomes a few figures (`columns`: log-probabilities of its answers under the policy and the reference), and the losses of
rows are functions of these. Rows of a step may be dealt to any microbatches: a step's loss is a sum over rows divided by their
number, and what ties rows together is fixed before the first pass (`of_step`): of ORPO the number of tokens in its likelihood, of
KTO the KL term. So both are those of the whole step, where TRL takes them for each microbatch; without accumulation they are the
same. An evaluation's are those of all its rows: it collects the same figures.

Log-probabilities go through the head in chunks (`loss.token_logps`). Where the model can (`Passes.share_prefixes`), tokens that
the sequences of a pass begin with alike, such as the prompt of a pair, are computed once. The reference model is the policy
before the first step; see `reference.py`. Not supported: packed rows, encoder-decoder models, shards, a mixture's load-balancing
loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lownibble.config import DataConfig, TrainConfig
from lownibble.data import (
    Batch,
    Choice,
    Dataset,
    Encoded,
    Example,
    PreferenceBatch,
    check_rows,
    collate_preferences,
    encode_preferences,
)
from lownibble.errors import ConfigError
from lownibble.lora.active import adapter_off
from lownibble.models.attention import takes_prefixes
from lownibble.training.distributed import Ranks
from lownibble.training.evaluate import Evaluation, Evaluator, Sums
from lownibble.training.loss import token_logps
from lownibble.training.microbatches import Collate, padding
from lownibble.training.objectives import Objective, check_positions, check_tokens
from lownibble.training.passes import Passes


class Answers(NamedTuple):
    """Figures of S sequences, each (S,) float32: sums of log-probabilities over the answers' tokens and over all label tokens,
    and the numbers of both."""

    logps: Tensor
    n_tokens: Tensor
    whole_logps: Tensor
    n_whole: Tensor


def answers(model: Any, batch: PreferenceBatch) -> Answers:
    """Run the sequences of a batch on the model's device."""
    places_L, labels_L = batch.label_places
    shape = batch.input_ids.shape
    if takes_prefixes(model):
        assert batch.prefixes is not None
        at_L = batch.prefixes.places(places_L, shape[1])
        flat = token_logps(model, batch.prefixes.input_ids, None, at_L, labels_L, batch.prefixes)
    else:
        flat = token_logps(model, batch.input_ids, batch.mask, places_L, labels_L)
    whole_ST = flat.new_zeros(shape.numel()).index_copy(0, places_L, flat).view(shape)
    is_label_ST = flat.new_zeros(shape.numel()).index_fill(0, places_L, 1).view(shape)
    n_prompt_S = torch.zeros_like(batch.input_ids[:, 0]) if batch.n_prompt is None else batch.n_prompt
    is_answer_ST = torch.arange(1, shape[1] + 1, device=flat.device) >= n_prompt_S.unsqueeze(1)
    answer_ST = whole_ST * is_answer_ST
    return Answers(answer_ST.sum(1), (is_label_ST * is_answer_ST).sum(1), whole_ST.sum(1), is_label_ST.sum(1))


class Preferences(Objective):
    """What the objectives over preferences have in common.

    Attributes:
        name: as in `TrainConfig.objective`.
        pairs: rows are pairs of answers.
        has_reference: the loss needs a reference model's log-probabilities.
        n_columns: columns of a row in an evaluation.
    """

    name = ""
    pairs = True
    has_reference = True
    n_columns = 0

    def __init__(self, config: TrainConfig | None = None) -> None:
        self.config = config or TrainConfig(objective=self.name)

    def of(self, config: TrainConfig) -> Objective:
        """The objective with a run's options."""
        return type(self)(config)

    def check_rows(self, dataset: Dataset, data: DataConfig) -> None:
        """Check the rows before a model is loaded. Raises as `data.check_rows`."""
        check_rows(dataset, data, self.name)

    def encode(self, dataset: Dataset, tokenizer: Any, data: DataConfig, max_length: int) -> Encoded:
        """Tokenise the rows of a data set."""
        return encode_preferences(dataset, tokenizer, data, max_length, self.name, self.config.batch_size)

    def check(self, model: Any, encoded: list[Encoded], data: DataConfig) -> None:
        """Check that the model can be trained so.

        Raises:
            ConfigError: it has an encoder, or trains its routers' balance. DataError: tokens have no embeddings, or rows are
                longer than the model's table of positions.
        """
        check_tokens(model, encoded)
        if model.config.is_encoder_decoder:
            raise ConfigError(f"Objective '{self.name}' is not for {type(model).__name__}, which has an encoder.")
        check_positions(model, encoded)
        asked = getattr(model.config.get_text_config(), "output_router_logits", False)
        if asked and self.config.router_aux_loss_coef is None:
            raise ConfigError(
                f"Objective '{self.name}' does not train the balance of routers, which the configuration of "
                f"{type(model).__name__} asks for (output_router_logits). Set router_aux_loss_coef=0."
            )

    def choices(
        self, train: Dataset, evaluation: Dataset, tokenizer: Any, data: DataConfig, max_length: int
    ) -> list[Choice] | None:
        """None: rows are no multiple choice."""
        return None

    def collate(self, model: Any, tokenizer: Any) -> Collate:
        """The function that collates rows into one batch."""
        return partial(collate_preferences, pad_token_id=padding(tokenizer), pairs=self.pairs)

    def weight(self, batch: Batch) -> int:
        """A step's loss is a mean over rows."""
        return batch.n_rows

    def prepare(self, batches: list[Batch], passes: Passes, ranks: Ranks) -> None:
        """Give the batches of a step the reference's log-probabilities, where they were not computed before, and what ties the
        step's rows together."""
        made = [batch for batch in batches if isinstance(batch, PreferenceBatch)]
        if self.has_reference:
            ranks.together(lambda: self._refer_all(made, passes))
        of_step = self.tie(made, passes, ranks)
        for batch in made:
            batch.of_step = of_step

    def _refer_all(self, batches: list[PreferenceBatch], passes: Passes) -> None:
        for batch in batches:
            self.refer(batch, passes, off=True)

    def refer(self, batch: PreferenceBatch, passes: Passes, *, off: bool) -> None:
        """Compute the reference's log-probabilities of a batch that has none; `off`: with the adapter off."""
        if batch.reference is None:
            with passes.frozen(), adapter_off(passes.model, off=off):
                batch.reference = self.references(passes.model, batch.to(passes.device)).cpu()

    def references(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """The model's log-probabilities that are kept as the reference's: (rows, 2) float32."""
        return torch.stack(answers(model, batch).logps.chunk(2), 1)

    def tie(self, batches: list[PreferenceBatch], passes: Passes, ranks: Ranks) -> Tensor | None:
        """What ties the rows of a step together, () float32, or None."""
        return None

    def tie_of_rows(self, table: Tensor) -> Tensor | None:
        """`tie` of an evaluation, from the columns of all rows."""
        return None

    def columns(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """Figures of each row, (rows, columns) float32, differentiable."""
        raise NotImplementedError

    def losses(self, table: Tensor, of_step: Tensor | None) -> Tensor:
        """Losses (rows,) from the rows' columns."""
        raise NotImplementedError

    def scores(self, table: Tensor, of_step: Tensor | None) -> tuple[dict[str, float], list[bool]]:
        """What an evaluation tells, by TRL's names; and of pairs, by row, whether the chosen answer has the higher reward."""
        raise NotImplementedError

    def evaluated_columns(self, model: Any, batch: PreferenceBatch) -> Tensor:
        """`columns`, and what `tie_of_rows` needs."""
        return self.columns(model, batch)

    def loss(self, model: Any, batch: Batch, total: int | Tensor) -> Tensor:
        """Sum of the rows' losses divided by `total`: () float32, ready for backward. The batch is on the model's device."""
        assert isinstance(batch, PreferenceBatch)
        return self.losses(self.columns(model, batch), batch.of_step).sum() / total

    def evaluator(
        self, examples: list[Example], choices: list[Choice] | None, collate: Collate, batch_size: int, device: torch.device
    ) -> Evaluator:
        """The evaluator for held-out rows."""
        return PreferenceEvaluator(self, examples, collate, batch_size, device)

    def reference_of(self, batch: PreferenceBatch) -> Tensor:
        """The reference of a batch's rows, (rows, 2); zeros in a dry run, whose values do not matter."""
        like = torch.zeros(batch.n_rows, 2, device=batch.input_ids.device)
        return like if batch.reference is None else batch.reference


class PreferenceEvaluator(Evaluator):
    """Evaluates a preference objective: its loss over all rows, and its scores."""

    def __init__(
        self, objective: Preferences, examples: list[Example], collate: Collate, batch_size: int, device: torch.device
    ) -> None:
        super().__init__(examples, None, collate, batch_size, device)
        self.objective = objective

    def _sums(self, model: Any) -> Sums:
        """The columns of this rank's rows, zeros for the others'."""
        table = torch.zeros(len(self.examples), self.objective.n_columns, dtype=torch.float64)
        n_labels = 0
        for rows, _ in self._batches([len(example.input_ids) for example in self.examples]):
            self.before_pass()
            batch = self.collate([self.examples[i] for i in rows])
            assert isinstance(batch, PreferenceBatch)
            assert self.passes is not None
            if self.objective.has_reference:
                self.objective.refer(batch, self.passes, off=True)
            with self.passes.frozen():
                table[rows] = self.objective.evaluated_columns(model, batch.to(self.device)).double().cpu()
            n_labels += batch.n_label_tokens
        return Sums(0.0, n_labels, table)

    def _result(self, loss: float, n_labels: int, scores_NC: Tensor) -> Evaluation:
        table = scores_NC.float()
        of_rows = self.objective.tie_of_rows(table)
        loss = float(self.objective.losses(table, of_rows).mean(dtype=torch.float64))
        return Evaluation(loss, n_labels, *self.objective.scores(table, of_rows))
