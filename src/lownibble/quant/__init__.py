"""Packed weights: codebooks, codecs, their protocol, and the linear layer that computes on them.

Imports are lazy, so that `layouts`, which needs no torch, can be used without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lownibble.lazy import lazily

if TYPE_CHECKING:
    from lownibble.quant.codecs import dequantize, quantize
    from lownibble.quant.linear import (
        QuantLinear,
        exact_products,
        is_linear,
        is_plain_linear,
        is_transposed,
        matrix,
        matrix_shape,
    )
    from lownibble.quant.packed import Codec, PackedWeight
    from lownibble.quant.packed import PackedWeight as QuantizedTensor

_HOME = {
    "Codec": "packed", "PackedWeight": "packed", "QuantLinear": "linear", "QuantizedTensor": "packed:PackedWeight",
    "dequantize": "codecs", "quantize": "codecs",
    **dict.fromkeys(("exact_products", "is_linear", "is_plain_linear", "is_transposed", "matrix", "matrix_shape"), "linear"),
}  # fmt: skip

__all__ = [
    "Codec",
    "PackedWeight",
    "QuantLinear",
    "QuantizedTensor",
    "dequantize",
    "exact_products",
    "is_linear",
    "is_plain_linear",
    "is_transposed",
    "matrix",
    "matrix_shape",
    "quantize",
]

__getattr__ = lazily(__name__, _HOME)
