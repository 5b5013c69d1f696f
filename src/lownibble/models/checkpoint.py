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

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lownibble import stored
from lownibble.errors import ModelError
from lownibble.models.sources import ModelSource
from lownibble.tensorfile import TYPES

INDEX = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 16, 256


def _dtype(folder: Path) -> torch.dtype:
    config = stored.read_json(folder / "config.json")
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    said = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    name = next((name for name in said if isinstance(name, str)), "").removeprefix("torch.")
    return getattr(torch, name) if name in ("float32", "float16") else torch.bfloat16


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
        self.stored, self.dtype = stored.of_folder(source.folder), _dtype(source.folder)
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
        """model.safetensors, else the shards that the index names, else every safetensors file: transformers' order."""
        index, whole = folder / INDEX, folder / "model.safetensors"
        if whole.is_file():  # saved over shards, whose index transformers leaves
            return [whole]
        if index.is_file():
            try:
                return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"'{index}' is damaged ({type(error).__name__}: {error}). Download the model again.") from None
        return sorted(folder.glob("*.safetensors"))

    def read(self, key: str) -> Tensor:
        """Read one tensor, through its own memory map."""
        with safe_open(self.file_of[key], "pt") as handle:
            tensor: Tensor = handle.get_tensor(key)
        if key not in self._sampled:
            self._sampled[key] = _sample(tensor)
        return tensor

    def read_entry(self, key: str, index: int) -> Tensor:
        """Read one entry of a tensor's first dimension, and no more of the file; a copy."""
        with safe_open(self.file_of[key], "pt") as handle:
            entry: Tensor = handle.get_slice(key)[index : index + 1][0]
        return entry.clone()

    def facts(self, key: str) -> tuple[torch.dtype, torch.Size]:
        """A tensor's dtype and shape, without reading it."""
        with safe_open(self.file_of[key], "pt") as handle:
            found = handle.get_slice(key)
            kind = found.get_dtype()
            if kind not in TYPES:
                raise ModelError(f"'{self.name}': tensor '{key}' is of the type {kind}, which is not known here.")
            return TYPES[kind], torch.Size(found.get_shape())

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
