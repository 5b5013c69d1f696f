"""How long OpenMP's threads spin at a barrier before they sleep.

A step on a CPU is thousands of parallel regions, and at the end of each threads wait for the last one. libgomp, which torch on
Linux brings along, lets them spin for 300,000 iterations, some milliseconds. Where something else runs on the same processors,
the thread that all wait for may not be running, and those that spin take the processor from it: one other process makes a step
several times as slow. 3,000 iterations, tens of microseconds, last until any region that follows at once, and then sleeping frees
the processor. On a machine with nothing else to do that costs nothing that could be measured (docs/log.md).

libgomp reads the variable when it is loaded, so it is set before torch is imported, and processes that are started inherit it.
Results do not depend on it.
"""

import os
import sys
from collections.abc import MutableMapping

SPIN_COUNT = "3000"

GIVEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""What libgomp reads for that."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `GOMP_SPINCOUNT`, unless it or `OMP_WAIT_POLICY` is set, or torch is imported already."""
    if "torch" not in sys.modules and not any(name in environment for name in GIVEN):
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT
