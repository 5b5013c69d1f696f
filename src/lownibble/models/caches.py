"""The cache of a model of transformers, among the arguments and the outputs of its passes, whatever it is called there."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

_NAMES = ("cache", "past_key_values", "cache_params")
"""The first since transformers 5.24; before, and in models of others, it depends on the kind of model."""


def cache_argument(model: Any) -> str:
    """What the model's passes call the cache that they go on from; '': they take none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in parameters), "")


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache among the named arguments of a pass, or in its output; None: there is none."""
    return next((value for name, value in values.items() if name in _NAMES and value is not None), None)


def n_cached(cache: Any) -> int | None:
    """How many tokens a cache holds; None: some, and it does not count them, as recurrent states do not."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None if getattr(cache, "has_previous_state", lambda: True)() else 0
