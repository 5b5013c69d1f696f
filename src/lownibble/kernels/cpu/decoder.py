"""The compiled decoder layers (`native/decoder.h`): ctypes structures, filled once per model and per adapter."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lownibble.errors import BackendError, InputError
from lownibble.kernels import decoder
from lownibble.kernels.checks import DTYPES, check_block_size, check_float, check_tensor, check_weight
from lownibble.kernels.cpu.arguments import empty
from lownibble.kernels.cpu.fourbit import gemv_4bit
from lownibble.kernels.cpu.loading import library
from lownibble.kernels.decoder import (
    ACTIVATIONS,
    PROJECTIONS,
    Adapter,
    Context,
    DecoderLayer,
    DecoderLayers,
    Projection,
    Segment,
    Step,
)
from lownibble.kernels.types import FourBit

_CPU = torch.device("cpu")
_pointer, _int64, _int32, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Linear4bit(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("codes", "values", "absmax", "nested_values", "nested_absmax", "nested_offset", "bias")),
        ("N", _int64), ("K", _int64), ("block_shift", _int32), ("nested_shift", _int32),
    ]  # fmt: skip


_NORMS = ("input_norm", "feed_forward_norm", "attention_output_norm", "feed_forward_output_norm", "q_norm", "k_norm")


class _DecoderLayer(ctypes.Structure):
    _fields_ = [
        ("projections", _Linear4bit * len(PROJECTIONS)),
        *((name, _pointer) for name in _NORMS),
        *((name, _int64) for name in ("hidden", "heads", "key_heads", "head_dim", "window", "rope", "context", "row")),
        *((name, _float) for name in ("eps", "scaling", "softcap", "residual_scale")), ("activation", _int32),
    ]  # fmt: skip


class _LowRank(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("A", "B_transposed", "gain")), ("r", _int64), ("scale", _float), ("dtype", _int32),
    ]  # fmt: skip


class _Segment(ctypes.Structure):
    _fields_ = [("begin", _int64), ("end", _int64), ("branches", _pointer)]


class _Context(ctypes.Structure):
    _fields_ = [("keys", _pointer), ("values", _pointer), ("capacity", _int64)]


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("x", _pointer), ("T", _int64),
        *((name, _pointer) for name in ("cosine", "sine", "contexts")),
        ("n_slots", _int64), ("longest", _int64),
        *((name, _pointer) for name in ("slots", "places", "segments")), ("n_segments", _int64),
    ]  # fmt: skip


def _shift(size: int) -> int:
    check_block_size(size)
    return size.bit_length() - 1


def _floats(tensor: Tensor, role: str, length: int) -> int:
    check_tensor(tensor, role, torch.float32, length, _CPU)
    return tensor.data_ptr()


def _linear(name: str, projection: Projection, N: int, K: int) -> _Linear4bit:
    weight, bias = projection
    assert isinstance(weight, FourBit)
    if tuple(weight.shape) != (N, K):
        raise InputError(f"'{name}' must be {N} x {K}. Got {' x '.join(map(str, weight.shape))}.")
    check_weight(weight, _CPU)
    nested = weight.nested
    constants = (None,) * 3 if nested is None else (nested.values.data_ptr(), nested.absmax.data_ptr(), nested.offset.data_ptr())
    return _Linear4bit(
        weight.codes.data_ptr(), weight.values.data_ptr(), weight.absmax.data_ptr(), *constants,
        None if bias is None else _floats(bias, f"{name}.bias", N),
        N, K, _shift(weight.block_size), 0 if nested is None else _shift(nested.block_size),
    )  # fmt: skip


def _layer(layer: DecoderLayer, kept: tuple[int, int]) -> _DecoderLayer:
    hidden, inner = layer.input_norm.numel(), 0 if layer.feed_forward else layer.projections[4].weight.shape[0]
    q, kv = layer.heads * layer.head_dim, layer.key_heads * layer.head_dim
    if layer.heads % layer.key_heads or layer.head_dim % 2:
        raise InputError(f"{layer.heads} heads of {layer.head_dim} over {layer.key_heads} key heads cannot be computed.")
    sizes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner))
    named = zip(PROJECTIONS, layer.projections, sizes, strict=layer.feed_forward is None)
    linears = [_linear(name, linear, *size) for name, linear, size in named]
    lengths = {name: layer.head_dim if name in ("q_norm", "k_norm") else hidden for name in _NORMS}
    norms = [
        None if (norm := getattr(layer, name)) is None else _floats(norm, name, length) for name, length in lengths.items()
    ]  # fmt: skip
    return _DecoderLayer(
        (_Linear4bit * len(PROJECTIONS))(*linears), *norms, hidden, layer.heads, layer.key_heads, layer.head_dim,
        layer.window or 0, layer.rope, *kept, layer.eps, layer.scaling, layer.softcap or 0.0,
        layer.residual_scale, [*ACTIVATIONS].index(layer.activation),
    )  # fmt: skip


def _layers(layers: DecoderLayers) -> Any:
    """The layers as ctypes structures, those of a mixture with projections 4 to 6 empty, which the kernels take for a layer of
    attention only; they point to tensors that `layers` keeps alive."""
    if "cpu" not in layers.prepared:
        made = [_layer(layer, kept) for layer, kept in zip(layers.of, layers.kept, strict=True)]
        inner = {one.projections[4].N for one in made} - {0}  # none in a layer of a mixture
        if len({(one.hidden, one.heads, one.key_heads, one.head_dim) for one in made}) != 1 or len(inner) > 1:
            raise InputError("All decoder layers must be of the same sizes, and there must be one.")
        layers.prepared["cpu"] = (_DecoderLayer * len(made))(*made)
    return layers.prepared["cpu"]


def _adapter(adapter: Adapter, layers: DecoderLayers) -> Any:
    """The branches as ctypes structures, (layers, projections); `adapter.prepared` keeps the copied tensors alive."""
    if "cpu" not in adapter.prepared:
        made = (_LowRank * (len(layers.of) * len(PROJECTIONS)))()
        copies = []
        for i, (layer, branches) in enumerate(zip(layers.of, adapter.of, strict=True)):
            n_branches = len(layer.projections) + len(layer.feed_forward.linears if layer.feed_forward else ())
            if len(branches) != n_branches:
                raise InputError(f"Layer {i} has {n_branches} linear layers, and the adapter branches of {len(branches)}.")
            for p, (name, projection, branch) in enumerate(zip(PROJECTIONS, layer.projections, branches, strict=False)):
                if branch is None:
                    continue
                (N, K), r = projection.weight.shape, branch.A.shape[0]
                if tuple(branch.A.shape) != (r, K) or tuple(branch.B.shape) != (N, r):
                    raise InputError(
                        f"The branch of '{name}' of layer {i} must be {r} x {K} and {N} x {r}. "
                        f"Got {tuple(branch.A.shape)} and {tuple(branch.B.shape)}."
                    )
                transposed = branch.B.t()
                if not transposed.is_contiguous():
                    copies.append(transposed := transposed.contiguous())
                check_float(branch.A, f"{name}.A")
                for role, tensor, length in (("A", branch.A, r * K), ("B", transposed, r * N)):
                    check_tensor(tensor, f"{name}.{role}", branch.A.dtype, length, _CPU)
                address = i * len(PROJECTIONS) + p
                gain = None if branch.gain is None else _floats(branch.gain, f"{name}'s gain", N)
                made[address] = _LowRank(
                    branch.A.data_ptr(), transposed.data_ptr(), gain, r, branch.scale, DTYPES[branch.A.dtype]
                )
        adapter.prepared["cpu"] = made, copies
    return adapter.prepared["cpu"][0]


@cache
def _checked_library() -> Any:
    """The library, after checking that its structures have the sizes of these."""
    for which, structure in enumerate((_Linear4bit, _DecoderLayer, _LowRank, _Segment, _Context, _Tokens)):
        if library().decoder_sizes(which) != ctypes.sizeof(structure):
            raise BackendError("The compiled library has other structures than this package. Reinstall lownibble.")
    return library()


_memory = threading.local()


def _workspace(floats: int) -> int:
    """Address of the calling thread's workspace of at least `floats` floats; reused between calls."""
    if getattr(_memory, "workspace", _EMPTY).numel() < floats:
        _memory.workspace = empty(floats)
    return int(_memory.workspace.data_ptr())


_EMPTY = empty(0)


def decoder_layers(
    x_TH: Tensor, layers: DecoderLayers, contexts: Sequence[Context], step: Step, segments: Sequence[Segment]
) -> None:
    """As `ops.decoder_layers`; in plain torch if any projection is not 4-bit."""
    if not layers.in_4bit:
        decoder.decoder_layers(gemv_4bit, x_TH, layers, contexts, step, segments)
        return
    library = _checked_library()
    made, T = _layers(layers), len(x_TH)
    D, slots = made[0].head_dim, _slots(layers, contexts, step)
    longest = max(context.keys.shape[3] for context in contexts)
    for begin, end, _ in segments:
        if not 0 <= begin <= end <= T:
            raise InputError(f"A segment must lie within {T} tokens. Got {begin} to {end}.")
    branches = [_adapter(adapter, layers) for _, _, adapter in segments]
    largest_r = max((adapter.largest_r for _, _, adapter in segments), default=0)
    check_tensor(step.slots, "slots", torch.int64, T, _CPU)
    check_tensor(step.places, "places", torch.int64, len(contexts) * T, _CPU)
    threads = torch.get_num_threads()
    widest = max(made, key=lambda one: one.projections[4].N)
    workspace = _workspace(library.decoder_workspace(ctypes.byref(widest), T, largest_r, longest, threads))
    if len(step.cosine) <= (rope := max(one.rope for one in made)):
        raise InputError(f"The layers need {rope + 1} rotary angles, and the step has {len(step.cosine)}.")
    x, n_angles = _floats(x_TH, "x_TH", T * made[0].hidden), len(step.cosine) * T * D
    angles = [_floats(getattr(step, name), name, n_angles) for name in ("cosine", "sine")]
    held = (_Context * len(contexts))(*(
        _Context(_floats(keys, "keys", keys.numel()), _floats(values, "values", keys.numel()), keys.shape[3])
        for keys, values in contexts
    ))  # fmt: skip
    begin = 0
    for end in _ends(layers):
        array = (_Segment * len(segments))()
        for index, (of_all, segment) in enumerate(zip(branches, segments, strict=True)):
            of_these = ctypes.addressof(of_all) + begin * len(PROJECTIONS) * ctypes.sizeof(_LowRank)
            array[index] = _Segment(segment.begin, segment.end, of_these)
        tokens = _Tokens(
            x, T, *angles, ctypes.addressof(held), slots, longest,
            step.slots.data_ptr(), step.places.data_ptr(), ctypes.addressof(array), len(segments),
        )  # fmt: skip
        if library.decoder_layers(ctypes.byref(made[begin]), end - begin, ctypes.byref(tokens), largest_r, workspace, threads):
            raise MemoryError("No memory for the decoded panels of a weight.")
        last = layers.of[end - 1]
        if last.feed_forward is not None:
            last.add_feed_forward(x_TH, [(s.begin, s.end, s.adapter.of[end - 1]) for s in segments])
        begin = end


def _slots(layers: DecoderLayers, contexts: Sequence[Context], step: Step) -> int:
    """The number of slots of the contexts, after checking that they are the layers' and hold the step."""
    if len(contexts) != len(layers.windows) or len(step.places) != len(contexts):
        raise InputError(
            f"The layers have {len(layers.windows)} windows, the cache {len(contexts)}, the step {len(step.places)}."
        )
    slots, of = contexts[0].keys.shape[1], [window for window, _ in layers.kept]
    for index, (keys, values) in enumerate(contexts):
        places = keys.shape[3]
        shape = (of.count(index), slots, layers.of[0].key_heads, places, layers.of[0].head_dim)
        if keys.shape != shape or values.shape != shape:
            raise InputError(
                f"Keys and values must be (layers, slots, key heads, places, head_dim) = {shape}. Got {tuple(keys.shape)}."
            )
        if step.fits[0] > slots or step.fits[1][index] > places:
            raise InputError(
                f"The cache has {slots} slots of {places} places; the step needs {step.fits[0]} of {step.fits[1][index]}."
            )
    return int(slots)


def _ends(layers: DecoderLayers) -> list[int]:
    """Ends of the runs of layers that one call computes: the last of a run may have a feed-forward part in Python."""
    n = len(layers.of)
    return [i + 1 for i, layer in enumerate(layers.of) if layer.feed_forward is not None or i + 1 == n]
