"""The precision of the frozen products of a loaded model, decided here for all its packed layers.

What `QuantConfig.compute` asks for is kept in `info(model)`. An explicit precision holds from loading on. 'auto' is exact, until
somebody trains: which is best is known for training only (`quant/eightbit.py`).
"""

from __future__ import annotations

from typing import Any

from lownibble.models.info import info
from lownibble.quant import QuantLinear, eightbit


def decide(model: Any, *, training: bool = False) -> None:
    """Give all packed layers the precision that was asked for when the model was loaded; nothing, if it was not loaded here.

    Args:
        training: 'auto' is for a training run; what was chosen and why is in `info(model).compute` then.
    Raises:
        BackendError: the device or the kernels in use have no such products.
        InputError: a layer's codec or shape does not suit them (named).
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
        compute = eightbit.choose(compute, model.device)
    for path, layer in layers.items():
        if compute in eightbit.CODE_TYPES:
            eightbit.check_weight(layer.weight, path, compute)
        layer.compute = compute


def _automatic(model: Any, layers: dict[str, QuantLinear]) -> tuple[str, str]:
    if model.config.is_encoder_decoder:
        return "exact", "8-bit products have not been proven for models with an encoder"
    return eightbit.automatic((layer.weight for layer in layers.values()), model.dtype, model.device)
