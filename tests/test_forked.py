"""Forked processes are as started ones: pipes, arguments, folder, environment, signals, exit codes. Oracle: `subprocess`."""

import os
import signal
import subprocess
import sys

import pytest

TELL = (
    "import os, sys\n"
    "told = [sys.argv, os.getcwd(), os.environ['TOLD'], os.getppid(), os.getsid(0) == os.getpid(), sys.stdin.read(), __name__]\n"
    "print(told); print('aside', file=sys.stderr); sys.exit(3)"
)


@pytest.mark.parametrize("how", ["-c", "-m", "file"])
def test_it_is_a_process_as_any_other(forked, tmp_path, how):
    (tmp_path / "telling.py").write_text(TELL)
    command = {"-c": ["-c", TELL], "-m": ["-m", "telling"], "file": [str(tmp_path / "telling.py")]}[how]
    options = {
        "cwd": tmp_path, "env": {**os.environ, "TOLD": how}, "input": "in", "capture_output": True, "text": True,
        "start_new_session": True,
    }  # fmt: skip
    found = subprocess.run([sys.executable, *command, "a", "b"], **options)
    name = {"-c": "-c", "-m": str(tmp_path / "telling.py"), "file": str(tmp_path / "telling.py")}[how]
    told = [[name, "a", "b"], str(tmp_path), how, os.getpid(), True, "in", "__main__"]
    assert (found.stdout, found.stderr, found.returncode) == (f"{told}\n", "aside\n", 3)


def test_its_ends_are_seen(forked):
    code = "import lownibble.training, sys; print(len(sys.modules), flush=True); input(); 1 / 0"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert int(process.stdout.readline()) > 1000
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    done = subprocess.run([sys.executable, "-c", code], input="\n", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert subprocess.run([sys.executable, "-S", "-c", "print(1)"], capture_output=True).stdout == b"1\n"  # started, not forked
