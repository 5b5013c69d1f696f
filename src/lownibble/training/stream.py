"""The CUDA stream on which a run works."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch

from lownibble.config import TrainConfig
from lownibble.training.determinism import deterministic

_T = TypeVar("_T")


class Streamed(Protocol):
    """What works on a stream of its own, or None on a CPU."""

    stream: torch.cuda.Stream | None
    device: torch.device
    config: TrainConfig


def on_own_stream(method: Callable[..., _T]) -> Callable[..., _T]:
    """A method that works on the run's stream; what is queued before and after it, on the caller's, waits.

    CUDA graphs are not captured from the default stream, and what autograd keeps of earlier passes must be of the stream that
    captures.
    """

    @wraps(method)
    def call(self: Streamed, *arguments: Any, **options: Any) -> _T:
        if self.stream is None:
            return method(self, *arguments, **options)
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self.stream), deterministic() if self.config.deterministic else nullcontext():
                return method(self, *arguments, **options)
        finally:
            outside.wait_stream(self.stream)

    return call
