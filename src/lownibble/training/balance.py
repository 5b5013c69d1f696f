"""The auxiliary load-balancing loss of mixtures of experts, as transformers computes it with `output_router_logits`.

    loss = cross-entropy + coefficient * load_balancing_loss_func(router_logits, experts, experts per token, attention mask)

The function is the model's own (Switch Transformer, Fedus et al. 2021, equations 4 to 6); it is found in the module of the
model's class. Its gradient reaches hidden states, and routers where they are trained (`modules_to_save`). It is a mean over the
tokens of a microbatch; the microbatches of a step count by their label tokens, so that its weight does not depend on how many
there are.

Rejected: the model's own forward pass with labels, which would take the whole batch's logits in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lownibble.errors import ConfigError, ModelError
from lownibble.models.experts import number_in
from lownibble.models.head import for_comparing, hidden_states
from lownibble.models.info import info, pass_device

_FUNCTION = "load_balancing_loss_func"
_TOLERANCE = {torch.float32: 1e-4}
"""Relative difference between our loss and the model's own, by dtype; 16-bit passes differ in their last bits."""

Balance = Callable[[tuple[Tensor, ...], Tensor | None], Tensor]
"""(router logits by layer, attention mask or None) -> the weighted loss, () float32."""


@dataclass(frozen=True)
class Loss:
    """coefficient * function(router logits, experts, experts per token, mask)."""

    function: Callable[..., Tensor]
    n_experts: int
    k: int
    coefficient: float

    def __call__(self, logits: tuple[Tensor, ...], mask_BT: Tensor | None) -> Tensor:
        """The weighted loss, () float32."""
        return self.coefficient * self.function(logits, self.n_experts, self.k, mask_BT)


def of(model: Any, coefficient: float | None) -> Balance | None:
    """The auxiliary loss of a model, or None without one.

    Args:
        coefficient: `TrainConfig.router_aux_loss_coef`; None: the model's own, if its configuration has `output_router_logits`.
    Raises:
        ConfigError: a coefficient is given, and the model has no such loss.
    """
    config = model.config.get_text_config()
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0) if getattr(config, "output_router_logits", False) else 0.0
    if not coefficient:
        return None
    function = getattr(sys.modules[type(model).__module__], _FUNCTION, None)
    n_experts = number_in(config)
    if function is None or not n_experts or model.config.is_encoder_decoder:
        raise ConfigError(
            f"The 'router_aux_loss_coef' is for mixtures of experts that transformers has a load-balancing loss for, and "
            f"{type(model).__name__} has none. Leave it out."
        )

    loss = Loss(function, n_experts, config.num_experts_per_tok, coefficient)
    _check(model, loss, coefficient)
    return loss


def _check(model: Any, loss: Balance, coefficient: float) -> None:
    """Compare with the model's own loss on eight tokens.

    Raises:
        ModelError: they differ.
    """
    ids = torch.arange(1, 9, device=pass_device(model)).unsqueeze(0)
    mask = torch.ones_like(ids)
    with for_comparing(model):
        own = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
        routers: list[Tensor] = []
        hidden_states(model, ids, mask, routers=routers)
        ours = float(loss(tuple(routers), mask)) / coefficient
    if own is None or abs(ours - float(own)) > _TOLERANCE.get(model.dtype, 0.02) * abs(float(own)):
        raise ModelError(
            f"The load-balancing loss of {type(model).__name__} is not computed as is known here ({ours:g} instead of {own}). "
            "Train without: --router-aux-loss-coef 0."
        )


def set_up(model: Any, coefficient: float | None) -> bool:
    """Decide whether the passes of a run have the auxiliary loss; returns it.

    Raises:
        ConfigError, ModelError: see `of`.
    """
    info(model).balance = of(model, coefficient)
    return info(model).balance is not None
