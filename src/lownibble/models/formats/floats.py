"""Float formats of other tools: `scale * code` with codes of 8 or 4 bits.

    FP8     weight float8 (N, K) and one scale per tensor, row, group of a row, or block of rows and columns. transformers and
            DeepSeek call it weight_scale_inv, and multiply by it nevertheless; others weight_scale. Fused experts are 3-D. Bytes
            (int8) are pairs of e2m1 codes, with exponents as scales of 32 columns (DeepSeek V4's experts): MXFP4
    MXFP4   X_blocks (experts, N, groups, 16 bytes) of pairs of e2m1 codes, the first in the low bits, and X_scales, powers of
            two (gpt-oss): our bytes with their halves exchanged; in compressed-tensors weight_packed (N, K/2) and weight_scale
    NVFP4   weight_packed, a float8 scale per 16 columns, and weight_global_scale, which the scales are divided by

Blocks become groups of columns: each row has the scale of its block, and the same values.
Sources: transformers integrations/finegrained_fp8.py and mxfp4.py, compressed-tensors nvfp4 and mxfp4/base.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.formats.layer import (
    Experts,
    Found,
    Layer,
    Numbers,
    StoredLayer,
    codec,
    exponents,
    need,
    of_activations,
    wrong,
)
from lownibble.quant.codebook import levels
from lownibble.quant.codecs.grouped import GroupedWeight, of_groups
from lownibble.quant.layouts import GROUP_SIZES
from lownibble.stored import MX_GROUP

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_SCALES = ("_scale_inv", "_scale", ".scale", ".qscale_weight")


def fp8(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of FP8 checkpoints: DeepSeek's and transformers' blocks, fbgemm's rows, scales of whole tensors."""
    block = stored.get("weight_block_size")
    layers: dict[str, Layer] = {}
    for key in checkpoint.file_of:
        dtype = checkpoint.facts(key)[0]
        if dtype not in (*_FLOAT8, torch.int8):
            continue
        stem = key.removesuffix(".weight")
        names = [f"{key}{end}" if end.startswith("_") else f"{stem}{end}" for end in _SCALES]
        scale = next((name for name in names if name in checkpoint.file_of), None)
        if scale is not None:
            parts = {"weight": key, "scale": scale}
            layers[key] = float_layer(checkpoint, key, parts, "weight", "scale", tuple(block) if block else None)
        elif dtype in _FLOAT8:
            need({}, (f"scale ({', '.join(_SCALES[:2])})",), stem, checkpoint.name)
    return Found(layers, of_activations(checkpoint.file_of) - {key for layer in layers.values() for key in layer.keys})


def float_layer(
    checkpoint: Checkpoint,
    name: str,
    parts: Mapping[str, str],
    weight: str,
    scale: str,
    block: tuple[int, ...] | None,
    said: int | None = None,
) -> Layer:
    """A layer of float8 codes (or, as DeepSeek's experts, pairs of e2m1 codes); `weight` and `scale` are roles in `parts`;
    `block` and `said` are what config.json says of blocks and of groups."""
    (dtype, shape), n_scale = checkpoint.facts(parts[weight]), checkpoint.facts(parts[scale])[1]
    if dtype not in _FLOAT8:
        shape = torch.Size((*shape[:-1], 2 * shape[-1]))
    rows, columns = (shape[-2], shape[-1]) if len(shape) > 1 else (1, shape[-1])
    grid = tuple(n_scale) if len(n_scale) > 1 else (n_scale.numel(), 1)
    if len(shape) == 3:  # of experts: each has scales of its own
        grid = (*n_scale, *(1, 1)[: max(0, 3 - len(n_scale))])
        if len(grid) != 3 or grid[0] != shape[0]:
            raise wrong(name, checkpoint.name, f"scales of shape {tuple(n_scale)} do not belong to a weight of {tuple(shape)}")
    fitting = block is not None and grid[-2:] == (-(-rows // block[0]), -(-columns // block[1]))
    assert block is not None or not fitting
    size = (block[0], block[1]) if fitting and block else (rows // max(1, grid[-2]), columns // max(1, grid[-1]))
    if not fitting and (not all(size) or rows % grid[-2] or columns % grid[-1]):
        stem = name.removesuffix(".weight")
        raise wrong(stem, checkpoint.name, f"scales of shape {tuple(n_scale)} do not belong to a weight of {tuple(shape)}")
    width = columns if size[1] >= columns else math.gcd(size[1], columns)
    plain = len(shape) in (2, 3) and dtype == torch.float8_e4m3fn and (width in GROUP_SIZES or width == columns)
    how = codec("fp8", shape[-2:], width, block[1] if block else said) if plain else None
    if len(shape) == 2 and dtype == torch.int8 and size == (1, MX_GROUP) and checkpoint.facts(parts[scale])[0] in _EXPONENTS:
        pairs = {"weight_packed": parts[weight], "weight_scale": parts[scale]}
        return StoredLayer(name, parts, shape, QuantConfig(quant_type="mxfp4"), partial(_read_four_bit, checkpoint, pairs))
    if how is not None and len(shape) == 3:

        def expert(index: int, dtype: torch.dtype) -> GroupedWeight:
            codes, scales = (checkpoint.read_entry(parts[role], index) for role in (weight, scale))
            return of_groups(codes, _by_row(exponents(scales).view(grid[1:]), shape[1:], size, width), None, None, dtype, how)

        return Experts(name, parts.values(), shape, how, expert)
    read = partial(_read_float, checkpoint, parts[weight], parts[scale], shape, grid, size, width if how else None)
    return StoredLayer(name, parts, shape, how, read)


def _by_row(scales: Tensor, shape: tuple[int, ...], size: tuple[int, int], width: int) -> Tensor:
    """Scales of blocks of `size` -> those of groups of `width` columns in each row, (N, G)."""
    n_out, n_in = shape
    rows = scales.repeat_interleave(size[0], -2)[:n_out]
    return rows.repeat_interleave(max(1, min(size[1], n_in) // width), -1)[:, : n_in // width]


def _read_float(
    checkpoint: Checkpoint, weight: str, scale: str, shape: torch.Size, grid: tuple[int, ...], size: tuple[int, int],
    width: int | None,
) -> Numbers | Tensor:  # fmt: skip
    codes, scales = checkpoint.read(weight).clone(), exponents(checkpoint.read(scale)).view(grid)
    if width is not None:
        return Numbers(codes, _by_row(scales, shape, size, width))
    rows, columns = (shape[-2], shape[-1]) if len(shape) > 1 else (1, shape[-1])
    if codes.dtype not in _FLOAT8:
        codes = _pairs(codes.view(torch.uint8))
    of_all = scales.repeat_interleave(size[0], -2)[..., :rows, :].repeat_interleave(size[1], -1)[..., :columns]
    return (codes.float().view(*shape[:-2], rows, columns) * of_all).view(shape)


def _pairs(packed: Tensor) -> Tensor:
    """Values of two e2m1 codes a byte, the first in the low bits: (..., n) -> (..., 2n) float32."""
    return levels("mxfp4")[_nibbles(packed).long()]


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def four_bit_layer(checkpoint: Checkpoint, name: str, parts: Mapping[str, str]) -> Layer:
    """A layer of MXFP4 or NVFP4 in compressed-tensors; no codec holds the latter."""
    (n_out, half), n_scale = checkpoint.facts(parts["weight_packed"])[1], checkpoint.facts(parts["weight_scale"])[1]
    if len(n_scale) != 2 or n_scale[0] != n_out or not n_scale[1] or 2 * half % n_scale[1]:
        raise wrong(
            name.removesuffix(".weight"),
            checkpoint.name,
            f"scales of {tuple(n_scale)} do not belong to {(n_out, 2 * half)} codes",
        )
    mx = checkpoint.facts(parts["weight_scale"])[0] == torch.uint8 and 2 * half == MX_GROUP * n_scale[1]
    how = QuantConfig(quant_type="mxfp4") if mx and "weight_global_scale" not in parts else None
    return StoredLayer(name, parts, (n_out, 2 * half), how, partial(_read_four_bit, checkpoint, parts))


def _read_four_bit(checkpoint: Checkpoint, parts: Mapping[str, str]) -> Numbers:
    codes, scale = (
        _nibbles(checkpoint.read(parts["weight_packed"]).view(torch.uint8)),
        checkpoint.read(parts["weight_scale"]).clone(),
    )
    scale = scale.view(torch.uint8) if scale.dtype in _EXPONENTS else scale
    if "weight_global_scale" in parts:
        scale = exponents(scale) / checkpoint.read(parts["weight_global_scale"]).float()
    return Numbers(codes, scale, levels=levels("mxfp4"))


def mxfp4(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """The fused experts of MXFP4 checkpoints (gpt-oss)."""
    layers: dict[str, Layer] = {}
    for key in checkpoint.file_of:
        name = key.removesuffix("_blocks")
        if name == key:
            continue
        parts = {"blocks": key, "scales": f"{name}_scales"}
        need({role: at for role, at in parts.items() if at in checkpoint.file_of}, parts, name, checkpoint.name)
        of_blocks, of_scales = (checkpoint.facts(at) for at in parts.values())
        bytes_alike = of_blocks[0] == of_scales[0] == torch.uint8 and len(of_blocks[1]) == 4
        if not bytes_alike or of_blocks[1] != torch.Size((*of_scales[1], MX_GROUP // 2)):
            raise wrong(name, checkpoint.name, "its blocks and scales do not belong together")
        n_experts, rows, groups, _ = of_blocks[1]
        shape, how = (n_experts, rows, groups * MX_GROUP), QuantConfig(quant_type="mxfp4")
        layers[name] = Experts(name, parts.values(), shape, how, partial(_mxfp4_expert, checkpoint, parts, how), turned=True)
    return Found(layers)


def _mxfp4_expert(
    checkpoint: Checkpoint, parts: Mapping[str, str], how: QuantConfig, expert: int, dtype: torch.dtype
) -> GroupedWeight:
    blocks = checkpoint.read_entry(parts["blocks"], expert)
    rows, groups, _ = blocks.shape
    codes = (blocks >> 4).bitwise_or_(blocks << 4).view(-1, 1)  # the first code of two into the high bits
    scale = checkpoint.read_entry(parts["scales"], expert).flatten()
    shape = torch.Size((rows, groups * MX_GROUP))
    return GroupedWeight(codes, scale, None, None, None, None, shape, dtype, how.quant_type, how.block_size)
