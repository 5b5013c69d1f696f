"""Writers of other tools' quantised checkpoints: each turns the linear layers of a dense folder into a format, as published, and
returns the dense weights that the file stands for. Plain loops and whole numbers, nothing of the package."""

import json
import re

import torch
from safetensors.torch import load_file, save_file

LAYERS = re.compile(r"model\.layers\.\d+\..*_proj\.weight")


def rewrite(folder, config, layer):
    """Replace the linear layers by what `layer(path, weight)` returns: (tensors by their last name, dense weight)."""
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if LAYERS.fullmatch(key)]:
        path = key.removesuffix(".weight")
        stored, dense[key] = layer(path, tensors.pop(key))
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return dense


def words(rows, bits):
    """Rows of codes as rows of 32-bit words, the first code in the lowest bits: one large number a row."""
    n_words = -(-len(rows[0]) * bits // 32)
    numbers = [sum(int(code) << (bits * i) for i, code in enumerate(row)) for row in rows]
    cut = [[(number >> (32 * word)) & 0xFFFFFFFF for word in range(n_words)] for number in numbers]
    return torch.tensor(cut, dtype=torch.int64).to(torch.int32)


def affine(weight, bits, size, symmetric, group=None):
    """(codes (N, K), scale (N, G) float16, zero (N, G)) by rounding to nearest, `group` the group of each column."""
    n_in = weight.shape[1]
    group = torch.arange(n_in) // size if group is None else group
    top, n_groups = 2**bits - 1, int(group.max()) + 1
    low = torch.stack([weight[:, group == g].amin(1).clamp(max=0) for g in range(n_groups)], 1)
    high = torch.stack([weight[:, group == g].amax(1).clamp(min=0) for g in range(n_groups)], 1)
    if symmetric:
        high = torch.maximum(high, -low)
        scale, zero = (2 * high / top).half(), torch.full(low.shape, 2 ** (bits - 1))
    else:
        scale = ((high - low) / top).half()
        zero = (-low / scale).round().clamp(0, top)
    codes = (weight / scale.float()[:, group] + zero[:, group]).round().clamp(0, top)
    return codes.long(), scale, zero.long(), group


def decoded(codes, scale, zero, group):
    return (codes - zero[:, group]).float() * scale.float()[:, group]


PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def planes(rows, bits):
    """GPTQModel's order for bits that do not divide 32: the low bits of 32 codes, then the next ones."""
    blocks = torch.tensor([list(map(int, row)) for row in rows]).view(len(rows), -1, 32)
    found, first = [], 0
    for width in PLANES.get(bits, (bits,)):
        part = (blocks >> first) & (2**width - 1)
        found.append(words(part.flatten(0, 1), width).view(len(rows), blocks.shape[1], width))
        first += width
    return torch.cat(found, -1).flatten(1)


def gptq(
    folder, bits=4, size=32, symmetric=True, act_order=False, version="gptq", odd=False, tool="gptqmodel", order_of=None
):  # fmt: skip
    """GPTQ's files. `odd`: act-order with groups of unequal sizes; `order_of`: paths for which it returns the same have the same
    act-order; `tool`: who wrote it. AutoGPTQ's has zero points of 2^bits where all bits of a field are set; AutoRound's is
    'auto-round'."""
    generator, orders = torch.Generator().manual_seed(3), {}
    pack = planes if version == "gptq_p" else words

    def layer(path, weight):
        n_in = weight.shape[1]
        step = n_in if size == -1 else size
        group = torch.arange(n_in) // step
        n_groups = int(group.max()) + 1
        if act_order:
            key = path if order_of is None else order_of(path)
            group = group[orders.setdefault(key, torch.randperm(n_in, generator=generator))]
        if odd:
            every = torch.arange(n_groups)
            group = torch.randint(0, n_groups, (n_in,), generator=generator).scatter(0, every, every)
        codes, scale, zero, group = affine(weight, bits, step, symmetric, group)
        if tool == "autogptq":
            zero = zero.clamp(min=1)
            zero[::3] = 2**bits
        if version != "gptq":
            qzeros = pack(zero.t(), bits)
        else:
            number = [
                sum((int(z) - 1) << (bits * i) for i, z in enumerate(row)) for row in zero.t()
            ]  # -1 borrows from its neighbour
            n_words = -(-len(weight) * bits // 32)
            qzeros = torch.tensor([[(n >> (32 * w)) & 0xFFFFFFFF for w in range(n_words)] for n in number]).to(torch.int32)
        tensors = {"qweight": pack(codes, bits).t(), "qzeros": qzeros, "scales": scale.t()}
        tensors |= {"g_idx": group.to(torch.int32)} if tool != "auto-round" else {}
        return tensors, decoded(codes, scale, zero, group)

    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": act_order}
    config |= {"meta": {"quantizer": ["gptqmodel:7.7.0"]}} if tool == "gptqmodel" else {}
    if tool == "auto-round":
        packing = "auto_round" if version == "gptq_v2" else "auto_round:auto_gptq"
        config |= {"quant_method": "auto-round", "packing_format": packing, "data_type": "int"}
    return rewrite(folder, config | {"checkpoint_format": version}, layer)


def awq(folder, size=32):
    """AutoAWQ's file, version gemm: eight output columns a word, in the order 0 2 4 6 1 3 5 7."""

    def pack(codes):  # (rows, N)
        order = torch.arange(codes.shape[1]).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
        return words(codes[:, order], 4)

    def layer(path, weight):
        codes, scale, zero, group = affine(weight, 4, weight.shape[1] if size == -1 else size, False)
        return {"qweight": pack(codes.t()), "qzeros": pack(zero.t()), "scales": scale.t()}, decoded(codes, scale, zero, group)

    return rewrite(folder, {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}, layer)


def bitsandbytes8(folder):
    """bitsandbytes' 8-bit layers."""

    def layer(path, weight):
        largest = weight.abs().amax(1)
        codes = (weight * 127 / largest[:, None]).round()
        return {"weight": codes.to(torch.int8), "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}, (
            codes * (largest / 127)[:, None]
        )

    return rewrite(folder, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, layer)


def fp8(folder, block=None, per="row", name="weight_scale_inv", method="fp8", activations=False):
    """FP8: scales of blocks (rows, columns), rows, or the whole tensor."""

    def layer(path, weight):
        n_out, n_in = weight.shape
        size = block or ((1, n_in) if per == "row" else (n_out, n_in))
        grid = [
            [(slice(i, i + size[0]), slice(j, j + size[1])) for j in range(0, n_in, size[1])] for i in range(0, n_out, size[0])
        ]
        scale = torch.tensor([[float(weight[at].abs().max() / 448) for at in row] for row in grid])
        codes, dense = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
        for i, row in enumerate(grid):
            for j, at in enumerate(row):
                codes[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
                dense[at] = codes[at].float() * scale[i, j]
        more = {"input_scale": torch.ones(1)} if activations else {}
        return {"weight": codes, name: scale.reshape(()) if per == "tensor" else scale, **more}, dense

    config = {"quant_method": method, "activation_scheme": "static" if activations else "dynamic"}
    return rewrite(folder, config | ({"weight_block_size": list(block)} if block else {}), layer)


def rewrite_experts(folder, config, weights):
    """Replace the fused weights of experts by what `weights(name, tensor)` returns: (tensors by what is added to the name, dense
    weight as the model holds it)."""
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stored, dense[key] = weights(key, tensors.pop(key))
        tensors |= {f"{key}{end}": tensor.contiguous() for end, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return dense


E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def mxfp4(folder):
    """gpt-oss: each row of an expert's weight, 32 values after another, as 16 bytes of two codes, the first in the low bits, and
    the exponent of a power of two. The model holds the weights turned."""
    values = torch.tensor(E2M1)

    def weights(key, tensor):
        n_experts, n_in, n_out = tensor.shape
        blocks = torch.empty(n_experts, n_out, n_in // 32, 16, dtype=torch.uint8)
        scales, dense = torch.empty(n_experts, n_out, n_in // 32, dtype=torch.uint8), torch.empty_like(tensor)
        for expert in range(n_experts):
            for row in range(n_out):
                for group in range(n_in // 32):
                    columns = slice(32 * group, 32 * group + 32)
                    numbers = tensor[expert, columns, row]
                    exponent = int(numbers.abs().max().log2().floor()) - 2
                    codes = (numbers[:, None] / 2.0**exponent - values).abs().argmin(1)
                    scales[expert, row, group] = exponent + 127
                    blocks[expert, row, group] = codes[::2] + 16 * codes[1::2]
                    dense[expert, columns, row] = values[codes] * 2.0**exponent
        return {"_blocks": blocks, "_scales": scales}, dense

    dense_modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return rewrite_experts(folder, {"quant_method": "mxfp4", "modules_to_not_convert": dense_modules}, weights)


def fp8_experts(folder, block):
    """FP8 of fused experts, as transformers stores them: scales (E, rows, columns) of blocks, or of whole matrices."""

    def weights(key, tensor):
        (n_experts, n_out, n_in), size = tensor.shape, block or tensor.shape[1:]
        scale = torch.empty(n_experts, -(-n_out // size[0]), -(-n_in // size[1]))
        codes, dense = torch.empty_like(tensor, dtype=torch.float8_e4m3fn), torch.empty_like(tensor)
        for expert in range(n_experts):
            for i in range(scale.shape[1]):
                for j in range(scale.shape[2]):
                    at = expert, slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1])
                    scale[expert, i, j] = tensor[at].abs().max() / 448
                    codes[at] = (tensor[at] / scale[expert, i, j]).to(torch.float8_e4m3fn)
                    dense[at] = codes[at].float() * scale[expert, i, j]
        return {"": codes, "_scale_inv": scale}, dense

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["self_attn", "lm_head"]}
    return rewrite_experts(folder, config | ({"weight_block_size": list(block)} if block else {}), weights)


def hqq(folder, bits=4, size=64, axis=1, said=None):
    """HQQ's state dict with encoded facts, as its layers save it: without its optimisation of zeros. `said`: the bits that it
    states, where it packs others."""
    per_word = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]

    def layer(path, weight):
        rows = weight.reshape(-1, size) if axis == 1 else weight.reshape(size, -1)
        low, high = rows.amin(axis, keepdim=True), rows.amax(axis, keepdim=True)
        scale = (2**bits - 1) / (high - low)
        zero = -low * scale + 0.25
        codes = (rows * scale + zero).round().clamp(0, 2**bits - 1)
        padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % per_word)).long().view(per_word, -1, codes.shape[1])
        packed = sum(part << (bits * (per_word - 1 - i)) for i, part in enumerate(padded))
        facts = {"nbits": said or bits, "group_size": size, "axis": axis}
        packing = "3bit_32" if bits == 3 else f"{bits}bit_u8"
        tensors = {"W_q": packed.to(torch.int32 if bits == 3 else torch.uint8), "scale": 1 / scale, "zero": zero}
        tensors |= {
            key: torch.tensor(value, dtype=torch.float32 if value == 1.58 else torch.int32) for key, value in facts.items()
        }
        tensors |= {key: torch.tensor(key == "channel_wise", dtype=torch.uint8) for key in ("view_as_float", "channel_wise")}
        tensors |= {"shape": torch.tensor(weight.shape), "packing": torch.tensor([ord(c) for c in packing], dtype=torch.uint8)}
        return tensors, ((codes - zero) / scale).reshape(weight.shape)

    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": bits, "group_size": size, "axis": axis}}}
    return rewrite(folder, config, layer)
