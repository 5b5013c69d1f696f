"""The reference model's log-probabilities, computed once before the first step.

The reference is the policy as it begins: the base, where the adapter begins without effect (it is then switched off for the
pass), else the base with the adapter's start (`--adapter`, starts that correct or change the base, merge-aware training, full
fine-tuning). Computed before the first step, that takes no second model.

Only rows that the run will see are run, each once, in batches of like length without gradients: never more work than with each
step, which sees a row once an epoch and at each evaluation. So 'auto' is always 'before'. With each step
(`precompute_ref_log_probs=False`) there is no wait before the first one, and it must be possible to switch the adapter off.

The figures are kept in `reference.safetensors` in the output folder, with a digest of what determines them: the rows' tokens, the
base, how it is held and computed with, and the adapter's start. A resumed run takes them from there; where the file is gone they
are computed again, from the model as it begins, before the checkpoint is restored.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lownibble.data import Example, PreferenceBatch, cut
from lownibble.errors import ConfigError, TrainingError
from lownibble.lora.active import active_adapter, lora_layers
from lownibble.lora.layer import LoraLinear
from lownibble.lora.merge_aware import MergeAware
from lownibble.models.info import info
from lownibble.training.distributed import Ranks
from lownibble.training.microbatches import Collate, MicroBatches
from lownibble.training.passes import Passes
from lownibble.training.preference import Preferences

FILE = "reference.safetensors"


def starts_at_base(model: Any) -> bool:
    """Whether the model with its adapter, as it is now, computes what it does with the adapter off."""
    name, known = active_adapter(model), info(model)
    if name is None or known.changed_base or known.merge_aware is not None or known.started_from:
        return False
    layers: list[LoraLinear] = [layer for _, layer in lora_layers(model, name)]
    plain = not any(isinstance(layer.adapter(name).variant, MergeAware) for layer in layers)
    return plain and not any(bool(layer.adapter(name).lora_B.any()) for layer in layers)


def check_steps(model: Any) -> None:
    """Check that the reference can be computed with each step.

    Raises:
        ConfigError: switching the adapter off does not give it.
    """
    if not starts_at_base(model):
        raise ConfigError(
            "The 'precompute_ref_log_probs' of TrainConfig cannot be false here: the run does not begin at what the model is "
            "with its adapter off (full fine-tuning, an adapter that is trained on, merge_aware, or a start that corrects or "
            "changes the base). Leave it out."
        )


def before(
    objective: Preferences, passes: Passes, micro: MicroBatches, evaluation: list[Example], collate: Collate,
    limits: Callable[[], tuple[int, int | None]], total_steps: int, identity: dict[str, Any], folder: Path | None, ranks: Ranks,
    before_pass: Callable[[], None], resumed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Set the reference of all rows that the run will see; call it while the model is as it begins.

    Args:
        evaluation: held-out rows, all of which are seen. limits: rows and tokens of a forward pass at most.
        identity: what of the run determines the figures. folder: where they are kept; None: nowhere.
        resumed: the run goes on from a checkpoint, which is not restored yet.
    Returns:
        facts for the record.
    Raises:
        TrainingError: the model given to a resumed run is trained already.
    """
    began, model = time.perf_counter(), passes.model
    off = starts_at_base(model)
    if ranks.from_first(lambda: resumed and not off and folder is not None and _is_of_base(folder)):
        raise TrainingError(
            "The adapter of the model given is trained already, and the run's reference is the model without it. Load the model "
            "again, then resume."
        )
    key = _key(objective, {**identity, "off": off}, model)
    sides = {"train": micro.rows, "eval": evaluation}
    kept = _read(folder, key, sides) if folder and ranks.is_first else 0
    if ranks.several and (found := ranks.from_first(lambda: _values(sides))):
        _take(sides, found)
    seen = _seen(micro, total_steps)
    missing = [row for row in (*seen, *evaluation) if row.beside.reference is None]
    tokens = sum(len(row.input_ids) for row in missing)
    if missing:
        _compute(objective, passes, missing, collate, limits, off, ranks, before_pass)
        if folder and ranks.is_first:
            _write(folder, key, off, sides)
    return {
        "computed": "before", "adapter": "off" if off else "as it begins", "rows": len(missing), "kept_rows": kept,
        "tokens": tokens, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def _seen(micro: MicroBatches, total_steps: int) -> list[Example]:
    """The rows that the run's steps have, on all ranks, in the order of the data."""
    whole = MicroBatches(micro.rows, micro.config, micro.collate)
    left, seen = {id(row.beside) for row in micro.rows}, set[int]()
    for step in islice(whole.steps(), total_steps):
        seen |= {id(row.beside) for batch in step for row in batch}
        if seen == left:
            break
    return [row for row in micro.rows if id(row.beside) in seen]


def _compute(
    objective: Preferences, passes: Passes, rows: list[Example], collate: Collate,
    limits: Callable[[], tuple[int, int | None]], off: bool, ranks: Ranks, before_pass: Callable[[], None],
) -> None:  # fmt: skip
    most, max_tokens = limits()
    batches = cut([len(row.input_ids) for row in rows], max_tokens, most=most)
    mine = batches[ranks.rank :: ranks.world]

    def run() -> list[tuple[list[int], list[tuple[float, float]]]]:
        found = []
        for indices in mine:
            before_pass()
            batch = collate([rows[i] for i in indices])
            assert isinstance(batch, PreferenceBatch)
            objective.refer(batch, passes, off=off)
            assert batch.reference is not None
            found.append((indices, [(one, other) for one, other in batch.reference.tolist()]))
        return found

    for found in ranks.of_all(ranks.together(run)):
        for indices, values in found:
            for index, pair in zip(indices, values, strict=True):
                rows[index].beside.reference = pair


def _key(objective: Preferences, identity: dict[str, Any], model: Any) -> str:
    own = {"objective": objective.name, "batch_size": objective.config.batch_size} if not objective.pairs else {}
    what = {**identity, **own, "dtype": str(model.dtype), "base": info(model).base}
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


Sides = dict[str, list[Example]]


def _values(sides: Sides) -> dict[str, list[tuple[float, float]]]:
    missing = (math.nan, math.nan)
    return {name: [row.beside.reference or missing for row in rows] for name, rows in sides.items()}


def _take(sides: Sides, values: dict[str, list[tuple[float, float]]]) -> int:
    """Set the references that are known; returns their number."""
    count = 0
    for name, rows in sides.items():
        for row, (one, other) in zip(rows, values[name], strict=True):
            if not math.isnan(one):
                row.beside.reference = (one, other)
                count += 1
    return count


def _read(folder: Path, key: str, sides: Sides) -> int:
    """Take the references from the file, if it is of this run; returns how many."""
    path = folder / FILE
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            if (file.metadata() or {}).get("key") != key:
                return 0
            values: dict[str, Tensor] = {name: file.get_tensor(name) for name in sides}
    except (OSError, SafetensorError):  # not there, or cut short: computed again
        return 0
    return _take(sides, {name: [(one, other) for one, other in tensor.tolist()] for name, tensor in values.items()})


def _is_of_base(folder: Path) -> bool:
    """Whether the references kept are those with the adapter off."""
    try:
        with safe_open(folder / FILE, "pt") as file:  # type: ignore[no-untyped-call]
            return bool((file.metadata() or {}).get("adapter") == "off")
    except (OSError, SafetensorError):
        return False


def _write(folder: Path, key: str, off: bool, sides: Sides) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{FILE}.part"
    tensors = {name: torch.tensor(rows, dtype=torch.float32) for name, rows in _values(sides).items()}
    save_file(tensors, aside, {"key": key, "adapter": "off" if off else "as it begins"})
    aside.rename(folder / FILE)
