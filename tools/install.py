"""Create the virtual environment and install Lownibble into it: `python tools/install.py VENV [--dev] [--lowest | --newest]`.
Needs Python alone. Versions are those of constraints.txt; with --lowest the lowest that pyproject.toml declares, but for the
tests' own tools; with --newest whatever pip finds. setuptools and triton are then those that torch wants.

torch is installed first and by itself: from whatever index pip is set up for if that offers the pinned version as a CPU build,
else from PyTorch's CPU index, else plain. Otherwise a machine without a GPU would fetch gigabytes of CUDA libraries. It is
installed again where the pin has moved; --newest asks for a newer one each time.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOWEST = re.compile(r"([\w.-]+)>=([\d.]+)")


def main(folder: str, *flags: str) -> int:
    """Install into the virtual environment `folder`, creating it; with --dev the tests' needs as well."""
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever Python is there
        print(f"Lownibble needs Python 3.11 or newer; this is {platform.python_version()}. Set PYTHON=...", file=sys.stderr)
        return 2
    target = Path(folder)
    python = target / "bin" / "python"
    if not _runs(python, "-c", ""):  # not there, or of a Python that was removed from the system
        print(f"creating {folder}", file=sys.stderr)
        venv.create(target, with_pip=True, symlinks=True, clear=(target / "pyvenv.cfg").exists())
    elif not _runs(python, "-m", "pip", "--version"):  # creating it was interrupted
        subprocess.call([str(python), "-m", "ensurepip", "--upgrade"])
    newer = ["--upgrade"] * ("--newest" in flags)
    pip = [str(python), "-m", "pip", "install", *newer, "--quiet", "--disable-pip-version-check", "--no-compile"]
    constraints, allowed = target / "constraints.txt", versions(flags)
    constraints.write_text("\n".join(f"{name}{version}" for name, version in allowed.items()))
    wanted = f"torch{allowed.get('torch', '')}"
    if "--newest" in flags or not _fits(_version_of_torch(python), allowed.get("torch", "")):
        print("installing torch", file=sys.stderr)
        ways = [[wanted]] if shutil.which("nvidia-smi") else [[wanted, "--index-url", CPU_INDEX], [wanted]]
        if _pip_has_local_torch(python, wanted):
            ways = [[wanted]]
        if all(subprocess.call([*pip, *way]) != 0 for way in ways):
            print("torch could not be installed; see pip's message above.", file=sys.stderr)
            return 1
    print("installing lownibble", file=sys.stderr)
    extra = "[dev]" if "--dev" in flags else ""
    return subprocess.call([*pip, "--constraint", str(constraints), "--editable", f"{ROOT}{extra}"])


def _runs(python: Path, *arguments: str) -> bool:
    try:
        return subprocess.run([str(python), *arguments], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _version_of_torch(python: Path) -> str:
    """'2.13.0', or '' where torch cannot be imported."""
    asked = [str(python), "-c", "import torch; print(torch.__version__.partition('+')[0])"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def _fits(version: str, allowed: str) -> bool:
    """Whether a version is there and the one that is allowed: '==2.13.0', '==2.11.*', or '' for any."""
    wanted = allowed.removeprefix("==").removesuffix("*")
    return bool(version) and (version == wanted or not wanted or (wanted.endswith(".") and version.startswith(wanted)))


def versions(flags: tuple[str, ...]) -> dict[str, str]:
    """Name -> the versions that are allowed of it."""
    import tomllib  # not in a Python that is refused

    pinned = (line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    allowed = {name.replace("_", "-"): f"=={version}" for name, version in pinned}
    if "--newest" in flags:
        return {}
    if "--lowest" not in flags:
        return allowed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name not in ("dev", "release")}
    declared = [
        match for wanted in (project["dependencies"], *extras.values()) for each in wanted if (match := LOWEST.match(each))
    ]
    lowest = {match[1].replace("_", "-"): f"=={match[2]}.*" for match in declared}
    return {name: allowed[name] for name in allowed.keys() - lowest.keys() - {"setuptools", "triton"}} | lowest


def _pip_has_local_torch(python: Path, wanted: str) -> bool:
    """Whether pip's configured places offer a CPU wheel of torch (a file with a +cpu version)."""
    found = subprocess.run(
        [str(python), "-m", "pip", "install", "--dry-run", "--no-deps", "--disable-pip-version-check", wanted],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "+cpu" in found.stdout


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
