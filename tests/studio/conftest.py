"""A studio in a folder of its own, whose jobs are a shell script, and the tiny model and data."""

import sys

import pytest
from starlette.testclient import TestClient
from tiny_folders import tiny_data, tiny_model  # noqa: F401

from lownibble.studio import launched
from lownibble.studio.launched import opened
from lownibble.studio.routes import app

STAND_IN = """#!/bin/sh
# called as: python -m lownibble COMMAND WORD ... --json
echo "asked for $*" >&2
case "$*" in
  *good*) echo '{"status": "ok", "scores": {}}' ;;
  *bad*) echo '{"status": "failed", "error": "The disk is full. Free some space."}'; exit 1 ;;
  *dies*) kill -9 $$ ;;
  *deaf*) trap '' TERM; while :; do sleep 0.1; done ;;
  *) exec sleep 60 ;;
esac
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The jobs of a folder; what they start is `STAND_IN`, in place of Lownibble."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "stand-in"
    script.write_text(STAND_IN)
    script.chmod(0o755)
    monkeypatch.setattr(launched.sys, "executable", str(script))
    with opened("runs") as made:
        yield made
        for job in made.all():
            for _ in range(2):
                made.stop(job.id)
        for child in made.children.values():
            child.wait(10)
    monkeypatch.undo()
    assert sys.executable != str(script)


@pytest.fixture
def client(jobs):
    """A client of the studio at its own address."""
    with TestClient(app(jobs), base_url="http://127.0.0.1:8100", raise_server_exceptions=False) as made:
        yield made
