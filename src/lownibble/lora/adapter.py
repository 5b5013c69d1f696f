"""Read and write adapter files in PEFT's format.

A folder with `adapter_config.json` and `adapter_model.safetensors`. Keys are `base_model.model.<path>.` plus the variant's key of
each parameter (`lora_A.weight`, `lora_B.weight`), `base_layer.bias` for trained biases of adapted layers, or the own name of
each parameter and persistent buffer for modules_to_save. The safetensors metadata records the base (`provenance.py`). Files are
written under a temporary name and renamed, so that a reader never sees a partial file. `adapter_file.py` is the file itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lownibble import tensorfile
from lownibble.config import LoraConfig
from lownibble.errors import AdapterError
from lownibble.lora import portable
from lownibble.lora.active import (
    active_adapter,
    adapter_configs,
    lora_layers,
    remove_adapter,
    saved_modules,
    set_adapter,
    trained_biases,
)
from lownibble.lora.adapter_file import AdapterFile, parted, same_values
from lownibble.lora.apart import fitted
from lownibble.lora.begin import take_out
from lownibble.lora.experts import file_paths, is_experts
from lownibble.lora.inject import Addition, add_lora, match_targets, named_linears
from lownibble.lora.layer import LoraLinear, LowRank, TrainedCopy
from lownibble.lora.portable import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lownibble.lora.provenance import base_facts, other_codec, other_weights, to_metadata
from lownibble.lora.targets import unmatched
from lownibble.models.conversion import persistent_buffers
from lownibble.models.dense_origin import DenseOrigin
from lownibble.models.info import info
from lownibble.quant import PackedWeight, is_transposed


@dataclass(frozen=True)
class _Part:
    """A layer's adapter, and where its parameters are in a file: name -> key."""

    path: str
    adapter: LowRank
    keys: dict[str, str]


def _parts(model: nn.Module, name: str) -> list[_Part]:
    layers = dict(lora_layers(model, name))
    paths = file_paths(layers, [path for path, layer in layers.items() if is_experts(layer)])
    adapters = {path: layer.adapter(name) for path, layer in layers.items()}
    return [
        _Part(path, adapter, {own: f"{PREFIX}{paths[path]}.{key}" for own, key in adapter.variant.keys.items()})
        for path, adapter in adapters.items()
    ]


def _others(model: nn.Module, name: str) -> dict[str, Tensor]:
    """File key -> the live tensor of what the adapter trains besides its layers' parameters."""
    return _saved(model, name) | {PREFIX + path: bias for path, bias in trained_biases(model, name)}


def _saved(model: nn.Module, name: str) -> dict[str, Tensor]:
    """File key -> the live tensor of what `modules_to_save` trains, and of its buffers."""
    return {
        f"{PREFIX}{path}.{key}": value for path, module in saved_modules(model, name)
        for key, value in (*module.named_parameters(), *persistent_buffers(module).items())
    }  # fmt: skip


def file_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """File key -> tensor, for everything that the adapter `name` trains, as it is written: where the start was taken out of the
    base, with the start to be taken out."""
    tensors: dict[str, Tensor] = {}
    for part in _parts(model, name):
        adapter = part.adapter
        tensors |= {key: adapter.variant.to_file(own, getattr(adapter, own)) for own, key in part.keys.items()}
        if adapter.start is not None:
            A, B = (each.to(adapter.lora_A.device) for each in adapter.start)  # shards are gathered on the CPU
            tensors[part.keys["lora_A"]] = torch.cat([adapter.lora_A, A])
            tensors[part.keys["lora_B"]] = torch.cat([adapter.lora_B, -B], dim=1)
    return tensors | _others(model, name)


def _file_config(model: nn.Module, name: str) -> LoraConfig:
    """The adapter's configuration, as it is written: of twice the rank where the file has the start too; the initialisation no
    longer matters, and PEFT would repeat it."""
    config = adapter_configs(model)[name]
    if config.init_lora_weights not in (True, False, "gaussian"):
        config = config.with_options(init_lora_weights=True)
    doubled = any(layer.adapter(name).start is not None for _, layer in lora_layers(model, name))
    return _times(config, 2) if doubled else config


def _times(config: LoraConfig, factor: float) -> LoraConfig:
    """A configuration of `factor` times the ranks and the same scales."""
    alpha = factor**0.5 if config.use_rslora else factor
    scaled: LoraConfig = config.with_options(
        r=int(config.r * factor), lora_alpha=config.lora_alpha * alpha,
        rank_pattern={key: int(r * factor) for key, r in config.rank_pattern.items()},
        alpha_pattern={key: value * alpha for key, value in config.alpha_pattern.items()},
    )  # fmt: skip
    return scaled


def _config_json(model: nn.Module, config: LoraConfig, name: str) -> dict[str, Any]:
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    options = {key: value for key, value in config.to_dict().items() if key != "target_experts"}  # PEFT's names
    if config.alora_invocation_tokens is None:
        del options["alora_invocation_tokens"]  # unknown to PEFT before 0.18
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "fan_in_fan_out": any(is_transposed(layer.base) for _, layer in lora_layers(model, name)),
        **options,
        **portable.named(model, config, name),
        "modules_to_save": config.modules_to_save or None,
    }


def save_adapter(model: nn.Module, folder: str | Path, *, name: str = "default") -> Path:
    """Write the adapter `name` as PEFT does; returns the folder.

    Warns:
        UserWarning: PEFT will not apply all of its tensors.
    Raises:
        AdapterError: the model has no such adapter, or a trained tensor is not finite.
    """
    configs = adapter_configs(model)
    if name not in configs:
        raise AdapterError(f"The model has no adapter '{name}' to save. It has: {', '.join(configs) or 'none'}.")
    tensors = {key: value.detach().cpu().contiguous() for key, value in sorted(file_tensors(model, name).items())}
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise AdapterError(
                f"'{key}' holds NaN or infinite values; nothing was written. Lower the learning rate and train again."
            )
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    entries = {key: tensorfile.Entry(value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    facts, corrects = base_facts(model), info(model).adapters.corrects.get(name)
    took_out = any(layer.adapter(name).start is not None for _, layer in lora_layers(model, name))
    facts |= {"took_out": True} if took_out else {}
    facts |= {"corrects": corrects} if facts["quant"] and corrects else {}
    parts, metadata = ((key, 0, value) for key, value in tensors.items()), {"format": "pt", **to_metadata(facts)}
    tensorfile.write(folder / f".{WEIGHTS_FILE}.part", entries, parts, metadata)  # safetensors' own writer shuffles the metadata
    values = _config_json(model, _file_config(model, name), name)
    text = json.dumps(dict(sorted(values.items())), indent=2) + "\n"  # patterns keep their order: the first match wins
    (folder / f".{CONFIG_FILE}.part").write_text(text)
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        part = folder / f".{file}.part"
        with part.open("rb+") as handle:
            os.fsync(handle.fileno())
        part.replace(folder / file)
    if lost := portable.renamed(model, tensors):
        key, found = next(iter(lost.items()))
        warnings.warn(
            f"PEFT does not apply {len(lost)} of this adapter's {len(tensors)} tensors: reading them, it renames some of "
            f"{type(model).__name__}'s as those of a checkpoint ('{key}' to '{found}'). Lownibble reads them; for other tools "
            "merge the adapter (lownibble merge).",
            stacklevel=2,
        )
    return folder


def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str = "default", trainable: bool = False, any_base: bool = False
) -> nn.Module:
    """Inject the adapter of a folder, load its weights, and make it active; returns the model.

    Args:
        trainable: keep the adapter's parameters trainable.
        any_base: accept an adapter that records other weights as its base.
    Raises:
        AdapterError: files missing or damaged, tensors that are missing, extra or of another shape (named), or an adapter of
            another base. After an error the model is without the adapter.
    Warns:
        UserWarning: the base is stored in another format (4-bit, dense) than in training.
    """
    stored = fitted(AdapterFile(folder), model)
    expected = stored.expected(model, name)
    stored.check_fit(expected, {key for key in stored.shapes.keys() - expected.keys() if _repeats_base(model, key, stored)})
    changed = stored.changed_base(model)
    _check_base(model, stored, any_base, changed)
    _check_targets(model, stored, trainable)
    active, trained = active_adapter(model), [parameter for parameter in model.parameters() if parameter.requires_grad]
    add_lora(model, _times(stored.config, 0.5) if changed else stored.config, name=name, of_file=True)
    parts, others = _parts(model, name), _others(model, name)
    try:
        for key in others.keys() & expected.keys():
            others[key].data.copy_(stored.read(key))
        if changed:  # last, as it changes the base
            take_out(model, name, {part.path: _set_parted(part, stored) for part in parts}, changed)
        else:
            for part in parts:
                for own, key in part.keys.items():
                    getattr(part.adapter, own).data.copy_(part.adapter.variant.from_file(own, stored.read(key)))
    except BaseException as error:
        if name in adapter_configs(model):  # else `take_out` removed it
            remove_adapter(model, name)
        set_adapter(model, active)
        for parameter in trained:
            parameter.requires_grad_(True)
        if isinstance(error, SafetensorError):
            raise AdapterError(f"'{stored.path}' is damaged: {error}. Copy or save it again.") from None
        raise
    for tensor in (*(getattr(part.adapter, own) for part in parts for own in part.keys), *others.values()):
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(trainable)
    if corrects := (stored.trained_on or {}).get("corrects"):
        info(model).adapters.corrects[name] = corrects
    return model


def _check_targets(model: nn.Module, stored: AdapterFile, trainable: bool) -> None:
    matched = match_targets(model, stored.config, of_file=True)
    if ignored := unmatched(named_linears(model), stored.config, matched):
        warnings.warn(f"'{stored.folder}': {', '.join(ignored)} match nothing in this model and are ignored.", stacklevel=3)
    if trainable and stored.config.lora_dropout and any(map(is_experts, matched.values())):
        raise AdapterError(
            f"'{stored.folder}' has experts and lora_dropout = {stored.config.lora_dropout:g}, which experts cannot be trained "
            f"with. Set lora_dropout to 0 in its {CONFIG_FILE}."
        )


class StoredAddition:
    """`load_adapter` in instalments, to train the adapter further, for a model that several processes load layer by layer.

    Args:
        from_first: gives all processes what its argument returns, or raises, on the first of them, which alone reads the file.
    Raises:
        AdapterError: as `load_adapter`; or the adapter trains biases, or took its start out of the packed base.
    """

    def __init__(self, model: nn.Module, folder: str | Path, from_first: Callable[[Callable[[], Any]], Any]) -> None:
        self._model, self._folder, self._from_first = model, folder, from_first
        self._stored: AdapterFile | None = None
        self._expected: dict[str, torch.Size] = {}
        self._extra: set[str] = set()  # of the file, to be compared with the base when it is there
        config, self._corrects, info(model).started_from = from_first(self._open)
        self._addition = Addition(model, config, of_file=True)
        self._set: set[str] = set()

    def _open(self) -> tuple[LoraConfig, str | None, str]:
        self._stored = stored = fitted(AdapterFile(self._folder), self._model)
        facts = stored.trained_on or {}
        for wrong, what in (
            (stored.config.bias != "none", "trains biases"),
            (facts.get("took_out") and facts.get("quant"), "took its start out of the packed base"),
        ):
            if wrong:
                raise AdapterError(f"'{self._folder}' {what}, which cannot be done with shards. Use --parallel ddp.")
        self._expected = stored.expected(self._model)
        extra = stored.shapes.keys() - self._expected.keys()
        self._extra = {key for key in extra if _may_repeat_base(self._model, key, stored.shapes[key])}
        stored.check_fit(self._expected, self._extra)
        _check_targets(self._model, stored, trainable=True)
        with stored.path.open("rb") as file:
            return stored.config, facts.get("corrects"), hashlib.file_digest(file, "sha256").hexdigest()

    def add(self, path: str) -> None:
        """Adapt the module at `path`, or with '' all that is left, with the file's values."""
        self._addition.add(path)
        of_layers = {key: (part.adapter, own) for part in _parts(self._model, "default") for own, key in part.keys.items()}
        others = _saved(self._model, "default")
        values = self._from_first(lambda: self._read(path, {*of_layers, *others} - self._set))
        self._set |= values.keys()
        for key, value in values.items():
            if key in others:
                others[key].data.copy_(value)
            else:
                adapter, own = of_layers[key]
                getattr(adapter, own).data.copy_(adapter.variant.from_file(own, value))

    def _read(self, path: str, keys: Set[str]) -> dict[str, Tensor]:
        stored = self._stored
        assert stored is not None, "on the first process"
        due = {key for key in self._extra if not path or key.startswith(f"{PREFIX}{path}.")}
        self._extra -= due
        try:
            other = {key for key in due if not _repeats_base(self._model, key, stored)}
            stored.check_fit(self._expected, stored.shapes.keys() - self._expected.keys() - other)
            return {key: stored.read(key) for key in keys & self._expected.keys()}
        except SafetensorError as error:
            raise AdapterError(f"'{stored.path}' is damaged: {error}. Copy or save it again.") from None

    def finish(self) -> None:
        """Check that the base is the adapter's, and make the adapter the active one."""
        self._addition.finish()
        self._from_first(self._check)
        if self._corrects:
            info(self._model).adapters.corrects["default"] = self._corrects

    def _check(self) -> None:
        assert self._stored is not None, "on the first process"
        _check_base(self._model, self._stored, False, "")


def _set_parted(part: _Part, stored: AdapterFile) -> tuple[Tensor, Tensor]:
    """Set A and B as trained; returns those at the start."""
    trained, start = parted(*(stored.read(part.keys[own]) for own in ("lora_A", "lora_B")))
    part.adapter.lora_A.data.copy_(trained[0])
    part.adapter.lora_B.data.copy_(trained[1])
    return start


def _check_base(model: nn.Module, stored: AdapterFile, any_base: bool, changed: str) -> None:
    own = info(model).changed_base
    if own is not None and changed != own:
        raise AdapterError(
            f"The base was changed by init_lora_weights='{own}' of another adapter, and '{stored.folder}' is of the one as it "
            "was. Load the model again."
        )
    if stored.trained_on is None:
        return
    base = base_facts(model) | ({"changed_base": changed} if changed else {})
    if (difference := other_weights(stored.trained_on, base)) and not any_base:
        raise AdapterError(
            f"'{stored.folder}' is an adapter of another base: {difference}. Take that one, or pass any_base=True."
        )
    if difference := other_codec(stored.trained_on, base):
        warnings.warn(f"'{stored.folder}': {difference}; its outputs will differ from those in training.", stacklevel=3)


def _repeats_base(model: nn.Module, key: str, stored: AdapterFile) -> bool:
    """Whether a stored tensor duplicates the base: PEFT adds the weights of adapted heads and of embeddings, and biases a second
    time."""
    if not _may_repeat_base(model, key, stored.shapes[key]):
        return False
    own = _of_base(model, key)
    if isinstance(own, PackedWeight):
        return _is_dense_weight(model, key, stored)
    return own is None or same_values(own.detach(), stored.read(key).to(own.device))


def _may_repeat_base(model: nn.Module, key: str, shape: torch.Size) -> bool:
    """The same by the key and the shape alone, where the base's values are not there yet."""
    if ".modules_to_save." in key or ".original_module." in key:
        return True
    own = _of_base(model, key)
    return own is not None and own.shape == shape


def _of_base(model: nn.Module, key: str) -> Tensor | PackedWeight | None:
    """The base's tensor that has a key's name, or None."""
    found: Any = model
    for part in key.removeprefix(PREFIX).replace(".base_layer.", ".").split("."):
        found = getattr(found, part, None)
        if isinstance(found, LoraLinear):
            found = found.base
        elif isinstance(found, TrainedCopy):
            found = found.original
    return found if isinstance(found, (Tensor, PackedWeight)) else None


def _is_dense_weight(model: nn.Module, key: str, stored: AdapterFile) -> bool:
    """Whether a stored tensor is the weight that a packed one was made of; where the checkpoint has it not, it is taken to be."""
    read, path = info(model).read_dense, key.removeprefix(PREFIX).replace(".base_layer.", ".").removesuffix(".weight")
    return read is None or isinstance(read, DenseOrigin) or same_values(read(path), stored.read(key))
