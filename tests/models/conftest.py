"""Model folders in hub layout, written by transformers itself."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(92))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def write(tiny, tokenizer, tmp_path):
    """Writes a tiny model's folder and returns it: `write(family, shards=True, **options)`."""

    def _write(family="llama", *, shards=False, name="model", **options):
        folder = tmp_path / name
        tiny(family, **options).save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
        tokenizer.save_pretrained(folder)
        return folder

    return _write
