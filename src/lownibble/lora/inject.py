"""Putting adapters into a model: which modules are meant, what is trained, what PEFT would print.

Matching follows PEFT's `check_target_module_exists`, including its asymmetries: a string is a regular expression that must
match the full path; a list item matches a whole path or its end; `layers_to_transform` counts the first number in a path.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from lownibble.config import LoraConfig
from lownibble.errors import TargetError
from lownibble.lora.init import INITS
from lownibble.lora.layer import LoraLinear, TrainedCopy
from lownibble.quant import QuantLinear

_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def named_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> every linear layer that can carry an adapter, adapted ones included, the output head too."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear) or (isinstance(module, (nn.Linear, QuantLinear)) and not _inside_wrapper(path, model)):
            found[path] = module
    return found


def _inside_wrapper(path: str, model: nn.Module) -> bool:
    parents = path.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(parents[:depth])), (LoraLinear, TrainedCopy))
        for depth in range(1, len(parents) + 1)
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _names(path: str, names: list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def match_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Path -> module of every linear layer that `config` targets.

    Raises:
        TargetError: nothing matches, or options contradict each other; lists the candidates.
    """
    linears = named_linears(model)
    saved = [path for path, _ in model.named_modules() if _names(path, config.modules_to_save)]
    allowed = {p: m for p, m in linears.items() if not any(p == s or p.startswith(f"{s}.") for s in saved)}
    target, layers = config.target_modules, config.layers_to_transform
    if target == "all-linear":
        head = _output_head(model)
        matched = {p: m for p, m in allowed.items() if m is not head}
    elif isinstance(target, str):
        if layers is not None:
            raise TargetError(
                "layers_to_transform needs target_modules as a list or 'all-linear'. Put the layers into the regex."
            )
        try:
            matched = {p: m for p, m in allowed.items() if re.fullmatch(target, p)}
        except re.error as error:
            raise TargetError(f"target_modules {target!r} is not a valid regular expression: {error}. Mend it.") from None
    else:
        matched = {p: m for p, m in allowed.items() if _names(p, target)}
        missing = [name for name in target if not any(_names(p, [name]) for p in allowed)]
        if matched and missing:
            raise TargetError(f"target_modules {missing} match no linear module. Candidates: {candidates(model)}.")
    if layers is not None:
        indices = {p: _LAYER_INDEX.match(p) for p in matched}
        matched = {p: m for p, m in matched.items() if (i := indices[p]) and int(i["index"]) in layers}
    if not matched:
        within = f" in layers {layers}" if layers is not None else ""
        raise TargetError(f"target_modules {target!r} match no linear module{within}. Candidates: {candidates(model)}.")
    return matched


def candidates(model: nn.Module) -> str:
    """The distinct last names of linear modules, for error messages."""
    return ", ".join(sorted({path.rsplit(".", 1)[-1] for path in named_linears(model)})) or "none (no nn.Linear in this model)"


def _by_pattern(path: str, patterns: Mapping[str, float], default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` points."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _check_patterns(config: LoraConfig, targets: dict[str, nn.Module]) -> None:
    for option, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in patterns:
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in targets):
                raise TargetError(f"{option} {key!r} matches no targeted module. Targets: {', '.join(list(targets)[:4])}, ...")


def _copy_saved_modules(model: nn.Module, config: LoraConfig, name: str) -> None:
    for wanted in config.modules_to_save:
        paths = [
            p for p, m in model.named_modules()
            if _names(p, [wanted]) and (isinstance(m, TrainedCopy) or not _inside_wrapper(p, model))
        ]  # fmt: skip
        if not paths:
            raise TargetError(f"modules_to_save '{wanted}' matches no module. Linear modules: {candidates(model)}.")
        for path in paths:
            module = model.get_submodule(path)
            wrapper = module if isinstance(module, TrainedCopy) else TrainedCopy(module)
            if any(isinstance(m, QuantLinear) for m in wrapper.original.modules()):
                raise TargetError(f"modules_to_save '{path}' is quantised and cannot be trained. Add it to skip_modules.")
            wrapper.copies[name] = copy.deepcopy(wrapper.original).float().requires_grad_(True)
            wrapper.active = name
            replace_module(model, path, wrapper)


def add_lora(model: nn.Module, config: LoraConfig, *, name: str = "default", seed: int = 0) -> nn.Module:
    """Freeze `model` and add low-rank adapters, in place; returns the model.

    Args:
        config: which modules and how.
        name: of the adapter; becomes the active one.
        seed: of the initial A (and of B with `init_lora_weights=False`).
    Raises:
        TargetError: a pattern matches nothing (lists the candidates), or the adapter exists already.
    """
    known = adapter_configs(model)
    if name in known:
        raise TargetError(f"The model has an adapter '{name}' already. Choose another name.")
    targets = match_targets(model, config)
    _check_patterns(config, targets)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, module in targets.items():
        layer = module if isinstance(module, LoraLinear) else LoraLinear(module)  # type: ignore[arg-type]
        r = int(_by_pattern(path, config.rank_pattern, config.r))
        alpha = _by_pattern(path, config.alpha_pattern, config.lora_alpha)
        INITS[config.init_lora_weights](layer.add(name, r, alpha, config.lora_dropout, config.use_rslora), generator)
        layer.train(module.training)
        replace_module(model, path, layer)
    _copy_saved_modules(model, config, name)
    model.lownibble_adapters = {**known, name: config}  # type: ignore[assignment]
    set_adapter(model, name)
    for _, bias in trained_biases(model, config):
        bias.requires_grad_(True)
    return model


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Adapter name -> its configuration."""
    return dict(getattr(model, "lownibble_adapters", {}))


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


def trained_biases(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """(path in the original model, parameter) of every bias that `config.bias` trains."""
    if config.bias == "none":
        return
    for path, parameter in model.named_parameters():
        owner, _, last = path.rpartition(".")
        adapted = owner.endswith(".base") and isinstance(model.get_submodule(owner.removesuffix(".base")), LoraLinear)
        copied = ".copies." in path or ".original." in path
        if last == "bias" and not copied and (adapted or config.bias == "all"):
            yield path.replace(".base.bias", ".base_layer.bias") if adapted else path, parameter


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter active everywhere and the only trainable one; None turns all adapters off.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    if name is not None and name not in adapter_configs(model):
        raise TargetError(f"The model has no adapter '{name}'. It has: {', '.join(adapter_configs(model)) or 'none'}.")
    for module in model.modules():
        if isinstance(module, (LoraLinear, TrainedCopy)):
            parts = module.adapters if isinstance(module, LoraLinear) else module.copies
            module.active = name if name is not None and name in parts else None
            for key, part in parts.items():
                part.requires_grad_(key == name)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take the adapter `name` out of the model again; layers left without adapters become their bases."""
    configs = adapter_configs(model)
    configs.pop(name, None)
    model.lownibble_adapters = configs  # type: ignore[assignment]
    for path, module in list(model.named_modules()):
        if isinstance(module, (LoraLinear, TrainedCopy)):
            parts = module.adapters if isinstance(module, LoraLinear) else module.copies
            if name in parts:
                del parts[name]
            if not parts:
                replace_module(model, path, module.base if isinstance(module, LoraLinear) else module.original)
    set_adapter(model, next(iter(configs), None))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a quantised weight counts the values it stands for, constants count nothing."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            total += module.in_features * module.out_features + (module.bias.numel() if module.bias is not None else 0)
        else:
            total += sum(p.numel() for p in module.parameters(recurse=False))
    shared = sum(p.numel() for p in _all_slots(model)) - sum(p.numel() for p in model.parameters())
    return trainable, total - shared


def _all_slots(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter as often as modules hold it (tied weights twice)."""
    for module in model.modules():
        yield from module.parameters(recurse=False)


def trainable_summary(model: nn.Module) -> str:
    """The line that PEFT's `print_trainable_parameters` prints."""
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
