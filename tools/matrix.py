"""The tests on every Python, on the scalar kernels, and on the lowest and newest versions of what is needed:
`python tools/matrix.py [--rows ...] [--select ...]`.

A row is a virtual environment of its own under .cache/matrix, made by tools/install.py and kept, in which the default tier of the
tests runs (`make test`'s). A row that cannot be run here is named in the table with its reason. Exit code 1: a row failed, or
none could be run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "matrix"
PYTHONS = ("3.11", "3.12", "3.13")


@dataclass
class Row:
    """What is tested on what; `found` and `seconds` once it is known."""

    name: str
    pythons: tuple[str, ...]
    venv: str
    versions: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    found: str = ""
    failed: bool = False
    seconds: float = 0.0


def rows() -> list[Row]:
    """Every row: the scalar kernels run on the first Python that is here, the lowest versions on the one that most GPU machines
    have, the newest on the newest."""
    return [
        *(Row(f"python{version}", (version,), f"python{version}") for version in PYTHONS),
        Row("scalar", PYTHONS, "", environment={"LOWNIBBLE_ISA": "scalar"}),
        Row("lowest", ("3.12", "3.11"), "lowest", versions="--lowest"),
        Row("newest", PYTHONS[::-1], "newest", versions="--newest"),
    ]


def candidates(version: str) -> Iterator[str]:
    """Where a Python of this version may be: this one, the PATH, pyenv's, uv's."""
    yield sys.executable
    yield shutil.which(f"python{version}") or ""
    yield from map(str, sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python{version}"), reverse=True))
    if uv := shutil.which("uv"):
        yield subprocess.run([uv, "python", "find", version], capture_output=True, text=True, check=False).stdout.strip()


def interpreter(version: str) -> str:
    """A Python of this version that can make virtual environments, or nothing. (A shim may be on the PATH and lead nowhere.)"""
    ask = "import ensurepip, sys, venv; print('{}.{}'.format(*sys.version_info))"
    for path in filter(None, candidates(version)):
        answer = subprocess.run([path, "-c", ask], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip() == version:
            return path
    return ""


def run(row: Row, select: list[str]) -> None:
    """Install the row's environment, then test; the output goes into a file of the row's name."""
    here = next(((version, path) for version in row.pythons if (path := interpreter(version))), None)
    if here is None:
        row.found = f"not run: no Python {' nor '.join(row.pythons)} on the PATH, in ~/.pyenv/versions or by uv"
        return
    version, python = here
    venv, log = FOLDER / (row.venv or f"python{version}"), FOLDER / f"{row.name}.log"
    FOLDER.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    install = [python, str(ROOT / "tools" / "install.py"), str(venv), "--dev", *filter(None, [row.versions])]
    test = [str(venv / "bin" / "python"), "-m", "pytest", "-n", "auto", "-m", "not slow", *select]
    print(f"{row.name}: Python {version} at {python}; see {log.relative_to(ROOT)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        if subprocess.call(install, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT) != 0:
            absent = "torch could not be installed" in log.read_text(encoding="utf-8", errors="replace")
            row.found, row.failed = f"{'not run' if absent else 'FAILED'}: not installed: {last_line(log)}", not absent
            return
        code = subprocess.call(test, cwd=ROOT, env=environment | row.environment, stdout=output, stderr=subprocess.STDOUT)
    row.failed, row.seconds = code != 0, time.monotonic() - start
    asked = subprocess.run([test[0], "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=False)
    row.found = f"{'FAILED' if row.failed else 'passed'}: Python {version}, torch {asked.stdout.strip()}: {last_line(log)}"


def last_line(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip("= \n") for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next(filter(None, reversed(lines)), "no output")


def main() -> int:
    """Run what was asked for, in turn, and print the table."""
    every = rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in every], help="these rows only (default: all)")
    parser.add_argument("--select", nargs="+", default=[], metavar="PATH", help="these tests only, e.g. tests/kernels")
    asked = parser.parse_args()
    for row in every:
        if asked.rows and row.name not in asked.rows:
            row.found = "not run: not asked for"
        else:
            run(row, asked.select)
    width = max(len(row.name) for row in every)
    for row in every:
        print(f"{row.name:<{width}}  {row.seconds:>5.0f} s  {row.found}")
    return int(any(row.failed for row in every) or not any(row.found.startswith("passed") for row in every))


if __name__ == "__main__":
    sys.exit(main())
