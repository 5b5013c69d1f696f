"""What travels between the kernel operations and those who call them: packed weights, rows of 8-bit codes, epilogues.

Plain tuples of tensors and numbers; the operations on them are in `ops.py`, and every backend imports its types from here.

The 4-bit layout is bitsandbytes': a weight of n elements is flattened row-major and cut into blocks of `block_size` elements (the
last may be short). A value is `values[code] * absmax[block]`, computed in float32 and rounded once to the output dtype. With
double quantisation `absmax` is uint8 and `Nested` holds what decodes it: `absmax[b] = nested.values[codes[b]] * nested.absmax[b
// nested.block_size] + nested.offset` (two roundings, no FMA).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Nested(NamedTuple):
    """What decodes doubly quantised block constants.

    values: (256,) float32 table; absmax: (ceil(n_blocks / block_size),) float32; offset: (1,) float32.
    """

    values: Tensor
    absmax: Tensor
    offset: Tensor
    block_size: int = 256


class FourBit(NamedTuple):
    """A weight of `shape` in 4 bits (n elements).

    codes: (ceil(n/2),) uint8, two codes a byte, the first element in the high nibble; absmax: (ceil(n/block_size),) float32, or
    uint8 with `nested`; values: (16,) float32, the value of each code.
    """

    codes: Tensor
    absmax: Tensor
    values: Tensor
    block_size: int
    shape: torch.Size
    nested: Nested | None = None


PART = 64
"""Values of a row that share an 8-bit scale. With one scale a token, a few large channels took the others' precision (ADR 7)."""

LARGEST_CODE = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""Types of 8-bit codes -> what the largest magnitude of a part, or of a weight's row, becomes."""


def row_sizes(T: int, C: int) -> tuple[int, int]:
    """Elements of a `Rows8bit`'s codes, and of its scales, for T rows of C values.

    Padded to tiles of 12 rows and groups of 4 columns; the same for every backend, so that a compiled graph is too.
    """
    rows = -(-T // 12) * 12
    return rows * -(-C // 4) * 4, rows * -(-C // PART)


class Rows8bit(NamedTuple):
    """Rows scaled to 8 bits in parts of 64 columns: value [t, c] is about `code[t, c] * scale[t, c // 64]`.

    codes: int8 or float8_e4m3fn; scale: float32; start: int32, where a backend's sums with a part start; flat, of `row_sizes`
    elements, laid out as the backend likes. rows, columns: T, C.
    """

    codes: Tensor
    scale: Tensor
    start: Tensor
    rows: int
    columns: int


class Epilogue(NamedTuple):
    """What is added to a matrix product on its way out: `bias + scale * low @ factor`.

    bias: (columns,) or None; low: (T, r) contiguous and factor: (r, columns) with any strides, or both None.
    """

    bias: Tensor | None = None
    low: Tensor | None = None
    factor: Tensor | None = None
    scale: float = 1.0


NO_EPILOGUE = Epilogue()
