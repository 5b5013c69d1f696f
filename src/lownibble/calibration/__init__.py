"""Statistics of layer inputs over calibration rows, one decoder layer at a time."""

from lownibble.calibration.layers import walk
from lownibble.calibration.moments import Moments
from lownibble.calibration.rows import join_rows, row_length

__all__ = ["Moments", "join_rows", "row_length", "walk"]
