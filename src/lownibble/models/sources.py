"""Model sources: resolve a name or path to a local folder in Hugging Face format.

`demo` is the embedded model (see `embedded.py`); a `.gguf` file is converted once, with transformers' own reader, into a folder
in the cache, keyed by its content; a folder is used directly; anything else is a hub id. The result is always `config.json`,
safetensors and a tokenizer, so there is one loading path. Only safetensors is accepted, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lownibble import embedded
from lownibble.errors import ModelError

_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
}
"""GGUF's `tokenizer.ggml.pre` -> the pre-tokenizer it names, if transformers' conversion loses it."""


_GGUF_UINT32, _GGUF_STRING = 4, 8  # GGUF's numbers for these types


@dataclass(frozen=True)
class ModelSource:
    """A local model folder, the name to record for it, and the GGUF type that it was decoded from ('' if none)."""

    folder: Path
    name: str
    gguf_type: str = ""


def resolve(model: str, revision: str | None = None) -> ModelSource:
    """The local folder of `demo`, a folder, a .gguf file or a hub id (downloaded if needed).

    Raises:
        ModelError: nothing of that name, no safetensors in it, or the download failed.
    """
    if model == "demo":
        return ModelSource(from_gguf(embedded.fetch("model")), "demo")
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file '{model}'. Check the path.")
        return ModelSource(from_gguf(path), str(path.resolve()), _gguf_type(path))
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"'{model}' is not a model folder: config.json is missing. Point to the folder that holds it.")
        return ModelSource(path, str(path.resolve()))
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ModelError(f"There is no model '{model}'. Give 'demo', a model folder, a .gguf file or a hub id (owner/name).")
    return ModelSource(_download(model, revision), model)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
    others = ["consolidated*", "*/*.safetensors"]  # the same weights in other layouts, and in subfolders
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=others))
    except GatedRepoError:
        raise ModelError(f"'{repo}' is gated. Accept its licence on its hub page and log in with: hf auth login") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelError(f"There is no folder '{repo}' and no such model on the hub: {str(error).splitlines()[0]}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"There is no folder '{repo}', and the hub cannot be reached ({str(error).splitlines()[0]}). "
            "Check the name, or download the model first and give its folder."
        ) from None


def from_gguf(path: Path) -> Path:
    """The Hugging Face folder (bfloat16) of a GGUF file; converted once and cached by content hash."""
    folder = _folder_of(path)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        _convert(path, aside)
        try:
            aside.rename(folder)
        except OSError:  # another process finished first; its result is the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def gguf_config(path: Path) -> dict[str, Any]:
    """The contents of config.json of a GGUF file: those of its conversion if there is one, else as transformers reads them.

    Raises:
        ModelError: the file is damaged, or of an architecture that transformers does not know.
    """
    file = _folder_of(path) / "config.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    from transformers import AutoConfig

    with _readable(path):
        return dict(AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict())


def _folder_of(path: Path) -> Path:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return embedded.cache_dir() / "models" / f"gguf-{digest[:16]}"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, OSError, NotImplementedError, struct.error) as error:
        raise ModelError(
            f"Cannot read '{path}': {error}. The file is damaged, or transformers does not know its architecture."
        ) from error


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _readable(path):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pre_tokenizer = _PRE_TOKENIZERS.get(_gguf_pre_tokenizer(path))
    if pre_tokenizer is not None:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["pre_tokenizer"] = pre_tokenizer
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for file in folder.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def _gguf_type(path: Path) -> str:
    """The type of most of a GGUF file's weights: 'Q4_K_M', 'F16', ...; 'file' if it does not say."""
    from gguf import LlamaFileType

    found = _gguf_value(path, b"general.file_type", _GGUF_UINT32)
    try:
        return str(LlamaFileType(struct.unpack("<I", found[:4])[0]).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    except (ValueError, struct.error):
        return "file"


def _gguf_pre_tokenizer(path: Path) -> str:
    """The metadata value `tokenizer.ggml.pre`, or ''."""
    found = _gguf_value(path, b"tokenizer.ggml.pre", _GGUF_STRING)
    return found[8 : 8 + struct.unpack("<Q", found[:8])[0]].decode() if found else ""


def _gguf_value(path: Path, key: bytes, kind: int) -> bytes:
    """The bytes from a metadata value on, at most 256, or b''. Found by search: gguf's reader takes seconds for a vocabulary."""
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(entry)
        return b"" if start < 0 else content[start + len(entry) : start + len(entry) + 256]
