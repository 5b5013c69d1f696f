"""Python processes that start at once: forked from a server that has imported what they would import (five seconds of each).

`Forked` is `subprocess.Popen` for commands of this Python (`-m`, `-c` or a file): the same pipes, signals and exit codes, a child
of the process that asked for it. Other commands it starts as `Popen` does. The fixture `forked` (`conftest.py`) puts it in the
place of `Popen`, for tests that are not about how a process starts or how much memory it holds.

The server has one thread and has computed nothing, so that a fork inherits no lock of another thread and no team of OpenMP. It
forks twice, and who asked adopts the orphan (PR_SET_CHILD_SUBREAPER), so that it can wait for it. What differs from a start: no
`sitecustomize`; what libraries read of the environment while they are imported is the server's; /proc/PID/cmdline is, too.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import inspect
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

PRELOADED = (
    "lownibble.cli.main", "lownibble.study.cell", "lownibble.study.worker", "lownibble.study.compare", "lownibble.training",
    "lownibble.training.run", "lownibble.exporting.convert", "lownibble.exporting.quantize",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip
ARGUMENTS = list(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]
OTHER_WAYS = {"executable": None, "preexec_fn": None, "pass_fds": (), "shell": False, "process_group": -1, "umask": -1}
"""Arguments that the server does not know, and what they are if they were not given."""
PR_SET_CHILD_SUBREAPER = 36
FORKS_ITSELF = {"jemalloc_bg_thd"}
"""Threads whose library starts them again in a forked process: of the memory that pyarrow brings."""


class Forked(subprocess.Popen):
    """A process that the server forks."""

    def _execute_child(self, *given):
        asked = dict(zip(ARGUMENTS, given, strict=True))
        command = [asked["args"]] if isinstance(asked["args"], str) else [os.fspath(each) for each in asked["args"]]
        known = command[0] == sys.executable and (command[1] in ("-m", "-c") or command[1].endswith(".py"))
        if not known or any(asked[name] != usual for name, usual in OTHER_WAYS.items()):
            super()._execute_child(*given)
            return
        order = {
            "command": command[1:], "cwd": os.fspath(asked["cwd"] or Path.cwd()), "session": asked["start_new_session"],
            "environment": dict(os.environ if asked["env"] is None else asked["env"]),
        }  # fmt: skip
        ends = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = server().fork(order, [own if end == -1 else end for own, end in enumerate(ends)])
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in ARGUMENTS if name.endswith(("read", "write"))))


class Server:
    """The server's process, and how it is asked."""

    def __init__(self):
        self._lock = threading.Lock()
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
        with theirs:
            self._process = Forked.__base__(
                [sys.executable, __file__, str(theirs.fileno())], env=environment, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        atexit.register(self._close)

    def fork(self, order, files):
        """The process identifier of a new child of this process."""
        adopt = functools.partial(ctypes.CDLL(None).prctl, PR_SET_CHILD_SUBREAPER)
        with self._lock:
            adopt(1, 0, 0, 0)
            try:
                socket.send_fds(self._ours, [json.dumps(order).encode()], files)
                pid = self._ours.recv(64)
                assert self._ours.recv(64) == b"orphaned", "the server of forked processes has ended"
            finally:
                adopt(0, 0, 0, 0)
        return int(pid)

    def _close(self):
        self._ours.close()
        self._process.wait()


server = functools.cache(Server)
"""The server of this process, started when the first process is asked for."""


def serve(connection):
    """Fork until nobody asks any more; returns in each new process, with what it is to be."""
    atexit.register(gc.unfreeze)  # else triton 3.9 tells at a process's end that its objects are left
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    names = [path.joinpath("comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    threads = [name for name in names if name not in FORKS_ITSELF]
    assert len(threads) == 1, f"a fork would lose other threads: {threads}"
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            sys.exit()
        if between := os.fork():
            os.waitpid(between, 0)
            connection.send(b"orphaned")
            for file in files:
                os.close(file)
            continue
        between = os.getpid()
        if child := os.fork():
            connection.send(str(child).encode())
            os._exit(0)
        connection.close()
        while os.getppid() == between:
            time.sleep(1e-3)
        return json.loads(message), files


def become(order, files):
    """Take over files, environment and folder, and run the command."""
    import torch

    if order["session"]:
        os.setsid()
    for own, file in enumerate(files):
        os.dup2(file, own)
        os.close(file)
    ours = {sys.path[0], *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    how, *rest = order["command"]
    first = order["cwd"] if how in ("-m", "-c") else str(Path(how).resolve().parent)
    asked = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *asked, *(path for path in sys.path if path not in ours)]
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif how == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # it is run, not imported
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = order["command"]
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    become(*serve(socket.socket(fileno=int(sys.argv[1]))))
