"""Activated LoRA (aLoRA): the adapter is active from its invocation on; the tokens before that pass through the base alone.

    y_t = x_t W^T + bias + a_t scale (dropout(x_t) A^T) B^T        a_t = 1 from the last occurrence of the invocation tokens on

The invocation may be the header of the assistant's turn, or a marker of one's own. What comes before it has the base's keys and
values, whichever adapter follows: a server reads a document or a system prompt once for all of them (`serve/engine.py`). LoRA's
keys differ from its first layer on.

Where an adapter is active follows from token ids (`invocation.py`), which layers do not see. Hooks around the model's passes find
it out, so training, evaluation, transformers' own loops and a caller's code all get the same. A layer computes all rows' low-rank
products and drops those before the invocation: few of a long prompt's, but a choice of rows would be of another size in each
pass. What a pass found is there again in its backward pass, where checkpointed layers are run once more.

PEFT's semantics and file format. Sequences without the invocation pass through the base alone there, silently; here training
counts such rows (`check_rows`), and a server refuses such requests.

Source: Greenewald et al. 2025 (arXiv:2504.12397); PEFT's `alora_invocation_tokens`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lownibble.config import LoraConfig
from lownibble.errors import AdapterError, DataError, ModelError, TargetError
from lownibble.lora import invocation
from lownibble.lora.active import lora_layers
from lownibble.lora.begin import output_head
from lownibble.lora.experts import is_experts
from lownibble.lora.init import find
from lownibble.lora.targets import parameter_shapes
from lownibble.lora.variants import LORA, Variant, low_rank_sum
from lownibble.models.info import body, info
from lownibble.quant import QuantLinear

if TYPE_CHECKING:
    from lownibble.lora.layer import LoraLinear, LowRank


class ActivatedLoRA(Variant):
    """The variant of one adapter; its layers share it.

    Attributes:
        tokens: the invocation.
        active: (tokens of the pass, 1) bool, where the adapter is active in the pass that is going on, or in backward.
        part: of those, the tokens that layers see now; None: all (`training/tiles.py`).
    """

    keys: ClassVar[dict[str, str]] = LORA.keys

    def __init__(self, tokens: Sequence[int] = (), name: str = "", layer: LoraLinear | None = None) -> None:
        self.tokens, self._name, self._layer = tuple(tokens), name, layer
        self.active: Tensor | None = None
        self.part: slice | None = None
        self._within, self._n_held = False, 0  # of a pass of the whole model, and of the cache that it goes on from

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "active": None, "_within": False}  # state of a pass, not for copies

    def shapes(self, n_in: int, n_out: int, r: int) -> dict[str, tuple[int, ...]]:
        """As `Variant.shapes`: LoRA's."""
        return parameter_shapes(n_in, n_out, r)

    def forward(self, base: nn.Linear | QuantLinear, adapter: LowRank, x: Tensor, dropout: float) -> Tensor:
        """As `Variant.forward`, within a pass of the model."""
        active = self.active if self.part is None or self.active is None else self.active[self.part]
        if active is None or len(active) != x.numel() // x.shape[-1]:
            raise ModelError(
                "A layer with an activated adapter got other rows than the tokens of its model's pass. Call it through the "
                "model, or leave it out with exclude_modules."
            )
        if not torch.is_grad_enabled() and dropout == 0:
            low = (x @ adapter.lora_A.to(x.dtype).t()).mul_(active.view(*x.shape[:-1], 1))
            return (low @ adapter.lora_B.to(x.dtype).t()).mul_(adapter.scale).add_(base(x))
        return low_rank_sum(base, adapter, x, base.bias, dropout, active).view(*x.shape[:-1], -1)

    def merge(self, weight: Tensor, parameters: Mapping[str, Tensor], scale: float) -> Tensor:
        """There is no such weight (`check_merging`)."""
        raise NotImplementedError

    @contextmanager
    def seeing(self, part: slice) -> Iterator[None]:
        """Inside the block layers get these of the pass's tokens."""
        self.part = part
        try:
            yield
        finally:
            self.part = None

    def before_pass(self, outer: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before a pass of the model (`outer`) or of its body, which may be within one: finds out where the adapter is
        active, if it is the model's active one."""
        given = _by_name(module, args, kwargs)
        if outer or not self._within:
            self._within, self._n_held = outer, invocation.n_held(given)
        if self._layer is None or self._layer.active != self._name:
            return
        ids_BT = given.get("input_ids")
        if not isinstance(ids_BT, Tensor):
            raise ModelError(
                "An activated adapter (alora_invocation_tokens) needs the model's input_ids. Got none. Give them instead of "
                "embeddings, or turn the adapter off with set_adapter(model, None)."
            )
        self.active = invocation.in_pass(ids_BT, given, self._n_held, self.tokens).reshape(-1, 1)

    def after_pass(self, outer: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The hook after it: a backward pass through it will find its `active` again, also where layers are run once more."""
        active, inner = self.active, self._within and not outer
        if not inner:
            self.active, self._within = None, False
        if output is None:  # it failed
            return
        if not inner:
            given = _by_name(module, args, kwargs)
            invocation.remember(given.get("input_ids"), given, output, self._n_held)
        values = output.values() if isinstance(output, Mapping) else output
        out = next((each for each in values if isinstance(each, Tensor) and each.ndim == 3), None)
        if out is not None and out.requires_grad and active is not None:
            out.register_hook(partial(self._go_back_to, active))

    def _go_back_to(self, active: Tensor, gradient: Tensor) -> None:
        self.active = active


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pass by their names, those that were given by position too."""
    names = inspect.signature(module.forward).parameters if len(args) > 1 else ("input_ids",)
    return dict(zip(names, args, strict=False)) | kwargs


UNBOUND = ActivatedLoRA()
"""The variant of adapters that are on no model: for shapes and keys of files."""


def for_shapes(config: LoraConfig) -> LoraConfig:
    """The configuration for a model that is only looked at, without a tokenizer: any token in the place of a text."""
    text = isinstance(config.alora_invocation_tokens, str)
    found: LoraConfig = config.with_options(alora_invocation_tokens=[0]) if text else config
    return found


def check(model: nn.Module, config: LoraConfig, targets: Mapping[str, nn.Module]) -> None:
    """Check that an adapter of this configuration can be activated, if it is to be.

    Raises:
        TargetError: it cannot (says why).
    """
    tokens = config.alora_invocation_tokens
    if tokens is None:
        return
    if isinstance(tokens, str):
        raise TargetError(
            f"alora_invocation_tokens is the text {tokens!r}. Give token ids here: tokenizer(text, add_special_tokens=False)"
            ".input_ids; lownibble train takes a text."
        )
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if (largest := max(tokens)) >= vocabulary:
        raise TargetError(f"alora_invocation_tokens has {largest}, and the model's vocabulary {vocabulary} tokens. Correct it.")
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise TargetError("alora_invocation_tokens is for causal models, and this one has an encoder. Leave it out.")
    head = output_head(model)
    for path, module in targets.items():
        if is_experts(module) or module is head:
            what = "experts (target_experts=false)" if is_experts(module) else "the output head (exclude_modules)"
            raise TargetError(
                f"'{path}' cannot have an activated adapter (alora_invocation_tokens): it does not see the tokens of a pass in "
                f"their order. Leave out {what}."
            )
    start = find(config.init_lora_weights)
    if start.calibrated or start.corrects or start.takes_out:
        raise TargetError(
            f"init_lora_weights={config.init_lora_weights!r} starts at more than the base, which is what an activated adapter "
            "(alora_invocation_tokens) leaves the tokens before its invocation with. Use init_lora_weights=True."
        )


def check_merging(config: LoraConfig) -> None:
    """Check that an adapter of this configuration can be merged.

    Raises:
        AdapterError: it is an activated one.
    """
    if config.alora_invocation_tokens is not None:
        raise AdapterError(
            "An activated adapter (alora_invocation_tokens) is without effect before its invocation, so no merged weight is "
            "equal to it. Serve it beside its base (lownibble serve), or train without alora_invocation_tokens."
        )


def check_rows(tokens: Sequence[int], sequences: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> list[str]:
    """Warnings about training rows, token ids with flags of labels, for an adapter with this invocation.

    Raises:
        DataError: none has it.
    """
    begins = [(invocation.begin_of(ids, tokens), is_label) for ids, is_label in sequences]
    without = sum(begin is None for begin, _ in begins)
    if without == len(begins):
        raise DataError(
            f"No training row has the tokens {list(tokens)} that activate the adapter (alora_invocation_tokens). Look at the "
            "rows with lownibble data; rows longer than max_length may have lost them."
        )
    labels = sum(sum(is_label) for _, is_label in begins)
    early = sum(sum(is_label[: None if begin is None else begin + 1]) for begin, is_label in begins)  # seen from the one before
    found = {
        f"{without} of {len(begins)} training rows do not have the tokens that activate the adapter, and train nothing": without,
        f"{early} of {labels} label tokens come before the adapter is active, untrained: try --trained-turns last": early,
    }
    return [warning for warning, count in found.items() if count]


def warning_of_evaluation(tokens: Sequence[int], sequences: Iterable[Sequence[int]]) -> str:
    """What to say of evaluation rows without an adapter's invocation, or ""."""
    found = [invocation.begin_of(ids, tokens) is None for ids in sequences]
    what = f"{sum(found)} of {len(found)} evaluation rows do not have the tokens {list(tokens)} that activate the adapter"
    return f"{what}: their scores are the base's" if any(found) else ""


def bind(model: Any, config: LoraConfig, name: str) -> None:
    """Bind a new adapter's layers to the tokens of the model's passes."""
    if config.alora_invocation_tokens is None:
        return
    assert not isinstance(config.alora_invocation_tokens, str), "refused by `check`"
    layers = [layer for _, layer in lora_layers(model, name)]
    variant = ActivatedLoRA(config.alora_invocation_tokens, name, layers[0])
    for layer in layers:
        layer.adapter(name).variant = variant
    for owner in dict.fromkeys((model, body(model))):  # some models call parts of their body, past it
        info(model).adapters.hooks.setdefault(name, []).extend((
            owner.register_forward_pre_hook(partial(variant.before_pass, owner is model), with_kwargs=True),
            owner.register_forward_hook(partial(variant.after_pass, owner is model), with_kwargs=True, always_call=True),
        ))  # fmt: skip


def activated(model: Any) -> ActivatedLoRA | None:
    """The variant of the model's active adapter, if that is an activated one."""
    name = info(model).adapters.active
    layer = next((layer for _, layer in lora_layers(model, name)), None) if name is not None else None
    variant = None if layer is None or layer.active is None else layer.adapter(layer.active).variant
    return variant if isinstance(variant, ActivatedLoRA) else None
