"""GPTQ, AWQ and AutoRound: `scale * (code - zero)` by groups of a row, packed into 32-bit words.

    GPTQ       qweight (K/32*bits, N) and qzeros (G, N/32*bits): words along K and N; scales (G, N); g_idx (K,), the group of each
               column
    AWQ        qweight (K, N/8) and qzeros (G, N/8), the eight codes of a word in the order 0 2 4 6 1 3 5 7; scales (G, N)
    AutoRound  either of these, as `packing_format` says

Zero points of GPTQ's formats:

    gptq_v2, gptq_p  as they are. gptq_p (GPTQModel's for 3, 5, 6 and 7 bits) packs codes in planes: first the low 2 or 4 bits
                     of 32 codes, then the next, so that no code goes on in another word
    gptq (v1)        less one. GPTQModel subtracts one from every field of a word at once, and adds it back so: where a zero point
                     was 0, its field borrows from the next. AutoGPTQ and AutoRound read each field plus one, so that a field of
                     ones is 2^bits. The two differ where a zero point is 0; only GPTQModel writes `meta` into config.json

Sources: AutoGPTQ qlinear_cuda.py, GPTQModel convert_gptq_v1_to_v2_format_module and planar_packing.py, AutoAWQ packing_utils.py,
auto-round inference/backend.py. Checked against files that these libraries wrote (GPTQModel 7.7, AutoGPTQ 0.7, AutoAWQ 0.2.9,
auto-round 0.16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import ModelError
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.formats.layer import Found, Layer, Numbers, StoredLayer, by_path, codec, need, wrong
from lownibble.quant.bits import unpack_planes, unpack_words
from lownibble.stored import of_path

WORD = 32

Zeros = Callable[[Tensor, int, int], Tensor]
"""(words (G, .), bits, N) -> zero points (G, N)."""


def codec_of(
    bits: int, shape: tuple[int, int], group: int, said: int | None, act_order: bool, symmetric: bool
) -> QuantConfig | None:
    """How a codec holds integer codes. Ours of 8 bits are signed, without a zero point."""
    if bits not in (2, 3, 4, 8) or (bits == 8 and not symmetric):
        return None
    return codec(f"int{bits}{'_act' * act_order}", shape, group, said)


def groups_of(g_idx: Tensor | None, n_in: int, size: int, n_groups: int) -> tuple[Tensor | None, bool]:
    """The group of each column if it is not that of its place in equal groups, and whether all groups are of one size."""
    places, even = torch.arange(n_in) // size, n_in % size == 0 or size >= n_in
    if g_idx is None or (torch.equal(g_idx.long(), places) and n_groups == -(-n_in // size)):
        return (None if even else places), even
    return g_idx, bool((g_idx.bincount(minlength=n_groups) == size).all())


def _as_they_are(words: Tensor, bits: int, n: int) -> Tensor:
    return unpack_words(words, bits, n)


def _field_plus_one(words: Tensor, bits: int, n: int) -> Tensor:
    fields: Tensor = unpack_words(words, bits, n).short() + 1
    return fields


def _word_plus_ones(words: Tensor, bits: int, n: int) -> Tensor:
    if WORD % bits:
        fields: Tensor = (unpack_words(words, bits, n) + 1) & (2**bits - 1)
        return fields
    ones = sum(1 << (bits * i) for i in range(WORD // bits))
    return unpack_words(words + torch.tensor(ones - 2**WORD if ones >= 2 ** (WORD - 1) else ones, dtype=torch.int32), bits, n)


def gptq(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of GPTQ checkpoints, with or without act-order."""
    version = str(stored.get("checkpoint_format") or stored.get("format") or "gptq")
    if version not in ("gptq", "gptq_v2", "gptq_p") or stored.get("is_marlin_format"):
        raise ModelError(
            f"'{checkpoint.name}' is a GPTQ checkpoint in the format '{version}', laid out for one kernel. Known: gptq, gptq_v2, "
            "gptq_p. Take one of those, or save it again with GPTQModel in one of them."
        )
    if str(stored.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
        raise ModelError(
            f"'{checkpoint.name}' packs codes into {stored['pack_dtype']}. Known: int32. Save it again with pack_dtype int32."
        )
    if version == "gptq_p":
        return _layers(checkpoint, stored, unpack_planes, unpack_planes)
    if int(stored.get("bits") or 4) in (5, 6, 7):
        raise ModelError(
            f"'{checkpoint.name}' is a GPTQ checkpoint of {stored['bits']} bits in the format '{version}', which tools lay out "
            "in different ways. Known with these bits: gptq_p. Take that, or the dense checkpoint."
        )
    v1 = _word_plus_ones if stored.get("meta") else _field_plus_one
    return _layers(checkpoint, stored, unpack_words, _as_they_are if version == "gptq_v2" else v1)


def auto_round(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of AutoRound checkpoints whose packing is GPTQ's or AWQ's."""
    packing = str(stored.get("packing_format") or "auto").removeprefix("auto_round:")
    kind = str(stored.get("data_type", "int"))
    if kind != "int" or int(stored.get("act_bits") or 16) < 16 or stored.get("rotation_config"):
        raise ModelError(
            f"'{checkpoint.name}' is an AutoRound checkpoint of {kind} weights with quantised activations or rotations. Known: "
            "integer weights alone. Take the dense checkpoint."
        )
    if (packing.startswith(("auto_gptq", "gptq")) and packing != "gptqmodel") or packing == "auto":
        return _layers(checkpoint, stored, unpack_words, _field_plus_one)
    if packing in ("auto_round", "gptqmodel"):
        return _layers(checkpoint, stored, unpack_words, _as_they_are)
    if packing.startswith(("auto_awq", "awq")):
        return awq(checkpoint, stored)
    raise ModelError(
        f"'{checkpoint.name}' is an AutoRound checkpoint packed as '{packing}'. Known: auto_gptq, gptqmodel, auto_awq. Take the "
        "dense checkpoint."
    )


def _layers(checkpoint: Checkpoint, stored: Mapping[str, Any], unpack: Zeros, zeros_of: Zeros) -> Found:
    layers: dict[str, Layer] = {}
    for path, parts in by_path(checkpoint.file_of, ("qweight", "qzeros", "scales", "g_idx")).items():
        need(parts, ("qweight", "qzeros", "scales"), path, checkpoint.name)
        layers[f"{path}.weight"] = _layer(checkpoint, of_path(stored, path), path, parts, unpack, zeros_of)
    return Found(layers)


def _layer(
    checkpoint: Checkpoint, stored: Mapping[str, Any], path: str, parts: Mapping[str, str], unpack: Zeros, zeros_of: Zeros
) -> Layer:
    held, fields, scales = (checkpoint.facts(parts[role])[1] for role in ("qweight", "qzeros", "scales"))
    said = int(stored.get("bits") or 4)
    fits = len(held) == len(fields) == len(scales) == 2 and fields[0] == scales[0] > 0 and scales[1] == held[1]
    (words, n_out), n_groups = (held, scales[0]) if fits else ((0, 0), 0)
    bits = next((bits for bits in (said, *range(2, 9)) if fits and fields[1] == -(-n_out * bits // WORD)), 0)
    if not bits or checkpoint.facts(parts["qweight"])[0] != torch.int32:
        raise wrong(path, checkpoint.name, "its qweight, qzeros and scales do not belong together")
    g_idx = checkpoint.read(parts["g_idx"]).clone() if "g_idx" in parts else None
    n_in = words * WORD // bits if g_idx is None else len(g_idx)
    if words != -(-n_in * bits // WORD):
        raise wrong(path, checkpoint.name, f"{words} words do not hold {n_in} codes of {bits} bits")
    if g_idx is not None and (int(g_idx.max()) >= n_groups or int(g_idx.min()) < 0):
        raise wrong(path, checkpoint.name, f"its g_idx names groups outside of its {n_groups}")
    if n_groups > 1 and g_idx is not None and not g_idx.any():  # exllama's word for groups of neighbours
        g_idx = None
    size = _group_size(stored, n_in, n_groups, g_idx)
    if not size:
        raise wrong(path, checkpoint.name, f"it has scales of {n_groups} groups for {n_in} columns")
    group, even = groups_of(g_idx, n_in, size, n_groups)
    zeros = zeros_of(checkpoint.read(parts["qzeros"]), bits, n_out)
    symmetric = bits == 8 and bool((zeros == 128).all())
    in_range = symmetric or int(zeros.max()) < 2**bits
    how = codec_of(bits, (n_out, n_in), size, stored.get("group_size"), group is not None, symmetric)
    how = how if even and in_range else None
    read = partial(_read, checkpoint, parts, bits, n_in, unpack, zeros_of, group, symmetric)
    return StoredLayer(f"{path}.weight", parts, (n_out, n_in), how, read, group)


def _group_size(stored: Mapping[str, Any], n_in: int, n_groups: int, g_idx: Tensor | None) -> int:
    """Columns of a group, 0 if the scales do not say: layers may have other groups than config.json."""
    if n_groups == 1:
        return n_in
    if g_idx is not None:
        return int(g_idx.bincount().max())
    said = int(stored.get("group_size") or -1)
    return said if said > 0 and n_groups == -(-n_in // said) else n_in // n_groups * (n_in % n_groups == 0)


def _read(
    checkpoint: Checkpoint, parts: Mapping[str, str], bits: int, n_in: int, unpack: Zeros, zeros_of: Zeros, group: Tensor | None,
    symmetric: bool,
) -> Numbers:  # fmt: skip
    codes = unpack(checkpoint.read(parts["qweight"]).t().contiguous(), bits, n_in)
    scale = checkpoint.read(parts["scales"]).float().t().contiguous()
    if symmetric:
        return Numbers((codes.short() - 128).to(torch.int8), scale, None, group)
    return Numbers(codes, scale, zeros_of(checkpoint.read(parts["qzeros"]), bits, len(codes)).t().contiguous(), group)


_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # place in a word of each of eight neighbours


def awq(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of AWQ checkpoints of the version 'gemm', 4 bits."""
    version, bits = str(stored.get("version") or stored.get("format") or "gemm").lower(), int(stored.get("bits") or 4)
    if version not in ("gemm", "exllama", "ipex") or bits != 4:
        raise ModelError(
            f"'{checkpoint.name}' is an AWQ checkpoint of version '{version}' with {bits} bits. Known: gemm, with 4 bits. Take "
            "one of those, or the dense checkpoint."
        )
    layers: dict[str, Layer] = {}
    for path, parts in by_path(checkpoint.file_of, ("qweight", "qzeros", "scales")).items():
        if list(parts) == ["scales"]:
            raise ModelError(
                f"'{checkpoint.name}': '{path}' scales its activations, which AWQ adds to some families and transformers' own "
                "model does not have. Take the dense checkpoint."
            )
        need(parts, ("qweight", "qzeros", "scales"), path, checkpoint.name)
        held, scales = checkpoint.facts(parts["qweight"])[1], checkpoint.facts(parts["scales"])[1]
        fits = len(held) == len(scales) == 2 and held[1] * 8 == scales[1] and scales[0] and held[0] % scales[0] == 0
        if not fits or checkpoint.facts(parts["qzeros"])[1] != torch.Size((scales[0], held[1])):
            raise wrong(path, checkpoint.name, "its qweight, qzeros and scales do not belong together")
        n_in, (n_groups, n_out) = held[0], scales
        how = codec_of(4, (n_out, n_in), n_in // n_groups, stored.get("group_size"), False, False)
        read = partial(_read_awq, checkpoint, parts)
        layers[f"{path}.weight"] = StoredLayer(f"{path}.weight", parts, (n_out, n_in), how, read)
    return Found(layers)


def _read_awq(checkpoint: Checkpoint, parts: Mapping[str, str]) -> Numbers:
    codes, zero = (_awq_codes(checkpoint.read(parts[role])) for role in ("qweight", "qzeros"))
    return Numbers(codes, checkpoint.read(parts["scales"]).float().t().contiguous(), zero)


def _awq_codes(words: Tensor) -> Tensor:
    """(rows, N/8) words -> (N, rows) codes."""
    codes = unpack_words(words, 4, 8 * words.shape[1]).view(len(words), -1, 8)
    return codes[..., list(_AWQ_PLACES)].flatten(1).t().contiguous()
