"""The model that a benchmark measures: the embedded one, a model folder, or random weights of a bundled shape.

Speed and memory do not depend on the values of the weights, so nothing is downloaded: one safetensors file in bfloat16 is
written tensor by tensor as they are drawn on the device, into memory (/dev/shm) if there is room, and every contender loads it
with its own loader. Matrices are normal with standard deviation 0.02, vectors are ones (scales of norms) or zeros (biases).
There is a tokenizer because loaders want one; benchmarks on random weights use token ids.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lownibble import tensorfile
from lownibble.arch import read_config
from lownibble.errors import ConfigError
from lownibble.models import pick_device, resolve
from lownibble.models.skeleton import empty_model
from lownibble.planning.models import find_config

RANDOM = "lownibble_random_weights"
"""Key in config.json of a folder with random weights: the name of the shape."""
IN_MEMORY = Path("/dev/shm")
"""A file system in memory, where there is one."""
_SPARE = 1.05
"""Room that is asked for, as a multiple of the weights' bytes."""
_WORDS = 1000


class Subject(NamedTuple):
    """A model folder, the name to record for it, and whether its weights are random."""

    folder: Path
    name: str
    random: bool


@contextmanager
def subject(model: str) -> Iterator[Subject]:
    """The folder to measure; random weights are removed at the end.

    Args:
        model: 'demo' or a model folder with weights: those; else a bundled shape, a config.json, its folder or a hub id: random
            weights of that shape.
    Raises:
        ModelError: there is no such model, or transformers does not support it.
        ConfigError: no room for the weights, or not a causal model.
    """
    if model == "demo":
        yield Subject(resolve(model).folder, "demo", False)
        return
    path = Path(model).expanduser()
    if path.is_dir() and any(path.glob("*.safetensors")):
        name = read_config(path).get(RANDOM)
        yield Subject(path, name or model, name is not None)
        return
    config = find_config(model)
    empty = empty_model(config, torch.bfloat16)
    if empty.config.is_encoder_decoder:
        raise ConfigError(f"'{model}' has an encoder; these benchmarks are of causal models. Give another --model.")
    needed = sum(parameter.nbytes for parameter in empty.parameters())
    with tempfile.TemporaryDirectory(prefix="lownibble-", dir=_place(needed, model)) as folder:
        write_random(empty, config, Path(folder), model)
        yield Subject(Path(folder), model, True)


def _place(needed: int, model: str) -> Path:
    """Where there is room for `needed` bytes: memory before disk."""
    told = []
    for place in (IN_MEMORY, Path(tempfile.gettempdir())):
        if not place.is_dir():
            continue
        free = shutil.disk_usage(place).free
        if place == IN_MEMORY:  # its limit may be more than there is
            free = min(free, psutil.virtual_memory().available)
        if free >= _SPARE * needed:
            return place
        told.append(f"{place} has {free / 1e9:.1f} GB free")
    raise ConfigError(
        f"Random weights of '{model}' take {needed / 1e9:.1f} GB, and {' and '.join(told)}. Free some, set TMPDIR to a folder "
        "with room, or give a smaller --model."
    )


def write_random(empty: Any, config: dict[str, Any], folder: Path, name: str) -> None:
    """Write random weights for an empty model, its configuration and a tokenizer into a folder.

    Args:
        empty: the model on the meta device. config: the contents of its config.json. name: recorded in it.
    """
    device = pick_device()
    generator = torch.Generator(device).manual_seed(0)
    entries = {
        key: tensorfile.Entry(torch.bfloat16, tuple(parameter.shape)) for key, parameter in empty.named_parameters()
    }  # fmt: skip

    def drawn(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) > 1:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.02)
        return torch.full(shape, float(key.endswith("weight")), dtype=torch.bfloat16)

    parts = ((key, 0, drawn(key, entry.shape)) for key, entry in entries.items())
    tensorfile.write(folder / "model.safetensors", entries, parts, {"format": "pt"})
    if device.type == "cuda":
        torch.cuda.empty_cache()
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    whole = {**special, **config, "architectures": [type(empty).__name__], "dtype": "bfloat16", RANDOM: name}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    write_tokenizer(folder, min(_WORDS, empty.get_input_embeddings().weight.shape[0]))


def write_tokenizer(folder: Path, words: int) -> None:
    """Write a tokenizer of the words w0, w1, ... into a model's folder."""
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "w0", "eos_token": "w1", "pad_token": "w2", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def random_ids(vocab: int, count: int, batch_size: int, length: int) -> torch.Tensor:
    """(count, batch_size, length) int64 token ids, the same for everyone."""
    shape = (count, batch_size, length)
    return torch.randint(min(3, vocab - 1), vocab, shape, generator=torch.Generator().manual_seed(1))
