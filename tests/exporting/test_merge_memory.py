"""Peak memory of merging. Oracle: the kernel's high-water mark of a process that does nothing else."""

import subprocess
import sys

import pytest

from lownibble.bench.merge import MEASURE, SIZES, write_large

MB = 2**20
SLACK = 14 * MB
"""Python objects of the skeleton and the allocator's rounding."""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("onto", "tokens"), [("dequantized", 0), ("original", 0), ("nf4", 0), ("dequantized", 512)])
def test_peak_is_a_shard_and_two_tensors(tmp_path, write, adapt, onto, tokens):
    """Of a checkpoint several times as large; measuring holds the states of its rows besides: five models' last and a layer's."""
    _, small = adapt(write(name="warm-up"), "nf4")
    large = write_large(tmp_path / "large")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large.adapter), str(tmp_path / "merged"), onto, str(tokens)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    allowed = large.shard_bytes + 2 * large.largest_bytes
    assert large.stored_bytes > 3 * allowed
    states = 4 * tokens * (5 * SIZES["hidden_size"] + 2 * SIZES["intermediate_size"])
    assert 0 < int(run.stdout.split()[-1]) <= allowed + states + SLACK
