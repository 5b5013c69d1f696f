"""The adapters that a model carries: which there are, which is active, what they train, and how they leave again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lownibble.config import LoraConfig
from lownibble.errors import TargetError
from lownibble.lora.layer import LoraLinear, TrainedCopy
from lownibble.models import experts
from lownibble.models.info import info
from lownibble.quant import QuantLinear


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module, or the weight of experts, at `path` by `module`."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    if experts.is_container(holder):
        experts.place(holder, name, module)
    else:
        setattr(holder, name, module)


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Adapter name -> its configuration."""
    return dict(info(model).adapters.configs)


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter."""
    return info(model).adapters.active


def lora_layers(model: nn.Module, name: str) -> Iterator[tuple[str, LoraLinear]]:
    """(path, layer) of every layer that carries the adapter `name`."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear) and name in module.adapters:
            yield path, module


def saved_modules(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, trained copy) of every module in the adapter's `modules_to_save`."""
    for path, module in model.named_modules():
        if isinstance(module, TrainedCopy) and name in module.copies:
            yield path, module.copies[name]


def trained_biases(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """(path in PEFT's files, values) of every bias that the adapter trained in place."""
    state = info(model).adapters
    for path, (parameter, aside) in state.biases[name].items():
        yield path, parameter if state.active == name else aside


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter active everywhere and the only trainable one; None turns all adapters off, trained biases too.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    state = info(model).adapters
    if name is not None and name not in state.configs:
        raise TargetError(f"The model has no adapter '{name}'. It has: {', '.join(state.configs) or 'none'}.")
    for module in model.modules():
        if isinstance(module, (LoraLinear, TrainedCopy)):
            parts = module.adapters if isinstance(module, LoraLinear) else module.copies
            module.active = name if name is not None and name in parts else None
            for key, part in parts.items():
                part.requires_grad_(key == name)
    for owner, biases in state.biases.items():
        for parameter, aside in biases.values():
            parameter.requires_grad_(owner == name)
            if owner in (state.active, name) and state.active != name:
                in_place = parameter.detach().clone()
                parameter.data.copy_(aside)
                aside.copy_(in_place)
    state.active = name


@contextmanager
def adapter_off(model: nn.Module, *, off: bool = True) -> Iterator[None]:
    """Inside the block, which computes no gradients, the active adapter is without effect; not `off`: it is as it was."""
    state = info(model).adapters
    name = state.active if off else None
    parts = [m for m in model.modules() if isinstance(m, (LoraLinear, TrainedCopy)) and m.active == name] if name else []
    biases = list(state.biases.get(name, {}).values()) if name else []

    def swap() -> None:
        for parameter, aside in biases:
            in_place = parameter.detach().clone()
            parameter.data.copy_(aside)
            aside.copy_(in_place)

    for part in parts:
        part.active = None
    swap()
    try:
        yield
    finally:
        swap()
        for part in parts:
            part.active = name


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter `name` from the model; layers left without adapters are replaced by their base layers. A base that the
    adapter's initialisation changed stays changed: load the model again.

    If it was active, the oldest remaining adapter becomes active.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    state = info(model).adapters
    if name not in state.configs:
        raise TargetError(f"The model has no adapter '{name}'. It has: {', '.join(state.configs) or 'none'}.")
    if state.active == name:
        set_adapter(model, next((other for other in state.configs if other != name), None))
    del state.configs[name], state.biases[name]
    state.corrects.pop(name, None)
    for hook in state.hooks.pop(name, []):
        hook.remove()
    for path, module in list(model.named_modules()):
        if isinstance(module, (LoraLinear, TrainedCopy)):
            parts = module.adapters if isinstance(module, LoraLinear) else module.copies
            if name in parts:
                del parts[name]
            if not parts:
                replace_module(model, path, module.base if isinstance(module, LoraLinear) else module.original)
    experts.restore_implementation(model)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a packed weight counts its unpacked elements; quantisation constants do not count."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            total += module.weight.numel() + (module.bias.numel() if module.bias is not None else 0)
        else:
            total += sum(p.numel() for p in module.parameters(recurse=False))
    shared = sum(p.numel() for p in _all_slots(model)) - sum(p.numel() for p in model.parameters())
    return trainable, total - shared


def _all_slots(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter, once per module that holds it (tied weights twice)."""
    for module in model.modules():
        yield from module.parameters(recurse=False)


def trainable_summary(model: nn.Module) -> str:
    """The line that PEFT's `print_trainable_parameters` prints."""
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
