"""Checkpoints of a run: trainable tensors, optimiser states and the step, in safetensors and JSON.

A checkpoint is a folder `checkpoints/step-NNNNNN`, written under a temporary name, synced and renamed, so a folder with the
final name is complete. `state.json` has checksums of the tensors and of itself; a checkpoint that was damaged later is skipped
for the previous one. Data order, schedule and dropout are functions of (seed, step), so the step number is all the state they
need. Resuming with the same matmul precision is bit-identical to an uninterrupted run. The newest two checkpoints are kept.

Tensors are written and read part by part (`tensorfile.py`), the states of a paged optimiser page by page, so a checkpoint needs
almost no extra memory. It does not record whether the states were paged: paged and unpaged runs can resume each other's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lownibble import tensorfile
from lownibble.errors import OutputError
from lownibble.optim import plain_name, states, warmup_steps
from lownibble.tensorfile import Entry
from lownibble.training.distributed import ALONE, Ranks
from lownibble.training.sharding import Part

Held = Mapping[str, Part]
"""Name -> what this rank holds of each trained tensor (`sharding.parts`)."""

Parts = Iterator[tuple[str, int, Tensor]]
"""(name in the file, index of the first value, values)."""

KEEP = 2
CHECKPOINTS = "checkpoints"
"""Folder below the output folder."""

_FREE = {
    "parallel",
    "fsdp_cpu_offload",
    "output_dir",
    "report_to",
    "resume",
    "save_steps",
    "eval_steps",
    "optim_page_budget",
    "memory_budget",
    "cuda_graphs",
    "deterministic",
    "compute",
    "head_compute",
    "dtype",
    "tokens",
}
"""Options that may change on resume."""

_LATER = {"total_steps", "weights", "double_quant", "skip_modules", "pattern"}
"""Options compared where both are known: older checkpoints record none of them, and weights are known of `load`'s models."""


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Facts:
    """An intact checkpoint: its path, its step, the options that a resumed run must match, and its memory fit."""

    path: Path
    step: int
    config: dict[str, Any]
    fit: dict[str, Any]


def save(
    folder: Path, step: int, held: Held, optimizer: torch.optim.Optimizer, config: dict[str, Any], fit: dict[str, Any],
    ranks: Ranks = ALONE,
) -> Path:  # fmt: skip
    """Write the checkpoint of `step` below `folder`; returns its path. `config` and `fit`: see `Facts`.

    The file is the same for any number of ranks: the first one writes all, and the others send it their shards.
    """
    entries = _entries(held, optimizer)
    if ranks.sharded:
        for others in ranks.of_all(entries):
            entries |= others
    final = folder / f"step-{step:06d}"
    if not ranks.is_first:
        if ranks.sharded:
            for name, first, values in _parts(held, optimizer, shards_only=True):
                ranks.send((name, first), values)
            ranks.send(None)
        return final
    return _write(folder, step, entries, _all_parts(held, optimizer, ranks), {"step": step, "config": config, "fit": fit})


def _entries(held: Held, optimizer: torch.optim.Optimizer) -> dict[str, Entry]:
    """Dtype and shape of each tensor of a checkpoint of which this rank holds a part."""
    entries = {f"model/{name}": Entry(part.parameter.dtype, part.shape) for name, part in held.items()}
    for name, part in held.items():
        for key, (dtype, shape) in states.shapes(optimizer, part.parameter).items():
            entries[f"optimizer/{key}/{name}"] = Entry(dtype, _of(part.shape, key, shape, tuple(part.parameter.shape)))
    return entries


def _of(size: tuple[int, ...], key: str, shape: tuple[int, ...], of: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a state for a part or whole of `size`, where it has `shape` for one of the size `of`."""
    per = states.elements_per_value(key)
    if per > 1:
        return (-(-math.prod(size) // per),)
    return size if shape == of else shape


def _write(folder: Path, step: int, entries: dict[str, Entry], parts: Parts, state: dict[str, Any]) -> Path:
    final = folder / f"step-{step:06d}"
    aside = folder / f".step-{step:06d}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensorfile.write(aside / "state.safetensors", entries, parts)
    state = {**state, "tensors": _digest(aside / "state.safetensors")}
    (aside / "state.json").write_text(json.dumps({**state, "self": _own_digest(state)}, indent=2, sort_keys=True) + "\n")
    for file in aside.iterdir():
        sync(file)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    sync(folder)
    found = complete(folder)
    n = found.index(final) + 1
    for old in [*found[: max(0, n - KEEP)], *found[n:]]:  # later ones are damaged: the run began with one before them
        shutil.rmtree(old)
    return final


def _parts(held: Held, optimizer: torch.optim.Optimizer, *, shards_only: bool = False, change: bool = False) -> Parts:
    """Yield (name in the file, offset, values) of everything in a checkpoint that this rank holds, or of what no other holds.

    change: whether the caller writes into the values.
    """
    names: dict[Tensor, str] = {part.parameter: name for name, part in held.items()}
    for name, part in held.items():
        if part.is_shard or not shards_only:
            yield f"model/{name}", part.first, part.parameter.detach()
            if change:
                increment_version(part.parameter)
    for owner, key, first, values in states.parts(optimizer, change=change):
        part = held[names[owner]]
        is_one = values.numel() == 1 and key == "step"  # the count of steps is every rank's
        if (part.is_shard and not is_one) or not shards_only:
            before = 0 if is_one else part.first // states.elements_per_value(key)
            yield f"optimizer/{key}/{names[owner]}", before + first, values


def _all_parts(held: Held, optimizer: torch.optim.Optimizer, ranks: Ranks) -> Parts:
    """The parts of all ranks, on the first."""
    yield from _parts(held, optimizer)
    for rank in range(1, ranks.world if ranks.sharded else 1):
        while (received := ranks.receive(rank))[0] is not None:
            (name, first), values = received
            assert values is not None
            yield name, first, values


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Facts:
    """Read and verify a checkpoint's `state.json` and checksums.

    Raises:
        ValueError: it is damaged (says how).
    """
    try:
        state = json.loads((path / "state.json").read_text())
        own = state.pop("self")
        if own != _own_digest(state):
            raise ValueError("state.json has changed since it was written")
        if _digest(path / "state.safetensors") != state["tensors"]:
            raise ValueError("state.safetensors has changed since it was written")
        return Facts(path, int(state["step"]), state["config"], state.get("fit", {}))
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def newest_for(folder: Path, ranks: Ranks) -> tuple[Facts | None, list[str]]:
    """`newest`, as the first rank finds it."""
    return ranks.from_first(lambda: newest(folder))


def newest(folder: Path) -> tuple[Facts | None, list[str]]:
    """The newest intact checkpoint below `folder` (None if there are no checkpoints), and what is wrong with newer ones.

    Raises:
        OutputError: all checkpoints are damaged.
    """
    damaged: list[str] = []
    for path in reversed(complete(folder)):
        try:
            return _read(path), damaged
        except ValueError as error:
            damaged.append(f"checkpoint '{path}' is damaged ({error})")
    if damaged:
        raise OutputError(f"There is no whole checkpoint to resume from: {'; '.join(damaged)}. Start again with a new --output.")
    return None, []


def restore(
    found: Facts, held: Held, optimizer: torch.optim.Optimizer, config: dict[str, Any], ranks: Ranks = ALONE
) -> None:  # fmt: skip
    """Restore parameters and optimiser states from a checkpoint, in place. The first rank reads for all.

    Raises:
        OutputError: it cannot be read, or belongs to a run with other options (named).
    """
    shapes = {name: (part.parameter.dtype, part.shape) for name, part in held.items()}
    if ranks.sharded:
        for others in ranks.of_all(shapes):
            shapes |= others
    entries = ranks.from_first(lambda: _readable(found, shapes, config))
    _allocate(entries, held, optimizer)
    if not ranks.is_first:
        for name, first, values in _parts(held, optimizer, change=True):
            ranks.send((name, first, values.dtype, values.numel()))
            _, sent = ranks.receive()
            assert sent is not None
            values.copy_(sent.view_as(values))
        ranks.send(None)
        return
    with _reading(found.path) as file:
        for name, first, values in _parts(held, optimizer, change=True):
            file.read_into(name, first, values)
        for rank in range(1, ranks.world):
            while (asked := ranks.receive(rank)[0]) is not None:
                name, first, dtype, count = asked
                values = torch.empty(count, dtype=dtype)
                file.read_into(name, first, values)
                ranks.send(name, values, rank)


@contextmanager
def _reading(path: Path) -> Iterator[tensorfile.Reader]:
    try:
        with tensorfile.Reader(path / "state.safetensors") as file:
            yield file
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(f"Checkpoint '{path}' cannot be read: {error}. Delete it to resume from the one before.") from None


def _readable(found: Facts, shapes: dict[str, states.Shape], config: dict[str, Any]) -> dict[str, Entry]:
    """The entries of a checkpoint that this run can resume from."""
    with _reading(found.path) as file:
        _check(found, shapes, config, file)
        return file.entries


def changed(found: Facts, config: dict[str, Any]) -> list[str]:
    """Warnings about what changed since the checkpoint and is allowed: dtype and matmul precision, and the rows' tokens."""
    told = []
    if found.config.get("tokens") not in (None, config.get("tokens")):
        told.append(
            "the rows have other tokens or labels than when the run began: the tokenizer, its chat template or a date in it "
            "has changed; steps from here on are trained on the new ones"
        )
    return told + [
        f"the run started with {what} '{before}' and resumes with '{config.get(key)}'"
        for key, what in (
            ("dtype", "the model in"),
            ("compute", "the frozen base in compute"),
            ("head_compute", "the head in compute"),
        )
        if (before := found.config.get(key)) and before != config.get(key)
    ]


def _check(found: Facts, shapes: dict[str, states.Shape], config: dict[str, Any], file: tensorfile.Reader) -> None:
    """Reject a checkpoint of a run with other options or trained tensors."""
    path, ours, theirs = found.path, flat(config), flat(found.config)
    free = _may_go_on_longer(found, ours, theirs)
    differing = sorted(k for k in ours.keys() | theirs.keys() if k not in free and _differ(k, ours.get(k), theirs.get(k)))
    if differing:
        changes = ", ".join(f"{key}: {theirs.get(key)!r} -> {ours.get(key)!r}" for key in differing[:5])
        more = " Only a run with lr_scheduler_type='constant' can be given more steps, after its warm-up." * (
            set(differing) <= {"train.max_steps", "train.num_train_epochs", "total_steps"}
        )
        raise OutputError(
            f"'{path}' was made with other options ({changes}). Resume with the same ones, or use a new --output.{more}"
        )
    held = {name.removeprefix("model/"): (e.dtype, e.shape) for name, e in file.entries.items() if name.startswith("model/")}
    if held != shapes:
        raise OutputError(f"'{path}' holds other trained tensors than this model. Resume with the same model and adapter.")


def _differ(key: str, ours: Any, theirs: Any) -> bool:
    if key in _LATER:
        return None not in (ours, theirs) and bool(ours != theirs)
    if key == "train.optim" and ours and theirs:
        return plain_name(ours) != plain_name(theirs)
    return bool(ours != theirs and key.split(".")[-1] not in _FREE)


def _may_go_on_longer(found: Facts, ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    """Run-length options that may change on resume: all of them with a constant learning rate, once both warm-ups have ended;
    otherwise none, since the rates of past steps depend on the number of steps."""
    length = {"train.max_steps", "train.num_train_epochs"}
    if ours.get("train.lr_scheduler_type") != "constant" or theirs.get("train.lr_scheduler_type") != "constant":
        return set()
    totals = [config["total_steps"] for config in (ours, theirs) if config.get("total_steps")]
    if len(totals) < 2 or any(found.step < warmup_steps(n, ours["train.warmup_ratio"]) for n in totals):
        return set()
    return {*length, "total_steps"}


def _allocate(entries: dict[str, Entry], held: Held, optimizer: torch.optim.Optimizer) -> None:
    """Allocate the optimiser states that a checkpoint has."""
    stored: dict[str, dict[str, states.Shape]] = {}
    for entry_name, entry in entries.items():
        kind, _, rest = entry_name.partition("/")
        if kind == "optimizer":
            key, _, name = rest.partition("/")
            if name in held:
                shape = _of(tuple(held[name].parameter.shape), key, entry.shape, held[name].shape)
                stored.setdefault(name, {})[key] = entry.dtype, shape
    for name, part in held.items():
        if name in stored:
            states.allocate(optimizer, part.parameter, stored[name])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted name."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
