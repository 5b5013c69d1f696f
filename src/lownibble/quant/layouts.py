"""Storage layouts of packed weights: names, dtypes and shapes of the tensors, for each built-in codec. No torch.

The planner counts bytes with them, merging lays out files with them, and a codec's tensors must match (a test compares). A
plug-in codec has its layout as a method; the function `layout` finds either.

Also here, because planner and loader must agree: which layers are packed, and how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from lownibble.config import QuantConfig
from lownibble.errors import ConfigError, QuantizationError
from lownibble.matching import fits, is_part
from lownibble.registry import CODECS

NESTED_BLOCK_SIZE = 256
"""Block constants per nested block in double quantisation, as in bitsandbytes."""

ITEMSIZE = {"uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8}


class TensorSpec(NamedTuple):
    """Dtype (torch's name) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


Layout = dict[str, TensorSpec]
"""Tensors of a packed weight by name: the codes first, then quantisation constants. All have at least one dimension."""


def _doubly(name: str, n: int, double_quant: bool) -> Layout:
    """n block constants: float32, or double-quantised (8-bit codes, nested absmax and offset)."""
    if not double_quant:
        return {name: TensorSpec("float32", (n,))}
    return {
        name: TensorSpec("uint8", (n,)),
        f"nested_{name}": TensorSpec("float32", (-(-n // NESTED_BLOCK_SIZE),)),
        "offset": TensorSpec("float32", (1,)),
    }


def four_bit(shape: Sequence[int], config: QuantConfig) -> Layout:
    """nf4 and fp4 in bitsandbytes' layout: blocks may span rows, so any shape is supported.

    Raises:
        ConfigError: the block size is not a number.
    """
    if not isinstance(config.block_size, int):
        raise ConfigError(
            f"The 'block_size' of {config.quant_type} must be a number of weights. Got {config.block_size!r}, which is for int8."
        )
    n = math.prod(shape)
    return {
        "codes": TensorSpec("uint8", ((n + 1) // 2, 1)),
        **_doubly("absmax", -(-n // config.block_size), config.double_quant),
    }


def group_size(shape: Sequence[int], config: QuantConfig, allowed: Iterable[int | str]) -> int:
    """Group size (weights that share a scale), for codecs whose groups lie within rows.

    Raises:
        ConfigError: the block size is not in `allowed`. QuantizationError: the row length is not a multiple of it.
    """
    size, row = config.block_size, int(shape[-1])
    if size not in allowed:
        raise ConfigError(f"The 'block_size' of {config.quant_type} must be one of {', '.join(map(str, allowed))}. Got {size!r}.")
    if size == "row":
        return row
    assert isinstance(size, int)
    if row % size:
        fitting = [str(each) for each in allowed if each == "row" or row % int(each) == 0]
        instead = f"block_size {' or '.join(fitting)}, or " if fitting else ""
        raise QuantizationError(
            f"{config.quant_type} in groups of {size} takes rows that are a multiple of {size} long. Got {row}. Use {instead}"
            "another quant_type for this layer (pattern), or add it to skip_modules."
        )
    return size


INT8_GROUPS: tuple[int | str, ...] = ("row", 32, 64, 128, 256, 512, 1024, 2048, 4096)
INT4_GROUPS: tuple[int | str, ...] = (32, 64, 128)


def int8(shape: Sequence[int], config: QuantConfig) -> Layout:
    """Signed codes with one scale per group, or per row."""
    groups = math.prod(shape) // max(1, group_size(shape, config, INT8_GROUPS))
    return {"codes": TensorSpec("int8", tuple(shape)), **_doubly("scale", groups, config.double_quant)}


def int4(shape: Sequence[int], config: QuantConfig) -> Layout:
    """Unsigned codes, two per byte, with a scale and a 4-bit zero point per group."""
    n = math.prod(shape)
    groups = n // group_size(shape, config, INT4_GROUPS)
    return {
        "codes": TensorSpec("uint8", (n // 2, 1)),
        **_doubly("scale", groups, config.double_quant),
        "zero": TensorSpec("uint8", ((groups + 1) // 2,)),
    }


LAYOUTS: dict[str, Callable[[Sequence[int], QuantConfig], Layout]] = {
    "nf4": four_bit, "fp4": four_bit, "int8": int8, "int4": int4,
}  # fmt: skip
"""Built-in `quant_type` -> its layout."""


def layout(shape: Sequence[int], config: QuantConfig) -> Layout:
    """The tensors of a weight of `shape` packed with `config`.

    Raises:
        ConfigError: the codec does not support an option. QuantizationError: it does not support the shape.
    """
    found: Layout = (LAYOUTS.get(config.quant_type) or CODECS[config.quant_type].layout)(shape, config)
    return found


def n_bytes(shape: Sequence[int], config: QuantConfig) -> int:
    """Bytes of a weight of `shape` packed with `config`."""
    return sum(spec.n_bytes for spec in layout(shape, config).values())


def choose(
    linears: Mapping[str, Sequence[int]], config: QuantConfig, may_be_absent: Iterable[str] = (), never: Iterable[str] = ()
) -> dict[str, QuantConfig]:
    """Choose the layers to pack: path -> its configuration.

    Args:
        linears: path -> weight shape of every linear layer.
        may_be_absent: entries of `skip_modules` that may match nothing.
        never: paths that stay dense whatever the options say (a head tied to the embeddings).
    Raises:
        ConfigError: an entry of `skip_modules` or `pattern` matches nothing (lists the candidates), or a codec does not support
            an option (names the layer). QuantizationError: a codec does not support a layer's shape (names the layer).
    """
    last_names = ", ".join(sorted({path.rpartition(".")[2] for path in linears})) or "none"
    for skip in config.skip_modules:
        if skip not in may_be_absent and not any(is_part(path, [skip]) for path in linears):
            raise ConfigError(f"skip_modules '{skip}' matches no linear module. Linear modules: {last_names}.")
    dense = set(never)
    packed = {p: config.for_layer(p) for p in linears if p not in dense and not is_part(p, config.skip_modules)}
    for pattern in config.pattern:
        if not any(fits(path, pattern) for path in packed):
            raise ConfigError(
                f"The pattern {pattern!r} of QuantConfig matches no layer that is packed. Linear modules: {last_names}; skipped: "
                f"{', '.join(config.skip_modules) or 'none'}."
            )
    for path, how in packed.items():
        try:
            layout(linears[path], how)
        except (ConfigError, QuantizationError) as error:
            raise type(error)(f"'{path}' cannot be packed: {error}") from None
    return packed
