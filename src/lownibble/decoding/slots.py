"""Attention over slots, for all sequences of a step at once.

transformers' seam (`AttentionInterface`): our function writes keys and values to the sequences' slots and lets each token attend
to its own slot. Caps, sinks and windows that the model hands to its attention are applied. A step is either runs of tokens, whose
places the host knows (`Part`), or one token of each of some slots, whose places are on the device (`Rows`): then shapes do not
depend on the contexts, nothing is read by the host, and the step can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from lownibble.decoding.caches import Layer, SlotCache
from lownibble.decoding.spans import Part, Span
from lownibble.errors import ModelError
from lownibble.kernels import ops
from lownibble.kernels.rows import Attending
from lownibble.models import attention

SLOTS = "lownibble_slots"
"""Our attention's name among transformers' implementations."""

SCORE_BYTES = 64 << 20
"""Of the float32 scores of some of a prompt's tokens, of all heads: those of a whole part would grow with the context. The
softmax and the weights take as much again."""


class Rows(NamedTuple):
    """One token of each row: its slot, and by span of the cache its place there, (B,) int64 on the device."""

    slots: Tensor
    places: Mapping[Span, Tensor]


_step: ContextVar[tuple[SlotCache, list[Part] | Rows]] = ContextVar("lownibble_slots")


@contextmanager
def attending(model: Any, cache: SlotCache, parts: list[Part] | Rows) -> Iterator[None]:
    """Inside the block the model's attention is ours, over these slots."""
    token = _step.set((cache, parts))
    try:
        with attention.swapped(model, SLOTS):
            yield
    finally:
        _step.reset(token)


def _attend_slots(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    is_causal: bool | None = None, position_bias: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query (1, heads, T, D), key (1, key heads, T, D), value (1, key heads, T, D of values) ->
    (1, T, heads, D of values)."""
    cache, parts = _step.get()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or position_bias is not None or not causal:
        raise ModelError("its attention is not plainly causal")
    how = Attending(scaling, sliding_window, softcap, s_aux)
    layer = cache.layers.get(module.layer_idx)
    if layer is None:
        span = cache.spans.get(sliding_window) or cache.spans[None]
        shape = (cache.slots, key.shape[1], span.places)
        with torch.inference_mode(False):  # the engine also copies slots between steps
            layer = Layer(key.new_zeros(*shape, key.shape[3]), value.new_zeros(*shape, value.shape[3]), span)
        cache.layers[module.layer_idx], cache.told[module.layer_idx] = layer, how
    if isinstance(parts, Rows):
        slots, places = parts.slots, parts.places[layer.span]
        layer.keys[slots, :, places] = key[0].transpose(0, 1)
        layer.values[slots, :, places] = value[0].transpose(0, 1)
        query_BHD = query[0].transpose(0, 1).contiguous()
        return ops.attend_slots(query_BHD, layer.keys, layer.values, slots, places, how).unsqueeze(0), None
    H, G, scale = key.shape[1], query.shape[1] // key.shape[1], query.shape[3] ** -0.5 if scaling is None else scaling
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for slot, begin, end, position in parts:
        n, place = end - begin, position - layer.span.first[slot]
        length = place + n
        layer.keys[slot, :, place:length] = key[0, :, begin:end]
        layer.values[slot, :, place:length] = value[0, :, begin:end]
        rows = max(1, SCORE_BYTES // (4 * H * G * length))
        for done in range(0, n, rows):
            m = min(rows, n - done)
            at, to = place + done, place + done + m
            first = 0 if sliding_window is None else max(0, at - sliding_window + 1)
            keys, values = layer.keys[slot, :, first:to], layer.values[slot, :, first:to]
            own = (
                query[0, :, begin + done : begin + done + m].reshape(H, G * m, -1).float()
            )  # 16 bits put a score of 50 off by 1/8
            scores = (own @ keys.transpose(1, 2).float()).view(H, G, m, -1) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if m > 1:
                ahead = torch.arange(first, to, device=query.device) - torch.arange(at, to, device=query.device)[:, None]
                unseen = ahead > 0 if sliding_window is None else (ahead > 0) | (ahead <= -sliding_window)
                scores.masked_fill_(unseen, -torch.inf)
            if s_aux is not None:  # sinks take a share of the weight, and have no value
                scores = torch.cat([scores, s_aux.to(scores).view(H, G, 1, 1).expand(H, G, m, 1)], dim=-1)
            weights = scores.softmax(-1).to(query.dtype)[..., : to - first]
            found = (weights.reshape(H, G * m, -1) @ values).view(H * G, m, -1).transpose(0, 1)
            output[0, begin + done : begin + done + m] = found
    return output, None


AttentionInterface.register(SLOTS, _attend_slots)
