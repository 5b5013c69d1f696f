"""Models without weights: transformers' class of a configuration, on the meta device, weights tied, buffers real."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from lownibble import stored
from lownibble.errors import ModelError
from lownibble.models.sources import ModelSource


def skeleton(source: ModelSource, dtype: torch.dtype) -> Any:
    """The model of a folder.

    Raises:
        ModelError: transformers cannot use its configuration, or its quantisation is not supported.
    """
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"'{source.name}': config.json cannot be used: {reason(error)}") from None
    stored.check(stored.of_folder(source.folder), source.name)
    for part in (config, getattr(config, "text_config", None)):
        vars(part or config).pop("quantization_config", None)
    try:
        with init_empty_weights(include_buffers=False):
            model = _auto(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(f"'{source.name}' is not a language model transformers knows: {reason(error)}") from None
    model.tie_weights()
    if (source.folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(source.folder)
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"'{source.name}': generation_config.json cannot be used: {reason(error)}") from None
    return model


def empty_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model of the contents of a config.json, on the meta device, weights tied, buffers real.

    Raises:
        ModelError: transformers does not support it.
    """
    try:
        with TemporaryDirectory() as folder:  # transformers' reader, which knows infinities written as text
            (Path(folder) / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in stored.KEYS}))
            wanted = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = _auto(wanted).from_config(wanted, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"This configuration is of no language model transformers knows: {reason(error)}") from None
    model.tie_weights()
    return model


def _auto(config: Any) -> Any:
    """transformers' class for language models of this kind."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def reason(error: Exception) -> str:
    """An error of transformers on one line: its first sentence or what follows a heading."""
    first, *rest = str(error).splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
