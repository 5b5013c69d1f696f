"""How threads wait. Oracle: what libgomp says that it has read."""

import os
import re
import subprocess
import sys

import pytest

from lownibble.waiting import SPIN_COUNT, wait_briefly


def _without(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp along on Linux")
def test_threads_of_torch_spin_only_briefly():
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", "import lownibble, torch"], env={**clean, "OMP_DISPLAY_ENV": "VERBOSE"}, text=True,
        stderr=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)) == {SPIN_COUNT}


def test_what_the_user_chose_stays(monkeypatch):
    _without(monkeypatch)
    for given in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        environment = dict(given)
        wait_briefly(environment)
        assert environment == given


def test_nothing_is_set_that_torch_would_not_read(monkeypatch):
    environment = {}
    wait_briefly(environment)
    assert "torch" in sys.modules
    assert not environment
    _without(monkeypatch)
    wait_briefly(environment)
    assert environment == {"GOMP_SPINCOUNT": SPIN_COUNT}
