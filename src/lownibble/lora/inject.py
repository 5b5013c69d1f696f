"""Inject adapters into a model: module matching, trainable parameters, PEFT's parameter summary.

Matching of `target_modules` is in `targets.py`. An item of `modules_to_save` matches any suffix of a path, as in PEFT ("norm"
also matches "input_layernorm").
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lownibble.calibration import Moments, walk
from lownibble.config import LoraConfig
from lownibble.errors import ModelError, TargetError
from lownibble.lora import targets
from lownibble.lora.init import Start, find, repack, without
from lownibble.lora.layer import LoraLinear, TrainedCopy
from lownibble.lora.merge_aware import variants
from lownibble.lora.targets import alpha_of, rank_of
from lownibble.lora.variants import variant_of
from lownibble.models.info import info
from lownibble.quant import PackedWeight, QuantLinear, is_linear, matrix


def named_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> linear layer, for all that can carry an adapter, including adapted ones and the output head."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        linear = is_linear(module) or isinstance(module, QuantLinear)
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


def match_targets(model: nn.Module, config: LoraConfig, *, of_file: bool = False) -> dict[str, nn.Module]:
    """Path -> module of every linear layer that `config` targets.

    Raises:
        TargetError: nothing matches, or options contradict each other; lists the candidates.
    """
    linears, head = named_linears(model), _output_head(model)
    saved = [path for path, _ in model.named_modules() if path.endswith(tuple(config.modules_to_save))]
    of_head = next((path for path, module in linears.items() if module is head), None)
    return {path: linears[path] for path in targets.match_targets(linears, config, head=of_head, excluded=saved, of_file=of_file)}


def candidates(model: nn.Module) -> str:
    """The distinct last names of linear modules, for error messages."""
    return targets.candidates(named_linears(model))


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at `path` by `module`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _match_saved(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Path -> original module (without adapters) of every match of `modules_to_save`."""
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
                raise TargetError(
                    f"modules_to_save '{path}' is quantised and cannot be trained. Add it to skip_modules, or, "
                    "where the checkpoint stores it quantised, take a dense one."
                )
            if any(isinstance(m, (LoraLinear, TrainedCopy)) for m in inside):
                raise TargetError(f"modules_to_save '{path}' carries another adapter. Remove that one first.")
            if not list(original.parameters()):
                raise TargetError(f"modules_to_save '{path}' has no parameters to train. Leave it out.")
            found[path] = original
    return {p: m for p, m in found.items() if not any(p.startswith(f"{outer}.") for outer in found)}


def _biases(
    model: nn.Module, config: LoraConfig, matched: dict[str, nn.Module], saved: dict[str, nn.Module]
) -> dict[str, nn.Parameter]:
    """Path in PEFT's files -> every bias that `config.bias` trains in place; those of `saved` are in their copies."""
    if config.bias == "none":
        return {}
    adapted = {f"{path}.base_layer.bias": m.bias for path, m in matched.items() if isinstance(m.bias, nn.Parameter)}
    if config.bias == "lora_only":
        return adapted
    return adapted | {
        f"{path}.bias": m.bias for path, m in model.named_modules()
        if isinstance(getattr(m, "bias", None), nn.Parameter) and path not in matched and not isinstance(m, TrainedCopy)
        and not _inside_wrapper(path, model) and not any(path == s or path.startswith(f"{s}.") for s in saved)
    }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The changes that adding an adapter will make, computed before any is made.

    Attributes:
        targets: path -> linear layer that gets a low-rank branch.
        saved: path -> module that is trained in full.
        biases: path in PEFT's files -> bias that is trained in place.
    """

    targets: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    biases: dict[str, nn.Parameter]


def plan(model: nn.Module, config: LoraConfig, name: str, *, of_file: bool = False) -> Plan:
    """Compute what `add_lora` would change, without changing it.

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
    matched, saved = match_targets(model, config, of_file=of_file), _match_saved(model, config)
    return Plan(matched, saved, _biases(model, config, matched, saved))


def add_lora(
    model: nn.Module, config: LoraConfig, *, name: str = "default", seed: int = 0, of_file: bool = False,
    calibration: Tensor | None = None,
) -> nn.Module:  # fmt: skip
    """Freeze `model` and add low-rank adapters, in place; returns the model.

    Args:
        config: which modules and how.
        name: of the adapter; becomes the active one.
        seed: of the initial A (and of B with `init_lora_weights=False`).
        of_file: the configuration is a saved adapter's (see `targets.match_targets`); its weights are set later.
        calibration: token ids (rows, tokens), for initialisations that look at the layers' inputs (`calibration.join_rows`).
    Raises:
        TargetError: a pattern matches nothing (lists the candidates), the name is taken, the initialisation does not suit the
            model, or calibration rows are missing.
        ModelError: the initialisation needs dense weights that cannot be read. After an error the model is unchanged, unless its
            dense weights were to be changed.
    """
    planned = plan(model, config, name, of_file=of_file)
    known = info(model)
    if known.changed_base is not None and not of_file:
        raise TargetError(
            f"The base was changed by init_lora_weights='{known.changed_base}' of another adapter. Load the model again for a "
            "new one."
        )
    try:
        _adapt(model, planned, config, name, seed, calibration, of_file)
    except BaseException:
        for path, module in planned.targets.items():
            _take_back(model, path, module, name)
        if not known.adapters.configs:
            known.changed_base = None
        raise
    model.requires_grad_(False)
    for path, original in planned.saved.items():
        module = model.get_submodule(path)
        wrapper = module if isinstance(module, TrainedCopy) else TrainedCopy(original)
        wrapper.copies[name] = copy.deepcopy(original).float()
        replace_module(model, path, wrapper.train(module.training))
    state = info(model).adapters
    state.configs[name] = config
    state.biases[name] = {path: (bias, bias.detach().clone()) for path, bias in planned.biases.items()}
    set_adapter(model, name)
    return model


def _adapt(
    model: nn.Module, planned: Plan, config: LoraConfig, name: str, seed: int, calibration: Tensor | None, of_file: bool
) -> None:
    """Put the layers with their initialised adapters into the model."""
    init, generator = find(True if of_file else config.init_lora_weights), torch.Generator().manual_seed(seed)
    variant_at = variants(model, config, variant_of(config), planned.targets)

    def add(path: str, moments: Moments | None) -> None:
        module = planned.targets[path]
        layer = module if isinstance(module, LoraLinear) else LoraLinear(module)  # type: ignore[arg-type]
        r, alpha = rank_of(path, config), alpha_of(path, config)
        adapter = layer.add(name, r, alpha, config.lora_dropout, config.use_rslora, variant_at[path])
        start = Start(path, partial(_dense_weight, model, path, layer), _packed(layer), moments, generator)
        changed = init(adapter, start)
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
            if getattr(init, "takes_out", False):
                adapter.keep_start(adapter.lora_A, adapter.lora_B)
            info(model).changed_base = str(config.init_lora_weights)
        adapter.variant.start(layer.base, adapter)
        replace_module(model, path, layer.train(module.training))

    if getattr(init, "takes_out", False):
        _check_taking_out(model, planned, config)
    dense = not any(isinstance(getattr(module, "base", module), QuantLinear) for module in planned.targets.values())
    if not getattr(init, "needs_calibration", False) or (dense and getattr(init, "corrects", False)):
        for path in planned.targets:
            add(path, None)
        return
    if calibration is None:
        raise TargetError(
            f"init_lora_weights={config.init_lora_weights!r} looks at the inputs of the layers: give add_lora calibration rows "
            "(calibration=lownibble.calibration.join_rows(...)), or use lownibble train."
        )

    def visit(found: Mapping[str, Moments]) -> None:
        for path, moments in found.items():
            add(path, moments)

    walk(model, calibration, list(planned.targets), visit)
    for path in planned.targets.keys() - {path for path, layer in lora_layers(model, name)}:
        raise TargetError(
            f"'{path}' was not reached by the calibration rows (an expert that they do not choose?), and init_lora_weights="
            f"{config.init_lora_weights!r} looks at its inputs. Give more calibration rows, or leave it out with exclude_modules."
        )


def _check_taking_out(model: nn.Module, planned: Plan, config: LoraConfig) -> None:
    """Check what is known before a weight is changed."""
    head: Any = _output_head(model)
    embeddings: Any = model.get_input_embeddings() if head is not None else None  # type: ignore[operator]
    for path, module in planned.targets.items():
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


def _take_back(model: nn.Module, path: str, module: nn.Module, name: str) -> None:
    """Undo `_adapt` for a layer."""
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
    for path, module in list(model.named_modules()):
        if isinstance(module, (LoraLinear, TrainedCopy)):
            parts = module.adapters if isinstance(module, LoraLinear) else module.copies
            if name in parts:
                del parts[name]
            if not parts:
                replace_module(model, path, module.base if isinstance(module, LoraLinear) else module.original)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a packed weight counts its unpacked elements; quantisation constants do not count."""
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
    """Every parameter, once per module that holds it (tied weights twice)."""
    for module in model.modules():
        yield from module.parameters(recurse=False)


def trainable_summary(model: nn.Module) -> str:
    """The line that PEFT's `print_trainable_parameters` prints."""
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
