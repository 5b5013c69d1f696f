"""Fine-tuning gain retained by a merge: compare merged models with the live adapter on held-out text, before writing.

The reference is the live model: the base as it was in training, with the adapter's change to each layer, or, for an adapter of
merge-aware training, the packed sum, in float32. The bare base and every merged model are compared with it on the same tokens: KL
divergence (nats per token), top-1 agreement and perplexity. The fine-tuning gain retained is

    1 - KL(live || merged) / KL(live || base)

which is 1 for a perfect merge and 0 for one no better than the bare base. A cast or requantisation error larger than the delta
shows per layer as error / delta, in Frobenius norms.

No model is ever fully in memory: transformers' skeleton stays on the meta device, and accelerate's hooks request each module's
tensors from `Weights` when it runs. All rows form one batch, so every tensor is made once per model. Heads are evaluated one
vocabulary slice at a time, so the full logits and a float32 copy of a dense head are never materialised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from torch import Tensor, nn

from lownibble.data import Batch, Example
from lownibble.errors import AdapterError
from lownibble.exporting.weights import Change, Tell, Weights, unchanged
from lownibble.memory.usage import trim_heap
from lownibble.models.head import Head, hidden_states
from lownibble.quant import PackedWeight
from lownibble.training.microbatches import Collate

LIVE, BASE = "live", "base"
SLICE = 256
"""Vocabulary entries compared at a time."""
FAITHFUL = 0.9
"""Fine-tuning gain retained below which a merge is advised against, and a 4-bit one refused."""


def choose_rows(examples: list[Example], max_tokens: int) -> list[Example]:
    """The first rows that, padded, have at most `max_tokens` tokens in total; at least one row."""
    chosen: list[Example] = []
    longest = 0
    for example in examples:
        longest = max(longest, len(example.input_ids))
        if chosen and (len(chosen) + 1) * longest > max_tokens:
            break
        chosen.append(example)
    return chosen


@torch.no_grad()
def measure(weights: Weights, rows: list[Example], collate: Collate, tell: Tell) -> dict[str, Any]:
    """Run the live model, the base and each merged model on the same rows; figures as in the module docstring.

    Returns:
        `models`: by name, figures over label tokens and over all; `layers`: by target, per-layer errors; counts `rows`, `tokens`,
        `label_tokens`.
    """
    batch = collate(rows)
    layers: dict[str, dict[str, float]] = {target: {} for target in weights.targets}
    made = {target: _Merged(weights, target, layers[target]) for target in weights.targets}
    models_of = {LIVE: _Live(weights), BASE: _Live(weights, adapted=False), **made}
    hidden = {}
    for number, (name, tensors) in enumerate(models_of.items()):
        tell("measuring", number, len(models_of))
        hidden[name] = _hidden(weights, batch, tensors)
    tell("measuring", len(models_of), len(models_of))
    places_L, _ = batch.label_places
    all_L, targets_L = _places(batch)
    is_label_L = torch.isin(all_L, places_L)
    found = {
        name: _compare(weights, hidden, name, tensors, (all_L, targets_L, is_label_L))
        for name, tensors in ({BASE: _Live(weights, adapted=False)} | made).items()
    }
    models: dict[str, dict[str, Any]] = {LIVE: {"label_tokens": {"perplexity": found[BASE].pop("live_perplexity")}}}
    for name, figures in found.items():
        figures.pop("live_perplexity", None)
        models[name] = figures
    of_base = models[BASE]["label_tokens"]["kl"]
    for target in weights.targets:
        models[target]["kept"] = 1 - models[target]["label_tokens"]["kl"] / of_base if of_base > 0 else 1.0
    return {
        "rows": len(rows), "tokens": len(all_L), "label_tokens": int(is_label_L.sum()), "models": models,
        "layers": {target: _summary(errors) for target, errors in layers.items()},
    }  # fmt: skip


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """(L,) flattened positions in the decoder's rows whose next token is not padding, and (L,) those next tokens."""
    if batch.source is not None:  # an encoder-decoder's rows are labels only
        return batch.label_places
    ids_BT, mask_BT = batch.input_ids, batch.attention_mask.bool()
    row_L, column_L = (mask_BT[:, :-1] & mask_BT[:, 1:]).nonzero(as_tuple=True)
    return row_L * ids_BT.shape[1] + column_L, ids_BT[:, 1:][row_L, column_L]


def _summary(errors: Mapping[str, float]) -> dict[str, Any]:
    """Median, worst and all of the per-layer errors."""
    ordered = sorted(errors.values())
    return {
        "error_over_delta_median": ordered[len(ordered) // 2] if ordered else None,
        "error_over_delta_worst": ordered[-1] if ordered else None,
        "by_layer": dict(errors),
    }


class _Live(Mapping[str, Tensor]):
    """Tensors of the live model or the bare base, by the model's names, in float32."""

    def __init__(self, weights: Weights, *, adapted: bool = True) -> None:
        self.weights, self.adapted = weights, adapted

    def stored(self, name: str) -> Tensor | PackedWeight:
        """The tensor as stored (packed or in its own dtype), before the cast to float32 and the adapter's change."""
        return self.weights.live(self.weights.resolve(name), adapted=self.adapted)

    def change(self, name: str) -> Change:
        """What turns `stored` in float32 into what this model computes with."""
        return self.weights.live_change(self.weights.resolve(name)) if self.adapted else unchanged

    def __getitem__(self, name: str) -> Tensor:
        trim_heap()  # return the previous tensors' freed but fragmented memory to the system
        return self.change(name)(self.weights.as_float(name, self.stored(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.names)

    def __len__(self) -> int:
        return len(self.weights.names)


class _Merged(_Live):
    """Tensors of a merged model; records each one's error from the float32 sum, relative to the delta's norm."""

    def __init__(self, weights: Weights, target: str, errors: dict[str, float]) -> None:
        super().__init__(weights)
        self.target, self.errors = target, errors

    def stored(self, name: str) -> Tensor | PackedWeight:
        name = self.weights.resolve(name)
        made = self.weights.merged(name, self.target)
        if name in self.weights.edits and name not in self.errors:
            size = self.weights.delta_norm(name)
            if size:  # a zero delta has no relative error
                self.errors[name] = self._off(name, made) / size
        return made

    def _off(self, name: str, made: Tensor | PackedWeight) -> float:
        """Frobenius norm of a merged weight's difference from the live model's."""
        weights, live, change = self.weights, self.weights.live(name), self.weights.live_change(name)
        return math.hypot(*(
            float(change(weights.as_float(name, live, part), part).sub_(weights.as_float(name, made, part)).norm())
            for part in weights.parts(name)
        ))  # fmt: skip

    def change(self, name: str) -> Change:
        """None: it is in what is stored."""
        return unchanged


def _hidden(weights: Weights, batch: Batch, tensors: _Live) -> Tensor:
    """Last hidden states (B * T, H) of the model with these `tensors`."""
    model = weights.model.eval()
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=tensors)
    try:
        hidden_BTH = hidden_states(model, batch.input_ids, batch.mask, source=batch.source)
    finally:
        remove_hook_from_submodules(model)
    return hidden_BTH.flatten(0, 1)


class _HeadOf:
    """Hidden states to logits, with the head from `tensors`."""

    def __init__(self, weights: Weights, tensors: _Live) -> None:
        head = weights.model.get_output_embeddings()
        path = next(p for p, m in weights.model.named_modules() if m is head)
        stored, self.change = tensors.stored(f"{path}.weight"), tensors.change(f"{path}.weight")
        self.weight = stored.dequantize(torch.float32) if isinstance(stored, PackedWeight) else stored
        self.bias = tensors[f"{path}.bias"] if head.bias is not None else None
        self.transforms = Head(weights.model).transforms

    def __call__(self, hidden_LH: Tensor, words: slice) -> Tensor:
        """Logits (L, S) of a vocabulary slice, float64 because sums over the vocabulary cancel."""
        weight_SH = self.change(self.weight[words].to(torch.float32, copy=True), words)
        logits = nn.functional.linear(hidden_LH, weight_SH, None if self.bias is None else self.bias[words])
        for transform, value in self.transforms:
            logits = transform(logits, value)
        return logits.double()


class _Softmax:
    """Online softmax over vocabulary slices at L positions: log-sum-exp, argmax token, logit of `next_L`."""

    def __init__(self, next_L: Tensor) -> None:
        self.next_L = next_L
        self.log_sum_L = torch.full(next_L.shape, -math.inf, dtype=torch.float64)
        self.best_L, self.word_L = self.log_sum_L.clone(), torch.zeros_like(next_L)
        self.logit_L = self.log_sum_L.clone()

    def add(self, logits_LS: Tensor, start: int) -> None:
        self.log_sum_L = torch.logaddexp(self.log_sum_L, logits_LS.logsumexp(1))
        best_L, word_L = logits_LS.max(1)
        better_L = best_L > self.best_L
        self.best_L, self.word_L = torch.where(better_L, best_L, self.best_L), torch.where(better_L, word_L + start, self.word_L)
        here_L = (self.next_L >= start) & (self.next_L < start + logits_LS.shape[1])
        self.logit_L[here_L] = logits_LS[here_L, self.next_L[here_L] - start]

    @property
    def losses(self) -> Tensor:
        return self.log_sum_L - self.logit_L


def _compare(
    weights: Weights, hidden: Mapping[str, Tensor], name: str, tensors: _Live, places: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Any]:
    """Compare one model with the live one, over label tokens and over all; `places`: (L,) positions, next tokens and whether
    each is a label.
    """
    trim_heap()
    places_L, next_L, is_label_L = places
    heads = _HeadOf(weights, _Live(weights)), _HeadOf(weights, tensors)
    states = hidden[LIVE][places_L], hidden[name][places_L]
    live, other = _Softmax(next_L), _Softmax(next_L)
    apart_L = torch.zeros(len(next_L), dtype=torch.float64)  # mean of live - other logits under the live model's probabilities
    for start in range(0, len(heads[0].weight), SLICE):
        live_LS, other_LS = (head(state, slice(start, start + SLICE)) for head, state in zip(heads, states, strict=True))
        before_L = live.log_sum_L
        live.add(live_LS, start)
        other.add(other_LS, start)
        share_LS = live_LS.sub(live.log_sum_L.unsqueeze(1)).exp_()
        apart_L = apart_L * (before_L - live.log_sum_L).exp() + (share_LS * live_LS.sub_(other_LS)).sum(1)
    kl_L = (apart_L - live.log_sum_L + other.log_sum_L).clamp_min_(0)
    if not torch.isfinite(kl_L).all():
        raise AdapterError(
            f"On these rows the unmerged adapter, or the model '{name}', gives logits that are not finite. Look at the adapter, "
            "or name other rows with --data."
        )
    same_L = live.word_L == other.word_L

    def figures(chosen: Tensor) -> dict[str, float]:
        n = int(chosen.sum())
        return {
            "kl": float(kl_L[chosen].mean(dtype=torch.float64)),
            "kl_standard_error": float(kl_L[chosen].std() / math.sqrt(n)) if n > 1 else 0.0,
            "top1_agreement": float(same_L[chosen].double().mean()),
            "perplexity": _perplexity(other.losses[chosen]),
        }

    return {
        "label_tokens": figures(is_label_L), "all_tokens": figures(torch.ones_like(is_label_L)),
        "live_perplexity": _perplexity(live.losses[is_label_L]),
    }  # fmt: skip


def _perplexity(losses_L: Tensor) -> float:
    """exp of the mean loss, clamped to 700 against overflow: a model may give a token almost no probability."""
    return math.exp(min(700.0, float(losses_L.mean(dtype=torch.float64))))
