"""Inject adapters into a model: which modules they go to, and what else they train.

Matching of `target_modules` is in `targets.py`. An item of `modules_to_save` matches any suffix of a path, as in PEFT ("norm"
also matches "input_layernorm").
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lownibble.calibration import Moments
from lownibble.config import LoraConfig
from lownibble.errors import TargetError
from lownibble.lora import activated, targets
from lownibble.lora.active import adapter_configs, replace_module, set_adapter
from lownibble.lora.begin import adapt, output_head, take_back
from lownibble.lora.experts import copied_weights, is_experts, named_experts
from lownibble.lora.init import find
from lownibble.lora.layer import LoraLinear, TrainedCopy, inside
from lownibble.lora.portable import TAKEN_FOR_EXPERTS
from lownibble.matching import names
from lownibble.models.conversion import fuses_experts
from lownibble.models.direct import without_effect
from lownibble.models.experts import of_other_form, restore_implementation
from lownibble.models.info import decoder_layers, info
from lownibble.quant import QuantLinear, is_linear


def named_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> linear layer, for all that can carry an adapter, including adapted ones and the output head; without experts."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        linear = is_linear(module) or isinstance(module, QuantLinear)
        if is_experts(module):
            continue
        if isinstance(module, LoraLinear) or (linear and not _inside_wrapper(path, model)):
            found[path] = module
    return found


def _inside_wrapper(path: str, model: nn.Module) -> bool:
    return inside(path, model, (LoraLinear, TrainedCopy))


def _in_copies(model: nn.Module) -> dict[str, nn.Module]:
    """Path in the model without adapters -> module, of all that an adapter trains in full and of their parts."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, TrainedCopy):
            found |= {f"{path}.{part}".rstrip("."): each for part, each in module.original.named_modules()}
    return found


def _check_apart(model: nn.Module, paths: Collection[str]) -> None:
    """Raise TargetError for the first of `paths`, which are among or in those of `_in_copies`."""
    for path in paths:
        outer, copies = next(
            (outer, list(module.copies)) for outer, module in model.named_modules()
            if isinstance(module, TrainedCopy) and f"{path}.".startswith(f"{outer}.")
        )  # fmt: skip
        raise TargetError(
            f"Adapter '{copies[0]}' trains '{outer}' in full (modules_to_save), so that no other adapter can change '{path}'. "
            "Leave it out, or remove that adapter first."
        )


def match_targets(model: nn.Module, config: LoraConfig, *, of_file: bool = False) -> dict[str, nn.Module]:
    """Path -> module of every linear layer, and of every mixture's experts, that `config` targets.

    Raises:
        TargetError: nothing matches, options contradict each other, or what is named is trained in full by another adapter;
            lists the candidates.
    """
    linears, of_experts, head = named_linears(model), named_experts(model), output_head(model)
    _check_names(config, linears, of_experts)
    saved = [path for path, _ in model.named_modules() if path.endswith(tuple(config.modules_to_save))]
    of_head = next((path for path, module in linears.items() if module is head), None)
    copied = [] if config.target_modules == "all-linear" else [p for p, m in _in_copies(model).items() if is_linear(m)]
    matched = targets.match_targets([*linears, *copied], config, head=of_head, excluded=saved, of_file=of_file)
    _check_apart(model, [path for path in matched if path in copied])
    idle = set() if of_file else set(without_effect(model, matched))
    if idle:
        what = f"{len(idle)} layers of {type(model).__name__} ({targets.candidates(idle)})"
        why = "its code reads their weights itself and never calls them, so that an adapter has no effect"
        if config.target_modules != "all-linear":
            raise TargetError(f"{what} cannot carry an adapter: {why}. Leave them out of target_modules.")
        warnings.warn(f"{what} get no adapter: {why}.", stacklevel=2)
    copied = [path for path in copied_weights(model) if names(path, config.target_parameters)]
    adapted = targets.match_experts([*of_experts, *copied], config, excluded=saved, of_file=of_file)
    _check_apart(model, [path for path in adapted if path in copied])
    targets.check_ranks(config, [*matched, *adapted], of_file)
    targets.check_experts(config, adapted, merge_aware=info(model).merge_aware is not None, of_file=of_file)
    if not of_file:
        _tell_of_mixture(model, config, matched)
    return {path: linears[path] for path in matched if path not in idle} | {path: of_experts[path] for path in adapted}


def _check_names(config: LoraConfig, linears: Collection[str], of_experts: Collection[str]) -> None:
    """Raise TargetError if `target_modules` names experts' weights, which are no modules."""
    given = config.target_modules if isinstance(config.target_modules, list) else []
    wrong = [name for name in given if any(names(p, [name]) for p in of_experts) and not any(names(p, [name]) for p in linears)]
    if wrong:
        raise TargetError(
            f"target_modules {wrong} are weights of experts. Name them in target_parameters (--target-parameters "
            f"{' '.join(wrong)}), or take target_modules='all-linear'."
        )


def _tell_of_mixture(model: nn.Module, config: LoraConfig, linears: Collection[str]) -> None:
    """Warn of what an adapter on a mixture of experts will not do."""
    other = of_other_form(model) if config.target_modules == "all-linear" and config.target_experts else []
    if other:
        what = f"{len(other)} weights of experts of {type(model).__name__} ({targets.candidates(other)})"
        warnings.warn(f"{what} get no adapter: its code computes with all of them itself.", stacklevel=3)
    taken = [path for path in linears if path.rpartition(".")[2] in TAKEN_FOR_EXPERTS]
    options = [name for name in ("lora_dropout", "use_dora") if getattr(config, name)]
    if options and taken and fuses_experts(model):
        warnings.warn(
            f"PEFT will not load this adapter, because of {' and '.join(options)}: it takes {targets.candidates(taken)} of this "
            "model for experts. Leave that out if PEFT is to read it.",
            stacklevel=3,
        )


def candidates(model: nn.Module) -> str:
    """The distinct last names of linear modules, for error messages."""
    return targets.candidates(named_linears(model))


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
            _check_dense(path, original)
            if any(isinstance(m, (LoraLinear, TrainedCopy)) for m in original.modules()):
                raise TargetError(f"modules_to_save '{path}' carries another adapter. Remove that one first.")
            if not list(original.parameters()):
                raise TargetError(f"modules_to_save '{path}' has no parameters to train. Leave it out.")
            found[path] = original
    found = {p: m for p, m in found.items() if not any(p.startswith(f"{outer}.") for outer in found)}
    parts = [path for path in _in_copies(model) if path.endswith(tuple(config.modules_to_save))]
    _check_apart(model, [path for path in parts if not _is_in(path, found)])
    return found


def _is_in(path: str, outer: Collection[str]) -> bool:
    """Whether a path is one of `outer`, or below one."""
    return any(path == each or path.startswith(f"{each}.") for each in outer)


def _check_dense(path: str, module: nn.Module) -> None:
    """Raise TargetError if a module of `modules_to_save` is packed."""
    if any(isinstance(each, QuantLinear) for each in module.modules()):
        raise TargetError(
            f"modules_to_save '{path}' is quantised and cannot be trained. Add it to skip_modules, or, "
            "where the checkpoint stores it quantised, take a dense one."
        )


def _biases(
    model: nn.Module, config: LoraConfig, matched: dict[str, nn.Module], saved: dict[str, nn.Module]
) -> dict[str, nn.Parameter]:
    """Path in PEFT's files -> every bias that `config.bias` trains in place; those of `saved` are in their copies."""
    if config.bias == "none":
        return {}
    adapted = {f"{path}.base_layer.bias": m.bias for path, m in matched.items() if isinstance(m.bias, nn.Parameter)}
    if config.bias == "lora_only":
        return adapted
    copied = [path for path, module in _in_copies(model).items() if isinstance(getattr(module, "bias", None), nn.Parameter)]
    _check_apart(model, [path for path in copied if not _is_in(path, saved)])
    return adapted | {
        f"{path}.bias": m.bias for path, m in model.named_modules()
        if isinstance(getattr(m, "bias", None), nn.Parameter) and path not in matched and not isinstance(m, TrainedCopy)
        and not _inside_wrapper(path, model) and not _is_in(path, saved)
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
    activated.check(model, config, matched)
    return Plan(matched, saved, _biases(model, config, matched, saved))


def add_lora(
    model: nn.Module, config: LoraConfig, *, name: str = "default", seed: int = 0, of_file: bool = False,
    calibration: Tensor | None = None, restored: bool = False,
) -> nn.Module:  # fmt: skip
    """Freeze `model` and add low-rank adapters, in place; returns the model.

    Args:
        config: which modules and how.
        name: of the adapter; becomes the active one.
        seed: of the initial A (and of B with `init_lora_weights=False`).
        of_file: the configuration is a saved adapter's (see `targets.match_targets`); its weights are set later.
        calibration: token ids (rows, tokens), for initialisations that look at the layers' inputs (`calibration.join_rows`).
        restored: A and B are set later, from a checkpoint, so the initialisation (one that `keeps_base`) is left out.
    Raises:
        TargetError: a pattern matches nothing (lists the candidates), the name is taken, the initialisation does not suit the
            model, or calibration rows are missing. QuantizationError: the rows leave a layer's inputs without a closed form.
        ModelError: the initialisation needs dense weights that cannot be read. After an error the model is unchanged, unless its
            dense weights were to be changed.
    """
    addition = Addition(
        model, config, name=name, seed=seed, of_file=of_file, calibration=calibration, restored=restored
    )  # fmt: skip
    addition.add("")
    addition.finish()
    return model


class Addition:
    """`add_lora` in instalments, for a model that is loaded layer by layer: `add` what is below a path, then `finish`.

    Args and errors are those of `add_lora`. Modules are looked up when they are adapted: until then they may be placeholders.
    """

    def __init__(
        self, model: nn.Module, config: LoraConfig, *, name: str = "default", seed: int = 0, of_file: bool = False,
        calibration: Tensor | None = None, restored: bool = False,
    ) -> None:  # fmt: skip
        self._planned = plan(model, config, name, of_file=of_file)
        known = info(model)
        if known.changed_base is not None and not of_file:
            raise TargetError(
                f"The base was changed by init_lora_weights='{known.changed_base}' of another adapter. Load the model again for "
                "a new one."
            )
        self._model, self._config, self._name = model, config, name
        self._calibration, self._set_later = calibration, of_file or restored
        self._generator = torch.Generator().manual_seed(seed)
        layers = {path: number for number, path in enumerate(decoder_layers(model))}  # of all, so that both ways draw alike
        self._left = sorted([*self._planned.targets, *self._planned.saved], key=lambda path: _layer_of(path, layers))
        self._taken: dict[str, nn.Module] = {}

    @property
    def left(self) -> list[str]:
        """Paths of the layers that are still to be adapted."""
        return [path for path in self._left if path in self._planned.targets]

    def add(self, path: str, moments: Mapping[str, Moments] | None = None) -> None:
        """Freeze and adapt the module at `path`, or with '' all that is left. After an error the model is as it was before,
        unless its dense weights were to be changed. `moments`: of the inputs of its layers, for initialisations that look at
        them."""
        model, name, planned = self._model, self._name, self._planned
        due = [each for each in self._left if not path or each.startswith(f"{path}.")]
        found: Mapping[str, nn.Module] = planned.targets
        if path or self._taken:  # not the placeholders that were planned for
            found = {**named_linears(model), **named_experts(model)}
        targets = {each: found[each] for each in due if each in planned.targets}
        self._left = [each for each in self._left if each not in due]
        self._taken |= targets
        try:
            adapt(model, targets, self._config, name, self._generator, self._calibration, self._set_later, moments)
        except BaseException:
            for each, module in self._taken.items():
                take_back(model, each, module, name)
            restore_implementation(model)
            known = info(model)
            if not known.adapters.configs:
                known.changed_base = None
            raise
        model.get_submodule(path).requires_grad_(False)
        for each in due:
            if each in planned.saved:
                module = model.get_submodule(each)
                _check_dense(each, module)
                wrapper = module if isinstance(module, TrainedCopy) else TrainedCopy(module)
                wrapper.copies[name] = copy.deepcopy(wrapper.original).float()
                replace_module(model, each, wrapper.train(module.training))
        if path:  # its adapters are trained; `finish` sees to the rest
            _train(model.get_submodule(path), name)

    def finish(self) -> None:
        """Make the adapter the active one."""
        state = info(self._model).adapters
        state.configs[self._name] = self._config
        if find(self._config.init_lora_weights).corrects:
            state.corrects[self._name] = str(self._config.init_lora_weights)
        activated.bind(self._model, self._config, self._name)
        biases = self._planned.biases.items()
        state.biases[self._name] = {path: (bias, bias.detach().clone()) for path, bias in biases}
        set_adapter(self._model, self._name)


def _layer_of(path: str, layers: Mapping[str, int]) -> int:
    """The number of the decoder layer that a path is in; what is in none comes last."""
    return next((number for layer, number in layers.items() if path.startswith(f"{layer}.")), len(layers))


def _train(module: nn.Module, name: str) -> None:
    """Train the adapter `name` of the layers in a module."""
    for layer in module.modules():
        if isinstance(layer, LoraLinear) and name in layer.adapters:
            layer.adapter(name).requires_grad_(True)
        elif isinstance(layer, TrainedCopy) and name in layer.copies:
            layer.copies[name].requires_grad_(True)
