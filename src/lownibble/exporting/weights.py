"""Weights of a base with an adapter merged, one tensor at a time, for each merge target.

For an adapter trained on packed weights Q of a model W there are three targets:

    dequantized   decode(Q) + delta: what the adapter was trained on, so the merged model computes what the live one does
    original      W + delta: more precise weights, but not those the adapter was trained to correct
    nf4           Q(decode(Q) + delta): small again, but requantised, with rounding steps often larger than the delta; called by
                  the codec that it is packed with

For an adapter trained on dense weights, 'dequantized' does not exist and the others start from W. An adapter of merge-aware
training (`lora/merge_aware.py`) names the codec it is packed with; its live model is the packed one. Sums are in float32 with one
final cast. The written tensors and the merged models that are measured both come from `Weights.merged`, so what is measured is
what is written.

The experts of a mixture are one weight (E, out, in), added to, packed and cast one expert after another. A checkpoint of another
tool holds no packed experts: where there are some, the packed target is in our own format.

Tied weights: a low-rank branch or a trained copy belongs to one of the modules that share a tensor. The merged model then needs
two tensors, and its configuration unties them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lownibble.config import QuantConfig
from lownibble.errors import AdapterError, ConfigError, ModelError
from lownibble.lora.adapter import AdapterFile, parted
from lownibble.lora.apart import fitted
from lownibble.lora.init import without
from lownibble.lora.portable import PREFIX
from lownibble.lora.targets import scale_of
from lownibble.lora.variants import Variant
from lownibble.models import ModelSource, experts, skeleton
from lownibble.models import packed as packed_files
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.conversion import ModelTensors, stored_names, untie
from lownibble.models.formats.write import ToPack, Writer, usual
from lownibble.models.load import DTYPES, quantizable, repacked
from lownibble.quant import PackedWeight, is_linear, is_transposed, quantize
from lownibble.quant.codecs import quantize_experts
from lownibble.quant.packed import PackedExperts
from lownibble.quant.sums import pack_sum

DENSE_TARGETS = ("dequantized", "original")
"""Merge targets of dense weights; the third is called by its codec."""

Tell = Callable[[str, int, int], None]
"""Progress callback: (activity, done, total)."""


def say_nothing(what: str, done: int, total: int) -> None:
    """Progress callback that does nothing."""


ALL = slice(None)


class Change(Protocol):
    """A float32 weight of the base, or those `rows` of it (output features; of experts' weights: experts) -> the same as the
    adapter changes it, maybe in place."""

    def __call__(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        """Apply the change."""


def unchanged(weight: Tensor, rows: slice = ALL) -> Tensor:
    """The `Change` that does nothing."""
    return weight


class Edit(NamedTuple):
    """An adapter's change to a layer's weight; `keys`: the variant's parameter name -> key in the adapter file."""

    variant: Variant
    keys: dict[str, str]
    scale: float


class Weights:
    """A base checkpoint and an optional adapter, as named tensors.

    Args:
        quant: codec of the base in training; None: dense. A packed checkpoint uses its own.
        new_quant: codec of the packed target if the base was dense in training.
        dtype: of all written dense tensors; 'auto': each tensor's own.
    Attributes:
        model: transformers' skeleton on the meta device, with the adapter's vocabulary.
        names: name of each parameter and buffer of the merged model -> the base's tensor it starts from.
        replaced: name -> key of the adapter's tensor that replaces it.
        edits: name -> the adapter variant's change, applied after `replaced`.
        changes: changed keys of config.json, with their values.
        merge_aware: whether the adapter was trained for its packed merge.
        ready: gives layers that somebody else has packed, by path, and KeyError for others; or None. ready_id: names how.
    Raises:
        AdapterError: an adapter tensor matches nothing, is missing, has another shape or is not finite.
        ModelError: the base is damaged.
    """

    def __init__(
        self,
        source: ModelSource,
        adapter: AdapterFile | None,
        quant: QuantConfig | None,
        new_quant: QuantConfig,
        dtype: str = "auto",
    ) -> None:
        self.source, self.dtype = source, dtype
        self.checkpoint = Checkpoint(source)
        self.config: dict[str, Any] = json.loads((source.folder / "config.json").read_text())
        self.model = skeleton(source, torch.float32)
        self.adapter = adapter = adapter and fitted(adapter, self.model)
        self.tensors = ModelTensors(self.model, self.checkpoint)
        self.experts = experts.shapes(self.model)
        self.packed = self.tensors.packed
        self.names = {name: name for name in self.tensors.names}
        self.quantized = set(self.packed) or (set(quantizable(self.model, quant)) if quant is not None else set())
        self.quant = self._packed_codec() if self.packed else quant
        self._to_pack = new_quant
        leaves = None if adapter is None or self.packed else (adapter.trained_on or {}).get("merge_aware")
        self.merge_aware = leaves is not None
        self.new_quant = QuantConfig(**leaves) if leaves is not None else self.quant or new_quant
        untie(self.model, self.tensors.untied)
        self._groups = _tied_groups(self.model)  # now: hooks that lend the model its tensors part what is tied
        untied = self.tensors.untied and not self.model.config.is_encoder_decoder
        self.changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
        self.transposed = {path for path, module in self.model.named_modules() if is_transposed(module)}
        self._turned = self.transposed | {path for path in self.experts if self.tensors.is_turned(path)}
        self.ready: Callable[[str], PackedWeight] | None = None
        self.ready_id = ""
        self.edits: dict[str, Edit] = {}
        self.replaced: dict[str, str] = {}
        if adapter is not None:
            self._edit(adapter)
        self._check_shapes()

    @cached_property
    def requantized(self) -> set[str]:
        """Paths of the layers packed in the packed target."""
        chosen = self.quantized or set(quantizable(self.model, self._to_pack))
        return repacked(self.model, chosen) | (chosen & set(self.packed))

    @cached_property
    def writer(self) -> Writer:
        """The file format of the packed target."""
        return usual(self.new_quant, of_experts=bool(self.requantized & self.experts.keys()))

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

    @property
    def packed_target(self) -> str:
        """Name of the target that is packed again: its codec, that of most layers."""
        return self.new_quant.quant_type

    @property
    def targets(self) -> list[str]:
        """The possible merge targets: `DENSE_TARGETS`, and the packed one."""
        packs = not self.transposed & self.requantized  # transformers reads no packed Conv1D
        found = {"dequantized": bool(self.quantized), "original": not self.packed, self.packed_target: packs}
        return [target for target, possible in found.items() if possible]

    def _edit(self, adapter: AdapterFile) -> None:
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
        """Whether a tensor equals the base's with either cast to the other's dtype (the base's may differ from training)."""
        key = self.resolve(name)
        if key.removesuffix(".weight") in self.packed or self.tensors.facts(key)[1] != tensor.shape:
            return False
        base = self.tensors.read(key)
        return torch.equal(base.to(tensor.dtype), tensor) or torch.equal(tensor.to(base.dtype), base)

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
        """The dtype of `name` in a dense merged model; non-floating tensors keep theirs."""
        if self.dtype != "auto":
            wanted = DTYPES[self.dtype]
        elif name.removesuffix(".weight") in self.packed:
            wanted = self.checkpoint.dtype
        else:
            return self.tensors.facts(self.names[name])[0]
        stored = None if name.removesuffix(".weight") in self.packed else self.tensors.facts(self.names[name])[0]
        return stored if stored is not None and not stored.is_floating_point else wanted

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

    def trained_on(self, name: str, codec: bool = True) -> Tensor | PackedWeight:
        """The base's tensor: packed if it was packed in training (with `codec`) or is in the checkpoint, else as stored."""
        path = name.removesuffix(".weight")
        if path in self.packed:
            return self.tensors.read_packed(path, self.kept_dtype(name))
        tensor = self.tensors.read(self.names[name])
        if codec and path in self.quantized:
            assert self.quant is not None
            rows, how = self.turn(name, tensor), self.quant.for_layer(path)
            if path in self.experts:
                return quantize_experts(rows, how, name=name)
            if name in self.edits and self.took_out:
                _, (start_A, start_B) = parted(**self._parameters(name))
                rows = without(rows.float(), start_A, start_B, self.edits[name].scale)
            return quantize(rows.contiguous(), how, name=name)
        return tensor

    def turn(self, name: str, tensor: Tensor) -> Tensor:
        """(out, in) of what the model may keep as (in, out), or back."""
        return tensor.mT if name.removesuffix(".weight") in self._turned else tensor

    def parts(self, name: str) -> list[slice]:
        """The rows in which a weight is worked on: of experts' weights each expert, else all at once."""
        n_experts = self.shape(name)[0] if name in self.experts else 0
        return [slice(expert, expert + 1) for expert in range(n_experts)] or [ALL]

    def as_float(self, name: str, tensor: Tensor | PackedWeight, rows: slice = ALL) -> Tensor:
        """A float32 copy of what `trained_on`, `live` or `merged` gave for `name`, or of those `rows` of it (`parts`), decoded if
        packed, in the model's layout."""
        if not isinstance(tensor, PackedWeight):
            return tensor[rows].to(torch.float32, copy=True)
        if isinstance(tensor, PackedExperts) and rows is not ALL:
            return self.turn(name, tensor[rows.start].dequantize(torch.float32).unsqueeze(0)).contiguous()
        return self.turn(name, tensor.dequantize(torch.float32)).contiguous()

    def _base(self, name: str, codec: bool = True) -> Tensor | PackedWeight:
        """The weight that an edit changes: the adapter's tensor if it replaces the base's, else the base's."""
        if name in self.replaced:
            assert self.adapter is not None
            return self.adapter.read(self.replaced[name])
        return self.trained_on(name, codec)

    def live(self, name: str, *, adapted: bool = True) -> Tensor | PackedWeight:
        """What the live model computes with at `name`, before `live_change`; the base's if not `adapted`."""
        if adapted and self._rounds(name):
            return self.merged(name, self.packed_target)
        fits = name not in self.replaced or self.tensors.facts(self.names[name])[1] == self.shape(name)
        return self._base(name) if adapted or not fits else self.trained_on(name)

    def live_change(self, name: str) -> Change:
        """What turns `live` into what the live model computes with."""
        return unchanged if self._rounds(name) else self.change(name)

    def _rounds(self, name: str) -> bool:
        """Whether the live model computes with the packed sum at `name`."""
        return self.merge_aware and name in self.edits and self._packs(name, self.packed_target)

    def delta_norm(self, name: str) -> float:
        """Frobenius norm of the adapter's change at `name`."""
        base, change = self._base(name), self.change(name)
        return math.hypot(*(
            float((change(self.as_float(name, base, part), part) - self.as_float(name, base, part)).norm())
            for part in self.parts(name)
        ))  # fmt: skip

    @property
    def took_out(self) -> bool:
        """Whether the adapter's start was taken out of the base before it was packed; the file then has both."""
        facts = (self.adapter.trained_on if self.adapter else None) or {}
        return bool(facts.get("took_out")) and bool(facts.get("quant")) and self.quant is not None

    def _parameters(self, name: str) -> dict[str, Tensor]:
        """The adapter's parameters at `name`, in float32, by the variant's parameter names."""
        assert self.adapter is not None
        variant, keys, _ = self.edits[name]
        return {own: variant.from_file(own, self.adapter.read(key).float()) for own, key in keys.items()}

    def change(self, name: str, codec: bool = True) -> Change:
        """The adapter's change at `name`, which may do nothing; reads the adapter's parameters once. Of the base as it was in
        training, or, without `codec`, of the dense one."""
        if self.adapter is None or name not in self.edits:
            return unchanged
        edit, read, by_expert = self.edits[name], self._parameters(name), name in self.experts
        if codec and self.took_out:
            read["lora_A"], read["lora_B"] = parted(read["lora_A"], read["lora_B"])[0]

        def change(weight: Tensor, rows: slice = ALL) -> Tensor:
            some = {own: value if own == "lora_A" and not by_expert else value[rows] for own, value in read.items()}
            return self.turn(name, edit.variant.merge(self.turn(name, weight), some, edit.scale))

        return change

    def merged(self, name: str, onto: str) -> Tensor | PackedWeight:
        """The merged model's tensor as written: in its final dtype, or packed for the packed target.

        Raises:
            AdapterError: the sum overflows the dtype.
        """
        codec = onto != "original"
        base, edited = self._base(name, codec), name in self.edits
        packs = self._packs(name, onto)
        if not edited and packs == isinstance(base, PackedWeight):
            return base if isinstance(base, PackedWeight) else self._cast(base, name)
        if packs and self.ready is not None:
            with suppress(KeyError):
                return self.ready(name.removesuffix(".weight")).with_dtype(self.kept_dtype(name))
        if packs and self._rounds(name):
            assert isinstance(base, PackedWeight)
            read, how = self._parameters(name), self.new_quant.for_layer(name.removesuffix(".weight"))
            packed = pack_sum(base, read["lora_A"], read["lora_B"], self.edits[name].scale, how, name)
            return packed.with_dtype(self.kept_dtype(name))
        change, parts = self.change(name, codec), self.parts(name)
        sums = (change(self.as_float(name, base, part), part) for part in parts)
        if packs:
            return self._pack(name, sums).with_dtype(self.kept_dtype(name))
        if parts == [ALL]:
            return self._cast(next(sums), name)
        kept = self.kept_dtype(name)
        held = base if isinstance(base, Tensor) and base.dtype == kept else None  # nobody else's: added to in place
        made = torch.empty(self.shape(name), dtype=kept) if held is None else held
        for part, total in zip(parts, sums, strict=True):
            made[part] = self._cast(total, name)
        return made

    def _pack(self, name: str, sums: Iterator[Tensor]) -> PackedWeight:
        """Pack a merged weight, given by `parts`."""
        how, dtype = self.new_quant.for_layer(name.removesuffix(".weight")), self.kept_dtype(name)
        if name not in self.experts:
            return self.writer.quantize(next(sums), how, dtype, name=name)
        each = (
            self.writer.quantize(self.turn(name, total)[0].contiguous(), how, dtype, name=f"{name}[{expert}]")
            for expert, total in enumerate(sums)
        )
        return PackedExperts.of(each, self.shape(name)[0])

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        dtype = self.kept_dtype(name)
        cast = tensor.to(dtype)
        if cast.is_floating_point() and tensor.dtype != dtype and not torch.isfinite(cast).all():
            raise AdapterError(f"'{name}' merged does not fit {dtype}: values overflow. Take --dtype bfloat16 or float32.")
        return cast

    @cached_property
    def stored_together(self) -> list[list[str]]:
        """Names of the merged model whose tensors are stored as one or made of the same ones."""
        groups = [[name for name in names if name in self.names] for names in self.tensors.together()]
        held = {name for names in groups for name in names}
        return [*groups, *([name] for name in self.names if name not in held)]

    def _packs(self, name: str, onto: str) -> bool:
        path = name.removesuffix(".weight")
        return onto == self.packed_target and path in self.requantized

    def layout(self, names: list[str], onto: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Key -> type and shape of what is written for names that are stored together."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        dense: dict[str, Tensor] = {}
        for name in names:
            if self._packs(name, onto):
                path = name.removesuffix(".weight")
                found |= self.writer.specs(path, ToPack(self.rows(path), self.new_quant.for_layer(path)), self.kept_dtype(name))
            else:
                dense[name] = torch.empty(self.shape(name), dtype=self.kept_dtype(name), device="meta")
        return found | {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in self._stored(dense, bool(found)).items()}

    def written(self, names: list[str], onto: str) -> dict[str, Tensor]:
        """Key -> tensor of the same."""
        found: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        for name in names:
            made = self.merged(name, onto)
            if isinstance(made, PackedWeight):
                found |= self.writer.tensors(name.removesuffix(".weight"), made)
            else:
                dense[name] = made
        return found | self._stored(dense, bool(found))

    def _stored(self, dense: dict[str, Tensor], beside_packed: bool) -> dict[str, Tensor]:
        """Under the base's own names; under the model's where the rest of what is stored together is packed."""
        return dense if beside_packed or not dense else stored_names(self.model, dense)


def _name_of(key: str) -> str:
    """Model parameter name of an adapter file's key."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _tied_groups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter name -> all names of that (tied) parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def check_onto(weights: Weights, onto: str) -> None:
    """Check that the adapter can be merged onto `onto`.

    Raises:
        ConfigError: it cannot; names the possible targets.
    """
    if onto in weights.targets:
        return
    why = {
        "dequantized": "the adapter was trained on dense weights, so there is nothing to decode",
        "original": f"'{weights.source.name}' holds quantised weights only. Name the dense model with --base",
        weights.packed_target: "its layers are Conv1D, which no 4-bit checkpoint holds",
    }.get(onto, f"the result is packed as {weights.packed_target}, {_why_packed_so(weights)}")
    raise ConfigError(f"Cannot merge onto '{onto}': {why}. Merge onto {' or '.join(weights.targets)}.")


def _why_packed_so(weights: Weights) -> str:
    if weights.merge_aware:
        return "which the adapter was trained for"
    return "as in training" if weights.quant is not None else "as the quant options say (--quant-type)"
