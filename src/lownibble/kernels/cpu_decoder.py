"""The compiled decoder layer (`native/decoder.h`): its structures in ctypes, filled once for each layer and adapter."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lownibble.errors import BackendError, InputError
from lownibble.kernels.checks import check_block_size, check_tensor, check_weight
from lownibble.kernels.decoder import PROJECTIONS, Branches, DecoderLayer, Linear4bit, Segment, Step

_CPU = torch.device("cpu")
_pointer, _int64, _int32, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Linear4bit(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("codes", "values", "absmax", "nested_values", "nested_absmax", "nested_offset", "bias")),
        ("N", _int64), ("K", _int64), ("block_shift", _int32), ("nested_shift", _int32),
    ]  # fmt: skip


class _DecoderLayer(ctypes.Structure):
    _fields_ = [
        ("projections", _Linear4bit * len(PROJECTIONS)),
        *((name, _pointer) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, _int64) for name in ("hidden", "heads", "key_heads", "head_dim")),
        ("eps", _float), ("scaling", _float),
    ]  # fmt: skip


class _LowRank(ctypes.Structure):
    _fields_ = [("A", _pointer), ("B", _pointer), ("r", _int64), ("scale", _float)]


class _Segment(ctypes.Structure):
    _fields_ = [("begin", _int64), ("end", _int64), ("branches", _pointer)]


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("x", _pointer), ("T", _int64), ("cosine", _pointer), ("sine", _pointer), ("keys", _pointer), ("values", _pointer),
        ("capacity", _int64), ("slots", _pointer), ("positions", _pointer), ("segments", _pointer), ("n_segments", _int64),
    ]  # fmt: skip


_LowRanks = _LowRank * len(PROJECTIONS)


def _shift(size: int) -> int:
    check_block_size(size)
    return size.bit_length() - 1


def _floats(tensor: Tensor, role: str, length: int) -> int:
    check_tensor(tensor, role, torch.float32, length, _CPU)
    return tensor.data_ptr()


def _linear(name: str, linear: Linear4bit, N: int, K: int) -> _Linear4bit:
    if tuple(linear.shape) != (N, K):
        raise InputError(f"'{name}' must be {N} x {K}. Got {' x '.join(map(str, linear.shape))}.")
    check_weight(linear.codes, linear.absmax, linear.values, N * K, linear.block_size, linear.nested, _CPU)
    nested = linear.nested
    constants = (None,) * 3 if nested is None else (nested.values.data_ptr(), nested.absmax.data_ptr(), nested.offset.data_ptr())
    return _Linear4bit(
        linear.codes.data_ptr(), linear.values.data_ptr(), linear.absmax.data_ptr(), *constants,
        None if linear.bias is None else _floats(linear.bias, f"{name}.bias", N),
        N, K, _shift(linear.block_size), 0 if nested is None else _shift(nested.block_size),
    )  # fmt: skip


def _layer(layer: DecoderLayer) -> _DecoderLayer:
    """The layer's structure; addresses are those of the layer's own tensors, which it keeps alive."""
    if "cpu" in layer.prepared:
        return layer.prepared["cpu"]  # type: ignore[no-any-return]
    hidden, inner = layer.input_norm.numel(), layer.projections[4].shape[0]
    q, kv = layer.heads * layer.head_dim, layer.key_heads * layer.head_dim
    if layer.heads % layer.key_heads or layer.head_dim % 2:
        raise InputError(f"{layer.heads} heads of {layer.head_dim} over {layer.key_heads} key heads cannot be computed.")
    sizes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner))
    linears = [
        _linear(name, linear, *size) for name, linear, size in zip(PROJECTIONS, layer.projections, sizes, strict=True)
    ]  # fmt: skip
    norms = [
        None if norm is None else _floats(norm, "norm", length)
        for norm, length in (
            (layer.input_norm, hidden), (layer.post_norm, hidden), (layer.q_norm, layer.head_dim), (layer.k_norm, layer.head_dim)
        )
    ]  # fmt: skip
    made = _DecoderLayer(
        (_Linear4bit * len(linears))(*linears), *norms, hidden, layer.heads, layer.key_heads, layer.head_dim, layer.eps, layer.scaling
    )  # fmt: skip
    layer.prepared["cpu"] = made
    return made


def _branches(branches: Branches, layer: DecoderLayer) -> Any:
    if "cpu" not in branches.prepared:
        made = _LowRanks()
        for index, branch in enumerate(branches.of):
            if branch is None:
                continue
            (N, K), r, name = layer.projections[index].shape, branch.A.shape[0], PROJECTIONS[index]
            if tuple(branch.A.shape) != (r, K) or tuple(branch.B.shape) != (N, r):
                raise InputError(
                    f"The branch of '{name}' must be {r} x {K} and {N} x {r}. Got {tuple(branch.A.shape)} and {tuple(branch.B.shape)}."
                )
            made[index] = _LowRank(
                _floats(branch.A, f"{name}.A", r * K), _floats(branch.B, f"{name}.B", N * r), r, branch.scale
            )  # fmt: skip
        branches.prepared["cpu"] = made
    return branches.prepared["cpu"]


@cache
def _checked(library: Any) -> Any:
    """The library, once its structures are known to be as large as these."""
    for which, structure in enumerate((_Linear4bit, _DecoderLayer, _LowRank, _Segment, _Tokens)):
        if library.decoder_sizes(which) != ctypes.sizeof(structure):
            raise BackendError("The compiled library has other structures than this package. Reinstall lownibble.")
    return library


_workspace: list[Tensor] = [torch.empty(0)]


def decoder_layer(
    library: Any, x_TH: Tensor, layer: DecoderLayer, keys: Tensor, values: Tensor, step: Step, segments: Sequence[Segment]
) -> None:
    """As `ops.decoder_layer`."""
    made, T, D = _layer(layer), len(x_TH), layer.head_dim
    slots, key_heads, capacity, _ = keys.shape
    size = slots * key_heads * capacity * D
    if key_heads != layer.key_heads or keys.shape != values.shape or keys.shape[3] != D:
        raise InputError(f"The cache must be (slots, {layer.key_heads}, capacity, {D}), twice. Got {tuple(keys.shape)}.")
    if step.fits[0] > slots or step.fits[1] > capacity:
        raise InputError(f"The cache has {slots} slots of {capacity} positions; the step needs {step.fits[0]} of {step.fits[1]}.")
    array = (_Segment * len(segments))()
    for index, (begin, end, branches) in enumerate(segments):
        if not 0 <= begin <= end <= T:
            raise InputError(f"A segment must lie within {T} tokens. Got {begin} to {end}.")
        array[index] = _Segment(begin, end, None if branches is None else ctypes.addressof(_branches(branches, layer)))
    largest_r = max((branches.largest_r for _, _, branches in segments if branches), default=0)
    for name in ("slots", "positions"):
        check_tensor(getattr(step, name), name, torch.int64, T, _CPU)
    tokens = _Tokens(
        _floats(x_TH, "x_TH", T * made.hidden), T, _floats(step.cosine, "cosine", T * D), _floats(step.sine, "sine", T * D),
        _floats(keys, "keys", size), _floats(values, "values", size), capacity,
        step.slots.data_ptr(), step.positions.data_ptr(), ctypes.addressof(array), len(segments),
    )  # fmt: skip
    native, threads = _checked(library), torch.get_num_threads()
    needed = native.decoder_workspace(ctypes.byref(made), T, largest_r, capacity, threads)
    if _workspace[0].numel() < needed:
        _workspace[0] = torch.empty(needed)
    if native.decoder_layer(ctypes.byref(made), ctypes.byref(tokens), largest_r, _workspace[0].data_ptr(), threads):
        raise MemoryError("No memory for the decoded panels of a weight.")
