"""The tensors of a model folder: names up front, contents one at a time, and a digest that identifies the weights.

Each tensor is read through its own short-lived memory map: one kept open would count every page read so far as resident memory.

The digest identifies weights regardless of sharding and model name: sha256 over every tensor's name, dtype, shape and a sample of
its bytes. It distinguishes one base from another (a fine-tuned copy differs nearly everywhere); it does not find a damaged byte,
because hashing all of a large checkpoint would take longer than loading it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lownibble import stored
from lownibble.errors import ModelError
from lownibble.models.sources import ModelSource
from lownibble.tensorfile import TYPES

INDEX = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 16, 256


def stored_config(folder: Path) -> dict[str, Any]:
    """How config.json says that the weights are stored: its `quantization_config`, or {}.

    It may be the text model's in a configuration of several parts; old GPTQ folders have it in a file of its own.
    """
    found, beside = stored.of(_config(folder)), folder / "quantize_config.json"
    return found or ({"quant_method": "gptq", **_json(beside)} if beside.is_file() else {})


def _dtype(folder: Path) -> torch.dtype:
    config = _config(folder)
    text = config.get("text_config")
    said = [part.get(key) for part in (config, text) if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    name = next((name for name in said if isinstance(name, str)), "bfloat16").removeprefix("torch.")
    return _DTYPES.get(name, torch.bfloat16)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json")


def _json(file: Path) -> dict[str, Any]:
    """The file's content; {} if it is no JSON object, which is said where it is read as a model's configuration."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Checkpoint:
    """The safetensors files of a model folder.

    Attributes:
        files: the shards, in order.
        file_of: name of a tensor -> its shard.
        stored: how config.json says that the weights are quantised (its `quantization_config`), or {}.
        dtype: the type that config.json gives the model.
    Raises:
        ModelError: no safetensors, a missing shard, or a damaged file.
    """

    def __init__(self, source: ModelSource) -> None:
        self.name = source.name
        self.stored, self.dtype = stored_config(source.folder), _dtype(source.folder)
        self.files = self._files(source.folder)
        if not self.files:
            raise ModelError(
                f"'{source.name}' holds no *.safetensors file. Convert its weights to safetensors; pickle is not read."
            )
        self.file_of: dict[str, Path] = {}
        self._sampled: dict[str, bytes] = {}
        for file in self.files:
            if not file.is_file():
                raise ModelError(f"'{source.name}': shard {file.name} is missing. Download the model again.")
            try:
                with safe_open(file, "pt") as handle:
                    self.file_of |= dict.fromkeys(handle.keys(), file)
            except SafetensorError as error:
                raise ModelError(f"'{file}' is damaged or cut short ({error}). Download it again.") from None

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        """The shards that the index names, else model.safetensors, else every safetensors file."""
        index, whole = folder / INDEX, folder / "model.safetensors"
        if index.is_file():
            try:
                return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"'{index}' is damaged ({type(error).__name__}: {error}). Download the model again.") from None
        return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))

    def read(self, key: str) -> Tensor:
        """Read one tensor, through its own memory map."""
        with safe_open(self.file_of[key], "pt") as handle:
            tensor: Tensor = handle.get_tensor(key)
        if key not in self._sampled:
            self._sampled[key] = _sample(tensor)
        return tensor

    def facts(self, key: str) -> tuple[torch.dtype, torch.Size]:
        """A tensor's dtype and shape, without reading it."""
        with safe_open(self.file_of[key], "pt") as handle:
            found = handle.get_slice(key)
            return TYPES[found.get_dtype()], torch.Size(found.get_shape())

    def digest(self) -> str:
        """Digest of the weights, 64 hexadecimal digits; reads the tensors that have not been read yet."""
        state = hashlib.sha256()
        for key in sorted(self.file_of):
            if key not in self._sampled:
                self.read(key)
            state.update(key.encode() + b"\0" + self._sampled[key])
        return state.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    """sha256 of a tensor's dtype, shape and a few evenly spaced chunks of its bytes."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    state = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if len(flat) <= _SAMPLES * _SAMPLE_BYTES:
        starts, length = [0], len(flat)
    else:
        starts, length = [i * (len(flat) - _SAMPLE_BYTES) // (_SAMPLES - 1) for i in range(_SAMPLES)], _SAMPLE_BYTES
    for start in starts:
        state.update(flat[start : start + length].numpy().tobytes())
    return state.digest()
