"""Write GGUF files of models and adapters, for llama.cpp and tools built on it; read adapters back.

The container, tensor names and quantised types come from the `gguf` library. It lacks what llama.cpp keeps in its conversion
script: the hyperparameters an architecture needs, how its weights are changed, and which pre-tokenizer to use. `ARCHITECTURES`
covers the first two, `gguf_tokenizer.py` the last; anything else is refused by name, because a wrong guess gives a file that
loads but generates nonsense. So is a model that differs from what llama.cpp's code has fixed for its architecture.

- llama.cpp's `llama` rotates adjacent pairs where transformers rotates halves (RoPE), so the rows of q and k are permuted.
- Norms that multiply by 1 + w (Gemma, Nemotron) are stored as 1 + w.
- Matrices are stored as F32, F16, BF16 or Q8_0, vectors as F32. Rows whose length is not a multiple of 32 cannot be Q8_0 and
  become F16.
- The experts of a layer are three tensors (E, out, in): gate, up and down. The model holds the rows of gate and up in one weight,
  as halves or interleaved; adapters on it become two with the same A. Routers stay F32.
- An adapter file has one alpha for all layers and llama.cpp scales by alpha / rank; the rest of a layer's scale (rsLoRA,
  patterns) is multiplied into its B.

Tensors are converted one at a time, so peak memory depends on the largest tensor.

Sources: llama.cpp's conversion/llama.py, qwen.py, gpt_oss.py, gemma.py, phi.py, glm.py, granite.py and others there,
convert_lora_to_gguf.py, and `build_lora_mm_id` of llama-graph.cpp,
which applies adapters on experts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lownibble.config import LoraConfig
from lownibble.errors import AdapterError, ModelError, OutputError
from lownibble.exporting.gguf_tokenizer import add_tokenizer
from lownibble.exporting.weights import Tell, Weights, say_nothing
from lownibble.lora.adapter_file import AdapterFile
from lownibble.lora.apart import fitted
from lownibble.lora.portable import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lownibble.lora.provenance import from_metadata, to_metadata
from lownibble.lora.targets import scale_of
from lownibble.lora.variants import LORA, Variant
from lownibble.models import ModelSource, experts
from lownibble.models.load import tied_aliases
from lownibble.quant import is_linear, is_transposed
from lownibble.stored import TRAINED_ON


class Architecture(NamedTuple):
    """What llama.cpp makes of a model type.

    Attributes:
        name: its own name for it.
        pairs: whether the rows of q and k are permuted to adjacent rotary pairs.
        experts: how the rows of gate and up lie in the experts' `gate_up_proj`: 'halves' or 'interleaved'; '': no experts.
        shifted: whether norms multiply by 1 + w.
        facts: option of config.json -> the method of `GGUFWriter` that writes it; without a value it is left out.
        fixed: option -> the only value that llama.cpp's code has, or a tuple of the names of it; or a function of the
            configuration that gives it.
        window: whether it has sliding windows.
    """

    name: str
    pairs: bool = False
    experts: str = ""
    shifted: bool = False
    facts: Mapping[str, str] = {}
    fixed: Mapping[str, Any] = {}
    window: bool = False


def _every(n: int) -> Callable[[Any], list[str]]:
    """Kinds of layers of which every n-th has no window."""

    def kinds(config: Any) -> list[str]:
        return ["sliding_attention" if (i + 1) % n else "full_attention" for i in range(config.num_hidden_layers)]

    return kinds


_SILU: Mapping[str, Any] = {"hidden_act": ("silu", "swish")}
_EXPERTS: Mapping[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
_CAPS = {"attn_logit_softcapping": "add_attn_logit_softcapping", "final_logit_softcapping": "add_final_logit_softcapping"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
INVOCATION = "adapter.alora.invocation_tokens"
"""llama.cpp's key, for an array of unsigned numbers."""

ARCHITECTURES = {
    "llama": Architecture("llama", pairs=True, fixed=_SILU),
    "mistral": Architecture("llama", pairs=True, fixed=_SILU, window=True),
    "qwen2": Architecture("qwen2", fixed=_SILU),
    "qwen3": Architecture("qwen3", fixed=_SILU),
    "mixtral": Architecture("llama", pairs=True, experts="halves", fixed={**_EXPERTS, **_SILU}),
    "qwen3_moe": Architecture("qwen3moe", experts="halves", fixed={**_EXPERTS, **_SILU}),
    "gpt_oss": Architecture("gpt-oss", experts="interleaved", fixed={**_EXPERTS, "layer_types": _every(2)}, window=True),
    "gemma": Architecture("gemma", shifted=True, fixed={"hidden_act": ("gelu_pytorch_tanh", "gelu")}),  # its own say 'gelu'
    "gemma2": Architecture(
        "gemma2", shifted=True, facts=_CAPS, window=True,
        fixed={**_GELU, "query_pre_attn_scalar": lambda config: _head_dim(config), "layer_types": _every(2)},
    ),
    "gemma3_text": Architecture(
        "gemma3", shifted=True, window=True,
        fixed={
            **_GELU, "query_pre_attn_scalar": lambda config: _head_dim(config), "layer_types": _every(6),
            "attn_logit_softcapping": None, "final_logit_softcapping": None,
        },
    ),
    "phi": Architecture("phi2", fixed={"qk_layernorm": False, "hidden_act": "gelu_new"}),
    "phi3": Architecture(
        "phi3", facts={"original_max_position_embeddings": "add_rope_scaling_orig_ctx_len"}, fixed=_SILU, window=True
    ),
    "glm": Architecture("chatglm", fixed=_SILU),
    "glm4": Architecture("glm4", fixed=_SILU),
    "granite": Architecture(
        "granite", pairs=True, fixed=_SILU,
        facts={
            "attention_multiplier": "add_attention_scale", "embedding_multiplier": "add_embedding_scale",
            "residual_multiplier": "add_residual_scale", "logits_scaling": "add_logit_scale",
        },
    ),
    "starcoder2": Architecture("starcoder2", fixed={"hidden_act": "gelu_pytorch_tanh"}),
    "stablelm": Architecture(
        "stablelm", facts={"use_parallel_residual": "add_parallel_residual"}, fixed={"qk_layernorm": False, **_SILU}
    ),
    "olmo2": Architecture("olmo2", fixed=_SILU),
    "nemotron": Architecture("nemotron", shifted=True, fixed={"hidden_act": "relu2"}),
    "gpt2": Architecture("gpt2", fixed={"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False}),
}  # fmt: skip
"""`model_type` of config.json -> architecture."""

TYPES = {"float32": Type.F32, "float16": Type.F16, "bfloat16": Type.BF16, "q8_0": Type.Q8_0}
"""Value of the option `dtype` -> GGUF type of matrices."""

_FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.Q8_0: 7, Type.BF16: 32}
_Q8_BLOCK = 32


def write_model(
    weights: Weights, onto: str, path: Path, dtype: str, tokenizer: ModelSource, tell: Tell = say_nothing
) -> dict[str, Any]:
    """Write a model as one .gguf file, atomically; returns its architecture, tensor count and type counts.

    Raises:
        ModelError: the architecture, rotary scaling, sliding window or tokenizer is not supported.
        OutputError: the file cannot be written.
    """
    kind, architecture = _architecture(weights.model.config)
    places = _places(weights.model.config, architecture)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(weights.source.name).name)
    _add_shape(writer, weights.model.config, kind)
    writer.add_file_type(_FILE_TYPES[TYPES[dtype]])
    add_tokenizer(writer, tokenizer.folder, int(weights.model.config.vocab_size))
    stored: dict[str, Callable[[], np.ndarray[Any, Any]]] = {}
    types: dict[str, int] = {}
    for name in weights.names:
        empty = weights.turn(name, torch.empty(weights.shape(name), device="meta"))
        for target, rows in places(name):
            shape = _some(empty, target, rows).shape
            how = _type_of(target, shape, TYPES[dtype])
            types[how.name] = types.get(how.name, 0) + 1
            _announce(writer, target, shape, how)

            def make(name: str = name, target: str = target, rows: slice = rows, how: Type = how) -> np.ndarray[Any, Any]:
                values = weights.turn(name, weights.as_float(name, weights.merged(name, onto)))
                values = _turned(_some(values, target, rows), name, weights.model.config, architecture)
                return _encoded(values.contiguous(), how, name)

            stored[target] = make
    for target, factors in _rope_factors(weights.model.config):
        _announce(writer, target, factors.shape, Type.F32)
        stored[target] = factors.numpy
    _write(writer, path, stored, tell)
    return {"architecture": architecture.name, "tensors": len(stored), "types": types}


def write_adapter(adapter: AdapterFile, base: Any, path: Path) -> dict[str, Any]:
    """Write an adapter for llama.cpp's --lora; `base` is transformers' skeleton of its base model, tied as its checkpoint is.

    Raises:
        AdapterError: it holds more than low-rank matrices, or adapts a tied head.
        ModelError: the architecture is not supported.
    """
    adapter = fitted(adapter, base)
    expected = adapter.expected(base)
    adapter.check_fit(expected, set())
    layers = adapter.layers(base)
    matrices = {key for _, keys in layers.values() for own, key in keys.items() if own in LORA.keys}
    if beyond := sorted(expected.keys() - matrices):
        raise AdapterError(f"A GGUF adapter holds low-rank sums only, and '{adapter.folder}' has {beyond[0]}. Merge it instead.")
    _, architecture = _architecture(base.config)
    tied = tied_aliases(base)
    if alone := [layer for layer in layers if f"{layer}.weight" in tied]:
        raise AdapterError(
            f"'{adapter.folder}' adapts '{alone[0]}', which is tied to the embedding: GGUF models hold no such tensor, and "
            f"llama.cpp needs it. Merge it first: lownibble merge {adapter.folder}"
        )
    places, of_experts = _places(base.config, architecture), experts.shapes(base)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(adapter.folder.name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.config.lora_alpha))
    if isinstance(tokens := adapter.config.alora_invocation_tokens, list):
        writer.add_key_value(INVOCATION, tokens, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    if adapter.trained_on:
        for key, value in to_metadata(adapter.trained_on).items():
            writer.add_string(key, value)
    stored: dict[str, Callable[[], np.ndarray[Any, Any]]] = {}
    for layer, (variant, keys) in layers.items():
        weight = layer if layer in of_experts else f"{layer}.weight"
        for own, key in keys.items():
            empty = variant.from_file(own, torch.empty(adapter.shapes[key], device="meta"))
            for place, part in places(weight):
                target, rows = f"{place}.{own.lower()}", part if own == "lora_B" else slice(None)
                _announce(writer, target, _some(empty, place, rows).shape, Type.F32)

                def make(layer: str = layer, own: str = own, key: str = key, place: str = place, rows: slice = rows,
                         variant: Variant = variant, weight: str = weight) -> np.ndarray[Any, Any]:  # fmt: skip
                    values = _some(variant.from_file(own, adapter.read(key).float()), place, rows)
                    if own == "lora_B":
                        values = _turned(values, weight, base.config, architecture)
                        values = values * (scale_of(layer, adapter.config) * values.shape[-1] / adapter.config.lora_alpha)
                    return values.contiguous().numpy()

                stored[target] = make
    _write(writer, path, stored)
    return {"architecture": architecture.name, "tensors": len(stored), "alpha": adapter.config.lora_alpha}


def trained_on(path: Path) -> dict[str, Any] | None:
    """Provenance of the adapter in a .gguf file (see `lora/provenance.py`), or None if it has none."""
    return from_metadata({TRAINED_ON: _string(_reader(path), TRAINED_ON) or ""})


def is_adapter(path: Path) -> bool:
    """Whether a .gguf file holds an adapter.

    Raises:
        ModelError: it is damaged.
    """
    return _string(_reader(path), gguf.Keys.General.TYPE) == str(gguf.GGUFType.ADAPTER)


def read_adapter(path: Path, base: Any, output: Path) -> dict[str, Any]:
    """Write the adapter of a .gguf file as a PEFT folder; `base` is transformers' skeleton of its base model.

    Raises:
        AdapterError: a tensor matches nothing in the base, the architecture differs, or low-rank tensors or alpha are missing.
    """
    reader = _reader(path)
    _, architecture = _architecture(base.config)
    found = _string(reader, gguf.Keys.General.ARCHITECTURE)
    if found != architecture.name:
        raise AdapterError(f"'{path}' is an adapter for {found}, and the base is {architecture.name}. Name its own with --base.")
    names = _names(base.config, architecture)
    linears = {path: module for path, module in base.named_modules() if is_linear(module)}
    path_of = {names(f"{path}.weight"): path for path in linears}
    tensors, ranks = {}, {}
    for tensor in reader.tensors:
        target, _, which = tensor.name.rpartition(".lora_")
        if "_exps." in target:
            raise AdapterError(
                f"'{path}' adapts experts ('{tensor.name}'), which is not read back. Keep the PEFT folder it is of."
            )
        if target not in path_of or which not in ("a", "b"):
            raise AdapterError(f"'{path}' has '{tensor.name}', which has no place in the base. Name its own with --base.")
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if which == "b":
            values = _turned(values, f"{path_of[target]}.weight", base.config, architecture, back=True)
            ranks[path_of[target]] = values.shape[1]
        tensors[f"{PREFIX}{path_of[target]}.lora_{which.upper()}.weight"] = values.contiguous()
    if not tensors or gguf.Keys.Adapter.LORA_ALPHA not in reader.fields:
        raise AdapterError(f"'{path}' holds no low-rank tensors, or no {gguf.Keys.Adapter.LORA_ALPHA}. Make the file again.")
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {name: rank for name, rank in ranks.items() if rank != usual}
    # llama.cpp and PEFT both divide the global alpha by each layer's own rank
    tokens = [int(token) for token in reader.fields[INVOCATION].contents()] if INVOCATION in reader.fields else None
    config = LoraConfig(
        r=usual, lora_alpha=alpha, target_modules=sorted(ranks), rank_pattern=other, alora_invocation_tokens=tokens
    )  # fmt: skip
    facts = trained_on(path) or {}
    model = {"base_model_name_or_path": facts.get("model"), "revision": facts.get("revision")}
    turned = {"fan_in_fan_out": True} if any(is_transposed(linears[path]) for path in ranks) else {}
    written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **model, **turned, **config.to_dict()}
    aside = output.parent / f".{output.name}.part"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt", **(to_metadata(facts) if facts else {})})
        (aside / CONFIG_FILE).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        if output.is_dir():
            output.rmdir()
        aside.rename(output)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Cannot write '{output}': {error}. Free some space, or choose another --output.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {"architecture": architecture.name, "tensors": len(tensors), "alpha": alpha}


def _reader(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise ModelError(f"Cannot read '{path}': {error}. The file is damaged, or no GGUF file.") from None


def _string(reader: gguf.GGUFReader, key: str) -> str | None:
    field = reader.fields.get(key)
    return None if field is None else str(field.contents())


def _architecture(config: Any) -> tuple[str, Architecture]:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"Models of type '{kind}' cannot be written as GGUF here (known: {', '.join(ARCHITECTURES)}). "
            "Write safetensors (lownibble merge) and use llama.cpp's convert_hf_to_gguf.py."
        )
    return kind, ARCHITECTURES[kind]


def _names(config: Any, architecture: Architecture) -> Callable[[str], str]:
    """Map from transformers' tensor name to llama.cpp's."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def name_of(name: str) -> str:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"llama.cpp's {architecture.name} has no place for '{name}'. Use llama.cpp's own conversion.")
        return str(found)

    return name_of


def _places(config: Any, architecture: Architecture) -> Callable[[str], list[tuple[str, slice]]]:
    """Map from transformers' tensor name to llama.cpp's names, each with the rows (output features) that go there."""
    name_of = _names(config, architecture)
    F = _first(config, "moe_intermediate_size", "intermediate_size")
    gate, up = (slice(0, None, 2), slice(1, None, 2)) if architecture.experts == "interleaved" else (slice(F), slice(F, None))

    def places(name: str) -> list[tuple[str, slice]]:
        path, _, last = name.rpartition(".")
        kind, suffix = last.removesuffix("_bias"), "bias" if last.endswith("_bias") else "weight"
        if kind not in experts.WEIGHTS:
            return [(name_of(f"{name}.weight" if last == "sinks" else name), slice(None))]
        parts = {"gate_proj": gate, "up_proj": up} if kind == "gate_up_proj" else {kind: slice(None)}
        return [(name_of(f"{path}.{part}.{suffix}"), rows) for part, rows in parts.items()]

    return places


def _some(values: Tensor, target: str, rows: slice) -> Tensor:
    """The rows (output features) of a tensor that go to `target`: of biases the last dimension, of weights the one before."""
    if values.dim() == 1:
        return values
    return values[..., rows] if target.endswith(".bias") else values[..., rows, :]


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _first(config: Any, *names: str) -> Any:
    """The first of these options that the configuration has, or None."""
    return next((found for name in names if (found := getattr(config, name, None)) is not None), None)


def _add_shape(writer: gguf.GGUFWriter, config: Any, kind: str) -> None:
    """Write what llama.cpp needs to know. The rest is fixed in its code for each architecture, and checked here.

    Raises:
        ModelError: the model differs from that.
    """
    architecture = ARCHITECTURES[kind]
    for key, value in architecture.fixed.items():
        wanted = value if isinstance(value, tuple) else (value(config) if callable(value) else value,)
        if getattr(config, key, wanted[0]) not in wanted:
            raise ModelError(
                f"llama.cpp has {config.model_type} with {key} = {wanted[0]!r} only, and this model's is "
                f"{getattr(config, key)!r}. Write safetensors (lownibble merge)."
            )
    for key in _CAPS.keys() & architecture.facts.keys():
        if getattr(config, key) is None:
            raise ModelError(
                f"llama.cpp computes {config.model_type} with {key} always, and this model has none. Write safetensors "
                "(lownibble merge)."
            )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_first(config, "intermediate_size", "n_inner") or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_first(config, "num_key_value_heads", "num_attention_heads"))
    if (eps := _first(config, "rms_norm_eps")) is not None:
        writer.add_layer_norm_rms_eps(eps)
    else:
        writer.add_layer_norm_eps(_first(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"))
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    for key, method in architecture.facts.items():
        if (value := getattr(config, key, None)) is not None:
            getattr(writer, method)(value)
    if architecture.experts:
        writer.add_expert_count(experts.number_in(config))
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(_first(config, "moe_intermediate_size", "intermediate_size"))
    if kind != "gpt2":
        _add_rope(writer, config, kind)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and (window < config.max_position_embeddings or "layer_types" in architecture.fixed):  # else llama.cpp's default
        if not architecture.window:
            raise ModelError("A sliding window cannot be written as GGUF for this architecture. Use llama.cpp's own conversion.")
        writer.add_sliding_window(window)


def _add_rope(writer: gguf.GGUFWriter, config: Any, kind: str) -> None:
    rope = _rope(config)
    part = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    writer.add_rope_dimension_count(int(_head_dim(config) * part))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if local := rope.get("local"):
        if local != {"rope_type": "default", "rope_theta": 10000.0}:
            raise ModelError(f"llama.cpp's {kind} has plain rotary angles of base 10,000 in layers with a window, not {local}.")
        writer.add_rope_freq_base_swa(10000.0)
    if rope["rope_type"] == "yarn" and kind == "gpt_oss":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] not in ("default", "llama3"):
        raise ModelError(f"Rotary scaling '{rope['rope_type']}' cannot be written as GGUF here. Use llama.cpp's own conversion.")


def _rope(config: Any) -> dict[str, Any]:
    """Rotary (RoPE) parameters, under transformers 5's names; 'local': those of layers with a window, where they differ."""
    found = {**(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})}
    if isinstance(found.get("full_attention"), dict):
        found = {**found["full_attention"], "local": found.get("sliding_attention")}
    found.setdefault("rope_theta", getattr(config, "rope_theta", 10000.0))
    found.setdefault("rope_type", "default")
    return found


def _rope_factors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """Llama 3's RoPE scaling: the tensor of divisors, one per rotary frequency; nothing for other types."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return
    dim, old = _head_dim(config), rope["original_max_position_embeddings"]
    low, high = old / rope["low_freq_factor"], old / rope["high_freq_factor"]
    factors = []
    for frequency in (1.0 / rope["rope_theta"] ** (i / dim) for i in range(0, dim, 2)):
        length = 2 * math.pi / frequency
        smooth = (old / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if length < high else rope["factor"] if length > low else between)
    yield "rope_freqs.weight", torch.tensor(factors, dtype=torch.float32)


def _turned(values: Tensor, name: str, config: Any, architecture: Architecture, back: bool = False) -> Tensor:
    """Permute rows of q and k from rotary halves to adjacent pairs (`back`: the inverse), and add 1 to norms where that is how
    they multiply; other tensors unchanged."""
    if architecture.shifted and name.endswith("norm.weight"):
        return values + 1
    sizes = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    heads = sizes.get(name.split(".")[-2])
    if not architecture.pairs or heads is None:
        return values
    half = len(values) // heads // 2
    parts = (heads, half, 2) if back else (heads, 2, half)
    return values.reshape(*parts, *values.shape[1:]).transpose(1, 2).reshape(values.shape).contiguous()


def _type_of(target: str, shape: torch.Size, wanted: Type) -> Type:
    if len(shape) == 1 or target.endswith(".bias") or ".ffn_gate_inp." in target or target.startswith("position_embd."):
        return Type.F32
    return Type.F16 if wanted == Type.Q8_0 and shape[-1] % _Q8_BLOCK else wanted


def _announce(writer: gguf.GGUFWriter, name: str, shape: torch.Size, how: Type) -> None:
    if how in (Type.F32, Type.F16):
        dtype = np.dtype(np.float32 if how == Type.F32 else np.float16)
        writer.add_tensor_info(name, list(shape), dtype, math.prod(shape) * dtype.itemsize)
    else:
        bytes_shape = gguf.quant_shape_to_byte_shape(tuple(shape), how)
        writer.add_tensor_info(name, list(bytes_shape), np.dtype(np.uint8), math.prod(bytes_shape), how)


def _encoded(values: Tensor, how: Type, name: str) -> np.ndarray[Any, Any]:
    array = values.numpy()
    if how == Type.F32:
        return array
    if how == Type.F16:
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            others = "float32 or bfloat16" if values.shape[-1] % _Q8_BLOCK else "bfloat16 or q8_0"
            raise ModelError(f"'{name}' does not fit float16: values overflow. Take --dtype {others}.")
        return half
    encoded: np.ndarray[Any, Any] = gguf.quantize(array, how)
    return encoded


def _write(
    writer: gguf.GGUFWriter, path: Path, stored: dict[str, Callable[[], np.ndarray[Any, Any]]], tell: Tell = say_nothing
) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, make in enumerate(stored.values(), 1):
            writer.write_tensor_data(make())
            tell("writing tensors", number, len(stored))
        writer.close()
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OutputError(f"Cannot write '{path}': {error}. Free some space, or choose another --output.") from error
    finally:
        writer.close()
        part.unlink(missing_ok=True)
