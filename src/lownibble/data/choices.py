"""Classification data as multiple choice, scored by completion likelihood.

This scores a classifier without generating: each completion that occurs in the data is appended to the prompt, and the
likeliest is the answer. A base model that has never seen the format and a fine-tuned one are scored the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lownibble.config import DataConfig
from lownibble.data.forms import recipe_for
from lownibble.data.rows import Dataset, Problems
from lownibble.data.template import TokenCoder, Tokens, tokenise, turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE_CHOICES = 20
"""Maximum number of distinct completions for rows with a `completion_template` to count as classification data."""

MAX_LABEL_CHOICES = 200
"""The same maximum for text + label rows; with more distinct labels, the label is a value rather than a class."""


class Choice(NamedTuple):
    """One question: prompt ids, ids of each candidate (all that the row has between prompt and end of turn), index of the correct
    one, and the row's origin."""

    prompt_ids: list[int]
    candidates: list[list[int]]
    answer: int
    origin: str


def choices(
    train: Dataset, evaluation: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_length: int
) -> list[Choice] | None:
    """The evaluation rows as questions over all distinct completions (sorted); None if this is not classification data.

    Classification data is text + label rows, or rows whose `completion_template` yields few distinct completions; each must
    occur at least twice on average. All questions share one list of candidates. A prompt is what stands before the completion in
    the row as `encode` has it; a long one is truncated on the left so that the longest candidate fits, with all that follows it.

    Raises:
        DataError, ConfigError, ModelError: as `encode`.
    """
    recipe = recipe_for(train, config)
    if recipe.form != "text-label" and config.completion_template is None:
        return None
    completions = [recipe.pair(row)[1] for row in train.rows]
    answers = [recipe.pair(row)[1] for row in evaluation.rows]
    distinct = sorted({*completions, *answers})
    limit = MAX_LABEL_CHOICES if recipe.form == "text-label" else MAX_TEMPLATE_CHOICES
    if not 2 <= len(distinct) <= min(limit, (len(completions) + len(answers)) // 2):
        return None
    coder, problems = TokenCoder(tokenizer), Problems(evaluation.name)
    having = dict(zip([*completions, *answers], [*train.rows, *evaluation.rows], strict=True))
    of_completions = tokenise([having[completion] for completion in distinct], recipe, coder, problems)
    candidates = [_candidate(coder, tokens, completion) for tokens, completion in zip(of_completions, distinct, strict=True)]
    room = max_length - max(len(tokens.rest) for tokens in of_completions)
    return [
        Choice(coder.cut_left(tokens.prompt, room), candidates, distinct.index(completion), row.origin)
        for tokens, completion, row in zip(
            tokenise(evaluation.rows, recipe, coder, problems), answers, evaluation.rows, strict=True
        )
    ]


def _candidate(coder: TokenCoder, tokens: Tokens, completion: str) -> list[int]:
    """What a row has from its first label on, without what ends it: special tokens that are not the completion's own, white space
    after them, and what is no label."""
    own = set(coder.batch([completion])[0])
    end = turn_end(coder, tokens.rest, 0, max(n for n, flag in enumerate(tokens.is_label, 1) if flag))
    while end > 1 and (not tokens.is_label[end - 1] or tokens.rest[end - 1] in coder.special_ids - own):
        end -= 1
    return tokens.rest[:end]
