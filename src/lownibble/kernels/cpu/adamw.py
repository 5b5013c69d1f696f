"""AdamW with moments in 8 bits: plain torch around the compiled decoder of codes."""

from functools import partial

from lownibble.kernels import adamw
from lownibble.kernels.cpu.fourbit import dequantize_8bit

adamw_8bit = partial(adamw.adamw_8bit, dequantize_8bit)
"""As `ops.adamw_8bit`."""
