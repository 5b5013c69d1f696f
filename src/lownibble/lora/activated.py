"""Activated LoRA (aLoRA): the adapter is active from its invocation on; the tokens before that pass through the base alone.

    y_t = x_t W^T + bias + a_t scale (dropout(x_t) A^T) B^T        a_t = 1 from the last occurrence of the invocation tokens on

The invocation may be the header of the assistant's turn, or a marker of one's own. What comes before it has the base's keys and
values, whichever adapter follows: a server reads a document or a system prompt once for all of them (`serve/engine.py`), and a
chat can change adapters from turn to turn without reading anything again. LoRA's keys differ from its first layer on.

Where an adapter is active follows from token ids, which layers do not see. A hook before the model's body finds it out for each
pass, so training, evaluation, transformers' own loops and a caller's code all get the same. In packed rows each sequence has an
invocation of its own: it begins where positions do not count on. It is found by operations of fixed shapes without waiting for a
device, so that passes can be captured. Of a sequence that goes on from a cache the hook remembers whether it was invoked; a
single token never invokes, since in generation the prompt decides. A layer computes all rows' low-rank products and drops those
before the invocation: few of a long prompt's, but a choice of rows would be of another size in each pass.

PEFT's semantics and file format. Sequences without the invocation pass through the base alone there, silently; here training
counts such rows (`check_rows`), and a server refuses such requests.

Source: Greenewald et al. 2025 (arXiv:2504.12397); PEFT's `alora_invocation_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lownibble.config import LoraConfig
from lownibble.errors import AdapterError, DataError, ModelError, TargetError
from lownibble.lora.active import lora_layers
from lownibble.lora.begin import output_head
from lownibble.lora.experts import is_experts
from lownibble.lora.init import find
from lownibble.lora.targets import parameter_shapes
from lownibble.lora.variants import LORA, Variant, low_rank_sum
from lownibble.models.info import body, info
from lownibble.quant import QuantLinear

if TYPE_CHECKING:
    from lownibble.lora.layer import LowRank


class ActivatedLoRA(Variant):
    """The variant of one adapter; its layers share it.

    Attributes:
        tokens: the invocation; empty: not bound to a model yet.
        active: (tokens of the pass, 1) bool, where the adapter is active in the pass that is going on.
        part: of those, the tokens that layers see now; None: all (`training/tiles.py`).
    """

    keys: ClassVar[dict[str, str]] = LORA.keys

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = tuple(tokens)
        self.active: Tensor | None = None
        self.part: slice | None = None
        self._rows = 0
        self._invoked: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()  # cache -> (B, 1), whether its rows were invoked

    def __getstate__(self) -> dict[str, Any]:
        return {"tokens": self.tokens}  # the rest is of passes, which no copy goes on with

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

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

    def before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the body: finds out where the adapter is active in this pass."""
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids_BT, Tensor):
            raise ModelError("An activated adapter (alora_invocation_tokens) needs the model's input_ids. Got embeddings.")
        active_BT = find_active(ids_BT, kwargs.get("position_ids"), self.tokens)
        before = self._invoked.get(_cache(kwargs)) if _cache(kwargs) is not None else None
        if before is not None and len(before) == len(active_BT):
            active_BT = before.expand_as(active_BT) if ids_BT.shape[1] == 1 else active_BT | before
        self.active, self._rows = active_BT.reshape(-1, 1), len(active_BT)

    def after_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The hook after the body: remembers of a cache, which the body may have made, which of its rows were invoked."""
        cache = _cache(kwargs) or _cache(output if isinstance(output, Mapping) else {})
        if cache is not None and self.active is not None:
            self._invoked[cache] = self.active.view(self._rows, -1)[:, -1:]


def _cache(values: Mapping[str, Any]) -> Any:
    """The cache among a body's arguments or outputs."""
    return next((values[name] for name in ("past_key_values", "cache_params") if values.get(name) is not None), None)


UNBOUND = ActivatedLoRA()
"""The variant of adapters that are on no model: for shapes and keys of files."""


def find_active(ids_BT: Tensor, positions: Tensor | None, tokens: Sequence[int]) -> Tensor:
    """(B, T) bool: the tokens from the last occurrence of `tokens` in their sequence on.

    positions: (B or 1, T), or by axis with another dimension before; where they do not count on, another sequence begins. None: a
    row is one sequence.
    """
    B, T = ids_BT.shape
    n, device = len(tokens), ids_BT.device
    if n > T:
        return torch.zeros(B, T, dtype=torch.bool, device=device)
    wanted = [ids_BT[:, i : T - n + 1 + i] == token for i, token in enumerate(tokens)]
    here = nn.functional.pad(torch.stack(wanted).all(0), (0, n - 1)).long()
    begins = torch.zeros_like(here)
    if positions is not None:
        places = positions[0] if positions.ndim == 3 else positions
        begins[:, 1:] = (places[:, 1:] != places[:, :-1] + 1).long().expand(B, -1)
    sequence = begins.cumsum(1)
    if n > 1:  # an occurrence lies in one sequence
        here[:, : T - n + 1] *= sequence[:, : T - n + 1] == sequence[:, n - 1 :]
    of_sequence = torch.zeros_like(here).scatter_add_(1, sequence, here)
    up_to_its_end = of_sequence.cumsum(1).gather(1, sequence)
    return (here.cumsum(1) == up_to_its_end) & (of_sequence.gather(1, sequence) > 0)


def begin_of(ids: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Where the last occurrence of `tokens` in a sequence begins; None: there is none."""
    wanted, n = list(tokens), len(tokens)
    found = (at for at in range(len(ids) - n, -1, -1) if ids[at] == wanted[0] and list(ids[at : at + n]) == wanted)
    return next(found, None)


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
    begins = [(begin_of(ids, tokens), is_label) for ids, is_label in sequences]
    without = sum(begin is None for begin, _ in begins)
    if without == len(begins):
        raise DataError(
            f"No training row has the tokens {list(tokens)} that activate the adapter (alora_invocation_tokens). Look at the "
            "rows with lownibble data; rows longer than max_length may have lost them."
        )
    labels = sum(sum(is_label) for _, is_label in begins)
    early = sum(sum(is_label[:begin]) for begin, is_label in begins)  # [:None]: all
    found = {
        f"{without} of {len(begins)} training rows do not have the tokens that activate the adapter, and train nothing": without,
        f"{early} of {labels} label tokens come before the adapter is active, untrained: try --trained-turns last": early,
    }
    return [warning for warning, count in found.items() if count]


def bind(model: Any, config: LoraConfig, name: str) -> None:
    """Bind a new adapter's layers to the tokens of the model's passes."""
    if config.alora_invocation_tokens is None:
        return
    variant = ActivatedLoRA(config.alora_invocation_tokens)  # type: ignore[arg-type] # `check` refuses a text
    for _, layer in lora_layers(model, name):
        layer.adapter(name).variant = variant
    owner = body(model)
    info(model).adapters.hooks[name] = [
        owner.register_forward_pre_hook(variant.before_pass, with_kwargs=True),
        owner.register_forward_hook(variant.after_pass, with_kwargs=True),
    ]


def activated(model: Any) -> ActivatedLoRA | None:
    """The variant of the model's active adapter, if that is an activated one."""
    name = info(model).adapters.active
    layer = next((layer for _, layer in lora_layers(model, name)), None) if name is not None else None
    variant = None if layer is None or layer.active is None else layer.adapter(layer.active).variant
    return variant if isinstance(variant, ActivatedLoRA) else None
