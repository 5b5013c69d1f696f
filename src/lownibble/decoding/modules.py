"""ModulesDecoder: decoding by transformers' own modules, for every model that the CPU's decoder does not read.

**Together.** All tokens of a step go through the model as one row of their own positions, so each weight is multiplied once for
all sequences, and attention is over slots (`slots.py`).

**Static.** Tokens that are alone in their sequence, as in generation, go in a pass of fixed shapes (`static.py`), on CUDA as a
graph; what is left of a step, parts of prompts, is a pass of its own after it.

**Apart.** A model whose attention does not go by that seam, or that carries state of another kind (ALiBi, recurrent layers,
chunks, rotary angles that depend on the length), runs one sequence after another, each with transformers' own cache; a prompt
goes on from it in parts, or token by token where the model's states cannot take more (Mamba).

Which of these is found by trying, not by a list: two sequences in parts must give the logits that the model gives for each as
a whole. A model that fails all is refused. What was found is kept for the model's lifetime.

Angles of some rotary embeddings change for all positions once a sequence passes a length; keys cached before would be wrong, so
a cache of more tokens is refused.

Low-rank branches are added by hooks (`hooks.py`) to what linear layers and experts' weights return, so a step mixes adapters;
the model's modules stay as they are, and a model's own active adapter computes as ever. DoRA's branches rescale the base's
output; a step with them, or with branches of experts' weights, has no static pass.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lownibble.decoding.caches import PastCache, SlotCache
from lownibble.decoding.decoder import PROMPT_TOKENS, Decoder, RefusedError
from lownibble.decoding.form import ROPE_TYPES, ropes
from lownibble.decoding.hooks import hooked
from lownibble.decoding.mixture import Tokens
from lownibble.decoding.slots import Rows, attending
from lownibble.decoding.spans import Part, parts_of, places_of
from lownibble.decoding.static import StaticSteps, prepared, takes
from lownibble.errors import BackendError, LownibbleError
from lownibble.kernels import proven
from lownibble.kernels.capture import Capture
from lownibble.kernels.decoder import Adapter, LowRank, Segment
from lownibble.kernels.rows import RowAdapters
from lownibble.lora.begin import output_head
from lownibble.lora.inject import named_linears
from lownibble.lora.layer import LoraLinear
from lownibble.memory.usage import is_exhausted
from lownibble.models import attention, experts
from lownibble.models.caches import cache_argument, cache_in
from lownibble.models.info import body
from lownibble.models.linears import installed, own_forwards
from lownibble.quant.experts import QuantExperts
from lownibble.transfers import to_device

_log = logging.getLogger(__name__)
_TRIED = (12, 9), 7
"""Tokens of the two sequences of the trial, and of the first part of the first."""

ON_CUDA_TOKENS = 512
"""Tokens of a prompt at once: some 2,000 launches from Python take longer than the device needs for them."""

_TOLERANCE = {torch.float32: 1e-3}
"""dtype -> maximum logit difference relative to the largest logit; rounding stays far below it."""


class _SlotBytes(NamedTuple):
    """Bytes of a slot: a constant, and by window of the layers those of each position that they keep."""

    constant: float
    of_places: Mapping[int | None, float]


class _Trial(NamedTuple):
    """What the trial of a model found."""

    weights: tuple[torch.device, torch.dtype]
    """Where the model's weights were, and in which dtype."""
    obstacle: str
    """Why sequences cannot run together, or ''."""
    in_parts: bool
    """Whether a sequence goes on by more than one token at once."""
    slot_bytes: _SlotBytes
    not_static: str
    """Why there are no static passes, or ''."""
    no_graphs: str
    """Why static passes are not captured, or ''."""


_trials: WeakKeyDictionary[Any, _Trial] = WeakKeyDictionary()


class ModulesDecoder(Decoder):
    """Any causal model, on any device and in any dtype.

    Args:
        why: why no other decoder takes the model.
        static: run tokens that are alone in their sequence in passes of fixed shapes; default: on CUDA.
        capture: how static passes are captured; default: into CUDA graphs, where there are some.
    Raises:
        ModelError: it is in training mode, or no causal model that can be continued.
    """

    def __init__(self, model: Any, why: str, *, static: bool | None = None, capture: Capture | None = None) -> None:
        if model.training:
            raise RefusedError(model, "it is in training mode (model.eval() ends that)")
        if model.config.is_encoder_decoder:
            raise RefusedError(model, "it has an encoder")
        self.model = model
        self._takes_wanted = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._past = cache_argument(model)
        weight = model.get_input_embeddings().weight
        self._device, self._linears = weight.device, own_forwards(model) if weight.device.type == "cpu" else []
        head = output_head(model)
        adaptable = {path: module for path, module in named_linears(model).items() if module is not head}
        adaptable |= {
            path: held for path, held in experts.expert_weights(model).items() if isinstance(_base(held), QuantExperts)
        }  # fmt: skip
        self.paths = [list(adaptable)]
        self._modules = [_base(module) for module in adaptable.values()]
        self._tokens: Tokens | None = None  # of the hooks, set with them by the first step that needs them
        self.draws = self._device.type == "cuda" if static is None else static
        self._dtype, self._capture, self._no_graphs = weight.dtype, capture, ""
        self._not_static = "" if self.draws else "they are for CUDA"
        found, weights = _trials.get(model), (weight.device, weight.dtype)
        self._slot_bytes = _SlotBytes(0.0, {None: 0.0})  # of the trial's cache: all positions
        if found is None or found.weights != weights or static is not None:
            found = self._trial(weights, why)
            if static is None:
                _trials[model] = found
        self.together, self._in_parts, self._slot_bytes = not found.obstacle, found.in_parts, found.slot_bytes
        self._not_static = found.not_static
        self.prompt_tokens = _prompt_tokens(self._device.type, self._slot_bytes.of_places)
        how = "all sequences at once" if self.together else f"one sequence after another, as {found.obstacle}"
        if self._device.type == "cuda" and self.together:
            obstacle = found.not_static or found.no_graphs
            how += f", without graphs, as {obstacle}" if obstacle else ", with CUDA graphs"
        self.note = "; ".join(filter(None, (f"transformers' modules, {how}", proven.words(), f"not the CPU's decoder, as {why}")))

    def cache(self, slots: int, capacity: int) -> SlotCache | PastCache:
        """As `Decoder.cache`."""
        kind, most = _rope_limit(self.model.config.get_text_config())
        if most is not None and capacity > most:
            raise RefusedError(
                self.model,
                f"the angles of its rotary embedding '{kind}' change beyond {most} tokens, so cached keys would be wrong, and "
                f"{capacity} were asked for (--max-context, max_new_tokens)",
            )
        return SlotCache(slots, capacity, self._slot_bytes.of_places) if self.together else PastCache(slots, capacity)

    @torch.inference_mode()
    def warm_up(self, cache: SlotCache | PastCache) -> None:
        """As `Decoder.warm_up`: a part of a prompt, then steps of as many rows as there are graphs for, each twice."""
        if self._not_static or not self.together:
            return
        part = torch.zeros(min(max(PROMPT_TOKENS, self.prompt_tokens), cache.capacity), dtype=torch.int64)
        self.prompt(part, 0, cache)
        for rows in sorted({min(1 << n, cache.slots) for n in range(cache.slots.bit_length() + 1)}):
            slots = torch.arange(rows)
            for _ in range(2):  # as it is, captured
                self.step(part[:1].expand(rows), slots, torch.full_like(slots, len(part) - 1), cache)

    def slot_bytes(self, capacity: int) -> int:
        """As `Decoder.slot_bytes`; estimated from the trial."""
        constant, of_places = self._slot_bytes
        return int(constant + sum(each * places_of(window, capacity) for window, each in of_places.items()))

    def step(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, *, segments: Sequence[Segment] | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Decoder.step`. A model that carries adapters runs the active one whatever `segments` says."""
        parts, wanted = parts_of(slots, positions), torch.arange(len(tokens)) if wanted is None else wanted
        if self.together:
            return self._step_together(tokens, slots, positions, parts, cache, segments or (), wanted)
        found = []
        for part in parts:
            its = wanted[(wanted >= part.begin) & (wanted < part.end)] - part.begin
            found.append(self._go_on(tokens[part.begin : part.end], its, part, cache, segments or ()))
        order = torch.argsort(wanted, stable=True).argsort()
        return torch.cat(found)[order.to(self._device)]

    def _step_together(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, parts: list[Part], cache: SlotCache, segments: Sequence[Segment],
        wanted: Tensor,
    ) -> Tensor:  # fmt: skip
        cache.enter(parts)
        static = not self._not_static and all(takes(segment.adapter) for segment in segments)
        ones = [part for part in parts if part.end == part.begin + 1] if static else []
        if not ones:
            return self._pass(tokens, positions, parts, cache, segments, wanted)
        adapters: list[Adapter | None] = [None] * len(tokens)
        for segment in segments:
            adapters[segment.begin : segment.end] = [segment.adapter] * (segment.end - segment.begin)
        try:
            found = [self._static_pass(tokens, ones, cache, [adapters[part.begin] for part in ones])]
        except Exception as error:
            if isinstance(error, LownibbleError) or is_exhausted(error):
                raise
            self._not_static = f"a step of {len(ones)} rows failed ({_first_line(error)})"
            _log.warning("Decoding falls back to eager passes of dynamic shapes, which are slower: %s.", self._not_static)
            cache.steps = None
            return self._pass(tokens, positions, parts, cache, segments, wanted)  # writes the same keys and values
        row_of = torch.zeros(len(tokens), dtype=torch.int64)
        row_of[[part.begin for part in ones]] = torch.arange(len(ones))
        if len(ones) < len(parts):
            among = torch.ones(len(tokens), dtype=torch.bool)
            among[[part.begin for part in ones]] = False
            others, its = among.nonzero()[:, 0], wanted[among[wanted]]
            row_of[its] = len(ones) + torch.arange(len(its))
            place = among.cumsum(0) - 1
            found.append(self._pass(
                tokens[others], positions[others], parts_of(slots[others], positions[others]), cache,
                _segments([adapters[i] for i in others.tolist()]), place[its],
            ))  # fmt: skip
        logits, rows = torch.cat(found), row_of[wanted]
        return logits if torch.equal(rows, torch.arange(len(logits))) else logits[to_device(rows, self._device)]

    def _pass(
        self, tokens: Tensor, positions: Tensor, parts: list[Part], cache: SlotCache, segments: Sequence[Segment], wanted: Tensor
    ) -> Tensor:
        """A pass over any runs of tokens: the logits of those that are wanted."""
        with self._branches(segments, 0, len(tokens)), attending(self.model, cache, parts):
            return self._logits(tokens, wanted, position_ids=positions.unsqueeze(0).to(self._device), use_cache=False)[0]

    def _static_pass(self, tokens: Tensor, parts: list[Part], cache: SlotCache, adapters: Sequence[Adapter | None]) -> Tensor:
        """A pass over tokens that are alone in their sequence: the logits of all."""
        if any(adapters) and self._tokens is None:
            self._tokens = hooked(self.model, self._modules)
        if cache.steps is None:
            most = 1 << (cache.slots - 1).bit_length()
            cache.steps = StaticSteps(most, len(self._modules), self._dtype, self._device, self._capture)
        lines = [
            tokens[[part.begin for part in parts]].tolist(),
            [part.slot for part in parts],
            [part.position for part in parts],
        ]
        lines += [[part.position - span.first[part.slot] for part in parts] for span in cache.spans.values()]
        return cache.steps(lines, adapters, partial(self._rows_pass, cache))

    def _rows_pass(self, cache: SlotCache, lines_LB: Tensor, adapters: RowAdapters | None) -> Tensor:
        tokens_B, slots_B, positions_B, *places = lines_LB
        rows = Rows(slots_B, dict(zip(cache.spans.values(), places, strict=True)))
        with attending(self.model, cache, rows), self._rows(adapters, len(tokens_B)):
            output = self.model(tokens_B.unsqueeze(0), position_ids=positions_B.unsqueeze(0), use_cache=False)
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def _rows(self, adapters: RowAdapters | None, count: int) -> Iterator[None]:
        """Inside the block linear layers add the branches of each row's adapter."""
        if adapters is None or self._tokens is None:
            yield
            return
        self._tokens.count, self._tokens.rows = count, adapters
        try:
            yield
        finally:
            self._tokens.rows = None

    def _go_on(self, tokens: Tensor, wanted: Tensor, part: Part, cache: PastCache, segments: Sequence[Segment]) -> Tensor:
        assert not part.position or cache.lengths[part.slot] == part.position
        held, found = cache.past.get(part.slot) if part.position else None, []
        n = len(tokens) if self._in_parts or held is None else 1  # at once
        for begin in range(0, len(tokens), n):
            its = wanted[(wanted >= begin) & (wanted < begin + n)] - begin
            with self._branches(segments, part.begin + begin, part.begin + begin + n):
                logits, output = self._logits(tokens[begin : begin + n], its, **{self._past: held}, use_cache=True)
            held = cache_in(output)
            found.append(logits)
        cache.past[part.slot], cache.lengths[part.slot] = held, part.position + len(tokens)
        return torch.cat(found)

    def _logits(self, tokens: Tensor, wanted: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """(W, vocabulary) and the model's output, for one row of tokens."""
        at = wanted.to(self._device)
        # a model may not take none: then of one token, for nothing
        some = {"logits_to_keep": at if len(at) else 1} if self._takes_wanted else {}
        with installed(self._linears):
            output = self.model(tokens.unsqueeze(0).to(self._device), **options, **some)
        logits: Tensor = output.logits[0]
        return (logits[: len(at)] if self._takes_wanted else logits[at]), output

    @contextmanager
    def _branches(self, segments: Sequence[Segment], begin: int, end: int) -> Iterator[None]:
        """Inside the block linear layers add the branches of the segments' adapters to tokens [begin, end) of a step."""
        if segments and self._tokens is None:
            self._tokens = hooked(self.model, self._modules)
        if self._tokens is None:
            yield
            return
        cut = [(max(s.begin, begin) - begin, min(s.end, end) - begin, self._on_device(s.adapter)) for s in segments]
        self._tokens.count, self._tokens.branches = end - begin, [one for one in cut if one[0] < one[1]]
        try:
            yield
        finally:
            self._tokens.branches = ()

    def _on_device(self, adapter: Adapter) -> Sequence[LowRank | None]:
        """An adapter's branches, on another device than the host as copies that are kept."""
        if not self.draws:
            return adapter.of[0]
        if takes(adapter):
            return prepared(adapter, self._dtype, self._device).branches
        key = f"on {self._device}"
        if key not in adapter.prepared:
            same = self._on_device(adapter.unscaled) if adapter.unscaled else adapter.of[0]
            adapter.prepared[key] = [
                own and _moved(own if own.gain is not None or held is None else own._replace(A=held.A, B=held.B), self._device)
                for own, held in zip(adapter.of[0], same, strict=True)
            ]  # matrices of another scale are shared, but DoRA's, whose gain is in them
        found: list[LowRank | None] = adapter.prepared[key]
        return found

    def _trial(self, weights: tuple[torch.device, torch.dtype], why: str) -> _Trial:
        """Try the ways of running the model, the fastest first; RefusedError if none gives the model's logits."""
        self.together, self._in_parts = True, True
        if obstacle := self._obstacle():
            self.together = False
            if self._failure():
                self._in_parts = False
                if failed := self._failure():
                    raise RefusedError(self.model, f"{why}; and with transformers' modules {failed}")
        return _Trial(weights, obstacle, self._in_parts, self._slot_bytes, self._not_static, self._no_graphs)

    def _obstacle(self) -> str:
        """Why sequences cannot run together, or ''."""
        config, found = self.model.config.get_text_config(), inspect.signature(body(self.model).forward).parameters
        kinds = {each.get("rope_type", "default") for each in ropes(config)}
        if other := kinds - {*ROPE_TYPES}:
            return f"its rotary embedding is '{other.pop()}', which depends on more than the position"
        if "position_ids" not in found:
            return "it takes no positions"
        layers = getattr(config, "layer_types", None) or ()
        if other := set(layers) - {"full_attention", "sliding_attention"}:
            return f"it has layers of kind '{sorted(other)[0]}'"
        if not getattr(self.model, "_can_set_attn_implementation", lambda: True)():
            return "its attention does not go by transformers' interface"
        failed = self._failure()
        if failed and not self._not_static:
            self._not_static = failed
            failed = self._failure()
        if failed:
            return failed
        only_mask = attention.windows_only_in_mask(self.model, self._windows)
        return "only its attention mask has the sliding window" if only_mask else ""

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
        tries = 3 if self.together and not self._not_static else 1  # without a graph, captured, replayed
        try:
            expected = [self.model(row.unsqueeze(0).to(self._device), use_cache=False).logits[0] for row in rows]
            begun = self.step(
                torch.cat([rows[1][:-1], rows[0][:first]]), torch.tensor([1] * (shorter - 1) + [0] * first),
                torch.cat([places[1][:-1], places[0][:first]]), cache,
            )  # fmt: skip
            rest = rows[0][first:-1]
            ended = self.step(rest, torch.zeros_like(rest), places[0][first:-1], cache)
            for _ in range(tries):
                last = self.step(
                    torch.stack([row[-1] for row in rows]), torch.arange(2), torch.tensor([longer - 1, shorter - 1]), cache
                )
        except BackendError:  # a kernel has ended the CUDA context: its message says which, and how to start again
            raise
        except Exception as error:  # of the model's own code, which was not made for this
            return f"its forward pass fails ({_first_line(error)})"
        found = [torch.cat([begun[shorter - 1 :], ended, last[:1]]), torch.cat([begun[: shorter - 1], last[1:]])]
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        if not difference <= _TOLERANCE.get(expected[0].dtype, 0.05):
            return f"its parts give other logits than the whole (by {difference:.0e})"
        if isinstance(cache, SlotCache):
            if not cache.layers:
                return "its attention does not go by transformers' interface"
            self._windows = [how.window for how in cache.told.values()]
            of_places: dict[int | None, float] = {None: 0.0}
            for window, layer in zip(self._windows, cache.layers.values(), strict=True):
                of_places[window] = of_places.get(window, 0.0) + (layer.keys.nbytes + layer.values.nbytes) / (2 * longer)
            self._slot_bytes = _SlotBytes(0.0, of_places)
            self._no_graphs = "" if cache.steps is None else cache.steps.obstacle
        else:  # recurrent states do not grow; for windows this is more than they take
            per_token = (cache.slot_bytes(0) - cache.slot_bytes(1)) / (longer - shorter)
            self._slot_bytes = _SlotBytes(cache.slot_bytes(0) - longer * per_token, {None: per_token})
        return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


def _rope_limit(config: Any) -> tuple[str, int | None]:
    """The rotary embedding whose angles change with the length, and up to how many tokens they stay; or ('', None)."""
    found = [
        (kind, config.max_position_embeddings if kind == "dynamic" else each["original_max_position_embeddings"])
        for each in ropes(config) if (kind := each.get("rope_type")) in ("dynamic", "longrope")
    ]  # fmt: skip
    return min(found, key=lambda one: one[1], default=("", None))


def _base(module: Any) -> Any:
    return module.base if isinstance(module, LoraLinear) else module


def _prompt_tokens(device_type: str, windows: Iterable[int | None]) -> int:
    """`Decoder.prompt_tokens` on a device, with layers of these windows, whose slots have room for `PROMPT_TOKENS` only."""
    if device_type != "cuda":
        return 0
    return ON_CUDA_TOKENS if all(window is None for window in windows) else PROMPT_TOKENS


def _moved(branch: LowRank, device: torch.device) -> LowRank:
    gain = None if branch.gain is None else branch.gain.to(device)
    return LowRank(branch.A.to(device), branch.B.to(device), branch.scale, gain)


def _segments(adapters: Sequence[Adapter | None]) -> list[Segment]:
    """The runs of tokens of the same adapter."""
    found, begin = [], 0
    for _, run in groupby(adapters, id):
        one, *more = run
        end = begin + 1 + len(more)
        found += [] if one is None else [Segment(begin, end, one)]
        begin = end
    return found
