"""Dense weights of a packed model, for adapters whose start looks at what packing lost (`lora/init.py`).

They come from the checkpoint that was packed while it was loaded, or from the one that a packed checkpoint of `lownibble
quantize` names in its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lownibble import stored
from lownibble.errors import ModelError
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.conversion import ModelTensors
from lownibble.models.skeleton import skeleton
from lownibble.models.sources import ModelSource, resolve
from lownibble.quant import is_transposed


def transposed_layers(model: nn.Module) -> set[str]:
    """Paths of linear layers that keep their weight as (in, out)."""
    return {path for path, module in model.named_modules() if is_transposed(module)}


def read_dense(tensors: ModelTensors, turned: set[str], path: str) -> Tensor:
    """The weight (out, in) in float32 of the layer at `path`; `turned`: see `transposed_layers`."""
    weight = tensors.read(f"{path}.weight").float()
    return weight.t() if path in turned else weight


def has_dense(source: ModelSource) -> bool:
    """Whether a model's dense weights can be read: its own, or those of the model that its packed checkpoint was made from."""
    if not stored.of_folder(source.folder):
        return True
    origin = stored.read_json(source.folder / "config.json").get(stored.ORIGIN)
    if not origin:
        return False
    try:
        DenseOrigin(origin, source.name).open()
    except ModelError:
        return False
    return True


class DenseOrigin:
    """Reads dense weights of a packed checkpoint from the model that it was made from, which is opened on first use."""

    def __init__(self, origin: Mapping[str, Any], name: str) -> None:
        self._origin, self._name = origin, name
        self._tensors: ModelTensors | None = None

    def __call__(self, path: str) -> Tensor:
        """The weight (out, in) in float32 of the layer at `path`.

        Raises:
            ModelError: the model is not there, or it has other weights.
        """
        if self._tensors is None:
            self._tensors = self.open()
        return read_dense(self._tensors, transposed_layers(self._tensors.model), path)

    def open(self) -> ModelTensors:
        """The dense model's tensors. Raises as a call."""
        wanted = str(self._origin.get("model"))
        try:
            source = resolve(wanted, self._origin.get("revision"))
            tensors = ModelTensors(skeleton(source, torch.float32), Checkpoint(source))
        except (ModelError, OSError) as error:
            raise ModelError(
                f"The dense weights that '{self._name}' was made from, '{wanted}', are needed and cannot be read: {error} Put "
                "them there, or use init_lora_weights=True."
            ) from None
        if tensors.checkpoint.digest() != self._origin.get("digest"):
            raise ModelError(
                f"'{wanted}' is not what '{self._name}' was made from: its weights are others. Put the right ones there, or use "
                "init_lora_weights=True."
            )
        return tensors
