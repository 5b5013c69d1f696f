"""The compiled CPU kernels as a backend of `ops.py`."""

from functools import partial

from lownibble.kernels import plain
from lownibble.kernels.cpu.adamw import adamw_8bit
from lownibble.kernels.cpu.attention import attention, attention_backward, has_attention
from lownibble.kernels.cpu.decoder import decoder_layers
from lownibble.kernels.cpu.fourbit import (
    cross_entropy,
    dequantize_4bit,
    dequantize_8bit,
    gemv_4bit,
    gemv_bf16,
    matmul_4bit,
    matmul_dense,
    outer,
    quantize_4bit,
    quantize_8bit,
    quantize_sum_4bit,
)
from lownibble.kernels.cpu.grouped import dequantize_grouped, gemv_grouped, matmul_grouped
from lownibble.kernels.cpu.int8 import has_int8, matmul_8bit, matmul_8bit_dense, need_int8, quantize_rows, row_scales
from lownibble.kernels.cpu.loading import available_isas, isa, library, select_isa
from lownibble.kernels.cpu.low_rank import low_rank, low_rank_backward
from lownibble.kernels.plain import outer_experts
from lownibble.kernels.rows import add_low_rank_rows, attend_slots
from lownibble.kernels.types import PART

name = "cpu"
device_types = ("cpu",)
row_part: int | None = PART
experts_at_once = False
matmul_experts = partial(plain.matmul_experts, matmul_4bit, matmul_grouped)

__all__ = [
    "adamw_8bit", "add_low_rank_rows", "attend_slots", "attention", "attention_backward", "available_isas", "cross_entropy",
    "decoder_layers", "dequantize_4bit",
    "dequantize_8bit", "dequantize_grouped", "device_types", "experts_at_once", "gemv_4bit", "gemv_bf16", "gemv_grouped",
    "has_attention", "has_int8", "isa", "library", "low_rank", "low_rank_backward", "matmul_4bit", "matmul_8bit",
    "matmul_8bit_dense", "matmul_dense", "matmul_experts", "matmul_grouped", "name", "need_int8", "outer", "outer_experts",
    "quantize_4bit", "quantize_8bit", "quantize_rows", "quantize_sum_4bit", "row_part", "row_scales", "select_isa",
]  # fmt: skip
