"""The codecs, one file per family, and their entry points `quantize` and `dequantize`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import QuantizationError
from lownibble.quant import layouts
from lownibble.quant.codecs.grouped import Held, to_groups
from lownibble.quant.packed import PackedExperts, PackedWeight
from lownibble.registry import CODECS

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    tensor: Tensor, quant: str | QuantConfig = "nf4", *, name: str = "tensor", statistics: Tensor | None = None
) -> PackedWeight:
    """Pack a float32, bfloat16 or float16 tensor (also empty, non-contiguous, or of odd size if the codec supports it).

    Args:
        tensor: the values; on any device that a kernel backend supports.
        quant: a `QuantConfig`, or a quant_type with its defaults (block 64, double quantisation).
        name: the tensor's name in errors.
        statistics: second moments of the layer's inputs, for codecs that use them.
    Raises:
        QuantizationError: another dtype, a meta tensor, a NaN or infinite value, or a shape that the codec does not support;
            names the tensor.
    """
    config = QuantConfig(quant_type=quant) if isinstance(quant, str) else quant
    return _packed(tensor, config, name, statistics, CODECS[config.quant_type].quantize)


def quantize_experts(tensor: Tensor, config: QuantConfig, *, name: str = "tensor") -> PackedExperts:
    """Pack the weights (E, N, K) of a mixture's experts, one after another.

    Raises:
        QuantizationError: as `quantize`; names the tensor and the expert.
    """
    each = (quantize(matrix, config, name=f"{name}[{expert}]") for expert, matrix in enumerate(tensor))
    return PackedExperts.of(each, len(tensor))


def quantize_for(
    tensor: Tensor, config: QuantConfig, held: Held, *, name: str = "tensor", statistics: Tensor | None = None
) -> PackedWeight:
    """`quantize` by a grouped codec, with scales that a file format holds.

    Raises:
        QuantizationError: as `quantize`, or a scale is too large for the format.
    """
    return _packed(tensor, config, name, statistics, partial(to_groups, held=held))


def _packed(
    tensor: Tensor, config: QuantConfig, name: str, statistics: Tensor | None, pack: Callable[..., PackedWeight]
) -> PackedWeight:
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
    try:
        packed = pack(tensor.detach(), config, statistics)
    except QuantizationError as error:
        raise QuantizationError(f"Cannot quantise '{name}': {error}") from None
    _check(packed, config, tensor.shape)
    return packed


def _check(packed: PackedWeight, config: QuantConfig, shape: torch.Size) -> None:
    """Check that a codec, which may be a plug-in, returned the tensors of its layout."""
    said = layouts.layout(shape, config)
    found = {key: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for key, t in packed.tensors().items()}
    scalars = [key for key, spec in said.items() if not spec.shape]
    wrong = [f"'{key}' must have at least one dimension" for key in scalars] or [
        f"'{key}' is {found.get(key)}, and its layout says {tuple(said[key]) if key in said else None}"
        for key in {**said, **found} if found.get(key) != (tuple(said[key]) if key in said else None)
    ]  # fmt: skip
    if wrong:
        raise QuantizationError(f"The codec '{config.quant_type}' is at fault: its tensor {'; '.join(wrong)}. Mend its file.")


def dequantize(quantized: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a packed tensor in `dtype` (default: its original dtype)."""
    return quantized.dequantize(dtype)
