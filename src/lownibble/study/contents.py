"""What the names in a study file stand for: rows that fit their task, models that are there, and a digest of each.

A cell's name has these digests in it and not the paths, so that a study can be moved, and changed rows make new cells. All of
it is looked at before anything is run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from lownibble.config import RunConfig
from lownibble.data import encode, load, read
from lownibble.models import load_tokenizer, resolve
from lownibble.study.tasks import check_columns


class Contents(NamedTuple):
    """Digests. models: of each model; a hub id stands for itself. data: of each task's training and evaluation rows."""

    models: dict[str, str]
    data: dict[str, tuple[str, str]]


def look(configs: dict[tuple[str, str], tuple[str, RunConfig]]) -> Contents:
    """Read what the runs of each (model, task) read.

    Args:
        configs: the task's kind and one of its runs, by (model, task).
    Raises:
        DataError: rows are missing, bad, or do not fit their task.
        ModelError: a model is missing, or its tokenizer lacks what the rows need.
    """
    models: dict[str, str] = {}
    data: dict[str, tuple[str, str]] = {}
    for (model, task), (kind, config) in configs.items():
        source = resolve(config.model, config.revision)
        if task not in data:
            for side in read(config.data.path, config.data.split, config.data.eval_split):
                if side is not None:
                    check_columns(task, kind, side)
        sides = load(config.data)
        if config.data.eval_path is not None:
            check_columns(task, kind, sides[1])
        if model not in models:
            models[model] = _digest(source.folder) if Path(config.model).expanduser().exists() else config.model
        data.setdefault(task, (sides[0].digest, sides[1].digest))
        tokenizer = load_tokenizer(source)
        for rows in sides:
            encode(rows, tokenizer, config.data, config.train.max_length)
    return Contents(models, data)


def _digest(folder: Path) -> str:
    """sha256 over the names and bytes of a model folder's weights, configuration and tokenizer."""
    state = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja") and file.is_file():
            state.update(file.name.encode() + b"\0")
            with file.open("rb") as opened:
                state.update(hashlib.file_digest(opened, "sha256").digest())
    return state.hexdigest()
