"""Initialisations of new adapters: functions registered by name in `registry.INITS`.

An initialisation is called once per adapted layer, `init(adapter, start)`, and sets A and B. It may use the layer's dense
weight, its packed weight, and the second moments of the layer's inputs, and may return another packed weight, which then
replaces the base's, or another dense one. An adapter whose initialisation changed its base records that in its file, because it
fits no other base.

kaiming, gaussian    B = 0: the model's output is unchanged (LoRA, Hu et al. 2021; PEFT)
random               B random too (for tests)
eva                  B = 0, A the directions in which the inputs vary most (EVA, Paischer et al. 2024)
loftq                B A the best approximation of W - Q, what packing lost (LoftQ, Li et al. 2023; one iteration, as in PEFT)
qera, qera_approx    B A the best approximation of (W - Q) x, what the layer's output lost, over the calibration rows: exact, and
                     as if inputs were uncorrelated (QERA, Zhang et al. 2024, theorems 1 and 2). CLoQ (Deng et al. 2025) is the
                     same closed form on a base that GPTQ packed
pissa                B A the main part of W, the base holds the rest (PiSSA, Meng et al. 2024)
olora                B A the first r columns and rows of W = Q R, the base holds the rest (OLoRA, Buyukakyuz 2024)

The product B A is what the closed forms define; how it is split is free, and decides how fast training moves it: a step of Adam
changes A and B by the learning rate whatever their size, so the change of W grows with the size of the other factor. The starts
that correct a packed base give the rows of A the norm that kaiming gives them, and B the rest, so that the rate which suits LoRA
suits them. pissa, olora and eva split as in PEFT.

Random numbers are drawn on the CPU, so the weights do not depend on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lownibble.calibration import Moments
from lownibble.lora.layer import LowRank
from lownibble.quant import quantize
from lownibble.quant.packed import PackedWeight
from lownibble.registry import CODECS, INITS


@dataclass(frozen=True)
class Start:
    """Inputs of an initialisation.

    Attributes:
        path: of the layer.
        weight: returns the layer's dense weight (out, in) in float32, read from the checkpoint if the base is packed.
            Raises ModelError if it is not available.
        packed: the packed weight; None if the base is dense.
        moments: second moments of the layer's inputs from a calibration pass, if the initialisation is `calibrated`; else None.
        generator: random generator, on the CPU.
    """

    path: str
    weight: Callable[[], Tensor]
    packed: PackedWeight | None
    moments: Moments | None
    generator: torch.Generator

    @property
    def statistics(self) -> Tensor | None:
        """(in,) mean squares of the layer's inputs, or None."""
        return None if self.moments is None else self.moments.diagonal


Function = Callable[[LowRank, Start], PackedWeight | Tensor | None]
"""Sets A and B; returns what the base becomes, packed or dense (out, in), or None if it stays."""


@dataclass(frozen=True)
class Initialisation:
    """A function that starts adapters, and what is known of it beforehand.

    Attributes:
        calibrated: it needs the moments of a layer's inputs, so a calibration pass is run for it.
        corrects: it starts at what packing lost; on a dense base nothing is, and it starts as `kaiming`.
        keeps_base: it never returns another base; so a resumed run, which has A and B from a checkpoint, need not repeat it.
        takes_out: it returns the base without scale B A. Files then hold [A; A0] and [B, -B0], A0 and B0 the start, and fit the
            base as it was; an adapter whose base was changed in another way fits no other base.
    """

    function: Function
    calibrated: bool = False
    corrects: bool = False
    keeps_base: bool = False
    takes_out: bool = False

    def __call__(self, adapter: LowRank, start: Start) -> PackedWeight | Tensor | None:
        """Set A and B of a layer's adapter."""
        return (kaiming if self.corrects and start.packed is None else self.function)(adapter, start)


def initialisation(
    *, calibrated: bool = False, corrects: bool = False, keeps_base: bool = False, takes_out: bool = False
) -> Callable[[Function], Initialisation]:  # fmt: skip
    """Decorator that says what is known of an initialisation; a plain function is one of which nothing is."""
    return partial(Initialisation, calibrated=calibrated, corrects=corrects, keeps_base=keeps_base, takes_out=takes_out)


def kaiming(adapter: LowRank, start: Start) -> None:
    """A kaiming-uniform with a = sqrt 5, as PEFT and nn.Linear; B zero."""
    bound = 1 / math.sqrt(adapter.lora_A.shape[1])
    adapter.lora_A.data.copy_(torch.empty_like(adapter.lora_A, device="cpu").uniform_(-bound, bound, generator=start.generator))
    adapter.lora_B.data.zero_()


def gaussian(adapter: LowRank, start: Start) -> None:
    """A normal with standard deviation 1 / r; B zero."""
    adapter.lora_A.data.copy_(torch.empty_like(adapter.lora_A, device="cpu").normal_(0, 1 / adapter.r, generator=start.generator))
    adapter.lora_B.data.zero_()


def random(adapter: LowRank, start: Start) -> None:
    """As `kaiming`, and B uniform: the adapter changes the output from the start."""
    kaiming(adapter, start)
    bound = 1 / math.sqrt(adapter.r)
    adapter.lora_B.data.copy_(torch.empty_like(adapter.lora_B, device="cpu").uniform_(-bound, bound, generator=start.generator))


@initialisation(calibrated=True, keeps_base=True)
def eva(adapter: LowRank, start: Start) -> None:
    """A the leading eigenvectors of the inputs' second moments, B zero. Ranks are as configured (PEFT's rho = 1)."""
    kaiming(adapter, start)
    assert start.moments is not None
    vectors = torch.linalg.eigh(start.moments.matrix.double()).eigenvectors.flip(1).t()[: adapter.r]
    adapter.lora_A.data[: len(vectors)].copy_(vectors)


@initialisation(corrects=True, keeps_base=True)
def loftq(adapter: LowRank, start: Start) -> None:
    """B A the best approximation of what packing lost."""
    _approximate(adapter, start, *leading(_lost(start), adapter.r))


@initialisation(calibrated=True, corrects=True, keeps_base=True)
def qera(adapter: LowRank, start: Start) -> None:
    """B A the best approximation of what packing lost, in the layer's output."""
    assert start.moments is not None
    root = start.moments.root().double()
    left, right = leading(_lost(start).double() @ root, adapter.r)
    _approximate(adapter, start, left, torch.linalg.solve_triangular(root, right, upper=False, left=False))


@initialisation(calibrated=True, corrects=True, keeps_base=True)
def qera_approx(adapter: LowRank, start: Start) -> None:
    """As `qera` for inputs that are uncorrelated."""
    assert start.moments is not None
    root = start.moments.damped().diagonal().double().sqrt()
    left, right = leading(_lost(start).double() * root, adapter.r)
    _approximate(adapter, start, left, right / root)


@initialisation(takes_out=True)
def pissa(adapter: LowRank, start: Start) -> PackedWeight | Tensor:
    """B A the leading part of W; returns the rest."""
    weight = start.weight()
    left, right = leading(weight, adapter.r)
    size = left.norm(dim=0).mul_(right.norm(dim=1)).sqrt() / adapter.scale**0.5
    kaiming(adapter, start)
    adapter.lora_B.data[:, : len(size)] = torch.nn.functional.normalize(left, dim=0) * size
    adapter.lora_A.data[: len(size)] = torch.nn.functional.normalize(right, dim=1) * size.unsqueeze(1)
    return _rest(adapter, start, weight)


@initialisation(takes_out=True)
def olora(adapter: LowRank, start: Start) -> PackedWeight | Tensor:
    """B A the first r columns of Q and rows of R, W = Q R; returns the rest."""
    weight = start.weight()
    q, r = torch.linalg.qr(weight)
    kaiming(adapter, start)
    n = min(adapter.r, len(r))
    adapter.lora_B.data[:, :n], adapter.lora_A.data[:n] = q[:, :n], r[:n]
    return _rest(adapter, start, weight)


def leading(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(out, k) and (k, in) float64 with k = min(r, out, in), whose product is the best approximation of `matrix` of that rank.

    By the eigenvectors of the smaller of its two products with itself: the leading directions are what matters here, and a
    singular value decomposition takes several times as long.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    product = matrix @ matrix.t() if wide else matrix.t() @ matrix
    vectors = torch.linalg.eigh(product).eigenvectors.flip(1)[:, :r]
    return (vectors, vectors.t() @ matrix) if wide else (matrix @ vectors, vectors.t())


def _lost(start: Start) -> Tensor:
    """W - Q, (out, in) float32."""
    weight = start.weight()
    assert start.packed is not None
    return weight - start.packed.dequantize(torch.float32).to(weight.device)


KAIMING_NORM = 3**-0.5
"""Root mean square norm of a row of `kaiming`'s A: each of `in` values has the variance 1 / (3 in)."""


def _approximate(adapter: LowRank, start: Start, left: Tensor, right: Tensor) -> None:
    """Set scale B A = left right, rows of A of kaiming's norm; what is left of the rank starts as kaiming."""
    kaiming(adapter, start)
    norms = right.norm(dim=1)
    kept = norms > 0
    n = int(kept.sum())
    factor = norms[kept] / KAIMING_NORM
    adapter.lora_A.data[:n].copy_(right[kept] / factor.unsqueeze(1))
    adapter.lora_B.data[:, :n].copy_(left[:, kept] * (factor / adapter.scale))


def _rest(adapter: LowRank, start: Start, weight: Tensor) -> PackedWeight | Tensor:
    """W - scale B A, packed as the base is."""
    left = without(weight, adapter.lora_A.data, adapter.lora_B.data, adapter.scale)
    return left if start.packed is None else repack(left, start.packed)


def without(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """W - scale B A, (out, in) float32."""
    return weight - scale * (lora_B @ lora_A).to(weight.device)


def repack(weight: Tensor, packed: PackedWeight) -> PackedWeight:
    """A dense weight (out, in), packed as `packed` is."""
    config = CODECS[packed.facts()["quant_type"]].options(packed.facts())
    return quantize(weight.to(packed.device), config).with_dtype(packed.dtype)


def find(init_lora_weights: bool | str) -> Initialisation:
    """The initialisation named by `LoraConfig.init_lora_weights`."""
    name = {True: "kaiming", False: "random"}[init_lora_weights] if isinstance(init_lora_weights, bool) else init_lora_weights
    found = INITS[name]
    return found if isinstance(found, Initialisation) else Initialisation(found)
