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

Which tensors there are, and what an adapter changes, is `adapted.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import AdapterError, ConfigError
from lownibble.exporting.adapted import ALL, AdaptedBase
from lownibble.lora.adapter_file import AdapterFile, parted
from lownibble.lora.init import without
from lownibble.models import ModelSource
from lownibble.models.conversion import stored_names
from lownibble.models.formats.write import ToPack, Writer, usual
from lownibble.models.load import packable, quantizable, repacked
from lownibble.quant import PackedWeight, quantize
from lownibble.quant.codecs import quantize_experts
from lownibble.quant.packed import PackedExperts
from lownibble.quant.sums import pack_sum

DENSE_TARGETS = ("dequantized", "original")
"""Merge targets of dense weights; the third is called by its codec."""

Tell = Callable[[str, int, int], None]
"""Progress callback: (activity, done, total)."""


def say_nothing(what: str, done: int, total: int) -> None:
    """Progress callback that does nothing."""


class Change(Protocol):
    """A float32 weight of the base, or those `rows` of it (output features; of experts' weights: experts) -> the same as the
    adapter changes it, maybe in place."""

    def __call__(self, weight: Tensor, rows: slice = ALL) -> Tensor:
        """Apply the change."""


def unchanged(weight: Tensor, rows: slice = ALL) -> Tensor:
    """The `Change` that does nothing."""
    return weight


class Weights(AdaptedBase):
    """The tensors of an `AdaptedBase` as the live model has them, and as each merged one has.

    Args:
        new_quant: codec of the packed target if the base was dense in training. Others: see `AdaptedBase`.
    Attributes:
        merge_aware: whether the adapter was trained for its packed merge.
        ready: gives layers that somebody else has packed, by path, and KeyError for others; or None. ready_id: names how.
    """

    def __init__(
        self, source: ModelSource, adapter: AdapterFile | None, quant: QuantConfig | None, new_quant: QuantConfig,
        dtype: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(source, adapter, quant, dtype)
        self._to_pack = new_quant
        leaves = None if self.adapter is None or self.packed else (self.adapter.trained_on or {}).get("merge_aware")
        self.merge_aware = leaves is not None
        self.new_quant = QuantConfig(**leaves) if leaves is not None else self.quant or new_quant
        self.ready: Callable[[str], PackedWeight] | None = None
        self.ready_id = ""

    @cached_property
    def requantized(self) -> set[str]:
        """Paths of the layers packed in the packed target."""
        chosen = self.quantized or set(quantizable(self.model, self._to_pack))
        return repacked(self.model, chosen) | (chosen & set(self.packed))

    @cached_property
    def writer(self) -> Writer:
        """The file format of the packed target."""
        return usual(self.new_quant, of_experts=bool(self.requantized & self.experts.keys()))

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

    def trained_on(self, name: str, codec: bool = True) -> Tensor | PackedWeight:
        """The base's tensor: packed if it was packed in training (with `codec`) or is in the checkpoint, else as stored."""
        path = name.removesuffix(".weight")
        if path in self.packed:
            return self.tensors.read_packed(path, self.kept_dtype(name))
        tensor = self.tensors.read(self.names[name])
        if codec and path in self.quantized:
            assert self.quant is not None
            rows, how = self.turn(name, packable(tensor)), self.quant.for_layer(path)
            if path in self.experts:
                return quantize_experts(rows, how, name=name)
            if name in self.edits and self.took_out:
                _, (start_A, start_B) = parted(**self._parameters(name))
                rows = without(rows.float(), start_A, start_B, self.edits[name].scale)
            return quantize(rows.contiguous(), how, name=name)
        return tensor

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
