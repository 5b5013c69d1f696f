"""Resolve a model's configuration: bundled (`models.toml`), a config.json or its folder, a GGUF file, or on the hub."""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from lownibble.arch import ModelShape, read_config, read_shape
from lownibble.errors import ModelError

_TABLE = Path(__file__).with_name("models.toml")
DEMO = "smollm2-135m"
"""The bundled model that 'demo' means."""


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def names() -> list[str]:
    """Names of all bundled models."""
    return list(_table())


def published_parameters(name: str) -> int:
    """Published parameter count of a bundled model."""
    return int(_table()[name]["parameters"])


def hub_id(model: str) -> str:
    """The hub id of a bundled model's name; any other name unchanged."""
    return str(_table()[model.lower()]["ids"][0]) if model.lower() in _table() else model


def find_shape(model: str) -> ModelShape:
    """The shape of the model that `find_config` finds.

    Raises:
        ModelError: as `find_config`, or the configuration cannot be planned.
    """
    path = Path(model).expanduser()
    return read_shape(find_config(model), str(path) if path.exists() else model)


def find_config(model: str) -> dict[str, Any]:
    """The contents of config.json of 'demo', a bundled model by its name or hub id, a config.json or its folder, a GGUF file, or
    any hub id.

    Raises:
        ModelError: there is no such model (names the nearest), or its configuration cannot be downloaded or read.
    """
    ids = {each.lower(): name for name, entry in _table().items() for each in (name, *entry["ids"])}
    name = DEMO if model == "demo" else ids.get(model.lower())
    if name is not None:
        return {key: value for key, value in _table()[name].items() if key not in ("ids", "parameters")}
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        from lownibble.models.sources import gguf_config

        return gguf_config(path)
    if path.exists():
        return read_config(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        near = difflib.get_close_matches(model.lower(), ids, n=1, cutoff=0.3)
        raise ModelError(
            f"There is no model '{model}'. {f'Did you mean {near[0]!r}? ' if near else ''}Give 'demo', a bundled model "
            f"({', '.join(names())}), a config.json, a model folder, a .gguf file or a hub id (owner/name)."
        )
    return read_config(_download(model))


def _download(repo: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, "config.json"))
    except (OSError, ValueError) as error:  # all of its errors are one of these
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"The configuration of '{repo}' cannot be had: {reason} Check the id and the network, or give a config.json."
        ) from None
