"""Pack this working tree for a machine without a network: `python tools/offline.py OUTPUT [--peers] [--tests] [--limit 64MiB]`.

The machine has Python, torch, transformers and triton, as GPU nodes of clusters have, and reaches no registry. OUTPUT is a
folder, or a compressed tarball of one (.tar.gz). In it:

    run.sh     './run.sh bench contact' is 'lownibble bench contact'; './run.sh pytest' runs the tests marked `gpu`
    src/       this package without compiled files: its CPU kernels are plain torch there
    site/      wheels, unpacked: what this package needs beside torch and transformers
    peers/     with --peers, wheels of the benchmarks' peers; seen by commands with the option --peers only
    tests/     with --tests, beside pyproject.toml; pytest is in site/ then

What is carried comes before what the machine has. `CARRIED`, `PEERS` and, with --tests, `TESTS` are all that is carried, by name
and version; `ASSUMED` is what is too large, or comes with torch and transformers: `run.sh` says what of it is missing. Of
bitsandbytes only the library of one CUDA is carried, of Unsloth the library without its studio. What peers ask for and do not
import is not carried (diffusers, hf_transfer, xformers).

--python is the version of that machine's Python: wheels of compiled packages are for one. Sizes are told, and an output above
--limit is refused: what travels is often limited.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lownibble.bench.gpu import gpu_tests
from lownibble.errors import ConfigError, InputError
from lownibble.options import n_bytes

ROOT = Path(__file__).resolve().parent.parent
CARRIED = {
    "accelerate": "1.15.0", "annotated-types": "0.8.0", "gguf": "0.19.0", "markdown-it-py": "4.3.0", "mdurl": "0.1.2",
    "psutil": "7.2.2", "pydantic": "2.14.4", "pydantic-core": "2.50.5", "Pygments": "2.21.0", "rich": "15.0.0",
    "typing-inspection": "0.4.5", "typing_extensions": "4.16.0",
}  # fmt: skip
"""What this package needs and torch and transformers do not."""
PEERS = {
    "peft": "0.21.2", "bitsandbytes": "0.50.2", "liger-kernel": "0.8.5", "torchao": "0.18.0", "unsloth": "2026.10.9",
    "unsloth_zoo": "2026.10.9",
    "trl": "1.15.0",  # Unsloth takes no later one
    "datasets": "4.3.0",  # nor all later ones of this
    "anyio": "4.16.0", "cut_cross_entropy": "25.1.1", "dill": "0.4.0", "docstring-parser": "0.18.0", "einops": "0.8.2",
    "h11": "0.16.0", "httpcore": "1.0.9", "httpx": "0.28.1", "msgspec": "0.22.0", "multiprocess": "0.70.16",
    "typeguard": "4.6.1", "tyro": "1.0.17", "xxhash": "4.1.0",
}  # fmt: skip
"""The peers of `bench train`, then what importing them needs."""
TESTS = {"hypothesis": "6.170.17", "iniconfig": "2.3.1", "pluggy": "1.7.0", "pytest": "9.2.0", "sortedcontainers": "2.4.0"}
"""What the tests marked gpu need."""
ASSUMED = {"torch": "", "transformers": "", "triton": "", "numpy": "", "scipy": "statistics", "jinja2": "chat templates"}
ASSUMED_BY_PEERS = {"pyarrow": "datasets", "pandas": "datasets", "requests": "datasets", "PIL": "Unsloth"}
"""Modules that the machine is to have -> what needs them."""
CUDA = "130"
LEFT_OUT = re.compile(rf"libbitsandbytes_(?!cuda{CUDA}\.|cpu\.)|^(studio|unsloth_cli)/|\.data/")
"""Files of wheels that are not unpacked."""
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
NOT_COPIED = ("__pycache__", "*.so", "*.egg-info", "*.cpp", "*.h", ".*", "_native.txt")


def download(wanted: dict[str, str], python: str, folder: Path) -> None:
    """Fetch wheels for Linux on x86-64 into a folder.

    Raises:
        InputError: pip could not; its messages are above.
    """
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    names = [f"{name}=={version}" for name, version in wanted.items()]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options, "--dest", str(folder), *names]
    if subprocess.call(command) != 0:
        raise InputError("pip could not fetch the wheels; see its message above. Name another --python, or mend the pins.")


def unpack(wheels: Iterable[Path], site: Path) -> None:
    """Unpack wheels into one folder, as an installation has them, but for what is left out."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site, [name for name in file.namelist() if not LEFT_OUT.search(name)])


RUN = """#!/bin/sh
# Lownibble on a machine without a network (tools/offline.py of its repository). PYTHON=... names another Python than python3.
#   ./run.sh COMMAND ...     as lownibble COMMAND ...
#   ./run.sh pytest ...      the tests marked gpu, if they were packed
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/src:$here/site${PYTHONPATH:+:$PYTHONPATH}"
case " $* " in *" --peers "*) export PYTHONPATH="$here/peers:$PYTHONPATH";; esac  # they slow down imports, and warn
python=${PYTHON:-python3}
"$python" - <<'END' || exit 2
import sys
from importlib.util import find_spec
if sys.version_info[:2] != (@VERSION@):
    sys.exit("This is Python %d.%d, and the wheels are for %d.%d. Set PYTHON." % (*sys.version_info[:2], @VERSION@))
missing = [f"{name}{f' (for {why})' if why else ''}" for name, why in @ASSUMED@.items() if find_spec(name) is None]
if missing:
    print("Not on this machine, and not carried:", ", ".join(missing), file=sys.stderr)
END
if [ "$1" = pytest ]; then
    shift
    cd "$here" && exec "$python" -m pytest -m gpu -p no:cacheprovider --continue-on-collection-errors @TESTS@ "$@"
fi
exec "$python" -m lownibble "$@"
"""


def pack(folder: Path, python: str, *, peers: bool, tests: bool) -> None:
    """Fill an empty folder. Raises as `download`."""
    ignored = shutil.ignore_patterns(*NOT_COPIED)
    shutil.copytree(ROOT / "src" / "lownibble", folder / "src" / "lownibble", ignore=ignored)
    if tests:
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
    carried = CARRIED | (TESTS if tests else {})
    for name, wanted in (("site", carried), ("peers", PEERS)) if peers else (("site", carried),):
        with tempfile.TemporaryDirectory() as wheels:
            download(wanted, python, Path(wheels))
            unpack(sorted(Path(wheels).glob("*.whl")), folder / name)
    assumed = repr(ASSUMED | (ASSUMED_BY_PEERS if peers else {}))
    text = RUN.replace("@VERSION@", python.replace(".", ", ")).replace("@ASSUMED@", assumed)
    text = text.replace("@TESTS@", " ".join(gpu_tests(folder / "tests")) if tests else "tests")
    (folder / "run.sh").write_text(text, encoding="utf-8")
    (folder / "run.sh").chmod(0o755)


def sizes(folder: Path) -> Counter[str]:
    """Bytes by part: src, tests, and each package."""
    found: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file():
            parts = path.relative_to(folder).parts
            found["/".join(parts[: 1 + (parts[0] in ("site", "peers"))])] += path.stat().st_size
    return found


def main(argv: list[str] | None = None) -> int:
    """Pack; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="a folder that is not there yet, or a file .tar.gz")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="of the machine (default: 3.12)")
    parser.add_argument("--peers", action="store_true", help="carry the peers of the benchmarks")
    parser.add_argument("--tests", action="store_true", help="carry the tests")
    parser.add_argument("--limit", default="64MiB", metavar="SIZE", help="refuse a larger output (default: 64MiB)")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    try:
        limit = _limit(arguments.limit)
        if not re.fullmatch(r"3\.\d+", arguments.python):
            raise ConfigError(f"--python must be like 3.12. Got '{arguments.python}'.")
        if output.exists():
            raise ConfigError(f"'{output}' is there. Remove it, or name another output.")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / output.name.removesuffix(".tar.gz")
            folder.mkdir()
            pack(folder, arguments.python, peers=arguments.peers, tests=arguments.tests)
            parts = sizes(folder)
            made = _tarball(folder, Path(scratch)) if output.name.endswith(".tar.gz") else folder
            size = made.stat().st_size if made.is_file() else parts.total()
            told = ", ".join(f"{name} {n / 2**20:.1f}" for name, n in parts.most_common(8))
            print(f"{size / 2**20:.1f} MiB; unpacked {parts.total() / 2**20:.1f} MiB, of them {told}", file=sys.stderr)
            if size > limit:
                raise InputError(
                    f"The output is {size / 2**20:.1f} MiB, and the limit is {limit / 2**20:.1f} MiB (--limit). A tarball "
                    "(OUTPUT.tar.gz) is smaller, and so is one without --peers."
                )
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _limit(size: str) -> int:
    try:
        return n_bytes(size)
    except ValueError as error:
        raise ConfigError(f"--limit {error}") from None


def _tarball(folder: Path, scratch: Path) -> Path:
    file = scratch / f"{folder.name}.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder, folder.name)
    return file


if __name__ == "__main__":
    sys.exit(main())
