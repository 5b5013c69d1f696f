"""Registries of components that are chosen by name and extensible by plug-ins.

    CODECS       `QuantConfig.quant_type`        weight packing                  quant/packed.py
    INITS        `LoraConfig.init_lora_weights`  adapter initialisation          lora/init.py
    VARIANTS     `LoraConfig.use_dora`, ...      computation of adapted layers   lora/variants.py
    OPTIMIZERS   `TrainConfig.optim`             optimiser                       optim/specs.py
    OBJECTIVES   `TrainConfig.objective`         training objective              training/objectives.py
    TRACKERS     `TrainConfig.report_to`         tracker of experiments          training/trackers/tracker.py

A built-in entry is 'module:attribute', imported on first use: reading a configuration or planning imports no torch. A plug-in's
entry is added by importing the file that defines it (`CODECS.add("name", entry)`). Plug-ins are found automatically: modules or
.py files in the environment variable LOWNIBBLE_PLUGINS (comma-separated), and installed packages with an entry point in the group
"lownibble". They are imported when an unknown name is looked up, or the names are listed. `docs/extending.md` has a complete
example of each.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lownibble.errors import ConfigError

PLUGINS = "LOWNIBBLE_PLUGINS"


class Registry:
    """Name -> entry."""

    def __init__(self, kind: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = dict(builtin)

    def add(self, name: str, entry: Any) -> None:
        """Add an entry; it replaces a plug-in's entry of the same name, never a built-in one.

        Raises:
            ConfigError: the name is that of a built-in entry.
        """
        if isinstance(self._entries.get(name), str):
            raise ConfigError(f"There is a built-in {self.kind} '{name}'. Choose another name for yours.")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Any:
        """The entry called `name`.

        Raises:
            ConfigError: the name is unknown; lists the known ones.
        """
        if name not in self:
            raise ConfigError(
                f"There is no {self.kind} '{name}'. Known: {', '.join(self)}. One from outside is found through {PLUGINS}."
            )
        entry = self._entries[name]
        if not isinstance(entry, str):
            return entry
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            load_plugins(os.environ.get(PLUGINS, ""))
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        load_plugins(os.environ.get(PLUGINS, ""))
        return iter(list(self._entries))


@cache
def load_plugins(named: str) -> None:
    """Import the plug-ins: those in `named` (modules or paths of .py files, comma-separated), and installed ones.

    Raises:
        ConfigError: one cannot be imported; says why.
    """
    for name in filter(None, (part.strip() for part in named.split(","))):
        with _told(f"'{name}' ({PLUGINS})"):
            _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    for point in entry_points(group="lownibble"):
        with _told(f"'{point.name}' of the installed package '{point.dist.name if point.dist else point.value}'"):
            point.load()


@contextmanager
def _told(which: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"The plug-in {which} cannot be imported: {type(error).__name__}: {error}.") from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"The plug-in '{path}' ({PLUGINS}) is not there. Check the path.")
    name = f"lownibble_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


CODECS = Registry(
    "codec",
    {
        **dict.fromkeys(("nf4", "fp4"), "lownibble.quant.codecs.fourbit:FOUR_BIT"),
        **dict.fromkeys(
            ["int8", "int4", "int3", "int2", "fp8", "nf3", "nf2", "mxfp4", "int8_act", "int4_act", "int3_act", "int2_act"],
            "lownibble.quant.codecs.grouped:GROUPED",
        ),
    },
)

INITS = Registry(
    "initialisation of adapters",
    {
        name: f"lownibble.lora.init:{name}"
        for name in ("kaiming", "gaussian", "random", "eva", "loftq", "qera", "qera_approx", "pissa", "olora")
    }
    | {"auto": "lownibble.lora.init:qera"},
)

VARIANTS = Registry(
    "variant of adapters",
    {"lora": "lownibble.lora.variants:LORA", "dora": "lownibble.lora.dora:DORA", "alora": "lownibble.lora.activated:UNBOUND"},
)

OPTIMIZERS = Registry(
    "optimiser",
    {
        "adamw": "lownibble.optim.specs:ADAMW",
        "paged_adamw": "lownibble.optim.specs:PAGED_ADAMW",
        "adamw_8bit": "lownibble.optim.specs:ADAMW_8BIT",
        "paged_adamw_8bit": "lownibble.optim.specs:PAGED_ADAMW_8BIT",
    },
)

OBJECTIVES = Registry(
    "objective",
    {
        "next-token": "lownibble.training.objectives:NEXT_TOKEN",
        **{name: f"lownibble.training.preference_losses:{name.upper()}" for name in ("dpo", "orpo", "kto")},
    },
)

TRACKERS = Registry(
    "tracker of experiments",
    {
        "tensorboard": "lownibble.training.trackers.tensorboard:TensorBoard",
        "wandb": "lownibble.training.trackers.wandb:Wandb",
        "mlflow": "lownibble.training.trackers.mlflow:MLflow",
        "trackio": "lownibble.training.trackers.trackio:Trackio",
        "swanlab": "lownibble.training.trackers.swanlab:SwanLab",
    },
)
