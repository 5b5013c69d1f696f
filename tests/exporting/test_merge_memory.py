"""Peak memory of merging. Oracle: the kernel's high-water mark of a process that does nothing else."""

import subprocess
import sys

import pytest

from lownibble.bench.merge import MEASURE, write_large

MB = 2**20
SLACK = 14 * MB
"""Python objects of the skeleton and the allocator's rounding."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("onto", ["dequantized", "original", "nf4"])
def test_peak_is_a_shard_and_two_tensors(tmp_path, write, adapt, tokenizer, onto):
    """Of a checkpoint several times as large."""
    _, small = adapt(write(name="warm-up"), "nf4")
    large = write_large(tmp_path / "large")
    tokenizer.save_pretrained(large.folder)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large.adapter), str(tmp_path / "merged"), onto],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    allowed = large.shard_bytes + 2 * large.largest_bytes
    assert large.stored_bytes > 3 * allowed
    assert 0 < int(run.stdout.split()[-1]) <= allowed + SLACK
