"""Devices: memory and speed, from `hardware.toml`, given by hand, or of this machine."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lownibble.errors import ConfigError
from lownibble.planning.linear import chunk_bytes

_TABLE = Path(__file__).with_name("hardware.toml")
CONTEXT_MIB = 500
"""Default CUDA context of a process, if not in the table; 0.49 GiB was seen on RTX 4090 and A100."""
WORKSPACE_MIB = 8
"""Default cuBLAS workspace, that of GPUs before Hopper."""

PROCESS = (480 << 20, 560 << 20, 660 << 20)
HEAP = (0.045, 0.068, 0.1)
"""Low, likely, high of intercept and slope: a linear fit to `bench plan` (process minus allocated) on one machine with glibc,
with bounds that contain all of its settings. Allocations and frees of a microbatch fragment the heap."""
PROCESS_WITH_CUDA = (810 << 20, 910 << 20, 1120 << 20)
"""The intercept where torch is built with CUDA, though there is no GPU: with its libraries, by a run of the embedded model each
on torch 2.11 and 2.15 beside 2.13 without them."""
TOKENIZER = (360, 750, 1220)
"""Low, likely, high bytes of a tokenizer for each entry of its vocabulary beyond `VOCAB`, the embedded model's, which PROCESS
contains: by hand, that of DeepSeek-V3 takes 46 MiB, the embedded model's 18; Gemma 3's of 262,144 entries, whose class in
transformers keeps vocabulary and merges a second time, 268."""
VOCAB = 49152


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        memory_bytes: memory available to a process. bandwidth: bytes/s. flops: FLOP/s in the activations' dtype; both None if
            unknown.
        efficiency: method -> share of `flops` that training reaches (low, likely, high), if measured.
        price: dollars per hour, lowest and highest, or None.
        link: bytes/s in each direction between cards of a node. network: bytes/s in each direction between nodes, of a whole
            node. host: bytes/s in each direction between a card and host memory. None if unknown.
        avx512: whether a CPU uses the AVX-512 kernels.
        allocated_error: shares by which allocated memory may be below and above the plan.
        reserved_error: share by which reserved memory may exceed the simulation; contains most published figures
            (`bench published`).
        process_bytes: memory of a CPU process besides tensors, its tokenizer of `VOCAB` entries included (low, likely, high).
        heap_share: share of all bytes allocated in a microbatch that the C heap holds on top, as fragments that fit no tensor.
        sources: figure -> its source.
    """

    name: str
    title: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    bandwidth: float | None = None
    flops: float | None = None
    price: tuple[float, float] | None = None
    link: float | None = None
    network: float | None = None
    host: float | None = None
    efficiency: Mapping[str, tuple[float, float, float]] | None = None
    context_bytes: int = CONTEXT_MIB << 20
    workspace_bytes: int = WORKSPACE_MIB << 20
    avx512: bool = False
    allocated_error: tuple[float, float] = (0.03, 0.05)
    reserved_error: float = 0.1
    process_bytes: tuple[int, int, int] = (0, 0, 0)
    heap_share: tuple[float, float, float] = (0.0, 0.0, 0.0)
    sources: tuple[tuple[str, str], ...] = ()

    @property
    def alike(self) -> tuple[str, bool, int]:
        """Key of what decides a step's tensors: devices with equal keys allocate the same ones."""
        return self.kind, self.avx512, chunk_bytes(self.memory_bytes) if self.kind == "cuda" else 0


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def names() -> list[str]:
    """Names of all devices in the table."""
    return list(_table()["devices"])


def device(name: str) -> Device:
    """A device by its name in the table, 'cpu' (this machine), or given by hand: 'memory=24,bandwidth=1000,tflops=165'.

    Raises:
        ConfigError: there is no such device (names the nearest), or a figure is missing or invalid.
    """
    if name == "cpu":
        return this_machine()
    if "=" in name:
        return _by_hand(name)
    key = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-")
    if key not in _table()["devices"]:
        near = difflib.get_close_matches(key, names(), n=1, cutoff=0.3)
        raise ConfigError(
            f"There is no GPU '{name}' in the table. {f'Did you mean {near[0]!r}? ' if near else ''}Known: {', '.join(names())}, "
            "cpu, all; or give its figures: 'memory=24,bandwidth=1000,tflops=165' (GiB, GB/s, TFLOP/s)."
        )
    return _from_table(key)


def known_as(driver_name: str) -> str:
    """A GPU's name in the table, from the driver's name ('NVIDIA GeForce RTX 4090'); the driver's name if not in it."""
    said = set(re.split(r"[^a-z0-9]+", driver_name.lower()))
    found = [name for name in names() if set(name.split("-")) <= said]
    return max(found, key=len, default=driver_name)


def _from_table(key: str) -> Device:
    entry, sources = _table()["devices"][key], _table()["sources"]
    cited = tuple((figure, sources[values[-1]]) for figure, values in entry.items() if isinstance(values, list))
    price = (float(entry["price"][0]), float(entry["price"][1])) if "price" in entry else None
    memory, bandwidth, tflops = (entry[figure][0] for figure in ("memory", "bandwidth", "tflops"))
    named = {"link": entry["link"], "network": entry["network"], "host": entry.get("host", entry["link"])}
    links = {figure: _table()["links"][name]["bandwidth"] for figure, name in named.items()}
    cited += tuple((figure, f"{named[figure]}: {sources[source]}") for figure, (_, source) in links.items())
    return Device(
        key, entry["title"], "cuda", int(memory * 2**30), bandwidth * 1e9, tflops * 1e12, price,
        link=links["link"][0] * 1e9, network=links["network"][0] * 1e9, host=links["host"][0] * 1e9,
        context_bytes=entry.get("context_mib", CONTEXT_MIB) << 20,
        workspace_bytes=entry.get("workspace_mib", WORKSPACE_MIB) << 20,
        sources=cited,
    )  # fmt: skip


def _by_hand(text: str) -> Device:
    wanted = ("memory", "bandwidth", "tflops")
    found: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        key = key.strip()
        if key in found:
            raise ConfigError(f"The {key!r} of --gpu is given twice.")
        try:
            found[key] = float(value)
        except ValueError:
            raise ConfigError(f"The {key!r} of --gpu must be a number. Got {value!r}.") from None
    unknown, missing = [key for key in found if key not in wanted], [key for key in wanted if key not in found]
    if unknown or missing or not all(0 < value < math.inf for value in found.values()):
        raise ConfigError(
            f"--gpu by hand takes {', '.join(wanted)}, all above 0 (GiB, GB/s, TFLOP/s), e.g. "
            f"'memory=24,bandwidth=1000,tflops=165'. Got '{text}'."
        )
    size = f"{found['memory']:g} GiB"
    return Device(
        text, size, "cuda", int(found["memory"] * 2**30), found["bandwidth"] * 1e9, found["tflops"] * 1e12,
        sources=tuple((key, "given by hand") for key in wanted),
    )  # fmt: skip


def _has_cuda_libraries() -> bool:
    """Whether the torch that is installed is built with CUDA; it is not imported, which takes seconds."""
    torch = importlib.util.find_spec("torch")
    return torch is not None and torch.origin is not None and (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists()


def this_machine() -> Device:
    """This machine's CPU: its memory, and whether it has the AVX-512 instructions that the kernels need."""
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
        flags = next(lines, "")
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    process = PROCESS_WITH_CUDA if _has_cuda_libraries() else PROCESS
    return Device(
        "cpu", "this machine", "cpu", pages * size, avx512=all(f" avx512{part}" in flags for part in ("f", "bw", "vl", "dq")),
        context_bytes=0, workspace_bytes=0, allocated_error=(0.02, 0.02), process_bytes=process, heap_share=HEAP,
    )  # fmt: skip
