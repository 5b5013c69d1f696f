"""bitsandbytes' 4-bit checkpoints: which tensors belong together, read and written without bitsandbytes and byte for byte.

For a linear layer at PATH such a checkpoint holds `PATH.weight` (packed codes), `PATH.weight.absmax`, `PATH.weight.quant_map`,
with double quantisation `PATH.weight.nested_absmax` and `PATH.weight.nested_quant_map`, and the rest as JSON in a uint8 tensor
`PATH.weight.quant_state.bitsandbytes__nf4` (or `__fp4`). The maps must be the standard tables; others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import ModelError
from lownibble.models.checkpoint import Checkpoint
from lownibble.quant import QuantizedTensor
from lownibble.quant.codebook import codebook, dynamic8
from lownibble.quant.tensor import NESTED_BLOCK_SIZE

_STATE = ".weight.quant_state.bitsandbytes__"
_STATE_BYTES = 256

OWN_METHOD = "lownibble"
"""The `quant_method` of checkpoints in this layout that our transformers quantizer saves."""

SERIALIZED_NAMES = {
    "weight": [
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4",
    ]
}  # fmt: skip
"""What a layer's `weight` is stored as."""


def check_config(config: Any, name: str) -> None:
    """Refuse checkpoints quantised by anything but bitsandbytes 4-bit."""
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method", "an unknown method")
    in_4bit = method == "bitsandbytes" and stored.get("load_in_4bit", stored.get("_load_in_4bit"))
    if stored and not in_4bit and method != OWN_METHOD:
        raise ModelError(
            f"'{name}' is quantised with {method}. Only bitsandbytes 4-bit checkpoints and dense ones can be loaded."
        )


def check_same(stored: dict[str, Any], config: QuantConfig, name: str) -> None:
    """Refuse to pretend that a checkpoint holds another 4-bit type than it does."""
    held = stored.get("quant_type" if stored.get("quant_method") == OWN_METHOD else "bnb_4bit_quant_type", "fp4")
    if held != config.quant_type:
        raise ModelError(f"'{name}' is quantised as {held} already, but {config.quant_type} was asked for. Ask for {held}.")


def packed_modules(keys: Iterable[str]) -> set[str]:
    """Paths of the layers that are stored packed."""
    return {key.partition(_STATE)[0] for key in keys if _STATE in key}


def owner(key: str, packed: set[str]) -> str:
    """The parameter that a stored tensor belongs to: `PATH.weight` for every part of a packed weight."""
    path, found, _ = key.partition(".weight.")
    return f"{path}.weight" if found and path in packed else key


def read(checkpoint: Checkpoint, path: str, dtype: torch.dtype) -> QuantizedTensor:
    """The packed weight of the layer at `path`, its bytes untouched; `dtype` is what it decodes to by default.

    Raises:
        ModelError: a part is missing, or a table is not the standard one.
    """
    keys = [key for key in checkpoint.file_of if key == f"{path}.weight" or key.startswith(f"{path}.weight.")]
    parts = {key: checkpoint.read(key).clone() for key in keys}  # a copy never keeps the file mapped
    return unpack(parts, path, dtype, f"'{checkpoint.name}'")


def unpack(parts: Mapping[str, Tensor], path: str, dtype: torch.dtype, name: str) -> QuantizedTensor:
    """`read` for tensors at hand, by their full names; `name` is how errors call the checkpoint."""
    prefix = f"{path}.weight"

    def part(last: str) -> Tensor:
        key = f"{prefix}.{last}" if last else prefix
        if key not in parts:
            raise ModelError(f"{name}: packed weight '{prefix}' lacks its '{last or 'codes'}'. Download the model again.")
        return parts[key]

    state_key = next((key for key in parts if key.startswith(path + _STATE)), f"{path}{_STATE}nf4")
    try:
        state = json.loads(bytes(parts[state_key].tolist()))
        quant_type, shape, block_size = state["quant_type"], torch.Size(state["shape"]), int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{name}: '{state_key}' cannot be read ({error}). Download the model again.") from None
    _check_table(part("quant_map"), codebook(quant_type).values, prefix, name)
    nested_absmax = offset = None
    if "nested_offset" in state:
        _check_table(part("nested_quant_map"), dynamic8(), prefix, name)
        if state.get("nested_blocksize", NESTED_BLOCK_SIZE) != NESTED_BLOCK_SIZE:
            raise ModelError(f"'{prefix}' has nested blocks of {state['nested_blocksize']}; only {NESTED_BLOCK_SIZE} is known.")
        nested_absmax = part("nested_absmax")
        offset = torch.tensor(float(state["nested_offset"]), device=nested_absmax.device)
    codes, absmax = part("").view(torch.uint8).view(-1, 1), part("absmax")
    n_blocks = -(-shape.numel() // block_size)
    n_nested = -(-n_blocks // NESTED_BLOCK_SIZE)
    counts = (codes.numel(), absmax.numel(), n_nested if nested_absmax is None else nested_absmax.numel())
    if counts != (-(-shape.numel() // 2), n_blocks, n_nested):
        raise ModelError(
            f"{name}: packed weight '{prefix}' has codes and constants that do not belong together "
            f"({counts[0]} bytes and {counts[1]} blocks for {shape.numel()} values). Download the model again."
        )
    return QuantizedTensor(codes, absmax, nested_absmax, offset, shape, dtype, quant_type, block_size)


def pack(path: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """What a checkpoint holds for the layer at `path`, as bitsandbytes writes it, with the JSON padded to a length known
    before.
    """
    prefix = f"{path}.weight"
    stored = {
        prefix: weight.codes,
        f"{prefix}.absmax": weight.absmax,
        f"{prefix}.quant_map": codebook(weight.quant_type).values,
    }
    facts = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.nested_absmax is not None and weight.offset is not None:
        stored |= {f"{prefix}.nested_absmax": weight.nested_absmax, f"{prefix}.nested_quant_map": dynamic8()}
        facts |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": weight.offset.item()}
    text = json.dumps(facts).encode()
    state = torch.frombuffer(bytearray(text.ljust(_STATE_BYTES)), dtype=torch.uint8)
    return {**stored, f"{path}{_STATE}{weight.quant_type}": state}


def pack_shapes(path: str, shape: torch.Size, config: QuantConfig) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor that `pack` gives for a weight of `shape`."""
    prefix, n_blocks = f"{path}.weight", -(-shape.numel() // config.block_size)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        prefix: (torch.uint8, (-(-shape.numel() // 2), 1)),
        f"{prefix}.absmax": (torch.uint8 if config.double_quant else torch.float32, (n_blocks,)),
        f"{prefix}.quant_map": (torch.float32, (16,)),
        f"{path}{_STATE}{config.quant_type}": (torch.uint8, (_STATE_BYTES,)),
    }
    if config.double_quant:
        found[f"{prefix}.nested_absmax"] = (torch.float32, (-(-n_blocks // NESTED_BLOCK_SIZE),))
        found[f"{prefix}.nested_quant_map"] = (torch.float32, (256,))
    return found


def config_json(config: QuantConfig, skip_modules: list[str], dtype: str) -> dict[str, Any]:
    """The `quantization_config` of config.json that transformers and bitsandbytes load such a checkpoint by."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant, "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skip_modules,
    }  # fmt: skip


def _check_table(stored: Tensor, standard: Tensor, key: str, name: str) -> None:
    if not torch.equal(stored.float().cpu(), standard):
        raise ModelError(f"{name}: '{key}' uses a table of values that is not bitsandbytes' standard one. It cannot be loaded.")
