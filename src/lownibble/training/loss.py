"""Fused linear cross-entropy: mean loss over label tokens in chunks, with gradients computed in the forward pass.

Full logits are never materialised. Hidden states at label positions are gathered and go through the head one chunk at a time;
each chunk's logits are replaced by their gradient, which is propagated through the head at once. Only the gradients of the
hidden states, (L, H), and of a trained head are kept for backward. The method is Liger's fused linear cross-entropy; the head
may be any module (dense, tied, quantised, adapted), because its backward is autograd's. The usual head, a dense matrix, writes
its logits into one buffer reused across chunks and steps (on a CPU), and its gradient, if trained, is accumulated in place: the
page faults of a fresh allocation of that size take a good part of the matmul's time. With 8-bit frozen-base matmuls, a frozen
head's are 8-bit too (`quant/dense.py`).

The backbone is called without the head (`models/head.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lownibble.data import label_places
from lownibble.errors import ModelError
from lownibble.kernels import ops
from lownibble.kernels.decoded import scratch
from lownibble.lora.activated import activated
from lownibble.memory.usage import is_exhausted
from lownibble.models import attention
from lownibble.models.head import Head, for_comparing, hidden_states
from lownibble.models.info import info, pass_device
from lownibble.models.prefixes import Prefixes, tree
from lownibble.planning.linear import chunk_bytes
from lownibble.quant.dense import DenseProducts

_chunk: ContextVar[tuple[int, bool] | None] = ContextVar("lownibble_chunk", default=None)


@contextmanager
def chunks_of(n_bytes: int, shared: bool = True) -> Iterator[None]:
    """Inside the block, chunks of logits take `n_bytes` on any device, in the buffer that is kept for them as on a CPU, or not
    `shared`, in one of their own as elsewhere: for tracing another device's step, and for tests."""
    token = _chunk.set((n_bytes, shared))
    try:
        yield
    finally:
        _chunk.reset(token)


class _LabelLoss(torch.autograd.Function):
    """Sum of cross-entropies over L label tokens, divided by `n_total`; gradients are computed in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_LH: Tensor, labels_L: Tensor, head: Head, n_total: int | Tensor, n_parameters: int, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        wants_hidden = ctx.needs_input_grad[0]
        wants_any = wants_hidden or n_parameters > 0
        dhidden = torch.empty_like(hidden_LH) if wants_hidden else None
        dparameters = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters]
        total = torch.zeros((), dtype=torch.float32, device=hidden_LH.device)
        plain = head.plain
        if plain is not None and plain.weight.dtype == hidden_LH.dtype:
            for part, logits in _into_one_buffer(hidden_LH.detach(), plain):
                losses, dlogits = _cross_entropy(logits, labels_L[part], n_total, wants_any)
                total += losses.sum()
                if dhidden is not None:
                    plain.backward(dlogits, dhidden[part])
                for dweight_VH in dparameters:
                    ops.outer(dlogits, hidden_LH[part].contiguous(), dweight_VH, adds=True)
        else:
            size = _chunk_tokens(4 * head.vocab_size, hidden_LH.device)
            for start in range(0, len(labels_L), size):
                part = slice(start, start + size)
                total += _through_head(head, hidden_LH, labels_L, part, n_total, parameters, dhidden, dparameters).sum()
        ctx.gradients = (dhidden, dparameters)
        return total / n_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dhidden, dparameters), ctx.gradients = ctx.gradients, None  # freed early: the loss keeps ctx alive until backward ends
        scaled = dhidden.mul_(dloss) if dhidden is not None else None
        return (scaled, None, None, None, None, *(g.mul_(dloss) for g in dparameters))


def _through_head(
    head: Head, hidden_LH: Tensor, labels_L: Tensor, part: slice, n_total: int | Tensor,
    parameters: Sequence[Tensor], dhidden_LH: Tensor | None, dparameters: list[Tensor],
) -> Tensor:  # fmt: skip
    """A chunk's losses by autograd; writes its hidden gradient, adds its parameter gradients, and frees everything else."""
    wants_hidden = dhidden_LH is not None
    wants_any = wants_hidden or len(parameters) > 0
    chunk_LH = hidden_LH[part].detach().requires_grad_(wants_hidden)
    with torch.set_grad_enabled(wants_any):
        logits = head(chunk_LH)
    values = logits.detach().clone() if head.keeps_logits else logits.detach()
    losses, dlogits = _cross_entropy(values, labels_L[part], n_total, wants_any)
    if wants_any:
        grads = list(torch.autograd.grad(logits, [chunk_LH] * wants_hidden + list(parameters), dlogits))
        if dhidden_LH is not None:
            dhidden_LH[part] = grads.pop(0)
        for accumulated, grad in zip(dparameters, grads, strict=True):
            accumulated += grad
    return losses


def _frozen_losses(hidden_LH: Tensor, labels_L: Tensor, head: Head, dhidden_LH: Tensor | None) -> Tensor:
    """Cross-entropy of each label token through a frozen head, (L,) float32; writes the gradient of their sum."""
    losses_L = torch.empty(len(labels_L), dtype=torch.float32, device=hidden_LH.device)
    plain, wants = head.plain, dhidden_LH is not None
    if plain is not None and plain.weight.dtype == hidden_LH.dtype:
        for part, logits in _into_one_buffer(hidden_LH.detach(), plain):
            losses_L[part], dlogits = _cross_entropy(logits, labels_L[part], 1, wants)
            if dhidden_LH is not None:
                plain.backward(dlogits, dhidden_LH[part])
        return losses_L
    size = _chunk_tokens(4 * head.vocab_size, hidden_LH.device)
    for start in range(0, len(labels_L), size):
        part = slice(start, start + size)
        losses_L[part] = _through_head(head, hidden_LH, labels_L, part, 1, (), dhidden_LH, [])
    return losses_L


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each of L label tokens through a frozen head. A token's loss depends on its own hidden state alone, so the
    gradients that forward computes, for weights of 1, are multiplied by the tokens' weights in backward."""

    @staticmethod
    def forward(ctx: Any, hidden_LH: Tensor, labels_L: Tensor, head: Head) -> Tensor:
        ctx.dhidden = torch.empty_like(hidden_LH)
        return _frozen_losses(hidden_LH, labels_L, head, ctx.dhidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses_L: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dhidden, ctx.dhidden = ctx.dhidden, None
        return dhidden.mul_(dlosses_L.to(dhidden.dtype).unsqueeze(1)), None, None


def _into_one_buffer(hidden_LH: Tensor, plain: DenseProducts) -> Iterator[tuple[slice, Tensor]]:
    """Yield (token slice, logits) of equal parts that share one buffer; a part and its backward workspace fit in a chunk."""
    count = -(-len(hidden_LH) // _chunk_tokens(plain.row_bytes, hidden_LH.device))
    size = -(-len(hidden_LH) // max(1, count))
    shape = torch.Size((size, len(plain.weight)))
    shared = hidden_LH.device.type == "cpu" and (_chunk.get() or (0, True))[1]  # elsewhere the allocator caches it
    buffer = scratch(shape, hidden_LH.dtype, hidden_LH.device) if shared else hidden_LH.new_empty(shape)
    for start in range(0, len(hidden_LH), max(1, size)):
        part = slice(start, min(start + size, len(hidden_LH)))
        yield part, plain.forward(hidden_LH[part], buffer[: part.stop - start])


def _cross_entropy(logits_LV: Tensor, labels_L: Tensor, n_total: int | Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropies (L,), and the gradient of their sum divided by n_total, in place of the logits."""
    return ops.cross_entropy(logits_LV, labels_L, 1 / n_total, wants_gradient), logits_LV


def _chunk_tokens(row_bytes: int, device: torch.device) -> int:
    """Tokens per chunk: enough for an efficient matmul, few enough not to raise peak memory."""
    on_cuda = device.type == "cuda"
    given = _chunk.get()
    n_bytes = given[0] if given else chunk_bytes(torch.cuda.get_device_properties(device).total_memory if on_cuda else None)
    return max(16, n_bytes // row_bytes)


def label_loss(
    model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor, labels_BT: Tensor, n_total: int | None = None,
    segments: Sequence[int] | None = None, source: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Mean cross-entropy of the next token over label positions.

    Args:
        input_ids_BT, attention_mask_BT: int64.
        labels_BT: int64, unshifted, -100 where there is no loss.
        n_total: label tokens of all accumulated microbatches; default: of this one.
        segments: lengths of packed rows, whose first tokens have the label -100; see `hidden_states`.
        source: encoder input; see `hidden_states`.
    Returns:
        () float32, ready for backward.
    """
    places_L, labels_L = label_places(labels_BT)
    mask_BT = None if source is None and bool(attention_mask_BT.all()) else attention_mask_BT
    return loss_at(model, input_ids_BT, mask_BT, places_L, labels_L, n_total, segments, source)


def loss_at(
    model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, places_L: Tensor, labels_L: Tensor,
    n_total: int | Tensor | None = None, segments: Sequence[int] | None = None, source: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`label_loss` with the output of `label_places`, and no mask for rows without padding: no shape depends on values, so it can
    be traced, and the host waits for no value."""
    head, balance, routers = Head(model), info(model).balance, list[Tensor]()
    hidden_BTH = hidden_states(
        model, input_ids_BT, attention_mask_BT, segments, source, routers if balance is not None else None
    )  # fmt: skip
    hidden_LH = hidden_BTH.flatten(0, 1).index_select(0, places_L)
    del hidden_BTH
    trained = head.trained if torch.is_grad_enabled() else []
    n_total = len(labels_L) if n_total is None else n_total
    loss: Tensor = _LabelLoss.apply(hidden_LH, labels_L, head, n_total, len(trained), *trained)
    if balance is not None:
        loss = loss + balance(tuple(routers), attention_mask_BT) * (len(labels_L) / n_total)
    return loss


def token_logps(
    model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, places_L: Tensor, labels_L: Tensor,
    prefixes: Prefixes | None = None,
) -> Tensor:  # fmt: skip
    """Log-probability of each of L label tokens, (L,) float32, for losses that are no sum over tokens; differentiable once.

    Arguments are those of `loss_at`; places may repeat. `prefixes`: see `hidden_states`. A frozen head is read once, as for
    `label_loss`; a trained one again in backward, since the gradient of its weights needs the tokens' weights.
    """
    head = Head(model)
    hidden_BTH = hidden_states(model, input_ids_BT, attention_mask_BT, prefixes=prefixes)
    hidden_LH = attention.spread_out(hidden_BTH.flatten(0, 1), 0, places_L)
    del hidden_BTH
    if not (torch.is_grad_enabled() and head.trained):
        if not hidden_LH.requires_grad:
            return -_frozen_losses(hidden_LH, labels_L, head, None)
        losses_L: Tensor = _TokenLosses.apply(hidden_LH, labels_L, head)
        return -losses_L
    size = _chunk_tokens(4 * head.vocab_size, hidden_LH.device)
    pieces = zip(hidden_LH.split(size), labels_L.split(size), strict=True)
    return -torch.cat([checkpoint(_losses_of, head, h, labels, use_reentrant=False) for h, labels in pieces])


def _losses_of(head: Head, hidden_LH: Tensor, labels_L: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden_LH).float(), labels_L, reduction="none")


@torch.no_grad()
def token_losses(head: Head, hidden_LH: Tensor, labels_L: Tensor) -> Tensor:
    """Cross-entropy of each of L label tokens, (L,) float32, one chunk of logits at a time."""
    size = _chunk_tokens(4 * head.vocab_size, hidden_LH.device)
    pieces = zip(hidden_LH.split(size), labels_L.split(size), strict=True)
    return torch.cat([_losses_of(head, h, labels) for h, labels in pieces])


PACKING_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Maximum relative difference between a row's hidden states packed and alone. On the embedded model rounding gives 2e-6 in
float32 and 0.01 in bfloat16; attending to neighbouring rows gives 0.6."""


def check_packing(model: Any, rows: Sequence[Sequence[int]]) -> None:
    """Compare the hidden states of packed rows (token ids) with those of each row alone under the model's own attention.

    Put the longest row of the data first: it reveals windowed or chunked attention if that matters, and gives later rows the
    most tokens to attend to by mistake.

    Raises:
        ModelError: they differ (recurrent state or convolution across `cu_seqlens` boundaries), or attention cannot be swapped.
    """
    device = pass_device(model)
    ids = [torch.tensor([row], device=device) for row in rows]
    with for_comparing(model):
        alone = [hidden_states(model, row, None)[0] for row in ids]
        try:
            with attention.segment_attention(model):
                whole = torch.cat(ids, 1)
                packed = hidden_states(model, whole, None, [len(row) for row in rows])[0]
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, ModelError) else attention.refusal(type(model).__name__, str(error)) from None
    pairs = zip(packed.float().split([len(row) for row in rows]), alone, strict=True)
    if max(float((a - b).norm() / b.float().norm()) for a, b in pairs) > PACKING_TOLERANCE[packed.dtype]:
        raise attention.refusal(type(model).__name__, "its rows are not the same packed as alone")


def check_prefixes(model: Any, one: Sequence[int], other: Sequence[int]) -> str:
    """Why tokens that sequences begin with alike cannot be computed once, or "". Compares hidden states so with those of each
    sequence alone under the model's own attention: of two given ones (token ids), first the longest of the data (see
    `check_packing`), and of one that begins as that. Out of memory says nothing about the model, and is raised."""
    if activated(model) is not None:
        return "its adapter is activated by each sequence's own tokens"
    sequences = [one, other, [*one[: len(one) // 2], *other][: len(one)]]
    device = pass_device(model)
    prefixes = tree(sequences).to(device)
    with for_comparing(model):
        alone = [hidden_states(model, torch.tensor([ids], device=device), None)[0] for ids in sequences]
        try:
            with attention.prefix_attention(model):
                nodes = hidden_states(model, prefixes.input_ids, None, prefixes=prefixes)[0]
                _as_in_training(model, prefixes.input_ids, None, prefixes)
        except Exception as error:  # of ours, which says why, or the model's own code, which has just run with its own attention
            if is_exhausted(error):
                raise
            return str(error).partition("\n")[0].partition(". Use packing=False")[0] or type(error).__name__
    pairs = zip(nodes.index_select(0, prefixes.spread).float().split(prefixes.lengths), alone, strict=True)
    if max(float((a - b).norm() / b.float().norm()) for a, b in pairs) > PACKING_TOLERANCE[nodes.dtype]:
        return "its hidden states are not the same so"
    return ""


def _as_in_training(
    model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor | None, prefixes: Prefixes | None = None
) -> None:  # fmt: skip
    """A pass with dropout, which some models ask of attention under names of their own."""
    devices = [input_ids_BT.device] if input_ids_BT.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.train()
        hidden_states(model, input_ids_BT, attention_mask_BT, prefixes=prefixes)
        model.eval()


def check_rows(model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> str:
    """Why a padded batch cannot run on Lownibble's attention kernel, or "". Compares its hidden states with those of the model's
    own attention."""
    obstacle = attention.kernel_obstacle(model)
    if obstacle:
        return obstacle
    with for_comparing(model):
        expected = hidden_states(model, input_ids_BT, attention_mask_BT)
        try:
            with attention.segment_attention(model):
                found = hidden_states(model, input_ids_BT, attention_mask_BT)
                _as_in_training(model, input_ids_BT, attention_mask_BT)
        except ModelError as error:
            return str(error)
        except Exception as error:  # the model's own code, which has just run with its own attention
            return f"it fails with this kernel ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    kept = attention_mask_BT.bool()
    difference = float((found - expected)[kept].norm() / expected[kept].norm())
    return "" if difference <= PACKING_TOLERANCE[torch.float32] else "its attention computes something else"


def check_unmasked(
    model: Any, input_ids_BT: Tensor, attention_mask_BT: Tensor, swap: Callable[[Any], AbstractContextManager[None]] = nullcontext
) -> bool:
    """Whether right-padded rows get the same hidden states without an attention mask, inside `swap(model)`.

    Causal attention never attends to later tokens, so right padding needs no mask. With one, transformers repeats keys and values
    for every query head and does not use flash attention: 1.9 GB more for 4 rows of 1024 tokens of 8B shapes (DESIGN section 6).
    """
    known = info(model)
    with for_comparing(model):
        known.needs_mask = True
        expected = hidden_states(model, input_ids_BT, attention_mask_BT)
        known.needs_mask = False
        try:
            with swap(model):
                found = hidden_states(model, input_ids_BT, attention_mask_BT)
        except Exception:  # the model's own code cannot do without
            return False
        finally:
            known.needs_mask = True
    kept = attention_mask_BT.bool()
    difference = float((found - expected)[kept].float().norm() / expected[kept].float().norm())
    return difference <= PACKING_TOLERANCE[found.dtype]
