"""Digests that name a study's results: of JSON values, and of a model's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def of_values(what: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def of_model(model: str, folder: Path) -> str:
    """A hub id or 'demo' as it is; of a GGUF file its SHA-256; of another local model that over the names and bytes of its
    weights, configuration and tokenizer in `folder`."""
    files = _files(model, folder)
    if not files:
        return model
    if Path(model).expanduser().is_file():  # not of its conversion, whose config.json names the version of transformers
        return _of_file(files[0]).hex()
    state = hashlib.sha256()
    for file in files:
        state.update(file.name.encode() + b"\0")
        state.update(_of_file(file))
    return state.hexdigest()


def stamp(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file that `of_model` reads; none if it reads none, or the model is gone."""
    return [(file.name, (at := file.stat()).st_size, at.st_mtime_ns) for file in _files(model, Path(model).expanduser())]


def _files(model: str, folder: Path) -> list[Path]:
    path = Path(model).expanduser()
    if model == "demo" or not path.exists():
        return []
    if path.is_file():
        return [path]
    kinds = (".safetensors", ".json", ".txt", ".model", ".jinja")
    return [file for file in sorted(folder.iterdir()) if file.suffix in kinds and file.is_file()]


def _of_file(path: Path) -> bytes:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
