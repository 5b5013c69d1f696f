"""Adapter variants: what an adapted layer computes. Registered in `registry.VARIANTS`.

A variant defines the parameters an adapter adds to a layer, the layer's forward pass, the merged weight, and the parameters' keys
in PEFT's files. `LowRank` (layer.py) holds the parameters, an initialisation (init.py) sets them, and training, evaluation,
adapter files and merging call the variant. Batched decoding and serving apply the low-rank branches of many adapters in one
operation, so they support only `plain` variants. DoRA is in `dora.py`, activated LoRA in `activated.py`.

Sources: LoRA, Hu et al. 2021 (arXiv:2106.09685); the file keys are PEFT's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lownibble.config import LoraConfig
from lownibble.lora.product import LoraMatmul, lora_matmul
from lownibble.lora.targets import parameter_shapes
from lownibble.quant import QuantLinear, eightbit, matrix
from lownibble.registry import VARIANTS

if TYPE_CHECKING:
    from lownibble.lora.layer import LowRank


class Variant(ABC):
    """How an adapter changes a layer.

    Attributes:
        keys: name of each parameter -> its key in an adapter file, after the layer's path.
        plain: whether the layer computes base(x) + scale (x A^T) B^T with A and B as its only parameters.
        keeps_output: whether backward reads what `forward` returned, which then must not be changed in place.
    """

    keys: ClassVar[dict[str, str]]
    plain: ClassVar[bool] = False
    keeps_output: ClassVar[bool] = False

    @abstractmethod
    def shapes(self, n_in: int, n_out: int, r: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each parameter of a layer's adapter; all are float32."""

    def to_file(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter `name` in the layout of PEFT's files."""
        return tensor

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter `name` from the layout of PEFT's files."""
        return tensor

    def start(self, base: nn.Linear | QuantLinear, adapter: LowRank) -> None:  # noqa: B027 - optional
        """Set what follows from the base and the initialised matrices; called once, when the layer has its final base."""

    @abstractmethod
    def forward(self, base: nn.Linear | QuantLinear, adapter: LowRank, x: Tensor, dropout: float) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype, `base` frozen. Backward computes the gradients of x and the parameters."""

    @abstractmethod
    def merge(self, weight: Tensor, parameters: Mapping[str, Tensor], scale: float) -> Tensor:
        """The merged weight (out, in), float32, of an equivalent plain linear layer; may be `weight` changed in place."""


def low_rank_sum(
    base: nn.Linear | QuantLinear, adapter: LowRank, x: Tensor, bias: Tensor | None, dropout: float, active: Tensor | None = None
) -> Tensor:  # fmt: skip
    """x W^T + bias + scale (dropout(x) A^T) B^T, (T, out) or, compiled, (..., out). `active`: (T, 1) bool, the rows that have the
    low-rank branch; None: all."""
    lora_A, lora_B, scale, rounded = adapter.lora_A, adapter.lora_B, adapter.scale, adapter.rounded
    code_type = base.code_type if isinstance(base, QuantLinear) else None
    seed = torch.randint(2**62, ()) if dropout else None
    y: Tensor
    if torch.compiler.is_compiling():
        weight, spec = (base.flat, base.spec) if isinstance(base, QuantLinear) else ([matrix(base)], "")
        rows_8bit = eightbit.rows_of(x, code_type)
        y, _ = lora_matmul(x, weight, spec, bias, lora_A, lora_B, scale, dropout, seed, rows_8bit, rounded, active)
        return y
    frozen = base.weight if isinstance(base, QuantLinear) else matrix(base)
    rows = None if code_type is None else eightbit.shared_rows(x, code_type)
    y = LoraMatmul.apply(
        x.reshape(-1, x.shape[-1]), frozen, bias, lora_A, lora_B, scale, dropout, 0 if seed is None else int(seed), rows,
        rounded, active,
    )  # fmt: skip
    return y


class _LoRA(Variant):
    """y = x W^T + bias + scale (dropout(x) A^T) B^T, by `product.py`."""

    keys: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    plain: ClassVar[bool] = True

    def shapes(self, n_in: int, n_out: int, r: int) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(n_in, n_out, r)

    def forward(self, base: nn.Linear | QuantLinear, adapter: LowRank, x: Tensor, dropout: float) -> Tensor:
        if not torch.is_grad_enabled() and dropout == 0:
            low = x @ adapter.lora_A.to(x.dtype).t()
            return (low @ adapter.lora_B.to(x.dtype).t()).mul_(adapter.scale).add_(base(x))
        return low_rank_sum(base, adapter, x, base.bias, dropout).view(*x.shape[:-1], -1)

    def merge(self, weight: Tensor, parameters: Mapping[str, Tensor], scale: float) -> Tensor:
        return weight.addmm_(parameters["lora_B"], parameters["lora_A"], alpha=scale)


LORA = _LoRA()


def variant_of(config: LoraConfig) -> Variant:
    """The variant of an adapter's configuration."""
    found: Variant = VARIANTS["dora" if config.use_dora else "alora" if config.alora_invocation_tokens else "lora"]
    return found
