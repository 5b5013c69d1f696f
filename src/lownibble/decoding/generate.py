"""`decode`: a generation loop for `model.generate(..., custom_generate=lownibble.decode)`, on whichever decoder takes the model
(`choice.py`).

**Kept.** A cache whose steps are captured in CUDA graphs stays with the model for its next call, which then captures nothing: as
long as it is large enough, and the model is what it was. Graphs hold addresses of weights, and all that Python decided; so any
tensor or module of the model that is changed, moved or replaced, another active adapter, number, flag or text that a module has,
hook, replaced `forward` or setting of the configuration ends it. Not noticed: attributes of modules of any other type, what hooks
read elsewhere, and methods that are replaced in a class; `drop_cache` is for those. A call with a long context leaves its large
cache to shorter ones, until `drop_cache`. Contexts are rounded up, by less than a quarter, so that a chat that grows does not
capture anew each turn. Training drops it, too (`models/kept.py`). Caches without graphs are made anew: that costs nothing.

A model's calls from several threads take turns: inside one its attention is another, and so may be its adapter.

Options, logits processors and stopping criteria stay transformers'. Only a streamer must be passed as `token_streamer`, and the
tokenizer as `chat_tokenizer`: `generate` does not forward `streamer` and `tokenizer` to a custom loop.
"""

from __future__ import annotations

from contextlib import suppress
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from lownibble.data import end_tokens
from lownibble.decoding.caches import SlotCache
from lownibble.decoding.choice import choose
from lownibble.decoding.decoder import Cache, Decoder, RefusedError
from lownibble.decoding.form import activated_adapter
from lownibble.kernels import ops
from lownibble.kernels.decoder import Segment
from lownibble.lora.activated import activated
from lownibble.lora.active import active_adapter, adapter_off
from lownibble.lora.invocation import begin_of
from lownibble.models.caches import cache_in, n_cached
from lownibble.models.kept import KEPT


class _Kept(NamedTuple):
    """The cache of a model's last call, and what its graphs depend on."""

    state: object
    cache: SlotCache


_TURNS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Model -> the lock of its calls."""

_SETTINGS = (int, float, str, type(None))
"""Types of the attributes of modules that are compared by their values."""


def drop_cache(model: Any) -> None:
    """Free the memory on a CUDA device that `decode` keeps with a model for its next call: its cache and graphs, if there are."""
    KEPT.pop(model, None)


def _is_input(name: str, value: object) -> bool:
    """Whether an argument of the model's forward is more than text (images, embeddings, an encoder's output)."""
    if name in ("token_type_ids", "mm_token_type_ids") and isinstance(value, Tensor):  # zeros are text
        return bool(value.any())
    return name not in ("attention_mask", "position_ids", "cache_position") and (
        isinstance(value, Tensor) or (isinstance(value, dict) and bool(value))
    )


def _counts(positions: object, mask: Tensor) -> bool:
    """Whether positions ((B, T), or one such for each of several axes) count the tokens of each row."""
    if not isinstance(positions, Tensor) or positions.dim() < 2:
        return positions is None
    fits = positions.shape[-1] == mask.shape[1] and positions.shape[-2] in (1, len(mask))  # one row is for all
    return fits and bool(((positions == mask.cumsum(dim=-1) - 1) | (mask == 0)).all())


def _state(model: Any) -> object:
    """What graphs of a model's steps depend on: its tensors, its modules, their hooks and settings, and the kernels."""
    tensors = [
        (t.data_ptr(), t.shape, t.dtype, 0 if t.is_inference() else t._version) for t in (*model.parameters(), *model.buffers())
    ]
    modules = [
        (ref(m), [*m._forward_pre_hooks, *m._forward_hooks], id(vars(m).get("forward")),
         {name: value for name, value in vars(m).items() if isinstance(value, _SETTINGS)})
        for m in model.modules()
    ]  # fmt: skip
    return tensors, modules, model.config.to_dict(), ops.current(model.device).name


def _cache(decoder: Decoder, kept: _Kept | None, state: object, slots: int, capacity: int) -> Cache:
    """The cache that was kept, if it does for `slots` sequences of `capacity` tokens; else a new one."""
    if kept is not None and kept.state == state and kept.cache.slots >= slots and kept.cache.capacity >= capacity:
        return kept.cache
    if decoder.draws:  # may be kept
        with suppress(RefusedError):  # beyond what the rotary angles allow
            eighth = max(1, (1 << (capacity - 1).bit_length()) // 8)
            return decoder.cache(slots, -(-capacity // eighth) * eighth)
    return decoder.cache(slots, capacity)


@torch.inference_mode()
def decode(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
    token_streamer: Any = None, chat_tokenizer: Any = None, **model_kwargs: Any,
) -> Any:  # fmt: skip
    """Greedy search or sampling, for `custom_generate`; arguments and results are those of transformers' own loop.

    input_ids: (B, T), left-padded where `attention_mask` is 0. token_streamer: receives the prompt and each token, like
    transformers' `streamer`. chat_tokenizer: a row also ends with what ends a turn in this tokenizer's chat template.

    Raises:
        ModelError: the model or an option is not supported.
    """
    refused = [name for name in ("output_attentions", "output_hidden_states") if getattr(generation_config, name, False)]
    refused += ["num_beams"] if (generation_config.num_beams or 1) > 1 else []
    refused += [name for name, value in model_kwargs.items() if _is_input(name, value)]
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape:
        refused.append("attention_mask of another shape than the tokens")
    elif not mask.any(dim=-1).all():
        refused.append("rows without tokens")
    elif not _counts(model_kwargs.get("position_ids"), mask):
        refused.append("position_ids that do not count the tokens")
    if refused:
        raise RefusedError(model, f"it does not do {', '.join(refused)}")
    past = cache_in(model_kwargs)
    if past is not None and n_cached(past) != 0:
        raise RefusedError(model, "it cannot go on from a cache of transformers'")
    with _TURNS.setdefault(model, RLock()):
        name = active_adapter(model) if activated(model) is not None else None
        with adapter_off(model, off=name is not None):  # an activated adapter's branches are given for the tokens that have them
            return _decode(
                model, name, input_ids, logits_processor, stopping_criteria, generation_config, token_streamer, chat_tokenizer,
                mask,
            )  # fmt: skip


def _decode(
    model: Any, activated_name: str | None, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
    generation_config: Any, token_streamer: Any, chat_tokenizer: Any, mask: Tensor,
) -> Any:  # fmt: skip
    if token_streamer is not None:
        token_streamer.put(input_ids)
    kept = KEPT.pop(model, None)  # nobody else has it until the end
    decoder = choose(model)
    B = len(input_ids)
    lengths = mask.sum(dim=1).cpu()
    state = _state(model) if decoder.draws else None
    cache = _cache(decoder, kept, state, B, generation_config.max_length)
    del kept
    # in float32 like transformers': sums of 16-bit probabilities would cut the wrong tokens
    as_theirs: dict[str, Any] = {"dtype": torch.float32, "device": input_ids.device}
    adapter = None if activated_name is None else activated_adapter(model, decoder.paths, activated_name)
    prompts, invoked = [], torch.zeros(B, dtype=torch.bool)
    for row in range(B):
        ids = input_ids[row][mask[row] != 0].cpu()
        begin = begin_of(ids.tolist(), adapter.invocation) if adapter is not None else None
        invoked[row] = begin is not None
        prompts.append(decoder.prompt(ids, row, cache, adapter=adapter, active_from=len(ids) if begin is None else begin))
    logits = torch.cat(prompts).to(**as_theirs)

    pad, sample = generation_config._pad_token_tensor, generation_config.do_sample
    with_scores, with_logits = generation_config.output_scores, generation_config.output_logits
    scores: tuple[Tensor, ...] = ()
    raw: tuple[Tensor, ...] = ()
    ended_by, device = end_tokens(model, chat_tokenizer) if chat_tokenizer is not None else (), input_ids.device
    ends = torch.tensor(sorted(ended_by), dtype=torch.int64, device=device)
    if pad is None and ended_by:  # transformers fills up only where the generation config has an end
        pad = torch.tensor(next(iter({chat_tokenizer.pad_token_id} - {None}), min(ended_by)), device=device)
    unfinished, slots = torch.ones(B, dtype=torch.bool, device=device), torch.arange(B)
    skips = pad is not None and not (with_scores or with_logits)  # ended rows are padded: nobody asks for their logits
    while True:
        processed = logits_processor(input_ids, logits)
        scores += (processed,) if with_scores else ()
        raw += (logits,) if with_logits else ()
        chosen = torch.multinomial(processed.softmax(dim=-1), 1)[:, 0] if sample else processed.argmax(dim=-1)
        if pad is not None:
            chosen = torch.where(unfinished, chosen, pad)
        input_ids = torch.cat([input_ids, chosen.unsqueeze(1)], dim=1)
        if token_streamer is not None:
            token_streamer.put(chosen)
        unfinished &= ~(stopping_criteria(input_ids, scores) | torch.isin(chosen, ends))
        if not unfinished.any():
            break
        goes_on = unfinished.nonzero()[:, 0] if skips else slots
        rows = goes_on.cpu()
        segments = None if adapter is None else [Segment(i, i + 1, adapter) for i in invoked[rows].nonzero()[:, 0].tolist()]
        step = decoder.step(chosen.cpu()[rows], rows, lengths[rows], cache, segments=segments).to(**as_theirs)
        logits = step if len(rows) == B else logits.index_copy(0, goes_on, step)
        lengths = lengths + 1
    if isinstance(cache, SlotCache) and cache.steps is not None and not cache.steps.obstacle:
        KEPT[model] = _Kept(state if adapter is None else _state(model), cache)  # the first adapter has brought hooks
    if token_streamer is not None:
        token_streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids, scores=scores if with_scores else None, logits=raw if with_logits else None  # type: ignore[arg-type]
    )  # fmt: skip
