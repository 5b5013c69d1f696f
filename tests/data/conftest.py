"""Tiny tokenizers, built here: byte-level BPE with ChatML, with or without a BOS token in front."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{{ bos_token or '' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["Review: good film\nSentiment: positive", "a bad film\n\n", "negative\n\nuser assistant system"] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]


def build(bos: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | ({"bos_token": "<s>"} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=SPECIAL, **names)
    tokenizer.chat_template = CHATML
    return tokenizer


_PLAIN, _BOS = build(bos=False), build(bos=True)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return _PLAIN


@pytest.fixture(params=["plain", "bos"])
def any_tokenizer(request) -> PreTrainedTokenizerFast:
    return _BOS if request.param == "bos" else _PLAIN


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return _BOS
