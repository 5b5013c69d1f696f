"""The GPUs of a study's cells and of a comparison's runs: which ones each is given, and what can be trained on several.

`--gpus-per-cell K` trains a cell on K processes, one a GPU; on a machine without GPUs they are processes on its processors. What
a cell is does not depend on it (`training/distributed.py`): its digest has no number of devices, its record does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from lownibble.config import RunConfig
from lownibble.errors import ConfigError
from lownibble.training.distributed import Ranks
from lownibble.training.sharding import check as check_sharded

ALONE = "each method trains on several GPUs, and taking turns is for one process each"
"""Why methods do not take turns."""


def visible() -> list[str]:
    """This process's CUDA devices, as CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")][:count] if named else [str(index) for index in range(count)]


def slots(jobs: int, gpus: int) -> list[list[str] | None]:
    """The devices of each of so many concurrent jobs; None: there are none to divide.

    Jobs of one GPU share the GPUs if there are fewer; jobs of several do not.

    Raises:
        ConfigError: there are too few.
    """
    there = visible()
    if not there:
        return [None] * jobs
    if gpus == 1:
        return [[there[job % len(there)]] for job in range(jobs)]
    if jobs * gpus > len(there):
        raise ConfigError(
            f"{jobs} x {gpus} GPUs are needed (cells at a time x GPUs per cell), and there are {len(there)}. Lower --jobs or "
            "--gpus-per-cell."
        )
    return [there[job * gpus : (job + 1) * gpus] for job in range(jobs)]


def check(config: RunConfig, gpus: int) -> None:
    """Refuse a run that cannot be trained on so many GPUs, before anything is run.

    Raises:
        ConfigError: as `Ranks.deal` and `sharding.check`; or an option is for several GPUs, or for one.
    """
    train = config.train
    if gpus < 1:
        raise ConfigError(f"The number of GPUs per cell must be an integer >= 1. Got {gpus}.")
    if gpus == 1:
        if train.parallel != "auto":
            raise ConfigError(f"parallel='{train.parallel}' is for several processes. Say how many: --gpus-per-cell.")
        return
    Ranks(0, gpus, "ddp").deal(train)
    if train.parallel == "fsdp":
        check_sharded(config)
    if config.device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"Each process has a GPU of its own, and all would share '{config.device}'. Leave --device out.")


def memory_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The memory figures in the record of a run; of several ranks, those of the one with the highest peak."""
    of_ranks = run["parallel"]["memory"] if "parallel" in run else [run["memory"]]
    found: dict[str, Any] = max(of_ranks, key=lambda memory: max(memory["train_peak_bytes"], memory["load_peak_bytes"]))
    return found
