"""nf4 and fp4: 4-bit codes with a 16-value codebook, byte-compatible with bitsandbytes in memory and in files.

Codes, absmax and offset equal those of bitsandbytes' `quantize_4bit`, with and without double quantisation, so that checkpoints
need no conversion. The layout is described in `kernels/types.py`.

In a file a layer at PATH has `PATH.weight` (codes), `PATH.weight.absmax`, `PATH.weight.quant_map`, with double quantisation
`PATH.weight.nested_absmax` and `PATH.weight.nested_quant_map`, and the rest, including the offset, as JSON in a uint8 tensor
`PATH.weight.quant_state.bitsandbytes__nf4` (or `__fp4`). The maps must be the standard tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import ModelError
from lownibble.kernels import ops
from lownibble.kernels.types import NO_EPILOGUE, Epilogue, FourBit, Nested
from lownibble.quant import bits, layouts, nested
from lownibble.quant.codebook import codebook, dynamic8
from lownibble.quant.grid import Steps
from lownibble.quant.layouts import NESTED_BLOCK_SIZE, Layout, TensorSpec
from lownibble.quant.packed import Codec, PackedWeight, dtype_name

_STATE_BYTES = 256


@dataclass(frozen=True)
class FourBitWeight(PackedWeight):
    """A packed 4-bit weight.

    Attributes:
        codes: (ceil(n/2), 1) uint8, two codes per byte, the first element in the high nibble (bitsandbytes' packed shape).
        absmax: (ceil(n/block_size),) float32, or uint8 codes of it with double quantisation.
        nested_absmax: (ceil(n_blocks/256),) float32 absmax of `absmax`'s codes; None without double quantisation.
        offset: (1,) float32, the mean that was subtracted from absmax; None without double quantisation.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    block_size: int

    @property
    def double_quant(self) -> bool:
        """Whether absmax is quantised too."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.codes.device

    def tensors(self) -> dict[str, Tensor]:
        """Codes and constants."""
        found = {"codes": self.codes, "absmax": self.absmax}
        if self.nested_absmax is not None and self.offset is not None:
            found |= {"nested_absmax": self.nested_absmax, "offset": self.offset}
        return found

    def facts(self) -> dict[str, Any]:
        """quant_type, shape, dtype, block size and whether double-quantised."""
        return {
            "quant_type": self.quant_type, "shape": list(self.shape), "dtype": dtype_name(self.dtype),
            "block_size": self.block_size, "double_quant": self.double_quant,
        }  # fmt: skip

    @cached_property
    def four_bit(self) -> FourBit:
        """The weight in the kernels' format."""
        device = str(self.device)
        doubly = None
        if self.nested_absmax is not None and self.offset is not None:
            doubly = Nested(dynamic8(device), self.nested_absmax, self.offset, NESTED_BLOCK_SIZE)
        values = codebook(self.quant_type, device).values
        return FourBit(self.codes.view(-1), self.absmax, values, self.block_size, self.shape, doubly)

    def decode(self, out: Tensor) -> Tensor:
        """Dequantise with the backend's kernel."""
        return ops.dequantize_4bit(self.four_bit, out)

    def matmul(self, x_TC: Tensor, *, transposed: bool = False, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
        """As `PackedWeight.matmul`, with the backend's kernel."""
        return ops.matmul_4bit(x_TC.contiguous(), self.four_bit, transposed, epilogue)

    def decoded_absmax(self) -> Tensor:
        """The absmax in float32, (blocks,)."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        return nested.decode(self.absmax, self.nested_absmax, self.offset)

    def steps(self) -> Steps:
        """As `PackedWeight.steps`."""
        return Steps(codebook(self.quant_type, str(self.device)).values, self.decoded_absmax(), None, self.block_size)

    def with_codes(self, codes_NK: Tensor) -> FourBitWeight:
        """As `PackedWeight.with_codes`."""
        return replace(self, codes=bits.pack(codes_NK.flatten(), 4).view(-1, 1))

    def matvec(self, x_TK: Tensor) -> Tensor:
        """As `PackedWeight.matvec`, dequantised on the fly."""
        return ops.gemv_4bit(x_TK.contiguous(), self.four_bit)


def of_codes(codes: Tensor, absmax: Tensor, shape: torch.Size, dtype: torch.dtype, config: QuantConfig) -> FourBitWeight:
    """The packed weight with these codes and float32 absmax, which are quantised too if `config` says so."""
    nested_absmax = offset = None
    if config.double_quant:
        absmax, nested_absmax, offset = nested.encode(absmax)
    assert isinstance(config.block_size, int)
    return FourBitWeight(
        codes.view(-1, 1), absmax, nested_absmax, offset, shape, dtype, config.quant_type, config.block_size
    )  # fmt: skip


class _FourBit(Codec):
    marker: ClassVar[str] = ".weight.quant_state.bitsandbytes__"

    def layout(self, shape: Sequence[int], config: QuantConfig) -> Layout:
        return layouts.four_bit(shape, config)

    def quantize(self, tensor: Tensor, config: QuantConfig, statistics: Tensor | None = None) -> FourBitWeight:
        block_size, table = config.block_size, codebook(config.quant_type, str(tensor.device))
        self.layout(tensor.shape, config)  # validates the block size
        assert isinstance(block_size, int)
        codes, absmax = ops.quantize_4bit(tensor.reshape(-1).contiguous(), table.bounds, table.order, block_size)
        return of_codes(codes, absmax, tensor.shape, tensor.dtype, config)

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FourBitWeight:
        return FourBitWeight(
            tensors["codes"], tensors["absmax"], tensors.get("nested_absmax"), tensors.get("offset"), torch.Size(facts["shape"]),
            getattr(torch, facts["dtype"]), facts["quant_type"], facts["block_size"],
        )  # fmt: skip

    def below(self, config: QuantConfig, shapes: Sequence[Sequence[int]]) -> QuantConfig | None:
        """Doubly quantised absmax are decoded; blocks that end within a byte or go on in the next weight cannot be joined."""
        assert isinstance(config.block_size, int)
        whole = all(math.prod(shape) % config.block_size == 0 for shape in shapes)
        return config.with_options(double_quant=False) if whole else None

    def join(self, weights: Sequence[PackedWeight]) -> FourBitWeight:
        held = [weight for weight in weights if isinstance(weight, FourBitWeight)]
        return replace(
            held[0],
            codes=torch.cat([each.codes for each in held]),
            absmax=torch.cat([each.decoded_absmax() for each in held]),
            nested_absmax=None,
            offset=None,
            shape=torch.Size((sum(each.shape[0] for each in held), held[0].shape[1])),
        )

    def write(self, path: str, weight: PackedWeight) -> dict[str, Tensor]:
        """As bitsandbytes writes it, with the JSON padded to a fixed length."""
        assert isinstance(weight, FourBitWeight)
        prefix = f"{path}.weight"
        stored = {
            prefix: weight.codes,
            f"{prefix}.absmax": weight.absmax,
            f"{prefix}.quant_map": codebook(weight.quant_type).values,
        }
        facts = {
            "quant_type": weight.quant_type,
            "blocksize": weight.block_size,
            "dtype": dtype_name(weight.dtype),
            "shape": list(weight.shape),
        }
        if weight.nested_absmax is not None and weight.offset is not None:
            stored |= {f"{prefix}.nested_absmax": weight.nested_absmax, f"{prefix}.nested_quant_map": dynamic8()}
            facts |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": weight.offset.item()}
        text = json.dumps(facts).encode()
        state = torch.frombuffer(bytearray(text.ljust(_STATE_BYTES)), dtype=torch.uint8)
        return {**stored, f"{path}{self.marker}{weight.quant_type}": state}

    def written(self, path: str, shape: Sequence[int], config: QuantConfig) -> dict[str, TensorSpec]:
        prefix, specs = f"{path}.weight", self.layout(shape, config)
        found = {
            prefix: specs["codes"],
            f"{prefix}.absmax": specs["absmax"],
            f"{prefix}.quant_map": TensorSpec("float32", (16,)),
            f"{path}{self.marker}{config.quant_type}": TensorSpec("uint8", (_STATE_BYTES,)),
        }
        if config.double_quant:
            found[f"{prefix}.nested_absmax"] = specs["nested_absmax"]
            found[f"{prefix}.nested_quant_map"] = TensorSpec("float32", (256,))
        return found

    def _state(self, key: str, stored: Tensor, name: str) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(bytes(stored.tolist()))
            codebook(state["quant_type"]), torch.Size(state["shape"]), int(state["blocksize"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{name}: '{key}' cannot be read ({error}). Download the model again.") from None
        return state

    def stored_options(self, path: str, stored: Tensor, name: str) -> QuantConfig:
        state = self._state(f"{path}{self.marker}", stored, name)
        return QuantConfig(
            quant_type=state["quant_type"], block_size=state["blocksize"], double_quant="nested_offset" in state
        )  # fmt: skip

    def read(self, path: str, parts: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> FourBitWeight:
        prefix = f"{path}.weight"

        def part(last: str) -> Tensor:
            key = f"{prefix}.{last}" if last else prefix
            if key not in parts:
                raise ModelError(f"{name}: packed weight '{prefix}' lacks its '{last or 'codes'}'. Download the model again.")
            return parts[key]

        state_key = next((key for key in parts if key.startswith(path + self.marker)), f"{path}{self.marker}nf4")
        if state_key not in parts:
            raise ModelError(f"{name}: packed weight '{prefix}' lacks its '{state_key}'. Download the model again.")
        state = self._state(state_key, parts[state_key], name)
        quant_type, shape, block_size = state["quant_type"], torch.Size(state["shape"]), int(state["blocksize"])
        _check_table(part("quant_map"), codebook(quant_type).values, prefix, name)
        nested_absmax = offset = None
        if "nested_offset" in state:
            _check_table(part("nested_quant_map"), dynamic8(), prefix, name)
            if state.get("nested_blocksize", NESTED_BLOCK_SIZE) != NESTED_BLOCK_SIZE:
                raise ModelError(
                    f"'{prefix}' has nested blocks of {state['nested_blocksize']}; only {NESTED_BLOCK_SIZE} is known."
                )
            nested_absmax = part("nested_absmax")
            offset = torch.tensor([float(state["nested_offset"])], dtype=torch.float32, device=nested_absmax.device)
        codes, absmax = part("").view(torch.uint8).view(-1, 1), part("absmax")
        n_blocks = -(-shape.numel() // block_size)
        n_nested = -(-n_blocks // NESTED_BLOCK_SIZE)
        counts = (codes.numel(), absmax.numel(), n_nested if nested_absmax is None else nested_absmax.numel())
        if counts != (-(-shape.numel() // 2), n_blocks, n_nested):
            raise ModelError(
                f"{name}: packed weight '{prefix}' has codes and constants that do not belong together "
                f"({counts[0]} bytes and {counts[1]} blocks for {shape.numel()} values). Download the model again."
            )
        return FourBitWeight(codes, absmax, nested_absmax, offset, shape, dtype, quant_type, block_size)


def _check_table(stored: Tensor, standard: Tensor, key: str, name: str) -> None:
    if not torch.equal(stored.float().cpu(), standard):
        raise ModelError(f"{name}: '{key}' uses a table of values that is not bitsandbytes' standard one. It cannot be loaded.")


FOUR_BIT = _FourBit()
