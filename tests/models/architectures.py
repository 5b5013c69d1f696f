"""Every causal architecture of the installed transformers, tiny and random.

A configuration class's default is shrunk by the names of its sizes; where sizes depend on each other in a way that names do not
tell, `SPECIAL` has them. What cannot be built that way is reported by `build` as the error that transformers gave.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 2
LARGEST = 15_000_000
"""Parameters of a model that is built; a larger one was not shrunk."""
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "inner_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "head_dim": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_shared_experts": 1,
    "max_position_embeddings": 128, "n_positions": 128, "sliding_window": 32, "state_size": 8, "mamba_d_state": 8,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "vocab_size_per_layer_input": 96, "global_head_dim": 16, "hidden_size_per_layer_input": 16, "mm_embed_dim": 64,
    "encoder_hash_byte_group_vocab": 64, "emb_dim": 64, "zero_expert_num": 2, "num_global_key_value_heads": 2,
    "position_embedding_size": 64, "ffn_hidden_size": 96, "expert_ffn_size": 32, "audio_hidden_size": 64,
    "output_proj_dims": 64, "ext_pw_out_channel": 64, "nemo_conv_channels": 64, "mm_posemb_size": 16,
    "attention_hidden_size": 64, "lru_width": 64, "rotary_dim": 8, "time_step_rank": 4, "expert_capacity": 8, "conv_dim": 64,
}  # fmt: skip
"""Names of sizes in configurations -> a small value."""

ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROTARY)},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots1": {"num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        "per_layer_config": {}, "head_dim": 32, "index_head_dim": 16, "index_n_heads": 4, "index_topk": 8,
        "shared_experts_intermediate_size": 32,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
        "hc_count": 2, "hc_lowrank": 16, "ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_size": 2, "ngram_vocab_size_base": 97,
        "heads_per_ngram": 2, "split_ngram_parts": 2, "make_ngram_vocab_size_divisible_by": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "attention_hidden_size": 128,
        "attention_head_dim": 32, "n_mamba_heads": 8, "mamba_headdim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
}  # fmt: skip
"""Sizes that names alone do not give, by `model_type`."""


def model_types() -> list[str]:
    """The `model_type` of every architecture with a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(model_type: str, vocab_size: int) -> Any:
    """A small configuration; raises what transformers raises."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**{**_shrunk(kind, vocab_size), **SPECIAL.get(model_type, {})})


def _shrunk(kind: Any, vocab_size: int) -> dict[str, Any]:
    """Small values for the sizes of a configuration class, and of those inside of it."""
    default = kind()
    held = vars(default)
    given = {name: size for name, size in SIZES.items() if isinstance(held.get(name), int)}
    given |= {name: SIZES[name] for name in ("head_dim", "n_routed_experts", "num_experts") if name in held}
    heads = next((held[name] for name in ("num_attention_heads", "n_head", "num_heads") if isinstance(held.get(name), int)), None)
    given |= {name: 4 for name in ("num_key_value_heads", "num_kv_heads") if name in given and held[name] == heads}
    kinds = vars(default).get("layer_types")
    if isinstance(kinds, (list, tuple)) and "num_hidden_layers" in given:
        different = list(dict.fromkeys(kinds))
        given["layer_types"] = (different * LAYERS)[: max(LAYERS, len(different))]
        given["num_hidden_layers"] = len(given["layer_types"])
    if "vocab_size" in vars(default):
        given |= {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if "unpadded_vocab_size" in vars(default):  # rows of the head that are used: all
        given["unpadded_vocab_size"] = vocab_size
    for name, inner in getattr(kind, "sub_configs", {}).items():
        if isinstance(inner, type) and inner.__name__ == "AutoConfig":
            inner = type(held.get(name))
        if isinstance(inner, type) and getattr(inner, "sub_configs", None) is not None:
            given[name] = {"model_type": inner.model_type, **_shrunk(inner, vocab_size)}
    return given


@contextlib.contextmanager
def quiet():
    """No messages of transformers while random models are made."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def build(model_type: str, vocab_size: int) -> Any:
    """The model with random weights, float32; raises what transformers raises."""
    with quiet():
        config = config_of(model_type, vocab_size)
        with torch.device("meta"):
            count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if count > LARGEST:
            raise ValueError(f"{count / 1e6:.0f}M parameters: its sizes have other names")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and not bool(parameter.any()):
                    parameter.normal_(0, 0.02)
        return model
