"""Adapters on tiny models that were really saved and read again."""

import pytest


@pytest.fixture
def rows(tmp_path):
    """A file of text rows in the words of the tokenizer of `write`."""
    path = tmp_path / "rows.jsonl"
    words = [" ".join(f"w{(7 * i * i + 3 * j) % 92}" for j in range(9 + i % 4)) for i in range(24)]
    path.write_text("".join(f'{{"prompt": "{text}", "completion": " w{i} w{i + 3} w{2 * i}"}}\n' for i, text in enumerate(words)))
    return str(path)
