"""Integer formats of other tools. All are `scale * (code - zero)`; they differ in how codes and zeros lie in the file.

    GPTQ                qweight (K/32*bits, N) and qzeros (G, N/32*bits): words along K and N; scales (G, N); g_idx (K,), the
                        group of each column. Format v1 stores zeros less one in every field, v2 as they are.
    AWQ                 qweight (K, N/8) and qzeros (G, N/8), the eight codes of a word in the order 0 2 4 6 1 3 5 7; scales
                        (G, N)
    compressed-tensors  weight_packed (N, words) of codes plus 2^(bits-1), weight_scale (N, G), weight_zero_point packed along
                        N, weight_g_idx; or weight int8 (N, K) with weight_scale
    bitsandbytes int8   weight int8 (N, K), SCB (N,): the largest absolute value of each row
    HQQ                 W_q: parts of the weight one below the other in the bits of a byte; scale and zero of any value

Sources: AutoGPTQ qlinear_cuda.py, GPTQModel convert_gptq_v1_to_v2_format_module, AutoAWQ packing_utils.py, compressed-tensors
pack_quantized/helpers.py and naive_quantized/base.py, bitsandbytes autograd/_functions.py, hqq core/quantize.py and bitpack.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lownibble.config import QuantConfig
from lownibble.errors import ModelError
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.formats import floats
from lownibble.models.formats.layer import Found, Layer, Numbers, StoredLayer, by_path, codec, need, wrong
from lownibble.quant.bits import unpack_words

_WORD = 32


def _codec_of(
    bits: int, shape: tuple[int, int], group: int, said: int | None, act_order: bool, symmetric: bool
) -> QuantConfig | None:
    """How a codec holds integer codes. Ours of 8 bits are signed, without a zero point."""
    if bits not in (2, 3, 4, 8) or (bits == 8 and not symmetric):
        return None
    return codec(f"int{bits}{'_act' * act_order}", shape, group, said)


def _groups(g_idx: Tensor | None, n_in: int, size: int) -> tuple[Tensor | None, bool]:
    """The group of each column if it is not its place, and whether all groups are of one size."""
    if g_idx is None or torch.equal(g_idx.long(), torch.arange(n_in) // size):
        return None, n_in % size == 0 or size >= n_in
    return g_idx, bool((g_idx.bincount() == size).all())


def gptq(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of GPTQ checkpoints, v1 and v2, with or without act-order."""
    version = str(stored.get("checkpoint_format") or stored.get("format") or "gptq")
    if version not in ("gptq", "gptq_v2") or stored.get("is_marlin_format"):
        raise ModelError(
            f"'{checkpoint.name}' is a GPTQ checkpoint in the format '{version}', laid out for one kernel. Known: gptq, gptq_v2. "
            "Take one of those, or save it again with GPTQModel in format gptq."
        )
    layers: dict[str, Layer] = {}
    for path, parts in by_path(checkpoint.file_of, ("qweight", "qzeros", "scales", "g_idx")).items():
        need(parts, ("qweight", "qzeros", "scales"), path, checkpoint.name)
        (words, n_out), (n_groups, _) = checkpoint.facts(parts["qweight"])[1], checkpoint.facts(parts["scales"])[1]
        fields = checkpoint.facts(parts["qzeros"])[1][1]
        said = int(stored.get("bits", 4))
        bits = next((bits for bits in (said, *range(2, 9)) if fields == -(-n_out * bits // _WORD)), 0)
        if not bits or not n_groups or checkpoint.facts(parts["qweight"])[0] != torch.int32:
            raise wrong(path, checkpoint.name, "its qweight, qzeros and scales do not belong together")
        g_idx = checkpoint.read(parts["g_idx"]).clone() if "g_idx" in parts else None
        n_in = words * _WORD // bits if g_idx is None else len(g_idx)
        if words != -(-n_in * bits // _WORD):
            raise wrong(path, checkpoint.name, f"{words} words do not hold {n_in} codes of {bits} bits")
        size = int(stored.get("group_size", -1))
        size = n_in if size < 1 or n_groups == 1 else size
        if g_idx is not None and (int(g_idx.max()) >= n_groups or int(g_idx.min()) < 0):
            raise wrong(path, checkpoint.name, f"its g_idx names groups outside of its {n_groups}")
        if g_idx is None and n_groups != -(-n_in // size):
            raise wrong(path, checkpoint.name, f"it has scales of {n_groups} groups, and config.json says groups of {size}")
        group, even = _groups(g_idx, n_in, size)
        zeros = partial(_gptq_zeros, checkpoint, parts["qzeros"], bits, n_out, version)
        symmetric = bits == 8 and bool((zeros() == 128).all())
        how = _codec_of(bits, (n_out, n_in), size, stored.get("group_size"), group is not None, symmetric) if even else None
        read = partial(_read_gptq, checkpoint, parts, bits, n_in, zeros, group, symmetric)
        layers[f"{path}.weight"] = StoredLayer(f"{path}.weight", parts, (n_out, n_in), how, read)
    return Found(layers)


def _gptq_zeros(checkpoint: Checkpoint, key: str, bits: int, n_out: int, version: str) -> Tensor:
    """(N, G). Format v1 was made by subtracting one from every field of the words, so one is added to every field likewise: where
    a field was 0, it borrowed from the next."""
    words = checkpoint.read(key)
    if version == "gptq" and _WORD % bits == 0:
        ones = sum(1 << (bits * i) for i in range(_WORD // bits))
        words = words + torch.tensor(ones - 2**32 if ones >= 2**31 else ones, dtype=torch.int32)
        return unpack_words(words, bits, n_out).t()
    zeros = unpack_words(words, bits, n_out)
    return ((zeros + 1) & (2**bits - 1) if version == "gptq" else zeros).t()


def _read_gptq(
    checkpoint: Checkpoint, parts: Mapping[str, str], bits: int, n_in: int, zeros: Any, group: Tensor | None, symmetric: bool
) -> Numbers:
    codes = unpack_words(checkpoint.read(parts["qweight"]).t().contiguous(), bits, n_in)
    scale = checkpoint.read(parts["scales"]).float().t().contiguous()
    if symmetric:
        return Numbers((codes.short() - 128).to(torch.int8), scale, None, group)
    return Numbers(codes, scale, zeros().contiguous(), group)


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
        need(parts, ("qweight", "qzeros", "scales"), path, checkpoint.name)
        (n_in, words), (n_groups, n_out) = checkpoint.facts(parts["qweight"])[1], checkpoint.facts(parts["scales"])[1]
        if words * 8 != n_out or n_in % n_groups or checkpoint.facts(parts["qzeros"])[1] != torch.Size((n_groups, words)):
            raise wrong(path, checkpoint.name, "its qweight, qzeros and scales do not belong together")
        how = _codec_of(4, (n_out, n_in), n_in // n_groups, stored.get("group_size"), False, False)
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


_COMPRESSED = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mxfp4-pack-quantized",
               "nvfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense")  # fmt: skip
_COMPRESSED_ROLES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale"
)  # fmt: skip
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale",
                   "v_scale", "q_scale", "k_zero_point", "v_zero_point")  # fmt: skip


def compressed(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of compressed-tensors checkpoints: packed integers, int8, and the float formats (`floats.py`)."""
    groups = stored.get("config_groups") or {}
    schemes = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    kinds = {str(kind) for kind in (stored.get("format"), *(scheme.get("format") for scheme in schemes)) if kind}
    sparse = (stored.get("sparsity_config") or {}).get("format", "dense")
    transforms = (stored.get("transform_config") or {}).get("config_groups")
    odd = sorted(kinds - set(_COMPRESSED)) + ([sparse] if sparse != "dense" else []) + ["transforms"] * bool(transforms)
    if odd:
        raise ModelError(
            f"'{checkpoint.name}' is a compressed-tensors checkpoint with {', '.join(odd)}. Known formats: "
            f"{', '.join(_COMPRESSED)}. Take one of those, or the dense checkpoint."
        )
    blocks = [(scheme.get("weights") or {}).get("block_structure") for scheme in schemes]
    block = tuple(next((block for block in blocks if block), ())) or None
    size = next((size for scheme in schemes if (size := (scheme.get("weights") or {}).get("group_size"))), None)
    layers: dict[str, Layer] = {}
    for path, parts in by_path(checkpoint.file_of, _COMPRESSED_ROLES).items():
        if "weight_scale" not in parts:
            if "weight_packed" in parts:
                need(parts, ("weight_scale",), path, checkpoint.name)
            continue
        need(parts, ("weight_packed" if "weight_packed" in parts else "weight",), path, checkpoint.name)
        layers[f"{path}.weight"] = _compressed_layer(checkpoint, path, parts, block, size)
    unused = {key for key in checkpoint.file_of if key.rpartition(".")[2] in _OF_ACTIVATIONS}
    return Found(layers, unused)


def _compressed_layer(
    checkpoint: Checkpoint, path: str, parts: Mapping[str, str], block: tuple[int, ...] | None, said: int | None
) -> Layer:
    name, n_scale = f"{path}.weight", checkpoint.facts(parts["weight_scale"])[1]
    if "weight_packed" not in parts:
        dtype, shape = checkpoint.facts(parts["weight"])
        if dtype != torch.int8:
            return floats.float_layer(checkpoint, name, parts, "weight", "weight_scale", block, said)
        group = _group_of(n_scale, shape, path, checkpoint.name)
        how = _codec_of(8, (shape[0], shape[1]), group, said, False, symmetric="weight_zero_point" not in parts)
        return StoredLayer(name, parts, shape, how, partial(_read_int8, checkpoint, parts))
    if checkpoint.facts(parts["weight_packed"])[0] == torch.uint8:
        return floats.four_bit_layer(checkpoint, name, parts)
    need(parts, ("weight_shape",), path, checkpoint.name)
    n_out, n_in = (int(n) for n in checkpoint.read(parts["weight_shape"]).tolist())
    words = checkpoint.facts(parts["weight_packed"])[1][1]
    bits = next((bits for bits in range(1, 9) if words == -(-n_in * bits // _WORD)), 0)
    if not bits:
        raise wrong(path, checkpoint.name, f"{words} words do not hold {n_in} codes a row")
    size = _group_of(n_scale, (n_out, n_in), path, checkpoint.name)
    g_idx = checkpoint.read(parts["weight_g_idx"]).clone() if "weight_g_idx" in parts else None
    if g_idx is not None and int(g_idx.min()) < 0:  # compressed-tensors writes -1 where there is no order
        g_idx = None
    places, even = _groups(g_idx, n_in, size)
    symmetric = "weight_zero_point" not in parts
    how = _codec_of(bits, (n_out, n_in), size, said, places is not None, symmetric) if even else None
    packed = partial(_read_packed, checkpoint, parts, bits, (n_out, n_in), places)
    return StoredLayer(name, parts, (n_out, n_in), how, packed)


def _group_of(scale: torch.Size, shape: tuple[int, ...] | torch.Size, path: str, name: str) -> int:
    """Columns of a group, from the shape of the scales: (N, G), (N, 1), (N,), (1,) or ()."""
    n_groups = scale[1] if len(scale) == 2 else 1
    if len(shape) != 2 or (len(scale) == 2 and scale[0] not in (1, shape[0])) or len(scale) > 2 or not n_groups:
        raise wrong(path, name, f"scales of shape {tuple(scale)} do not belong to a weight of {tuple(shape)}")
    return -(-shape[1] // n_groups)


def _scale(checkpoint: Checkpoint, key: str, n_out: int) -> Tensor:
    """(N, G)."""
    scale = checkpoint.read(key).float()
    return (scale if scale.ndim == 2 else scale.reshape(-1, 1)).expand(n_out, -1).contiguous()


def _read_int8(checkpoint: Checkpoint, parts: Mapping[str, str]) -> Numbers:
    codes = checkpoint.read(parts["weight"]).clone()
    zero = _scale(checkpoint, parts["weight_zero_point"], len(codes)) if "weight_zero_point" in parts else None
    return Numbers(codes, _scale(checkpoint, parts["weight_scale"], len(codes)), zero)


def _read_packed(
    checkpoint: Checkpoint, parts: Mapping[str, str], bits: int, shape: tuple[int, int], group: Tensor | None
) -> Numbers:
    n_out, n_in = shape
    middle = 2 ** (bits - 1)  # codes and zeros are stored from 0 on
    codes, scale = (
        unpack_words(checkpoint.read(parts["weight_packed"]), bits, n_in),
        _scale(checkpoint, parts["weight_scale"], n_out),
    )
    zero = torch.full(scale.shape, middle, dtype=torch.uint8)
    if "weight_zero_point" in parts:
        held = checkpoint.read(parts["weight_zero_point"])
        packed = held.dtype == torch.int32
        zero = unpack_words(held.t().contiguous(), bits, n_out).t().contiguous() if packed else (held + middle).to(torch.uint8)
    elif bits == 8:
        return Numbers((codes.short() - middle).to(torch.int8), scale, None, group)
    return Numbers(codes, scale, zero, group)


def bitsandbytes(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of bitsandbytes' 8-bit checkpoints (LLM.int8)."""
    layers: dict[str, Layer] = {}
    for path, parts in by_path(checkpoint.file_of, ("weight", "SCB", "weight_format")).items():
        if "SCB" in parts:
            need(parts, ("weight",), path, checkpoint.name)
            shape = checkpoint.facts(parts["weight"])[1]
            how = codec("int8", shape, shape[1], None)
            layers[f"{path}.weight"] = StoredLayer(f"{path}.weight", parts, shape, how, partial(_read_bnb, checkpoint, parts))
    return Found(layers)


def _read_bnb(checkpoint: Checkpoint, parts: Mapping[str, str]) -> Numbers:
    return Numbers(checkpoint.read(parts["weight"]).clone(), checkpoint.read(parts["SCB"]).float().view(-1, 1) / 127)


_HQQ_FACTS = ("nbits", "group_size", "shape", "axis", "packing", "view_as_float", "channel_wise", "unpack_view_dtype",
              "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "optimize", "round_zero",
              "quant_scale", "quant_zero")  # fmt: skip


def hqq(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Found:
    """Layers of HQQ checkpoints saved through transformers. Their zeros are no integers, so no codec of ours holds them."""
    layers: dict[str, Layer] = {}
    for path, parts in by_path(checkpoint.file_of, ("W_q", "scale", "zero", *_HQQ_FACTS)).items():
        if "W_q" not in parts:
            continue
        need(parts, ("scale", "zero", "nbits", "shape", "axis"), path, checkpoint.name)
        shape = [int(n) for n in checkpoint.read(parts["shape"]).tolist()]
        layers[f"{path}.weight"] = StoredLayer(f"{path}.weight", parts, shape, None, partial(_read_hqq, checkpoint, parts, path))
    return Found(layers)


def _read_hqq(checkpoint: Checkpoint, parts: Mapping[str, str], path: str) -> Tensor:
    def fact(role: str, default: int = 0) -> int:
        return int(checkpoint.read(parts[role]).item()) if role in parts else default

    bits, shape, packed = fact("nbits"), torch.Size(checkpoint.read(parts["shape"]).tolist()), checkpoint.read(parts["W_q"])
    if fact("quant_scale") or fact("quant_zero"):
        raise ModelError(
            f"'{checkpoint.name}': the scales of '{path}' are quantised too, which HQQ does not save. Take a dense checkpoint."
        )
    packed = packed.view(torch.int32 if bits == 3 else torch.uint8) if fact("view_as_float") else packed
    scale, zero = checkpoint.read(parts["scale"]).float(), checkpoint.read(parts["zero"]).float()
    per_word, top = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}.get(bits, 0), 2**bits - 1
    if not per_word:
        raise wrong(path, checkpoint.name, f"{bits} bits")
    codes = torch.cat([(packed >> (bits * (per_word - 1 - i))) & top for i in range(per_word)]).float()
    group = fact("group_size")
    n_rows = (group if fact("axis") == 0 else shape.numel() // group) if group else shape[0]
    return ((codes[:n_rows] - zero) * scale).reshape(shape)
