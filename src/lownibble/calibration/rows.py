"""Calibration rows: tokenised rows one after the other, cut to equal lengths."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lownibble.errors import DataError

MIN_TOKENS = 256
"""Fewer calibration tokens than this are an error."""


def row_length(model: Any, wanted: int) -> int:
    """Tokens in a calibration row: as wanted, or as many as the model has positions.

    Warns:
        UserWarning: the model has fewer.
    """
    held = positions(model)
    if held is None or wanted <= held:
        return wanted
    warnings.warn(
        f"Calibration rows are of {held} tokens instead of {wanted}: {type(model).__name__} has no more positions.", stacklevel=2
    )
    return held


def positions(model: Any) -> int | None:
    """The longest row that a model was made for, or None if it does not say."""
    held = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return held if isinstance(held, int) and held > 0 else None


def join_rows(rows: Sequence[Sequence[int]], n_tokens: int, length: int, seed: int = 0) -> Tensor:
    """Token ids (rows, tokens) int64 of about `n_tokens` tokens, from rows drawn in random order and joined.

    Without padding every position counts, and the attention needs no mask. There are at least two rows, and never as many as
    tokens in each, so that the batch dimension is known by its size.

    Args:
        rows: token ids of each. n_tokens: at most that many are used. length: of a joined row, at most.
    Raises:
        DataError: there are fewer than `MIN_TOKENS` tokens.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    joined: list[int] = []
    for i in order:
        joined += rows[i]
        if len(joined) >= n_tokens:
            break
    found = min(len(joined), n_tokens)
    if found < MIN_TOKENS:
        raise DataError(
            f"The calibration rows have {len(joined)} tokens, of which {found} may be used; at least {MIN_TOKENS} are needed. "
            "Give more or longer rows (--calibration-tokens: how many may be used)."
        )
    length = min(length, found // 2)
    n_rows = found // length
    if n_rows == length:
        length -= 1
    return torch.tensor(joined[: n_rows * length], dtype=torch.int64).view(n_rows, length)
