"""Convert a tokenizer.json to a GGUF tokenizer: tokens, token types, merges, and llama.cpp's pre-tokenizer name.

Only tokenizers known to tokenize identically are written: BPE with byte fallback, or with a pre-tokenizer in `PRE_TOKENIZERS`,
every option of each step included. As in llama.cpp's own conversion, tokens differ for text that is not in NFC, where the
tokenizer normalizes to it, and with byte fallback for text that begins with a space. Whether a word that is a token is taken
whole, though merges do not lead to it (`ignore_merges`), llama.cpp knows by the pre-tokenizer's name alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from lownibble.errors import ModelError
from lownibble.stored import read_json

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES, _OWN_WORDS = (f"ByteLevel(add_prefix_space=False, use_regex={words})" for words in (False, True))
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (_OWN_WORDS,): "gpt-2",
    ("Digits(individual_digits=True)", _OWN_WORDS): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, _BYTES): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST, _BYTES): "qwen2",
    (_CASED + r"\p{N}{1,3}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1), _BYTES): "gpt-4o",
}
"""Pre-tokenizer steps of tokenizer.json (see `_step`) -> llama.cpp's pre-tokenizer name."""

_NORMALIZERS = {"NFC"}
_SPACES = {
    "Prepend(prepend='▁')", "Replace(content='▁', pattern={'String': ' '})",
    "Split(behavior='MergedWithPrevious', invert=False, pattern={'String': ' '})",
    *(f"Metaspace(prepend_scheme='{scheme}', replacement='▁', split=False)" for scheme in ("always", "first", "never")),
}  # fmt: skip
"""Steps of tokenizers with byte fallback that turn spaces into ▁, which is all that llama.cpp does to text for them."""


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a model folder, with its special tokens and chat template.

    Raises:
        ModelError: it is missing, not BPE, has an unknown normalizer or pre-tokenizer, or is larger than `vocab_size`.
    """
    file = folder / "tokenizer.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        model = found["model"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"'{file}' cannot be read ({error}), and GGUF needs a tokenizer. Save the tokenizer again.") from None
    if model.get("type") != "BPE":
        raise ModelError(
            f"'{file}' is a {model.get('type')} tokenizer; only BPE can be written as GGUF here. Use llama.cpp's own conversion."
        )
    largest = max([*model["vocab"].values(), *(added["id"] for added in found.get("added_tokens", []))], default=0)
    if largest >= vocab_size:
        raise ModelError(
            f"'{file}' has {largest + 1} tokens and the model {vocab_size} rows for them. Resize the model's embeddings first."
        )
    tokens: list[bytes] = [f"[PAD{i}]".encode() for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    # transformers' reader of GGUF files sets byte_fallback on byte-level tokenizers, too
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(found.get("pre_tokenizer")))
    falls_back = model.get("byte_fallback") and not byte_level
    byte_pieces = {f"<0x{value:02X}>" for value in range(256)} if falls_back else set()
    for token, number in model["vocab"].items():
        tokens[number] = token.encode()
        types[number] = gguf.TokenType.BYTE if token in byte_pieces else gguf.TokenType.NORMAL
    for added in found.get("added_tokens", []):
        tokens[added["id"]] = added["content"].encode()
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if falls_back:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(number) for number in range(vocab_size)])
        writer.add_add_space_prefix(_prepends(found, file))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(found, file))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    if not isinstance(read_json(folder / "tokenizer_config.json").get("add_bos_token"), bool):
        begins = Tokenizer.from_file(str(file)).encode("a").ids[:1] == [special.special_token_ids.get("bos")]
        special.add_special_token["bos"] = begins  # unsaid, llama.cpp puts one before the text for some names
    special.add_to_gguf(writer, quiet=True)


def _steps(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer of tokenizer.json, one after another."""
    if not found:
        return []
    inner = found.get("normalizers", found.get("pretokenizers"))
    return [found] if inner is None else [step for each in inner for step in _steps(each)]


def _step(step: dict[str, Any]) -> str:
    """A step and its options; of one that splits text into all matches of a regular expression, that expression."""
    pieces = (step["type"], step.get("behavior"), step.get("invert"))
    if pieces in (("Split", "Isolated", False), ("Split", "Removed", True)) and "Regex" in step["pattern"]:
        return str(step["pattern"]["Regex"])
    unsaid: dict[str, dict[str, Any]] = {
        "ByteLevel": {"use_regex": True}, "Metaspace": {"prepend_scheme": "always", "split": True},
    }  # fmt: skip
    options = {**unsaid.get(step["type"], {}), **step}
    said = ", ".join(f"{name}={options[name]!r}" for name in sorted(options.keys() - {"type", "trim_offsets"}))
    return f"{step['type']}({said})" if said else str(step["type"])


def _prepends(tokenizer: dict[str, Any], file: Path) -> bool:
    """Whether a tokenizer with byte fallback puts a space before the text: Llama's does, Gemma's does not."""
    steps = [*_steps(tokenizer.get("normalizer")), *_steps(tokenizer.get("pre_tokenizer"))]
    unknown = [step for step in map(_step, steps) if step not in _SPACES]
    if unknown or not {"Replace", "Metaspace"} & {step["type"] for step in steps}:
        raise ModelError(
            f"llama.cpp turns spaces into ▁, and no more, for a tokenizer with byte fallback, and '{file}' has "
            f"{', '.join(unknown) or 'no such step'}. Serve the merged safetensors instead."
        )
    return any(step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps)


def _pre_tokenizer(tokenizer: dict[str, Any], file: Path) -> str:
    if changes := [step for step in map(_step, _steps(tokenizer.get("normalizer"))) if step not in _NORMALIZERS]:
        raise ModelError(
            f"'{file}' changes text by {', '.join(changes)}, which llama.cpp does not. Serve the merged safetensors instead."
        )
    key = tuple(map(_step, _steps(tokenizer.get("pre_tokenizer"))))
    if key not in PRE_TOKENIZERS:
        raise ModelError(
            f"'{file}' splits text in a way that is not known here ({', '.join(key) or 'not at all'}); llama.cpp must be told "
            "its name for it. Use llama.cpp's convert_hf_to_gguf.py on the merged safetensors."
        )
    return PRE_TOKENIZERS[key]
