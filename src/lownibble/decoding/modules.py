"""ModulesDecoder: decoding by transformers' own modules, for every model that the CPU's decoder does not read.

**Together.** All tokens of a step go through the model as one row of their own positions, so each weight is multiplied once for
all sequences. Attention is transformers' seam (`AttentionInterface`): our function writes keys and values to the sequences' slots
and lets each token attend to its own slot. Caps, sinks and windows that the model hands to its attention are applied.

**Apart.** A model whose attention does not go by that seam, or that carries state of another kind (ALiBi, recurrent layers,
chunks, rotary angles that depend on the length), runs one sequence after another, each with transformers' own cache; a prompt
goes on from it in parts, or token by token where the model's states cannot take more (Mamba).

Which of these is found by trying, not by a list: two sequences in parts must give the logits that the model gives for each as
a whole. A model that fails all is refused. What was found is kept for the model's lifetime.

Angles of some rotary embeddings change for all positions once a sequence passes a length; keys cached before would be wrong, so
a cache of more tokens is refused.

Low-rank branches are added by hooks to what linear layers and experts' weights return, so a step mixes adapters; the model's
modules stay as they are, and a model's own active adapter computes as ever. DoRA's branches rescale the base's output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer

from lownibble.decoding.decoder import Decoder, RefusedError
from lownibble.decoding.form import ROPE_TYPES
from lownibble.decoding.mixture import Tokens
from lownibble.errors import ModelError
from lownibble.kernels.decoder import Segment
from lownibble.lora.begin import output_head
from lownibble.lora.inject import named_linears
from lownibble.lora.layer import LoraLinear
from lownibble.models import attention, experts
from lownibble.models.info import body
from lownibble.quant.experts import Ends, QuantExperts

SLOTS = "lownibble_slots"
"""Our attention's name among transformers' implementations."""

_TRIED = (12, 9), 7
"""Tokens of the two sequences of the trial, and of the first part of the first."""

_TOLERANCE = {torch.float32: 1e-3}
"""dtype -> maximum logit difference relative to the largest logit; rounding stays far below it."""


class _Part(NamedTuple):
    """Tokens [begin, end) of a step: those of one slot, at positions from `position` on."""

    slot: int
    begin: int
    end: int
    position: int


class _Trial(NamedTuple):
    """What the trial of a model found."""

    weights: tuple[torch.device, torch.dtype]
    """Where the model's weights were, and in which dtype."""
    obstacle: str
    """Why sequences cannot run together, or ''."""
    in_parts: bool
    """Whether a sequence goes on by more than one token at once."""
    slot_bytes: tuple[float, float]
    """Of a slot: a constant, and what each token adds."""


_trials: WeakKeyDictionary[Any, _Trial] = WeakKeyDictionary()


@dataclass
class _Layer:
    """Keys (slots, key heads, capacity, head_dim) and values of a layer."""

    keys: Tensor
    values: Tensor


@dataclass
class SlotCache:
    """Keys and values of all sequences, by layer; allocated when a layer first runs."""

    slots: int
    capacity: int
    layers: dict[int, _Layer] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers.values())

    def resume(self, slot: int, n: int) -> int:
        """Later keys and values are written over."""
        return n


@dataclass
class PastCache:
    """transformers' own cache of each sequence, and how many tokens it has."""

    slots: int
    capacity: int
    past: dict[int, Any] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of what the sequences hold now."""
        return sum(map(self.slot_bytes, self.past))

    def slot_bytes(self, slot: int) -> int:
        """Bytes of what a sequence holds now."""
        return _bytes_within(self.past[slot])

    def resume(self, slot: int, n: int) -> int:
        """Cut what is beyond n tokens; a cache of windows or recurrent states cannot be cut, and starts anew."""
        if n and n == self.lengths.get(slot, 0):
            return n
        layers: Any = getattr(self.past.get(slot), "layers", None)
        if n and layers and all(type(layer) is DynamicLayer for layer in layers):
            for layer in layers:
                layer.keys, layer.values = (t[..., :n, :] for t in (layer.keys, layer.values))
            self.lengths[slot] = n
            return n
        self.past.pop(slot, None)
        self.lengths.pop(slot, None)
        return 0


def _bytes_within(value: Any) -> int:
    """Bytes of the tensors in transformers' cache."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_bytes_within, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_within, value))
    return sum(map(_bytes_within, vars(value).values())) if type(value).__module__.startswith("transformers.") else 0


class ModulesDecoder(Decoder):
    """Any causal model, on any device and in any dtype.

    Args:
        why: why no other decoder takes the model.
    Raises:
        ModelError: it is in training mode, or no causal model that can be continued.
    """

    def __init__(self, model: Any, why: str) -> None:
        if model.training:
            raise RefusedError(model, "it is in training mode (model.eval() ends that)")
        if model.config.is_encoder_decoder:
            raise RefusedError(model, "it has an encoder")
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self._takes_wanted = "logits_to_keep" in parameters
        self._past = next((name for name in ("past_key_values", "cache_params") if name in parameters), "")
        weight = model.get_input_embeddings().weight
        self._device = weight.device
        head = output_head(model)
        adaptable = {path: module for path, module in named_linears(model).items() if module is not head}
        adaptable |= {
            path: held for path, held in experts.expert_weights(model).items() if isinstance(_base(held), QuantExperts)
        }  # fmt: skip
        self.paths = [list(adaptable)]
        self._modules = [_base(module) for module in adaptable.values()]
        self._tokens: Tokens | None = None  # of the hooks, set with them by the first step that needs them
        found, weights = _trials.get(model), (weight.device, weight.dtype)
        if found is None or found.weights != weights:
            found = _trials[model] = self._trial(weights, why)
        self.together, self._in_parts, self._slot_bytes = not found.obstacle, found.in_parts, found.slot_bytes
        how = "all sequences at once" if self.together else f"one sequence after another, as {found.obstacle}"
        self.note = f"transformers' modules, {how}; not the CPU's decoder, as {why}"

    def cache(self, slots: int, capacity: int) -> SlotCache | PastCache:
        """As `Decoder.cache`."""
        kind, most = _rope_limit(self.model.config.get_text_config())
        if most is not None and capacity > most:
            raise RefusedError(
                self.model,
                f"the angles of its rotary embedding '{kind}' change beyond {most} tokens, so cached keys would be wrong, and "
                f"{capacity} were asked for (--max-context, max_new_tokens)",
            )
        return SlotCache(slots, capacity) if self.together else PastCache(slots, capacity)

    def slot_bytes(self, capacity: int) -> int:
        """As `Decoder.slot_bytes`; estimated from the trial."""
        constant, per_token = self._slot_bytes
        return int(constant + per_token * capacity)

    def step(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, *, segments: Sequence[Segment] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Decoder.step`. A model that carries adapters runs the active one whatever `segments` says."""
        parts, wanted = _parts(slots, positions), torch.arange(len(tokens)) if wanted is None else wanted
        if self.together:
            with self._branches(segments or (), 0, len(tokens)), _attending(self.model, cache, parts):
                return self._logits(tokens, wanted, position_ids=positions.unsqueeze(0).to(self._device), use_cache=False)[0]
        found = []
        for part in parts:
            its = wanted[(wanted >= part.begin) & (wanted < part.end)] - part.begin
            found.append(self._go_on(tokens[part.begin : part.end], its, part, cache, segments or ()))
        order = torch.argsort(wanted, stable=True).argsort()
        return torch.cat(found)[order.to(self._device)]

    def _go_on(self, tokens: Tensor, wanted: Tensor, part: _Part, cache: PastCache, segments: Sequence[Segment]) -> Tensor:
        assert not part.position or cache.lengths[part.slot] == part.position
        held, found = cache.past.get(part.slot) if part.position else None, []
        n = len(tokens) if self._in_parts or held is None else 1  # at once
        for begin in range(0, len(tokens), n):
            its = wanted[(wanted >= begin) & (wanted < begin + n)] - begin
            with self._branches(segments, part.begin + begin, part.begin + begin + n):
                logits, output = self._logits(tokens[begin : begin + n], its, **{self._past: held}, use_cache=True)
            held = getattr(output, self._past)
            found.append(logits)
        cache.past[part.slot], cache.lengths[part.slot] = held, part.position + len(tokens)
        return torch.cat(found)

    def _logits(self, tokens: Tensor, wanted: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """(W, vocabulary) and the model's output, for one row of tokens."""
        at = wanted.to(self._device)
        # a model may not take none: then of one token, for nothing
        some = {"logits_to_keep": at if len(at) else 1} if self._takes_wanted else {}
        output = self.model(tokens.unsqueeze(0).to(self._device), **options, **some)
        logits: Tensor = output.logits[0]
        return (logits[: len(at)] if self._takes_wanted else logits[at]), output

    @contextmanager
    def _branches(self, segments: Sequence[Segment], begin: int, end: int) -> Iterator[None]:
        """Inside the block linear layers add the branches of the segments' adapters to tokens [begin, end) of a step."""
        if segments and self._tokens is None:
            self._tokens = _hooked(self.model, self._modules)
        if self._tokens is None:
            yield
            return
        cut = [(max(s.begin, begin) - begin, min(s.end, end) - begin, s.adapter.of[0]) for s in segments]
        self._tokens.count, self._tokens.branches = end - begin, [one for one in cut if one[0] < one[1]]
        try:
            yield
        finally:
            self._tokens.branches = ()

    def _trial(self, weights: tuple[torch.device, torch.dtype], why: str) -> _Trial:
        """Try the ways of running the model, the fastest first; RefusedError if none gives the model's logits."""
        self.together, self._in_parts = True, True
        if obstacle := self._obstacle():
            self.together = False
            if self._failure():
                self._in_parts = False
                if failed := self._failure():
                    raise RefusedError(self.model, f"{why}; and with transformers' modules {failed}")
        return _Trial(weights, obstacle, self._in_parts, self._slot_bytes)

    def _obstacle(self) -> str:
        """Why sequences cannot run together, or ''."""
        config, found = self.model.config.get_text_config(), inspect.signature(body(self.model).forward).parameters
        kinds = {each.get("rope_type", "default") for each in _ropes(config)}
        if other := kinds - {*ROPE_TYPES}:
            return f"its rotary embedding is '{other.pop()}', which depends on more than the position"
        if "position_ids" not in found:
            return "it takes no positions"
        layers = getattr(config, "layer_types", None) or ()
        if other := set(layers) - {"full_attention", "sliding_attention"}:
            return f"it has layers of kind '{sorted(other)[0]}'"
        if not getattr(self.model, "_can_set_attn_implementation", lambda: True)():
            return "its attention does not go by transformers' interface"
        if failed := self._failure():
            return failed
        window, windows = attention.window(self.model), list(self._tried.windows.values())
        expected = sum(kind == "sliding_attention" for kind in layers) if layers else len(windows)
        if window is not None and sum(size is not None for size in windows) != expected:
            return "its attention is not told of the window"
        return ""

    @torch.inference_mode()
    def _failure(self) -> str:
        """What is wrong with steps of two sequences in parts, compared with the model's own pass over each; or ''."""
        if not (self.together or self._past):
            return "it has no cache"
        (longer, shorter), first = _TRIED
        vocabulary = self.model.get_input_embeddings().num_embeddings
        rows = [(torch.arange(n) * 37 + seed) % vocabulary for seed, n in ((0, longer), (5, shorter))]
        places = [torch.arange(n) for n in (longer, shorter)]
        cache = self.cache(2, longer)
        try:
            expected = [self.model(row.unsqueeze(0).to(self._device), use_cache=False).logits[0] for row in rows]
            begun = self.step(
                torch.cat([rows[1], rows[0][:first]]), torch.tensor([1] * shorter + [0] * first),
                torch.cat([places[1], places[0][:first]]), cache,
            )  # fmt: skip
            ended = self.step(rows[0][first:], torch.zeros(longer - first, dtype=torch.int64), places[0][first:], cache)
        except Exception as error:  # of the model's own code, which was not made for this
            return f"its forward pass fails ({type(error).__name__}: {str(error).partition(chr(10))[0][:120]})"
        found = [torch.cat([begun[shorter:], ended]), begun[:shorter]]
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        if not difference <= _TOLERANCE.get(expected[0].dtype, 0.05):
            return f"its parts give other logits than the whole (by {difference:.0e})"
        if isinstance(cache, SlotCache):
            if not cache.layers:
                return "its attention does not go by transformers' interface"
            self._tried, self._slot_bytes = cache, (0.0, cache.nbytes / (2 * longer))
        else:  # recurrent states do not grow; for windows this is more than they take
            per_token = (cache.slot_bytes(0) - cache.slot_bytes(1)) / (longer - shorter)
            self._slot_bytes = cache.slot_bytes(0) - longer * per_token, per_token
        return ""


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of the rotary embeddings, one or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict)]


def _rope_limit(config: Any) -> tuple[str, int | None]:
    """The rotary embedding whose angles change with the length, and up to how many tokens they stay; or ('', None)."""
    found = [
        (kind, config.max_position_embeddings if kind == "dynamic" else each["original_max_position_embeddings"])
        for each in _ropes(config) if (kind := each.get("rope_type")) in ("dynamic", "longrope")
    ]  # fmt: skip
    return min(found, key=lambda one: one[1], default=("", None))


def _base(module: Any) -> Any:
    return module.base if isinstance(module, LoraLinear) else module


def _parts(slots: Tensor, positions: Tensor) -> list[_Part]:
    """The runs of tokens of the same slot."""
    found: list[_Part] = []
    for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if found and found[-1].slot == slot:
            found[-1] = found[-1]._replace(end=i + 1)
        else:
            found.append(_Part(slot, i, i + 1, position))
    return found


def _hooked(model: Any, modules: Sequence[nn.Module]) -> Tokens:
    """Register the hooks that add branches, for the model's lifetime; they do nothing but in a step with adapters."""
    tokens = Tokens()

    def sort(container: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if tokens.branches:
            tokens.sort(args[1] if len(args) > 1 else kwargs["top_k_index"], container.num_experts)

    for index, module in enumerate(modules):
        hook: Callable[..., Any] = _add_of_experts if isinstance(module, QuantExperts) else _add
        module.register_forward_hook(partial(hook, tokens, index))
    for _, container in experts.containers(model):
        container.register_forward_pre_hook(sort, with_kwargs=True)
    return tokens


def _add(tokens: Tokens, index: int, module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return tokens.add(index, module.bias, args[0], y) if tokens.branches else y


def _add_of_experts(tokens: Tokens, index: int, module: Any, args: tuple[Tensor, Ends], y_SN: Tensor) -> Tensor:
    return tokens.add_of_experts(index, args[0], y_SN) if tokens.branches else y_SN


_step: ContextVar[tuple[SlotCache, list[_Part]]] = ContextVar("lownibble_slots")


@contextmanager
def _attending(model: Any, cache: SlotCache, parts: list[_Part]) -> Iterator[None]:
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
    layer = cache.layers.get(module.layer_idx)
    if layer is None:
        shape = (cache.slots, key.shape[1], cache.capacity)
        layer = _Layer(key.new_zeros(*shape, key.shape[3]), value.new_zeros(*shape, value.shape[3]))
        cache.layers[module.layer_idx], cache.windows[module.layer_idx] = layer, sliding_window
    H, G, scale = key.shape[1], query.shape[1] // key.shape[1], query.shape[3] ** -0.5 if scaling is None else scaling
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for slot, begin, end, position in parts:
        n, length = end - begin, position + end - begin
        layer.keys[slot, :, position:length] = key[0, :, begin:end]
        layer.values[slot, :, position:length] = value[0, :, begin:end]
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        keys, values = layer.keys[slot, :, first:length], layer.values[slot, :, first:length]
        scores = (query[0, :, begin:end].reshape(H, G * n, -1) @ keys.transpose(1, 2)).view(H, G, n, -1) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if n > 1:
            ahead = (
                torch.arange(first, length, device=query.device) - torch.arange(position, length, device=query.device)[:, None]
            )
            unseen = ahead > 0 if sliding_window is None else (ahead > 0) | (ahead <= -sliding_window)
            scores = scores.masked_fill(unseen, -torch.inf)
        if s_aux is not None:  # sinks take a share of the weight, and have no value
            scores = torch.cat([scores, s_aux.to(scores).view(H, G, 1, 1).expand(H, G, n, 1)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : length - first]
        output[0, begin:end] = (weights.reshape(H, G * n, -1) @ values).view(H * G, n, -1).transpose(0, 1)
    return output, None


AttentionInterface.register(SLOTS, _attend_slots)
