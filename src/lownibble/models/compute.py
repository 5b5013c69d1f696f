"""Frozen-base matmul precision of a loaded model, decided here for all its packed layers.

The requested `QuantConfig.compute` is kept in `info(model)`. An explicit precision applies from loading on. 'auto' is exact until
a training run resolves it: the best choice is known for training only (`quant/eightbit.py`).
"""

from __future__ import annotations

from typing import Any

from lownibble.models.info import info, pass_device
from lownibble.quant import QuantLinear, eightbit


def decide(model: Any, *, training: bool = False) -> None:
    """Set the matmul precision of all packed layers to the one requested at loading; no effect if none was.

    Args:
        training: resolve 'auto' for a training run; the choice and its reason are then in `info(model).compute`.
    Raises:
        BackendError: the device or the kernels in use do not support this precision.
        InputError: a layer's codec or shape does not support it (named).
    """
    known = info(model)
    if known.asked_compute is None:
        return
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    compute = known.asked_compute
    if compute == "auto" and training:
        compute, reason = _automatic(model, layers)
        known.compute = f"{compute} ({reason})"
    elif layers:
        compute = eightbit.choose(compute, pass_device(model))
    for path, layer in layers.items():
        if compute in eightbit.CODE_TYPES:
            eightbit.check_weight(layer.weight, path, compute)
        layer.compute = compute


def _automatic(model: Any, layers: dict[str, QuantLinear]) -> tuple[str, str]:
    if model.config.is_encoder_decoder:
        return "exact", "8-bit products have not been proven for models with an encoder"
    if info(model).merge_aware is not None:
        return "exact", "merge-aware layers have exact products"
    return eightbit.automatic((layer.weight for layer in layers.values()), model.dtype, pass_device(model))
