"""Processes of a run on this machine, as torchrun would start them."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from forked import Forked


def environment(world, port):
    """The environment of each rank."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [{**os.environ, "OMP_NUM_THREADS": "1", **shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Workers:
    """`world` processes that train what they are told, together, over `backend`; one start for many runs."""

    def __init__(self, world, backend="gloo"):
        self.errors = [tempfile.TemporaryFile("w+") for _ in range(world)]  # noqa: SIM115 - closed below
        worker = Path(__file__).parent / "worker.py"
        self.processes = [
            Forked(
                [sys.executable, str(worker), backend],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for env, errors in zip(environment(world, free_port()), self.errors, strict=True)
        ]

    def train(self, options, *, other=None):
        """The answers of all ranks to a run; `other`: the options of all ranks but the first."""
        for rank, process in enumerate(self.processes):
            process.stdin.write(json.dumps(other if other and rank else options) + "\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline() or self._told(rank)) for rank, process in enumerate(self.processes)]

    def _told(self, rank):
        self.errors[rank].seek(0)
        raise AssertionError(f"rank {rank} ended: {self.errors[rank].read()[-3000:]}")

    def close(self):
        for process in self.processes:
            process.stdin.close()
        for process, errors in zip(self.processes, self.errors, strict=True):
            try:
                process.wait(60)
            finally:
                process.kill()
                process.stdout.close()
                errors.close()
