"""Put adapters into a model's layers and start them: by the layers alone, or with a calibration pass by decoder layers.

An initialisation may change the base under its adapter; loading such an adapter changes the base again (`take_out`). A changed
base fits no other adapter, so it is changed only where no other is, and takes no other after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lownibble.calibration import Moments, walk
from lownibble.config import LoraConfig
from lownibble.errors import ModelError, QuantizationError, TargetError
from lownibble.lora.active import adapter_configs, lora_layers, remove_adapter, replace_module
from lownibble.lora.experts import LoraExperts, is_experts, variant_for
from lownibble.lora.init import Start, find, repack, without
from lownibble.lora.layer import LoraLinear
from lownibble.lora.merge_aware import variants
from lownibble.lora.targets import alpha_of, rank_of
from lownibble.lora.variants import variant_of
from lownibble.models.info import info
from lownibble.quant import PackedWeight, QuantLinear, matrix


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's output head, if it has one."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def adapt(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: LoraConfig,
    name: str,
    generator: torch.Generator,
    calibration: Tensor | None,
    set_later: bool,
    moments: Mapping[str, Moments] | None = None,
) -> None:
    """Put the layers with their initialised adapters into the model; `set_later`: with any A and B. `moments`: of their inputs,
    where calibration rows have gone through them."""
    init = find(True if set_later else config.init_lora_weights)
    variant_at = variants(model, config, variant_of(config), layers)

    def add(path: str, moments: Moments | None) -> None:
        module = layers[path]
        wrapper: Any = LoraExperts if is_experts(module) else LoraLinear
        layer = module if isinstance(module, LoraLinear) else wrapper(module)
        r, alpha = rank_of(path, config), alpha_of(path, config)
        adapter = layer.add(name, r, alpha, config.lora_dropout, config.use_rslora, variant_for(layer, variant_at[path]))
        start = Start(path, partial(_dense_weight, model, path, layer), _packed(layer), moments, generator)
        try:
            changed = init(adapter, start)
        except QuantizationError as error:
            raise QuantizationError(
                f"'{path}' cannot be started by init_lora_weights={config.init_lora_weights!r}: {error}"
            ) from None
        if changed is not None and adapter_configs(model):
            raise TargetError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight of '{path}', which other adapters were "
                "trained on. Remove those first."
            )
        if changed is not None and info(model).merge_aware is not None:
            raise TargetError(
                f"init_lora_weights={config.init_lora_weights!r} changes packed weights, and merge-aware training rounds the "
                "checkpoint's. Use init_lora_weights=True, or train without --merge-aware."
            )
        if changed is not None:
            _replace_base(path, layer, changed, config)
            if init.takes_out:
                adapter.keep_start(adapter.lora_A, adapter.lora_B)
            info(model).changed_base = str(config.init_lora_weights)
        adapter.variant.start(layer.base, adapter)
        replace_module(model, path, layer.train(module.training))

    if init.takes_out:
        _check_taking_out(model, layers, config)
    if init.corrects and info(model).merge_aware is not None:
        raise TargetError(
            f"init_lora_weights={config.init_lora_weights!r} starts at what packing lost, and merge-aware training packs anew at "
            "every step. Use init_lora_weights=True, or train without --merge-aware."
        )
    dense = not any(isinstance(getattr(module, "base", module), QuantLinear) for module in layers.values())
    if not (layers and init.calibrated) or (dense and init.corrects):
        for path in layers:
            add(path, None)
        return
    if calibration is None and moments is None:
        raise TargetError(
            f"init_lora_weights={config.init_lora_weights!r} looks at the inputs of the layers: give add_lora calibration rows "
            "(calibration=lownibble.calibration.join_rows(...)), or use lownibble train."
        )

    def visit(found: Mapping[str, Moments]) -> None:
        for path, moments in found.items():
            add(path, moments)

    if moments is not None:
        visit(moments)
    elif calibration is not None:
        walk(model, calibration, list(layers), visit)
    for path in layers.keys() - {path for path, layer in lora_layers(model, name)}:
        raise TargetError(
            f"'{path}' was not reached by the calibration rows (an expert that they do not choose?), and init_lora_weights="
            f"{config.init_lora_weights!r} looks at its inputs. Give more calibration rows, or leave it out with exclude_modules."
        )


def _check_taking_out(model: nn.Module, layers: Mapping[str, nn.Module], config: LoraConfig) -> None:
    """Check what is known before a weight is changed."""
    head: Any = output_head(model)
    embeddings: Any = model.get_input_embeddings() if head is not None else None  # type: ignore[operator]
    for path, module in layers.items():
        if module is head and getattr(module, "weight", None) is embeddings.weight:
            raise TargetError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight of '{path}', which the embeddings share. "
                "Leave it out of target_modules."
            )
    if not variant_of(config).plain:
        raise TargetError(
            f"init_lora_weights={config.init_lora_weights!r} takes its start out of the base, which goes with plain LoRA only. "
            "Leave use_dora out, or start with init_lora_weights=True."
        )


def take_back(model: nn.Module, path: str, module: nn.Module, name: str) -> None:
    """Undo `adapt` for a layer."""
    if not isinstance(module, LoraLinear):
        replace_module(model, path, module)
    elif name in module.adapters:
        del module.adapters[name]
        active = info(model).adapters.active
        module.active = active if active is not None and active in module.adapters else None


def take_out(model: nn.Module, name: str, starts: Mapping[str, tuple[Tensor, Tensor]], init: str) -> None:
    """Do again what an initialisation did to the packed base of a saved adapter: take its start out, and pack the rest.

    Args:
        name: of the adapter, which has its trained values. starts: path -> A and B at the start. init: the initialisation's name.
    Raises:
        TargetError: other adapters need the base as it is. ModelError: the dense weights are not to be had. The model is then
            without the adapter, and unchanged.
    """
    state = info(model)
    before, layers = state.changed_base, dict(lora_layers(model, name))
    try:
        made = {path: _without(model, path, layer, name, starts[path]) for path, layer in layers.items()}
    except BaseException:
        remove_adapter(model, name)
        raise
    for path, packed in made.items():
        layer = layers[path]
        if packed is not None:
            _hold(layer, packed)
            layer.changed_base = True
        layer.adapter(name).keep_start(*starts[path])
    state.changed_base = before or init


def _without(
    model: nn.Module, path: str, layer: LoraLinear, name: str, start: tuple[Tensor, Tensor]
) -> PackedWeight | None:  # fmt: skip
    """The layer's weight without the start, packed; None if another adapter with the same start did that."""
    others = [layer.adapter(other).start for other in layer.adapters if other != name]
    again = info(model).changed_base is not None
    if again != bool(others) or (not again and len(adapter_configs(model)) > 1):
        others = [None]
    if any(other is None or not all(torch.equal(a.cpu(), b) for a, b in zip(other, start, strict=True)) for other in others):
        raise TargetError(
            f"The adapter changes the packed weight of '{path}', which other adapters were trained on. Remove those first."
        )
    if others:
        return None
    packed = _packed(layer)
    assert packed is not None
    return repack(without(_dense_weight(model, path, layer), *start, layer.adapter(name).scale), packed)


def _packed(layer: LoraLinear) -> PackedWeight | None:
    return layer.base.weight if isinstance(layer.base, QuantLinear) else None


def _dense_weight(model: nn.Module, path: str, layer: LoraLinear) -> Tensor:
    """The layer's weight before it was packed, in float32.

    Raises:
        ModelError: the model was not loaded with `lownibble.load`, or its checkpoint is packed.
    """
    if isinstance(layer.base.weight, Tensor):
        return matrix(layer.base).detach().float()
    read = info(model).read_dense
    if read is None:
        raise ModelError(
            f"The dense weight of '{path}' is needed and not to be had: the model did not come through lownibble.load, or its "
            "checkpoint is packed. Load a dense checkpoint with quant=..., or use init_lora_weights=True."
        )
    return read(path)


def _replace_base(path: str, layer: LoraLinear, changed: PackedWeight | Tensor, config: LoraConfig) -> None:  # fmt: skip
    """Install the weight, packed or dense, that an initialisation returned."""
    if isinstance(changed, Tensor) == isinstance(layer.base, QuantLinear):
        held = "dense" if isinstance(changed, Tensor) else "packed"
        raise TargetError(
            f"init_lora_weights={config.init_lora_weights!r} gives '{path}' a {held} weight, and this base is not {held}. Use "
            f"--method {'lora' if held == 'dense' else 'qlora'}."
        )
    if isinstance(changed, Tensor):
        matrix(layer.base).data.copy_(changed)
    else:
        _hold(layer, changed)
    layer.changed_base = True


def _hold(layer: LoraLinear, packed: PackedWeight) -> None:
    """Give a layer another packed weight; its bias stays the same parameter, which may be trained."""
    bias = layer.base.bias
    layer.base = QuantLinear(packed, compute=str(layer.base.compute))
    layer.base.register_parameter("bias", bias)
