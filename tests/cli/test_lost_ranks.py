"""A run that has lost a rank ends with its error's exit code, whatever threads a library has left waiting."""

import subprocess
import sys

PROGRAM = """
import sys, threading, time
from types import SimpleNamespace
from lownibble.cli import main as cli
from lownibble.training.distributed import RankLostError

def run(arguments):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    raise RankLostError("Another process is gone.")

class Parser:
    def parse_args(self, given):
        return SimpleNamespace(command="train", run=run, json=True)

cli._parser = Parser
sys.exit(cli.main(["train", "--json"]))
"""


def test_threads_that_wait_for_ever_do_not_keep_it(forked):
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error: Another process is gone." in done.stderr
    assert '"kind": "RankLostError"' in done.stdout
