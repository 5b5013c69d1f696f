"""The comparison as one self-contained HTML page."""

from lownibble.study.report.page import write

__all__ = ["write"]
