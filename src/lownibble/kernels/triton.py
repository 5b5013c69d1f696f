"""The Triton kernels, for CUDA devices; on a CPU they run in Triton's interpreter, which tests them without a GPU.

The programs, and how they compute, are in `triton_programs.py`; experts' products, products of few rows, decoding steps and
AdamW have files of their own.

The interpreter is selected when triton is imported (TRITON_INTERPRET=1), not when a kernel runs. Launches go to the current
stream of the tensors' device and are asynchronous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from lownibble.errors import BackendError, InputError
from lownibble.kernels import decoded, decoder, plain, proven, triton_decode, triton_few
from lownibble.kernels import rows as plain_rows
from lownibble.kernels import triton_programs as jit
from lownibble.kernels.attention import attention as attention
from lownibble.kernels.attention import attention_backward as attention_backward
from lownibble.kernels.checks import (
    check_block_size,
    check_float,
    check_grouped,
    check_library_8bit,
    check_tensor,
    check_unordered,
    check_weight,
    check_weight_8bit,
)
from lownibble.kernels.decoded import matmul_dense as matmul_dense
from lownibble.kernels.decoder import Context, DecoderLayers, Segment, Step
from lownibble.kernels.plain import gemv_bf16 as gemv_bf16
from lownibble.kernels.plain import low_rank as low_rank
from lownibble.kernels.plain import low_rank_backward as low_rank_backward
from lownibble.kernels.plain import outer as outer
from lownibble.kernels.rows import Attending, RowAdapters
from lownibble.kernels.triton_adamw import adamw_8bit as adamw_8bit
from lownibble.kernels.triton_experts import matmul_experts as matmul_experts
from lownibble.kernels.triton_experts import outer_experts as outer_experts
from lownibble.kernels.types import LARGEST_CODE, NO_EPILOGUE, Epilogue, FourBit, Grouped, Rows8bit, Scaled8bit, row_sizes

name = "triton"

TILE = 4096
"""Elements per program: one block of the largest size."""
GROUPED_TILE = 1024
"""Codes of a grouped weight per program."""
GEMV_COLUMNS, GEMV_TILE, GEMV_ROWS = 512, 2048, 4
"""Matrix-vector product: columns per iteration, weight elements per iteration, and rows of x per program."""
ROW_TILE = 2048
"""Columns of a row that a program quantises or scales at a time."""
DECODE_TILE = {False: (16, 256), True: (64, 64)}
"""8-bit codes of a weight per program (rows, columns), as rows and transposed: both write runs of at least 64 bytes."""
LOSS_TILE, LOSS_WARPS = 8192, 8
"""Logits of a row that a program of the cross-entropy reads at a time, and its warps."""
SMALLEST_INT8_ROWS = 32
"""cuBLAS's integer product takes more than 16 rows."""
_interpreted = isinstance(jit.dequantize_4bit, InterpretedFunction)
if _interpreted != isinstance(tl.interleave, InterpretedFunction):
    raise BackendError(
        "TRITON_INTERPRET was set or unset after triton had been imported. Set it before Python starts, or leave it unset."
    )
if not _interpreted:
    try:
        triton.runtime.driver.active.get_current_target()  # builds what launches kernels, with a C compiler
    except Exception as error:
        raise BackendError(
            f"Triton cannot build what launches its kernels ({' '.join(str(error).split())[:200]}). Install a C compiler and "
            "Python's headers (gcc, python3-dev), and let TRITON_CACHE_DIR be a folder that can be written."
        ) from error
device_types = ("cpu", "cuda") if _interpreted else ("cuda",)
row_part = None
experts_at_once = True


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: float) -> None:
    """Launch `programs` programs on the device of the first argument, without FMA contraction; 0 launches nothing."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)


def _per_tile(n: int, block_size: int) -> tuple[int, dict[str, int]]:
    """Number of programs for `n` elements, and the kernels' block-size constants."""
    return triton.cdiv(n, TILE), {"BLOCKS": TILE // block_size, "BLOCK": block_size}


def _pointers(weight: FourBit) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    """Codes, absmax, values and nested tensors of a weight (placeholders, never read, if there are none), and its block sizes."""
    nested, absmax = weight.nested, weight.absmax
    inner = (absmax,) * 3 if nested is None else (nested.values, nested.absmax, nested.offset)
    sizes = {"BLOCK": weight.block_size, "NESTED_BLOCK": 0 if nested is None else nested.block_size}
    return (weight.codes, absmax, weight.values, *inner), sizes


def quantize_4bit(x: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_4bit`."""
    n, device = x.numel(), x.device
    check_block_size(block_size)
    check_float(x, "x")
    check_tensor(x, "x", x.dtype, n, device)
    check_tensor(bounds, "bounds", torch.float32, 15, device)
    check_tensor(order, "order", torch.uint8, 16, device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    programs, blocks = _per_tile(n, block_size)
    _launch(jit.quantize_4bit, programs, x, bounds, order, codes, absmax, n, codes.numel(), **blocks)
    return codes, absmax


def quantize_sum_4bit(
    base: Scaled8bit, low_Nr: Tensor, lora_A: Tensor, bounds: Tensor, order: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_sum_4bit`."""
    return quantize_4bit(plain.sum_8bit(base, low_Nr, lora_A).view(-1), bounds, order, block_size)


def dequantize_4bit(weight: FourBit, out: Tensor) -> Tensor:
    """As `ops.dequantize_4bit`."""
    n, device = weight.shape.numel(), out.device
    check_weight(weight, device)
    check_float(out, "out")
    check_tensor(out, "out", out.dtype, n, device)
    pointers, sizes = _pointers(weight)
    programs, blocks = _per_tile(n, weight.block_size)
    _launch(jit.dequantize_4bit, programs, *pointers, out, n, weight.codes.numel(), **{**sizes, **blocks})
    return out


def quantize_8bit(x: Tensor, lookup: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_8bit`."""
    n, device = x.numel(), x.device
    check_block_size(block_size)
    check_tensor(x, "x", torch.float32, n, device)
    check_tensor(lookup, "lookup", torch.uint8, 65536, device)
    codes = torch.empty(n, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    programs, blocks = _per_tile(n, block_size)
    _launch(jit.quantize_8bit, programs, x, lookup, codes, absmax, n, **blocks)
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    """As `ops.dequantize_8bit`."""
    n, device = codes.numel(), codes.device
    check_block_size(block_size)
    check_tensor(codes, "codes", torch.uint8, n, device)
    check_tensor(absmax, "absmax", torch.float32, -(-n // block_size), device)
    check_tensor(values, "values", torch.float32, 256, device)
    out = torch.empty(n, dtype=torch.float32, device=device)
    programs, blocks = _per_tile(n, block_size)
    _launch(jit.dequantize_8bit, programs, codes, absmax, values, out, n, **blocks)
    return out


def gemv_4bit(x_TK: Tensor, weight: FourBit) -> Tensor:
    """As `ops.gemv_4bit`."""
    (N, K), T, device, block_size = weight.shape, len(x_TK), x_TK.device, weight.block_size
    check_weight(weight, device)
    check_float(x_TK, "x_TK")
    check_tensor(x_TK, "x_TK", x_TK.dtype, T * K, device)
    if triton_few.takes(T, K, x_TK.dtype, block_size):
        (codes, absmax, values, *nested), sizes = _pointers(weight)
        constants = {"ZERO": False, "NESTED_BLOCK": sizes["NESTED_BLOCK"]}
        few = triton_few.Codes((codes, values, absmax, absmax, *nested), constants, block_size)
        return _few(x_TK, few, N, partial(matmul_4bit, x_TK, weight, False, NO_EPILOGUE))
    out_TN = torch.empty((T, N), dtype=x_TK.dtype, device=device)
    whole = K % block_size == 0
    ts = min(triton.next_power_of_2(max(T, 1)), GEMV_ROWS)
    ks = max(GEMV_COLUMNS, block_size) if whole else GEMV_COLUMNS
    ns = max(1, GEMV_TILE // ks)
    pointers, sizes = _pointers(weight)
    programs = triton.cdiv(T, ts) * triton.cdiv(N, ns)
    _launch(jit.gemv_4bit, programs, x_TK, *pointers, out_TN, T, N, K, TS=ts, NS=ns, KS=ks, **sizes, WHOLE=whole)
    return out_TN


def _few(x_TK: Tensor, weight: triton_few.Codes, N: int, plain: Callable[[], Tensor]) -> Tensor:
    """`x @ W.T` by the kernels of few rows, or by `plain` where they cannot be trusted."""
    kernel, tile = triton_few.kernel_of(len(x_TK))
    form = (tile, N, x_TK.shape[1], x_TK.dtype, x_TK.device, weight.group, *weight.constants.values())
    fast = partial(triton_few.product, x_TK, weight, N)
    return fast() if proven.trusted(kernel, form, x_TK.device) else proven.prove(kernel, form, fast, plain)


def takes_few(x_TK: Tensor, weight: FourBit | Grouped | None) -> bool:
    """Whether `gemv_4bit` or `gemv_grouped` multiplies these rows on tensor cores, without decoding the weight into a buffer."""
    if isinstance(weight, FourBit):
        return triton_few.takes(len(x_TK), weight.shape[1], x_TK.dtype, weight.block_size)
    return weight is not None and triton_few.takes(len(x_TK), weight.shape[1], x_TK.dtype, weight.group_size, weight.bits)


def _grouped_pointers(weight: Grouped) -> tuple[tuple[Tensor, ...], dict[str, int]]:
    """Codes, values, scales, zero points and nested tensors (placeholders, never read, if there are none), and sizes."""
    scale, zero, nested = weight.scale, weight.zero, weight.nested
    inner = (scale,) * 3 if nested is None else (nested.values, nested.absmax, nested.offset)
    sizes = {"BITS": weight.bits, "GROUP": max(1, weight.group_size), "ZERO": zero is not None}
    sizes["NESTED_BLOCK"] = 0 if nested is None else nested.block_size
    return (weight.codes.view(torch.uint8), weight.values, scale, scale if zero is None else zero, *inner), sizes


def dequantize_grouped(weight: Grouped, out: Tensor) -> Tensor:
    """As `ops.dequantize_grouped`."""
    n, K, device, order = weight.shape.numel(), weight.shape[-1], out.device, weight.order
    check_grouped(weight, device)
    check_float(out, "out")
    check_tensor(out, "out", out.dtype, n, device)
    pointers, sizes = _grouped_pointers(weight)
    _launch(
        jit.dequantize_grouped, triton.cdiv(n, GROUPED_TILE), *pointers, weight.scale if order is None else order, out, n, K=K,
        SIZE=GROUPED_TILE, ORDERED=order is not None, **sizes,
    )  # fmt: skip
    return out


def gemv_grouped(x_TK: Tensor, weight: Grouped) -> Tensor:
    """As `ops.gemv_grouped`."""
    (N, K), T, device = weight.shape, len(x_TK), x_TK.device
    check_unordered(weight)
    check_grouped(weight, device)
    check_float(x_TK, "x_TK")
    check_tensor(x_TK, "x_TK", x_TK.dtype, T * K, device)
    if triton_few.takes(T, K, x_TK.dtype, weight.group_size, weight.bits):
        tensors, sizes = _grouped_pointers(weight)
        few = triton_few.Codes(tensors, {name: sizes[name] for name in ("ZERO", "NESTED_BLOCK")}, weight.group_size)
        return _few(x_TK, few, N, partial(matmul_grouped, x_TK, weight, False, NO_EPILOGUE))
    out_TN = torch.empty((T, N), dtype=x_TK.dtype, device=device)
    ts, ns = min(triton.next_power_of_2(max(T, 1)), GEMV_ROWS), GEMV_TILE // GEMV_COLUMNS
    pointers, sizes = _grouped_pointers(weight)
    programs = triton.cdiv(T, ts) * triton.cdiv(N, ns)
    _launch(jit.gemv_grouped, programs, x_TK, *pointers, out_TN, T, N, K, TS=ts, NS=ns, KS=GEMV_COLUMNS, **sizes)
    return out_TN


def matmul_grouped(x_TC: Tensor, weight: Grouped, transposed: bool, epilogue: Epilogue) -> Tensor:
    """As `ops.matmul_grouped`: as `matmul_4bit`."""
    check_unordered(weight)
    return decoded.matmul(partial(dequantize_grouped, weight), weight.shape, x_TC, transposed, epilogue)


def matmul_4bit(x_TC: Tensor, weight: FourBit, transposed: bool, epilogue: Epilogue) -> Tensor:
    """As `ops.matmul_4bit`: dequantised into a reused buffer, then the vendor library's matmul."""
    return decoded.matmul(partial(dequantize_4bit, weight), weight.shape, x_TC, transposed, epilogue)


def row_scales(weight: FourBit, code_type: torch.dtype = torch.int8) -> Tensor:
    """As `ops.row_scales`."""
    (N, K), device = weight.shape, weight.codes.device
    check_weight(weight, device)
    out_N = torch.empty(N, dtype=torch.float32, device=device)
    (_, absmax, _, *nested), sizes = _pointers(weight)
    top = float(LARGEST_CODE[code_type])
    _launch(jit.row_scales, triton.cdiv(N, 16), absmax, *nested, out_N, N, K, TOP=top, ROWS=16, BLOCKS=64, **sizes)
    return out_N


def quantize_rows(x_TC: Tensor, column_scale: Tensor | None = None, code_type: torch.dtype = torch.int8) -> Rows8bit:
    """As `ops.quantize_rows`: one scale a row, as the vendor's products take it."""
    (T, C), device = x_TC.shape, x_TC.device
    check_float(x_TC, "x_TC")
    check_tensor(x_TC, "x_TC", x_TC.dtype, T * C, device)
    if column_scale is not None:
        check_tensor(column_scale, "column_scale", torch.float32, C, device)
    n_codes, n_scales = row_sizes(T, C, row_part)
    codes = torch.empty(n_codes, dtype=code_type, device=device)
    scale, start = (torch.empty(n, dtype=dtype, device=device) for n, dtype in ((n_scales, torch.float32), (0, torch.int32)))
    sizes = {"TOP": float(LARGEST_CODE[code_type]), "SCALED": column_scale is not None, "SIZE": ROW_TILE}
    _launch(jit.quantize_rows, T, x_TC, x_TC if column_scale is None else column_scale, codes, scale, C, **sizes)
    return Rows8bit(codes, scale, start, T, C, row_part)


def decode_8bit(weight: FourBit, row_scale: Tensor, transposed: bool, code_type: torch.dtype) -> Tensor:
    """The weight's 8-bit codes (N, K) or, transposed, (K, N), in the buffer that all layers share."""
    (N, K), device = weight.shape, weight.codes.device
    check_weight_8bit(weight.shape, weight.block_size)
    check_weight(weight, device)
    check_tensor(row_scale, "row_scale", torch.float32, N, device)
    out = decoded.scratch(torch.Size((K, N) if transposed else (N, K)), code_type, device)
    rows, columns = DECODE_TILE[transposed]
    pointers, sizes = _pointers(weight)
    _launch(
        jit.decode_8bit, triton.cdiv(N, rows) * triton.cdiv(K, columns), *pointers, row_scale, out, N, K, ROWS=rows,
        COLUMNS=columns, TRANSPOSED=transposed, **sizes,
    )  # fmt: skip
    return out


def matmul_8bit(
    x: Rows8bit, weight: FourBit, row_scale: Tensor, transposed: bool, epilogue: Epilogue, dtype: torch.dtype
) -> Tensor:
    """As `ops.matmul_8bit`: the weight in 8 bits in a reused buffer, then the vendor library's matmul (ADR 35)."""
    (N, K), T, device, code_type = weight.shape, x.rows, weight.codes.device, x.codes.dtype
    check_library_8bit(weight.shape)
    terms, columns = (N, K) if transposed else (K, N)
    if x.columns != terms:
        raise InputError(f"'x' must have {terms} columns. Got {x.columns}.")
    if x.part is not row_part:
        raise InputError(f"'x' must have one scale a row, from quantize_rows of this backend. Got parts of {x.part}.")
    if code_type not in LARGEST_CODE:
        raise InputError(f"The codes of 'x' must be {' or '.join(map(str, LARGEST_CODE))}. Got {code_type}.")
    n_codes, n_scales = row_sizes(T, terms, row_part)
    check_tensor(x.codes, "codes", code_type, n_codes, device)
    check_tensor(x.scale, "scale", torch.float32, n_scales, device)
    if T * N * K == 0:
        return decoded.matmul_dense(
            torch.zeros(T, 1, dtype=dtype, device=device), x.scale.new_zeros(1, columns).to(dtype), True, epilogue
        )
    weight_CM = decode_8bit(weight, row_scale, transposed, code_type).t()
    product = _float8_product if code_type == torch.float8_e4m3fn else _int8_product
    out = product(x.codes.view(T, terms), x.scale, weight_CM, None if transposed else row_scale, epilogue.bias, dtype)
    return decoded.add_low_rank(out, epilogue)


def _float8_product(
    x_TC: Tensor, x_scale: Tensor, weight_CM: Tensor, weight_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Products scaled by row come in bfloat16. Exact accumulation: the fast one, which keeps 14 bits, gains a twentieth."""
    scale_M = _ones(weight_CM.shape[1], x_TC.device) if weight_scale is None else weight_scale
    out = torch._scaled_mm(
        x_TC, weight_CM, scale_a=x_scale.unsqueeze(1), scale_b=scale_M.unsqueeze(0), out_dtype=torch.bfloat16,
        bias=None if bias is None else bias.to(torch.bfloat16),
    )  # fmt: skip
    return out.to(dtype)


def _int8_product(
    x_TC: Tensor, x_scale: Tensor, weight_CM: Tensor, weight_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    T, columns = len(x_TC), weight_CM.shape[1]
    missing = SMALLEST_INT8_ROWS - T
    sums = torch._int_mm(torch.nn.functional.pad(x_TC, (0, 0, 0, missing)) if missing > 0 else x_TC, weight_CM)
    out = torch.empty((T, columns), dtype=dtype, device=x_TC.device)
    column_scale, own_bias = x_scale if weight_scale is None else weight_scale, x_scale if bias is None else bias
    _launch(
        jit.scale_sums, T * triton.cdiv(columns, ROW_TILE), sums, x_scale, column_scale, own_bias, out, columns,
        SCALED=weight_scale is not None, BIAS=bias is not None, SIZE=ROW_TILE,
    )  # fmt: skip
    return out


@cache
def _ones(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, dtype=torch.float32, device=device)


def matmul_8bit_dense(x: Rows8bit, weight_NK: Tensor, row_scale: Tensor, transposed: bool, out: Tensor) -> Tensor:
    """Not implemented: a 16-bit head already runs on tensor cores."""
    raise BackendError("The 'triton' kernels have no 8-bit product with a dense matrix. Use torch's, or the 'reference' backend.")


def cross_entropy(logits_LV: Tensor, labels_L: Tensor, scale: float | Tensor, wants_gradient: bool) -> Tensor:
    """As `ops.cross_entropy`: one program a row."""
    (L, V), device = logits_LV.shape, logits_LV.device
    check_float(logits_LV, "logits_LV")
    check_tensor(logits_LV, "logits_LV", logits_LV.dtype, L * V, device)
    check_tensor(labels_L, "labels_L", torch.int64, L, device)
    if isinstance(scale, Tensor):
        check_tensor(scale, "scale", torch.float32, 1, device)
    loss_L = torch.empty(L, dtype=torch.float32, device=device)
    _launch(
        jit.cross_entropy, L, logits_LV, labels_L, scale, loss_L, V, ON_DEVICE=isinstance(scale, Tensor), GRADIENT=wants_gradient,
        SIZE=LOSS_TILE, num_warps=LOSS_WARPS,
    )  # fmt: skip
    if wants_gradient:
        torch.autograd.graph.increment_version(logits_LV)  # so that autograd refuses to use logits that it has saved
    return loss_L


def decoder_layers(
    x_TH: Tensor, layers: DecoderLayers, contexts: Sequence[Context], step: Step, segments: Sequence[Segment]
) -> None:
    """As `ops.decoder_layers`: in plain torch around the matrix-vector kernel."""
    decoder.decoder_layers(gemv_4bit, x_TH, layers, contexts, step, segments)


def attend_slots(
    q_BHD: Tensor, keys: Tensor, values: Tensor, slots_B: Tensor, positions_B: Tensor, how: Attending
) -> Tensor:  # fmt: skip
    """As `ops.attend_slots`: contexts are split among programs."""
    form = (q_BHD.shape, keys.shape, values.shape[3], q_BHD.dtype, q_BHD.device, how.window, how.softcap, how.sinks is None)
    fast = partial(triton_decode.attend_slots, q_BHD, keys, values, slots_B, positions_B, how)
    if proven.trusted("attend_slots", form, q_BHD.device):
        return fast()

    def last_row() -> Tensor:  # in float32, as 16-bit scores are coarse, and one slot, as torch copies it
        own_keys, own_values = (held.index_select(0, slots_B[-1:]).float() for held in (keys, values))
        return plain_rows.attend_slots(
            q_BHD[-1:].float(), own_keys, own_values, torch.zeros_like(slots_B[-1:]), positions_B[-1:], how
        )

    plain = partial(plain_rows.attend_slots, q_BHD, keys, values, slots_B, positions_B, how)
    return proven.prove("attend_slots", form, fast, plain, last_row)


def add_low_rank_rows(y_TN: Tensor, x_TK: Tensor, adapters: RowAdapters, linear: int) -> None:
    """As `ops.add_low_rank_rows`: two launches for all rows."""
    form = (y_TN.shape, x_TK.shape[1], x_TK.dtype, x_TK.device, adapters.largest_r)
    if proven.trusted("low_rank_rows", form, x_TK.device):
        triton_decode.add_low_rank_rows(y_TN, x_TK, adapters, linear)
        return

    def added(by: Callable[..., None]) -> Tensor:
        by(alone := torch.zeros_like(y_TN), x_TK, adapters, linear)
        return alone

    fast, plain = (partial(added, by) for by in (triton_decode.add_low_rank_rows, plain_rows.add_low_rank_rows))
    y_TN.add_(proven.prove("low_rank_rows", form, fast, plain))
