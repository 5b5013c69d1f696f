"""AdamW with both moments in 8 bits: bitsandbytes' blockwise optimiser (Dettmers et al. 2021), 2.03 bytes per parameter
instead of 8.

Each block of 256 elements shares its absmax; each element is a code of the dynamic map, signed for the first moment and
unsigned for the second. The moments are dequantised to float32, updated, used and quantised again (`kernels/adamw.py`; on CUDA by
one kernel for all tensors, `kernels/triton_adamw.py`). Tensors below 4096 elements keep float32 moments, as in bitsandbytes.

A value gets the nearest code, as in bitsandbytes on CUDA and in its plain-torch path. Its CPU build uses a lookup table of
65,536 points instead, whose steps of 3e-5 are too coarse for a second moment: everything below 1.5e-5 of a block's absmax
becomes 1.6e-5 there (`docs/log.md`). For absmax values, where that table is our reference, it does not matter (ADR 4).
"""

from __future__ import annotations

from functools import cache

from lownibble.kernels.adamw import CodeMap, code_map
from lownibble.optim.specs import BLOCK_8BIT, SMALLEST_8BIT
from lownibble.quant.codebook import dynamic8, dynamic8_unsigned

BLOCK = BLOCK_8BIT
SMALLEST = SMALLEST_8BIT
"""Elements below which a tensor's moments stay in float32 (bitsandbytes' `min_8bit_size`)."""


@cache
def code_maps(device: str) -> tuple[CodeMap, CodeMap]:
    """The code books of the first and the second moment."""
    return code_map(dynamic8(), device), code_map(dynamic8_unsigned(), device)
