"""Attention over segments of tokens, each attending only to itself: packed rows concatenated into one sequence, the rows of a
padded batch, or sequences whose common beginnings are computed once.

transformers lets a function be registered as an attention implementation and passes the keyword arguments of a model's forward
to it; a model that is set to one of ours gets no mask (there is no mask function of that name, so none is built) and its layers
call the function with the cu_seqlens of the segments, under the names that transformers' flash attention uses. Nothing else in
the model changes. There are two for segments, each also for sequences that begin alike, and one for right-padded rows on GPUs:

- `lownibble_rows` is our kernel (`kernels/ops.py`), for float32 on CPUs that have it: packed or padded, also in compiled layers.
- `lownibble_packed` is for packed rows everywhere else. On CUDA, if torch supports it (half precision, capability 8.0, same head
  sizes), it is one variable-length kernel; elsewhere one SDPA call per run of rows of equal length, which is why a batch keeps
  its rows sorted.
- `lownibble_prefixed_rows` and `lownibble_prefixed_packed` are these two for the nodes of a tree of sequences (`prefixes.py`):
  they gather queries, keys and values of whole sequences, attend as above, and take each node's output from the first sequence
  that has it. With our kernel only nodes are kept for backward, and sequences gathered again.
- `lownibble_causal` is torch's SDPA, causal and without a mask, which right-padded rows do not need. With its own, transformers
  looks for packed rows in the positions of each pass, for which the host waits, and in a pass that is captured as a CUDA graph,
  where it must not wait, it makes a full mask, which no fast kernel takes.

The implementation is set for a training step and restored after it, so that evaluation, generation and the caller see the
model's original attention. There is no fallback: a layer that gets no cu_seqlens, or requests an unsupported feature, is an
error. Whether a model respects segment boundaries (recurrent states and convolutions do not stop at them) is checked before
training by comparing a packed pass with separate ones.

Rejected: a block-diagonal mask (T x T, and no fast kernel supports it); replacing attention modules (patched classes); leaving
the implementation on and falling back to SDPA if no cu_seqlens arrive (a lost argument would mix rows silently).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from lownibble.errors import BackendError, ModelError
from lownibble.kernels import ops
from lownibble.models.info import body
from lownibble.models.prefixes import Prefixes
from lownibble.transfers import to_device

PACKED, ROWS, CAUSAL = "lownibble_packed", "lownibble_rows", "lownibble_causal"
PREFIXED = {PACKED: "lownibble_prefixed_packed", ROWS: "lownibble_prefixed_rows"}

_REFUSED = ("softcap", "s_aux", "position_bias")
"""Attention arguments that neither SDPA nor the variable-length kernel supports: capped scores, sinks, position biases."""


def inputs(model: Any, mask_BT: Tensor, segments: Sequence[int] | None) -> dict[str, Any]:
    """Arguments of the model's forward besides token ids, inside `segment_attention`.

    Args:
        mask_BT: 1 for tokens, then 0 for padding, which is computed as a segment of its own.
        segments: the lengths of packed rows; then B is 1.
    """
    device = mask_BT.device
    packed = {}
    if segments:
        positions = torch.cat([torch.arange(length) for length in segments]).unsqueeze(0)
        packed = {"position_ids": to_device(positions, device)}
    if _implementation(model) == ROWS:
        if segments:
            cu_seqlens = torch.tensor([0, *accumulate(segments)])
        else:
            begins = torch.arange(len(mask_BT)) * mask_BT.shape[1]
            ends = torch.stack([begins + mask_BT.sum(1), begins + mask_BT.shape[1]], dim=1).flatten()
            cu_seqlens = torch.cat([begins[:1], ends])
        return {**packed, "cu_seq_lens_q": cu_seqlens}
    assert segments, "only the kernel takes padded rows"
    cu_seqlens = to_device(torch.tensor([0, *accumulate(segments)], dtype=torch.int32), device)
    return {
        **packed,
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cu_seqlens),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(segments)),
    }


def prefix_inputs(model: Any, prefixes: Prefixes) -> dict[str, Any]:
    """The same for a tree of sequences, inside `prefix_attention`."""
    of_rows = _implementation(model) == PREFIXED[ROWS]
    cu_seqlens = prefixes.begins if of_rows else prefixes.begins.to(torch.int32)
    lengths = {} if of_rows else dict.fromkeys(("max_length_q", "max_length_k"), max(prefixes.lengths))
    return {
        "position_ids": prefixes.positions, "prefix_spread": prefixes.spread, "prefix_first": prefixes.first,
        "cu_seq_lens_q": cu_seqlens, **lengths,
    }  # fmt: skip


def kernel_obstacle(model: Any) -> str:
    """Why the model's attention cannot run on our kernel here, or ''."""
    weight, config = model.get_input_embeddings().weight, model.config.get_text_config()
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"it is {weight.dtype} on '{weight.device}'"
    size = head_dim(config)
    if size is None:
        return "it has no attention heads, or heads of several sizes"
    try:
        has_kernel = getattr(ops.current("cpu"), "has_attention", lambda _: False)(size)
    except BackendError as error:
        return str(error)
    if not has_kernel:
        return f"there is no kernel for heads of {size} with these instructions"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    return "" if window(model) is None else "its attention has a window"


def head_dim(config: Any) -> int | None:
    """The head size; derived from the hidden size if the configuration does not give it. None: no heads, or several sizes."""
    try:
        given, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    except Exception:  # transformers raises where they differ between layers
        return None
    return int(given) if given else int(config.hidden_size // heads) if heads else None


def window(model: Any) -> int | None:
    """Sliding-window size of the model's attention in tokens; None if no layer has a window."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds and all(kind == "full_attention" for kind in kinds):
        return None
    return getattr(config, "sliding_window", None)


def windows_only_in_mask(model: Any, windows: Sequence[int | None]) -> bool:
    """Whether layers have other sliding windows than the `windows` passed to attention: their masks apply them (Qwen2-MoE)."""
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    expected = sum(kind == "sliding_attention" for kind in layers) if layers else len(windows)
    return window(model) is not None and sum(size is not None for size in windows) != expected


@contextmanager
def segment_attention(model: Any) -> Iterator[None]:
    """Set our attention inside the block: forward and backward require segments; padded rows need the kernel.

    Raises:
        ModelError: the model's attention implementation cannot be replaced.
    """
    with swapped(model, _for_segments(model)):
        yield


@contextmanager
def prefix_attention(model: Any) -> Iterator[None]:
    """Set our attention inside the block: forward and backward require `Prefixes`.

    Raises:
        ModelError: the model's attention implementation cannot be replaced.
    """
    with swapped(model, PREFIXED[_for_segments(model)]):
        yield


def _for_segments(model: Any) -> str:
    parameters = inspect.signature(body(model).forward).parameters
    if "position_ids" not in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise refusal(type(model).__name__, "its forward takes no position_ids or hands no arguments on to attention")
    return PACKED if kernel_obstacle(model) else ROWS


@contextmanager
def causal_attention(model: Any) -> Iterator[None]:
    """Set torch's causal attention without masks inside the block, for right-padded rows; see `causal_obstacle`.

    Raises:
        ModelError: the model's attention implementation cannot be replaced.
    """
    with swapped(model, CAUSAL):
        yield


@contextmanager
def swapped(model: Any, implementation: str) -> Iterator[None]:
    """Set an attention implementation inside the block.

    Raises:
        ModelError: the model's attention cannot be replaced.
    """
    config = model.config
    before = {
        key: getattr(config, key)._attn_implementation for key in config.sub_configs if getattr(config, key, None) is not None
    }
    before[""] = config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        if _implementation(model) != implementation:
            raise refusal(type(model).__name__, "its attention cannot be swapped")
        yield
    finally:
        model.set_attn_implementation(before)


def causal_obstacle(model: Any, longest: int) -> str:
    """Why rows of up to `longest` tokens may need another mask than a causal one, or ''."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"its attention is '{config._attn_implementation}', not torch's"
    for name, size in (("a window", window(model)), ("chunks", getattr(config, "attention_chunk_size", None))):
        if size is not None and longest >= size:
            return f"its attention has {name} of {size} tokens, and rows are longer"
    return ""


def takes_segments(model: Any) -> bool:
    """Whether the model is inside `segment_attention`."""
    return _implementation(model) in (PACKED, ROWS)


def takes_prefixes(model: Any) -> bool:
    """Whether the model is inside `prefix_attention`."""
    return _implementation(model) in PREFIXED.values()


def _implementation(model: Any) -> str:
    return str(model.config._attn_implementation)


def refusal(who: str, why: str) -> ModelError:
    """The error for a model that cannot take packed rows."""
    return ModelError(
        f"{who} cannot be trained with packing: {why}. Use packing=False (--no-packing), with group_by_length=True "
        "(--group-by-length) for little padding."
    )


def _refuse(module: Any, attention_mask: Tensor | None, is_causal: bool | None, others: dict[str, Any]) -> None:
    """Raise if a layer requests an unsupported feature."""
    asked = [name for name in _REFUSED if others.get(name) is not None]
    if asked:
        raise refusal(type(module).__name__, f"it asks for {', '.join(asked)}, which is not done for packed rows")
    if attention_mask is not None or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise refusal(type(module).__name__, "its attention is not plainly causal")


@torch.library.custom_op("lownibble::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    return ops.attention(q, k, v, cu_seqlens, scaling)


@_attention.register_fake
def _(q, k, v, cu_seqlens, scaling):  # type: ignore[no-untyped-def]
    B, heads, T, D = q.shape
    return q.new_empty(B, T, heads, D), q.new_empty(B * T, heads)


@torch.library.custom_op("lownibble::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    return ops.attention_backward(dout, q, k, v, out, lse, cu_seqlens, scaling)


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, scaling):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.scaling = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.backend = ops.chosen()


def _differentiate(ctx: Any, dout: Tensor, _: None) -> tuple[Any, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    with ops.keeping(ctx.backend):
        return (*_attention_backward(dout, q, k, v, out, lse, cu_seqlens, ctx.scaling), None, None)


_attention.register_autograd(_differentiate, setup_context=_save)


def spread_out(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """`x.index_select(dim, index)` of an index with repeats, whose backward adds up in a fixed order: on CUDA that of
    index_select does not, and on a CPU that of indexing."""
    return x[(slice(None),) * dim + (index,)] if x.is_cuda else x.index_select(dim, index)


def _of_sequences(x: Tensor, spread: Tensor) -> Tensor:
    """(1, heads, N, D) of the sequences' tokens, from (1, heads, U, D)."""
    return x.transpose(1, 2).index_select(1, spread).transpose(1, 2)


@torch.library.custom_op("lownibble::prefix_attention", mutates_args=())
def _prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, spread: Tensor, first: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (_of_sequences(t, spread) for t in (q, k, v))
    out, lse = ops.attention(q, k, v, cu_seqlens, scaling)
    return out.index_select(1, first), lse.index_select(0, first)


@_prefix_attention.register_fake
def _(q, k, v, cu_seqlens, spread, first, scaling):  # type: ignore[no-untyped-def]
    B, heads, T, D = q.shape
    return q.new_empty(B, T, heads, D), q.new_empty(B * T, heads)


@torch.library.custom_op("lownibble::prefix_attention_backward", mutates_args=())
def _prefix_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, spread: Tensor, first: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = (_of_sequences(t, spread) for t in (q, k, v))
    dout = dout.new_zeros(1, len(spread), *dout.shape[2:]).index_copy_(1, first, dout)
    out, lse = out.index_select(1, spread), lse.index_select(0, spread)
    dq, dk, dv = ops.attention_backward(dout, q, k, v, out, lse, cu_seqlens, scaling)
    again = torch.ones(len(spread), dtype=torch.bool).index_fill_(0, first, False).nonzero()[:, 0]
    dq, dk, dv = (t.transpose(1, 2) for t in (dq, dk, dv))
    dq_U, dk_U, dv_U = (t.index_select(1, first) for t in (dq, dk, dv))  # of what is not read, queries have no gradient
    for into, whole in ((dk_U, dk), (dv_U, dv)):
        into.index_add_(1, spread.index_select(0, again), whole.index_select(1, again))
    return dq_U.transpose(1, 2), dk_U.transpose(1, 2), dv_U.transpose(1, 2)


@_prefix_attention_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, spread, first, scaling):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))


def _save_prefixed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *others, ctx.scaling = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *others)
    ctx.backend = ops.chosen()


def _differentiate_prefixed(ctx: Any, dout: Tensor, _: None) -> tuple[Any, ...]:
    with ops.keeping(ctx.backend):
        return (*_prefix_attention_backward(dout, *ctx.saved_tensors, ctx.scaling), None, None, None, None)


_prefix_attention.register_autograd(_differentiate_prefixed, setup_context=_save_prefixed)


def _attend_rows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None, is_causal: bool | None = None, prefixes: tuple[Tensor, Tensor] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query (B, heads, T, D), key and value (B, key heads, T, D) -> (B, T, heads, D)."""
    _refuse(module, attention_mask, is_causal, others)
    if cu_seq_lens_q is None:
        raise refusal(type(module).__name__, "the cu_seqlens of the rows do not arrive at its attention")
    if others.get("dropout") or others.get("sliding_window") is not None or value.shape != key.shape:
        raise refusal(type(module).__name__, "its attention has dropout, a window, or values of another size")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if prefixes is None:
        output, _ = _attention(query, key, value, cu_seq_lens_q, scaling)
    else:
        output, _ = _prefix_attention(query, key, value, cu_seq_lens_q, *prefixes, scaling)
    return output, None


AttentionInterface.register(ROWS, _attend_rows)


def _attend_packed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None, is_causal: bool | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D)."""
    _refuse(module, attention_mask, is_causal, others)
    if cu_seq_lens_q is None or max_length_q is None or len(query) != 1:
        raise refusal(type(module).__name__, "the cu_seqlens of the rows do not arrive at its attention")
    if dropout == 0 and _takes_varlen(query, value):
        return _varlen(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    return _by_runs(module, query, key, value, dropout, scaling, sliding_window, cu_seq_lens_q), None


AttentionInterface.register(PACKED, _attend_packed)


def _arrived(module: Any, spread: Tensor | None, first: Tensor | None) -> tuple[Tensor, Tensor]:
    if spread is None or first is None:
        raise refusal(type(module).__name__, "what its sequences share does not arrive at its attention")
    return spread, first


def _attend_prefixed_rows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    prefix_spread: Tensor | None = None, prefix_first: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query (1, heads, U, D), key and value (1, key heads, U, D) -> (1, U, heads, D)."""
    found = _arrived(module, prefix_spread, prefix_first)
    return _attend_rows(module, query, key, value, attention_mask, prefixes=found, **others)


AttentionInterface.register(PREFIXED[ROWS], _attend_prefixed_rows)


def _attend_prefixed_packed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    prefix_spread: Tensor | None = None, prefix_first: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query (1, heads, U, D), key and value (1, key heads, U, D) -> (1, U, heads, D)."""
    spread, first = _arrived(module, prefix_spread, prefix_first)
    query, key, value = (spread_out(t, 2, spread) for t in (query, key, value))
    output, _ = _attend_packed(module, query, key, value, attention_mask, **others)
    return output.index_select(1, first), None


AttentionInterface.register(PREFIXED[PACKED], _attend_prefixed_packed)


def _attend_causal(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query (B, heads, T, D), key and value (B, key heads, T, D) -> (B, T, heads, D)."""
    _refuse(module, attention_mask, is_causal, others)
    output, _ = AttentionInterface()["sdpa"](module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=True)
    return output, None


AttentionInterface.register(CAUSAL, _attend_causal)


def keep_out_of_graphs() -> None:
    """Exclude attention of packed rows from torch.compile: its calls depend on the row lengths, which change in each batch."""
    AttentionInterface.register(PACKED, torch.compiler.disable(_attend_packed))
    AttentionInterface.register(PREFIXED[PACKED], torch.compiler.disable(_attend_prefixed_packed))


@cache
def _has_varlen_options() -> bool:
    """Whether torch's variable-length function has the options that it got after its first version."""
    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def _takes_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's variable-length kernel (flash attention) supports these tensors."""
    return (
        query.is_cuda
        and _has_varlen_options()
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, cu_seqlens: Tensor, longest: int
) -> Tensor:
    """(1, T, heads, D): one kernel call for all rows. Its window counts the tokens to the left, ours also the token itself."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    left = -1 if window is None else window - 1
    output = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest,
        scale=scaling, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(output, Tensor)  # no further outputs requested
    return output.unsqueeze(0)


def _by_runs(
    module: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None,
    cu_seqlens: Tensor,
) -> Tensor:  # fmt: skip
    """(1, T, heads, D): one SDPA call per run of rows of equal length, viewed as a batch without copying."""
    sdpa = AttentionInterface()["sdpa"]
    runs = [(length, len(list(run))) for length, run in groupby(cu_seqlens.diff().tolist())]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *parts in zip(runs, *(t[0].split(sizes, dim=1) for t in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)  # (count, heads, length, D)
        mask = None
        if window is not None and length > window:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        output, _ = sdpa(module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=True)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)
