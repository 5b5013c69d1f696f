"""How much of a tune a merge keeps: the merged models beside the live adapter on held-out text, before anything is written.

The reference is the live model: the base as it was in training, with the low-rank branch beside each layer. Next to it run the
bare base and every merged model. Over the same tokens each is compared with the live one by KL divergence (nats a token), by
how often both find the same token most probable, and by perplexity. What a merge keeps of the tune is

    1 - KL(live || merged) / KL(live || base)

which is 1 for a perfect merge and 0 for one that might as well have left the adapter out. A cast or a second rounding that is
larger than the delta shows layer by layer as error / delta, in Frobenius norms.

No model is ever in memory: transformers' skeleton stays on the meta device and accelerate's hooks ask for a module's tensors
when its turn comes, which `Weights` then makes. All rows go through in one batch, so every tensor is made once for each model.
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
from lownibble.exporting.weights import Tell, Weights, as_float
from lownibble.training.loss import Head, hidden_states, label_places
from lownibble.training.microbatches import Collate

LIVE, BASE = "live", "base"
CHUNK_TOKENS = 256
FAITHFUL = 0.9
"""A merge that keeps less of the tune than this is advised against, and in 4 bits refused."""


def choose_rows(examples: list[Example], max_tokens: int) -> list[Example]:
    """The first rows that together, padded, have at most so many tokens; one at least."""
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
    """The live model, the base and each merged model on the same rows; see the module's docstring for the figures.

    Returns:
        `models`: by name, figures over label tokens and over all; `layers`: by target, errors by layer; `tokens`, `label_tokens`.
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
    places_L, _ = label_places(batch.labels)
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
    """(L,) places whose next token is real, of the decoder's rows flattened, and those tokens."""
    if batch.source is not None:  # an encoder-decoder's rows are labels only
        return label_places(batch.labels)
    ids_BT, mask_BT = batch.input_ids, batch.attention_mask.bool()
    row_L, column_L = (mask_BT[:, :-1] & mask_BT[:, 1:]).nonzero(as_tuple=True)
    return row_L * ids_BT.shape[1] + column_L, ids_BT[:, 1:][row_L, column_L]


def _summary(errors: Mapping[str, float]) -> dict[str, Any]:
    """Median and worst of errors by layer, and each."""
    ordered = sorted(errors.values())
    return {
        "error_over_delta_median": ordered[len(ordered) // 2] if ordered else None,
        "error_over_delta_worst": ordered[-1] if ordered else None,
        "by_layer": dict(errors),
    }


class _Live(Mapping[str, Tensor]):
    """The tensors of the live model, or of the bare base, by the model's names; the low-rank branches are hooks."""

    def __init__(self, weights: Weights, *, adapted: bool = True) -> None:
        self.weights, self.adapted = weights, adapted

    def __getitem__(self, name: str) -> Tensor:
        return self.weights.live(self.weights.resolve(name), adapted=self.adapted)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.names)

    def __len__(self) -> int:
        return len(self.weights.names)


class _Merged(_Live):
    """The tensors of a merged model; notes how far each is from the exact sum, in units of the delta."""

    def __init__(self, weights: Weights, target: str, errors: dict[str, float]) -> None:
        super().__init__(weights)
        self.target, self.errors = target, errors

    def __getitem__(self, name: str) -> Tensor:
        name = self.weights.resolve(name)
        made = as_float(self.weights.merged(name, self.target))
        low_rank = self.weights.low_rank(name)
        if low_rank is not None and name not in self.errors:
            a, b, scale = low_rank
            delta = (b @ a).mul_(scale)
            size = float(delta.norm())
            off = float(self.weights.live(name).add_(delta).sub_(made).norm())
            if size:  # a layer that learnt nothing has no delta to be measured by
                self.errors[name] = off / size
        return made


def _hidden(weights: Weights, batch: Batch, tensors: _Live) -> Tensor:
    """Last hidden states (B * T, H) of the model that `tensors` make."""
    model = weights.model.eval()
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=tensors)
    branches = [] if isinstance(tensors, _Merged) or not tensors.adapted else list(_branches(weights))
    try:
        hidden_BTH = hidden_states(model, batch.input_ids, batch.attention_mask, source=batch.source)
    finally:
        for branch in branches:
            branch.remove()
        remove_hook_from_submodules(model)
    return hidden_BTH.flatten(0, 1)


def _branches(weights: Weights) -> Iterator[Any]:
    """A hook beside every adapted layer that adds its low-rank branch, as the live adapter does."""
    head = weights.model.get_output_embeddings()
    for path, module in weights.model.named_modules():
        name = f"{path}.weight"
        if module is not head and name in weights.names and weights.low_rank(name) is not None:

            def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> Tensor:
                low_rank = weights.low_rank(name)
                assert low_rank is not None
                a, b, scale = low_rank
                return output + ((inputs[0] @ a.t()) @ b.t()).mul_(scale)

            yield module.register_forward_hook(add)


class _HeadOf:
    """From hidden states to log-probabilities, with the head that `tensors` make."""

    def __init__(self, weights: Weights, tensors: _Live) -> None:
        path = next(p for p, m in weights.model.named_modules() if m is weights.model.get_output_embeddings())
        self.weight = tensors[f"{path}.weight"]
        low_rank = weights.low_rank(name) if (name := f"{path}.weight") in weights.names else None
        if low_rank is not None and not isinstance(tensors, _Merged) and tensors.adapted:
            self.weight.addmm_(low_rank[1], low_rank[0], alpha=low_rank[2])
        has_bias = weights.model.get_output_embeddings().bias is not None
        self.bias = tensors[f"{path}.bias"] if has_bias else None
        self.transforms = Head(weights.model).transforms

    def __call__(self, hidden_LH: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden_LH, self.weight, self.bias)
        for transform, value in self.transforms:
            logits = transform(logits, value)
        return logits.log_softmax(1)


def _compare(
    weights: Weights, hidden: Mapping[str, Tensor], name: str, tensors: _Live, places: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Any]:
    """Figures of one model beside the live one, over label tokens and over all; `places`: where, the next tokens, which are
    labels.
    """
    places_L, next_L, is_label_L = places
    live_head, other_head = _HeadOf(weights, _Live(weights)), _HeadOf(weights, tensors)
    kl, same, loss, live_loss = [], [], [], []
    for part, ids in zip(places_L.split(CHUNK_TOKENS), next_L.split(CHUNK_TOKENS), strict=True):
        live_LV, other_LV = live_head(hidden[LIVE][part]), other_head(hidden[name][part])
        same.append(live_LV.argmax(1) == other_LV.argmax(1))
        loss.append(-other_LV.gather(1, ids.unsqueeze(1)).squeeze(1))
        live_loss.append(-live_LV.gather(1, ids.unsqueeze(1)).squeeze(1))
        kl.append((live_LV.exp() * live_LV.sub(other_LV)).sum(1).clamp_min_(0))
    kl_L, same_L, loss_L, live_L = (torch.cat(parts) for parts in (kl, same, loss, live_loss))
    if not torch.isfinite(kl_L).all():
        raise AdapterError(
            f"On these rows the live adapter, or the model '{name}', gives logits that are not finite. Look at the adapter, "
            "or name other rows with --data."
        )

    def figures(chosen: Tensor) -> dict[str, float]:
        n = int(chosen.sum())
        return {
            "kl": float(kl_L[chosen].mean(dtype=torch.float64)),
            "kl_standard_error": float(kl_L[chosen].std() / math.sqrt(n)) if n > 1 else 0.0,
            "top1_agreement": float(same_L[chosen].double().mean()),
            "perplexity": _perplexity(loss_L[chosen]),
        }

    return {
        "label_tokens": figures(is_label_L), "all_tokens": figures(torch.ones_like(is_label_L)),
        "live_perplexity": _perplexity(live_L[is_label_L]),
    }  # fmt: skip


def _perplexity(losses_L: Tensor) -> float:
    """exp of the mean, which is kept in range: a model may find a token all but impossible."""
    return math.exp(min(700.0, float(losses_L.mean(dtype=torch.float64))))
