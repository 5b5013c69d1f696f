"""Task kinds of a study, with the columns of their rows, their templates and their metrics.

A kind says how a row becomes prompt and completion, and how an answer is scored: by 'likelihood' (the most probable of the labels
wins), by 'generation' (the generated answer is scored against the reference) or by 'loss' (perplexity of completions). Templates
of the study file override those of the kind.
"""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple

from lownibble.config import DataConfig
from lownibble.data import Dataset
from lownibble.errors import ConfigError, DataError


class Kind(NamedTuple):
    """A kind of task.

    Attributes:
        columns: of every row; none: whatever the task's data options take. scored_by: see above. metrics: their names, the main
            one first; higher is better, except for 'perplexity'.
        margin: default equivalence margin of the first metric: 2 points of accuracy or pass@1, 1 of F1 and ROUGE; for perplexity:
            of its logarithm, the loss, as a share of it.
        max_new_tokens: of a generated answer. stop: strings at which such an answer ends.
    """

    columns: tuple[str, ...]
    scored_by: Literal["likelihood", "generation", "loss"]
    metrics: tuple[str, ...]
    margin: float
    prompt_template: str | None = None
    completion_template: str | None = None
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()


LOSS_MARGIN = 0.01
"""Losses that differ by less than this share of them count as equal."""

KINDS: dict[str, Kind] = {
    "classification": Kind(
        ("text", "label"), "likelihood", ("accuracy", "label_probability"), 0.02, "{text}\nLabel:", " {label}"
    ),
    "nli": Kind(
        ("premise", "hypothesis", "label"), "likelihood", ("accuracy", "label_probability"), 0.02,
        "Premise: {premise}\nHypothesis: {hypothesis}\nLabel:", " {label}",
    ),
    "question-answering": Kind(
        ("context", "question", "answer"), "generation", ("f1", "exact_match"), 0.01,
        "{context}\nQuestion: {question}\nAnswer:", " {answer}", 32, ("\n",),
    ),
    "summarisation": Kind(
        ("document", "summary"), "generation", ("rougeL", "rouge1", "rouge2"), 0.01, "{document}\nSummary:", " {summary}", 64,
        ("\n",),
    ),
    "code": Kind(
        ("prompt", "completion", "tests", "setup"), "generation", ("pass@1",), 0.02, "{prompt}\n", "{completion}", 256,
        ("\nassert", "\nprint("),
    ),
    "code-completion": Kind(
        ("prompt", "canonical_solution", "test", "entry_point"), "generation", ("pass@1",), 0.02, "{prompt}",
        "{canonical_solution}", 256, ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\n@"),
    ),
    "completion": Kind((), "loss", ("perplexity",), LOSS_MARGIN),
    "instruction": Kind(("messages",), "loss", ("perplexity",), LOSS_MARGIN),
    "language-modelling": Kind(("text",), "loss", ("perplexity",), LOSS_MARGIN),
}  # fmt: skip


def check_kind(kind: str) -> None:
    """Check that a task kind exists.

    Raises:
        ConfigError: it does not; the message suggests the nearest.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.3)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"There is no task kind '{kind}'.{hint} Kinds: {', '.join(KINDS)}.")


def with_templates(kind: str, data: DataConfig) -> DataConfig:
    """The data with the kind's templates where it has none of its own; unchanged for the demo data, which has its own."""
    found = KINDS[kind]
    if found.prompt_template is None or data.path == "demo":
        return data
    changed: DataConfig = data.with_options(
        prompt_template=data.prompt_template if data.prompt_template is not None else found.prompt_template,
        completion_template=data.completion_template if data.completion_template is not None else found.completion_template,
    )
    return changed


def check_columns(task: str, kind: str, data: Dataset) -> None:
    """Check that every row has the columns of the kind.

    Raises:
        DataError: some are missing; the message says what was found and what is expected.
    """
    expected = KINDS[kind].columns
    for row in data.rows:
        missing = [column for column in expected if column not in row.fields]
        if missing:
            raise DataError(
                f"{row.origin}: the task '{task}' ({kind}) lacks {', '.join(missing)}. Expected: {', '.join(expected)}. Found: "
                f"{', '.join(row.fields) or 'nothing'}."
            )
