"""Storage layouts of packed weights: names, dtypes and shapes of the tensors, for each built-in codec. No torch.

The planner counts bytes with them, merging lays out files with them, and a codec's tensors must match (a test compares). A
plug-in codec has its layout as a method; the function `layout` finds either.

Also here, because planner and loader must agree: which layers are packed, and how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from lownibble.config import FIXED, QuantConfig
from lownibble.errors import ConfigError, QuantizationError
from lownibble.matching import fits, is_part
from lownibble.registry import CODECS

NESTED_BLOCK_SIZE = 256
"""Block constants per nested block in double quantisation, as in bitsandbytes."""

ITEMSIZE = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8}


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
        raise ConfigError(f"The 'block_size' of {config.quant_type} must be a number of weights. Got {config.block_size!r}.")
    n = math.prod(shape)
    return {
        "codes": TensorSpec("uint8", ((n + 1) // 2, 1)),
        **_doubly("absmax", -(-n // config.block_size), config.double_quant),
    }


class Grouped(NamedTuple):
    """What a codec with one scale per group stores.

    Attributes:
        bits: of a code; codes of fewer than 8 bits are packed.
        top: the value that the largest weight of a group is scaled to; 0 for types with a zero point.
        is_float: whether codes are float8 (e4m3fn), as bytes.
        exponents: whether scales are powers of two, stored as their exponent plus 127 (e8m0).
        act_order: whether columns are grouped by the strength of their inputs.
    """

    bits: int
    top: int = 0
    is_float: bool = False
    exponents: bool = False
    act_order: bool = False

    @property
    def packed(self) -> bool:
        """Whether codes share bytes."""
        return self.bits < 8

    @property
    def zero(self) -> bool:
        """Whether groups have a zero point."""
        return not self.top


_INTEGERS = {"int8": Grouped(8, 127), "int4": Grouped(4), "int3": Grouped(3), "int2": Grouped(2)}

GROUPED: dict[str, Grouped] = {
    **_INTEGERS, **{f"{name}_act": kind._replace(act_order=True) for name, kind in _INTEGERS.items()},
    "fp8": Grouped(8, 448, is_float=True), "mxfp4": Grouped(4, 6, exponents=True), "nf3": Grouped(3, 1), "nf2": Grouped(2, 1),
}  # fmt: skip
"""Codecs with one scale per group (`codecs/grouped.py`)."""

GROUP_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_WHOLE_BYTES = 8  # codes of any number of bits fill whole bytes


def group_size(shape: Sequence[int], config: QuantConfig) -> int:
    """Group size (weights that share a scale), for codecs whose groups lie within rows.

    Raises:
        ConfigError: the block size is not one of `GROUP_SIZES` or 'row'. QuantizationError: there is no row, its length is not a
            multiple of it, or packed codes of a row would not fill whole bytes.
    """
    if not shape:
        raise QuantizationError(f"{config.quant_type} takes rows of weights. Got a single number. Add it to skip_modules.")
    size, row = config.block_size, int(shape[-1])
    if size != "row" and size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ConfigError(f"The 'block_size' of {config.quant_type} must be one of row, {sizes}. Got {size!r}.")
    packed = GROUPED[config.quant_type].packed
    unit = size if isinstance(size, int) else _WHOLE_BYTES if packed else 1
    if row % unit:
        fitting = [str(each) for each in GROUP_SIZES if row % each == 0]
        whole = unit != _WHOLE_BYTES and (row % _WHOLE_BYTES == 0 or not packed)
        fitting += ["row"] * (whole and config.quant_type not in FIXED)
        instead = f"block_size {' or '.join(fitting)}, or " if fitting else ""
        raise QuantizationError(
            f"{config.quant_type} in groups of {size if isinstance(size, int) else 'a row'} takes rows that are a multiple of "
            f"{unit} long. Got {row}. Use {instead}another quant_type for this layer (pattern), or add it to skip_modules."
        )
    return size if isinstance(size, int) else row


def grouped(shape: Sequence[int], config: QuantConfig) -> Layout:
    """Codes, one scale per group, and zero points and the order of columns where the codec has them."""
    kind, n = GROUPED[config.quant_type], math.prod(shape)
    groups = n // max(1, group_size(shape, config))
    found = {
        "codes": TensorSpec("uint8", (n_bytes_of(n, kind.bits), 1))
        if kind.packed
        else TensorSpec("uint8" if kind.is_float else "int8", tuple(shape)),
        **({"scale": TensorSpec("uint8", (groups,))} if kind.exponents else _doubly("scale", groups, config.double_quant)),
    }
    if kind.zero:
        found["zero"] = TensorSpec("uint8", (n_bytes_of(groups, kind.bits),))
    if kind.act_order:
        found["order"] = TensorSpec("int32", (int(shape[-1]),))
    return found


def n_bytes_of(n: int, bits: int) -> int:
    """Bytes of n packed codes, in whole bytes and whole codes."""
    size, codes = unit_of(bits)
    return -(-n // codes) * size


def unit_of(bits: int) -> tuple[int, int]:
    """Bytes and codes of the smallest whole number of both."""
    n_bytes = bits if 8 % bits else 1
    return n_bytes, 8 * n_bytes // bits


LAYOUTS: dict[str, Callable[[Sequence[int], QuantConfig], Layout]] = {
    "nf4": four_bit, "fp4": four_bit, **dict.fromkeys(GROUPED, grouped),
}  # fmt: skip
"""Built-in `quant_type` -> its layout."""


def layout(shape: Sequence[int], config: QuantConfig) -> Layout:
    """The tensors of a weight of `shape` packed with `config`.

    Raises:
        ConfigError: the codec does not support an option. QuantizationError: it does not support the shape.
    """
    found: Layout = (LAYOUTS.get(config.quant_type) or CODECS[config.quant_type].layout)(shape, config)
    return found


def of_layer(shape: Sequence[int], config: QuantConfig) -> Layout:
    """The tensors of a layer's packed weight: (N, K), or (E, N, K) of the experts of a mixture, each packed on its own.

    Raises:
        ConfigError, QuantizationError: as `layout`.
    """
    if len(shape) != 3:
        return layout(shape, config)
    n_experts, *each = shape
    return {name: TensorSpec(spec.dtype, (n_experts, *spec.shape)) for name, spec in layout(each, config).items()}


def n_bytes(shape: Sequence[int], config: QuantConfig) -> int:
    """Bytes of a layer's weight of `shape` packed with `config`."""
    return sum(spec.n_bytes for spec in of_layer(shape, config).values())


def choose(
    linears: Mapping[str, Sequence[int]], config: QuantConfig, may_be_absent: Iterable[str] = (), never: Iterable[str] = ()
) -> dict[str, QuantConfig]:
    """Choose the layers to pack: path -> its configuration.

    Args:
        linears: path -> weight shape of every linear layer, and of the experts' weights.
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
            of_layer(linears[path], how)
        except (ConfigError, QuantizationError) as error:
            raise type(error)(f"'{path}' cannot be packed: {error}") from None
    return packed
