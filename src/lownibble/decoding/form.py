"""Read a transformers model's decoder layers as data for `ops.decoder_layers`, or say why that is not possible.

There is no list of model names: a layer qualifies by its modules (the seven projections on packed weights, two or four norms,
optional query and key norms; in a mixture, a block with experts in the place of the last three projections). What norms and
activations compute is found by trying them, windows, caps and scaling from what each layer tells transformers' attention in a
pass over one token. Whether the whole computes what its names say is checked numerically, see `cpu.py`. A feed-forward part with
an activation that the kernels do not have is run by the model's own code, as a mixture's is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lownibble.decoding.caches import SlotCache
from lownibble.decoding.decoder import RefusedError
from lownibble.decoding.mixture import Mixture
from lownibble.decoding.slots import attending
from lownibble.decoding.spans import Part
from lownibble.errors import ModelError
from lownibble.kernels.decoder import ACTIVATIONS, PROJECTIONS, Adapter, DecoderLayer, DecoderLayers, LowRank, Projection
from lownibble.kernels.rows import Attending
from lownibble.lora.activated import ActivatedLoRA, activated
from lownibble.lora.active import lora_layers
from lownibble.lora.dora import DORA, row_gains
from lownibble.lora.experts import ExpertsLoRA
from lownibble.lora.inject import named_linears
from lownibble.lora.layer import LoraLinear
from lownibble.models.attention import windows_only_in_mask
from lownibble.models.experts import containers
from lownibble.quant import QuantLinear

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
"""RoPE types whose angles depend on the position only."""

_NORMS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
)
"""What models call the norms of a layer: of the inputs of attention and feed-forward part, and of their outputs if there are."""

_ATTENTION, _MLP = set(PROJECTIONS[:4]), set(PROJECTIONS[4:])


def read_layers(model: Any) -> DecoderLayers:
    """Read the decoder layers of a causal model; they share the model's tensors.

    Raises:
        ModelError: the architecture does not qualify.
    """
    base = language_model(model)
    layers = getattr(base, "layers", None)
    if layers is None or not all(getattr(base, name, None) for name in ("norm", "rotary_emb")):
        raise RefusedError(model, "its parts are not called 'layers', 'norm' and 'rotary_emb'")
    of_kinds = rope_types(model)
    if other := {*of_kinds.values()} - {*ROPE_TYPES}:
        raise RefusedError(model, f"its rotary embedding is '{other.pop()}', which depends on more than the position")
    if any(each.get("llama_4_scaling_beta") is not None for each in ropes(model.config.get_text_config())):
        raise RefusedError(model, "its queries are scaled by their position")  # which the first positions do not show
    found = [_layer(model, f"layer {index}", layer) for index, layer in enumerate(layers)]
    kinds = [None] * len(found) if None in of_kinds else model.config.get_text_config().layer_types
    if other := {*kinds} - {*of_kinds}:
        raise RefusedError(model, f"its layers of kind '{other.pop()}' have no rotary embedding")
    told = _told(model)
    if {*told} != {*range(len(found))}:
        raise RefusedError(model, "its attention does not go by transformers' interface, or is not plainly causal")
    if any(how.sinks is not None for how in told.values()):
        raise RefusedError(model, "its attention has sinks")
    if windows_only_in_mask(model, [how.window for how in told.values()]):
        raise RefusedError(model, "only its attention mask has the sliding window")
    for index, layer in enumerate(found):
        scaling, window, softcap, _ = told[index]
        scaling = layer.scaling if scaling is None else scaling
        found[index] = layer._replace(
            scaling=scaling, window=window, softcap=softcap, rope=[*of_kinds].index(kinds[index]),
            residual_scale=getattr(layers[index], "residual_multiplier", 1.0),
        )  # fmt: skip
    return DecoderLayers(found)


def language_model(model: Any) -> Any:
    """The module with the decoder layers: the body, or what is its language model where it takes images, too."""
    return getattr(model.base_model, "language_model", model.base_model)


def rope_types(model: Any) -> Mapping[str | None, str]:
    """Kind of layers -> type of their rotary embedding; None: of all layers."""
    found: str | dict[str | None, str] = language_model(model).rotary_emb.rope_type
    return found if isinstance(found, dict) else {None: found}


def ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of the rotary embeddings, one or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict)]


def _told(model: Any) -> Mapping[int, Attending]:
    """How each layer asks to attend, found once per model by a pass over one token; fewer layers if that fails."""
    if model not in _heard:
        cache = SlotCache(1, 1)
        with suppress(ModelError), torch.inference_mode(), attending(model, cache, [Part(0, 0, 1, 0)]):
            model.base_model(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
        _heard[model] = cache.told
    return _heard[model]


_heard: WeakKeyDictionary[Any, Mapping[int, Attending]] = WeakKeyDictionary()


def read_adapter(model: Any, adapter: str | None = None) -> Adapter | None:
    """Read the low-rank branches of the named adapter (default: the active one); None if there are none.

    Raises:
        ModelError: the adapter's variant is neither a plain low-rank sum nor DoRA.
    """
    if adapter is None and activated(model) is not None:
        raise RefusedError(model, "its active adapter is on some tokens only (alora_invocation_tokens)")
    found = [[_branch(module, adapter) for module in linears(layer).values()] for layer in language_model(model).layers]
    return Adapter(found) if any(branch for branches in found for branch in branches) else None


def activated_adapter(model: Any, paths: Sequence[Sequence[str]], name: str) -> Adapter:
    """The branches of a model's activated adapter at a decoder's paths."""
    variant = next(layer.adapter(name).variant for _, layer in lora_layers(model, name))
    assert isinstance(variant, ActivatedLoRA)
    found = [[_branch(model.get_submodule(path), name) for path in of_layer] for of_layer in paths]
    return Adapter(found, invocation=variant.tokens)


def _branch(module: nn.Module, adapter: str | None) -> LowRank | None:
    if not isinstance(module, LoraLinear):
        return None
    name = adapter or module.active
    if name is None or name not in module.adapters:
        return None
    low = module.adapter(name)
    if low.variant is DORA:
        parts = {own: getattr(low, own).detach() for own in DORA.keys}
        gain = row_gains(module.base, parts, low.scale, low.row_squares)
        return LowRank(parts["lora_A"], parts["lora_B"] * gain.unsqueeze(1), low.scale, gain)
    if not (low.variant.plain or isinstance(low.variant, (ExpertsLoRA, ActivatedLoRA))):
        raise RefusedError(low, "its adapter is more than a low-rank sum")
    return LowRank(low.lora_A.detach(), low.lora_B.detach(), low.scale)


def linears(layer: Any) -> Mapping[str, nn.Module]:
    """A layer's linear layers and experts' weights by path, in the order of an adapter's branches."""
    if runs_itself(layer.mlp):
        paths = [f"self_attn.{name}" for name in PROJECTIONS[:4]] + [f"mlp.{name}" for name in Mixture.linears_of(layer.mlp)]
    else:
        paths = [f"{'self_attn' if name in _ATTENTION else 'mlp'}.{name}" for name in PROJECTIONS]
    return {path: layer.get_submodule(path) for path in paths}


def branch_paths(model: Any) -> list[list[str]]:
    """By layer: the paths in the model of its linear layers and experts' weights, in the order of an adapter's branches."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [[f"{paths[id(layer)]}.{path}" for path in linears(layer)] for layer in language_model(model).layers]


def paths_beside_text(model: Any) -> frozenset[str]:
    """The paths of linear layers that no text passes through: a vision model's."""
    body = {*model.base_model.modules()}
    beside = body - {*language_model(model).modules()}
    return frozenset(path for path, module in named_linears(model).items() if module in beside)


def runs_itself(block: nn.Module) -> bool:
    """Whether the second half of a layer is run by the model's own code: a mixture of experts whose weights are fused, or dense
    with an activation that the kernels do not have."""
    return any(True for _ in containers(block)) or _activation(block) is None


@torch.no_grad()
def _activation(block: Any) -> str | None:
    """Which of `ACTIVATIONS` a feed-forward part has."""
    own, probe = getattr(block, "act_fn", None), torch.linspace(-6, 6, 65, dtype=torch.float32)
    same = (name for name, ours in ACTIVATIONS.items() if own and torch.allclose(own(probe), ours(probe), atol=1e-6))
    return next(same, None)


def _layer(model: Any, name: str, layer: Any) -> DecoderLayer:
    def holds(module: nn.Module, needed: set[str], allowed: set[str]) -> bool:
        found = {child for child, _ in module.named_children()}
        return needed <= found <= needed | allowed

    names = next((names for names in _NORMS if holds(layer, {"self_attn", "mlp", *names}, set())), None)
    if names is None:
        raise RefusedError(model, f"{name} is made of {', '.join(child for child, _ in layer.named_children())}")
    attention = layer.self_attn
    mixture, activation = any(True for _ in containers(layer.mlp)), _activation(layer.mlp)
    own = mixture or activation is None
    if not holds(attention, _ATTENTION, {"q_norm", "k_norm"}) or not (mixture or holds(layer.mlp, _MLP, {"act_fn"})):
        raise RefusedError(model, f"attention or feed-forward part of {name} has other projections than {', '.join(PROJECTIONS)}")
    if own and (dense := Mixture.dense_weights(layer.mlp)):
        raise RefusedError(model, f"{dense[0]} of {name} is not on packed weights")
    found = list(linears(layer).items())[: 4 if own else None]
    projections = [_linear(model, f"{name}'s {path.rpartition('.')[2]}", module) for path, module in found]
    head_dim = attention.head_dim
    before, inner = (_norm(model, getattr(layer, name)) for name in names[:2])
    outputs: list[Tensor | None] = [_norm(model, getattr(layer, name)) for name in names[2:]] or [None, None]
    of_heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if module is None else _norm(model, module) for module in of_heads)
    heads, key_heads = (projections[index].weight.shape[0] // head_dim for index in (0, 1))
    return DecoderLayer(
        projections, before, inner, q_norm, k_norm, heads, key_heads, head_dim, _eps(layer.input_layernorm), head_dim**-0.5,
        Mixture(layer.mlp) if own else None, outputs[0], outputs[1], activation or "silu",
    )  # fmt: skip


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _norm(model: Any, norm: nn.Module) -> Tensor:
    """What an RMS norm multiplies by: its weight, or 1 + its weight."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 1:
        weight, probe = weight.detach(), torch.linspace(-1, 2, len(weight), dtype=torch.float32)
        normed = probe * torch.rsqrt(probe.pow(2).mean() + _eps(norm))
        with torch.no_grad():
            output = norm(probe)
        for found in (weight, 1 + weight):
            if torch.allclose(output, normed * found, rtol=1e-5, atol=1e-6):
                return found
    raise RefusedError(model, f"{type(norm).__name__} is not an RMS norm")


def _linear(model: Any, name: str, module: nn.Module) -> Projection:
    base = module.base if isinstance(module, LoraLinear) else module
    if not isinstance(base, QuantLinear):
        raise RefusedError(model, f"{name} is a {type(base).__name__}, not on a packed weight")
    bias = base.bias
    if bias is not None and bias.dtype != torch.float32:
        raise RefusedError(model, f"the bias of {name} is {bias.dtype}, not float32")
    weight = base.weight
    return Projection(weight.four_bit or weight, None if bias is None else bias.detach())
