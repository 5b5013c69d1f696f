"""A backend that computes nothing: uninitialised results of the right shapes and dtypes, and only the real kernels' allocations.

For tracing the memory of a training step on fake tensors (`rehearsal/trace.py`). What the CPU kernels allocate outside torch is
not counted. Each thread keeps panels of a dequantised weight, a few hundred KiB, and from attention's backward some 8 (D + 96)
bytes for each token of the longest segment, with heads of D (`native/attention_avx512.cpp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lownibble.kernels import decoded, plain
from lownibble.kernels.adamw import AdamPart, CodeMap
from lownibble.kernels.decoder import Context, DecoderLayers, Segment, Step
from lownibble.kernels.rows import Attending, RowAdapters
from lownibble.kernels.types import NO_EPILOGUE, PART, Epilogue, FourBit, Grouped, Rows8bit, Scaled8bit, Stack, row_sizes

_PRODUCTS = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.bfloat16}
"""Dtype of the codes -> what the vendor's product of them comes in."""


class Traced:
    """A backend (`ops.Backend`) that mimics another one's allocations.

    Args:
        fused: 4-bit and grouped matmuls dequantise inside the kernel (CPUs with AVX-512), not into a buffer first.
        attention: there is a training attention kernel (the same CPUs).
        cross_entropy: there is a kernel for the loss (CUDA); else it is computed on a float32 copy of 16-bit logits.
        experts_at_once: products of experts are kernels for all experts (CUDA).
    """

    name = "traced"
    device_types: tuple[str, ...] | None = None
    row_part: int | None

    def __init__(self, *, fused: bool, attention: bool, cross_entropy: bool, experts_at_once: bool) -> None:
        self._fused, self._attention, self._cross_entropy = fused, attention, cross_entropy
        self.row_part, self.experts_at_once = PART if fused else None, experts_at_once

    def quantize_4bit(self, x: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """As `ops.quantize_4bit`."""
        n = x.numel()
        return x.new_empty((n + 1) // 2, dtype=torch.uint8), x.new_empty(-(-n // block_size), dtype=torch.float32)

    def quantize_sum_4bit(
        self, base: Scaled8bit, low_Nr: Tensor, lora_A: Tensor, bounds: Tensor, order: Tensor, block_size: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `ops.quantize_sum_4bit`."""
        return self.quantize_4bit(base.codes, bounds, order, block_size)

    def dequantize_4bit(self, weight: FourBit, out: Tensor) -> Tensor:
        """As `ops.dequantize_4bit`."""
        return out

    def quantize_8bit(self, x: Tensor, lookup: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """As `ops.quantize_8bit`."""
        return x.new_empty(x.numel(), dtype=torch.uint8), x.new_empty(-(-x.numel() // block_size))

    def dequantize_8bit(self, codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
        """As `ops.dequantize_8bit`."""
        return codes.new_empty(codes.numel(), dtype=torch.float32)

    def gemv_4bit(self, x_TK: Tensor, weight: FourBit) -> Tensor:
        """As `ops.gemv_4bit`."""
        return x_TK.new_empty(len(x_TK), weight.shape[0])

    def dequantize_grouped(self, weight: Grouped, out: Tensor) -> Tensor:
        """As `ops.dequantize_grouped`."""
        return out

    def gemv_grouped(self, x_TK: Tensor, weight: Grouped) -> Tensor:
        """As `ops.gemv_grouped`."""
        return x_TK.new_empty(len(x_TK), weight.shape[0])

    def matmul_4bit(self, x_TC: Tensor, weight: FourBit, transposed: bool, epilogue: Epilogue) -> Tensor:
        """As `ops.matmul_4bit`."""
        if self._fused and x_TC.dtype == torch.float32:
            return x_TC.new_empty(len(x_TC), weight.shape[1] if transposed else weight.shape[0])
        return decoded.matmul(partial(self.dequantize_4bit, weight), weight.shape, x_TC, transposed, epilogue)

    def matmul_grouped(self, x_TC: Tensor, weight: Grouped, transposed: bool, epilogue: Epilogue) -> Tensor:
        """As `ops.matmul_grouped`."""
        if self._fused and x_TC.dtype == torch.float32:
            return x_TC.new_empty(len(x_TC), weight.shape[1] if transposed else weight.shape[0])
        return decoded.matmul(partial(self.dequantize_grouped, weight), weight.shape, x_TC, transposed, epilogue)

    def matmul_dense(
        self, x_TC: Tensor, weight_NK: Tensor, transposed: bool, epilogue: Epilogue = NO_EPILOGUE, out: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """As `ops.matmul_dense`."""
        if self._fused and x_TC.dtype == torch.float32:
            return x_TC.new_empty(len(x_TC), weight_NK.shape[1] if transposed else weight_NK.shape[0]) if out is None else out
        return decoded.matmul_dense(x_TC, weight_NK, transposed, epilogue, out)

    def outer(self, a_TP: Tensor, b_TQ: Tensor, out: Tensor | None = None, adds: bool = False) -> Tensor:
        """As `ops.outer`."""
        if self._fused and a_TP.dtype == torch.float32:
            return a_TP.new_empty(a_TP.shape[1], b_TQ.shape[1]) if out is None else out
        return plain.outer(a_TP, b_TQ, out, adds)

    def matmul_experts(self, x_SC: Tensor, weights: Stack, ends_E: Tensor, transposed: bool, epilogue: Epilogue) -> Tensor:
        """As `ops.matmul_experts`."""
        return x_SC.new_empty(len(x_SC), weights.shape[2 if transposed else 1])

    def outer_experts(self, a_SP: Tensor, b_SQ: Tensor, ends_E: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """As `ops.outer_experts`."""
        return a_SP.new_empty(len(ends_E), a_SP.shape[1], b_SQ.shape[1], dtype=dtype)

    def row_scales(self, weight: FourBit, code_type: torch.dtype = torch.int8) -> Tensor:
        """As `ops.row_scales`."""
        return weight.codes.new_empty(weight.shape[0], dtype=torch.float32)

    def quantize_rows(
        self, x_TC: Tensor, column_scale: Tensor | None = None, code_type: torch.dtype = torch.int8
    ) -> Rows8bit:  # fmt: skip
        """As `ops.quantize_rows`."""
        if self.row_part is not None:
            x_TC = x_TC.float()
        n_codes, n_scales = row_sizes(len(x_TC), x_TC.shape[1], self.row_part)
        codes, scale = x_TC.new_empty(n_codes, dtype=code_type), x_TC.new_empty(n_scales, dtype=torch.float32)
        start = x_TC.new_empty(n_scales if self.row_part else 0, dtype=torch.int32)
        return Rows8bit(codes, scale, start, len(x_TC), x_TC.shape[1], self.row_part)

    def matmul_8bit(
        self, x: Rows8bit, weight: FourBit, row_scale: Tensor, transposed: bool, epilogue: Epilogue, dtype: torch.dtype
    ) -> Tensor:
        """As `ops.matmul_8bit`."""
        columns = weight.shape[1] if transposed else weight.shape[0]
        if self.row_part is not None:
            return weight.codes.new_empty((x.rows, columns), dtype=torch.float32).to(dtype)
        decoded.scratch(weight.shape, x.codes.dtype, weight.codes.device)
        sums = weight.codes.new_empty((x.rows, columns), dtype=_PRODUCTS[x.codes.dtype])
        return decoded.add_low_rank(sums if sums.dtype == dtype else torch.empty_like(sums, dtype=dtype), epilogue)

    def matmul_8bit_dense(
        self, x: Rows8bit, weight_NK: Tensor, row_scale: Tensor, transposed: bool, out: Tensor
    ) -> Tensor:  # fmt: skip
        """As `ops.matmul_8bit_dense`."""
        return out

    def has_attention(self, head_dim: int) -> bool:
        """Whether there is an attention kernel for heads of this size."""
        return self._attention and head_dim % 16 == 0

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """As `ops.attention`."""
        B, heads, T, D = q.shape
        return q.new_empty(B, T, heads, D), q.new_empty(B * T, heads)

    def attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `ops.attention_backward`."""
        dq, dk, dv = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
        return dq, dk, dv

    def low_rank(self, x_TC: Tensor, factor_Cr: Tensor, scale: float) -> Tensor:
        """As `ops.low_rank`."""
        if not (self._fused and x_TC.dtype == torch.float32):
            return plain.low_rank(x_TC, factor_Cr, scale)
        return x_TC.new_empty(len(x_TC), factor_Cr.shape[1])

    def low_rank_backward(
        self, dy_TN: Tensor, x_TK: Tensor, low_Tr: Tensor, lora_B: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `ops.low_rank_backward`; the buffer of partial sums is not counted."""
        own = dy_TN.is_cuda or (self._fused and dy_TN.dtype == torch.float32)
        if not own:
            return plain.low_rank_backward(dy_TN, x_TK, low_Tr, lora_B, scale)
        dA, dB = (x_TK.new_empty(shape, dtype=torch.float32) for shape in ((low_Tr.shape[1], x_TK.shape[1]), lora_B.shape))
        return torch.empty_like(low_Tr), dA, dB

    def cross_entropy(self, logits_LV: Tensor, labels_L: Tensor, scale: float | Tensor, wants_gradient: bool) -> Tensor:
        """As `ops.cross_entropy`; the plain version's temporaries of a row each are not counted."""
        if not self._cross_entropy:
            logits_LV.float()
        return logits_LV.new_empty(len(logits_LV), dtype=torch.float32)

    def gemv_bf16(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        """As `ops.gemv_bf16`."""
        return x_TK.new_empty(len(x_TK), len(weight_NK))

    def decoder_layers(
        self, x_TH: Tensor, layers: DecoderLayers, contexts: Sequence[Context], step: Step, segments: Sequence[Segment]
    ) -> None:
        """As `ops.decoder_layers`: in place, so nothing is allocated."""

    def attend_slots(
        self, q_BHD: Tensor, keys: Tensor, values: Tensor, slots_B: Tensor, positions_B: Tensor, how: Attending
    ) -> Tensor:
        """As `ops.attend_slots`."""
        return q_BHD.new_empty(*q_BHD.shape[:2], values.shape[3])

    def add_low_rank_rows(self, y_TN: Tensor, x_TK: Tensor, adapters: RowAdapters, linear: int) -> None:
        """As `ops.add_low_rank_rows`: in place; a low-rank product of a row is not counted."""

    def adamw_8bit(self, parts: Sequence[AdamPart], books: tuple[CodeMap, CodeMap], found_inf: Tensor | None) -> None:
        """As `ops.adamw_8bit`: in place; a stretch of temporaries is not counted."""
