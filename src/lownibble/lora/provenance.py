"""Provenance of adapters: the base an adapter was trained on, and whether the current base matches.

An adapter fits one base: the weights it was trained with and, for QLoRA, their exact quantisation. Other libraries store at most
a model name, the origin of reports of erased and degraded fine-tunes. `save_adapter` writes the base's facts into the adapter's
safetensors metadata, where they travel with the weights and other libraries ignore them:

    model, revision   name and revision of the base
    digest            of its weights (`models.checkpoint`); None if the model was not loaded with `lownibble.load`
    changed_base      name of the initialisation that changed the base's weights; absent if none did
    took_out          whether it took the start out: the adapter's file then holds [A; A0] and [B, -B0], A0 and B0 the start, as
                      PEFT converts such adapters, which fit the base as it was
    corrects          name of the initialisation that starts at what packing lost; absent for others
    quant             None for a dense base, else how it is packed: quant_type, block_size, double_quant, compute, skip_modules,
                      and pattern if layers differ. The skip_modules of a record are ends of dense layers' paths (`as_option`)
    merge_aware       how the merged model is packed, for an adapter that was trained so (`merge_aware.py`); absent otherwise
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lownibble.config import PER_LAYER, QuantConfig
from lownibble.lora.layer import LoraLinear, TrainedCopy
from lownibble.lora.merge_aware import facts_of
from lownibble.matching import names
from lownibble.models.experts import expert_weights
from lownibble.models.experts import shapes as expert_shapes
from lownibble.models.info import info
from lownibble.models.packed import config_of
from lownibble.quant import QuantLinear, is_linear
from lownibble.stored import TRAINED_ON

Facts = Mapping[str, Any]


def base_facts(model: nn.Module) -> dict[str, Any]:
    """Facts that identify `model` as a base for adapters."""
    name, known = getattr(getattr(model, "config", None), "_name_or_path", None) or None, info(model)
    changed = {"changed_base": known.changed_base} if known.changed_base else {}
    leaves = {"merge_aware": facts_of(known.merge_aware)} if known.merge_aware else {}
    return {"model": name, "revision": None, "digest": None, **known.base, "quant": _codec(model), **changed, **leaves}


def _codec(model: nn.Module) -> dict[str, Any] | None:
    linears = dict(_linears(model))
    packed = {path: module for path, module in linears.items() if isinstance(module, QuantLinear)}
    if not packed:
        return None
    config = config_of({path: module.weight for path, module in packed.items()}, [])
    held = {path: getattr(each, "base", each) for path, each in expert_weights(model).items()}
    dense = {*linears, *(path for path, each in held.items() if not isinstance(each, QuantLinear))} - packed.keys()
    of_packed = {path.rpartition(".")[2] for path in packed}
    last_names = {path: path.rpartition(".")[2] for path in dense}
    skipped = {path if last in of_packed else last for path, last in last_names.items()}
    return {
        "quant_type": config.quant_type, "block_size": config.block_size, "double_quant": config.double_quant,
        "compute": next(iter(packed.values())).compute, "skip_modules": sorted(skipped),
        **({"pattern": config.pattern} if config.pattern else {}),
    }  # fmt: skip


def as_option(recorded: QuantConfig, model: nn.Module) -> QuantConfig:
    """The configuration that packs the layers of `model`, the bare base, which a record of it says are packed.

    Its skip_modules are the last names of dense layers, or their paths. As an option they would match anywhere in a path: the '0'
    of a dense `projections.0` all of `layers.0`.
    """
    paths = [*(path for path, _ in _linears(model)), *expert_shapes(model)]
    dense = {entry: [path for path in paths if names(path, [entry])] or [entry] for entry in recorded.skip_modules}
    return recorded.with_options(skip_modules=sorted({path for found in dense.values() for path in found}))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of every linear layer of the model without adapters."""
    wrappers: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(wrapper) for wrapper in wrappers):
            continue
        inner = module.base if isinstance(module, LoraLinear) else module.original if isinstance(module, TrainedCopy) else module
        if inner is not module:
            wrappers.append(f"{path}.")
        if is_linear(inner) or isinstance(inner, QuantLinear):
            yield path, inner


def to_metadata(facts: Facts) -> dict[str, str]:
    """The facts as safetensors metadata."""
    return {TRAINED_ON: json.dumps(dict(facts), sort_keys=True)}


def from_metadata(metadata: Mapping[str, str] | None) -> dict[str, Any] | None:
    """The facts in a file's metadata, or None if they are missing or invalid."""
    try:
        facts = json.loads((metadata or {})[TRAINED_ON])
    except (KeyError, ValueError):
        return None
    if not isinstance(facts, dict) or not {"model", "digest", "quant"} <= facts.keys():
        return None
    quant, digest = facts["quant"], facts["digest"]
    is_codec = quant is None or (isinstance(quant, dict) and {"quant_type", "block_size", "double_quant"} <= quant.keys())
    return facts if is_codec and (digest is None or isinstance(digest, str)) else None


def other_weights(trained_on: Facts, base: Facts) -> str | None:
    """Why the base's weights are known to differ from those trained on, or None.

    What an initialisation took out of dense weights, the adapter's file takes out too; packed weights were packed without it.
    """
    name = trained_on.get("changed_base")
    fits = trained_on.get("took_out") and not (trained_on["quant"] and base.get("quant"))
    if name and not fits and base.get("changed_base") != name:
        return f"it was started with init_lora_weights='{name}', which changed the packed weights under it"
    if trained_on["digest"] is None or base["digest"] in (None, trained_on["digest"]):
        return None
    revision = f" at revision {trained_on['revision']}" if trained_on.get("revision") else ""
    return (
        f"it was trained on '{trained_on['model']}'{revision} (weights {trained_on['digest'][:12]}), "
        f"and this is '{base['model']}' (weights {base['digest'][:12]})"
    )


def other_codec(trained_on: Facts, base: Facts) -> str | None:
    """How the base's storage differs from that in training, or None; the matmul precision (`compute`) is ignored."""
    leaves = trained_on.get("merge_aware")
    if leaves and base.get("merge_aware") != leaves:
        return f"it was trained merge-aware, for a model packed as {describe(leaves)} with the adapter merged: merge it first"
    if _stored(base["quant"]) == _stored(trained_on["quant"]):
        return None
    ours, theirs = (describe(facts["quant"]) for facts in (base, trained_on))
    name = trained_on.get("corrects")
    corrects = f" (its start by '{name}' makes up for what packing lost there)" if name else ""
    return f"it was trained on {theirs} weights{corrects}, and these are {ours}"


def _stored(quant: Mapping[str, Any] | None) -> Any:
    """The part of the facts that defines how weights are stored."""
    return quant and [quant[key] for key in PER_LAYER] + [quant.get("pattern") or {}]


def describe(quant: Mapping[str, Any] | None) -> str:
    """How a base is stored, in words: 'dense', 'nf4/64 double-quantised', 'nf4/64 with down_proj in int8/64'."""
    if quant is None:
        return "dense"
    said = f"{quant['quant_type']}/{quant['block_size']}{' double-quantised' if quant['double_quant'] else ''}"
    others = [f"{key} in {how['quant_type']}/{how['block_size']}" for key, how in (quant.get("pattern") or {}).items()]
    return f"{said} with {', '.join(others[:4])}{', ...' * (len(others) > 4)}" if others else said
