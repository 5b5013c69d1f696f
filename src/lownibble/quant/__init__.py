"""Quantised tensors: codebooks, codecs and the linear layer that computes on them."""

from lownibble.quant import eightbit
from lownibble.quant.codec import CODECS, dequantize, quantize
from lownibble.quant.linear import QuantLinear, is_plain_linear
from lownibble.quant.tensor import QuantizedTensor

__all__ = ["CODECS", "QuantLinear", "QuantizedTensor", "dequantize", "eightbit", "is_plain_linear", "quantize"]
