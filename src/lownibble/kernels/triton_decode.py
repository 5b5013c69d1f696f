"""Decoding steps of one token of each row on CUDA: attention over slots, and the low-rank branches of each row's own adapter.

**Attention.** A program takes a part of a row's context for the query heads that share a key head: scores and weighted values are
products of tensor cores, with a running maximum. As many parts as fill the device, whatever the lengths, which are read on the
device: a short context has parts without keys. A second launch puts the parts together. Keys are read once, and only those that
the row sees.

**Low-rank branches.** Tables have the addresses of the A and B of every adapter of the step, so nothing is copied or stacked when
requests come and go, and a launch is the same for one adapter and for sixteen. `shrink` computes a few ranks of a row's `A x`, in
float32; `expand` adds a tile of `B low` to the row. A program whose row has no adapter, or whose adapter has no branch here, ends
at once. Of rank 16 a row reads 32 (N + K) bytes: an eighth of a 4096 x 4096 weight in 4 bits with eight adapters of eight rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lownibble.errors import InputError
from lownibble.kernels.checks import check_float, check_tensor
from lownibble.kernels.rows import RANK_STEP, Attending, RowAdapters

KEYS, WARPS, STAGES = 64, 4, 2
"""Keys that a program of the attention reads at a time at most, its warps, and how far it reads ahead."""
AT_ONCE_BYTES = 2**15
"""Keys and values that it reads at a time, so that it fits into any card's shared memory."""
PROGRAMS, MOST_PARTS = 264, 64
"""Programs that fill the device: two for each of 132 multiprocessors. Parts of a context at most."""
SHRINK_RANKS, SHRINK_TERMS = 2, 1024
"""Ranks of a program of `shrink`, and terms at a time."""
EXPAND_OUTPUTS = 128
"""Outputs of a program of `expand`."""
LEAST = tl.constexpr(-3.4028234663852886e38)  # unlike -inf it can be subtracted from itself
STEP = tl.constexpr(RANK_STEP)


@triton.jit
def attend_part(
    q, keys, values, slots, positions, sums, largest, out, C, scaling, softcap, KEY_HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DS: tl.constexpr, DVS: tl.constexpr, HEADS: tl.constexpr, KEYS_AT_ONCE: tl.constexpr,
    PARTS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """A part of a row's context for the query heads of a key head. HEADS: GROUP, as tensor cores take it; DS, DVS: D and DV."""
    part = tl.program_id(0) % PARTS
    row_head = tl.program_id(0) // PARTS
    row, head = row_head // KEY_HEADS, row_head % KEY_HEADS
    last = tl.load(positions + row).to(tl.int32)
    first = tl.maximum(last - WINDOW + 1, 0) if WINDOW else 0
    blocks = last // KEYS_AT_ONCE - first // KEYS_AT_ONCE + 1
    of_part = tl.cdiv(blocks, PARTS)
    begin = (first // KEYS_AT_ONCE + part * of_part) * KEYS_AT_ONCE
    end = tl.minimum(begin + of_part * KEYS_AT_ONCE, last + 1)
    g, d, dv = tl.arange(0, HEADS), tl.arange(0, DS), tl.arange(0, DVS)
    query_head = row_head * GROUP + g
    query = tl.load(q + query_head[:, None] * D + d[None, :], mask=(g < GROUP)[:, None] & (d < D)[None, :], other=0.0)
    start = (tl.load(slots + row) * KEY_HEADS + head) * C
    most = tl.full((HEADS,), LEAST, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    weighted = tl.zeros((HEADS, DVS), tl.float32)
    for k_first in range(begin, end, KEYS_AT_ONCE):
        k = k_first + tl.arange(0, KEYS_AT_ONCE)
        seen = (k >= first) & (k < end)
        place = (start + k)[:, None]
        key = tl.load(keys + place * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
        if CAPPED:
            scores = softcap * (1 - tl.div_rn(2.0, tl.exp(tl.div_rn(2 * scores, softcap)) + 1))  # tanh
        scores = tl.where(seen[None, :], scores, float("-inf"))
        before = most
        most = tl.maximum(before, tl.max(scores, axis=1))
        shrunk, weight = tl.exp(before - most), tl.exp(scores - most[:, None])
        total = total * shrunk + tl.sum(weight, axis=1)
        value = tl.load(values + place * DV + dv[None, :], mask=seen[:, None] & (dv < DV)[None, :], other=0.0)
        weighted = tl.dot(weight.to(value.dtype), value, weighted * shrunk[:, None], input_precision="ieee")
    to = query_head * PARTS + part
    tl.store(sums + to, total, mask=g < GROUP)
    tl.store(largest + to, most, mask=g < GROUP)
    tl.store(out + to[:, None] * DV + dv[None, :], weighted, mask=(g < GROUP)[:, None] & (dv < DV)[None, :])


@triton.jit
def attend_whole(
    sums, largest, parts, sinks, out, H: tl.constexpr, DV: tl.constexpr, DVS: tl.constexpr, PARTS: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Put the parts of a query head together."""
    head = tl.program_id(0)
    part, dv = tl.arange(0, PARTS), tl.arange(0, DVS)
    each = tl.load(largest + head * PARTS + part)
    most = tl.max(each, axis=0)
    if SINKS:
        sink = tl.load(sinks + head % H).to(tl.float32)
        most = tl.maximum(most, sink)
    share = tl.exp(each - most)
    total = tl.sum(tl.load(sums + head * PARTS + part) * share, axis=0)
    if SINKS:
        total += tl.exp(sink - most)
    place = (head * PARTS + part)[:, None] * DV + dv[None, :]
    weighted = tl.load(parts + place, mask=(dv < DV)[None, :], other=0.0)
    y = tl.div_rn(tl.sum(weighted * share[:, None], axis=0), total)
    tl.store(out + head * DV + dv, y.to(out.dtype.element_ty), mask=dv < DV)


@triton.jit(do_not_specialize=["linear", "linears"])  # one program for all layers of a shape
def shrink(
    x, index, pointers, ranks, low, linear, linears, K, R: tl.constexpr, RANKS: tl.constexpr, TERMS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """RANKS of a row's `A x`; `low` (T, R). ALIGNED: rows of A begin at multiples of 16 bytes."""
    row = tl.program_id(0) // (R // RANKS)
    r = (tl.program_id(0) % (R // RANKS)) * RANKS + tl.arange(0, RANKS)
    place = tl.load(index + row)
    if place < 0:
        return
    at = place * linears + linear
    rank = tl.load(ranks + at) * STEP
    A = tl.load(pointers + at * 2).to(tl.pointer_type(x.dtype.element_ty))
    total = tl.zeros((RANKS, TERMS), tl.float32)
    for first in range(0, K, TERMS):
        k = first + tl.arange(0, TERMS)
        there = A + r[:, None] * K + k[None, :]
        if ALIGNED:
            there = tl.multiple_of(there, [1, 16])
        a = tl.load(there, mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0)
        x_k = tl.load(x + row * K + k, mask=k < K, other=0.0)
        total += a.to(tl.float32) * x_k.to(tl.float32)[None, :]
    tl.store(low + row * R + r, tl.sum(total, axis=1))


@triton.jit(do_not_specialize=["linear", "linears"])
def expand(
    low, index, pointers, ranks, scales, out, linear, linears, N, R: tl.constexpr, OUTPUTS: tl.constexpr
):  # fmt: skip
    """Add OUTPUTS of a row's `scale * B low`."""
    tiles = tl.cdiv(N, OUTPUTS)
    row = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
    place = tl.load(index + row)
    if place < 0:
        return
    at = place * linears + linear
    rank = tl.load(ranks + at) * STEP
    if rank == 0:
        return
    B = tl.load(pointers + at * 2 + 1).to(tl.pointer_type(out.dtype.element_ty))
    total = tl.zeros((OUTPUTS,), tl.float32)
    for first in range(0, rank, STEP):
        r = first + tl.arange(0, STEP)
        there = tl.multiple_of(B + n[:, None] * rank + r[None, :], [1, 16])  # as ranks are a multiple of 16
        b = tl.load(there, mask=(n < N)[:, None], other=0.0)
        total += tl.sum(b.to(tl.float32) * tl.load(low + row * R + r)[None, :], axis=1)
    there = out + row.to(tl.int64) * N + n
    y = tl.load(there, mask=n < N, other=0.0).to(tl.float32) + total * tl.load(scales + at)
    tl.store(there, y.to(out.dtype.element_ty), mask=n < N)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants)


def keys_at_once(ds: int, dvs: int, itemsize: int) -> int:
    """How many keys and values a program reads at a time, a power of two."""
    room = AT_ONCE_BYTES // ((ds + dvs) * itemsize)
    return max(16, min(KEYS, 1 << room.bit_length() >> 1))


def attend_slots(
    q_BHD: Tensor, keys: Tensor, values: Tensor, slots_B: Tensor, positions_B: Tensor, how: Attending
) -> Tensor:  # fmt: skip
    """As `ops.attend_slots`."""
    (B, H, D), (slots, heads, C, DV), device = q_BHD.shape, values.shape, q_BHD.device
    check_float(q_BHD, "q_BHD")
    check_tensor(q_BHD, "q_BHD", q_BHD.dtype, B * H * D, device)
    check_tensor(keys, "keys", q_BHD.dtype, slots * heads * C * D, device)
    check_tensor(values, "values", q_BHD.dtype, slots * heads * C * DV, device)
    check_tensor(slots_B, "slots_B", torch.int64, B, device)
    check_tensor(positions_B, "positions_B", torch.int64, B, device)
    if H % heads:
        raise InputError(f"{H} query heads cannot share {heads} key heads.")
    ds, dvs = (max(16, triton.next_power_of_2(n)) for n in (D, DV))
    at_once = keys_at_once(ds, dvs, q_BHD.dtype.itemsize)
    fill = triton.next_power_of_2(triton.cdiv(PROGRAMS, max(1, B * heads)))
    parts = min(fill, MOST_PARTS, triton.next_power_of_2(triton.cdiv(C, at_once)))
    sums, largest, weighted = (torch.empty((B, H, parts, *n), dtype=torch.float32, device=device) for n in ((), (), (DV,)))
    out_BHV = torch.empty((B, H, DV), dtype=q_BHD.dtype, device=device)
    scaling = D**-0.5 if how.scaling is None else how.scaling
    _launch(
        attend_part, B * heads * parts, q_BHD, keys, values, slots_B, positions_B, sums, largest, weighted, C, float(scaling),
        float(how.softcap or 1.0), KEY_HEADS=heads, GROUP=H // heads, D=D, DV=DV, DS=ds, DVS=dvs,
        HEADS=max(16, triton.next_power_of_2(H // heads)), KEYS_AT_ONCE=at_once, PARTS=parts, WINDOW=how.window or 0,
        CAPPED=how.softcap is not None, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    sinks = sums if how.sinks is None else how.sinks
    _launch(
        attend_whole, B * H, sums, largest, weighted, sinks, out_BHV, H=H, DV=DV, DVS=dvs, PARTS=parts,
        SINKS=how.sinks is not None,
    )  # fmt: skip
    return out_BHV


def add_low_rank_rows(y_TN: Tensor, x_TK: Tensor, adapters: RowAdapters, linear: int) -> None:
    """As `ops.add_low_rank_rows`: two launches for all rows."""
    (T, K), N, device, R = x_TK.shape, y_TN.shape[1], x_TK.device, adapters.largest_r
    check_float(x_TK, "x_TK")
    check_tensor(x_TK, "x_TK", x_TK.dtype, T * K, device)
    check_tensor(y_TN, "y_TN", x_TK.dtype, T * N, device)
    check_tensor(adapters.at, "at", torch.int64, T, device)
    linears = adapters.ranks.shape[1]
    low = torch.empty((T, R), dtype=torch.float32, device=device)
    _launch(
        shrink, T * (R // SHRINK_RANKS), x_TK, adapters.at, adapters.pointers, adapters.ranks, low, linear, linears, K,
        R=R, RANKS=SHRINK_RANKS, TERMS=SHRINK_TERMS, ALIGNED=K * x_TK.element_size() % 16 == 0,
    )  # fmt: skip
    _launch(
        expand, T * triton.cdiv(N, EXPAND_OUTPUTS), low, adapters.at, adapters.pointers, adapters.ranks, adapters.scales,
        y_TN, linear, linears, N, R=R, OUTPUTS=EXPAND_OUTPUTS,
    )  # fmt: skip
