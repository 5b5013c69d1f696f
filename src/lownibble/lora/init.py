"""How a new adapter starts. Every method leaves the model's output unchanged, except `random` (for tests)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lownibble.lora.layer import LowRank


def _kaiming(adapter: LowRank, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(adapter.lora_A.shape[1])  # kaiming-uniform with a = sqrt 5, as PEFT and nn.Linear
    adapter.lora_A.data.copy_(torch.empty(adapter.lora_A.shape).uniform_(-bound, bound, generator=generator))
    adapter.lora_B.data.zero_()


def _gaussian(adapter: LowRank, generator: torch.Generator) -> None:
    adapter.lora_A.data.copy_(torch.empty(adapter.lora_A.shape).normal_(0, 1 / adapter.r, generator=generator))
    adapter.lora_B.data.zero_()


def _random(adapter: LowRank, generator: torch.Generator) -> None:
    _kaiming(adapter, generator)
    bound = 1 / math.sqrt(adapter.r)
    adapter.lora_B.data.copy_(torch.empty(adapter.lora_B.shape).uniform_(-bound, bound, generator=generator))


INITS: dict[bool | str, Callable[[LowRank, torch.Generator], None]] = {True: _kaiming, "gaussian": _gaussian, False: _random}
"""`LoraConfig.init_lora_weights` -> initialiser. Draws on the CPU, so the device does not change the weights."""
