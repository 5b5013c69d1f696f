"""Double quantisation of block constants to 8 bits: bitsandbytes' scheme, for any codec.

The mean of all constants is subtracted (kept as a float32 offset); the rest becomes 8-bit codes of the signed dynamic map, in
blocks of 256 with a float32 absmax each: 0.127 instead of 0.5 bits per weight at block size 64.
"""

from __future__ import annotations

from torch import Tensor

from lownibble.kernels import ops
from lownibble.quant.codebook import dynamic8, dynamic8_lookup
from lownibble.quant.layouts import NESTED_BLOCK_SIZE


def encode(constants: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise constants (n,) float32: codes (n,) uint8, their absmax (ceil(n/256),) and the offset (1,)."""
    offset = (constants.mean() if constants.numel() else constants.new_zeros(())).view(1)
    codes, nested = ops.quantize_8bit(constants - offset, dynamic8_lookup(str(constants.device)), NESTED_BLOCK_SIZE)
    return codes, nested, offset


def decode(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """Dequantise to constants (n,) float32."""
    return ops.dequantize_8bit(codes, nested, dynamic8(str(codes.device)), NESTED_BLOCK_SIZE) + offset
