"""Checkpoints of a run: trainable tensors, optimiser states and the position, in safetensors and JSON.

A checkpoint is a folder `checkpoints/step-NNNNNN`, written under another name, synced and renamed, so that a folder of that name
is complete. A disk may damage it later: `state.json` has a checksum of the tensors and of itself, and a damaged checkpoint is
passed over for the one before. Data order, schedule and dropout are functions of (seed, step), so the step number is all the
state they need, and a resumed run gives the same bits as one that was never interrupted. The newest two are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lownibble.errors import OutputError

KEEP = 2
_FREE = {"output_dir", "resume", "save_steps", "eval_steps"}
"""Training options that may differ between a run and its resumption."""


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sync(path: Path) -> None:
    """Make a file's or folder's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` below `folder`; returns its path. `config` is what a resumption must agree with."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{key}/{name}"] = value
    final = folder / f"step-{step:06d}"
    aside = folder / f".step-{step:06d}.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, aside / "state.safetensors")
    state = {"step": step, "config": config, "tensors": _digest(aside / "state.safetensors")}
    (aside / "state.json").write_text(json.dumps({**state, "self": _own_digest(state)}, indent=2, sort_keys=True) + "\n")
    for file in aside.iterdir():
        sync(file)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    sync(folder)
    for old in complete(folder)[:-KEEP]:
        shutil.rmtree(old)
    return final


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    return sorted(folder.glob("step-*"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint's files, or nothing."""
    try:
        state = json.loads((path / "state.json").read_text())
        own = state.pop("self")
        if own != _own_digest(state):
            return "state.json has changed since it was written"
        if _digest(path / "state.safetensors") != state["tensors"]:
            return "state.safetensors has changed since it was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint below `folder` that is whole, or None where there is none, and what is wrong with newer ones.

    Raises:
        OutputError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for path in reversed(complete(folder)):
        wrong = _damage(path)
        if not wrong:
            return path, damaged
        damaged.append(f"checkpoint '{path}' is damaged ({wrong})")
    if damaged:
        raise OutputError(f"There is no whole checkpoint to resume from: {'; '.join(damaged)}. Start again with a new --output.")
    return None, []


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> int:
    """Put a whole checkpoint's tensors back, in place; returns its step.

    Raises:
        OutputError: it cannot be read, or belongs to a run with other options (named).
    """
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise OutputError(f"Checkpoint '{path}' cannot be read: {error}. Delete it to resume from the one before.") from None
    ours, theirs = _flat(config), _flat(state["config"])
    differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k) and k.split(".")[-1] not in _FREE)
    if differing:
        changes = ", ".join(f"{key}: {theirs.get(key)!r} -> {ours.get(key)!r}" for key in differing[:5])
        raise OutputError(f"'{path}' was made with other options ({changes}). Resume with the same ones, or use a new --output.")
    parameters = _trained(model)
    names = {key.removeprefix("model/") for key in tensors if key.startswith("model/")}
    if names != parameters.keys():
        raise OutputError(f"'{path}' holds other trained tensors than this model. Resume with the same model and adapter.")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"model/{name}"])
        marker = f"/{name}"
        optimizer.state[parameter] = {
            key.removeprefix("optimizer/").removesuffix(marker): value.to(parameter.device if value.ndim else "cpu")
            for key, value in tensors.items() if key.startswith("optimizer/") and key.split("/", 2)[2] == name
        }  # fmt: skip
    return int(state["step"])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
