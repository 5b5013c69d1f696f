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
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lownibble import tensorfile
from lownibble.errors import OutputError
from lownibble.optim import plain_name, states, warmup_steps
from lownibble.tensorfile import Entry

KEEP = 2
CHECKPOINTS = "checkpoints"
"""Folder below the output folder."""

_FREE = {
    "output_dir",
    "resume",
    "save_steps",
    "eval_steps",
    "optim_page_budget",
    "memory_budget",
    "cuda_graphs",
    "deterministic",
    "compute",
    "head_compute",
    "tokens",
}
"""Options that may change on resume."""


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], fit: dict[str, Any]
) -> Path:  # fmt: skip
    """Write the checkpoint of `step` below `folder`; returns its path. `config` and `fit`: see `Facts`."""
    trained = _trained(model)
    entries = {f"model/{name}": Entry(p.dtype, tuple(p.shape)) for name, p in trained.items()}
    for name, parameter in trained.items():
        for key, (dtype, shape) in states.shapes(optimizer, parameter).items():
            entries[f"optimizer/{key}/{name}"] = Entry(dtype, shape)
    final = folder / f"step-{step:06d}"
    aside = folder / f".step-{step:06d}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensorfile.write(aside / "state.safetensors", entries, _parts(trained, optimizer))
    state = {"step": step, "config": config, "fit": fit, "tensors": _digest(aside / "state.safetensors")}
    (aside / "state.json").write_text(json.dumps({**state, "self": _own_digest(state)}, indent=2, sort_keys=True) + "\n")
    for file in aside.iterdir():
        sync(file)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    sync(folder)
    for old in complete(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def _parts(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (name in the file, offset, values) of everything in a checkpoint."""
    for name, parameter in trained.items():
        yield f"model/{name}", 0, parameter.detach()
    names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
    for owner, key, first, values in states.parts(optimizer):
        yield f"optimizer/{key}/{names[owner]}", first, values


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


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


def restore(found: Facts, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
    """Restore parameters and optimiser states from a checkpoint, in place.

    Raises:
        OutputError: it cannot be read, or belongs to a run with other options (named).
    """
    path = found.path
    try:
        with tensorfile.Reader(path / "state.safetensors") as file:
            _check(found, model, config, file)
            _fill(file, _trained(model), optimizer)
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(f"Checkpoint '{path}' cannot be read: {error}. Delete it to resume from the one before.") from None


def changed(found: Facts, config: dict[str, Any]) -> list[str]:
    """Warnings about what changed since the checkpoint and is allowed: the matmul precision, and the rows' tokens."""
    told = []
    if found.config.get("tokens") not in (None, config.get("tokens")):
        told.append(
            "the rows have other tokens or labels than when the run began: the tokenizer, its chat template or a date in it "
            "has changed; steps from here on are trained on the new ones"
        )
    return told + [
        f"the run started with {what} in compute '{before}' and resumes with '{config.get(key)}'"
        for key, what in (("compute", "the frozen base"), ("head_compute", "the head"))
        if (before := found.config.get(key)) and before != config.get(key)
    ]


def _check(found: Facts, model: nn.Module, config: dict[str, Any], file: tensorfile.Reader) -> None:
    """Reject a checkpoint of a run with other options or trained tensors."""
    path, ours, theirs = found.path, _flat(config), _flat(found.config)
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
    if held != {name: (p.dtype, tuple(p.shape)) for name, p in _trained(model).items()}:
        raise OutputError(f"'{path}' holds other trained tensors than this model. Resume with the same model and adapter.")


def _differ(key: str, ours: Any, theirs: Any) -> bool:
    if key == "total_steps":
        return theirs is not None and bool(ours != theirs)  # older checkpoints do not record it
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


def _fill(file: tensorfile.Reader, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Load the file's tensors into the parameters and the optimiser."""
    held: dict[str, dict[str, states.Shape]] = {name: {} for name in trained}
    for entry_name, entry in file.entries.items():
        kind, _, rest = entry_name.partition("/")
        if kind == "optimizer":
            key, _, name = rest.partition("/")
            held[name][key] = entry.dtype, entry.shape
    for name, parameter in trained.items():
        file.read_into(f"model/{name}", 0, parameter.detach())
        increment_version(parameter)
        if held[name]:
            states.allocate(optimizer, parameter, held[name])
    names: dict[Tensor, str] = {parameter: name for name, parameter in trained.items()}
    for owner, key, first, values in states.parts(optimizer, change=True):
        file.read_into(f"optimizer/{key}/{names[owner]}", first, values)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
