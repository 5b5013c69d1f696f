"""The compiled kernels without Python: `native_check.cpp` compares each instruction set with the scalar one.

On this machine with the address and undefined-behaviour sanitizers; for aarch64 (NEON) cross-compiled and emulated. Needs
Debian's g++, and g++-aarch64-linux-gnu with qemu-user for the latter; skips what is missing.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "src" / "lownibble" / "kernels" / "native"
CHECK = Path(__file__).with_name("native_check.cpp")
X86_FLAGS = {
    "isa_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "int8_avx512vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"],
    "attention_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "low_rank_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "matmul_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}


def _build(compiler: str, flags: list[str], isa_flags: dict[str, list[str]], folder: Path) -> Path:
    common = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", *flags]
    objects = []
    for source in [*sorted(NATIVE.glob("*.cpp")), CHECK]:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([compiler, *common, *isa_flags.get(source.name, []), "-c", source, "-o", objects[-1]], check=True)
    program = folder / "native_check"
    subprocess.run([compiler, *flags, *objects, "-o", program], check=True)
    return program


def _need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags are for x86-64")
def test_this_machine_under_sanitizers(tmp_path: Path) -> None:
    _need("g++")
    flags = ["-O0", "-g1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = _build("g++", flags, X86_FLAGS, tmp_path)
    checked = subprocess.run([program], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "scalar: 120 cases equal scalar" in checked.stdout


@pytest.mark.slow
def test_neon_under_emulation(tmp_path: Path) -> None:
    _need("aarch64-linux-gnu-g++", "qemu-aarch64")
    program = _build("aarch64-linux-gnu-g++", ["-O2", "-static"], {}, tmp_path)
    checked = subprocess.run(["qemu-aarch64", program], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "neon: 120 cases equal scalar" in checked.stdout
