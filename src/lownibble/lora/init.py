"""Initialisations of new adapters: functions registered by name in `registry.INITS`.

An initialisation is called once per adapted layer, `init(adapter, start)`, and sets A and B. It may use the layer's dense
weight, its packed weight, and the second moments of the layer's inputs, and may return another packed weight, which then
replaces the base's (LoftQ and similar). An adapter whose initialisation changed its base records that in its file, because it
fits no other base.

The built-in ones leave the model's output unchanged, except `random` (for tests). They draw random numbers on the CPU, so the
weights do not depend on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lownibble.lora.layer import LowRank
from lownibble.quant.packed import PackedWeight
from lownibble.registry import INITS


@dataclass(frozen=True)
class Start:
    """Inputs of an initialisation.

    Attributes:
        path: of the layer.
        weight: returns the layer's dense weight (out, in) in float32, read from the checkpoint if the base is packed.
            Raises ModelError if it is not available.
        packed: the packed weight; None if the base is dense.
        statistics: (in,) second moments of the layer's inputs from a calibration pass, or None.
        generator: random generator, on the CPU.
    """

    path: str
    weight: Callable[[], Tensor]
    packed: PackedWeight | None
    statistics: Tensor | None
    generator: torch.Generator


Init = Callable[[LowRank, Start], PackedWeight | None]


def kaiming(adapter: LowRank, start: Start) -> None:
    """A kaiming-uniform with a = sqrt 5, as PEFT and nn.Linear; B zero."""
    bound = 1 / math.sqrt(adapter.lora_A.shape[1])
    adapter.lora_A.data.copy_(torch.empty(adapter.lora_A.shape).uniform_(-bound, bound, generator=start.generator))
    adapter.lora_B.data.zero_()


def gaussian(adapter: LowRank, start: Start) -> None:
    """A normal with standard deviation 1 / r; B zero."""
    adapter.lora_A.data.copy_(torch.empty(adapter.lora_A.shape).normal_(0, 1 / adapter.r, generator=start.generator))
    adapter.lora_B.data.zero_()


def random(adapter: LowRank, start: Start) -> None:
    """As `kaiming`, and B uniform: the adapter changes the output from the start."""
    kaiming(adapter, start)
    bound = 1 / math.sqrt(adapter.r)
    adapter.lora_B.data.copy_(torch.empty(adapter.lora_B.shape).uniform_(-bound, bound, generator=start.generator))


def find(init_lora_weights: bool | str) -> Init:
    """The initialisation named by `LoraConfig.init_lora_weights`."""
    name = {True: "kaiming", False: "random"}[init_lora_weights] if isinstance(init_lora_weights, bool) else init_lora_weights
    found: Init = INITS[name]
    return found
