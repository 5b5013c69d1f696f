"""Tiny mixtures of experts, one of each kind that the field has, and what tests need to compare them with transformers' own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lownibble.models.experts import expert_weights

sys.path.insert(0, str(Path(__file__).parent / "models"))
from architectures import build, quiet

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe")
"""Without and with shared experts, dense first layers, biases and clamps, weights held turned."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "q_b_proj", "kv_b_proj"]
"""Last names of attention's linear layers; not every model has all."""


def known(kind: str) -> None:
    """Skip the test where this transformers has no such model."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")


def folder_of(kind: str, folder: Path, tokenizer: Any) -> Path:
    """A folder with a random mixture, in hub layout."""
    known(kind)
    with quiet():
        build(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def theirs(folder: Path) -> Any:
    """The model as transformers loads it, float32."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def decode_into(reference: Any, packed: Any) -> int:
    """Give a dense model the decoded weights of a packed one; returns how many were experts'."""
    found = 0
    for path, module in packed.named_modules():
        if not hasattr(module, "facts"):
            continue
        weight, path = module.weight.dequantize(torch.float32), path.removesuffix(".base")
        if "experts" in module.facts:
            turned = reference.get_submodule(path.rpartition(".")[0]).is_transposed
            reference.get_parameter(path).data.copy_(weight.transpose(1, 2) if turned else weight)
            found += 1
        else:
            reference.get_submodule(path).weight.data.copy_(weight)
    return found


def dense_experts(model: Any) -> list[str]:
    """Paths of experts' weights that are dense."""
    return [path for path, held in expert_weights(model).items() if isinstance(held, torch.nn.Parameter)]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits, float32."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits.float()
    return found


def some_ids(seed: int = 0) -> torch.Tensor:
    """Two rows of tokens."""
    return torch.randint(4, 96, (2, 12), generator=torch.Generator().manual_seed(seed))
