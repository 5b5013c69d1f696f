"""Studies: runs in processes of their own, compared and reported."""

from lownibble.study.compare import compare

__all__ = ["compare"]
