"""Convert a tokenizer.json to a GGUF tokenizer: tokens, token types, merges, and llama.cpp's pre-tokenizer name.

Only tokenizers known to tokenize identically are written: BPE with byte fallback, or with a pre-tokenizer in `PRE_TOKENIZERS`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from lownibble.errors import ModelError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, "ByteLevel"): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST, "ByteLevel"): "qwen2",
    (_CASED + r"\p{N}{1,3}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1), "ByteLevel"): "gpt-4o",
}
"""Pre-tokenizer steps of tokenizer.json -> llama.cpp's pre-tokenizer name."""


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a model folder, with its special tokens and chat template.

    Raises:
        ModelError: it is missing, not BPE, has an unknown pre-tokenizer, or is larger than `vocab_size`.
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
    byte_pieces = {f"<0x{value:02X}>" for value in range(256)} if model.get("byte_fallback") else set()
    for token, number in model["vocab"].items():
        tokens[number] = token.encode()
        types[number] = gguf.TokenType.BYTE if token in byte_pieces else gguf.TokenType.NORMAL
    for added in found.get("added_tokens", []):
        tokens[added["id"]] = added["content"].encode()
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(number) for number in range(vocab_size)])
        writer.add_add_space_prefix(_prepends(found))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(found, file))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)


def _prepends(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer with byte fallback puts a space before the text: Llama's does, Gemma's does not."""
    normalizer, splitter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splitter.get("pretokenizers", [splitter])]
    return any(step.get("type") == "Prepend" or step.get("prepend_scheme", "never") != "never" for step in steps)


def _pre_tokenizer(tokenizer: dict[str, Any], file: Path) -> str:
    steps = tokenizer.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    key = tuple(part["pattern"].get("Regex", "?") if part.get("type") == "Split" else str(part.get("type")) for part in parts)
    if key not in PRE_TOKENIZERS:
        raise ModelError(
            f"'{file}' splits text in a way that is not known here ({', '.join(key)}); llama.cpp must be told its name for it. "
            "Use llama.cpp's convert_hf_to_gguf.py on the merged safetensors."
        )
    return PRE_TOKENIZERS[key]
