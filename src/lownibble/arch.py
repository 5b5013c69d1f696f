"""ModelShape: the dimensions of a model, read from a Hugging Face config.json; standard library only.

Properties of a model family that its configuration does not state (norm weights centred at zero, fused projections, biases) are
data in `FAMILIES`, by `model_type`, with the defaults of transformers' configuration class for keys that may be missing. A test
compares every parameter's name and shape with transformers' model.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lownibble.errors import ModelError


class Family(NamedTuple):
    """Properties shared by all models of a `model_type`.

    Attributes:
        names: our dimension -> the configuration's key, if it differs from `_KEYS`.
        defaults: key -> default of keys that may be missing.
        norm: 'rms' (weights centred at one), 'rms32' (as it, weighted in float32), 'rms1' (centred at zero: one is added in
            float32) or 'layer' (with bias).
        norms: number of norms per layer.
        qk_norm: query and key are normalised per head.
        qkv_bias, output_bias, mlp_bias: true, false or the configuration key that decides.
        fused: q, k and v are one projection, and so are gate and up.
        gated: the MLP has a gate. parallel: attention and MLP read the same input and are added together.
        linears: the model's names of q, k, v, o, gate, up, down (without gate: up, down).
        experts: the MLP is a mixture of experts, with two weight tensors for all of them. expert_bias: these and the router have
            biases. wide_shares: experts' shares stay in float32. clamped: their gates are clamped, and their shares are a softmax
            over the chosen ones. scaled: embeddings are scaled.
        sinks: attention has a learned score for each head besides those of the tokens, which only eager attention knows.
        head_bias: the head has a bias. rotates_a_part: partial rotary embedding (the part may be all of a head).
        encoder_decoder: two stacks; attention has a table of relative position biases instead of rotary embedding.
        kept_dense: names of linears that packed checkpoints hold dense (transformers' `_keep_in_fp32_modules`).
    """

    names: Mapping[str, str] = {}
    defaults: Mapping[str, Any] = {}
    norm: str = "rms"
    norms: int = 2
    qk_norm: bool = False
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    fused: bool = False
    gated: bool = True
    parallel: bool = False
    linears: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    experts: bool = False
    expert_bias: bool = False
    wide_shares: bool = False
    clamped: bool = False
    sinks: bool = False
    scaled: bool = False
    head_bias: bool = False
    rotates_a_part: bool = False
    encoder_decoder: bool = False
    kept_dense: tuple[str, ...] = ()


_TIED = {"tie_word_embeddings": True}


def _sizes(layers: int, hidden: int, ffn: int, heads: int, vocab: int, key_heads: int | None = None) -> dict[str, int]:
    """Sizes by their usual keys; published configurations leave out what equals the configuration class's default."""
    given = {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "vocab_size": vocab,
    }  # fmt: skip
    return given if key_heads is None else {**given, "num_key_value_heads": key_heads}


def _gemma(*sizes: int) -> dict[str, Any]:
    return {**_TIED, "head_dim": 256, **_sizes(*sizes)}


_WINDOW: dict[str, Any] = {"sliding_window": 4096}
_UNUSED_WINDOW: dict[str, Any] = {**_WINDOW, "use_sliding_window": False}
_BIASES: dict[str, Any] = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}

FAMILIES: dict[str, Family] = {
    "llama": Family(defaults=_sizes(32, 4096, 11008, 32, 32000), mlp_bias="mlp_bias", **_BIASES),
    "mistral": Family(defaults={**_WINDOW, **_sizes(32, 4096, 14336, 32, 32000, 8)}),
    "qwen2": Family(
        defaults={"max_window_layers": 28, **_UNUSED_WINDOW, **_sizes(32, 4096, 22016, 32, 151936, 32)}, qkv_bias=True
    ),
    "qwen3": Family(
        defaults={"head_dim": 128, **_UNUSED_WINDOW, "max_window_layers": 28, **_sizes(32, 4096, 22016, 32, 151936, 32)},
        qk_norm=True, **_BIASES,
    ),
    "gemma": Family(defaults=_gemma(28, 3072, 24576, 16, 256000, 16), norm="rms1", scaled=True, **_BIASES),
    "gemma2": Family(
        defaults={**_WINDOW, **_gemma(26, 2304, 9216, 8, 256000, 4)}, norm="rms1", norms=4, scaled=True, **_BIASES
    ),
    "gemma3_text": Family(
        defaults={**_WINDOW, **_gemma(26, 2304, 9216, 8, 262208, 4)}, norm="rms1", norms=4, qk_norm=True, scaled=True, **_BIASES
    ),
    "phi": Family(
        defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, **_sizes(24, 2048, 8192, 32, 51200)},
        norm="layer", norms=1, qkv_bias=True,
        output_bias=True, mlp_bias=True, gated=False, parallel=True, head_bias=True, rotates_a_part=True,
        linears=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    ),
    "phi3": Family(
        defaults=_sizes(32, 3072, 8192, 32, 32064), fused=True, rotates_a_part=True,
        linears=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "mixtral": Family(
        names={"experts": "num_local_experts", "expert_ffn": "intermediate_size", "active_experts": "num_experts_per_tok"},
        defaults={"num_experts_per_tok": 2, "num_local_experts": 8, **_sizes(32, 4096, 14336, 32, 32000, 8)}, experts=True,
        wide_shares=True,
    ),
    "qwen3_moe": Family(
        names={"experts": "num_experts", "expert_ffn": "moe_intermediate_size", "active_experts": "num_experts_per_tok"},
        defaults={
            "num_experts_per_tok": 8, "num_experts": 128, "moe_intermediate_size": 768, **_UNUSED_WINDOW,
            **_sizes(24, 2048, 6144, 32, 151936, 4)
        },
        qk_norm=True, experts=True, **_BIASES,
    ),
    "gpt_oss": Family(
        names={"experts": "num_local_experts", "expert_ffn": "intermediate_size", "active_experts": "num_experts_per_tok"},
        defaults={
            "num_experts_per_tok": 4, "num_local_experts": 128, "head_dim": 64, "sliding_window": 128, "attention_bias": True,
            **_sizes(36, 2880, 2880, 64, 201088, 8)
        },
        norm="rms32", experts=True, expert_bias=True, clamped=True, sinks=True, **_BIASES,
    ),
    "t5": Family(
        names={
            "layers": "num_layers", "hidden": "d_model", "ffn": "d_ff", "heads": "num_heads", "key_heads": "num_heads",
            "head_dim": "d_kv",
        },
        defaults={
            **_TIED, "num_layers": 6, "d_model": 512, "d_ff": 2048, "num_heads": 8, "vocab_size": 32128, "d_kv": 64,
            "feed_forward_proj": "relu", "dropout_rate": 0.1, "relative_attention_num_buckets": 32,
        },
        linears=("q", "k", "v", "o"), encoder_decoder=True, kept_dense=("wo",),
    ),
}  # fmt: skip
"""`model_type` -> its family."""

_KEYS = {
    "layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads",
    "vocab": "vocab_size", "key_heads": "num_key_value_heads", "head_dim": "head_dim",
}  # fmt: skip


class Linear(NamedTuple):
    """A linear layer in each layer of a stack: its name within the layer, its sizes, whether it has a bias, and of how many
    experts it holds the weights (0: it is no mixture's)."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (out, in), or (E, out, in) of experts."""
        matrix = (self.out_features, self.in_features)
        return (self.experts, *matrix) if self.experts else matrix


class Counts(NamedTuple):
    """What was counted in a model that was built, where there is no `Family` to compute it from.

    Attributes:
        parameters: elements of each parameter. linear, active_experts: weights of the linears, and of the experts that a token
            passes through. adapters: elements of each parameter of an adapter. active_adapters: of those that a token passes
            through.
        linears: path of each linear layer, the head left out -> the length of its weight's rows.
    """

    parameters: tuple[int, ...]
    linear: int
    active_experts: int
    adapters: tuple[int, ...]
    active_adapters: int
    linears: Mapping[str, int]


@dataclass(frozen=True)
class ModelShape:
    """A model's dimensions.

    Attributes:
        layers, linears: of a decoder-only model, or of the encoder; linears of one layer, in execution order.
        decoder_layers, decoder_linears: of an encoder-decoder model's decoder, else 0 and empty.
        buckets: rows of each stack's table of relative position biases. dropout: the dropout rate in training.
        experts, active_experts, expert_ffn: of a mixture-of-experts layer, else 0.
        activation: of the MLP. rotary_dim: the dimensions of a head that are rotated.
        window: sliding-window size in tokens if any layer has one, else None.
        plain_head: the head is a matmul without bias or transform. scaled_logits: logits are transformed after the head.
        softcap: attention scores are capped, which only eager attention supports.
        wrapper: `model_type` of the model that this is the text part of, if any.
        counts: of a model whose family is not known; then `linears` is empty.
    """

    name: str
    model_type: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    tied: bool
    linears: tuple[Linear, ...]
    activation: str
    rotary_dim: int
    experts: int = 0
    active_experts: int = 0
    expert_ffn: int = 0
    plain_head: bool = True
    scaled_logits: bool = False
    window: int | None = None
    softcap: bool = False
    decoder_layers: int = 0
    decoder_linears: tuple[Linear, ...] = ()
    buckets: int = 0
    dropout: float = 0.0
    wrapper: str = ""
    counts: Counts | None = None

    @property
    def family(self) -> Family:
        """The family of its `model_type`."""
        return FAMILIES[self.model_type]

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linears, biases left out."""
        if self.counts is not None:
            return self.counts.linear
        return sum(linear.in_features * linear.out_features for _, linear in paths(self))

    @property
    def norm_parameters(self) -> int:
        """Weights and biases of all norms."""
        family = self.family
        each = self.hidden * (2 if family.norm == "layer" else 1)
        if self.decoder_layers:
            return (2 * self.layers + 3 * self.decoder_layers + 2) * each
        return (self.layers * family.norms + 1) * each + self.layers * 2 * self.head_dim * family.qk_norm

    @property
    def expert_linears(self) -> tuple[Linear, ...]:
        """The linears of a mixture's experts in one layer, in execution order; not in `linears`."""
        if not self.experts:
            return ()
        ffn, hidden, bias = self.expert_ffn, self.hidden, self.family.expert_bias
        return (
            Linear("mlp.experts.gate_up_proj", hidden, 2 * ffn, bias, self.experts),
            Linear("mlp.experts.down_proj", ffn, hidden, bias, self.experts),
        )

    @property
    def expert_parameters(self) -> int:
        """Weights and biases of all experts, and of the routers."""
        of_experts = sum(math.prod(each.shape) + each.bias * self.experts * each.out_features for each in self.expert_linears)
        return self.layers * (of_experts + self.experts * (self.hidden + self.family.expert_bias)) if self.experts else 0

    @property
    def active_expert_parameters(self) -> int:
        """Weights of the experts that a token passes through."""
        if self.counts is not None:
            return self.counts.active_experts
        return self.layers * self.active_experts * 3 * self.expert_ffn * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        if self.counts is not None:
            return sum(self.counts.parameters)
        biases = self.layers * sum(linear.out_features for linear in self.linears if linear.bias)
        tables = self.vocab * self.hidden * (1 if self.tied else 2) + self.vocab * self.family.head_bias
        others = 2 * self.buckets * self.heads + self.layers * self.heads * self.family.sinks
        return self.linear_parameters + self.expert_parameters + self.norm_parameters + biases + tables + others


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The contents of a config.json, or of its text model's if it is of a model that takes images, too."""
    part: Mapping[str, Any] = config.get("text_config") or config
    return part


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a config.json, or of its text model's, are of a family in `FAMILIES`, with its layers."""
    config = text_part(config)
    return str(config.get("model_type", "")) in FAMILIES and not _other_layers(config)


def _other_layers(config: Mapping[str, Any]) -> str:
    """How layers, or some of them, are others than those of the model's family, or ''."""
    if config.get("qk_layernorm"):  # phi's
        return "with norms of query and key (qk_layernorm)"
    if not FAMILIES[str(config["model_type"])].experts:
        return ""
    if config.get("mlp_only_layers"):
        return "without experts (mlp_only_layers)"
    return "without experts (decoder_sparse_step)" if config.get("decoder_sparse_step") not in (None, 1) else ""


def read_shape(config: str | Path | Mapping[str, Any], name: str = "") -> ModelShape:
    """The shape that a config.json (a path, or its contents) describes; `name` is for errors.

    Raises:
        ModelError: the file cannot be read, its architecture is unknown (names the nearest known one), or fields are missing or
            invalid (names them).
    """
    if isinstance(config, (str, Path)):
        name = name or str(config)
    contents = read_config(config) if isinstance(config, (str, Path)) else config
    wrapper = str(contents.get("model_type", "")) if text_part(contents) is not contents else ""
    contents = text_part(contents)
    model_type = str(contents.get("model_type", ""))
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1, cutoff=0.3)
        raise ModelError(
            f"'{name}' is a '{model_type}', which the planner does not know. "
            f"{f'The nearest that it knows is {near[0]!r}. ' if near else ''}Known: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    if other := _other_layers(contents):
        raise ModelError(f"'{name}' has layers {other}, which the planner's own shapes do not. Trace it: --exact.")
    given = {key: value for key, value in contents.items() if value is not None}
    if "num_experts" in family.defaults and "num_local_experts" in given:
        given.setdefault("num_experts", given["num_local_experts"])  # as transformers writes it
    values = {**family.defaults, **given}
    for key in ("num_key_value_heads", "sliding_window"):  # where null is a value: as many as there are heads, and no window
        if key in contents and key not in given:
            values.pop(key, None)
    keys = {**_KEYS, **family.names}
    heads, hidden = values.get(keys["heads"]), values.get(keys["hidden"])
    values.setdefault("num_key_value_heads", heads)
    if isinstance(heads, int) and heads > 0 and isinstance(hidden, int):
        values.setdefault("head_dim", hidden // heads)
    needed = (keys["layers"], keys["hidden"])  # without these it is hardly a model's own configuration
    missing = [key for key in keys.values() if values.get(key) is None or (key in needed and key not in given)]
    if missing:
        raise ModelError(f"'{name}' lacks {', '.join(missing)}. Give the model's own config.json.")
    wrong = [f"{key} = {values[key]!r}" for key in keys.values() if not isinstance(values[key], int) or values[key] < 1]
    if wrong or values[keys["heads"]] % values[keys["key_heads"]]:
        wrong = wrong or [
            f"{keys['heads']} = {values[keys['heads']]}, no multiple of {keys['key_heads']} = {values[keys['key_heads']]}"
        ]
        raise ModelError(f"'{name}' makes no sense: {', '.join(wrong)}. Give the model's own config.json.")
    sizes = {ours: values[key] for ours, key in keys.items()}
    shape = (_two_stacks if family.encoder_decoder else _shape)(name, model_type, family, values, sizes)
    return replace(shape, wrapper=wrapper)


def read_config(path: str | Path) -> dict[str, Any]:
    """The contents of a config.json, or of the one in a folder.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"Cannot read '{path}': {error.strerror}. Give a config.json or the folder that holds one.") from None
    except ValueError as error:
        raise ModelError(f"'{path}' is not JSON: {error}. Download it again.") from None
    if not isinstance(contents, dict):
        raise ModelError(f"'{path}' is not a model's configuration. Give the model's own config.json.")
    return contents


def _shape(name: str, model_type: str, family: Family, values: Mapping[str, Any], sizes: dict[str, int]) -> ModelShape:
    def says(what: bool | str) -> bool:
        return bool(values.get(what, False)) if isinstance(what, str) else what

    hidden, heads, keys = sizes["hidden"], sizes["heads"] * sizes["head_dim"], sizes["key_heads"] * sizes["head_dim"]
    of_attention = [("q", hidden, heads), ("k", hidden, keys), ("v", hidden, keys), ("o", heads, hidden)]
    of_mlp = [("gate", hidden, sizes["ffn"])] * family.gated + [("up", hidden, sizes["ffn"]), ("down", sizes["ffn"], hidden)]
    if family.fused:
        of_attention = [("q", hidden, heads + 2 * keys), of_attention[3]]
        of_mlp = [("gate", hidden, 2 * sizes["ffn"]), of_mlp[2]]
    if family.experts:
        of_mlp = []
    bias = {"q": family.qkv_bias, "k": family.qkv_bias, "v": family.qkv_bias, "o": family.output_bias}
    linears = tuple(
        Linear(f"{'self_attn' if what in bias else 'mlp'}.{called}", n_in, n_out, says(bias.get(what, family.mlp_bias)))
        for (what, n_in, n_out), called in zip([*of_attention, *of_mlp], family.linears, strict=False)
    )
    rotary = values.get("rope_parameters") or {}
    part = rotary.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    kinds = values.get("layer_types") or ()
    windowed = bool(values.get("sliding_window"))
    if "use_sliding_window" in family.defaults:
        windowed = windowed and bool(values["use_sliding_window"])
    if kinds:
        windowed = windowed and any(kind != "full_attention" for kind in kinds)
    elif "max_window_layers" in family.defaults:
        windowed = windowed and sizes["layers"] > values["max_window_layers"]
    return ModelShape(
        name, model_type, sizes["layers"], hidden, sizes["ffn"], sizes["heads"], sizes["key_heads"], sizes["head_dim"],
        sizes["vocab"], bool(values.get("tie_word_embeddings", False)), linears,
        str(values.get("hidden_activation") or values.get("hidden_act") or "silu"), int(sizes["head_dim"] * float(part)),
        experts=sizes.get("experts", 0), active_experts=sizes.get("active_experts", 0), expert_ffn=sizes.get("expert_ffn", 0),
        window=int(values["sliding_window"]) if windowed else None,
        plain_head=not (family.head_bias or values.get("final_logit_softcapping")),
        scaled_logits=bool(values.get("final_logit_softcapping")),
        softcap=bool(values.get("attn_logit_softcapping")),
    )  # fmt: skip


def _two_stacks(
    name: str, model_type: str, family: Family, values: Mapping[str, Any], sizes: dict[str, int]
) -> ModelShape:  # fmt: skip
    hidden, inner, ffn = sizes["hidden"], sizes["heads"] * sizes["head_dim"], sizes["ffn"]
    gate, _, activation = str(values["feed_forward_proj"]).rpartition("-")
    called = ("wi_0", "wi_1") if gate == "gated" else ("wi",)

    def attention(place: str) -> list[Linear]:
        widths = ((hidden, inner), (hidden, inner), (hidden, inner), (inner, hidden))
        return [Linear(f"layer.{place}.{what}", *width, False) for what, width in zip(family.linears, widths, strict=True)]

    def mlp(place: int) -> list[Linear]:
        wide = [Linear(f"layer.{place}.DenseReluDense.{what}", hidden, ffn, False) for what in called]
        return [*wide, Linear(f"layer.{place}.DenseReluDense.wo", ffn, hidden, False)]

    own = attention("0.SelfAttention")
    return ModelShape(
        name, model_type, sizes["layers"], hidden, ffn, sizes["heads"], sizes["heads"], sizes["head_dim"], sizes["vocab"],
        bool(values["tie_word_embeddings"]), (*own, *mlp(1)),
        "gelu_new" if (gate, activation) == ("gated", "gelu") else activation, 0,
        plain_head=not values["tie_word_embeddings"], scaled_logits=bool(values["tie_word_embeddings"]),
        decoder_layers=int(values.get("num_decoder_layers") or sizes["layers"]),
        decoder_linears=(*own, *attention("1.EncDecAttention"), *mlp(2)),
        buckets=int(values["relative_attention_num_buckets"]), dropout=float(values["dropout_rate"]),
    )  # fmt: skip


def paths(shape: ModelShape) -> Iterator[tuple[str, Linear]]:
    """(full path, linear) of every layer's linears."""
    stacks = [("encoder.block", shape.layers, shape.linears), ("decoder.block", shape.decoder_layers, shape.decoder_linears)]
    if not shape.decoder_layers:
        stacks = [("model.layers", shape.layers, shape.linears)]
    for stack, layers, linears in stacks:
        for layer in range(layers):
            for linear in linears:
                yield f"{stack}.{layer}.{linear.name}", linear


def expert_paths(shape: ModelShape) -> Iterator[tuple[str, Linear]]:
    """(full path, linear) of the weights of every mixture's experts."""
    return (
        (f"model.layers.{layer}.{linear.name}", linear) for layer in range(shape.layers) for linear in shape.expert_linears
    )  # fmt: skip


def all_paths(shape: ModelShape) -> dict[str, Linear]:
    """Path -> linear of every layer's linears, those of experts included."""
    return {**dict(paths(shape)), **dict(expert_paths(shape))}
