"""pytest-xdist's workers share the processors: each gets its part as threads, and so do the processes that it starts.

Imported by `conftest.py` before torch, which reads the variable. With all processors for each of two workers on two processors, a
run of a tiny model took 3 to 6 times as long: on tensors this small, threads mostly wait for each other.
"""

import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
if workers:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
