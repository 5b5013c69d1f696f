"""Scores of answers. Oracles: SQuAD's rules by hand, rouge-score itself, programs whose outcome is known."""

import pytest

from lownibble.study import metrics


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("the Eiffel Tower", ["Eiffel Tower"], 1, 1.0),
        ("Eiffel tower!", ["The  eiffel tower."], 1, 1.0),
        ("in Paris", ["Paris"], 0, 2 / 3),
        ("London", ["Paris", "city of London"], 0, 0.5),
        ("", ["Paris"], 0, 0.0),
        ("1,000 men", ["1000 men"], 1, 1.0),
        ("a a b", ["a b b"], 0, 2 / 3),  # articles go: b against b b
        ("x x y", ["x y y"], 0, 2 / 3),
        ("anything", [], 0, 0.0),
    ],
)
def test_extracted_answers(answer, references, exact, f1):
    assert metrics.exact_match(answer, references) == exact
    assert metrics.f1(answer, references) == pytest.approx(f1)


def test_summaries():
    pytest.importorskip("rouge_score")
    found = metrics.rouge("the cats sat on the mat", "the cat sat on a mat")
    assert found["rouge1"] == pytest.approx(5 / 6)  # cats is cat
    assert found["rouge2"] == pytest.approx(3 / 5)
    assert found["rougeL"] == pytest.approx(5 / 6)
    assert metrics.rouge("", "a b")["rouge1"] == 0


def test_programs():
    completions = [
        "def double(x): return 2 * x",
        "def double(x): return x",
        "def double(x):\n    while True: pass",
        "def double(x",
    ]
    found = metrics.passed(completions, [""] * 4, [["assert double(2) == 4", "assert double(0) == 0"]] * 4, seconds=2.0)
    assert found == [True, False, False, False]
    assert metrics.passed(["y = x"], ["x = 1"], [["assert True"]]) == [False]  # the program comes before its set-up
