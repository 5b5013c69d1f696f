"""QuantizedTensor: packed 4-bit codes with what decodes them.

A plain value, not a tensor subclass: four tensors and four facts. Modules keep the tensors as parameters (see `linear.py`) and
make this view when they compute. The layout is described in `kernels/ops.py`; it is bitsandbytes'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lownibble.kernels import ops
from lownibble.quant.codebook import codebook, dynamic8

NESTED_BLOCK_SIZE = 256
_NOTHING = ops.Addition()


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantised tensor of `shape` that stood for values of `dtype`.

    Attributes:
        codes: (ceil(n/2), 1) uint8, two codes a byte, the first element in the high nibble (bitsandbytes' packed shape).
        absmax: (ceil(n/block_size),) float32, or uint8 codes of it with double quantisation.
        nested_absmax: (ceil(n_blocks/256),) float32 constants of `absmax`'s codes; None without double quantisation.
        offset: () float32, the mean that was subtracted from the constants; None without double quantisation.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    block_size: int

    @property
    def double_quant(self) -> bool:
        """Whether the block constants are quantised too."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and constants."""
        return self.codes.nbytes + self.constant_nbytes

    @property
    def constant_nbytes(self) -> int:
        """Bytes of the quantisation constants alone."""
        return sum(t.nbytes for t in (self.absmax, self.nested_absmax, self.offset) if t is not None)

    def numel(self) -> int:
        """Elements of the tensor it stands for."""
        return math.prod(self.shape)

    @cached_property
    def nested(self) -> ops.Nested | None:
        """What decodes doubly quantised constants."""
        if self.nested_absmax is None or self.offset is None:
            return None
        return ops.Nested(dynamic8(str(self.device)), self.nested_absmax, self.offset, NESTED_BLOCK_SIZE)

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Flat codes, constants, values by code, and block size: how kernel operations take a weight."""
        return self.codes.view(-1), self.absmax, codebook(self.quant_type, str(self.device)).values, self.block_size

    @classmethod
    def unflatten(cls, tensors: list[Tensor], codec: str, shape: torch.Size) -> QuantizedTensor:
        """The weight of `shape` whose tensors and codec, e.g. 'nf4/64', a `QuantLinear` holds as `flat` and `codec`."""
        quant_type, _, block_size = codec.partition("/")
        nested_absmax, offset = tensors[2:] if len(tensors) == 4 else (None, None)
        return cls(tensors[0], tensors[1], nested_absmax, offset, shape, torch.float32, quant_type, int(block_size))

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The values, in `dtype` (default: the original one), of `shape`; written into `out` when given."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        return ops.dequantize_4bit(*self.parts, out, self.nested)

    def matmul(self, x_TC: Tensor, *, transposed: bool = False, addition: ops.Addition = _NOTHING) -> Tensor:
        """`x_TC @ W.T` with W (N, K), or `x_TC @ W` when transposed, plus `addition`, in x's dtype; no gradient."""
        return ops.matmul_4bit(x_TC.contiguous(), *self.parts, self.shape, transposed, addition, self.nested)

    def matvec(self, x_TK: Tensor) -> Tensor:
        """`x_TK @ W.T` with W (N, K) decoded on the fly: (T, N) in x's dtype. For a few rows; no gradient."""
        return ops.gemv_4bit(x_TK.contiguous(), *self.parts, self.shape[0], self.nested)
