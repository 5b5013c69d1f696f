"""Tiny tokenizers, built here: byte-level BPE with ChatML, with or without a BOS token in front, and two that put a space before
a text: as transformers' LlamaTokenizer has it, and as older tokenizer files of such models have it."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{{ bos_token or '' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["Review: good film\nSentiment: positive", "a bad film\n\n", "negative\n\nuser assistant system"] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]


def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return core


def with_spaces_before(how: str) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    letters = ["▁", "\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if how == "first":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return core


def build(core: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | ({"bos_token": "<s>"} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=SPECIAL, **names)
    tokenizer.chat_template = CHATML
    return tokenizer


_MADE = {
    "plain": build(byte_level(), bos=False),
    "bos": build(byte_level(), bos=True),
    "first": build(with_spaces_before("first"), bos=True),
    "prepend": build(with_spaces_before("prepend"), bos=True),
}
_PLAIN, _BOS = _MADE["plain"], _MADE["bos"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return _PLAIN


@pytest.fixture(params=list(_MADE))
def any_tokenizer(request) -> PreTrainedTokenizerFast:
    return _MADE[request.param]


@pytest.fixture(params=["first", "prepend"])
def spacing_tokenizer(request) -> PreTrainedTokenizerFast:
    """One that puts a space before a text."""
    return _MADE[request.param]


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return _BOS
