"""Lownibble's metadata about a model: one object stored on the model, created on first access.

deepcopy and pickle of the model keep it. Models not loaded with `lownibble.load` have one too, with fewer facts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lownibble.config import LoraConfig, QuantConfig

_ATTRIBUTE = "_lownibble_info"


@dataclass
class Adapters:
    """The adapters on a model.

    Attributes:
        configs: name -> its configuration.
        biases: by adapter, path in PEFT's files -> (the parameter in the base, the values swapped out: the original ones
            while the adapter is active, else the trained ones).
        corrects: name -> its initialisation, for those that start at what packing the base lost (`Initialisation.corrects`).
        active: name of the active one.
        hooks: name -> what is removed from the model with the adapter (`lora/activated.py`).
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    biases: dict[str, dict[str, tuple[nn.Parameter, Tensor]]] = field(default_factory=dict)
    corrects: dict[str, str] = field(default_factory=dict)
    active: str | None = None
    hooks: dict[str, list[RemovableHandle]] = field(default_factory=dict)


@dataclass
class ModelInfo:
    """Facts about a model.

    Attributes:
        base: 'model', 'revision' and 'digest' of the weights, from `load`; empty otherwise.
        stored_dtypes: name of a dense tensor -> its dtype in the checkpoint.
        asked_compute: the frozen-base matmul precision requested from `load` ('auto': training chooses), or None.
        compute: what 'auto' chose for training, and why.
        needs_mask: whether padded rows are given an attention mask; False if right-padded rows were found not to need one.
        autocast: autocast dtype of forward passes in training if the weights are float32 masters (full fine-tuning on CUDA),
            or None.
        read_dense: reads a layer's dense weight (out, in) in float32 from the checkpoint, by the layer's path; None if the
            model has no dense checkpoint.
        started_from: SHA-256 of the adapter's weights that a run trains on from, or None.
        changed_base: name of the adapter initialisation that changed the packed weights, or None.
        balance: the auxiliary load-balancing loss of a mixture's routers in training, or None (`training/balance.py`).
        merge_aware: how the model will be packed with its adapter merged, where that is trained (`lora/merge_aware.py`), or None.
        device: where passes run, of a model whose parameters may be elsewhere (`training/sharding.py`); None: where those are.
    """

    base: dict[str, Any] = field(default_factory=dict)
    stored_dtypes: dict[str, str] = field(default_factory=dict)
    asked_compute: str | None = None
    compute: str = ""
    needs_mask: bool = True
    autocast: torch.dtype | None = None
    read_dense: Callable[[str], Tensor] | None = None
    changed_base: str | None = None
    started_from: str | None = None
    merge_aware: QuantConfig | None = None
    balance: Callable[[tuple[Tensor, ...], Tensor | None], Tensor] | None = None
    adapters: Adapters = field(default_factory=Adapters)
    device: torch.device | None = None


def info(model: Any) -> ModelInfo:
    """The `ModelInfo` of `model`, created if missing; changes to it persist."""
    found = vars(model).get(_ATTRIBUTE)
    if not isinstance(found, ModelInfo):
        found = ModelInfo()
        object.__setattr__(model, _ATTRIBUTE, found)
    return found


def pass_device(model: Any) -> torch.device:
    """Where the model's passes run: where its parameters are, but for shards that are kept in host memory between passes."""
    device: torch.device = info(model).device or model.get_input_embeddings().weight.device
    return device


def body(model: Any) -> Any:
    """The model without its head: transformers' `base_model`, its decoder, or its part called 'model' (Llama 4's classes name no
    other)."""
    parts = (model.base_model, model.get_decoder(), getattr(model, "model", model))
    return next((part for part in parts if part is not model), model)


def compute_again(model: Any) -> None:
    """Have transformers' model keep its layers' inputs only, and compute the layers again in backward."""
    call = checkpointing_call(model, "enable")
    assert call is not None, f"{type(model).__name__} has no gradient checkpointing"
    call({"use_reentrant": False})


def checkpointing_call(model: Any, verb: Literal["enable", "disable"]) -> Callable[..., None] | None:
    """The model's method that turns gradient checkpointing on or off; None: it has none."""
    found: Callable[..., None] | None = getattr(model, f"activation_checkpointing_{verb}", None)  # transformers 5.23 renamed it
    return found or getattr(model, f"gradient_checkpointing_{verb}", None)


def decoder_layers(model: Any) -> dict[str, nn.Module]:
    """Path -> decoder layer: modules of the classes in transformers' `_no_split_modules`; empty if it names none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return {path: module for path, module in model.named_modules() if type(module).__name__ in names}
