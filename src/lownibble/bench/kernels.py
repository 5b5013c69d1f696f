"""How fast the CPU kernels are, against filling memory, dense float32 and bitsandbytes, measured side by side.

Method: the calls of a group take turns (A B C A B C ...), so that other load on the machine hits all of them; a ratio is
taken within each turn, and its median reported. Two native calls are never neighbours: the first would warm the cache for
the second. Times are medians with minimum and maximum. Absolute figures on a shared machine are noise; the ratios are the
result.

What each figure is compared with:
- decoding 4-bit to float32 writes 8 times what it reads, so its yardstick is `Tensor.fill_` on the same output (stores
  that go around the caches, used for large outputs, beat it: they do not read the lines first);
- a matrix-vector product on 4-bit weights reads 1/8 of the dense one, which is what it competes with when decoding tokens;
- bitsandbytes' CPU kernels do the same work on the same bytes. Its API allocates the output of every decoding, and for large
  outputs the page faults of that cost more than the kernel; `_kernel` is the kernel alone, on the same preallocated output,
  and `native_allocating` the native one with a new output each time. Its inference layer repacks the weight and computes in
  bfloat16; its other path decodes the weight and multiplies in float32.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lownibble.kernels import cpu, ops, reference
from lownibble.quant.codebook import codebook, dynamic8, dynamic8_lookup

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
SHAPES_NK = [(4096, 4096), (576, 1536)]
"""A layer of a 7B model (64 MiB decoded: main memory), and one of a 135M model (3.4 MiB: cache)."""
ROWS = [1, 4, 8]

Record = dict[str, Any]
Calls = dict[str, Callable[[], object]]


class _Weight:
    """A random weight, dense and in NF4 with plain and doubly quantised constants."""

    def __init__(self, N: int, K: int) -> None:
        table = codebook("nf4")
        self.dense_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
        self.values = table.values
        self.codes, self.absmax = cpu.quantize_4bit(self.dense_NK, table.bounds, table.order, BLOCK_SIZE)
        offset = self.absmax.mean()
        self.absmax_8bit, nested_absmax = cpu.quantize_8bit(self.absmax - offset, dynamic8_lookup(), NESTED_BLOCK_SIZE)
        self.nested = ops.Nested(dynamic8(), nested_absmax, offset, NESTED_BLOCK_SIZE)


def _take_turns(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call in each turn, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _times(seconds: dict[str, list[float]]) -> Record:
    return {
        name: {
            "median_us": statistics.median(values) * 1e6,
            "min_us": min(values) * 1e6,
            "max_us": max(values) * 1e6,
        }
        for name, values in seconds.items()
    }


def _ratio(seconds: dict[str, list[float]], slower: str, faster: str) -> float | None:
    """Median over the turns of time(slower) / time(faster); None when a peer is missing."""
    if slower not in seconds or faster not in seconds:
        return None
    return statistics.median(a / b for a, b in zip(seconds[slower], seconds[faster], strict=True))


def _peers(wanted: bool) -> tuple[Any, str | None]:
    """The bitsandbytes module, or None and the reason."""
    if not wanted:
        return None, "not asked for"
    try:
        return importlib.import_module("bitsandbytes"), None
    except ImportError as error:
        return None, f"bitsandbytes cannot be imported: {error}. Install lownibble[peers]."


def _bench_dequantize(weight: _Weight, repeats: int, bitsandbytes: Any) -> Record:
    out_NK = torch.empty_like(weight.dense_NK)
    arguments = (weight.values, BLOCK_SIZE, out_NK)
    calls: Calls = {
        "native": lambda: cpu.dequantize_4bit(weight.codes, weight.absmax, *arguments),
        "fill": lambda: out_NK.fill_(1.0),
        "native_double_quant": lambda: cpu.dequantize_4bit(weight.codes, weight.absmax_8bit, *arguments, weight.nested),
    }
    if bitsandbytes:
        decode = torch.ops.bitsandbytes.dequantize_4bit.default
        codes, shape = weight.codes.view(-1, 1), list(weight.dense_NK.shape)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight.codes, weight.absmax, out_NK)]
        sizes = [ctypes.c_longlong(size) for size in (BLOCK_SIZE, *shape)]
        kernel = bitsandbytes.cextension.lib.cdequantize_blockwise_cpu_nf4_fp32
        calls["native_allocating"] = lambda: cpu.dequantize_4bit(
            weight.codes, weight.absmax, weight.values, BLOCK_SIZE, torch.empty_like(out_NK)
        )
        calls["bitsandbytes"] = lambda: decode(codes, weight.absmax, BLOCK_SIZE, "nf4", shape, torch.float32)
        calls["bitsandbytes_kernel"] = lambda: kernel(*pointers, *sizes)
    seconds = _take_turns(calls, repeats)
    slow_calls: Calls = {
        "native": calls["native"],
        "reference": lambda: reference.dequantize_4bit(weight.codes, weight.absmax, *arguments),
    }
    slow_seconds = _take_turns(slow_calls, max(1, repeats // 5))
    n_bytes = out_NK.numel() * out_NK.element_size()
    return {
        "out_bytes": n_bytes,
        "times": _times(seconds | {"reference": slow_seconds["reference"]}),
        "fill_GBps": n_bytes / statistics.median(seconds["fill"]) / 1e9,
        "dequantize_GBps": n_bytes / statistics.median(seconds["native"]) / 1e9,
        "dequantize_double_quant_GBps": n_bytes / statistics.median(seconds["native_double_quant"]) / 1e9,
        "ratio_vs_fill": _ratio(seconds, "fill", "native"),
        "ratio_double_quant_vs_fill": _ratio(seconds, "fill", "native_double_quant"),
        "ratio_vs_bitsandbytes": _ratio(seconds, "bitsandbytes", "native"),
        "ratio_double_quant_vs_bitsandbytes": _ratio(seconds, "bitsandbytes", "native_double_quant"),
        "ratio_vs_bitsandbytes_kernel": _ratio(seconds, "bitsandbytes_kernel", "native"),
        "ratio_allocating_vs_bitsandbytes": _ratio(seconds, "bitsandbytes", "native_allocating"),
        "ratio_vs_reference": _ratio(slow_seconds, "reference", "native"),
    }


def _bench_quantize(weight: _Weight, repeats: int, bitsandbytes: Any) -> Record:
    table = codebook("nf4")
    arguments = (weight.dense_NK.view(-1), table.bounds, table.order, BLOCK_SIZE)
    calls: Calls = {
        "native": lambda: cpu.quantize_4bit(*arguments),
        "reference": lambda: reference.quantize_4bit(*arguments),
    }
    if bitsandbytes:
        encode = torch.ops.bitsandbytes.quantize_4bit.default
        calls["bitsandbytes"] = lambda: encode(weight.dense_NK, BLOCK_SIZE, "nf4", torch.uint8)
    seconds = _take_turns(calls, max(1, repeats // 5))
    return {
        "times": _times(seconds),
        "quantize_Melements_per_s": weight.dense_NK.numel() / statistics.median(seconds["native"]) / 1e6,
        "ratio_vs_reference": _ratio(seconds, "reference", "native"),
        "ratio_vs_bitsandbytes": _ratio(seconds, "bitsandbytes", "native"),
    }


def _bitsandbytes_layer(bitsandbytes: Any, dense_NK: Tensor) -> Any:
    """Its layer in evaluation mode, as a user who wants to decode tokens gets it."""
    N, K = dense_NK.shape
    layer = bitsandbytes.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(dense_NK.clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu").eval()


def _bench_gemv(weight: _Weight, T: int, repeats: int, bitsandbytes: Any, layer: Any) -> Record:
    N, K = weight.dense_NK.shape
    x_TK = torch.randn(T, K, generator=torch.Generator().manual_seed(1))
    arguments = (weight.values, BLOCK_SIZE, N)
    calls: Calls = {
        "native": lambda: cpu.gemv_4bit(x_TK, weight.codes, weight.absmax, *arguments),
        "dense": lambda: F.linear(x_TK, weight.dense_NK),
        "native_double_quant": lambda: cpu.gemv_4bit(x_TK, weight.codes, weight.absmax_8bit, *arguments, weight.nested),
    }
    if T == 1:
        calls["dense_mv"] = lambda: torch.mv(weight.dense_NK, x_TK[0])
    if bitsandbytes:
        codes, state = bitsandbytes.functional.quantize_4bit(
            weight.dense_NK, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True
        )
        calls["bitsandbytes_matmul_4bit"] = lambda: bitsandbytes.matmul_4bit(x_TK, codes.t(), quant_state=state)
        calls["bitsandbytes_layer_bfloat16"] = lambda: layer(x_TK)
    seconds = _take_turns(calls, repeats)
    return {
        "times": _times(seconds),
        "gemv_4bit_GFLOPps": 2 * T * N * K / statistics.median(seconds["native"]) / 1e9,
        "weight_read_GBps": weight.codes.numel() / statistics.median(seconds["native"]) / 1e9,
        "ratio_vs_dense": _ratio(seconds, "dense", "native"),
        "ratio_double_quant_vs_dense": _ratio(seconds, "dense", "native_double_quant"),
        "ratio_vs_dense_mv": _ratio(seconds, "dense_mv", "native"),
        "ratio_double_quant_vs_bitsandbytes_matmul_4bit": _ratio(seconds, "bitsandbytes_matmul_4bit", "native_double_quant"),
        "ratio_double_quant_vs_bitsandbytes_layer_bfloat16": _ratio(
            seconds, "bitsandbytes_layer_bfloat16", "native_double_quant"
        ),
    }


@torch.no_grad()
def bench_kernels(repeats: int = 15, peers: bool = True) -> Record:
    """Measure the CPU kernels with one thread and with torch's number of threads; under a minute on two cores.

    Args:
        repeats: turns of each group; the slow plain-torch versions get a fifth of them.
        peers: also measure bitsandbytes when it is installed; otherwise its figures are None and `peers_missing` says why.
    Returns:
        A JSON-able record: `threads` -> count -> operation -> shape -> figures, each with its unit in its name. A ratio is
        other time / native time: above 1 the native kernel is faster.
    Raises:
        BackendError: the compiled library is missing or cannot load; the message says why.
    """
    library_isa = cpu.isa()
    bitsandbytes, peers_missing = _peers(peers)
    all_threads = torch.get_num_threads()
    weights = [_Weight(N, K) for N, K in SHAPES_NK]
    layers = [_bitsandbytes_layer(bitsandbytes, weight.dense_NK) if bitsandbytes else None for weight in weights]
    by_threads: Record = {}
    start = time.perf_counter()
    try:
        for threads in sorted({1, all_threads}):
            torch.set_num_threads(threads)
            record: Record = {"dequantize_4bit": {}, "quantize_4bit": {}, "gemv_4bit": {}}
            for weight, layer in zip(weights, layers, strict=True):
                N, K = weight.dense_NK.shape
                record["dequantize_4bit"][f"{N}x{K}"] = _bench_dequantize(weight, repeats, bitsandbytes)
                record["quantize_4bit"][f"{N}x{K}"] = _bench_quantize(weight, repeats, bitsandbytes)
                for T in ROWS:
                    record["gemv_4bit"][f"{T}x{K} by {N}x{K}"] = _bench_gemv(weight, T, repeats, bitsandbytes, layer)
            by_threads[str(threads)] = record
    finally:
        torch.set_num_threads(all_threads)
    return {
        "isa": library_isa,
        "quant_type": "nf4",
        "block_size_elements": BLOCK_SIZE,
        "repeats": repeats,
        "method": "calls take turns; medians with minimum and maximum; ratios within a turn, then the median",
        "versions": {"torch": torch.__version__, "bitsandbytes": getattr(bitsandbytes, "__version__", None)},
        "peers_missing": peers_missing,
        "load_average_1min": os.getloadavg()[0],
        "elapsed_s": time.perf_counter() - start,
        "threads": by_threads,
        "headlines": _headlines(by_threads[str(all_threads)]),
    }


def _headlines(record: Record) -> Record:
    """The ratios to look at first: other time / native time, all threads, doubly quantised weights."""
    large, gemv = record["dequantize_4bit"]["4096x4096"], record["gemv_4bit"]["1x4096 by 4096x4096"]
    return {
        "dequantize 4096x4096 / fill of the same memory": large["ratio_double_quant_vs_fill"],
        "dequantize 576x1536 / fill of the same memory": record["dequantize_4bit"]["576x1536"]["ratio_double_quant_vs_fill"],
        "dequantize 4096x4096 / bitsandbytes dequantize_4bit (which allocates)": large["ratio_double_quant_vs_bitsandbytes"],
        "dequantize 4096x4096 / bitsandbytes' kernel alone, same output": large["ratio_vs_bitsandbytes_kernel"],
        "dequantize 4096x4096 / bitsandbytes, both allocating": large["ratio_allocating_vs_bitsandbytes"],
        "quantize 4096x4096 / bitsandbytes": record["quantize_4bit"]["4096x4096"]["ratio_vs_bitsandbytes"],
        "matrix-vector 4096x4096 / dense float32": gemv["ratio_double_quant_vs_dense"],
        "matrix-vector 4096x4096 / bitsandbytes matmul_4bit, float32": gemv["ratio_double_quant_vs_bitsandbytes_matmul_4bit"],
        "matrix-vector 4096x4096 / bitsandbytes layer, bfloat16": gemv["ratio_double_quant_vs_bitsandbytes_layer_bfloat16"],
    }
