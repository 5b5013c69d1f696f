"""Quantised tensors: codebooks, codecs and the linear layer that computes on them."""

from lownibble.quant import eightbit
from lownibble.quant.codec import CODECS, dequantize, quantize
from lownibble.quant.linear import QuantLinear, exact_products, is_plain_linear
from lownibble.quant.tensor import QuantizedTensor

__all__ = ["CODECS", "QuantLinear", "QuantizedTensor", "dequantize", "eightbit", "exact_products", "is_plain_linear", "quantize"]
