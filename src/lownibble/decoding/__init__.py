"""Token by token on a 4-bit base: `Decoder` takes tokens through the model, `decode` is a loop for transformers' `generate`."""

from lownibble.decoding.decoder import Cache, Decoder
from lownibble.decoding.generate import decode

__all__ = ["Cache", "Decoder", "decode"]
