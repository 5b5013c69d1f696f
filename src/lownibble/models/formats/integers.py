"""Other integer formats, all `scale * (code - zero)`.

    compressed-tensors  weight_packed (N, words) of codes plus 2^(bits-1), weight_scale (N, G), or of blocks of rows and columns,
                        weight_zero_point packed along N (int8 where the scale is not one of each row), weight_g_idx; or weight
                        int8 (N, K), also of fewer bits, with weight_scale
    bitsandbytes int8   weight int8 (N, K), SCB (N,): the largest absolute value of each row
    HQQ                 W_q: parts of the weight one below the other in the bits of a byte; scale and zero of any value

compressed-tensors before 0.13 put 32 // bits codes in a word and left the rest empty, which is another layout for 3, 5, 6 and 7
bits. HQQ's `packing` says how codes lie, which `nbits` does not: 5 and 6 bits lie in bytes, 1.58 bits in two.

Sources: compressed-tensors pack_quantized/helpers.py and naive_quantized/base.py, bitsandbytes autograd/_functions.py, hqq
core/quantize.py and bitpack.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lownibble.errors import ModelError
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.formats import floats
from lownibble.models.formats.gptq import WORD, codec_of, groups_of
from lownibble.models.formats.layer import Found, Layer, Numbers, StoredLayer, by_path, codec, need, of_activations, wrong
from lownibble.quant.bits import unpack_words
from lownibble.stored import scheme

_COMPRESSED = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mxfp4-pack-quantized",
               "nvfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense")  # fmt: skip
_COMPRESSED_ROLES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale"
)  # fmt: skip


def compressed(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of compressed-tensors checkpoints: packed integers, int8, and the float formats (`floats.py`)."""
    groups = stored.get("config_groups") or {}
    schemes = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    kinds = {str(kind) for kind in (stored.get("format"), *(each.get("format") for each in schemes)) if kind}
    sparse = (stored.get("sparsity_config") or {}).get("format", "dense")
    transforms = (stored.get("transform_config") or {}).get("config_groups")
    odd = sorted(kinds - set(_COMPRESSED)) + ([sparse] if sparse != "dense" else []) + ["transforms"] * bool(transforms)
    if odd:
        raise ModelError(
            f"'{checkpoint.name}' is a compressed-tensors checkpoint with {', '.join(odd)}. Known formats: "
            f"{', '.join(_COMPRESSED)}. Take one of those, or the dense checkpoint."
        )
    known = [weights for each in schemes if (weights := each.get("weights"))]
    layers: dict[str, Layer] = {}
    for path, parts in by_path(checkpoint.file_of, _COMPRESSED_ROLES).items():
        if "weight_scale" not in parts:
            if "weight_packed" in parts:
                need(parts, ("weight_scale",), path, checkpoint.name)
            continue
        need(parts, ("weight_packed" if "weight_packed" in parts else "weight",), path, checkpoint.name)
        said = scheme(stored, path)
        layers[f"{path}.weight"] = _compressed_layer(checkpoint, path, parts, [said] if said else known)
    return Found(layers, of_activations(checkpoint.file_of))


def _compressed_layer(checkpoint: Checkpoint, path: str, parts: Mapping[str, str], schemes: list[dict[str, Any]]) -> Layer:
    """`schemes`: that of the layer, or all where config.json does not name the layer as the tensors do."""
    block = tuple(next((block for each in schemes if (block := each.get("block_structure"))), ())) or None
    said = next((size for each in schemes if (size := each.get("group_size"))), None)
    said_bits = [int(n) for each in schemes if (n := each.get("num_bits"))]
    name, n_scale = f"{path}.weight", checkpoint.facts(parts["weight_scale"])[1]
    if "weight_packed" not in parts:
        dtype, shape = checkpoint.facts(parts["weight"])
        if dtype != torch.int8:
            return floats.float_layer(checkpoint, name, parts, "weight", "weight_scale", block, said)
        group = _group_of(n_scale, shape, block, path, checkpoint.name)
        how = codec_of(8, (shape[0], shape[1]), group, said, False, symmetric="weight_zero_point" not in parts)
        return StoredLayer(name, parts, shape, how, partial(_read_int8, checkpoint, parts, block))
    if checkpoint.facts(parts["weight_packed"])[0] == torch.uint8:
        return floats.four_bit_layer(checkpoint, name, parts)
    need(parts, ("weight_shape",), path, checkpoint.name)
    n_out, n_in = (int(n) for n in checkpoint.read(parts["weight_shape"]).tolist())
    words = checkpoint.facts(parts["weight_packed"])[1][1]
    bits = next((bits for bits in said_bits or range(1, 9) if words in (_words(n_in, bits), _padded_words(n_in, bits))), 0)
    if not bits:
        raise wrong(path, checkpoint.name, f"{words} words do not hold {n_in} codes a row")
    size = _group_of(n_scale, (n_out, n_in), block, path, checkpoint.name)
    g_idx = checkpoint.read(parts["weight_g_idx"]).clone() if "weight_g_idx" in parts else None
    if g_idx is not None and int(g_idx.min()) < 0:  # compressed-tensors writes -1 where there is no order
        g_idx = None
    places, even = groups_of(g_idx, n_in, size, -(-n_in // size))
    symmetric = "weight_zero_point" not in parts
    how = codec_of(bits, (n_out, n_in), size, said, places is not None, symmetric) if even else None
    packed = partial(_read_packed, checkpoint, parts, bits, (n_out, n_in), block, places)
    return StoredLayer(name, parts, (n_out, n_in), how, packed, places)


def _words(n: int, bits: int) -> int:
    return -(-n * bits // WORD)


def _padded_words(n: int, bits: int) -> int:
    return -(-n // (WORD // bits))


def _unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes of each row of words of either layout."""
    if words.shape[1] == _words(n, bits):
        return unpack_words(words, bits, n)
    codes = torch.stack([(words >> (bits * i)) & (2**bits - 1) for i in range(WORD // bits)], dim=-1)
    return codes.flatten(1)[:, :n].to(torch.uint8)


def _group_of(
    scale: torch.Size, shape: tuple[int, ...] | torch.Size, block: tuple[int, ...] | None, path: str, name: str
) -> int:  # fmt: skip
    """Columns of a group, from the shape of the scales: (N, G), (N, 1), (N,), (1,) or (), or one of each block."""
    n_rows, n_groups = scale if len(scale) == 2 else (scale.numel(), 1)
    fits = len(shape) == 2 and len(scale) <= 2 and n_groups and shape[1] % n_groups == 0
    if fits and block is not None and (n_rows, n_groups) == (-(-shape[0] // block[0]), -(-shape[1] // block[1])):
        fits = n_groups == 1 or shape[1] == n_groups * block[1]  # no rest that is a smaller group
    elif n_rows not in (1, shape[0]):
        fits = False
    if not fits:
        raise wrong(path, name, f"scales of shape {tuple(scale)} do not belong to a weight of {tuple(shape)}")
    return int(shape[1]) // n_groups


def _by_row(held: Tensor, n_out: int, block: tuple[int, ...] | None) -> Tensor:
    """Scales or zero points, of rows, blocks or the whole tensor, as those of each row, (N, G)."""
    held = held if held.ndim == 2 else held.reshape(-1, 1)
    if block is not None and len(held) not in (1, n_out):
        held = held.repeat_interleave(block[0], 0)[:n_out]
    return held.expand(n_out, -1).contiguous()


def _read_int8(checkpoint: Checkpoint, parts: Mapping[str, str], block: tuple[int, ...] | None) -> Numbers:
    codes = checkpoint.read(parts["weight"]).clone()
    scale = _by_row(checkpoint.read(parts["weight_scale"]).float(), len(codes), block)
    if "weight_zero_point" not in parts:
        return Numbers(codes, scale)
    return Numbers(codes, scale, _by_row(checkpoint.read(parts["weight_zero_point"]).float(), len(codes), block))


def _read_packed(
    checkpoint: Checkpoint, parts: Mapping[str, str], bits: int, shape: tuple[int, int], block: tuple[int, ...] | None,
    group: Tensor | None,
) -> Numbers:  # fmt: skip
    n_out, n_in = shape
    middle = 2 ** (bits - 1)  # codes and zeros are stored from 0 on
    codes = _unpack(checkpoint.read(parts["weight_packed"]), bits, n_in)
    scale = _by_row(checkpoint.read(parts["weight_scale"]).float(), n_out, block)
    zero = torch.full(scale.shape, middle, dtype=torch.uint8)
    if "weight_zero_point" in parts:
        held = checkpoint.read(parts["weight_zero_point"])
        if held.dtype == torch.int32:
            zero = _unpack(held.t().contiguous(), bits, n_out).t().contiguous()
        else:
            zero = _by_row((held.short() + middle).to(torch.uint8), n_out, block)
    elif bits == 8:
        return Numbers((codes.short() - middle).to(torch.int8), scale, None, group)
    return Numbers(codes, scale, zero, group)


def bitsandbytes(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of bitsandbytes' 8-bit checkpoints (LLM.int8)."""
    layers: dict[str, Layer] = {}
    for path, parts in by_path(checkpoint.file_of, ("weight", "SCB", "weight_format")).items():
        if "SCB" in parts:
            need(parts, ("weight",), path, checkpoint.name)
            if "weight_format" in parts and int(checkpoint.read(parts["weight_format"]).item()):
                raise ModelError(
                    f"'{checkpoint.name}': '{path}' is laid out for one GPU kernel (weight_format is not 'row'). Take one in "
                    "rows, or the dense one."
                )
            shape = checkpoint.facts(parts["weight"])[1]
            if len(shape) != 2 or checkpoint.facts(parts["SCB"])[1].numel() != shape[0]:
                raise wrong(path, checkpoint.name, "its SCB is not one number a row")
            how = codec("int8", shape, shape[1], None)
            layers[f"{path}.weight"] = StoredLayer(f"{path}.weight", parts, shape, how, partial(_read_bnb, checkpoint, parts))
    return Found(layers)


def _read_bnb(checkpoint: Checkpoint, parts: Mapping[str, str]) -> Numbers:
    return Numbers(checkpoint.read(parts["weight"]).clone(), checkpoint.read(parts["SCB"]).float().view(-1, 1) / 127)


_HQQ_PACKING = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
_HQQ_FACTS = ("nbits", "group_size", "shape", "axis", "packing", "view_as_float", "channel_wise", "unpack_view_dtype",
              "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "optimize", "round_zero",
              "quant_scale", "quant_zero")  # fmt: skip


def hqq(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of HQQ checkpoints saved through transformers. Their zeros are no integers, so no codec of ours holds them."""
    layers: dict[str, Layer] = {}
    for path, parts in by_path(checkpoint.file_of, ("W_q", "scale", "zero", *_HQQ_FACTS)).items():
        if "W_q" not in parts:
            continue
        if f"{path}.zero_scale" in checkpoint.file_of:
            raise ModelError(
                f"'{checkpoint.name}': '{path}' was saved with offload_meta. Save it without, or take the dense checkpoint."
            )
        need(parts, ("scale", "zero", "packing", "shape", "axis"), path, checkpoint.name)
        shape = [int(n) for n in checkpoint.read(parts["shape"]).tolist()]
        layers[f"{path}.weight"] = StoredLayer(f"{path}.weight", parts, shape, None, partial(_read_hqq, checkpoint, parts, path))
    return Found(layers)


def _read_hqq(checkpoint: Checkpoint, parts: Mapping[str, str], path: str) -> Tensor:
    def fact(role: str, default: int = 0) -> int:
        return int(checkpoint.read(parts[role]).item()) if role in parts else default

    packing = "".join(map(chr, checkpoint.read(parts["packing"]).tolist()))
    bits = _HQQ_PACKING.get(packing, 0)
    if not bits:
        raise wrong(path, checkpoint.name, f"its packing '{packing}' is not one of {', '.join(_HQQ_PACKING)}")
    shape, packed = torch.Size(checkpoint.read(parts["shape"]).tolist()), checkpoint.read(parts["W_q"])
    if fact("quant_scale") or fact("quant_zero"):
        raise ModelError(
            f"'{checkpoint.name}': the scales of '{path}' are quantised too, which HQQ does not save. Take a dense checkpoint."
        )
    packed = packed.view(torch.int32 if bits == 3 else torch.uint8) if fact("view_as_float") else packed
    scale, zero = checkpoint.read(parts["scale"]).float(), checkpoint.read(parts["zero"]).float()
    per_word, top = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits], 2**bits - 1
    codes = torch.cat([(packed >> (bits * (per_word - 1 - i))) & top for i in range(per_word)]).float()
    group = fact("group_size")
    n_rows = (group if fact("axis") == 0 else shape.numel() // group) if group else shape[0]
    try:
        return ((codes[:n_rows] - zero) * scale).reshape(shape)
    except RuntimeError:
        raise wrong(path, checkpoint.name, f"its W_q, scale and zero do not give a weight of {tuple(shape)}") from None
