"""`lownibble bench kernels`: this device's kernels against a memory fill, dense products and bitsandbytes, interleaved.

Method: the calls of a group take turns (A B C A B C ...), so that other load on the machine affects all of them alike; a ratio is
taken within each turn and its median reported. Within a turn, another call runs between `native` and `native_double_quant`,
because the first would warm the cache for the second. Times are medians with minimum and maximum. Absolute times on a shared
machine are noisy; the ratios are the result.

"Native" is the device's own backend: the compiled kernels in float32 on a CPU, Triton in bfloat16 on CUDA. On CUDA, times are GPU
times between two events; a large buffer is cleared before each call, which flushes the L2 cache and keeps the GPU busy while the
call is queued, so that Python's launch overhead (tens of microseconds with Triton) is not measured.

Baselines:
- dequantising 4-bit to float32 writes 8 times what it reads (bfloat16: 4 times), so its baseline is `Tensor.fill_` on the same
  output (on a CPU, the non-temporal stores used for large outputs beat it: they do not read the cache lines first);
- a matrix-vector product on 4-bit weights reads 1/8 of the dense one, its competitor in token-by-token decoding; the codecs in
  groups are measured against the same two, with their default options;
- the head's loss with its gradient (on CUDA) replaces the logits; the baseline is torch's cross-entropy with its backward pass,
  which keeps the logits;
- products of experts (on CUDA) decode inside, for all experts at once; the baselines are the loop over experts with the kernels
  of one matrix, which waits for the numbers of rows, and torch's grouped product on weights that were decoded before, which a
  model in 4 bits has no room for;
- bitsandbytes' kernels do the same work on the same bytes. Its API allocates the output of every dequantisation, and for large
  outputs the page faults of that cost more than the kernel; `_kernel` is the kernel alone, on the same preallocated output,
  and `native_allocating` the native one with a new output each time. Its inference layer on a CPU repacks the weight and computes
  in bfloat16; its other path there dequantises the weight and multiplies in float32.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lownibble import record as records
from lownibble.bench.processes import Save
from lownibble.config import QuantConfig
from lownibble.kernels import cpu, ops, plain, reference
from lownibble.kernels.types import NO_EPILOGUE, FourBit, Nested
from lownibble.models import pick_device
from lownibble.quant import quantize
from lownibble.quant.codebook import Codebook, codebook, dynamic8, dynamic8_lookup
from lownibble.quant.codecs import quantize_experts
from lownibble.quant.experts import Ends
from lownibble.quant.layouts import GROUPED
from lownibble.quant.packed import PackedWeight

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
SHAPES_NK = [(4096, 4096), (576, 1536)]
"""A layer of a 7B model (64 MiB dequantised: main memory), and one of a 135M model (3.4 MiB: cache)."""
CUDA_SHAPES_NK = [(14336, 4096)]
"""Measured on CUDA, too: the largest layer of an 8B model. Seconds a turn on a CPU."""
CUDA_LOGITS_LV = (2048, 128256)
"""Logits of the loss, measured on CUDA: 2048 label tokens of Llama 3's vocabulary, 0.5 GB in bfloat16."""
CUDA_EXPERTS_ENK, CUDA_EXPERT_ROWS = (128, 1536, 2048), 32768
"""Experts' matrices, measured on CUDA: gate and up of a layer of Qwen3-30B-A3B, for 4,096 tokens of 8 experts each."""
ROWS = [1, 4, 8]
NATIVE = {"cpu": ("cpu", torch.float32), "cuda": ("triton", torch.bfloat16)}
"""Device type -> backend, dtype of the dense tensors."""
_FLUSH_BYTES = 512 * 2**20
"""Larger than any L2 cache; clearing it takes longer than queueing a call."""

Record = dict[str, Any]
Calls = dict[str, Callable[[], object]]


class _Weight:
    """A random weight on a device: dense, in NF4, and in NF4 with double quantisation."""

    def __init__(self, N: int, K: int, device: torch.device) -> None:
        backend, dtype = NATIVE[device.type]
        self.native = ops.backend(backend)
        self.table: Codebook = codebook("nf4", str(device))
        self.dense_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        flat = self.dense_NK.view(-1)
        self.codes, self.absmax = self.native.quantize_4bit(flat, self.table.bounds, self.table.order, BLOCK_SIZE)
        offset = self.absmax.mean().view(1)
        lookup = dynamic8_lookup(str(device))
        absmax_8bit, nested_absmax = self.native.quantize_8bit(self.absmax - offset, lookup, NESTED_BLOCK_SIZE)
        nested = Nested(dynamic8(str(device)), nested_absmax, offset, NESTED_BLOCK_SIZE)
        self.plain = FourBit(self.codes, self.absmax, self.table.values, BLOCK_SIZE, self.dense_NK.shape)
        self.double_quant = self.plain._replace(absmax=absmax_8bit, nested=nested)


@cache
def _flush(device: torch.device) -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Duration of one call; on CUDA the GPU time of the work it queued."""
    if device.type == "cpu":
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush(device).zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _take_turns(calls: Calls, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call in each turn, after one warm-up turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            taken = _seconds(call, device)
            if turn:
                seconds[name].append(taken)
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
    """Median over the turns of time(slower) / time(faster); None if either was not measured."""
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
    out_NK, device, native = torch.empty_like(weight.dense_NK), weight.dense_NK.device, weight.native
    calls: Calls = {
        "native": lambda: native.dequantize_4bit(weight.plain, out_NK),
        "fill": lambda: out_NK.fill_(1.0),
        "native_double_quant": lambda: native.dequantize_4bit(weight.double_quant, out_NK),
    }
    if bitsandbytes:
        decode = torch.ops.bitsandbytes.dequantize_4bit
        codes, shape = weight.codes.view(-1, 1), list(weight.dense_NK.shape)
        theirs = (codes, weight.absmax, BLOCK_SIZE, "nf4", shape, out_NK.dtype)
        calls["native_allocating"] = lambda: native.dequantize_4bit(weight.plain, torch.empty_like(out_NK))
        calls["bitsandbytes"] = lambda: decode.default(*theirs)
        if device.type == "cuda":
            calls["bitsandbytes_kernel"] = lambda: decode.out(*theirs, out_NK)
        else:
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight.codes, weight.absmax, out_NK)]
            sizes = [ctypes.c_longlong(size) for size in (BLOCK_SIZE, *shape)]
            kernel = bitsandbytes.cextension.lib.cdequantize_blockwise_cpu_nf4_fp32
            calls["bitsandbytes_kernel"] = lambda: kernel(*pointers, *sizes)
    seconds = _take_turns(calls, repeats, device)
    slow_calls: Calls = {
        "native": calls["native"],
        "reference": lambda: reference.dequantize_4bit(weight.plain, out_NK),
    }
    slow_seconds = _take_turns(slow_calls, max(1, repeats // 5), device)
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
    arguments = (weight.dense_NK.view(-1), weight.table.bounds, weight.table.order, BLOCK_SIZE)
    calls: Calls = {
        "native": lambda: weight.native.quantize_4bit(*arguments),
        "reference": lambda: reference.quantize_4bit(*arguments),
    }
    if bitsandbytes:
        encode = torch.ops.bitsandbytes.quantize_4bit.default
        calls["bitsandbytes"] = lambda: encode(weight.dense_NK, BLOCK_SIZE, "nf4", torch.uint8)
    seconds = _take_turns(calls, max(1, repeats // 5), weight.dense_NK.device)
    return {
        "times": _times(seconds),
        "quantize_Melements_per_s": weight.dense_NK.numel() / statistics.median(seconds["native"]) / 1e6,
        "ratio_vs_reference": _ratio(seconds, "reference", "native"),
        "ratio_vs_bitsandbytes": _ratio(seconds, "bitsandbytes", "native"),
    }


def _bitsandbytes_layer(bitsandbytes: Any, dense_NK: Tensor) -> Any:
    """bitsandbytes' layer in evaluation mode, as used for inference."""
    N, K = dense_NK.shape
    layer = bitsandbytes.nn.Linear4bit(K, N, bias=False, compute_dtype=dense_NK.dtype, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(dense_NK.clone(), requires_grad=False, quant_type="nf4")
    return layer.to(dense_NK.device).eval()


def _bench_gemv(weight: _Weight, T: int, repeats: int, bitsandbytes: Any, layer: Any) -> Record:
    N, K = weight.dense_NK.shape
    x_TK = torch.randn(T, K, generator=torch.Generator().manual_seed(1)).to(weight.dense_NK)
    calls: Calls = {
        "native": lambda: weight.native.gemv_4bit(x_TK, weight.plain),
        "dense": lambda: F.linear(x_TK, weight.dense_NK),
        "native_double_quant": lambda: weight.native.gemv_4bit(x_TK, weight.double_quant),
    }
    if T == 1:
        calls["dense_mv"] = lambda: torch.mv(weight.dense_NK, x_TK[0])
    if bitsandbytes:
        codes, state = bitsandbytes.functional.quantize_4bit(
            weight.dense_NK, blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True
        )
        calls["bitsandbytes_matmul_4bit"] = lambda: bitsandbytes.matmul_4bit(x_TK, codes.t(), quant_state=state)
        calls["bitsandbytes_layer_bfloat16"] = lambda: layer(x_TK)
    seconds = _take_turns(calls, repeats, weight.dense_NK.device)
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


def _grouped_weights(dense_NK: Tensor) -> dict[str, PackedWeight]:
    """The weight in each codec with groups; act-order with columns at random."""
    found = {}
    for quant_type in GROUPED:
        moments = torch.rand(dense_NK.shape[1], generator=torch.Generator().manual_seed(2)).to(dense_NK.device)
        found[quant_type] = quantize(dense_NK, quant_type, statistics=moments)
    return found


def _bench_grouped(packed: PackedWeight, dense_NK: Tensor, repeats: int) -> Record:
    out_NK, device = torch.empty_like(dense_NK), dense_NK.device
    x_1K = torch.randn(1, dense_NK.shape[1], generator=torch.Generator().manual_seed(1)).to(dense_NK)
    calls: Calls = {
        "native": lambda: packed.decode(out_NK),
        "fill": lambda: out_NK.fill_(1.0),
        "gemv": lambda: packed.matvec(x_1K),
        "dense": lambda: F.linear(x_1K, dense_NK),
    }
    with ops.use_backend(NATIVE[device.type][0]):
        seconds = _take_turns(calls, repeats, device)
    return {
        "times": _times(seconds),
        "dequantize_Gweights_per_s": dense_NK.numel() / statistics.median(seconds["native"]) / 1e9,
        "ratio_vs_fill": _ratio(seconds, "fill", "native"),
        "ratio_gemv_vs_dense": _ratio(seconds, "dense", "gemv"),
    }


def _bench_cross_entropy(L: int, V: int, repeats: int, device: torch.device) -> Record:
    generator = torch.Generator(device).manual_seed(3)
    logits_LV = torch.randn(L, V, generator=generator, device=device, dtype=NATIVE[device.type][1])
    labels_L = torch.randint(V, (L,), generator=generator, device=device)
    leaf_LV = logits_LV.clone().requires_grad_()

    def torchs() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(F.cross_entropy(leaf_LV, labels_L), leaf_LV)

    calls: Calls = {
        "native": lambda: ops.cross_entropy(logits_LV, labels_L, 1 / L),
        "fill": lambda: logits_LV.fill_(1.0),
        "torch": torchs,
    }
    with ops.use_backend(NATIVE[device.type][0]):
        seconds = _take_turns(calls, repeats, device)
    return {
        "logits_bytes": logits_LV.nbytes,
        "times": _times(seconds),
        "ratio_vs_fill": _ratio(seconds, "fill", "native"),
        "ratio_vs_torch": _ratio(seconds, "torch", "native"),
    }


def _bench_experts(shape_ENK: tuple[int, int, int], rows: int, repeats: int, device: torch.device) -> Record:
    """Products of rows, each with an expert at random, both ways."""
    (n_experts, N, K), (name, dtype) = shape_ENK, NATIVE[device.type]
    native, generator = ops.backend(name), torch.Generator(device).manual_seed(4)
    dense_ENK = torch.randn(shape_ENK, generator=generator, device=device, dtype=dtype)
    packed = quantize_experts(dense_ENK, QuantConfig())
    packed.decode(dense_ENK)
    stack = packed.stack
    assert stack is not None
    expert_of_row = torch.randint(n_experts, (rows,), generator=generator, device=device).sort().values
    ends_E = Ends.of(expert_of_row, n_experts).on_device
    found: Record = {}
    for transposed in (False, True):
        x_SC = torch.randn(rows, N if transposed else K, generator=generator, device=device, dtype=dtype)
        factor_ECM = dense_ENK if transposed else dense_ENK.transpose(1, 2)

        def ours(x: Tensor = x_SC, turned: bool = transposed) -> Tensor:
            return native.matmul_experts(x, stack, ends_E, turned, NO_EPILOGUE)

        def loop(x: Tensor = x_SC, turned: bool = transposed) -> Tensor:
            return plain.matmul_experts(native.matmul_4bit, native.matmul_grouped, x, stack, ends_E, turned, NO_EPILOGUE)

        def torchs(x: Tensor = x_SC, factor: Tensor = factor_ECM) -> Tensor:
            return torch._grouped_mm(x, factor, ends_E)

        seconds = _take_turns({"native": ours, "loop": loop, "torch_on_decoded": torchs}, repeats, device)
        found["transposed" if transposed else "forward"] = {
            "times": _times(seconds),
            "TFLOPps": 2 * rows * N * K / statistics.median(seconds["native"]) / 1e12,
            "ratio_vs_loop": _ratio(seconds, "loop", "native"),
            "ratio_vs_torch_on_decoded": _ratio(seconds, "torch_on_decoded", "native"),
        }
    return found


@torch.no_grad()
def bench_kernels(
    repeats: int = 15, peers: bool = True, device: str = "auto", save: Save = lambda record: None
) -> Record:  # fmt: skip
    """Measure the kernels of a device; a CPU's with one thread and with torch's number of threads. Under a minute on two cores.

    Args:
        repeats: turns of each group; groups with the slow plain-torch reference, and quantising, get a fifth of them.
        peers: also measure bitsandbytes if installed; otherwise its ratios are None and `peers_missing` says why.
        device: auto (CUDA if available, else the CPU), cpu, cuda or cuda:N.
        save: called with the record so far, before the groups that are measured on CUDA alone, and between them.
    Returns:
        A JSON-able record: `threads` -> count -> operation -> shape -> figures, each with its unit in its name. A ratio is
        other time / native time: above 1 the native kernel is faster. `failed` has the errors of those groups, by name.
    Raises:
        BackendError: the device's kernels are missing or cannot load; the message says why.
    """
    place = pick_device(device)
    if place.index is not None and place.type == "cuda":
        torch.cuda.set_device(place)
    bitsandbytes, peers_missing = _peers(peers)
    all_threads = torch.get_num_threads()
    shapes = SHAPES_NK + CUDA_SHAPES_NK * (place.type == "cuda")
    weights = [_Weight(N, K, place) for N, K in shapes]
    layers = [_bitsandbytes_layer(bitsandbytes, weight.dense_NK) if bitsandbytes else None for weight in weights]
    grouped = [_grouped_weights(weight.dense_NK) for weight in weights]
    by_threads: Record = {}
    failed: dict[str, str] = {}
    start = time.perf_counter()

    def result() -> Record:
        return {
            "environment": records.environment(place),
            "isa": cpu.isa() if place.type == "cpu" else None,
            "dtype": str(NATIVE[place.type][1]).removeprefix("torch."),
            "quant_type": "nf4",
            "block_size_elements": BLOCK_SIZE,
            "repeats": repeats,
            "method": "calls take turns; medians with minimum and maximum; ratios within a turn, then the median",
            "versions": {"torch": torch.__version__, "bitsandbytes": getattr(bitsandbytes, "__version__", None)},
            "peers_missing": peers_missing,
            "load_average_1min": os.getloadavg()[0],
            "elapsed_s": time.perf_counter() - start,
            "threads": by_threads,
            "failed": failed,
            "headlines": _headlines(by_threads[str(all_threads)], NATIVE[place.type][1])
            | {f"{name}: failed": why for name, why in failed.items()},
        }

    try:
        for threads in sorted({1, all_threads}) if place.type == "cpu" else [all_threads]:
            torch.set_num_threads(threads)
            record: Record = {"dequantize_4bit": {}, "quantize_4bit": {}, "gemv_4bit": {}, "grouped": {}}
            for weight, layer in zip(weights, layers, strict=True):
                N, K = weight.dense_NK.shape
                record["dequantize_4bit"][f"{N}x{K}"] = _bench_dequantize(weight, repeats, bitsandbytes)
                record["quantize_4bit"][f"{N}x{K}"] = _bench_quantize(weight, repeats, bitsandbytes)
                for T in ROWS:
                    record["gemv_4bit"][f"{T}x{K} by {N}x{K}"] = _bench_gemv(weight, T, repeats, bitsandbytes, layer)
            for weight, packed in zip(weights, grouped, strict=True):
                N, K = weight.dense_NK.shape
                record["grouped"][f"{N}x{K}"] = {
                    quant_type: _bench_grouped(each, weight.dense_NK, repeats) for quant_type, each in packed.items()
                }
            by_threads[str(threads)] = record
            if place.type == "cuda":
                failed |= _measure(record, _cuda_groups(repeats, place), lambda: save(result()))
    finally:
        torch.set_num_threads(all_threads)
    return result()


def _measure(record: Record, groups: dict[str, tuple[str, Callable[[], Record]]], save: Callable[[], object]) -> dict[str, str]:
    """Add groups to the record, which is saved before each; returns the errors of those that fail, by name."""
    failed = {}
    for name, (shape, measure) in groups.items():
        save()
        try:
            record[name] = {shape: measure()}
        except Exception as error:  # of a kernel, or of torch's: the rest is worth having
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


def _cuda_groups(repeats: int, device: torch.device) -> dict[str, tuple[str, Callable[[], Record]]]:
    """Name -> shape, and what measures it, of the groups that are measured on CUDA alone."""
    L, V = CUDA_LOGITS_LV
    experts = "x".join(map(str, (CUDA_EXPERT_ROWS, *CUDA_EXPERTS_ENK)))
    return {
        "cross_entropy": (f"{L}x{V}", lambda: _bench_cross_entropy(L, V, repeats, device)),
        "experts": (experts, lambda: _bench_experts(CUDA_EXPERTS_ENK, CUDA_EXPERT_ROWS, repeats, device)),
    }


def _headlines(record: Record, dtype: torch.dtype) -> Record:
    """The main ratios: other time / native time, all threads, mostly with double quantisation."""
    (N, K), (n, k) = SHAPES_NK
    big, small, dense = f"{N}x{K}", f"{n}x{k}", str(dtype).removeprefix("torch.")
    large, gemv = record["dequantize_4bit"][big], record["gemv_4bit"][f"1x{K} by {big}"]
    others = [
        (f"{N}x{K}", record["gemv_4bit"][f"1x{K} by {N}x{K}"]) for N, K in CUDA_SHAPES_NK if f"{N}x{K}" in record["grouped"]
    ]
    grouped = {name: each for name, each in record["grouped"][big].items() if not GROUPED[name].act_order}
    return {
        f"dequantize {big} / fill of the same memory": large["ratio_double_quant_vs_fill"],
        f"dequantize {small} / fill of the same memory": record["dequantize_4bit"][small]["ratio_double_quant_vs_fill"],
        f"dequantize {big} / bitsandbytes dequantize_4bit (which allocates)": large["ratio_double_quant_vs_bitsandbytes"],
        f"dequantize {big} / bitsandbytes' kernel alone, same output": large["ratio_vs_bitsandbytes_kernel"],
        f"dequantize {big} / bitsandbytes, both allocating": large["ratio_allocating_vs_bitsandbytes"],
        f"quantize {big} / bitsandbytes": record["quantize_4bit"][big]["ratio_vs_bitsandbytes"],
        f"matrix-vector {big} / dense {dense}": gemv["ratio_double_quant_vs_dense"],
        f"matrix-vector {big} / bitsandbytes matmul_4bit, {dense}": gemv["ratio_double_quant_vs_bitsandbytes_matmul_4bit"],
        f"matrix-vector {big} / bitsandbytes layer, bfloat16": gemv["ratio_double_quant_vs_bitsandbytes_layer_bfloat16"],
        **{
            f"dequantize {shape} / fill of the same memory": record["dequantize_4bit"][shape]["ratio_double_quant_vs_fill"]
            for shape, _ in others
        },
        **{f"matrix-vector {shape} / dense {dense}": each["ratio_double_quant_vs_dense"] for shape, each in others},
        **{
            f"loss and its gradient {shape} / torch's cross_entropy, forward and backward": each["ratio_vs_torch"]
            for shape, each in record.get("cross_entropy", {}).items()
        },
        **{
            f"products of experts {shape}, {way} / {other}": figures[key]
            for shape, each in record.get("experts", {}).items()
            for way, figures in each.items()
            for key, other in (
                ("ratio_vs_loop", "a loop over experts"),
                ("ratio_vs_torch_on_decoded", "torch's grouped product, decoded before"),
            )
        },
        **{f"{name}: dequantize {big} / fill of the same memory": each["ratio_vs_fill"] for name, each in grouped.items()},
        **{f"{name}: matrix-vector {big} / dense {dense}": each["ratio_gemv_vs_dense"] for name, each in grouped.items()},
    }
