"""Double quantisation: block constants brought to 8 bits, the mean apart. bitsandbytes' scheme, for the constants of any codec.

The mean of all constants is subtracted (kept as a float32 offset), then 8-bit codes of the signed dynamic map in blocks of 256
with a float32 constant each: 0.127 instead of 0.5 bits a weight at a block of 64.
"""

from __future__ import annotations

from torch import Tensor

from lownibble.kernels import ops
from lownibble.quant.codebook import dynamic8, dynamic8_lookup
from lownibble.quant.layouts import NESTED_BLOCK_SIZE


def encode(constants: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n,) uint8, their constants (ceil(n/256),) and the offset (1,) of constants (n,) float32."""
    offset = (constants.mean() if constants.numel() else constants.new_zeros(())).view(1)
    codes, nested = ops.quantize_8bit(constants - offset, dynamic8_lookup(str(constants.device)), NESTED_BLOCK_SIZE)
    return codes, nested, offset


def decode(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """The constants (n,) float32."""
    return ops.dequantize_8bit(codes, nested, dynamic8(str(codes.device)), NESTED_BLOCK_SIZE) + offset
