"""A model's output head: from hidden states to logits, including the logit transforms after it.

Losses and scores are computed from the backbone without the head (`hidden_states`), because full logits are the largest tensor of
a training step. Transforms after the head must therefore be known: `LOGIT_TRANSFORMS` lists their configuration keys, and
`check_head` compares with the model's own logits once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lownibble.errors import ModelError
from lownibble.models import attention
from lownibble.models.info import body, info, pass_device
from lownibble.models.prefixes import Prefixes
from lownibble.quant import QuantLinear, exact_products, is_plain_linear
from lownibble.quant.dense import DenseProducts, code_type_for

LOGIT_TRANSFORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: cap * torch.tanh(logits / cap),
    "logits_scaling": lambda logits, scale: logits / scale,
    "logit_scale": lambda logits, scale: logits * scale,
}
"""Text-configuration key -> the logit transform that the model applies if the key is set (Gemma 2, Granite, Cohere)."""


def logit_transforms(model: Any) -> list[tuple[Callable[[Tensor, float], Tensor], float]]:
    """The transforms that come after the model's output head, in order, each with its value."""
    config = model.config.get_text_config()
    found = [
        (transform, float(value)) for key, transform in LOGIT_TRANSFORMS.items()
        if (value := getattr(config, key, None)) not in (None, 1.0)
    ]  # fmt: skip
    if getattr(config, "scale_decoder_outputs", False):  # T5
        found.append((LOGIT_TRANSFORMS["logit_scale"], config.d_model**-0.5))
    return found


class Head:
    """A model's output head with its logit transforms: hidden states (L, H) -> logits (L, V)."""

    def __init__(self, model: Any) -> None:
        self.module: nn.Module = model.get_output_embeddings()
        if self.module is None:
            raise ModelError(f"{type(model).__name__} has no output embeddings. Give a causal language model.")
        self.transforms = logit_transforms(model)
        self.plain = self._plain(model)
        self.vocab_size = int(self.module.weight.shape[0])  # type: ignore[union-attr,index]

    def _plain(self, model: nn.Module) -> DenseProducts | None:
        """Matmuls with the head's weight (V, H), or None if the head has a bias, transforms or another forward."""
        head = self.module
        if not is_plain_linear(head) or head.bias is not None or self.transforms:
            return None
        weight = cast(Tensor, head.weight)
        return DenseProducts(weight, code_type_for(model, weight, info(model).device))

    def __call__(self, hidden_LH: Tensor) -> Tensor:
        """Logits (L, V) of hidden states (L, H)."""
        logits: Tensor = self.module(hidden_LH)
        for transform, value in self.transforms:
            logits = transform(logits, value)
        return logits

    @property
    def keeps_logits(self) -> bool:
        """Whether backward reads the logits, which then must not be changed in place (a DoRA adapter)."""
        return not self.transforms and bool(getattr(self.module, "keeps_output", False))

    @property
    def compute(self) -> str:
        """Matmul precision of the head in training: 'int8' or 'exact'."""
        code_type = self.plain.code_type if self.plain else None
        return "exact" if code_type is None else str(code_type).removeprefix("torch.")

    @property
    def trained(self) -> list[nn.Parameter]:
        """The head's trainable parameters."""
        return [p for p in self.module.parameters() if p.requires_grad]


def hidden_states(
    model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, segments: Sequence[int] | None = None,
    source: tuple[Tensor, Tensor] | None = None, routers: list[Tensor] | None = None, prefixes: Prefixes | None = None,
) -> Tensor:  # fmt: skip
    """Last hidden states (B, T, H) of the model without its head; of an encoder-decoder model, those of its decoder.

    `source`: ids and mask (B, S) of the encoder. No attention mask means all ones; without one attention takes its causal fast
    path. With `segments`, the lengths of packed rows, B
    is 1, and forward and backward must run inside `segment_attention`. Other rows are right-padded. `routers`: takes the logits
    of the routers of a mixture of experts, by layer. `prefixes`: the tree of sequences whose `input_ids` these are; then forward
    and backward must run inside `prefix_attention`.
    """
    if source is not None:
        ids_BS, mask_BS = source
        read = model.get_encoder()(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        written = model.get_decoder()(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, encoder_hidden_states=read,
            encoder_attention_mask=mask_BS, use_cache=False,
        )  # fmt: skip
        return written.last_hidden_state  # type: ignore[no-any-return]
    if prefixes is not None:
        extra = attention.prefix_inputs(model, prefixes)
    elif attention.takes_segments(model):
        mask_BT = torch.ones_like(input_ids_BT) if attention_mask_BT is None else attention_mask_BT
        extra = attention.inputs(model, mask_BT, segments)
    else:
        assert not segments
        extra = {"attention_mask": attention_mask_BT if info(model).needs_mask else None}
    if routers is not None:
        extra["output_router_logits"] = True
    output = body(model)(input_ids=input_ids_BT, use_cache=False, **extra)
    if routers is not None:
        routers.extend(output.router_logits or ())
    return output.last_hidden_state  # type: ignore[no-any-return]


@contextmanager
def for_comparing(model: Any) -> Iterator[None]:
    """Disable gradients, dropout and 8-bit matmuls, in which one rounding difference may become a whole 8-bit step."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), exact_products(model):
            yield
    finally:
        model.train(was_training)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}
"""Permitted difference of logits, relative to the largest: a few roundings of the dtype between different orders of operations (8
bits of mantissa in bfloat16: 2^-8 per rounding). A head with an unknown transform is off by order one."""


def check_head(model: Any) -> None:
    """Compare this module's logits with the model's own on eight tokens.

    Raises:
        ModelError: they differ, so the model applies an unknown transform to its logits.
    """
    device = pass_device(model)
    input_ids = torch.arange(1, 9, device=device).unsqueeze(0) % Head(model).vocab_size
    pair = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    source = (input_ids, torch.ones_like(input_ids)) if pair else None
    name, dtype = type(model).__name__, model.get_input_embeddings().weight.dtype
    packed = any(isinstance(module, QuantLinear) for module in model.modules())
    with for_comparing(model):
        try:
            own = model(input_ids=input_ids, use_cache=False, **pair).logits[0].float()
            if packed:  # in training some code changes weights that it only reads otherwise (Gemma 3n)
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    hidden_states(model.train(), input_ids, None, source=source)
                    model.eval()
        except Exception as error:
            if not packed:
                raise
            raise ModelError(
                f"{name} does not run with these layers packed ({type(error).__name__}: {_first_line(error)}): its code may use "
                "their weights itself. Name them in skip_modules, or use --method lora."
            ) from error
        try:
            mask = None if source is None else torch.ones_like(input_ids)
            ours = Head(model)(hidden_states(model, input_ids, mask, source=source)[0]).float()
        except Exception as error:
            raise ModelError(
                f"{name} cannot be trained here yet: its body and head are put together in a way that is not known "
                f"({type(error).__name__}: {_first_line(error)})."
            ) from error
    if own.shape != ours.shape or (own - ours).abs().max() > HEAD_TOLERANCE[dtype] * own.abs().max().clamp(min=1):
        raise ModelError(
            f"{name} changes its logits in a way that is not known (configuration keys known: "
            f"{', '.join(LOGIT_TRANSFORMS)}). Its loss would be wrong; it cannot be trained here yet."
        )


class _Copies(TorchDispatchMode):
    """Follows tensors through casts, copies and factors of one (`scaled`: of any size), by their storages."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self._scaled = scaled
        self._made_from: dict[int, tuple[Tensor, Tensor, int]] = {}  # held, so that no storage is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        factor = func.overloadpacket in (aten.mul, aten.div) and isinstance(args[1], (int, float))
        copied = (factor and (self._scaled or args[1] == 1)) or func.overloadpacket in (aten._to_copy, aten.clone)
        if copied and _storage(out) != _storage(args[0]):
            self._made_from[_storage(out)] = (args[0], out, out._version)
        return out

    def is_copy(self, tensor: Tensor, of: tuple[Tensor, int]) -> bool:
        """Whether a tensor is another one, or a cast or copy of it, of the same shape; none of them changed in place since the
        version that is given."""
        origin, version = of
        key = _storage(tensor)
        while key != _storage(origin) and key in self._made_from:
            before, copy, made = self._made_from[key]
            if copy._version != made:
                return False
            key = _storage(before)
        return tensor.shape == origin.shape and key == _storage(origin) and origin._version == version


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def check_head_unseen(model: Any) -> None:
    """As `check_head`, for a model on tensors without values (`FakeTensorMode`): the head must read the body's hidden states as
    they are, and nothing but a known transform may come after it.

    Raises:
        ModelError: it is otherwise.
    """
    head, hidden, made = Head(model), list[tuple[Tensor, int]](), list[tuple[Tensor, int]]()
    reads_hidden: list[bool] = []
    copies = _Copies(scaled=bool(head.transforms))  # before or after the head is the same

    def of_body(module: nn.Module, inputs: Any, output: Any) -> None:
        states = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        hidden.append((states, states._version))

    def of_head(module: nn.Module, inputs: Any, output: Tensor) -> None:
        reads_hidden.append(any(copies.is_copy(inputs[0], each) for each in hidden))
        made.append((output, output._version))

    ids = torch.zeros(1, 8, dtype=torch.int64)
    pair = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    bodies = {id(part): part for part in (body(model), model.get_decoder()) if part is not model}
    hooks = [part.register_forward_hook(of_body) for part in bodies.values()]
    hooks.append(head.module.register_forward_hook(of_head))
    try:
        with for_comparing(model), copies:
            logits = model(input_ids=ids, use_cache=False, **pair).logits
    finally:
        for hook in hooks:
            hook.remove()
    known = len(made) == 1 and reads_hidden[0]
    if not known or not (head.transforms or copies.is_copy(logits, made[0])):
        raise ModelError(
            f"{type(model).__name__} changes its logits in a way that is not known (configuration keys known: "
            f"{', '.join(LOGIT_TRANSFORMS)}). Its loss would be wrong; it cannot be trained here yet."
        )
