"""Resolve the names in a study file: check that rows fit their task and that models exist, and compute a digest of each.

A cell's digest is of these digests and not of the paths, so that a study can be moved, and changed rows make new cells. Errors
that would make cells fail are raised here if they can be found before anything is run. `Began` sees that runs had those rows and
models: a record under the digest of others would never be made again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from lownibble import stored
from lownibble.config import DataConfig
from lownibble.data import Dataset, Encoded, choices, encode, load, read_sides
from lownibble.errors import ConfigError, DataError, ModelError
from lownibble.lora import plan
from lownibble.lora.activated import for_shapes
from lownibble.models import load_tokenizer, resolve, skeleton
from lownibble.study import bases, digests
from lownibble.study.answers import score_answers
from lownibble.study.spec import Cell, Contents
from lownibble.study.tasks import KINDS, check_columns


def look(cells: Iterable[Cell]) -> Contents:
    """Check and digest the models and rows of these cells; one cell per model, method and task is enough.

    Raises:
        DataError: rows are missing, invalid, or do not fit their task.
        ModelError: a model is missing, or its tokenizer lacks what the rows need.
        TargetError: the LoRA targets match nothing.
        ConfigError: a method cannot train on weights as they are stored, or would be scored on other rows or tokens of a task
            than the other methods; a task's scorer is not installed, or cannot run.
    """
    models: dict[str, str] = {}
    data: dict[str, tuple[str, str]] = {}
    seen: set[tuple[object, ...]] = set()
    scored: dict[tuple[str, str], tuple[Cell, str]] = {}
    for cell in cells:
        config = cell.config
        source = resolve(config.model, config.revision)
        if cell.model not in models:
            models[cell.model] = digests.of_model(config.model, source.folder)
        how, repacked = stored.of_folder(source.folder), config.merge_aware or bool(cell.quantize)
        if why := bases.why_not(how, config.method, repacked=repacked):
            raise ConfigError(f"'{config.model}' cannot be trained with the method '{cell.method}': {why}")
        if config.method != "full" and (cell.model, cell.method) not in seen:
            plan(skeleton(source, torch.float32), for_shapes(config.lora), "default")
        key = (cell.model, cell.task, config.train.max_length)
        if key not in seen:
            sides = load_rows(cell.task, cell.kind, config.data)
            data[cell.task] = (sides[0].digest, sides[1].digest)
            encoded = check_rows(cell.task, cell.kind, sides, load_tokenizer(source), config.data, config.train.max_length)
            labels = _labels(encoded)
            other, theirs = scored.setdefault((cell.model, cell.task), (cell, labels))
            if theirs != labels:
                raise ConfigError(
                    f"The methods '{other.method}' and '{cell.method}' cannot be compared on the task '{cell.task}': with "
                    f"max_length {other.config.train.max_length} and {config.train.max_length} they would be scored on different "
                    "evaluation rows or tokens. Give both a max_length that cuts neither, or the same one."
                )
        seen |= {key, (cell.model, cell.method)}
    return Contents(models, data)


class Began:
    """The rows and models that a study began with."""

    def __init__(self, contents: Contents, cells: Iterable[Cell]) -> None:
        """Args:
        contents: of `look`. cells: all that are run.
        """
        self._models = contents.models
        self._stamps: dict[str, list[tuple[str, int, int]]] = {}
        self._rows: dict[tuple[str, bool], dict[str, str]] = {}
        for cell in cells:
            if cell.model not in self._stamps:
                self._stamps[cell.model] = digests.stamp(cell.config.model)
            if (cell.task, cell.tuning) not in self._rows:
                train, evaluation = contents.data[cell.task]
                if cell.contents[2] != evaluation:  # the learning rate search takes fewer of them
                    evaluation = load_rows(cell.task, cell.kind, cell.config.data)[1].digest
                self._rows[cell.task, cell.tuning] = {"train_digest": train, "eval_digest": evaluation}

    def check(self, cell: Cell, found: Mapping[str, Any]) -> None:
        """Check that a cell's run, or its base, was made of these, by its record and by the model's files.

        Raises:
            DataError: the rows have changed. ModelError: the model has.
        """
        said, then = (
            found.get("data", {}),
            "The record of that run was not kept. Run the study again: its cells are new ones then.",
        )
        if any(said.get(name, digest) != digest for name, digest in self._rows[cell.task, cell.tuning].items()):
            raise DataError(f"The rows of the task '{cell.task}' changed while the study ran. {then}")
        model, now = cell.config.model, digests.stamp(cell.config.model)
        if now != self._stamps[cell.model]:
            if digests.of_model(model, Path(model).expanduser()) != self._models[cell.model]:
                raise ModelError(f"The model '{model}' changed while the study ran. {then}")
            self._stamps[cell.model] = now


def load_rows(task: str, kind: str, data: DataConfig) -> tuple[Dataset, Dataset]:
    """Load a task's training and evaluation rows, and check their columns.

    Raises:
        DataError: they are missing, invalid, or lack columns of the kind.
    """
    for side in read_sides(data):
        if side is not None:
            check_columns(task, kind, side)
    return load(data)


def _labels(encoded: Encoded) -> str:
    """A digest of what evaluation rows are scored on: their origins and label tokens."""
    rows = [(row.origin, list(compress(row.input_ids, row.is_label))) for row in encoded.examples]
    return digests.of_values({"rows": rows})


def check_rows(
    task: str, kind: str, sides: tuple[Dataset, Dataset], tokenizer: Any, data: DataConfig, max_length: int
) -> Encoded:  # fmt: skip
    """Raise the errors that training on these rows and scoring them would raise; returns the encoded evaluation rows.

    Raises:
        DataError: they are not rows of that kind. ConfigError, ModelError: as `encode` and `score_answers`.
    """
    asked = KINDS[kind]
    encoded = [encode(side, tokenizer, data, max_length) for side in sides]
    forms = {side.form for side in encoded}
    if kind == "language-modelling" and forms != {"text"}:
        raise DataError(f"The rows of the task '{task}' are {', '.join(forms)}, not text alone. Leave their other columns out.")
    if asked.scored_by == "likelihood" and choices(*sides, tokenizer, data, max_length) is None:
        raise DataError(
            f"The rows of the task '{task}' ({kind}) have no labels to choose from: one only, or too many for so few rows. Give "
            "rows of two labels at least, each of them several times."
        )
    if asked.scored_by == "generation":
        rows = sides[1].rows[:1] if kind.startswith("code") else sides[1].rows  # running programs is slow
        score_answers(kind, replace(sides[1], rows=rows), [""] * len(rows))
    return encoded[1]
