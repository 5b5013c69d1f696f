"""`lownibble data`: rows as a model will see them, and what is odd about them.

The same checks warn at the start of training (`warnings_of`): rows that are cut, rows that train no token which ends a turn, rows
that occur twice or on both sides of the split.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

from lownibble.config import RowsConfig, TrainConfig
from lownibble.data.preference import Beside, encode_for, sequences_of
from lownibble.data.sources import load
from lownibble.data.template import Encoded, Example, TokenCoder

BUCKETS = 12
"""Bars of the histogram of lengths."""

ENOUGH_STEPS, MOST_EPOCHS = 100, 10
"""Steps below which an adapter has hardly learned its rows; and epochs beyond which it learns them by heart."""

SHORT_RUN = "one epoch of {} training rows is a short run, which teaches little: try --num-train-epochs {}"


def inspect(config: RowsConfig) -> dict[str, Any]:
    """Tokenise a data set for a model and describe it: by side counts, lengths, odd rows; and the first rows as pieces of text.

    Raises:
        DataError, ConfigError, ModelError: as `load` and `encode`.
    """
    from lownibble.models import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(config.model, config.revision))
    sides = load(config.data)
    encoded = [encode_for(side, tokenizer, config.data, config.train) for side in sides]
    coder = TokenCoder(tokenizer)
    described = [_describe(side, len(dataset.rows), coder) for side, dataset in zip(encoded, sides, strict=True)]
    return {
        "kind": "data", "data": sides[0].name, "model": config.model, "form": encoded[0].form,
        "max_length": config.train.max_length, "training": described[0], "evaluation": described[1],
        "rows": [
            {"origin": example.origin, "tokens": _length(example), "pieces": pieces(example, tokenizer), **_answer(example)}
            for example in encoded[0].examples[: config.rows]
        ],
        "suggested_epochs": suggested_epochs(len(encoded[0].examples), config.train),
        "warnings": warnings_of(encoded, tokenizer, config.train.max_length),
    }  # fmt: skip


def _length(example: Example) -> int:
    """Tokens of a row; of a pair, of the longer sequence, which max_length is for."""
    return max(len(ids) for ids, _ in sequences_of(example))


def _answer(example: Example) -> dict[str, Any]:
    """Of a labelled answer, its label; of a pair, the number of its first piece that is the rejected sequence's."""
    if not isinstance(example.beside, Beside):
        return {}
    if example.beside.label is not None:
        return {"label": example.beside.label}
    return {"rejected_from": sum(1 for _ in itertools.groupby(sequences_of(example)[0][1]))}


def _describe(side: Encoded, n_rows: int, coder: TokenCoder) -> dict[str, Any]:
    lengths = sorted(_length(example) for example in side.examples)
    tokens = sum(len(ids) for example in side.examples for ids, _ in sequences_of(example))
    labels = sum(sum(example.is_label) for example in side.examples)
    return {
        "rows": n_rows, "tokens": tokens, "label_tokens": labels, "label_share": labels / tokens,
        "lengths": {
            "shortest": lengths[0], "median": lengths[len(lengths) // 2], "95%": lengths[int(0.95 * (len(lengths) - 1))],
            "longest": lengths[-1],
        },
        "histogram": histogram(lengths), "cut": side.n_cut, "answers_cut": side.n_answers_cut, "dropped": side.n_dropped,
        "without_an_end": len(_without_end(side, coder)), "repeated": _repeated(side),
    }  # fmt: skip


def histogram(lengths: list[int]) -> list[tuple[int, int]]:
    """(tokens up to which, rows) in at most `BUCKETS` bars of one width."""
    width = -(-max(lengths) // BUCKETS)
    counts = Counter(-(-length // width) for length in lengths)
    return [(bar * width, counts[bar]) for bar in range(min(counts), max(counts) + 1)]


def pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row's text in stretches of tokens that are trained or not; of a pair, first the chosen sequence's."""
    found = []
    for ids, is_label in sequences_of(example):
        stretches = itertools.groupby(zip(ids, is_label, strict=True), key=lambda pair: pair[1])
        found += [(tokenizer.decode([token for token, _ in stretch]), flag) for flag, stretch in stretches]
    return found


def _without_end(side: Encoded, coder: TokenCoder) -> list[Example]:
    """Rows whose last label is no special token, though nothing was cut: the model is not taught to stop there. Answers of
    preferences run to the end of what the template prints."""
    if side.form in ("preference", "unpaired"):
        return []
    longest = max((len(example.input_ids) for example in side.examples), default=0)
    ends = {*coder.special_ids, coder.tokenizer.eos_token_id}
    whole = (example for example in side.examples if not (side.n_cut and len(example.input_ids) == longest))
    return [example for example in whole if _last_label(example) not in ends]


def _last_label(example: Example) -> int:
    """The last token that is trained; the last one where an objective from outside marks none."""
    return example.input_ids[max((place for place, flag in enumerate(example.is_label) if flag), default=-1)]


def _repeated(side: Encoded) -> int:
    """Rows that are token by token another row."""
    return len(side.examples) - len({tuple(example.input_ids) for example in side.examples})


UNEVEN = 4 / 3
"""Ratio of good and bad answers, each weighted, from which KTO's authors advise other weights (section 4.2)."""


def _one_sided(side: Encoded) -> list[str]:
    good = sum(bool(example.beside.label) for example in side.examples)
    bad = len(side.examples) - good
    if not good or not bad:
        return [f"all {len(side.examples)} training rows are {'good' if good else 'bad'} answers: there is nothing to tell apart"]
    if max(good, bad) <= UNEVEN * min(good, bad):
        return []
    fewer, ratio = ("desirable_weight", bad / good) if good < bad else ("undesirable_weight", good / bad)
    return [
        f"of {len(side.examples)} training rows {good} are good answers and {bad} bad: a {fewer} of {ratio:.3g} evens them out"
    ]


def suggested_epochs(rows: int, train: TrainConfig) -> int | None:
    """Epochs that make ENOUGH_STEPS of few rows, at most MOST_EPOCHS; None if one is enough or the run's length was chosen."""
    if train.packing or train.max_steps is not None or "num_train_epochs" in train.model_fields_set:
        return None
    steps = max(1, rows // (train.batch_size * train.gradient_accumulation_steps))
    epochs = min(MOST_EPOCHS, math.ceil(ENOUGH_STEPS / steps))
    return epochs if epochs > 1 else None


def warnings_of(encoded: list[Encoded], tokenizer: Any, max_length: int) -> list[str]:
    """What a user should know of the rows of both sides before training on them."""
    coder, told = TokenCoder(tokenizer), []
    for which, side in zip(("training", "evaluation"), encoded, strict=True):
        n_rows = len(side.examples) + side.n_dropped
        where = ""
        if side.form in ("preference", "unpaired"):
            where = f": prompts on the left down to half of it, then answers at the end (in {side.n_answers_cut} rows)"
        for count, what in ((side.n_cut, f"cut{where}"), (side.n_dropped, "dropped")):
            if count:
                told.append(f"{count} of {n_rows} {which} rows are longer than max_length {max_length} and are {what}")
        if side.n_last_only:
            told.append(
                f"of {side.n_last_only} {which} conversations only the last assistant turn is trained: the chat template does "
                "not let the others be told apart"
            )
        if side.n_unsaid:
            told.append(f"the chat template leaves out the reasoning of the last turn of {side.n_unsaid} {which} conversations")
    training, evaluation = encoded
    if training.form == "unpaired":
        told += _one_sided(training)
    if endless := _without_end(training, coder):
        told.append(
            f"{len(endless)} of {len(training.examples)} training rows train no token that ends a turn ({endless[0].origin}): "
            "the model may not learn to stop"
        )
    if repeated := _repeated(training):
        told.append(f"{repeated} of {len(training.examples)} training rows repeat another one")
    known = {tuple(example.input_ids) for example in training.examples}
    if both := sum(tuple(example.input_ids) in known for example in evaluation.examples):
        told.append(f"{both} of {len(evaluation.examples)} evaluation rows are training rows, too")
    return told
