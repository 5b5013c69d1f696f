"""`lownibble bench soak`: soak test of a server with a thousand adapters, an adapter budget below their sum, and a bad client.

`lownibble serve` runs as its own process, as a user would start it. Twenty clients send it requests: nineteen well-behaved ones,
whose adapters follow Zipf's law, and one (5%) that misbehaves all the time (`clients.py`). Every well-behaved request must be
answered completely; the same prompts are repeated in different batches, and `same` is the share of repeats with the same answer.
Memory is the resident set size from /metrics, sampled every second; `growth` is the median of the last quarter of the time over
that of the second quarter. Another server then loads a hundred adapters, and its memory is compared with its memory before plus
the size of the adapters.

The adapters have rank 16 on every linear layer and are all different.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lownibble.bench.clients import Misbehaving, Tally, WellBehaved
from lownibble.config import LoraConfig
from lownibble.errors import InputError, TrainingError
from lownibble.lora import add_lora, save_adapter
from lownibble.lora.portable import CONFIG_FILE, WEIGHTS_FILE
from lownibble.measuring.turns import spread
from lownibble.models import load

CLIENTS, MISBEHAVING, TOKENS = 20, 1, 16
BATCH, BUDGET = 8, 200_000_000


def bench_soak(*, peers: bool = False, repeats: int = 10, adapters: int = 1000, loaded: int = 100) -> dict[str, Any]:
    """Run the server for `repeats` minutes.

    Args:
        peers: ignored; there are no peers.
        adapters: number of adapters in the folder. loaded: how many of them the second server holds at once.
    Raises:
        InputError: not enough disk space.
        TrainingError: a server did not start.
    """
    del peers
    with tempfile.TemporaryDirectory(prefix="lownibble-soak-") as name:
        folder = Path(name)
        nbytes = _write_adapters(folder, adapters)
        soaked = _soak(folder, adapters, 60.0 * repeats)
        held = _hold(folder, min(loaded, adapters), nbytes)
    workload = {
        "model": "demo", "minutes": repeats, "adapters": adapters, "adapter_bytes": nbytes, "r": 16, "budget_bytes": BUDGET,
        "clients": CLIENTS, "misbehaving": MISBEHAVING, "max_batch": BATCH, "prompt_tokens": [16, 48], "new_tokens": TOKENS,
    }  # fmt: skip
    headlines = {
        "answered": soaked["well_behaved"]["answered"], "lost": soaked["well_behaved"]["lost"],
        "misbehaviour": soaked["misbehaviour"], "answers with 5xx": soaked["server_errors"],
        "hit rate": soaked["adapters"]["hit_rate"], "memory growth": soaked["memory"]["growth"],
        f"memory with {held['adapters']} adapters / (base + their sum)": held["ratio"],
    }  # fmt: skip
    return {"workload": workload, "soak": soaked, "loaded": held, "headlines": headlines}


def _write_adapters(folder: Path, n: int) -> int:
    """Write `n` adapters a0, a1, ..., and 'damaged', which has NaN; returns the bytes of one in float16."""
    model, _ = load("demo", quant="nf4", dtype=torch.float32)
    add_lora(model, LoraConfig(r=16))
    save_adapter(model, folder / "a0")
    file = folder / "a0" / WEIGHTS_FILE
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
        shapes = {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118 - no dict
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    needed = (n + 1) * sum(sizes) * 2
    if shutil.disk_usage(folder).free < 1.1 * needed:
        raise InputError(f"{needed / 1e9:.0f} GB of adapters have no room in '{folder.parent}'. Point TMPDIR at a larger disk.")
    values = (0.02 * torch.randn(sum(sizes) + 1009 * n)).half()  # each adapter is a different slice
    for number in range(n):
        made = folder / f"a{number}"
        made.mkdir(exist_ok=True)
        if number:
            shutil.copy(folder / "a0" / CONFIG_FILE, made)
        parts = values[1009 * number :][: sum(sizes)].split(sizes)
        tensors = {key: part.view(shape).clone() for (key, shape), part in zip(shapes.items(), parts, strict=True)}
        save_file(tensors, made / WEIGHTS_FILE, metadata)
    damaged = folder / "damaged"
    damaged.mkdir()
    shutil.copy(folder / "a0" / CONFIG_FILE, damaged)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, damaged / WEIGHTS_FILE, metadata)
    return 2 * sum(sizes)


class _Server:
    """A running server process."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.address = process, ("127.0.0.1", port)

    def gauges(self) -> dict[str, float]:
        """Return the unlabelled values of /metrics, without the `lownibble_` prefix."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.address[1]}/metrics", timeout=30) as answer:
            return {name: float(value) for name, value in re.findall(r"^lownibble_(\w+) (\S+)$", answer.read().decode(), re.M)}

    def post(self, path: str, body: str) -> bytes:
        """POST a JSON body; returns the response body."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.address[1]}{path}", body.encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            content: bytes = answer.read()
        return content


def _content(file: IO[bytes]) -> str:
    """Return what was written so far without moving the file offset, which the server shares."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


@contextmanager
def _server(folder: Path, *options: str) -> Iterator[_Server]:
    command = [sys.executable, "-m", "lownibble.cli.main", "serve", "demo", "--adapters", str(folder), "--port", "0", "--json"]
    with (
        tempfile.TemporaryFile() as told,  # not a pipe: it would fill up with client errors
        subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=told, text=True) as process,
    ):
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", said := _content(told))):
                if process.poll() is not None:
                    raise TrainingError(f"The server did not start:\n{said[-2000:]}")
                time.sleep(0.1)
            yield _Server(process, int(found[1]))
        finally:
            process.terminate()


def _soak(folder: Path, adapters: int, seconds: float) -> dict[str, Any]:
    weights = list(accumulate(1 / (rank + 1) for rank in range(adapters)))
    order = random.Random(0).sample(range(adapters), adapters)  # adapters by popularity

    def pick(draw: random.Random) -> int:
        return order[draw.choices(range(adapters), cum_weights=weights)[0]]

    tally, samples = Tally(), []
    options = ("--adapter-budget", f"{BUDGET}B", "--max-batch", str(BATCH), "--max-context", "256")
    with _server(folder, *options) as server, ThreadPoolExecutor(CLIENTS) as pool:
        began = time.monotonic()
        until = began + seconds
        good = [WellBehaved(server.address, tally, pick, TOKENS, seed) for seed in range(CLIENTS - MISBEHAVING)]
        bad = [Misbehaving(server.address, tally, seed) for seed in range(MISBEHAVING)]
        work = [pool.submit(run, until) for run in (*(one.run for one in good), *(one.run for one in bad))]
        while time.monotonic() < until:
            samples.append({"s": time.monotonic() - began, **server.gauges()})
            time.sleep(1.0)
        for one in work:
            one.result()
        took = time.monotonic() - began
        deadline = time.monotonic() + 30
        while (after := server.gauges())["requests_running"] + after["requests_waiting"] and time.monotonic() < deadline:
            time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(60)
    loads, hits = after["adapter_loads"], after["adapter_hits"]
    return {
        "well_behaved": {
            "answered": tally.answered, "lost": sum(tally.lost.values()), "why": dict(tally.lost),
            "refused_and_sent_again": tally.refused, "asked_again": tally.repeated,
            "same": tally.same / tally.repeated if tally.repeated else None,
            "tokens_per_s": tally.tokens / took,
        },
        "misbehaviour": sum(found.total() for found in tally.bad.values()),
        "outcomes": {kind: dict(found) for kind, found in tally.bad.items()},
        "server_errors": tally.server_errors,
        "adapters": {
            "loads": int(loads), "hits": int(hits), "hit_rate": hits / (loads + hits),
            "evictions": int(after["adapter_evictions"]),
            "largest_bytes": int(max(sample["adapter_bytes"] for sample in samples)),
        },
        "memory": _memory(samples), "left_running": int(after["requests_running"] + after["requests_waiting"]),
        "exit_status": status,
    }  # fmt: skip


def _memory(samples: list[dict[str, float]]) -> dict[str, Any]:
    resident = [sample["process_bytes"] for sample in samples]
    quarter = max(1, len(resident) // 4)
    second, last = resident[quarter : 2 * quarter] or resident, resident[-quarter:]
    per_minute = [int(sample["process_bytes"]) for sample in samples[:: max(1, len(samples) // 20)]]
    growth = statistics.median(last) / statistics.median(second)
    return {"growth": growth, "resident_bytes": spread(resident[quarter:] or resident), "resident_bytes_over_time": per_minute}


def _hold(folder: Path, adapters: int, nbytes: int) -> dict[str, Any]:
    """Measure the server's resident set size before and after loading `adapters` adapters of `nbytes` bytes."""
    options = ("--adapter-budget", f"{(adapters + 1) * nbytes}B", "--max-batch", str(BATCH), "--max-context", "256")
    with _server(folder, *options) as server:
        for _ in range(2):  # memory of answering counts as the base's
            server.post("/v1/completions", '{"model": "base", "prompt": "Hello", "max_tokens": 16}')
        base = server.gauges()
        for number in range(adapters):
            server.post("/v1/load_lora_adapter", f'{{"lora_name": "a{number}"}}')
        after = server.gauges()
    total = after["adapter_bytes"]
    return {
        "adapters": int(after["adapters_held"]), "base_bytes": int(base["process_bytes"]), "adapter_bytes": int(total),
        "resident_bytes": int(after["process_bytes"]), "ratio": after["process_bytes"] / (base["process_bytes"] + total),
    }  # fmt: skip
