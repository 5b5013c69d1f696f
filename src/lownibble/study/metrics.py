"""Metrics of generated text against references: one number per row, so that rows can be paired between methods.

Extractive answers are scored as SQuAD's own script does (v1.1: the best over all references), summaries by `rouge-score`,
programs by running them with their tests (`sandbox.py`).
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence

from lownibble.errors import ConfigError
from lownibble.study import sandbox

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
    """The answer in lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer equals a normalised reference, else 0."""
    return float(any(normalized(answer) == normalized(reference) for reference in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Word-level F1 score, the best over the references."""
    return max((_f1(normalized(answer).split(), normalized(reference).split()) for reference in references), default=0.0)


def _f1(answer: list[str], reference: list[str]) -> float:
    shared = sum((collections.Counter(answer) & collections.Counter(reference)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(answer), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def rouge(summary: str, reference: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F measures, stemmed).

    Raises:
        ConfigError: `rouge-score` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError("Summaries are scored by rouge-score. Install it: pip install 'lownibble[study]'.") from None
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, summary)
    return {name: float(score.fmeasure) for name, score in scores.items()}


def passed(
    completions: Sequence[str], setups: Sequence[str], tests: Sequence[Sequence[str]], *, seconds: float = 10.0
) -> list[bool]:
    """Whether each program passes its tests (MBPP: the program, then its setup, then assertions).

    Raises:
        ConfigError: this system cannot sandbox programs.
    """
    programs = ["\n".join([text, setup, *asserts]) for text, setup, asserts in zip(completions, setups, tests, strict=True)]
    return [outcome.passed for outcome in sandbox.run_all(programs, seconds=seconds)]
