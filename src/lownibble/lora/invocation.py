"""Where an activated adapter's invocation is: in a sequence of token ids, and in a pass of a model over several sequences.

The last occurrence in a sequence counts. In packed rows each sequence has its own: another one begins where positions do not
count on. It is found by operations of fixed shapes without waiting for a device, so that passes can be captured.

Of a sequence that goes on from a cache of transformers', the cache keeps the tokens that it is of (an attribute of the object, so
its copies have them): an invocation may be cut by two passes, and the last of several may be in a later one. A pass of a single
token is taken for generation, in which the prompt decides: it invokes nothing. (A loop that passes whole sequences, without a
cache, or several drafted tokens at once, cannot be told from prompts.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lownibble.errors import ModelError
from lownibble.models.caches import cache_in, n_cached

_ATTRIBUTE = "_lownibble_tokens"


class _Held(NamedTuple):
    """The tokens (B, n) that a cache holds, and how many of the first ones an invocation may be among."""

    ids: Tensor
    prompt: int


def find_active(ids_BT: Tensor, positions: Tensor | None, tokens: Sequence[int], mask: Any = None) -> Tensor:
    """(B, T) bool: the tokens from the last occurrence of `tokens` in their sequence on.

    positions: (B or 1, T), or axes of them, the first that of text of four; where they do not count on, another sequence begins.
    Others: a row is one sequence. mask: (B, T), zero at padding, which is part of no occurrence; others have no effect.
    """
    B, T = ids_BT.shape
    n, device = len(tokens), ids_BT.device
    if n > T:
        return torch.zeros(B, T, dtype=torch.bool, device=device)
    wanted = [ids_BT[:, i : T - n + 1 + i] == token for i, token in enumerate(tokens)]
    if isinstance(mask, Tensor) and mask.shape == ids_BT.shape:
        wanted += [mask[:, i : T - n + 1 + i].bool() for i in range(n)]
    here = nn.functional.pad(torch.stack(wanted).all(0), (0, n - 1)).long()
    begins = torch.zeros_like(here)
    if positions is not None and (positions.ndim == 2 or len(positions) == 4):
        places = positions[0] if positions.ndim == 3 else positions
        begins[:, 1:] = (places[:, 1:] != places[:, :-1] + 1).long().expand(B, -1)
    sequence = begins.cumsum(1)
    if n > 1:  # an occurrence lies in one sequence
        here[:, : T - n + 1] *= sequence[:, : T - n + 1] == sequence[:, n - 1 :]
    of_sequence = torch.zeros_like(here).scatter_add_(1, sequence, here)
    up_to_its_end = of_sequence.cumsum(1).gather(1, sequence)
    return (here.cumsum(1) == up_to_its_end) & (of_sequence.gather(1, sequence) > 0)


def begin_of(ids: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Where the last occurrence of `tokens` in a sequence begins; None: there is none."""
    wanted, n = list(tokens), len(tokens)
    found = (at for at in range(len(ids) - n, -1, -1) if ids[at] == wanted[0] and list(ids[at : at + n]) == wanted)
    return next(found, None)


def n_held(given: Mapping[str, Any]) -> int:
    """How many tokens the cache among a pass's arguments holds before the pass; 1: some, and which is not known."""
    cache = cache_in(given)
    n = 0 if cache is None else n_cached(cache)
    if n is not None:
        return n
    held = getattr(cache, _ATTRIBUTE, None)
    return 1 if held is None else held.ids.shape[1]


def in_pass(ids_BT: Tensor, given: Mapping[str, Any], n: int, tokens: Sequence[int]) -> Tensor:
    """(B, T) bool: where an adapter with this invocation is active in a pass over these tokens.

    given: the arguments of the pass. n: tokens that its cache holds.
    Raises:
        ModelError: which tokens those are is not known, or they are of another number of rows.
    """
    if not n:
        return find_active(ids_BT, given.get("position_ids"), tokens, given.get("attention_mask"))
    held = getattr(cache_in(given), _ATTRIBUTE, None)
    if held is None or held.ids.shape[1] < n or len(held.ids) != len(ids_BT):
        raise ModelError(
            "An activated adapter (alora_invocation_tokens) goes by the tokens that a cache holds, and those of this one are not "
            "known for these rows. Begin with an empty cache."
        )
    before, mask = held.ids[:, :n].to(ids_BT.device), given.get("attention_mask")
    if ids_BT.shape[1] > 1:
        return find_active(torch.cat([before, ids_BT], 1), None, tokens, mask)[:, n:]
    prompt = before[:, : held.prompt]
    mask = mask[:, : prompt.shape[1]] if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return find_active(prompt, None, tokens, mask)[:, -1:]


def remember(ids_BT: Any, given: Mapping[str, Any], output: Any, n: int) -> None:
    """Keep the tokens of a pass with the cache that it filled, which held n before; the model may have made it."""
    cache = cache_in(given)
    if cache is None and isinstance(output, Mapping):
        cache = cache_in(output)
    if cache is None:
        return
    held = getattr(cache, _ATTRIBUTE, None)
    if not isinstance(ids_BT, Tensor) or (n and (held is None or held.ids.shape[1] < n or len(held.ids) != len(ids_BT))):
        setattr(cache, _ATTRIBUTE, None)
        return
    whole = torch.cat([held.ids[:, :n].to(ids_BT.device), ids_BT], 1) if n and held is not None else ids_BT
    prompt = min(held.prompt, n) if n and held is not None and ids_BT.shape[1] == 1 else whole.shape[1]
    setattr(cache, _ATTRIBUTE, _Held(whole, prompt))
