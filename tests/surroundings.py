"""The variables that tests and the processes they start run under. Imported by `conftest.py` before torch, which reads them.

pytest-xdist's workers share the processors: each gets its part as threads. With all processors for each of two workers on two
processors, a run of a tiny model took 3 to 6 times as long: on tensors this small, threads mostly wait for each other.

Bytecode is kept, although images of containers often say otherwise: compiling torch, transformers and sympy over and over is
eight of the thirteen seconds that a training process takes to start. Inductor compiles in the process that asks for it: its pool
of workers, each of which imports torch, is for Triton's kernels.
"""

import os
import sys

import lownibble  # noqa: F401 - says how threads wait

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
if workers:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
