"""A packed weight plus a low-rank product, packed again: what merging an adapter writes, and merge-aware training computes with.

Both call `pack_sum`, so that on one machine and backend they get the same bytes. From int8 to nf4 and fp4 there is a kernel that
adds and quantises a tile of rows at a time; other pairs are summed in the buffer that all layers share (`kernels/decoded.py`) and
quantised by their codec. A tile would not do for int4 with double quantisation: weights are rounded by scales that depend on the
mean of all scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import QuantizationError
from lownibble.kernels import decoded, ops
from lownibble.quant import layouts
from lownibble.quant.codebook import codebook
from lownibble.quant.codecs import fourbit, quantize
from lownibble.quant.codecs.grouped import GroupedWeight
from lownibble.quant.packed import PackedWeight


@torch.no_grad()
def pack_sum(
    base: PackedWeight, lora_A: Tensor, lora_B: Tensor, scale: float, how: QuantConfig, name: str = "weight"
) -> PackedWeight:
    """pack(decode(base) + scale B A), summed in float32.

    Args:
        base: (N, K). lora_A: (r, K) float32. lora_B: (N, r) float32. how: the codec of the result. name: in errors.
    Raises:
        QuantizationError: the sum holds NaN or infinite values, or the codec does not support the shape; names the weight.
    """
    scaled = base.scaled_8bit if isinstance(base, GroupedWeight) else None
    if scaled is None or layouts.LAYOUTS.get(how.quant_type) is not layouts.four_bit:
        total = base.decode(decoded.scratch(base.shape, torch.float32, base.device))
        return quantize(total.addmm_(lora_B, lora_A, alpha=scale), how, name=name).with_dtype(base.dtype)
    layouts.four_bit(base.shape, how)  # checks the block size
    assert isinstance(how.block_size, int)
    table, low_Nr = codebook(how.quant_type, str(base.device)), lora_B * scale
    codes, absmax = ops.quantize_sum_4bit(scaled, low_Nr, lora_A.contiguous(), table.bounds, table.order, how.block_size)
    if not torch.isfinite(torch.stack([part.abs().max() for part in (absmax, lora_A, lora_B)])).all():
        raise QuantizationError(f"Cannot quantise '{name}' with its adapter: the sum is not finite. Look at the adapter.")
    return fourbit.of_codes(codes, absmax, base.shape, base.dtype, how)
