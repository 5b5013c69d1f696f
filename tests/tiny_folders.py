"""A tiny model in a hub-layout folder, with a tokenizer and data: real files, seconds to train."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

WORDS = ("good bad fine awful film plot actor scene was is the a very not positive negative : review sentiment").split()  # noqa: SIM905


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a two-layer Llama with a word tokenizer."""
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder with train.jsonl and test.jsonl of labelled sentences whose label follows from one word."""
    return write_data(tmp_path_factory.mktemp("data"))


def write_model(folder):
    """Write the model and its tokenizer; returns the folder."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eos> {% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(vocabulary), tie_word_embeddings=True, eos_token_id=1, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_t5(folder, **options):
    """Write a small encoder-decoder model with the same tokenizer; returns the folder."""
    write_model(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=len(WORDS) + 3, feed_forward_proj="gated-gelu",
        eos_token_id=1, pad_token_id=0, decoder_start_token_id=0, dropout_rate=0.0, **options,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_data(folder):
    """Write both sides of the data; returns the folder."""
    rows = [
        {"text": f"the {thing} was {extra} {word}".replace("  ", " "), "label": label}
        for thing in ("film", "plot", "actor", "scene")
        for extra in ("", "very", "not", "a", "is very", "the very")
        for word, label in (("good", "positive"), ("fine", "positive"), ("bad", "negative"), ("awful", "negative"))
    ]
    for name, part in (("train", rows[:72]), ("test", rows[72:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder
