"""The compiled kernels write to memory of their own size and kind, whatever torch's default dtype and device are then. Oracle:
their results with torch's own defaults."""

import threading
from functools import partial

import pytest
import torch
from defaults import default_dtype
from oracles import assert_same_bits, random
from torch.utils._pytree import tree_map

from lownibble.config import QuantConfig
from lownibble.errors import BackendError
from lownibble.kernels import cpu
from lownibble.kernels.cpu import decoder
from lownibble.kernels.types import Epilogue
from lownibble.quant import quantize
from lownibble.quant.codebook import codebook, dynamic8, dynamic8_lookup

try:
    HAS_INT8, HAS_ATTENTION = cpu.has_int8(), cpu.has_attention(16)
except BackendError as error:
    pytest.skip(str(error), allow_module_level=True)


SURROUNDINGS = {
    "float64": partial(default_dtype, torch.float64),
    "bfloat16": partial(default_dtype, torch.bfloat16),
    "meta": partial(torch.device, "meta"),
}

T, N, K, R = 21, 48, 64, 5
TABLE = codebook("nf4")
WEIGHT_NK, X_TK, DY_TN = random(N * K).view(N, K), random(T * K, seed=1).view(T, K), random(T * N, seed=2).view(T, N)
LOW_TR, A_RK, B_NR = random(T * R, seed=3).view(T, R), random(R * K, seed=4).view(R, K), random(N * R, seed=5).view(N, R)
FOUR_BIT = quantize(WEIGHT_NK).four_bit
GROUPED = quantize(WEIGHT_NK, QuantConfig(quant_type="int4")).grouped
INT8 = quantize(WEIGHT_NK, QuantConfig(quant_type="int8", double_quant=False)).scaled_8bit
Q, CU_SEQLENS = random(2 * T * 16).view(1, 2, T, 16), torch.tensor([0, 9, T])
ADDED = Epilogue(None, LOW_TR, B_NR.t(), 0.5)


def _attention():
    out, lse = cpu.attention(Q, Q, Q, CU_SEQLENS, 0.25)
    return out, lse, *cpu.attention_backward(out, Q, Q, Q, out, lse, CU_SEQLENS, 0.25)


def _matmul_8bit():
    rows, scales = cpu.quantize_rows(X_TK), cpu.row_scales(FOUR_BIT)
    return tuple(rows), scales, cpu.matmul_8bit(rows, FOUR_BIT, scales, False, ADDED)


def _matmul_8bit_of_nothing():
    rows, weight = cpu.quantize_rows(DY_TN[:, :0]), quantize(WEIGHT_NK[:0]).four_bit
    return cpu.matmul_8bit(rows, weight, weight.values[:0], True, Epilogue(None, LOW_TR, A_RK, 0.5))


CALLS = {
    "quantize_4bit": lambda: cpu.quantize_4bit(WEIGHT_NK.view(-1), TABLE.bounds, TABLE.order, 64),
    "quantize_sum_4bit": lambda: cpu.quantize_sum_4bit(INT8, B_NR, A_RK, TABLE.bounds, TABLE.order, 64),
    "quantize_8bit": lambda: cpu.quantize_8bit(X_TK.view(-1), dynamic8_lookup(), 64),
    "dequantize_8bit": lambda: cpu.dequantize_8bit(FOUR_BIT.codes, WEIGHT_NK.view(-1)[: K * N // 128], dynamic8(), 64),
    "gemv_4bit": lambda: cpu.gemv_4bit(X_TK[:3].bfloat16(), FOUR_BIT),
    "gemv_grouped": lambda: cpu.gemv_grouped(X_TK[:3], GROUPED),
    "gemv_bf16": lambda: cpu.gemv_bf16(X_TK[:3], WEIGHT_NK.bfloat16()),
    "matmul_4bit": lambda: cpu.matmul_4bit(X_TK, FOUR_BIT, False, ADDED),
    "matmul_grouped": lambda: cpu.matmul_grouped(DY_TN, GROUPED, True, Epilogue()),
    "matmul_dense": lambda: cpu.matmul_dense(X_TK, WEIGHT_NK, False, ADDED),
    "outer": lambda: cpu.outer(DY_TN, X_TK),
    "low_rank": lambda: cpu.low_rank(X_TK, A_RK.t(), 1.0),
    "low_rank_backward": lambda: cpu.low_rank_backward(DY_TN, X_TK, LOW_TR, B_NR, 0.5),
    "cross_entropy": lambda: cpu.cross_entropy(X_TK.clone(), CU_SEQLENS.new_full((T,), 3), 0.25, True),
    **({"matmul_8bit": _matmul_8bit, "matmul_8bit of nothing": _matmul_8bit_of_nothing} if HAS_INT8 else {}),
    **({"attention": _attention} if HAS_ATTENTION else {}),
}


@pytest.mark.parametrize("which", SURROUNDINGS)
@pytest.mark.parametrize("name", CALLS)
def test_defaults_do_not_change_a_result(name, which):
    expected = CALLS[name]()
    with SURROUNDINGS[which]():
        found = CALLS[name]()
    tree_map(lambda a, b: assert_same_bits(a, b) if isinstance(a, torch.Tensor) else None, found, expected)


@pytest.mark.parametrize("which", SURROUNDINGS)
def test_defaults_do_not_change_the_decoders_workspace(monkeypatch, which):
    monkeypatch.setattr(decoder, "_memory", threading.local())
    with SURROUNDINGS[which]():
        assert decoder._workspace(1000)
    assert (decoder._memory.workspace.nbytes, decoder._memory.workspace.device.type) == (4000, "cpu")
