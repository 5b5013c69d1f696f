"""Checkpoints whose weights are stored quantised: which tensors are a layer, and how to get its weight.

Every format is a function that finds the layers of a checkpoint, each a `Layer`: the names of its tensors, the codec that holds
its numbers unchanged (if there is one), and how they are read. Where a codec holds them, the layer is loaded as it is: the same
codes, the same scales, and therefore the same model as with the tool that made it. Else the weight is decoded, and the caller
packs it again if it was asked to. In both cases the values are computed in float32 from the stored numbers; other tools compute
them in float16 or bfloat16.

    own.py        bitsandbytes' 4-bit layers and those of this package, whose codecs read their own files
    gptq.py       GPTQ, AWQ, AutoRound
    integers.py   compressed-tensors' integers, bitsandbytes' 8 bits, HQQ
    floats.py     FP8 (blocks, rows, tensors), MXFP4, NVFP4

Rejected: loading through the tools' own libraries. Each needs a GPU, pulls in many packages, or supports one version of
transformers; and none gives back the numbers that training needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lownibble import stored
from lownibble.errors import ModelError
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.formats import floats, gptq, integers, own
from lownibble.models.formats.layer import Experts, Finder, Found, Layer, stacked

__all__ = ["Experts", "Found", "Layer", "find", "stacked"]

FINDERS: dict[str, Finder] = {
    "gptq": gptq.gptq, "awq": gptq.awq, "auto-round": gptq.auto_round, "hqq": integers.hqq,
    "bitsandbytes 8-bit": integers.bitsandbytes, "compressed-tensors": integers.compressed,
    **dict.fromkeys(("fp8", "fbgemm_fp8", "mxfp8"), floats.fp8), "mxfp4": floats.mxfp4,
    "bitsandbytes": own.find, own.METHOD: own.find,
}  # fmt: skip
"""Method as in `stored.METHODS` -> what finds the layers."""


def find(checkpoint: Checkpoint, how: Mapping[str, Any]) -> Found:
    """The quantised layers of a checkpoint; `how` is its `quantization_config`.

    Raises:
        ModelError: the format, or this variant of it, is not known, or a part of a layer is missing.
    """
    stored.check(how, checkpoint.name)
    found = FINDERS[stored.method(how)](checkpoint, how) if how else own.find(checkpoint, how)
    found.title = stored.title(how)
    if found.title and not found.layers:
        raise ModelError(
            f"'{checkpoint.name}': config.json says that it is stored as {found.title}, but it has no tensor of such a layer. "
            "The weights and config.json do not belong together, or the download is not complete."
        )
    return found
