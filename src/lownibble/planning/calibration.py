"""Measured speed of devices, for later plans: `calibration.json` in the cache folder, written by `plan --calibrate`.

{"cpu": {"flops": 1.9e11, "bandwidth": 2.1e10, "efficiency": {"lora": [0.4, 0.5, 0.6]}, "measured": {...}}}
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lownibble.embedded import cache_dir
from lownibble.errors import ConfigError
from lownibble.planning.hardware import Device


def path() -> Path:
    """Path of the calibration file."""
    return cache_dir() / "calibration.json"


def calibrated(device: Device) -> Device:
    """The device with its measured figures, if there are any."""
    kept = _read().get(device.name)
    if kept is None:
        return device
    efficiency = {
        **(device.efficiency or {}),
        **{m: (low, likely, high) for m, (low, likely, high) in kept["efficiency"].items()},
    }
    sources = dict(device.sources) | {"efficiency": f"measured by plan --calibrate, {kept['created']}"}
    return replace(
        device, efficiency=efficiency, flops=kept["flops"], bandwidth=kept["bandwidth"], sources=tuple(sources.items())
    )  # fmt: skip


def keep(device: str, found: dict[str, Any]) -> Path:
    """Save measurements, keeping earlier efficiencies of methods not measured now. Returns the file."""
    everything = _read()
    before = everything.get(device, {}).get("efficiency", {})
    everything[device] = {**found, "efficiency": {**before, **found["efficiency"]}}
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)
    return file


def _read() -> dict[str, Any]:
    if not path().exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path().read_text(encoding="utf-8"))
        for entry in found.values():
            assert {"flops", "bandwidth", "efficiency", "created"} <= entry.keys()
    except (OSError, ValueError, AttributeError, AssertionError):
        raise ConfigError(f"'{path()}' is no calibration that can be read. Delete it, and run plan --calibrate again.") from None
    return found
