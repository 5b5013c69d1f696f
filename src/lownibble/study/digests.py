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
    path = Path(model).expanduser()
    if model == "demo" or not path.exists():
        return model
    if path.is_file():  # not of its conversion, whose config.json names the version of transformers
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    state = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja") and file.is_file():
            state.update(file.name.encode() + b"\0")
            with file.open("rb") as opened:
                state.update(hashlib.file_digest(opened, "sha256").digest())
    return state.hexdigest()
