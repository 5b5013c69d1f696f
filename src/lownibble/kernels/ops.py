"""The kernel operations, one signature each, and the choice of backend.

Every operation exists as plain torch in `reference.py` (the oracle) and, where it pays, in a faster backend with the same
signature. `BACKENDS` maps a name to a function that returns the backend's namespace or raises `BackendError` with the
reason. Without an explicit choice the fastest backend that loads and supports the tensors' device is used; an explicit
choice (`use_backend`) that cannot run is an error, never a silent slow path. Argument and result types are in `types.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, cast

import torch
from torch import Tensor

from lownibble.errors import BackendError
from lownibble.kernels.adamw import AdamPart, CodeMap
from lownibble.kernels.decoder import Context, DecoderLayers, Segment, Step
from lownibble.kernels.rows import PLAIN_ATTENTION, Attending, RowAdapters
from lownibble.kernels.types import NO_EPILOGUE, Epilogue, FourBit, Grouped, Rows8bit, Scaled8bit, Stack


class Backend(Protocol):
    """Interface of a backend module. Tensors are contiguous and share one device.

    device_types: the device types it runs on; None means any. row_part: columns that share a scale in 8-bit rows; None: a row.
    experts_at_once: products of experts are kernels for all experts, which read on the device which rows are whose; else a
        mixture is trained expert by expert, with all that is done to an expert's rows (`models/expert_pass.py`).
    """

    name: str
    device_types: tuple[str, ...] | None
    row_part: int | None
    experts_at_once: bool

    def quantize_4bit(self, x: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]: ...

    def quantize_sum_4bit(
        self, base: Scaled8bit, low_Nr: Tensor, lora_A: Tensor, bounds: Tensor, order: Tensor, block_size: int
    ) -> tuple[Tensor, Tensor]: ...

    def dequantize_4bit(self, weight: FourBit, out: Tensor) -> Tensor: ...

    def quantize_8bit(self, x: Tensor, lookup: Tensor, block_size: int) -> tuple[Tensor, Tensor]: ...

    def dequantize_8bit(self, codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor: ...

    def gemv_4bit(self, x_TK: Tensor, weight: FourBit) -> Tensor: ...

    def dequantize_grouped(self, weight: Grouped, out: Tensor) -> Tensor: ...

    def gemv_grouped(self, x_TK: Tensor, weight: Grouped) -> Tensor: ...

    def matmul_grouped(self, x_TC: Tensor, weight: Grouped, transposed: bool, epilogue: Epilogue) -> Tensor: ...

    def matmul_4bit(self, x_TC: Tensor, weight: FourBit, transposed: bool, epilogue: Epilogue) -> Tensor: ...

    def matmul_dense(
        self, x_TC: Tensor, weight_NK: Tensor, transposed: bool, epilogue: Epilogue, out: Tensor | None
    ) -> Tensor: ...  # fmt: skip

    def outer(self, a_TP: Tensor, b_TQ: Tensor, out: Tensor | None, adds: bool) -> Tensor: ...

    def row_scales(self, weight: FourBit, code_type: torch.dtype = torch.int8) -> Tensor: ...

    def quantize_rows(
        self, x_TC: Tensor, column_scale: Tensor | None = None, code_type: torch.dtype = torch.int8
    ) -> Rows8bit: ...

    def matmul_8bit(
        self, x: Rows8bit, weight: FourBit, row_scale: Tensor, transposed: bool, epilogue: Epilogue, dtype: torch.dtype
    ) -> Tensor: ...

    def matmul_8bit_dense(self, x: Rows8bit, weight_NK: Tensor, row_scale: Tensor, transposed: bool, out: Tensor) -> Tensor: ...

    def matmul_experts(self, x_SC: Tensor, weights: Stack, ends_E: Tensor, transposed: bool, epilogue: Epilogue) -> Tensor: ...

    def outer_experts(self, a_SP: Tensor, b_SQ: Tensor, ends_E: Tensor, scale: float, dtype: torch.dtype) -> Tensor: ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scaling: float) -> tuple[Tensor, Tensor]: ...

    def attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def low_rank(self, x_TC: Tensor, factor_Cr: Tensor, scale: float) -> Tensor: ...

    def low_rank_backward(
        self, dy_TN: Tensor, x_TK: Tensor, low_Tr: Tensor, lora_B: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def cross_entropy(self, logits_LV: Tensor, labels_L: Tensor, scale: float | Tensor, wants_gradient: bool) -> Tensor: ...

    def gemv_bf16(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor: ...

    def decoder_layers(
        self, x_TH: Tensor, layers: DecoderLayers, contexts: Sequence[Context], step: Step, segments: Sequence[Segment]
    ) -> None: ...

    def attend_slots(
        self, q_BHD: Tensor, keys: Tensor, values: Tensor, slots_B: Tensor, positions_B: Tensor, how: Attending
    ) -> Tensor: ...

    def add_low_rank_rows(self, y_TN: Tensor, x_TK: Tensor, adapters: RowAdapters, linear: int) -> None: ...

    def adamw_8bit(self, parts: Sequence[AdamPart], books: tuple[CodeMap, CodeMap], found_inf: Tensor | None) -> None: ...


def _load_reference() -> Backend:
    return cast(Backend, importlib.import_module("lownibble.kernels.reference"))


def _load_cpu() -> Backend:
    module = importlib.import_module("lownibble.kernels.cpu")
    module.library()  # raises BackendError with the reason when the compiled library is missing
    return cast(Backend, module)


def _load_triton() -> Backend:
    # Both checks avoid importing triton, which takes a second and memory that would count towards runs.
    if importlib.util.find_spec("triton") is None:
        raise BackendError("triton is not installed. Run: pip install triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError("There is no CUDA device here. Use the 'cpu' or 'reference' backend.")
    return cast(Backend, importlib.import_module("lownibble.kernels.triton"))


BACKENDS = {"reference": _load_reference, "cpu": _load_cpu, "triton": _load_triton}
"""name -> loader. Order does not matter; `_automatic` decides."""

_FASTEST = {"cpu": "cpu", "cuda": "triton"}
"""device type -> the backend to use if it loads; else, and for other device types, the reference."""

_loaded: dict[str, Backend | BackendError] = {}
_warned: set[str] = set()
_log = logging.getLogger(__name__)
_forced: ContextVar[Backend | None] = ContextVar("lownibble_backend", default=None)


def _try_load(name: str) -> Backend | BackendError:
    if name not in _loaded:
        try:
            _loaded[name] = BACKENDS[name]()
        except BackendError as error:
            _loaded[name] = error
    return _loaded[name]


def backend(name: str) -> Backend:
    """The backend called `name`, or `BackendError` saying why it cannot run here."""
    if name not in BACKENDS:
        raise BackendError(f"There is no kernel backend '{name}'. Known backends: {', '.join(sorted(BACKENDS))}.")
    loaded = _try_load(name)
    if isinstance(loaded, BackendError):
        raise loaded
    return loaded


@contextmanager
def use_backend(choice: str | Backend) -> Iterator[None]:
    """Run every kernel operation inside the block on one backend: `reference`, `cpu` or `triton`, or a `Backend` object.

    Raises:
        BackendError: the backend is unknown or cannot run here; the message says why.
    """
    token = _forced.set(backend(choice) if isinstance(choice, str) else choice)
    try:
        yield
    finally:
        _forced.reset(token)


def chosen() -> Backend | None:
    """The backend chosen by `use_backend`, or None; to pass to other threads, as autograd runs a GPU's backward on its own."""
    return _forced.get()


@contextmanager
def keeping(backend: Backend | None) -> Iterator[None]:
    """Restore inside the block the choice that `chosen` returned, possibly on another thread; None: no explicit choice."""
    if backend is _forced.get():
        yield
        return
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def is_forced() -> bool:
    """Whether `use_backend` has chosen the backend."""
    return _forced.get() is not None


def active_backend(device: torch.device | str = "cpu") -> str:
    """Name of the backend that runs operations on tensors of `device` now."""
    return current(device).name


def current(device: torch.device | str = "cpu") -> Backend:
    """The backend that runs operations on tensors of `device` now."""
    return _forced.get() or backend(_automatic(torch.device(device).type))


def _automatic(device_type: str) -> str:
    fastest = _FASTEST.get(device_type, "reference")
    if not isinstance(error := _try_load(fastest), BackendError):
        return fastest
    if device_type == "cuda" and fastest not in _warned and torch.cuda.is_available():
        _warned.add(fastest)
        _log.warning("Plain torch computes in place of all kernels on CUDA, several times more slowly: %s", error)
    return "reference"


def backend_status() -> dict[str, str]:
    """name -> 'ok' or the reason why the backend cannot run here."""
    return {name: str(s) if isinstance(s := _try_load(name), BackendError) else "ok" for name in BACKENDS}


def _for(tensor: Tensor) -> Backend:
    chosen, device = current(tensor.device), tensor.device
    if chosen.device_types is not None and device.type not in chosen.device_types:
        raise BackendError(
            f"The '{chosen.name}' kernels cannot run on a tensor on '{device}', only on {' and '.join(chosen.device_types)}. "
            f"Move it, or use the '{_automatic(device.type)}' backend."
        )
    return chosen


def quantize_4bit(x: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """4-bit codes and absmax of a flat tensor.

    Args:
        x: (n,) float32, bfloat16 or float16; finite (the caller checks).
        bounds: (15,) float32, ascending midpoints between neighbouring code values.
        order: (16,) uint8, code of the i-th smallest value.
    Returns:
        codes (ceil(n/2),) uint8 and absmax (ceil(n/block_size),) float32.
    """
    return _for(x).quantize_4bit(x, bounds, order, block_size)


def quantize_sum_4bit(
    base: Scaled8bit, low_Nr: Tensor, lora_A: Tensor, bounds: Tensor, order: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """As `quantize_4bit` of `decode(base) + low_Nr @ lora_A`, for low (N, r) and A (r, K) float32.

    The sum over r is added to the base's value, both in float32. An infinite sum gives an absmax that is not finite; one that is
    NaN may not, so the caller checks low and A. (Finite ones give NaN where products overflow to both infinities.)
    """
    return _for(base.codes).quantize_sum_4bit(base, low_Nr, lora_A, bounds, order, block_size)


def dequantize_4bit(weight: FourBit, out: Tensor) -> Tensor:
    """Dequantise into `out` (contiguous, as many elements as the weight, float32/bfloat16/float16) and return it."""
    return _for(weight.codes).dequantize_4bit(weight, out)


def quantize_8bit(x: Tensor, lookup: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Blockwise 8-bit codes (n,) uint8 and absmax (ceil(n/block_size),) float32 of `x` (n,) float32.

    lookup: (65536,) uint8, the code for each point of a uniform grid over [-1, 1]; a value takes the nearest point's code. A
    block of zeros gets code 0 and absmax 0.
    """
    return _for(x).quantize_8bit(x, lookup, block_size)


def dequantize_8bit(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    """Inverse of `quantize_8bit`: (n,) float32."""
    return _for(codes).dequantize_8bit(codes, absmax, values, block_size)


def gemv_4bit(x_TK: Tensor, weight: FourBit) -> Tensor:
    """`x_TK @ W.T` with W (N, K) dequantised on the fly, never stored: (T, N) in x's dtype. For few rows (decoding).

    x_TK: (T, K) float32/bfloat16/float16, contiguous; accumulates in float32. The weight's blocks may span rows.
    """
    return _for(x_TK).gemv_4bit(x_TK, weight)


def dequantize_grouped(weight: Grouped, out: Tensor) -> Tensor:
    """Dequantise into `out` (contiguous, as many elements as the weight, float32/bfloat16/float16) and return it."""
    return _for(weight.codes).dequantize_grouped(weight, out)


def gemv_grouped(x_TK: Tensor, weight: Grouped) -> Tensor:
    """As `gemv_4bit`, for a grouped weight (N, K) without `order`."""
    return _for(x_TK).gemv_grouped(x_TK, weight)


def matmul_grouped(x_TC: Tensor, weight: Grouped, transposed: bool, epilogue: Epilogue) -> Tensor:
    """As `matmul_4bit`, for a grouped weight (N, K) without `order`."""
    return _for(x_TC).matmul_grouped(x_TC, weight, transposed, epilogue)


def matmul_4bit(x_TC: Tensor, weight: FourBit, transposed: bool, epilogue: Epilogue) -> Tensor:
    """`x @ W.T` (T, N) or, transposed, `x @ W` (T, K), with W (N, K) dequantised exactly, plus `epilogue`; in x's dtype.

    For many rows (training). The tensors of `epilogue` are float32 or of x's dtype.
    """
    return _for(x_TC).matmul_4bit(x_TC, weight, transposed, epilogue)


def matmul_dense(
    x_TC: Tensor, weight_NK: Tensor, transposed: bool, epilogue: Epilogue = NO_EPILOGUE, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`x @ W.T` (T, N) or, transposed, `x @ W` (T, K), with a dense W (N, K), plus `epilogue`, into `out` if given; all of one
    dtype, but that the tensors of `epilogue` may be float32.

    x and out: contiguous.
    """
    return _for(x_TC).matmul_dense(x_TC, weight_NK, transposed, epilogue, out)


def outer(a_TP: Tensor, b_TQ: Tensor, out: Tensor | None = None, adds: bool = False) -> Tensor:
    """`a.T @ b` (P, Q), into `out` if given, or `adds` to what `out` holds; all of one dtype, and contiguous."""
    return _for(a_TP).outer(a_TP, b_TQ, out, adds and out is not None)


def row_scales(weight: FourBit, code_type: torch.dtype = torch.int8) -> Tensor:
    """8-bit scale of each row of W (N, K), (N,) float32: the row's largest absmax / `LARGEST_CODE[code_type]`."""
    return _for(weight.codes).row_scales(weight, code_type)


def quantize_rows(x_TC: Tensor, column_scale: Tensor | None = None, code_type: torch.dtype = torch.int8) -> Rows8bit:
    """Quantise `x_TC * column_scale` to 8 bits: per row and `row_part` columns of the backend (64, or whole rows on CUDA), the
    largest magnitude becomes `LARGEST_CODE[code_type]`.

    Rounds to the nearest code, ties to even. A part with a NaN or infinite value gets a non-finite scale, and no product with
    its row is finite.

    Args:
        x_TC: (T, C) float32, bfloat16 or float16, contiguous.
        column_scale: (C,) float32.
        code_type: int8 or float8_e4m3fn.
    """
    return _for(x_TC).quantize_rows(x_TC, column_scale, code_type)


def matmul_8bit(
    x: Rows8bit, weight: FourBit, row_scale: Tensor, transposed: bool, epilogue: Epilogue, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Matmul of the 8-bit codes of `x` and of W (N, K), both of the same dtype, plus `epilogue`; in `dtype`.

    W is quantised to codes of x's dtype, `q[n, k] = round(W[n, k] / row_scale[n])`. Forward, x (T, K):
    (T, N) is `row_scale[n] * sum_k x.scale[t, k // part] x.code[t, k] q[n, k]`. Transposed, x (T, N) with `row_scale` multiplied
    into it: (T, K) is `sum_n x.scale[t, n // part] x.code[t, n] q[n, k]`. Within a part, int8 products are summed exactly in 32
    bits, float8 products in the precision of the device's units; parts are summed in float32. A product of whole rows is rounded
    to `dtype` (float8's to bfloat16 first) before the low-rank branch is added.

    Args:
        x: from `quantize_rows` of the same backend.
        weight: K is a multiple of 64, the block size of 32.
        row_scale: (N,) from `row_scales` for the dtype of x's codes.
        epilogue: its tensors are float32 or of `dtype`.
    """
    return _for(weight.codes).matmul_8bit(x, weight, row_scale, transposed, epilogue, dtype)


def matmul_8bit_dense(x: Rows8bit, weight_NK: Tensor, row_scale: Tensor, transposed: bool, out: Tensor) -> Tensor:
    """`matmul_8bit` with a dense weight W (N, K), float32, into `out`: (T, N) or, transposed, (T, K), contiguous.

    row_scale: (N,), the 8-bit scale of each row: its largest magnitude / `LARGEST_CODE`. K is a multiple of 64.
    """
    return _for(weight_NK).matmul_8bit_dense(x, weight_NK, row_scale, transposed, out)


def matmul_experts(
    x_SC: Tensor, weights: Stack, ends_E: Tensor, transposed: bool = False, epilogue: Epilogue = NO_EPILOGUE
) -> Tensor:
    """Products of rows that are sorted by expert with their experts' matrices: for the rows of expert e `x @ W_e.T` (S, N) or,
    transposed, `x @ W_e` (S, K), plus the low-rank terms of `epilogue`; in x's dtype. Rows after the last expert's are zeros.

    Args:
        x_SC: (S, C) float32, bfloat16 or float16, contiguous.
        weights: (E, N, K), rounded to x's dtype; dense ones with any strides, grouped ones without `order`.
        ends_E: (E,) int32 on x's device, ascending: the end of each expert's rows, which start at the one before.
        epilogue: without bias; `low` (S, r) in x's dtype, `factor` (E, r, columns) float32 or of x's dtype, with any strides.
    """
    return _for(x_SC).matmul_experts(x_SC, weights, ends_E, transposed, epilogue)


def outer_experts(a_SP: Tensor, b_SQ: Tensor, ends_E: Tensor, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`scale * a.T @ b` over the rows of each expert, (E, P, Q) in `dtype`; zeros for experts without rows.

    The gradient of experts' matrices. Summed in float32 where the Triton kernels do it, else in the dtype of a and b.

    Args:
        a_SP, b_SQ: (S, P) and (S, Q) of one dtype, contiguous, rows sorted by expert. ends_E: as of `matmul_experts`.
    """
    return _for(a_SP).outer_experts(a_SP, b_SQ, ends_E, scale, dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention over rows of tokens divided into segments, each attending only to itself; for training.

    Args:
        q: (B, heads, T, D) float32; k, v: (B, key_heads, T, D); the last dimension contiguous.
        cu_seqlens: (S + 1,) int64 from 0 to B T: segment i is tokens [cu_seqlens[i], cu_seqlens[i + 1]) of the
            concatenated rows.
    Returns:
        (B, T, heads, D), and the log-sum-exp of each query's scaled scores (B T, heads), for backward.
    """
    return _for(q).attention(q, k, v, cu_seqlens, scaling)


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes, from `attention`'s results `out` and `lse` and the gradient of `out`."""
    return _for(q).attention_backward(dout, q, k, v, out, lse, cu_seqlens, scaling)


def low_rank(x_TC: Tensor, factor_Cr: Tensor, scale: float = 1.0) -> Tensor:
    """`scale * x @ factor`, (T, r) in x's dtype, for a rank much smaller than C.

    x_TC: contiguous; factor_Cr: float32 or of x's dtype, with any strides.
    """
    return _for(x_TC).low_rank(x_TC, factor_Cr, scale)


def low_rank_backward(dy_TN: Tensor, x_TK: Tensor, low_Tr: Tensor, lora_B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `y = scale * low B^T`, `low = x A^T`: dlow (T, r) in dy's dtype, dA (r, K) and dB (N, r) in float32.

    lora_B: (N, r), float32 or of dy's dtype; the other tensors are contiguous and of one dtype.
    """
    return _for(dy_TN).low_rank_backward(dy_TN, x_TK, low_Tr, lora_B, scale)


def cross_entropy(logits_LV: Tensor, labels_L: Tensor, scale: float | Tensor, wants_gradient: bool = True) -> Tensor:
    """Cross-entropy of each row, (L,) float32; the logits are replaced by its gradient times `scale`, in their own dtype.

    Computed in float32 and rounded once. A row of the label -100 has the loss 0 and a gradient of zeros. A row with a logit that
    is NaN or positive infinity has the loss NaN.

    Args:
        logits_LV: (L, V) float32, bfloat16 or float16, contiguous.
        labels_L: (L,) int64, each -100 or in [0, V); others raise an error of torch's or, from the Triton kernel, give NaN.
        scale: a number, or () float32 on the logits' device, which the Triton kernel reads there.
        wants_gradient: False leaves the logits undefined.
    """
    return _for(logits_LV).cross_entropy(logits_LV, labels_L, scale, wants_gradient)


def gemv_bf16(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """`x_TK @ weight_NK.T` (T, N) float32, with a bfloat16 weight: half the bytes to read, if bfloat16 holds it exactly."""
    return _for(x_TK).gemv_bf16(x_TK, weight_NK)


def decoder_layers(
    x_TH: Tensor, layers: DecoderLayers, contexts: Sequence[Context], step: Step, segments: Sequence[Segment] = ()
) -> None:
    """Run tokens through the decoder layers, in place, and write their keys and values to the KV cache. No gradient.

    Args:
        x_TH: (T, hidden) float32, contiguous; replaced by the last layer's output.
        contexts: by window of the layers (`layers.windows`).
        segments: in order, non-overlapping; tokens outside all of them have no adapter.
    """
    _for(x_TH).decoder_layers(x_TH, layers, contexts, step, segments)


def attend_slots(
    q_BHD: Tensor, keys: Tensor, values: Tensor, slots_B: Tensor, positions_B: Tensor, how: Attending = PLAIN_ATTENTION
) -> Tensor:
    """Attention of one token of each of some slots to the keys of its slot up to its own position, (B, heads, D of values).

    Slots and positions are read on the device, so shapes and launches are the same whatever they are. No gradient.

    Args:
        q_BHD: (B, heads, D). keys, values: (slots, key_heads, capacity, D) and (..., D of values), contiguous, of q's dtype.
        slots_B, positions_B: (B,) int64; below the numbers of slots and the capacity. Of positions only differences matter: where
            early ones are no longer kept, those that are begin at 0.
    """
    return _for(q_BHD).attend_slots(q_BHD, keys, values, slots_B, positions_B, how)


def add_low_rank_rows(y_TN: Tensor, x_TK: Tensor, adapters: RowAdapters, linear: int) -> None:
    """Add to each row of y, in place, the low-rank branch that the row's own adapter has for a linear layer.

    Which adapter a row has is read on the device: the launches are the same for one adapter and for one of each row. Products are
    summed in float32 by the Triton kernels, else in x's dtype. No gradient.

    Args:
        y_TN, x_TK: contiguous, of the adapters' dtype. linear: index of the layer in the adapters' branches.
    """
    _for(x_TK).add_low_rank_rows(y_TN, x_TK, adapters, linear)


def adamw_8bit(parts: Sequence[AdamPart], books: tuple[CodeMap, CodeMap], found_inf: Tensor | None = None) -> None:
    """One AdamW step on tensors whose moments are 8-bit codes, and on tensors with float32 moments, in place.

    A moment is `values[code] * absmax[block]`, updated in float32 and quantised again: full blocks times the reciprocal of their
    absmax, a partial last one divided by it; nearest code, ties to the lower one.

    Args:
        parts: all on one device and of one block size; no two overlap.
        books: of the first moment and of the second.
        found_inf: () float32 on the parts' device, or None; if it is not zero, nothing changes. The Triton kernels read it on the
            device.
    """
    if parts:
        _for(parts[0].parameter).adamw_8bit(parts, books, found_inf)
