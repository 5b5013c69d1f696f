"""Attention over packed rows: rows one after the other in a single sequence, each attending to itself only.

transformers lets a function be registered as an attention implementation and hands the keyword arguments of a model's forward
down to it; a model that is set to `lownibble_packed` gets no mask (there is no mask function of that name, so none is built) and
its layers call `_attend` with the borders of the rows, under the names that transformers' flash attention uses. Nothing else
of the model changes. On CUDA, where torch can (half precision, capability 8.0, same head sizes), this is one variable-length
kernel; everywhere else one SDPA call for each run of rows of the same length, which is why a batch holds its rows sorted.

The implementation is set for a training step and taken back after it, so that evaluation, generation and the caller see the
attention the model came with. There is no fallback inside: a layer that gets no borders, or asks for something that is not done
here, is an error. Whether a model obeys (recurrent states and convolutions do not stop at borders) is checked before training by
comparing a packed pass with separate ones.

Rejected: a block-diagonal mask (T x T, and no fast kernel takes it); replacing the modules of attention (patched classes);
leaving the implementation on and falling back to SDPA where no borders arrive (a lost argument would mix rows in silence).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from lownibble.errors import ModelError

NAME = "lownibble_packed"

_REFUSED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that neither SDPA nor the variable-length kernel takes: capped scores, sinks, biases."""


def packed_inputs(segments: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a model's forward takes besides the token ids of rows of these lengths, (1, sum of lengths)."""
    borders = torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(length) for length in segments]).unsqueeze(0).to(device)
    return {
        "position_ids": positions,
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(segments)),
    }


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Inside the block the model's forward and backward take packed rows, and nothing else.

    Raises:
        ModelError: the model's attention cannot be swapped.
    """
    parameters = inspect.signature(model.base_model.forward).parameters
    if "position_ids" not in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise refusal(type(model).__name__, "its forward takes no position_ids or hands no arguments on to attention")
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        if not is_packed(model):
            raise refusal(type(model).__name__, "its attention cannot be swapped")
        yield
    finally:
        model.set_attn_implementation(before)


def is_packed(model: Any) -> bool:
    """Whether the model takes packed rows now."""
    return bool(model.config._attn_implementation == NAME)


def refusal(who: str, why: str) -> ModelError:
    """The error for a model that cannot take packed rows."""
    return ModelError(
        f"{who} cannot be trained with packing: {why}. Use packing=False (--no-packing), with group_by_length=True "
        "(--group-by-length) for little padding."
    )


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None, is_causal: bool | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D)."""
    asked = [name for name in _REFUSED if others.get(name) is not None]
    if asked:
        raise refusal(type(module).__name__, f"it asks for {', '.join(asked)}, which is not done for packed rows")
    if attention_mask is not None or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise refusal(type(module).__name__, "its attention is not plainly causal")
    if cu_seq_lens_q is None or max_length_q is None or len(query) != 1:
        raise refusal(type(module).__name__, "the borders of the rows do not arrive at its attention")
    if dropout == 0 and _takes_varlen(query, value):
        return _varlen(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    return _by_runs(module, query, key, value, dropout, scaling, sliding_window, cu_seq_lens_q), None


AttentionInterface.register(NAME, _attend)


def keep_out_of_graphs() -> None:
    """Tell torch.compile to leave packed attention alone: its calls follow the lengths of the rows, new in each batch."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attend))


def _takes_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's variable-length kernel (flash attention) takes these."""
    return (
        query.is_cuda
        and {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)  # later than the function itself
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, borders: Tensor, longest: int
) -> Tensor:
    """(1, T, heads, D): one kernel for all rows. Its window counts the tokens to the left, ours counts the token itself too."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    left = -1 if window is None else window - 1
    output = varlen_attn(
        q, k, v, borders, borders, longest, longest,
        scale=scaling, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(output, Tensor)  # without further outputs
    return output.unsqueeze(0)


def _by_runs(
    module: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None,
    borders: Tensor,
) -> Tensor:  # fmt: skip
    """(1, T, heads, D): one SDPA call for each run of rows of one length; such a run is a batch without copying."""
    sdpa = AttentionInterface()["sdpa"]
    runs = [(length, len(list(run))) for length, run in groupby(borders.diff().tolist())]
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
