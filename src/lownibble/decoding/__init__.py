"""Generation on a 4-bit base: `Decoder` runs decode steps, `decode` is a generation loop for transformers' `generate`."""

from lownibble.decoding.decoder import Cache, Decoder
from lownibble.decoding.form import branch_paths
from lownibble.decoding.generate import decode

__all__ = ["Cache", "Decoder", "branch_paths", "decode"]
