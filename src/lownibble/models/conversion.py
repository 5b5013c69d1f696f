"""A checkpoint's tensors under the names, and in the shapes, that the model has them in.

Checkpoints and models differ: experts are stored one by one and held in one tensor, prefixes come and go, old files have
buffers that models no longer keep. The rules are transformers' own and are asked of its functions, not imitated: which
transform applies to a stored name (`rename_source_key`), what it computes (`WeightConverter.convert`), how it is undone
(`revert_weight_conversion`), and which names may be missing or left over (`_adjust_missing_and_unexpected_keys`).
transformers collects all tensors of a model before it converts them; here one group at a time is read and converted, so that
memory stays a matter of the largest group: one tensor, or the experts of one layer.

Shapes are known before anything is read: a group is converted on the meta device first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from lownibble.errors import ModelError
from lownibble.models import experts, formats
from lownibble.models.checkpoint import Checkpoint
from lownibble.quant import PackedWeight, is_linear, is_transposed

Facts = tuple[torch.dtype, torch.Size]


@dataclass
class _Group:
    """Stored tensors that become tensors of the model together: `sources` is pattern -> their stored names, in order."""

    converter: WeightConverter | None
    first: str
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def stored(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]


class ModelTensors:
    """The tensors of a model, read from a checkpoint.

    Attributes:
        names: the model's parameters and buffers that the checkpoint gives, in the checkpoint's order; a packed weight has the
            name of its layer's weight (`name_of`). Of tied parameters one is named, unless the checkpoint has several with other
            values.
        packed: path of each layer that is held packed as it is stored -> its codec; experts' path is their parameter's name.
        decoded: names of weights that are stored quantised and read dense: no codec holds their numbers, or those of another
            layer of the checkpoint; or transformers makes them part of another tensor.
        stored_as: the format of another tool, in words, or ''.
        shared: other name of a tied parameter -> the name in `names` whose tensor it has.
        untied: names of parameters that the configuration ties and the checkpoint does not.
        n_weights: the model's parameters.
    Raises:
        ModelError: the checkpoint lacks tensors that the model needs, or has others that the model has no place for.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        found = formats.find(checkpoint, checkpoint.stored)
        self._layers, self.stored_as = found.layers, found.title
        self.packed: dict[str, str] = {}
        self.decoded: set[str] = set()
        self._layer_of: dict[str, formats.Layer] = {}
        self.n_weights: int = sum(parameter.numel() for parameter in model.parameters())
        self._experts = experts.shapes(model)
        self._turned: set[str] = set()  # layers that the model keeps as (in, out)
        self._groups: dict[str, _Group] = {}
        self._facts: dict[str, Facts] = {}
        self._group_of: dict[str, _Group] = {}
        self._last: tuple[_Group, dict[str, Tensor]] | None = None
        unexpected = self._match(found.unused)
        self.shared: dict[str, str] = {}
        self.untied: list[str] = []
        self._tie()
        self._check(unexpected)

    def _match(self, unused: set[str]) -> set[str]:
        """Give every stored tensor its place; returns names without one."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix, places = self.model.base_model_prefix, self.model.state_dict()
        unexpected: set[str] = set()
        owner = {key: name for name, layer in self._layers.items() for key in layer.keys}
        packed: dict[str, formats.Layer] = {}
        for key in sorted({owner.get(key, key) for key in self.checkpoint.file_of.keys() - unused}, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, places)
            if name not in places and key in places:
                name, pattern = rename_source_key(key, [], [], prefix, places)
            if name not in places:
                if not self._is_empty_bias(key):
                    unexpected.add(name)
                continue
            converter = None if pattern is None else converter_of[pattern]
            if key in self._layers:
                self._check_kind(name, self._layers[key])
                self.decoded.add(name)
                if converter is None and (self._is_linear(name) or self._holds(name, self._layers[key])):
                    packed[name] = self._layers[key]
                    continue
            group = self._groups.setdefault(name, _Group(deepcopy(converter), name))
            group.sources.setdefault(key if pattern is None else pattern, []).append(key)
        packed |= {name: stack for name, group in self._groups.items() if (stack := self._stack(name, group))}
        self._place(packed)
        for group in self._groups.values():
            for name, facts in self._facts_of(group).items():
                if name in places:
                    self._facts[name], self._group_of[name] = facts, group
                else:
                    unexpected.add(name)
        self.model._weight_conversions = [each for each in mapping if each.was_used()]  # save_pretrained undoes these
        return unexpected

    def _is_empty_bias(self, key: str) -> bool:
        """Whether a tensor is a quantised layer's bias of zeros: AutoGPTQ writes one also where the model has none."""
        stem, _, last = key.rpartition(".")
        return last == "bias" and f"{stem}.weight" in self._layers and not bool(self.checkpoint.read(key).any())

    def _check_kind(self, name: str, layer: formats.Layer) -> None:
        module = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Embedding) and any(key.endswith(".qweight") for key in layer.keys):
            raise ModelError(
                f"'{self.checkpoint.name}': its embeddings are quantised ('{name}'), which is not known here. Take a checkpoint "
                "whose linear layers alone are."
            )

    def _is_linear(self, name: str) -> bool:
        path, _, last = name.rpartition(".")
        return last == "weight" and is_linear(self.model.get_submodule(path))

    def _holds(self, name: str, layer: formats.Layer) -> bool:
        """Whether a name is that of experts' weights, and they can be held packed as `layer` has them."""
        if name not in self._experts or layer.quant_type is None:
            return False
        return not isinstance(layer, formats.Experts) or layer.turned == self.is_turned(name)

    def _stack(self, name: str, group: _Group) -> formats.Layer | None:
        """The packed weights of experts that are stored one by one, if all that the converter does is to stack them, and of each
        the rows of its layers (gate and up)."""
        converter = group.converter
        steps = [] if converter is None else [(type(each), getattr(each, "dim", None)) for each in converter.operations]
        if converter is None or steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            return None
        by_pattern = [[self._layers.get(key) for key in group.sources.get(each, ())] for each in converter.source_patterns]
        if len({len(layers) for layers in by_pattern}) != 1 or any(None in layers for layers in by_pattern):
            return None
        stack = formats.stacked(name, list(zip(*by_pattern, strict=True)))  # type: ignore[arg-type]
        return stack if stack is not None and self._holds(name, stack) else None

    def _place(self, layers: dict[str, formats.Layer]) -> None:
        """Hold quantised layers packed: all linear ones or none, so that one choice of the user decides for the rest, and with
        them those of experts that can be."""
        whole = all(layer.quant_type for name, layer in layers.items() if self._is_linear(name))
        for name, layer in layers.items():
            path = name.removesuffix(".weight")
            if self.is_turned(path) and not isinstance(layer, formats.Experts):
                self._turned.add(layer.name)
            if whole and layer.quant_type is not None:
                self.packed[path], self._layer_of[path] = layer.quant_type, layer
                self.decoded.discard(name)
                self._groups.pop(name, None)
            elif name not in self._groups:
                self._groups[name] = _Group(None, name, {layer.name: [layer.name]})

    def is_turned(self, path: str) -> bool:
        """Whether the model keeps the weight of the layer at `path` as (in, out)."""
        if path in self._experts:
            return bool(self.model.get_submodule(path.rpartition(".")[0]).is_transposed)
        return is_transposed(self.model.get_submodule(path))

    def _facts_of(self, group: _Group) -> dict[str, Facts]:
        if group.converter is None:
            return {group.first: self._stored_facts(group.stored[0])}
        empty = self._convert(group, lambda key: torch.empty(self._stored_facts(key)[1], device="meta"))
        dtype = self._stored_facts(group.stored[0])[0]
        return {name: (dtype, tensor.shape) for name, tensor in empty.items()}

    def _stored_facts(self, key: str) -> Facts:
        """Type and shape of a stored tensor; a quantised layer's are those of its weight in the model's own type."""
        layer = self._layers.get(key)
        if layer is None:
            return self.checkpoint.facts(key)
        *stack, rows, columns = layer.shape
        return self.checkpoint.dtype, torch.Size((*stack, columns, rows)) if key in self._turned else layer.shape

    def _read_stored(self, key: str) -> Tensor:
        layer = self._layers.get(key)
        if layer is None:
            return self.checkpoint.read(key)
        return layer.dense().mT.contiguous() if key in self._turned else layer.dense()

    def _convert(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Name -> tensor of everything that the group gives."""
        if group.converter is None:
            return {group.first: read(group.stored[0])}
        converter = deepcopy(group.converter)
        for pattern, keys in group.sources.items():
            for key in keys:
                converter.add_tensor(group.first, key, pattern, lambda key=key: read(key))  # type: ignore[arg-type, misc]
        try:
            given = converter.convert(group.first, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise ModelError(
                f"'{self.checkpoint.name}': {', '.join(group.stored[:3])} cannot become '{group.first}' "
                f"({str(error).splitlines()[0]}). The weights and config.json do not belong together."
            ) from None
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in given.items()}

    def _tie(self) -> None:
        """Of parameters that share a tensor keep one source, or several where the checkpoint has several that differ."""
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        canonical = set(self.model.all_tied_weights_keys.values())
        for group in groups.values():
            given = sorted((name for name in group if name in self._facts), key=lambda name: name not in canonical)
            for other in given[1:]:
                if torch.equal(self.read(given[0]), self.read(other)):
                    del self._facts[other], self._group_of[other]
                else:
                    self.untied.append(other)
            packed = [name for name in group if name.removesuffix(".weight") in self.packed] if len(group) > 1 else []
            self.untied += packed  # a quantised head beside a tied configuration is the file's
            if given:
                self.shared |= {name: given[0] for name in group if name not in self._facts and name not in packed}

    def _check(self, unexpected: set[str]) -> None:
        model = self.model
        given = {*self.names, *self.shared}
        missing = {name for name, _ in model.named_parameters() if name not in given}
        missing |= persistent_buffers(model).keys() - self._facts.keys()
        info = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)  # what transformers' rule looks at
        model._adjust_missing_and_unexpected_keys(info)
        absent = sorted(name for name in info.missing_keys)
        unknown = sorted(info.unexpected_keys)
        problems = [
            f"{what} {len(keys)} tensor{'s' * (len(keys) > 1)}: {', '.join(keys[:3])}"
            f"{f' and {len(keys) - 3} more' * (len(keys) > 3)}"
            for keys, what in ((absent, "lacks"), (unknown, "has unknown")) if keys
        ]  # fmt: skip
        if problems:
            raise ModelError(
                f"'{self.checkpoint.name}': the checkpoint {'; it '.join(problems)}. "
                "The weights and config.json do not belong together, or the download is not complete."
            )

    @property
    def names(self) -> list[str]:
        """Every tensor of the model that the checkpoint gives."""
        return [*self._facts, *map(self.name_of, self.packed)]

    def name_of(self, path: str) -> str:
        """Name of the parameter that is the weight of the layer at `path`; experts' weights are parameters themselves."""
        return path if path in self._experts else f"{path}.weight"

    def facts(self, name: str) -> Facts:
        """Type and shape of a dense tensor, as it is read."""
        return self._facts[name]

    def file_of(self, name: str) -> Path:
        """The shard that a tensor, or the first of those that it is made of, is in."""
        packed = self._layer_of.get(name.removesuffix(".weight"))
        stored = packed.name if packed is not None else self._group_of[name].stored[0]
        layer = packed or self._layers.get(stored)
        return self.checkpoint.file_of[layer.keys[0] if layer is not None else stored]

    def read(self, name: str) -> Tensor:
        """A dense tensor of the model."""
        group = self._group_of[name]
        if group.converter is None:
            return self._read_stored(group.stored[0])
        if self._last is None or self._last[0] is not group or name not in self._last[1]:
            self._last = None  # before the next group is read
            self._last = group, self._convert(group, self._read_stored)
        tensor = self._last[1].pop(name)
        if not self._last[1]:
            self._last = None
        return tensor

    def read_packed(self, path: str, dtype: torch.dtype) -> PackedWeight:
        """The packed weight of a layer, which decodes to `dtype`."""
        return self._layer_of[path].packed(dtype)

    def packed_options(self, path: str) -> Any:
        """How the layer at `path` is packed."""
        return self._layer_of[path].options

    def dense(self) -> Iterator[str]:
        """Names of the dense tensors, those of one group side by side."""
        yield from sorted(self._facts, key=lambda name: (str(self.file_of(name)), self._group_of[name].first))

    def together(self) -> Iterator[list[str]]:
        """Names of tensors that are stored as one or made of the same ones, in the order of the files."""
        groups: dict[str, list[str]] = {}
        for name in self.dense():
            groups.setdefault(self._group_of[name].first, []).append(name)
        yield from groups.values()
        yield from ([self.name_of(path)] for path in self.packed)


def fuses_experts(model: Any) -> bool:
    """Whether transformers makes fused experts of checkpoints of this kind of model, which may have none itself."""
    if not hasattr(model, "config"):
        return False
    converters = (entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter))
    return any(target.endswith("gate_up_proj") for converter in converters for target in converter.target_patterns)


def names_in_model(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint, of any layout that transformers knows of this kind of model -> its name in the model."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return {key: rename_source_key(key, renamings, [])[0] for key in keys}


def untie(model: Any, names: list[str]) -> None:
    """Give parameters that the configuration ties a tensor of their own, on the meta device."""
    for name in names:
        path, _, last = name.rpartition(".")
        parameter = model.get_parameter(name)
        model.get_submodule(path).register_parameter(last, nn.Parameter(torch.empty_like(parameter)))
        model.all_tied_weights_keys = {
            target: source for target, source in model.all_tied_weights_keys.items() if name not in (target, source)
        }
    if names and not model.config.is_encoder_decoder:
        model.config.tie_word_embeddings = False


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, of those that checkpoints hold."""
    return {
        f"{path}.{name}".lstrip("."): buffer for path, module in model.named_modules() for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }  # fmt: skip


def dtype_of(model: Any, dtype: torch.dtype) -> Callable[[str, torch.dtype], torch.dtype]:
    """What a parameter is held in, by its name and its type in the empty model: some stay float32 whatever `dtype` is."""
    plan = model._get_dtype_plan(dtype)
    kept = build_glob_alternation(list(plan))[0] if plan else None
    return lambda name, own: torch.float32 if kept is not None and kept.search(name) else own


def stored_names(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors under the names, and in the shapes, of the checkpoint that it was loaded from."""
    reverted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return reverted
