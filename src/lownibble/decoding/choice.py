"""Which decoder a model gets: the first that takes it."""

from __future__ import annotations

from typing import Any

from lownibble.decoding.cpu import CpuDecoder
from lownibble.decoding.decoder import Decoder, RefusedError
from lownibble.decoding.modules import ModulesDecoder


def choose(model: Any) -> Decoder:
    """The fastest decoder that takes the model; its `note` says which and why.

    Raises:
        ModelError: none does, or the model is in training mode.
    """
    try:
        return CpuDecoder(model)
    except RefusedError as error:
        return ModulesDecoder(model, error.why)
