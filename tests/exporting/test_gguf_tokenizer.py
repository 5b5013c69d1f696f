"""Which tokenizers are written as GGUF, and as what. Oracle: the pieces that llama.cpp cuts a text into, by regular expressions
that are applied one after another (its unicode_regex_split), are those of the tokenizer."""

import json

import gguf
import pytest
from test_export import TEXT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers.normalizers import NFC, Lowercase, Prepend, Replace
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split
from transformers import PreTrainedTokenizerFast

from lownibble.errors import ModelError
from lownibble.exporting.gguf_tokenizer import PRE_TOKENIZERS, add_tokenizer

TEXTS = [*TEXT, "a line\n\nand\nanother", "Ångström, ½ of 12345 (and more)!\n"]
OF_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OF_QWEN2 = next(steps[0] for steps, name in PRE_TOKENIZERS.items() if name == "qwen2")
LLAMA_CPP = {"gpt-2": [OF_GPT2], "smollm": [r"\p{N}", OF_GPT2], "qwen2": [OF_QWEN2]}
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = ByteLevel(add_prefix_space=False)


def split(behavior="isolated", invert=False, last=BYTES):
    return Sequence([Split(Regex(OF_QWEN2), behavior, invert=invert), last])


BYTE_LEVEL = {
    "words": (None, WORDS, "gpt-2"),
    "a space before the text": (None, ByteLevel(add_prefix_space=True), None),
    "no words": (None, BYTES, None),
    "nothing": (None, None, None),
    "digits": (None, Sequence([Digits(individual_digits=True), WORDS]), "smollm"),
    "numbers": (None, Sequence([Digits(individual_digits=False), WORDS]), None),
    "digits, no words": (None, Sequence([Digits(individual_digits=True), BYTES]), None),
    "expression": (None, split(), "qwen2"),
    "expression by its matches": (None, split("removed", invert=True), "qwen2"),
    "expression without its matches": (None, split("removed"), None),
    "expression and words": (None, split(last=WORDS), None),
    "NFC": (NFC(), split(), "qwen2"),
    "no normalizer": (normalizers.Sequence([]), WORDS, "gpt-2"),
    "lower case": (Lowercase(), WORDS, None),
    "NFC and more": (normalizers.Sequence([NFC(), Replace(Regex(" +"), " ")]), WORDS, None),
}
BYTE_FALLBACK = {
    "Llama": (None, Metaspace(prepend_scheme="first", split=False), True),
    "Llama 2": (normalizers.Sequence([Prepend("▁"), Replace(" ", "▁")]), None, True),
    "Gemma": (Replace(" ", "▁"), Split(" ", "merged_with_previous"), False),
    "never": (None, Metaspace(prepend_scheme="never", split=False), False),
    "word by word": (None, Metaspace(prepend_scheme="never", split=True), None),
    "another mark": (None, Metaspace(replacement="_", prepend_scheme="never", split=False), None),
    "spaces kept": (None, None, None),
    "lower case": (normalizers.Sequence([Lowercase(), Replace(" ", "▁")]), None, None),
}


def tokenizer(normalizer, pre_tokenizer, **options):
    core = Tokenizer(models.BPE(**options))
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(TEXT * 3, trainer)
    return core


def pieces(core, text):
    if core.normalizer is not None:
        text = core.normalizer.normalize_str(text)
    return [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(text)] if core.pre_tokenizer is not None else [text]


def by_llama_cpp(name, text):
    found = [text]
    for expression in LLAMA_CPP[name]:
        step = Split(Regex(expression), "isolated")
        found = [inner for piece in found for inner, _ in step.pre_tokenize_str(piece)]
    return [BYTES.pre_tokenize_str(piece)[0][0] for piece in found]


def written(core, folder):
    """The `metadata` of this tokenizer."""
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>").save_pretrained(folder)
    return metadata(folder)


def metadata(folder):
    """Key of the metadata -> value."""
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, folder, 400)
    return {key.removeprefix("tokenizer.ggml."): entry.value for part in writer.kv_data for key, entry in part.items()}


@pytest.mark.parametrize("case", BYTE_LEVEL)
def test_byte_level_tokenizers_are_written_if_llama_cpp_splits_as_they_do(tmp_path, case):
    normalizer, pre_tokenizer, name = BYTE_LEVEL[case]
    core = tokenizer(normalizer, pre_tokenizer)
    same = [other for other in LLAMA_CPP if all(pieces(core, text) == by_llama_cpp(other, text) for text in TEXTS)]
    assert same == ([name] if name else [])
    if name:
        made = written(core, tmp_path)
        assert (made["model"], made["pre"]) == ("gpt2", name)
    else:
        with pytest.raises(
            ModelError, match=r"changes text by .*, which llama.cpp does not|splits text in a way that is not known"
        ):
            written(core, tmp_path)


@pytest.mark.parametrize("case", BYTE_FALLBACK)
def test_tokenizers_with_byte_fallback_are_written_if_they_mark_spaces_and_no_more(tmp_path, case):
    normalizer, pre_tokenizer, prepends = BYTE_FALLBACK[case]
    core = tokenizer(normalizer, pre_tokenizer, byte_fallback=True)
    # before a text that begins with a space, transformers' tokenizers may leave out the mark that llama.cpp puts there
    texts = [text for text in TEXTS if not text.startswith(" ")]
    same = [mark for mark in ("", "▁") if all(pieces(core, text) == [mark + text.replace(" ", "▁")] for text in texts)]
    assert same == ([] if prepends is None else ["▁" if prepends else ""])
    if prepends is not None:
        made = written(core, tmp_path)
        assert (made["model"], made["add_space_prefix"]) == ("llama", prepends)
    else:
        with pytest.raises(ModelError, match="turns spaces into ▁, and no more"):
            written(core, tmp_path)


def test_a_byte_level_tokenizer_with_byte_fallback_is_byte_level(tmp_path):
    """Such is what transformers makes of a Llama's GGUF file; no byte is left to fall back for."""
    made = written(tokenizer(None, WORDS, byte_fallback=True), tmp_path)
    assert (made["model"], made["pre"]) == ("gpt2", "gpt-2")


@pytest.mark.parametrize("begins", [False, True])
def test_whether_a_text_begins_with_bos_is_said(tmp_path, begins):
    """llama.cpp begins it so for some names of pre-tokenizers, such as Llama 3's, unless told."""
    core = tokenizer(None, split())
    if begins:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    assert (core.encode("a").ids[0] == 0) == begins
    assert written(core, tmp_path)["add_bos_token"] is begins
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    entry = {"__type": "AddedToken", "content": "<s>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": entry}))
    assert metadata(tmp_path)["add_bos_token"] is begins, "older files have the whole token"
