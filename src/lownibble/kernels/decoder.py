"""The decoder layers of a Llama-like model as data, and the operation on them in plain torch.

A layer is `x += O attention(rotate(Q norm(x)), rotate(K norm(x)), V norm(x))`, then `x += Down(act(Gate norm(x)) * Up norm(x))`,
with RMS norms and seven packed projections, each with an optional low-rank branch. What else a layer may have is data: norms of
queries and keys (Qwen3) and of both outputs (Gemma 2 and 3), a window and a cap of attention's scores, one of several rotary
angles, the activation. In a mixture of experts a layer has the four projections of attention, and its second half is a
`FeedForward`, which is called between the layers. Compiled kernels support only 4-bit projections: with other codecs the layers
run here. `native/decoder.h` explains why the layers are one operation; `decoding/` determines which models have this form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lownibble.errors import InputError
from lownibble.kernels.types import FourBit

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""transformers' names, in the order of every list of projections here."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}
"""Activations of feed-forward parts, in the order of the compiled kernels' numbers."""


class Matvec(Protocol):
    """A packed weight (N, K) of any codec: the interface that decoding needs."""

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""

    def matvec(self, x_TK: Tensor) -> Tensor:
        """`x_TK @ W.T`, (T, N) in x's dtype."""


class Projection(NamedTuple):
    """A frozen linear layer: a packed weight (N, K), 4-bit or of another codec, and a bias (N,) float32 or None."""

    weight: FourBit | Matvec
    bias: Tensor | None = None


Branches = Sequence[tuple[int, int, "Sequence[LowRank | None]"]]
"""By segment of the tokens: begin, end, and the low-rank branches of a layer's linear layers."""


class FeedForward(Protocol):
    """The second half of a layer of a mixture of experts."""

    @property
    def linears(self) -> Sequence[str]:
        """Its linear layers and experts' weights by name; their branches follow those of attention in an adapter."""

    def __call__(self, x_TH: Tensor, branches: Branches) -> Tensor:
        """Its output (T, hidden) for the normed input, with low-rank branches in the order of `linears`."""


class DecoderLayer(NamedTuple):
    """Weights of a layer: seven projections, or attention's four and `feed_forward`.

    Norms are float32: (hidden,), and (head_dim,) for `q_norm` and `k_norm`. Those that may be None: of queries and keys, and of
    what attention and the feed-forward part add to x.
    scaling: of scores. softcap: scores are `softcap * tanh(scores / softcap)`. window: last tokens that are seen, the own one
    among them. rope: which of a step's angles. residual_scale: what is added to x is multiplied by it. activation: in
    `ACTIVATIONS`, for layers of seven projections.
    """

    projections: Sequence[Projection]
    input_norm: Tensor
    feed_forward_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    heads: int
    key_heads: int
    head_dim: int
    eps: float
    scaling: float
    feed_forward: FeedForward | None = None
    attention_output_norm: Tensor | None = None
    feed_forward_output_norm: Tensor | None = None
    activation: str = "silu"
    window: int | None = None
    softcap: float | None = None
    rope: int = 0
    residual_scale: float = 1.0

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """The RMS norm of x's last dimension."""
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    def add_feed_forward(self, x_TH: Tensor, branches: Branches) -> None:
        """x += FeedForward(norm(x)); `branches` are the whole layer's."""
        assert self.feed_forward is not None
        of_linears = [(begin, end, of[len(self.projections) :]) for begin, end, of in branches]
        self.add(x_TH, self.feed_forward(self.norm(x_TH, self.feed_forward_norm), of_linears), self.feed_forward_output_norm)

    def add(self, x_TH: Tensor, y_TH: Tensor, weight: Tensor | None) -> None:
        """x += residual_scale * y, or its norm."""
        x_TH.add_(y_TH if weight is None else self.norm(y_TH, weight), alpha=self.residual_scale)


@dataclass(frozen=True, eq=False)
class DecoderLayers:
    """All layers: at least one, of equal sizes. `prepared`: cache for a backend's own representation."""

    of: Sequence[DecoderLayer]
    prepared: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def in_4bit(self) -> bool:
        """Whether every projection is 4-bit, as the compiled kernels require."""
        return all(isinstance(each.weight, FourBit) for layer in self.of for each in layer.projections)

    @cached_property
    def windows(self) -> list[int | None]:
        """The windows that layers have, each once."""
        return list(dict.fromkeys(layer.window for layer in self.of))

    @cached_property
    def kept(self) -> list[tuple[int, int]]:
        """By layer: which of the windows is its own, and which of the layers with that window it is."""
        of = [self.windows.index(layer.window) for layer in self.of]
        return [(window, of[:index].count(window)) for index, window in enumerate(of)]


class LowRank(NamedTuple):
    """Low-rank branch of one projection, `scale * B A`: A (r, K), contiguous, and B (N, r); both float32 or of one 16-bit dtype.
    Of experts' weights, each with a leading dimension of experts.

    The compiled kernels read B by columns: they use it directly if its transpose is contiguous, else a copy.

    `gain`: (N,), or None: what the base's output without its bias is multiplied by (DoRA; B then has the gain in it).
    """

    A: Tensor
    B: Tensor
    scale: float
    gain: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank branch, or None, for each projection of each layer, then for each of its `feed_forward`'s linear layers.
    `prepared` as in `DecoderLayers`. `unscaled`: the adapter that differs in its scales only, whose preparation serves both.
    `invocation`: tokens from whose last occurrence in a prompt on it is active (`lora/activated.py`); none: it is on all tokens.
    The segments of a step are of the tokens on which it is."""

    of: Sequence[Sequence[LowRank | None]]
    prepared: dict[str, Any] = field(default_factory=dict)
    unscaled: Adapter | None = None
    invocation: tuple[int, ...] = ()

    @cached_property
    def largest_r(self) -> int:
        """The largest rank."""
        return max((branch.A.shape[-2] for branches in self.of for branch in branches if branch), default=0)

    @cached_property
    def has_gains(self) -> bool:
        """Whether some branches scale the base's output."""
        return any(branch.gain is not None for branches in self.of for branch in branches if branch)


class Segment(NamedTuple):
    """Tokens [begin, end) and their adapter."""

    begin: int
    end: int
    adapter: Adapter


@dataclass(frozen=True, eq=False)
class Step:
    """The tokens of one decoder pass.

    slots: (T,) int64, a token's slot (sequence) in the KV cache. places: (windows, T) int64, by window of the layers its place in
    the slot; places differ as positions do. cosine, sine: (angles, T, head_dim) float32. All earlier positions of a token's
    sequence that a layer sees must be in the cache or in the pass.
    """

    slots: Tensor
    places: Tensor
    cosine: Tensor
    sine: Tensor

    @cached_property
    def fits(self) -> tuple[int, list[int]]:
        """Minimum number of slots, and by window of places, that the KV cache must have."""
        slots, *places = [self.slots.tolist(), *self.places.tolist()]
        if min(min(each, default=0) for each in (slots, *places)) < 0:
            raise InputError("Slots and places must not be negative.")
        return max(slots, default=-1) + 1, [max(each, default=-1) + 1 for each in places]


class Context(NamedTuple):
    """Keys and values of the layers with one window, (layers, slots, key_heads, places, head_dim) float32, contiguous."""

    keys: Tensor
    values: Tensor


Gemv = Callable[[Tensor, FourBit], Tensor]


def decoder_layers(
    gemv: Gemv, x_TH: Tensor, layers: DecoderLayers, contexts: Sequence[Context], step: Step, segments: Sequence[Segment]
) -> None:
    """`ops.decoder_layers` in plain torch; `gemv` multiplies with 4-bit weights."""
    for index, (layer, (window, row)) in enumerate(zip(layers.of, layers.kept, strict=True)):
        branches = [(begin, end, adapter.of[index]) for begin, end, adapter in segments]
        keys, values = (held[row] for held in contexts[window])
        _decoder_layer(gemv, x_TH, layer, keys, values, step, step.places[window], branches)


def _decoder_layer(
    gemv: Gemv, x_TH: Tensor, layer: DecoderLayer, keys: Tensor, values: Tensor, step: Step, places: Tensor, branches: Branches
) -> None:  # fmt: skip
    T, D = len(x_TH), layer.head_dim

    def project(index: int, x: Tensor) -> Tensor:
        weight, bias = layer.projections[index]
        y = gemv(x, weight) if isinstance(weight, FourBit) else weight.matvec(x)
        for begin, end, of_projection in branches:
            if (branch := of_projection[index]) and branch.gain is not None:
                y[begin:end] *= branch.gain
        if bias is not None:
            y = y + bias
        for begin, end, of_projection in branches:
            branch = of_projection[index]
            if branch is not None:
                y[begin:end] += (x[begin:end] @ branch.A.float().t()) @ branch.B.float().t() * branch.scale
        return y

    norm = layer.norm

    def turn(x_TND: Tensor) -> Tensor:
        a, b = x_TND.chunk(2, dim=-1)
        return x_TND * step.cosine[layer.rope].unsqueeze(1) + torch.cat([-b, a], dim=-1) * step.sine[layer.rope].unsqueeze(1)

    normed = norm(x_TH, layer.input_norm)
    q, k, v = (project(i, normed).unflatten(1, (-1, D)) for i in range(3))
    if layer.q_norm is not None:
        q = norm(q, layer.q_norm)
    if layer.k_norm is not None:
        k = norm(k, layer.k_norm)
    q = turn(q)
    keys[step.slots, :, places] = turn(k)
    values[step.slots, :, places] = v
    attended = x_TH.new_empty(T, layer.heads * D)
    for t, (slot, place) in enumerate(zip(step.slots.tolist(), places.tolist(), strict=True)):
        seen = slice(0 if layer.window is None else max(0, place + 1 - layer.window), place + 1)
        past_keys, past_values = (
            cache[slot, :, seen].repeat_interleave(layer.heads // layer.key_heads, dim=0) for cache in (keys, values)
        )
        scores = (past_keys @ q[t].unsqueeze(2)).squeeze(2) * layer.scaling  # (heads, tokens seen)
        if layer.softcap is not None:
            scores = torch.tanh(scores / layer.softcap) * layer.softcap
        attended[t] = (scores.softmax(dim=1).unsqueeze(1) @ past_values).flatten()
    layer.add(x_TH, project(3, attended), layer.attention_output_norm)
    if layer.feed_forward is not None:
        layer.add_feed_forward(x_TH, branches)
        return
    normed = norm(x_TH, layer.feed_forward_norm)
    inner = ACTIVATIONS[layer.activation](project(4, normed)) * project(5, normed)
    layer.add(x_TH, project(6, inner), layer.feed_forward_output_norm)
