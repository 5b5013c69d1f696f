"""A shape of a few thousand parameters, as a config.json that `bench --model` takes."""

import json

CONFIG = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "tie_word_embeddings": False,
}  # fmt: skip
"""Widths at which torchao's NF4 has whole blocks of scales."""


def write_shape(folder):
    """Write config.json alone into a folder; returns the folder's path as text."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)
