"""Programs that a model wrote, run. Oracle: what they tried to do did not happen, and they count as failures."""

import os
import socket
import sys
import textwrap
import time

import psutil
import pytest

from lownibble.study import sandbox
from lownibble.study.sandbox import run, run_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are locked in by Linux")

HONEST = [
    "assert sorted([3, 1, 2]) == [1, 2, 3]",
    "import math, re, collections, heapq, itertools, functools, random, string, bisect, decimal, datetime, statistics, sys",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\nassert fib(15) == 610",
    "print('x' * 10**7)",
    "import time; time.sleep(0.01); assert time.time() > 0",
    "import re\nassert re.findall(r'\\d+', 'a1b22') == ['1', '22']",
    "try:\n    open('made', 'w')\nexcept PermissionError:\n    pass",
]
WRONG = [
    "assert 1 == 2", "raise SystemExit(0)", "import os; os._exit(0)", "import sys; sys.exit()", "this is no python", "1 / 0",
    "raise KeyboardInterrupt", "import does_not_exist", "\x00", "import os; os.abort()",
    "raise SystemExit(70)", "import os; os._exit(70)", "import os; os.lseek(3, 0, 0); os.write(3, b'x'); os._exit(70)",
]  # fmt: skip


@pytest.mark.parametrize("program", HONEST)
def test_an_honest_program_passes(program):
    assert run(program) == (True, "")


@pytest.mark.parametrize("program", WRONG)
def test_what_does_not_come_to_its_end_fails(program):
    outcome = run(program)
    assert not outcome.passed
    assert outcome.reason


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(99)", "while True:\n    try: 1 / 0\n    except BaseException: pass"]
)
def test_an_endless_program_is_ended(program):
    began = time.monotonic()
    assert run(program, seconds=1.0) == (False, "not done after 1 s")
    assert time.monotonic() - began < 5


ON_FILES = """
import ctypes, os, pathlib, shutil
for harm in (
    lambda: os.remove(VICTIM), lambda: open(VICTIM, "w"), lambda: open(VICTIM, "a"), lambda: open(VICTIM, "r+"),
    lambda: os.truncate(VICTIM, 0), lambda: os.rename(VICTIM, VICTIM + "2"), lambda: shutil.rmtree(os.path.dirname(VICTIM)),
    lambda: pathlib.Path(VICTIM).write_text("x"), lambda: os.chmod(VICTIM, 0), lambda: os.symlink(VICTIM, VICTIM + "3"),
    lambda: os.mkdir(VICTIM + "4"), lambda: os.link(VICTIM, VICTIM + "5"), lambda: os.utime(VICTIM, (0, 0)),
    lambda: open("here", "w"), lambda: os.open(VICTIM, os.O_RDONLY | os.O_TRUNC), lambda: os.replace(VICTIM, VICTIM + "6"),
    lambda: os.chown(VICTIM, 1, 1), lambda: os.setxattr(VICTIM, "user.x", b"x"), lambda: os.mkfifo(VICTIM + "7"),
):
    try:
        harm()
    except OSError:
        continue
    raise SystemExit("done")
assert ctypes.CDLL(None).unlink(VICTIM.encode()) == -1
"""


def test_no_file_is_changed_made_or_deleted(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    before = victim.stat().st_mode, victim.stat().st_mtime, victim.stat().st_uid
    assert run(f"VICTIM = {str(victim)!r}\n{ON_FILES}") == (True, "")  # all of it was refused
    assert victim.read_text() == "whole"
    assert (victim.stat().st_mode, victim.stat().st_mtime, victim.stat().st_uid) == before
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


ON_PROCESSES = """
import ctypes, multiprocessing, os, signal, subprocess, sys, threading
for harm in (
    os.fork, lambda: subprocess.run(["true"]), lambda: os.system("true") and 1 / 0, lambda: os.execv("/bin/true", ["true"]),
    lambda: multiprocessing.Process(target=print).start(), lambda: threading.Thread(target=print).start(),
    lambda: os.kill(os.getppid(), signal.SIGKILL), lambda: os.killpg(0, signal.SIGKILL), os.forkpty,
    lambda: os.posix_spawn("/bin/true", ["true"], {}), lambda: os.setsid(), lambda: os.nice(-5),
):
    try:
        harm()
    except (OSError, RuntimeError, ZeroDivisionError):
        continue
    raise SystemExit("done")
assert ctypes.CDLL(None).fork() == -1
"""


def test_no_process_is_made_and_none_is_ended():
    me = psutil.Process()
    before = {child.pid for child in me.children(recursive=True)}
    assert run(ON_PROCESSES) == (True, "")  # all of it was refused
    assert {child.pid for child in me.children(recursive=True)} == before


def test_a_fork_bomb_does_not_go_off():
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, seconds=1.0) == (False, "not done after 1 s")
    assert not run("import os\nwhile True: os.fork()").passed


ON_THE_NETWORK = """
import ctypes, socket, urllib.request
for harm in (
    lambda: socket.create_connection(("127.0.0.1", PORT)), lambda: socket.socket(socket.AF_UNIX), socket.socketpair,
    lambda: urllib.request.urlopen(f"http://127.0.0.1:{PORT}"), lambda: socket.getaddrinfo("example.org", 80),
):
    try:
        harm()
    except OSError:
        continue
    raise SystemExit("done")
assert ctypes.CDLL(None).socket(2, 1, 0) == -1
"""


def test_nothing_is_connected():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        assert run(f"PORT = {server.getsockname()[1]}\n{ON_THE_NETWORK}") == (True, "")  # all of it was refused
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("program", ["x = [0] * 10**10", "x = []\nwhile True: x.append(bytearray(10**7))", "x = 'a' * 2**40"])
def test_memory_is_limited(program):
    free = psutil.virtual_memory().available
    assert not run(program, memory_bytes=300 << 20).passed
    assert psutil.virtual_memory().available > free - 2**30


def test_an_answer_is_a_few_bytes_whatever_the_program_writes_to_it():
    flood = """
    import os, time
    written = os.write(3, b"x" * 10**6)
    try:
        os.write(3, b"x")
    except OSError:
        os._exit(9)
    time.sleep(99)
    """
    assert run(textwrap.dedent(flood), seconds=3.0) == (False, "an exception, or it left before its end")


def test_a_kernel_without_filters_is_said(monkeypatch, tmp_path):
    """The process says nothing then. Oracle: one that exits as it does on such a machine."""
    (tmp_path / "sandboxed.py").write_text("raise SystemExit(70)")
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
    with pytest.raises(sandbox.ConfigError, match="cannot lock a process in"):
        run("pass")


def test_it_cannot_be_unlocked():
    unlock = """
    import ctypes, resource
    libc = ctypes.CDLL(None)
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
        try:
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except (OSError, ValueError):
            continue
        raise SystemExit("done")
    assert libc.prctl(22, 0, 0, 0, 0) == -1
    assert libc.ptrace(16, 1, 0, 0) == -1
    assert libc.unshare(0x10000000) == -1
    """
    assert run(textwrap.dedent(unlock)) == (True, "")


def test_nothing_is_inherited():
    os.environ["A_SECRET"] = "x"
    try:
        assert run("import os\nassert 'A_SECRET' not in os.environ\nassert not os.listdir('.')") == (True, "")
    finally:
        del os.environ["A_SECRET"]


def test_many_at_once_keep_their_order():
    outcomes = run_all([f"assert {number} % 2 == 0" for number in range(12)], jobs=3)
    assert [outcome.passed for outcome in outcomes] == [number % 2 == 0 for number in range(12)]


def test_elsewhere_it_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(sandbox.ConfigError, match="Linux"):
        run("pass")
