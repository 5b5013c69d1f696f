"""Builds the CPU kernels: one shared library from one translation unit per instruction set, each with its own flags.

The result is `lownibble/kernels/_native.so`, a plain C library that `lownibble.kernels.cpu` loads with ctypes. It uses nothing of
Python's, so that one wheel serves every Python 3 (its tag is py3-none-PLATFORM). It is optional: without a C++ compiler (or with
LOWNIBBLE_NO_NATIVE=1) the installation succeeds, `lownibble/kernels/_native.txt` keeps the reason, and the package runs on its
plain-torch kernels. Everything else about the package is in pyproject.toml.

macOS is built without OpenMP: Apple's clang has none, and a second runtime beside torch's would be worse than one thread.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

KERNELS = Path("src/lownibble/kernels")
COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
OPENMP_FLAGS = [] if sys.platform == "darwin" else ["-fopenmp"]
if sys.platform == "darwin":  # python.org's Python asks for both architectures, of which the flags below fit one
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {
    "isa_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"] if X86 else [],
    "int8_avx512vnni.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"] if X86 else [],
    "attention_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"] if X86 else [],
    "low_rank_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"] if X86 else [],
    "matmul_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"] if X86 else [],
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"] if X86 else [],
}
"""A file for another architecture compiles to nothing."""


class BuildNative(build_ext):
    """Compile each file with its own flags; on failure keep the reason instead of stopping the installation."""

    reason = ""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def run(self):
        super().run()
        for folder in [Path(self.build_lib, "lownibble", "kernels"), *([KERNELS] if self.inplace else [])]:
            marker = folder / "_native.txt"
            if self.reason:
                folder.mkdir(parents=True, exist_ok=True)
                for stale_library in folder.glob("_native.*so"):
                    stale_library.unlink()
                marker.write_text(self.reason + "\n", encoding="utf-8")
            else:
                marker.unlink(missing_ok=True)

    def build_extension(self, ext):
        self.reason = self.obstacle()
        if not self.reason:
            try:
                self.compile_and_link(ext, Path(self.get_ext_fullpath(ext.name)))
            except (BaseError, CCompilerError) as error:
                self.warn(str(error))
                self.reason = "the C++ compiler failed at install time; reinstall with 'pip install -v' to see why."
        if self.reason:
            self.warn(f"lownibble runs without compiled CPU kernels (slower): {self.reason}")

    def obstacle(self):
        if os.environ.get("LOWNIBBLE_NO_NATIVE", "0") not in ("", "0"):
            return "LOWNIBBLE_NO_NATIVE was set at install time; unset it and reinstall."
        if self.compiler.compiler_type != "unix":
            return f"the '{self.compiler.compiler_type}' compiler is not supported; use Linux or macOS with GCC or Clang."
        compiler = (getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so)[0]
        if not shutil.which(compiler):
            return f"no C++ compiler was found at install time ('{compiler}'); install one (e.g. g++) and reinstall."
        return ""

    def compile_and_link(self, ext, target):
        objects = []
        for source in ext.sources:
            flags = COMMON_FLAGS + OPENMP_FLAGS + ISA_FLAGS.get(Path(source).name, [])
            objects += self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=OPENMP_FLAGS, target_lang="c++")


class AnyPython(bdist_wheel):
    """The compiled library belongs to a platform, not to a version of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "lownibble.kernels._native",
            sources=sorted(str(path) for path in (KERNELS / "native").glob("*.cpp")),
            depends=sorted(str(path) for path in (KERNELS / "native").glob("*.h")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
