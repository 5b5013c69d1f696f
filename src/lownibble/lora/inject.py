"""Putting adapters into a model: which modules are meant, what is trained, what PEFT would print.

Matching follows PEFT's `check_target_module_exists`, including its asymmetries: a string is a regular expression that must
match the full path; a list item matches a whole path or whole names at its end, an item of `modules_to_save` any end of a
path ("norm" means "input_layernorm" too); `layers_to_transform` counts the first number in a path.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lownibble.config import LoraConfig
from lownibble.errors import TargetError
from lownibble.lora.init import INITS
from lownibble.lora.layer import LoraLinear, TrainedCopy, scaling
from lownibble.quant import QuantLinear, is_plain_linear

_LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


def named_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> every linear layer that can carry an adapter, adapted ones included, the output head too."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        linear = is_plain_linear(module) or isinstance(module, QuantLinear)
        if isinstance(module, LoraLinear) or (linear and not _inside_wrapper(path, model)):
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
    saved = [path for path, _ in model.named_modules() if path.endswith(tuple(config.modules_to_save))]
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
        missing = [name for name in target if not any(_names(p, [name]) for p in linears)]
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
            try:
                re.compile(key)
            except re.error as error:
                raise TargetError(f"{option} {key!r} is not a valid regular expression: {error}. Mend it.") from None
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in targets):
                raise TargetError(f"{option} {key!r} matches no targeted module. Targets: {', '.join(list(targets)[:4])}, ...")


def _match_saved(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Path -> module of everything in `modules_to_save`, as the model had it before any adapter."""
    found: dict[str, nn.Module] = {}
    for wanted in config.modules_to_save:
        paths = [p for p, _ in model.named_modules() if p.endswith(wanted) and not _inside_wrapper(p, model)]
        if not paths:
            raise TargetError(f"modules_to_save '{wanted}' matches no module. Linear modules: {candidates(model)}.")
        for path in paths:
            module = model.get_submodule(path)
            original = module.original if isinstance(module, TrainedCopy) else module
            inside = list(original.modules())
            if any(isinstance(m, QuantLinear) for m in inside):
                raise TargetError(f"modules_to_save '{path}' is quantised and cannot be trained. Add it to skip_modules.")
            if any(isinstance(m, (LoraLinear, TrainedCopy)) for m in inside):
                raise TargetError(f"modules_to_save '{path}' carries another adapter. Remove that one first.")
            if not list(original.parameters()):
                raise TargetError(f"modules_to_save '{path}' has no parameters to train. Leave it out.")
            found[path] = original
    return {p: m for p, m in found.items() if not any(p.startswith(f"{outer}.") for outer in found)}


def _biases(
    model: nn.Module, config: LoraConfig, targets: dict[str, nn.Module], saved: dict[str, nn.Module]
) -> dict[str, nn.Parameter]:
    """Path in PEFT's files -> every bias that `config.bias` trains in place; those of `saved` are in their copies."""
    if config.bias == "none":
        return {}
    adapted = {f"{path}.base_layer.bias": m.bias for path, m in targets.items() if isinstance(m.bias, nn.Parameter)}
    if config.bias == "lora_only":
        return adapted
    return adapted | {
        f"{path}.bias": m.bias for path, m in model.named_modules()
        if isinstance(getattr(m, "bias", None), nn.Parameter) and path not in targets and not isinstance(m, TrainedCopy)
        and not _inside_wrapper(path, model) and not any(path == s or path.startswith(f"{s}.") for s in saved)
    }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What an adapter will change, found before anything is changed.

    Attributes:
        targets: path -> linear layer that gets a low-rank branch.
        saved: path -> module that is trained in full.
        biases: path in PEFT's files -> bias that is trained in place.
    """

    targets: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    biases: dict[str, nn.Parameter]


def plan(model: nn.Module, config: LoraConfig, name: str) -> Plan:
    """Find out what `add_lora` would do.

    Raises:
        TargetError: as `add_lora`.
    """
    known = adapter_configs(model)
    if name in known:
        raise TargetError(f"The model has an adapter '{name}' already. Choose another name.")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise TargetError(f"An adapter cannot be called {name!r}. Choose a plain word.")
    biased = [other for other, its in known.items() if its.bias != "none"]
    if config.bias != "none" and biased:
        raise TargetError(f"Adapter '{biased[0]}' trains biases already, and only one can. Use bias='none' or remove it.")
    targets = match_targets(model, config)
    _check_patterns(config, targets)
    saved = _match_saved(model, config)
    return Plan(targets, saved, _biases(model, config, targets, saved))


def rank_of(path: str, config: LoraConfig) -> int:
    """The rank that `config` gives to the layer at `path`."""
    return int(_by_pattern(path, config.rank_pattern, config.r))


def alpha_of(path: str, config: LoraConfig) -> float:
    """The lora_alpha that `config` gives to the layer at `path`."""
    return _by_pattern(path, config.alpha_pattern, config.lora_alpha)


def scale_of(path: str, config: LoraConfig) -> float:
    """What B A of the layer at `path` is multiplied by."""
    return scaling(rank_of(path, config), alpha_of(path, config), config.use_rslora)


def add_lora(model: nn.Module, config: LoraConfig, *, name: str = "default", seed: int = 0) -> nn.Module:
    """Freeze `model` and add low-rank adapters, in place; returns the model.

    Args:
        config: which modules and how.
        name: of the adapter; becomes the active one.
        seed: of the initial A (and of B with `init_lora_weights=False`).
    Raises:
        TargetError: a pattern matches nothing (lists the candidates), or the name is taken. The model is unchanged.
    """
    planned = plan(model, config, name)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path, module in planned.targets.items():
        layer = module if isinstance(module, LoraLinear) else LoraLinear(module)  # type: ignore[arg-type]
        adapter = layer.add(name, rank_of(path, config), alpha_of(path, config), config.lora_dropout, config.use_rslora)
        INITS[config.init_lora_weights](adapter, generator)
        layer.train(module.training)
        replace_module(model, path, layer)
    for path, original in planned.saved.items():
        module = model.get_submodule(path)
        wrapper = module if isinstance(module, TrainedCopy) else TrainedCopy(original)
        wrapper.copies[name] = copy.deepcopy(original).float()
        replace_module(model, path, wrapper.train(module.training))
    state = _state(model)
    state.configs[name] = config
    state.biases[name] = {path: (bias, bias.detach().clone()) for path, bias in planned.biases.items()}
    set_adapter(model, name)
    return model


@dataclass
class _State:
    """What a model knows about its adapters.

    Attributes:
        biases: by adapter, path in PEFT's files -> (the parameter in the base, the values that are not in place: the
            original ones while the adapter is active, else the trained ones).
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    biases: dict[str, dict[str, tuple[nn.Parameter, Tensor]]] = field(default_factory=dict)
    active: str | None = None


def _state(model: nn.Module) -> _State:
    if not hasattr(model, "lownibble_adapters"):
        model.lownibble_adapters = _State()  # type: ignore[assignment]
    return model.lownibble_adapters  # type: ignore[return-value]


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """Adapter name -> its configuration."""
    return dict(_state(model).configs)


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter."""
    return _state(model).active


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
    state = _state(model)
    for path, (parameter, aside) in state.biases[name].items():
        yield path, parameter if state.active == name else aside


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter active everywhere and the only trainable one; None turns all adapters off, trained biases too.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    state = _state(model)
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


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take the adapter `name` out of the model again; layers left without adapters become their bases.

    Where it was the active one, the oldest of the others becomes active.

    Raises:
        TargetError: the model has no adapter of that name.
    """
    state = _state(model)
    if name not in state.configs:
        raise TargetError(f"The model has no adapter '{name}'. It has: {', '.join(state.configs) or 'none'}.")
    if state.active == name:
        set_adapter(model, next((other for other in state.configs if other != name), None))
    del state.configs[name], state.biases[name]
    for path, module in list(model.named_modules()):
        if isinstance(module, (LoraLinear, TrainedCopy)):
            parts = module.adapters if isinstance(module, LoraLinear) else module.copies
            if name in parts:
                del parts[name]
            if not parts:
                replace_module(model, path, module.base if isinstance(module, LoraLinear) else module.original)


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
