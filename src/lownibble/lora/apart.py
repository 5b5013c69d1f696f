"""Adapters in another layout than the model's.

**Names.** A file may have the names that the model's modules had in an earlier transformers (`language_model.model.layers`, now
`model.language_model.layers`); they are renamed as checkpoints' tensors are.

**Experts** may be stored one by one: `experts.3.gate_proj.lora_A.weight`, a pair of matrices for each expert's layer. That is how
adapters look that were trained before transformers fused experts, or by tools that keep experts as modules, and what vLLM and
SGLang read for most mixtures (docs/train.md). Which part of a fused weight a name stands for is asked of transformers'
own rules, which split a tensor of row numbers as they split the weight. Fused, gate and up have one A: that of the two below each
other, and B in blocks beside each other, as PEFT converts such files; apart, both have the fused A.

vLLM scales every layer by lora_alpha / r of adapter_config.json and knows no patterns (`lora/peft_helper.py`); PEFT gives fused
experts no rank or alpha of their own either. So what is written has one rank and one scale: B takes what a layer's own scale is
off it, and lower ranks are filled with zeros.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import conversion_mapping

from lownibble import tensorfile
from lownibble.config import LoraConfig
from lownibble.errors import AdapterError
from lownibble.lora.experts import ExpertsLoRA, file_paths
from lownibble.lora.inject import named_linears
from lownibble.lora.portable import CONFIG_FILE, PREFIX, TAKEN_FOR_EXPERTS, WEIGHTS_FILE
from lownibble.lora.provenance import to_metadata
from lownibble.lora.targets import match_experts, rank_of, scale_of, scaling
from lownibble.matching import by_pattern, fits
from lownibble.models import experts
from lownibble.models.conversion import names_in_model, stored_names

if TYPE_CHECKING:
    from lownibble.lora.adapter_file import AdapterFile

_T = TypeVar("_T")


@dataclass(frozen=True)
class Part:
    """What an expert's layer in a file is of a fused weight: some rows of one expert's matrix."""

    weight: str
    expert: int
    rows: Tensor


def parts(model: Any) -> dict[str, Part]:
    """Path of an expert's layer in a checkpoint -> its part, for the weights that checkpoints store expert by expert."""
    found: dict[str, Part] = {}
    for weight, (n_experts, n_out, _) in experts.shapes(model).items():
        container: Any = model.get_submodule(weight.rpartition(".")[0])
        numbers = torch.arange(n_experts * n_out).view(n_experts, n_out, 1)
        split = stored_names(model, {weight: numbers.transpose(1, 2) if container.is_transposed else numbers})
        for name, part in split.items():
            if part.numel() < numbers.numel():
                first = part.flatten()
                found[name.removesuffix(".weight")] = Part(weight, int(first[0]) // n_out, first % n_out)
    return found


def fitted(stored: AdapterFile, model: Any) -> AdapterFile:
    """The file under the model's names, and as one of fused experts if it has experts one by one and the model has them fused;
    the file itself if that is what it is.

    Raises:
        AdapterError: an expert lacks a tensor or has one of another shape (named), or experts differ in rank or scale.
    """
    stored = _renamed(stored, model)
    ends = tuple(f".{key}" for key in ExpertsLoRA.keys.values())
    held = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in stored.shapes if key.endswith(ends)}
    if not any(re.search(r"\.\d+\.[^.]+$", path) and ".experts." in path for path in held):
        return stored
    known = parts(model)
    fused: dict[str, dict[str, Part]] = {}
    for path in sorted(held & known.keys()):
        fused.setdefault(known[path].weight, {})[path] = known[path]
    if not fused:
        return stored
    made, shapes, ranks, alphas = dict(stored.made), dict(stored.shapes), dict[str, int](), dict[str, float]()
    paths = file_paths((), fused)
    for weight, those in fused.items():
        n_experts, n_out, n_in = experts.shapes(model)[weight]
        kinds = _kinds(stored, weight, those, n_experts, n_in)
        r = sum(kinds.values())
        scale = scale_of(next(iter(those)), stored.config)
        ranks[re.escape(weight)], alphas[re.escape(weight)] = r, scale * (math.sqrt(r) if stored.config.use_rslora else r)
        variant = ExpertsLoRA(n_experts)
        for own, shape in variant.shapes(n_in, n_out, r).items():
            key = f"{PREFIX}{paths[weight]}.{variant.keys[own]}"
            made[key] = partial(_fuse, stored, those, list(kinds), variant, own, shape)
            shapes[key] = variant.to_file(own, torch.empty(shape, device="meta")).shape
        for path in those:
            for key in variant.keys.values():
                shapes.pop(f"{PREFIX}{path}.{key}", None)
    result = copy.copy(stored)
    result.shapes, result.made, result.config = shapes, made, _config_of(stored, model, fused, ranks, alphas)
    return result


def _renamed(stored: AdapterFile, model: Any) -> AdapterFile:
    """The file with the names of layers that the model does not have as transformers renames them, if it has those."""
    modules = {path for path, _ in model.named_modules()}
    layer_of = {key: key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in stored.shapes}
    if not (unknown := {path for path in layer_of.values() if path} - modules):
        return stored
    found = {path: name for path, name in names_in_model(model, unknown).items() if name in modules}
    keys = {PREFIX + found[path] + key.removeprefix(PREFIX + path): key for key, path in layer_of.items() if path in found}
    if not keys:
        return stored
    result, config, targets = copy.copy(stored), stored.config, stored.config.target_modules
    result.config = config.with_options(
        target_modules=[found.get(name, name) for name in targets] if isinstance(targets, list) else targets,
        rank_pattern=_patterns(config.rank_pattern, found), alpha_pattern=_patterns(config.alpha_pattern, found),
    )  # fmt: skip
    result.made = {key: partial(stored.read, old) for key, old in keys.items()}
    result.shapes = {key: shape for key, shape in stored.shapes.items() if key not in keys.values()}
    result.shapes |= {key: stored.shapes[old] for key, old in keys.items()}
    return result


def _patterns(given: Mapping[str, _T], renamed: Mapping[str, str]) -> dict[str, _T]:
    """Patterns with a line for each renamed layer (earlier path -> path), without those that earlier paths alone match."""
    own = {re.escape(path): by_pattern(old, given, None) for old, path in renamed.items()}
    kept = {
        pattern: value for pattern, value in given.items()
        if any(fits(path, pattern) for path in renamed.values()) or not any(fits(old, pattern) for old in renamed)
    }  # fmt: skip
    return {path: value for path, value in own.items() if value is not None} | kept


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _kinds(stored: AdapterFile, weight: str, those: Mapping[str, Part], n_experts: int, n_in: int) -> dict[str, int]:
    """Last name of the layers of a fused weight -> their rank; the same for all experts."""
    ranks: dict[str, dict[int, tuple[int, float]]] = {}
    wrong: list[str] = []
    for path, part in those.items():
        r = rank_of(path, stored.config)
        ranks.setdefault(_name(path), {})[part.expert] = r, scale_of(path, stored.config)
        for own, key in ExpertsLoRA.keys.items():
            key = f"{PREFIX}{path}.{key}"
            wanted, found = (r, n_in) if own == "lora_A" else (len(part.rows), r), stored.shapes.get(key)
            if found is None:
                wrong.append(f"lacks '{key}'")
            elif tuple(found) != wanted:
                wrong.append(f"'{key}' has shape {tuple(found)}, not {wanted}")
    for name, of_expert in ranks.items():
        missing = sorted(set(range(n_experts)) - of_expert.keys())
        if missing:
            raise AdapterError(
                f"'{stored.path}' has '{name}' of {len(of_expert)} of the {n_experts} experts of '{weight}'; expert {missing[0]} "
                "lacks it. Load it on the base it was trained on."
            )
    if wrong:
        raise AdapterError(
            f"'{stored.path}' does not fit this model: {wrong[0]}{f'; and {len(wrong) - 1} more' * (len(wrong) > 1)}. Load it on "
            "the base it was trained on."
        )
    if len({scale for of_expert in ranks.values() for _, scale in of_expert.values()}) > 1 or any(
        len(set(of_expert.values())) > 1 for of_expert in ranks.values()
    ):
        raise AdapterError(
            f"'{stored.path}' has other ranks or scales for some experts of '{weight}', and this model holds all experts in one "
            "weight. Merge it with the tool that made it."
        )
    return {name: of_expert[0][0] for name, of_expert in ranks.items()}


def _fuse(
    stored: AdapterFile, those: Mapping[str, Part], kinds: list[str], variant: ExpertsLoRA, own: str, shape: tuple[int, ...]
) -> Tensor:
    """A or B of all experts, in the layout of PEFT's files."""
    fused, place = torch.zeros(shape), 0
    for name in kinds:
        of_kind = {path: part for path, part in those.items() if _name(path) == name}
        r = 0
        for path, part in of_kind.items():
            tensor = stored.read(f"{PREFIX}{path}.{variant.keys[own]}").float()
            r = len(tensor) if own == "lora_A" else tensor.shape[1]
            if own == "lora_A":
                fused[part.expert, place : place + r] = tensor
            else:
                fused[part.expert, part.rows, place : place + r] = tensor
        place += r
    return variant.to_file(own, fused)


def _linears(stored: AdapterFile, model: Any) -> set[str]:
    """Paths of the linear layers that the file adapts."""
    return {path for path in named_linears(model) if f"{PREFIX}{path}.lora_A.weight" in stored.shapes}


def _endings(paths: Iterable[str]) -> set[str]:
    """What in a list of `target_modules` would select one of the paths: the path, and whole names at its end."""
    return {ending for path in paths for ending in accumulate(reversed(path.split(".")), lambda end, name: f"{name}.{end}")}


def _config_of(
    stored: AdapterFile, model: Any, fused: Mapping[str, Mapping[str, Part]], ranks: dict[str, int], alphas: dict[str, float]
) -> LoraConfig:
    """The configuration with the fused weights as targets, and without patterns that were for experts alone."""
    config, adapted = stored.config, _linears(stored, model)
    matched = {path for those in fused.values() for path in those}
    targets = config.target_modules
    if isinstance(targets, list):
        for_experts = _endings(matched) - _endings(named_linears(model))
        targets = [name for name in targets if name not in for_experts]
    of_others = {
        option: {
            pattern: value for pattern, value in given.items()
            if pattern not in ranks
            and (any(fits(path, pattern) for path in adapted) or not any(fits(path, pattern) for path in matched))
        } for option, given in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
    }  # fmt: skip
    changed: LoraConfig = config.with_options(
        target_modules=targets, target_parameters=sorted({*config.target_parameters, *fused}),
        rank_pattern={**ranks, **of_others["rank_pattern"]}, alpha_pattern={**alphas, **of_others["alpha_pattern"]},
    )  # fmt: skip
    return changed


def split(stored: AdapterFile, model: Any, output: Path, *, needs_experts: bool = True) -> dict[str, Any]:
    """Write an adapter with its experts one by one, into the folder `output`; returns counts, and under "warning" what of the
    file PEFT would not read as it is meant, if anything.

    Args:
        model: the base, with or without values.
        needs_experts: refuse adapters without experts; else they are only given one rank and one scale.
    Raises:
        AdapterError: it adapts no experts, or only some layers' weights are stored expert by expert.
    """
    adapted = match_experts(experts.shapes(model), stored.config, of_file=True)
    of_weight: dict[str, dict[str, Part]] = {}
    known = parts(model)
    for path, part in known.items():
        of_weight.setdefault(part.weight, {})[path] = part
    fused = [weight for weight in adapted if weight not in of_weight]
    if fused or (needs_experts and not adapted):
        what = f"checkpoints of this model store '{fused[0]}' fused, and so do servers read it" if fused else "it has no experts"
        raise AdapterError(f"'{stored.folder}' cannot be written expert by expert: {what}. Use it as it is.")
    paths, config = file_paths((), adapted), json.loads((stored.folder / CONFIG_FILE).read_text())
    tensors = {key: partial(stored.read, key) for key in stored.shapes}
    entries = dict(stored.shapes)
    linears, written = _linears(stored, model), set[str]()
    shared = _Shared.of(stored.config, {*adapted, *linears})
    for path in linears:
        for own, key in ExpertsLoRA.keys.items():
            key = f"{PREFIX}{path}.{key}"
            entries[key] = shared.shape(own, stored.shapes[key])
            tensors[key] = partial(shared.fill, own, tensors[key], scale_of(path, stored.config))
    for weight in adapted:
        variant = ExpertsLoRA(experts.shapes(model)[weight][0])
        for own, key in variant.keys.items():
            whole = f"{PREFIX}{paths[weight]}.{key}"
            del tensors[whole], entries[whole]
            for path, part in of_weight[weight].items():
                written.add(path)
                cut = partial(_cut, stored, whole, variant, own, part)
                n_in = stored.shapes[whole][1]
                entries[f"{PREFIX}{path}.{key}"] = shared.shape(own, (shared.r, n_in) if own == "lora_A" else (len(part.rows),))
                tensors[f"{PREFIX}{path}.{key}"] = partial(shared.fill, own, cut, scale_of(weight, stored.config))
    paths_of_all = {*known, *(path for path, _ in model.named_modules())}
    config |= dict.fromkeys(("target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"))
    config["target_modules"] = _short(written | linears, paths_of_all)  # says all that these said
    config["init_lora_weights"] = True  # PEFT adapts the experts of other layers, too: B has to be zero there
    config |= {"r": shared.r, "lora_alpha": shared.alpha, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    output.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **(to_metadata(stored.trained_on) if stored.trained_on else {})}
    header = {key: tensorfile.Entry(torch.float32, tuple(shape)) for key, shape in sorted(entries.items())}
    tensorfile.write(output / WEIGHTS_FILE, header, ((key, 0, tensors[key]().float()) for key in header), metadata)
    (output / CONFIG_FILE).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    reasons = _unread_by_peft(model, adapted, linears) if adapted else []
    told = f"PEFT does not read this file as it is meant: {'; '.join(reasons)}. For PEFT, take '{stored.folder}' as it is."
    return {
        "tensors": len(header), "experts": sum(len(those) for those in of_weight.values()),
        **({"warning": told} if reasons else {}),
    }  # fmt: skip


@dataclass(frozen=True)
class _Shared:
    """The rank and lora_alpha, a whole number, of all layers of a file."""

    r: int
    alpha: int

    @classmethod
    def of(cls, config: LoraConfig, paths: Iterable[str]) -> _Shared:
        """The highest rank of the layers at `paths`, and the alpha that keeps the scale of the first where it can."""
        r = max(rank_of(path, config) for path in paths)
        return cls(r, max(1, round(scaling(config.r, config.lora_alpha, config.use_rslora) * r)))

    def shape(self, own: str, shape: Sequence[int]) -> torch.Size:
        """The shape of a layer's A or B."""
        return torch.Size((self.r, *shape[1:]) if own == "lora_A" else (shape[0], self.r))

    def fill(self, own: str, read: Callable[[], Tensor], scale: float) -> Tensor:
        """A layer's A or B, which had the scale `scale`."""
        tensor = read().float()
        if own == "lora_A":
            return nn.functional.pad(tensor, (0, 0, 0, self.r - len(tensor)))
        return nn.functional.pad(tensor * (scale * self.r / self.alpha), (0, self.r - tensor.shape[1]))


def _unread_by_peft(model: Any, adapted: list[str], linears: set[str]) -> list[str]:
    """Why PEFT (0.21: `transformers_weight_conversion.py`) would not fuse the experts of a file, or lose other layers.

    Args:
        adapted: experts' weights. linears: linear layers.
    """
    kind, fused_as = model.config.model_type, getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    mistaken = sorted({_name(path) for path in linears} & set(TAKEN_FOR_EXPERTS))
    return [
        why
        for found, why in (
            (kind != "mixtral" and fused_as.get(kind) not in ("mixtral", "qwen2_moe"), f"it does not fuse the experts of {kind}"),
            (mistaken, f"it takes linear layers called {', '.join(mistaken)} for experts'"),
            ({_name(weight) for weight in adapted} == {"gate_up_proj"}, "it wants down adapted beside gate and up"),
        ) if found
    ]  # fmt: skip


def _short(paths: set[str], candidates: set[str]) -> list[str]:
    """`paths` by their last names if those select no other candidate, else whole."""
    names = {_name(path) for path in paths}
    return sorted(names if {path for path in candidates if _name(path) in names} == paths else paths)


def _cut(stored: AdapterFile, key: str, variant: ExpertsLoRA, own: str, part: Part) -> Tensor:
    matrix = variant.from_file(own, stored.read(key))[part.expert]
    return matrix.contiguous() if own == "lora_A" else matrix[part.rows].contiguous()
