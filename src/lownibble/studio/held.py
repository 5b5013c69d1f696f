"""What processes hold: bytes in memory, and on GPUs as the driver's own tool has it."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress

import psutil


def held(pid: int) -> tuple[list[int], int]:
    """The ids of a process and its children, and the bytes that they hold together."""
    ids, found = [], 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                found += each.memory_info().rss
                ids.append(each.pid)
    return ids, found


def gpu_bytes() -> dict[int, int]:
    """Process id -> bytes on GPUs, as the driver's own tool has it; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
        pairs = [line.split(",") for line in lines]
        return {int(pid): int(mib) << 20 for pid, mib in pairs if mib.strip().isdigit()}
    return {}


def gpu_name() -> str:
    """What the driver's own tool calls the first GPU; '' without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.partition("\n")[0].strip()
    return ""
