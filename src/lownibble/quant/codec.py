"""Quantise and dequantise: what each codec does to a tensor, in one table.

Bytes equal bitsandbytes' `quantize_4bit` (codes, constants, offset; double quantisation on and off), so checkpoints move
between the two without conversion.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import QuantizationError
from lownibble.kernels import ops
from lownibble.quant.codebook import FOUR_BIT, codebook, dynamic8_lookup
from lownibble.quant.tensor import NESTED_BLOCK_SIZE, QuantizedTensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _four_bit(tensor: Tensor, config: QuantConfig) -> QuantizedTensor:
    device = str(tensor.device)
    table = codebook(config.quant_type, device)
    codes, absmax = ops.quantize_4bit(tensor.reshape(-1).contiguous(), table.bounds, table.order, config.block_size)
    nested_absmax = offset = None
    if config.double_quant:
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        absmax, nested_absmax = ops.quantize_8bit(absmax - offset, dynamic8_lookup(device), NESTED_BLOCK_SIZE)
    return QuantizedTensor(
        codes.view(-1, 1), absmax, nested_absmax, offset, tensor.shape, tensor.dtype, config.quant_type, config.block_size
    )


CODECS: dict[str, Callable[[Tensor, QuantConfig], QuantizedTensor]] = dict.fromkeys(FOUR_BIT, _four_bit)
"""quant_type -> encoder. Decoding is `QuantizedTensor.dequantize`."""


def quantize(tensor: Tensor, quant: str | QuantConfig = "nf4", *, name: str = "tensor") -> QuantizedTensor:
    """Quantise a float32, bfloat16 or float16 tensor of any shape (also empty, non-contiguous, odd sizes).

    Args:
        tensor: the values; on any device a kernel backend handles.
        quant: a `QuantConfig`, or a quant_type with its defaults (block 64, double quantisation).
        name: how errors call the tensor.
    Raises:
        QuantizationError: the dtype is not a float, or a value is NaN or infinite; names the tensor.
    """
    config = QuantConfig(quant_type=quant) if isinstance(quant, str) else quant
    if tensor.dtype not in _FLOATS:
        raise QuantizationError(
            f"Cannot quantise '{name}': its dtype is {tensor.dtype}. Convert it to float32, bfloat16 or float16."
        )
    if tensor.is_meta:
        raise QuantizationError(f"Cannot quantise '{name}': it has no data (meta device). Load its weights first.")
    if tensor.numel() and not torch.isfinite(torch.stack(tensor.detach().aminmax())).all():  # aminmax propagates NaN
        bad = int((~torch.isfinite(tensor)).sum())
        raise QuantizationError(
            f"Cannot quantise '{name}': {bad} of its {tensor.numel()} values are NaN or infinite. "
            "Check the checkpoint it came from, or add the module to skip_modules."
        )
    return CODECS[config.quant_type](tensor.detach(), config)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a quantised tensor in `dtype` (default: the dtype it was made from)."""
    return quantized.dequantize(dtype)
