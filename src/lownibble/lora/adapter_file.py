"""The file of an adapter in PEFT's format: what it holds and must hold, by name and shape, and its values on demand.

Only safetensors is read, never pickle. `adapter.py` loads it into a model and writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lownibble.config import LoraConfig
from lownibble.errors import AdapterError, TargetError
from lownibble.lora.configuration import read_values, to_config
from lownibble.lora.experts import file_paths, is_experts, variant_for
from lownibble.lora.inject import Plan, plan
from lownibble.lora.layer import LoraLinear, sizes
from lownibble.lora.portable import CONFIG_FILE, PREFIX, WEIGHTS_FILE, folder_of
from lownibble.lora.provenance import base_facts, from_metadata, other_codec
from lownibble.lora.targets import rank_of
from lownibble.lora.variants import Variant, variant_of
from lownibble.models.conversion import persistent_buffers


class AdapterFile:
    """The weights of an adapter folder: names and shapes up front, values on demand.

    Attributes:
        base, revision: the base's name and revision, or None if the files do not record them.
        made: key -> what makes its tensor of others, for files that are read in another layout (`apart.py`).
        trained_on: facts of the base (see `provenance.py`), or None if the file does not record them.
    Raises:
        AdapterError: files are missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder_of(folder)
        self.path = self.folder / WEIGHTS_FILE
        values = read_values(folder)
        self.config = to_config(self.folder / CONFIG_FILE, values)
        self.base, self.revision = values.get("base_model_name_or_path"), values.get("revision")
        self.made: dict[str, Callable[[], Tensor]] = {}
        if not self.path.exists():
            raise AdapterError(f"'{self.path}' is missing. Only safetensors adapters are read; convert others with PEFT.")
        try:
            with safe_open(self.path, "pt") as file:
                self.trained_on = from_metadata(file.metadata())
                self.shapes = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no map
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"'{self.path}' is damaged: {error}. Copy or save it again.") from None
        if any(".lora_embedding_" in key for key in self.shapes):
            raise AdapterError(
                f"'{self.folder}' adapts embeddings, which Lownibble does not do. Merge it with PEFT first, or train the "
                "embeddings with modules_to_save."
            )

    def changed_base(self, model: nn.Module) -> str:
        """The initialisation that took its start out of the base's packed weights before they were packed, if `model` is packed
        in the same way, so that it can be done again; else ''."""
        facts = self.trained_on or {}
        base = base_facts(model)
        same = base.get("changed_base") == facts.get("changed_base")  # it has been done
        again = facts.get("took_out") and (same or (facts.get("quant") and other_codec(facts, base) is None))
        return str(facts.get("changed_base") or "") if again else ""

    def read(self, key: str) -> Tensor:
        """Read one tensor, without keeping the file open."""
        if key in self.made:
            return self.made[key]()
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor.clone()

    def expected(self, model: nn.Module, name: str = "default") -> dict[str, torch.Size]:
        """Key -> shape of every tensor that the file must hold for this model, and of the buffers that it may hold and does.

        Raises:
            AdapterError: the adapter's targets do not fit the model.
        """
        planned = self._plan(model, name)
        buffers = {
            f"{PREFIX}{path}.{key}": buffer.shape for path, module in planned.saved.items()
            for key, buffer in persistent_buffers(module).items()
        }  # fmt: skip
        held = {key: shape for key, shape in buffers.items() if key in self.shapes}  # not in our files of before
        return _expected_shapes(planned, self.config) | held

    def layers(self, model: nn.Module, name: str = "default") -> dict[str, tuple[Variant, dict[str, str]]]:
        """Path of every adapted layer -> its variant, and its parameters' names -> keys in the file.

        Raises:
            AdapterError: as `expected`.
        """
        return _layers(self._plan(model, name), self.config)

    def _plan(self, model: nn.Module, name: str) -> Plan:
        try:
            return plan(model, self.config, name, of_file=True)
        except TargetError as error:
            raise AdapterError(f"'{self.folder}' does not fit this model: {error}") from None

    def check_fit(self, expected: dict[str, torch.Size], ignored: set[str]) -> None:
        """Check that the file holds exactly the expected tensors, besides the ignored ones.

        Raises:
            AdapterError: names tensors that are missing, extra or of another shape.
        """
        _check_fit(expected, {key: shape for key, shape in self.shapes.items() if key not in ignored}, self.path)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are equal with either cast to the other's dtype (a base may be loaded in another dtype
    than it was trained on in)."""
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def parted(lora_A: Tensor, lora_B: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(A, B) as trained and as at the start, of an adapter whose file has both."""
    r = len(lora_A) // 2
    return (lora_A[:r], lora_B[:, :r]), (lora_A[r:], -lora_B[:, r:])


def _expected_shapes(planned: Plan, config: LoraConfig) -> dict[str, torch.Size]:
    """File key -> shape of every tensor that the adapter's file must hold."""
    shapes: dict[str, torch.Size] = {}
    for path, (variant, keys) in _layers(planned, config).items():
        layer = planned.targets[path]
        n_out, n_in = sizes(layer.base if isinstance(layer, LoraLinear) else layer)
        wanted = variant.shapes(n_in, n_out, rank_of(path, config))
        empty = {own: variant.to_file(own, torch.empty(shape, device="meta")) for own, shape in wanted.items()}
        shapes |= {keys[own]: tensor.shape for own, tensor in empty.items()}
    for path, module in planned.saved.items():
        shapes |= {f"{PREFIX}{path}.{key}": parameter.shape for key, parameter in module.named_parameters()}
    return shapes | {PREFIX + path: bias.shape for path, bias in planned.biases.items()}


def _layers(planned: Plan, config: LoraConfig) -> dict[str, tuple[Variant, dict[str, str]]]:
    """Path of each layer -> its variant, and the file key of each of its parameters."""
    paths = file_paths(planned.targets, [path for path, layer in planned.targets.items() if is_experts(layer)])
    variants = {path: variant_for(layer, variant_of(config)) for path, layer in planned.targets.items()}
    return {
        path: (variant, {own: f"{PREFIX}{paths[path]}.{key}" for own, key in variant.keys.items()})
        for path, variant in variants.items()
    }  # fmt: skip


def _check_fit(expected: dict[str, torch.Size], stored: dict[str, torch.Size], path: Path) -> None:
    problems = [f"lacks '{key}'" for key in sorted(expected.keys() - stored.keys())]
    problems += [f"has no place for '{key}'" for key in sorted(stored.keys() - expected.keys())]
    problems += [
        f"'{key}' has shape {tuple(stored[key])}, not {tuple(expected[key])}"
        for key in sorted(expected.keys() & stored.keys()) if stored[key] != expected[key]
    ]  # fmt: skip
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise AdapterError(
            f"'{path}' does not fit this model: {'; '.join(problems[:3])}{more}. Load it on the base it was trained on."
        )
