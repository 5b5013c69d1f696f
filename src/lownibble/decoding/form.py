"""Read a transformers model's decoder layers as data for `ops.decoder_layers`, or say why that is not possible.

There is no list of model names: a layer qualifies by its modules (the seven projections on packed weights, two norms, optional
query and key norms; in a mixture, a block with experts in the place of the last three projections). Whether they compute what
their names say is checked numerically, see `cpu.py`. A feed-forward part with another activation than silu (Gemma) is run by the
model's own code, as a mixture's is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from lownibble.decoding.decoder import RefusedError
from lownibble.decoding.mixture import Mixture
from lownibble.kernels.decoder import PROJECTIONS, Adapter, DecoderLayer, DecoderLayers, LowRank, Projection
from lownibble.lora.experts import ExpertsLoRA
from lownibble.lora.layer import LoraLinear
from lownibble.models.experts import containers
from lownibble.quant import QuantLinear

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose angles depend on the position only."""

_SILU = (nn.SiLU, SiLUActivation)
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION, _MLP = set(PROJECTIONS[:4]), set(PROJECTIONS[4:])


def read_layers(model: Any) -> DecoderLayers:
    """Read the decoder layers of a causal model; they share the model's tensors.

    Raises:
        ModelError: the architecture does not qualify.
    """
    base = model.base_model
    layers = getattr(base, "layers", None)
    if layers is None or not all(hasattr(base, name) for name in ("norm", "rotary_emb")):
        raise RefusedError(model, "its parts are not called 'layers', 'norm' and 'rotary_emb'")
    if base.rotary_emb.rope_type not in ROPE_TYPES:
        raise RefusedError(
            model, f"its rotary embedding is '{base.rotary_emb.rope_type}', which depends on more than the position"
        )
    return DecoderLayers([_layer(model, f"layer {index}", layer) for index, layer in enumerate(layers)])


def read_adapter(model: Any, adapter: str | None = None) -> Adapter | None:
    """Read the low-rank branches of the named adapter (default: the active one); None if there are none.

    Raises:
        ModelError: the adapter's variant is more than a plain low-rank sum.
    """
    found = [[_branch(module, adapter) for module in linears(layer).values()] for layer in model.base_model.layers]
    return Adapter(found) if any(branch for branches in found for branch in branches) else None


def _branch(module: nn.Module, adapter: str | None) -> LowRank | None:
    if not isinstance(module, LoraLinear):
        return None
    name = adapter or module.active
    if name is None or name not in module.adapters:
        return None
    low = module.adapter(name)
    if not (low.variant.plain or isinstance(low.variant, ExpertsLoRA)):
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
    return [[f"{paths[id(layer)]}.{path}" for path in linears(layer)] for layer in model.base_model.layers]


def runs_itself(block: nn.Module) -> bool:
    """Whether the second half of a layer is run by the model's own code: a mixture of experts whose weights are fused, or dense
    with another activation than silu."""
    return any(True for _ in containers(block)) or not isinstance(getattr(block, "act_fn", None), _SILU)


def _layer(model: Any, name: str, layer: Any) -> DecoderLayer:
    def holds(module: nn.Module, needed: set[str], allowed: set[str]) -> bool:
        found = {child for child, _ in module.named_children()}
        return needed <= found <= needed | allowed

    if not holds(layer, _LAYER, set()):
        raise RefusedError(model, f"{name} is made of {', '.join(child for child, _ in layer.named_children())}")
    attention = layer.self_attn
    own, mixture = runs_itself(layer.mlp), any(True for _ in containers(layer.mlp))
    if not holds(attention, _ATTENTION, {"q_norm", "k_norm"}) or not (mixture or holds(layer.mlp, _MLP, {"act_fn"})):
        raise RefusedError(model, f"attention or feed-forward part of {name} has other projections than {', '.join(PROJECTIONS)}")
    if own and (dense := Mixture.dense_weights(layer.mlp)):
        raise RefusedError(model, f"{dense[0]} of {name} is not on packed weights")
    found = list(linears(layer).items())[: 4 if own else None]
    projections = [_linear(model, f"{name}'s {path.rpartition('.')[2]}", module) for path, module in found]
    head_dim = attention.head_dim
    norm, post_norm = (_norm(model, module) for module in (layer.input_layernorm, layer.post_attention_layernorm))
    of_heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if module is None else _norm(model, module) for module in of_heads)
    heads, key_heads = (projections[index].weight.shape[0] // head_dim for index in (0, 1))
    eps = _eps(layer.input_layernorm)
    of_heads_sizes = (heads, key_heads, head_dim, eps, attention.scaling)
    return DecoderLayer(projections, norm, post_norm, q_norm, k_norm, *of_heads_sizes, Mixture(layer.mlp) if own else None)


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _norm(model: Any, norm: nn.Module) -> Tensor:
    """What an RMS norm multiplies by: its weight, or 1 + its weight."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 1:
        weight, probe = weight.detach(), torch.linspace(-1, 2, len(weight))
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
