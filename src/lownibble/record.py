"""Records: one JSON document per run, from which every table, plot and figure is rendered.

Keys carry their unit (`_bytes`, `_s`, `_tokens`). A record holds the resolved configuration, the environment, the digest of the
data and the measurements. It is written to a temporary file and renamed.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from lownibble.errors import OutputError
from lownibble.kernels import ops, proven
from lownibble.waiting import GIVEN

SCHEMA = 1
_PACKAGES = ("lownibble", "torch", "transformers", "safetensors", "peft", "bitsandbytes", "trl", "triton")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Machine, device, package versions and the kernels in use; `plain_kernels`: those that plain torch has replaced so far."""
    device = device or torch.device("cpu")
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "thread_waiting": {name: os.environ[name] for name in GIVEN if name in os.environ},
        "ram_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "kernels": ops.active_backend(device),
        "kernel_status": ops.backend_status(),
    }
    if proven.refused:
        found["plain_kernels"] = dict(proven.refused)
    if found["kernels"] == "cpu":
        from lownibble.kernels import cpu

        found["kernel_isa"] = cpu.isa()
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def new(kind: str) -> dict[str, Any]:
    """The first fields of a record: kind, schema, creation time and command line."""
    program = Path(sys.argv[0]).name
    return {
        "kind": kind,
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["lownibble" if program in ("main.py", "__main__.py", "lownibble") else program, *sys.argv[1:]],
    }


def check(path: str | Path) -> None:
    """Check before hours of measuring that a record can be written.

    Raises:
        OutputError: it cannot.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"'{path}' is a folder. Give the name of a .json file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"Cannot write '{path}': {error.strerror}. Choose another --output.") from None


def write(path: str | Path, record: dict[str, Any]) -> Path:
    """Write a record atomically; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return path
