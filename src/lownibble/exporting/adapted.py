"""A base checkpoint with an adapter fitted to it: which tensors there are, what each starts from, and which the adapter changes.

No values are made here (`weights.py` does); an adapter's own are read to be checked. Its file's tensors each have a place: the
matrices of a layer's change (`edits`), trained copies, embeddings of another vocabulary (`replaced`).

Tied weights: a low-rank branch or a trained copy belongs to one of the modules that share a tensor. The merged model then needs
two tensors, and its configuration unties them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lownibble.config import QuantConfig
from lownibble.errors import AdapterError, ModelError
from lownibble.lora import activated
from lownibble.lora.adapter_file import AdapterFile, same_values
from lownibble.lora.apart import fitted
from lownibble.lora.portable import PREFIX
from lownibble.lora.provenance import as_option
from lownibble.lora.targets import scale_of
from lownibble.lora.variants import Variant
from lownibble.models import ModelSource, experts, skeleton
from lownibble.models import packed as packed_files
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.conversion import ModelTensors, untie
from lownibble.models.load import DTYPES, quantizable
from lownibble.quant import is_linear, is_transposed

ALL = slice(None)


class Edit(NamedTuple):
    """An adapter's change to a layer's weight; `keys`: the variant's parameter name -> key in the adapter file."""

    variant: Variant
    keys: dict[str, str]
    scale: float


class AdaptedBase:
    """A base checkpoint and an optional adapter, as named tensors.

    Args:
        quant: codec of the base in training, as recorded by an adapter that does; None: dense. A packed checkpoint uses its own.
        dtype: of all written dense tensors; 'auto': each tensor's own.
    Attributes:
        model: transformers' skeleton on the meta device, with the adapter's vocabulary.
        names: name of each parameter and buffer of the merged model -> the base's tensor it starts from.
        replaced: name -> key of the adapter's tensor that replaces it.
        edits: name -> the adapter variant's change, applied after `replaced`.
        changes: changed keys of config.json, with their values.
    Raises:
        AdapterError: an adapter tensor matches nothing, is missing, has another shape or is not finite.
        ModelError: the base is damaged.
    """

    def __init__(
        self, source: ModelSource, adapter: AdapterFile | None, quant: QuantConfig | None, dtype: str = "auto"
    ) -> None:  # fmt: skip
        self.source, self.dtype = source, dtype
        self.checkpoint = Checkpoint(source)
        self.config: dict[str, Any] = json.loads((source.folder / "config.json").read_text())
        self.model = skeleton(source, torch.float32)
        self.adapter = adapter = adapter and fitted(adapter, self.model)
        self.tensors = ModelTensors(self.model, self.checkpoint)
        self.experts = experts.shapes(self.model)
        self.packed = self.tensors.packed
        self.names = {name: name for name in self.tensors.names}
        if quant is not None and adapter is not None and adapter.trained_on is not None:
            quant = as_option(quant, self.model)
        self.quantized = set(self.packed) or (set(quantizable(self.model, quant)) if quant is not None else set())
        self.quant = self._packed_codec() if self.packed else quant
        untie(self.model, self.tensors.untied)
        self._groups = _tied_groups(self.model)  # now: hooks that lend the model its tensors part what is tied
        untied = self.tensors.untied and not self.model.config.is_encoder_decoder
        self.changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
        self.transposed = {path for path, module in self.model.named_modules() if is_transposed(module)}
        self._turned = self.transposed | {path for path in self.experts if self.tensors.is_turned(path)}
        self.edits: dict[str, Edit] = {}
        self.replaced: dict[str, str] = {}
        if adapter is not None:
            self._edit(adapter)
        self._check_shapes()

    def resolve(self, name: str) -> str:
        """The name in `names` that holds a model parameter's tensor: its own, or that of a tied parameter."""
        return name if name in self.names else next(other for other in self._tied(name) if other in self.names)

    def _tied(self, name: str) -> tuple[str, ...]:
        """All names of the (tied) parameter called `name`."""
        return self._groups[name]

    def _packed_codec(self) -> QuantConfig:
        held = {path: self.tensors.packed_options(path) for path in self.packed}
        return packed_files.config_of(held, self.dense_layers(set(self.packed)))

    def dense_layers(self, packed: set[str]) -> list[str]:
        """Paths of the linear layers, and of the experts' weights, that are not packed."""
        linears = (path for path, module in self.model.named_modules() if is_linear(module))
        return sorted({*linears, *self.experts} - packed)

    def _edit(self, adapter: AdapterFile) -> None:
        activated.check_merging(adapter.config)
        embedding, head = self._names_of("get_input_embeddings"), self._names_of("get_output_embeddings")
        self._resize(adapter, [name for name in (embedding, head) if name])
        expected = adapter.expected(self.model)
        carried, repeated = self._extra(adapter, adapter.shapes.keys() - expected.keys(), (embedding, head))
        adapter.check_fit(expected, {*carried.values(), *repeated})
        for key in (*expected, *carried.values()):
            if not torch.isfinite(adapter.read(key)).all():
                raise AdapterError(f"'{key}' of '{adapter.path}' holds NaN or infinite values. Train again with a lower rate.")
        for path, (variant, keys) in adapter.layers(self.model).items():
            self.edits[self.tensors.name_of(path)] = Edit(variant, keys, scale_of(path, adapter.config))
        of_layers = {key for edit in self.edits.values() for key in edit.keys.values()}
        self.replaced |= {_name_of(key): key for key in expected if key not in of_layers}
        self._untie(carried, embedding, head)

    def _extra(
        self, adapter: AdapterFile, keys: Iterable[str], ends: tuple[str | None, str | None]
    ) -> tuple[dict[str, str], set[str]]:
        """Sort the adapter file's untrained tensors: name -> key of embeddings and heads that differ from the base's (PEFT saves
        them if the vocabulary changed), and redundant keys."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        carried: dict[str, str] = {}
        repeated = set()
        for key in keys:
            name = _name_of(key)
            if ".modules_to_save." in key or ".original_module." in key:
                repeated.add(key)  # PEFT saves a trained embedding several times
            elif name in own and own[name].shape == adapter.shapes[key]:
                if self._same_as_base(name, adapter.read(key)):
                    repeated.add(key)
                elif name in ends:
                    carried[name] = key
        return carried, repeated

    def _names_of(self, getter: str) -> str | None:
        module = getattr(self.model, getter)()
        return next((f"{path}.weight" for path, m in self.model.named_modules() if m is module), None)

    def _resize(self, adapter: AdapterFile, names: list[str]) -> None:
        rows = {shape[0] for key, shape in adapter.shapes.items() if key.removeprefix(PREFIX) in names and len(shape) == 2}
        now = self.model.get_input_embeddings().weight.shape[0]
        if len(rows) > 1:
            raise AdapterError(
                f"'{adapter.path}' holds embeddings of {' and '.join(map(str, sorted(rows)))} rows. Save it again."
            )
        if rows and rows != {now}:
            self.model.resize_token_embeddings(*rows, mean_resizing=False)
            self.changes["vocab_size"] = rows.pop()

    def _same_as_base(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor equals the base's."""
        key = self.resolve(name)
        if key.removesuffix(".weight") in self.packed or self.tensors.facts(key)[1] != tensor.shape:
            return False
        return same_values(self.tensors.read(key), tensor)

    def _untie(self, carried: Mapping[str, str], embedding: str | None, head: str | None) -> None:
        """Untie modules that share a tensor if the adapter changes them differently."""
        assert self.adapter is not None
        trained = {*self.replaced, *self.edits}
        for name, key in carried.items():
            group = self._tied(name)
            first, *others = (self.adapter.read(carried[other]) for other in group if other in carried)
            alike = not trained & set(group) and all(torch.equal(first, other) for other in others)
            self.replaced[self.resolve(name) if alike else name] = key
            trained |= set() if alike else {name}
        shared = [n for n, _ in self.model.named_parameters(remove_duplicate=False) if n not in self.names]
        for group in {self._tied(name) for name in shared}:
            if not trained & set(group):
                continue
            if set(group) != {embedding, head} or self.model.config.is_encoder_decoder:
                raise AdapterError(
                    f"'{self.adapter.folder}' trains one of {', '.join(group)}, which share one tensor in a way that this "
                    "architecture cannot store apart. Merge it with the architecture's own tools."
                )
            self.names |= dict.fromkeys(group, self.resolve(group[0]))
            self.changes["tie_word_embeddings"] = False

    def _check_shapes(self) -> None:
        """Raise ModelError if a base tensor's shape does not match the configuration and the adapter's vocabulary."""
        for name, key in self.names.items():
            if name in self.replaced or name.removesuffix(".weight") in self.packed:
                continue
            stored, wanted = self.tensors.facts(key)[1], self.shape(name)
            if stored != wanted:
                raise ModelError(
                    f"'{self.source.name}': tensor '{key}' has shape {tuple(stored)}, and {tuple(wanted)} is needed. "
                    "The weights, config.json and the adapter do not belong together."
                )

    def shard_of(self, name: str) -> str:
        """File name of the shard that holds the tensor which `name` starts from."""
        return self.tensors.file_of(self.names[name]).name

    def kept_dtype(self, name: str) -> torch.dtype:
        """The dtype of `name` in a dense merged model; non-floating tensors keep theirs, and no sum is written in 8 bits."""
        stored = None if name.removesuffix(".weight") in self.packed else self.tensors.facts(self.names[name])[0]
        if stored is not None and (not stored.is_floating_point or (self.dtype == "auto" and stored.itemsize > 1)):
            return stored
        return self.checkpoint.dtype if self.dtype == "auto" else DTYPES[self.dtype]

    def shape(self, name: str) -> torch.Size:
        """The shape of `name` in the merged model."""
        parent, _, last = name.rpartition(".")
        shape: torch.Size = getattr(self.model.get_submodule(parent), last).shape
        return shape

    def share(self, paths: Iterable[str]) -> float:
        """The share of the model's parameters that the weights of the layers at `paths` are."""
        return sum(self.rows(path).numel() for path in paths) / self.tensors.n_weights

    def rows(self, path: str) -> torch.Size:
        """(out, in), or (E, out, in), of the weight of the layer at `path`."""
        *stack, n_out, n_in = self.shape(self.tensors.name_of(path))
        return torch.Size((*stack, n_in, n_out) if path in self._turned else (*stack, n_out, n_in))

    def turn(self, name: str, tensor: Tensor) -> Tensor:
        """(out, in) of what the model may keep as (in, out), or back."""
        return tensor.mT if name.removesuffix(".weight") in self._turned else tensor

    def parts(self, name: str) -> list[slice]:
        """The rows in which a weight is worked on: of experts' weights each expert, else all at once."""
        n_experts = self.shape(name)[0] if name in self.experts else 0
        return [slice(expert, expert + 1) for expert in range(n_experts)] or [ALL]

    @cached_property
    def stored_together(self) -> list[list[str]]:
        """Names of the merged model whose tensors are stored as one or made of the same ones."""
        groups = [[name for name in names if name in self.names] for names in self.tensors.together()]
        held = {name for names in groups for name in names}
        return [*groups, *([name] for name in self.names if name not in held)]


def _name_of(key: str) -> str:
    """Model parameter name of an adapter file's key."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _tied_groups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter name -> all names of that (tied) parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}
