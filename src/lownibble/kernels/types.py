"""Argument and result types of the kernel operations: packed weights, rows of 8-bit codes, epilogues.

Plain tuples of tensors and numbers; the operations on them are in `ops.py`, and every backend imports its types from here.

The 4-bit layout is bitsandbytes': a weight of n elements is flattened row-major and cut into blocks of `block_size` elements (the
last may be short). A value is `values[code] * absmax[block]`, computed in float32 and rounded once to the output dtype. With
double quantisation `absmax` is uint8 codes, which `Nested` dequantises: `absmax[b] = nested.values[codes[b]] * nested.absmax[b
// nested.block_size] + nested.offset` (two roundings, no FMA).

A stack of experts' matrices is a packed weight of shape (E, N, K) whose tensors, but for the tables, hold one expert's after the
other's: each expert is packed on its own (`of_expert`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token without a loss, as torch has it."""


class Nested(NamedTuple):
    """Tables and constants that dequantise a double-quantised absmax.

    values: (256,) float32 table; absmax: (ceil(n_blocks / block_size),) float32; offset: (1,) float32.
    """

    values: Tensor
    absmax: Tensor
    offset: Tensor
    block_size: int = 256


class FourBit(NamedTuple):
    """A packed 4-bit weight of `shape` (n elements).

    codes: (ceil(n/2),) uint8, two codes a byte, the first element in the high nibble; absmax: (ceil(n/block_size),) float32, or
    uint8 with `nested`; values: (16,) float32, the value of each code.
    """

    codes: Tensor
    absmax: Tensor
    values: Tensor
    block_size: int
    shape: torch.Size
    nested: Nested | None = None


class Grouped(NamedTuple):
    """A weight of `shape` packed in groups of `group_size` neighbours in a row: `scale * (values[code] - zero)`.

    Computed in float32 with one rounding for the difference and one for the product, and rounded once to the output dtype.

    Attributes:
        codes: flat; (n,) int8 or float8_e4m3fn; or codes of 2 to 4 bits as a string of bits, the first in the highest bits,
            uint8. A row is whole bytes.
        bits: of a code. values: (2^bits,) float32, the value of each code.
        scale: (groups,) float32, or uint8 with `nested`.
        zero: None, or zero points packed as the codes are, uint8; the values are then the codes themselves.
        order: None, or (K,) int32: column j of the codes is column `order[j]` of the weight.
    """

    codes: Tensor
    bits: int
    values: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None
    group_size: int
    shape: torch.Size
    nested: Nested | None = None


Stack = Tensor | FourBit | Grouped
"""Matrices (E, N, K) of experts: dense, or packed each on its own."""


def of_expert(weights: Stack, expert: int) -> Stack:
    """The matrix (N, K) of one expert; it shares the tensors."""
    if isinstance(weights, Tensor):
        return weights[expert]
    nested, n_experts, shape = weights.nested, weights.shape[0], weights.shape[1:]

    def part(tensor: Tensor) -> Tensor:
        return tensor.view(n_experts, -1)[expert]

    if nested is not None:
        nested = nested._replace(absmax=part(nested.absmax), offset=part(nested.offset))
    if isinstance(weights, FourBit):
        return weights._replace(codes=part(weights.codes), absmax=part(weights.absmax), shape=shape, nested=nested)
    zero = None if weights.zero is None else part(weights.zero)
    order = None if weights.order is None else part(weights.order)
    return weights._replace(
        codes=part(weights.codes), scale=part(weights.scale), zero=zero, order=order, shape=shape, nested=nested
    )  # fmt: skip


class Scaled8bit(NamedTuple):
    """An int8 weight: value [n, k] is `codes[n, k] * scale[(n * K + k) // group]`.

    codes: (N, K) int8; scale: (N * K / group,) float32; group: values that share a scale; divides K.
    """

    codes: Tensor
    scale: Tensor
    group: int


PART = 64
"""Values of a row that share an 8-bit scale on CPUs. With one scale per token, outlier channels cost the others precision (ADR
7); the vendor's products on CUDA take one a row (ADR 35)."""

LARGEST_CODE = {torch.int8: 127, torch.float8_e4m3fn: 448}
"""8-bit code dtype -> the magnitude that the largest value of a part, or of a weight row, is scaled to."""


def row_sizes(T: int, C: int, part: int | None = PART) -> tuple[int, int]:
    """Numbers of elements of a `Rows8bit`'s codes and scales, for T rows of C values.

    Parts are padded to tiles of 12 rows and groups of 4 columns; the same for every backend, so that compiled graphs are too.
    Whole rows (`part` None) are not padded.
    """
    if part is None:
        return T * C, T
    rows = -(-T // 12) * 12
    return rows * -(-C // 4) * 4, rows * -(-C // PART)


class Rows8bit(NamedTuple):
    """Rows quantised to 8 bits in parts of `part` columns: value [t, c] is about `code[t, c] * scale[t, c // part]`.

    codes: int8 or float8_e4m3fn; scale: float32; start: int32, a backend's initial accumulator of each part; all flat, of
    `row_sizes` elements, in a backend-specific layout. rows, columns: T, C. part: 64, or None for one scale a row; `start` is
    then empty, and codes are row-major.
    """

    codes: Tensor
    scale: Tensor
    start: Tensor
    rows: int
    columns: int
    part: int | None = PART


class Epilogue(NamedTuple):
    """Terms added to the output of a matmul: `bias + scale * low @ factor`.

    bias: (columns,) or None; low: (T, r) contiguous and factor: (r, columns) with any strides, or both None.
    """

    bias: Tensor | None = None
    low: Tensor | None = None
    factor: Tensor | None = None
    scale: float = 1.0


NO_EPILOGUE = Epilogue()
