"""Generation of answers to the evaluation rows, and their scores by row.

Decoding is greedy, so that answers are reproducible. Prompts of similar length are batched, padded on the left. They are decoded
as the server does (`lownibble.decode`): by the CPU's decoder, or by transformers' modules. transformers' own loop is for what
that does not take: encoder-decoders, models whose ranks hold parts, and longer contexts than a decoder has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, StoppingCriteriaList

from lownibble import launch
from lownibble.config import DataConfig
from lownibble.data import Dataset, cut, encoder_ids, end_tokens, prompts
from lownibble.decoding import RefusedError, choose, decode
from lownibble.errors import DataError
from lownibble.models.info import pass_device
from lownibble.models.kept import KEPT
from lownibble.study import metrics
from lownibble.study.tasks import KINDS

BATCH = 16
"""Maximum prompts per generation batch."""


@torch.inference_mode()
def write_answers(
    model: Any, tokenizer: Any, questions: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Sequence[str] = ()
) -> list[str]:  # fmt: skip
    """Generate the text after each prompt (token ids), up to the end of sequence or the first of the stop strings `stop`.

    An encoder-decoder gets the prompt as in training: ended by the end-of-sequence token, padded on the right. Ranks that hold
    parts of a model all generate the same.
    """
    was_training, paired = model.training, bool(model.config.is_encoder_decoder)
    model.eval()
    device = pass_device(model)
    answers = [""] * len(questions)
    asked = [encoder_ids(ids, tokenizer.eos_token_id) if paired else list(ids) for ids in questions]
    loop = {} if paired else _own_loop(model, max_new_tokens + max(map(len, asked), default=0))
    with _greedy(model, tokenizer, max_new_tokens):
        for rows in cut([len(ids) for ids in asked], None, most=BATCH):
            width = max(len(asked[i]) for i in rows)
            first = 1 if paired else width
            gaps = [[tokenizer.pad_token_id] * (width - len(asked[i])) for i in rows]
            pieces = [(asked[i], gap) if paired else (gap, asked[i]) for i, gap in zip(rows, gaps, strict=True)]
            ids = torch.tensor([a + b for a, b in pieces], device=device)
            mask = torch.tensor([[int(paired)] * len(a) + [int(not paired)] * len(b) for a, b in pieces], device=device)
            written = model.generate(
                input_ids=ids, attention_mask=mask, **loop,
                stopping_criteria=StoppingCriteriaList([_Said(tokenizer, stop, first)]),
            )  # fmt: skip
            for i, text in zip(rows, tokenizer.batch_decode(written[:, first:], skip_special_tokens=True), strict=True):
                answers[i] = _until(text, stop)
    model.train(was_training)
    KEPT.pop(model, None)  # the memory is for what comes next
    return answers


@contextmanager
def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> Iterator[None]:
    """Set plain greedy decoding: a model's own generation config may sample or penalise repetitions.

    The tokens that end an answer are those of the model, of its generation config and of the chat template.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(end_tokens(model, tokenizer)) or None,
        bos_token_id=own.bos_token_id, decoder_start_token_id=own.decoder_start_token_id,
    )  # fmt: skip
    try:
        yield
    finally:
        model.generation_config = own


def answer_rows(
    model: Any, tokenizer: Any, kind: str, data: DataConfig, max_length: int, rows: Dataset
) -> dict[str, Any]:  # fmt: skip
    """Generate answers to the rows (`answers`) and score them by row (`row_scores`); {} if the kind is not scored by generation.
    Raises as `score_answers`. Of several ranks the first one scores."""
    asked = KINDS[kind]
    if asked.scored_by != "generation":
        return {}
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max_length if not context else min(max_length, max(1, context - asked.max_new_tokens))
    written = write_answers(
        model, tokenizer, prompts(rows, tokenizer, data, room), max_new_tokens=asked.max_new_tokens, stop=asked.stop
    )
    if launch.rank():
        return {}
    return {"answers": written, "row_scores": score_answers(kind, rows, written)}


class _Said:
    """Stopping criterion for `generate`: ends a row once its text from token `first` on contains one of `stop`.

    transformers' own criterion needs the tokenizer's vocabulary, which not every tokenizer provides.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], first: int) -> None:
        self.tokenizer, self.stop, self.first = tokenizer, stop, first

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,) bool: whether each row has ended."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.first :], skip_special_tokens=True) if self.stop else []
        said = [_until(text, self.stop) != text for text in texts] or [False] * len(input_ids)
        return torch.tensor(said, device=input_ids.device)


def _own_loop(model: Any, capacity: int) -> dict[str, Any]:
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return {}  # a part of each layer: only its own forward pass gathers the rest
    try:
        choose(model).cache(1, capacity)
    except RefusedError:
        return {}
    return {"custom_generate": decode}


def _until(text: str, stop: Sequence[str]) -> str:
    start = len(text) - len(text.lstrip())  # ignore stop strings in leading white space
    ends = [place for mark in stop if (place := text.find(mark, start)) >= 0]
    return text[: min(ends)] if ends else text


def score_answers(kind: str, rows: Dataset, answers: Sequence[str]) -> dict[str, list[float]]:
    """Metric of the kind -> score of each row.

    Raises:
        ConfigError: the scorer is not installed, or this system cannot sandbox programs.
        DataError: a row's references have an invalid format.
    """
    return {name: scores for name, scores in _SCORERS[kind](rows, answers).items() if name in KINDS[kind].metrics}


def _questions(rows: Dataset, answers: Sequence[str]) -> dict[str, list[float]]:
    pairs = [(answer, _references(row.fields, row.origin)) for row, answer in zip(rows.rows, answers, strict=True)]
    return {"f1": [metrics.f1(*pair) for pair in pairs], "exact_match": [metrics.exact_match(*pair) for pair in pairs]}


def _references(fields: dict[str, Any], origin: str) -> list[str]:
    """The row's `answers` (a list, or SQuAD's {"text": [...]}) if it has them, else its single `answer`."""
    given = fields.get("answers", [str(fields["answer"])])
    given = given.get("text") if isinstance(given, dict) else given
    if not isinstance(given, list) or not given or not all(isinstance(each, str) for each in given):
        raise DataError(f"{origin}: 'answers' must be a list of texts that is not empty. Mend the row.")
    return given


def _summaries(rows: Dataset, answers: Sequence[str]) -> dict[str, list[float]]:
    scored = [metrics.rouge(answer, row.fields["summary"]) for row, answer in zip(rows.rows, answers, strict=True)]
    return {name: [each[name] for each in scored] for name in scored[0]}


def _programs(rows: Dataset, answers: Sequence[str]) -> dict[str, list[float]]:
    for row in rows.rows:
        if not isinstance(row.fields["tests"], list) or not all(isinstance(test, str) for test in row.fields["tests"]):
            raise DataError(f"{row.origin}: 'tests' must be a list of assertions. Mend the row.")
    setups = [row.fields.get("setup") or "" for row in rows.rows]
    return {"pass@1": [float(ok) for ok in metrics.passed(answers, setups, [row.fields["tests"] for row in rows.rows])]}


def _completed(rows: Dataset, answers: Sequence[str]) -> dict[str, list[float]]:
    """HumanEval: the program is prompt + answer, and `check` of the row's test is called with the function `entry_point`."""
    programs = [row.fields["prompt"] + answer for row, answer in zip(rows.rows, answers, strict=True)]
    tests = [[row.fields["test"], f"check({row.fields['entry_point']})"] for row in rows.rows]
    return {"pass@1": [float(ok) for ok in metrics.passed(programs, [""] * len(programs), tests)]}


_SCORERS = {
    "question-answering": _questions, "summarisation": _summaries, "code": _programs, "code-completion": _completed,
}  # fmt: skip
