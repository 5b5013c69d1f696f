"""Generation: a `Decoder` runs decoding steps, `decode` is a generation loop for transformers' `generate`."""

from lownibble.decoding.choice import choose
from lownibble.decoding.cpu import CpuDecoder
from lownibble.decoding.decoder import Cache, Decoder, Forking, RefusedError
from lownibble.decoding.drawing import Drawer, How, most_bytes
from lownibble.decoding.generate import decode

__all__ = ["Cache", "CpuDecoder", "Decoder", "Drawer", "Forking", "How", "RefusedError", "choose", "decode", "most_bytes"]
