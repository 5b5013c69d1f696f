"""Classification data as multiple choice, scored by completion likelihood.

This scores a classifier without generating: each completion that occurs in the data is appended to the prompt, and the
likeliest is the answer. A base model that has never seen the format and a fine-tuned one are scored the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lownibble.config import DataConfig
from lownibble.data.forms import Recipe, as_turns, recipe_for
from lownibble.data.rows import Dataset
from lownibble.data.template import TokenCoder, tokenise_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE_CHOICES = 20
"""Maximum number of distinct completions for rows with a `completion_template` to count as classification data."""

MAX_LABEL_CHOICES = 200
"""The same maximum for text + label rows; with more distinct labels, the label is a value rather than a class."""


class Choice(NamedTuple):
    """One question: prompt ids, ids of each candidate (no end-of-sequence), index of the correct one, and the row's origin."""

    prompt_ids: list[int]
    candidates: list[list[int]]
    answer: int
    origin: str


def choices(
    train: Dataset, evaluation: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_length: int
) -> list[Choice] | None:
    """The evaluation rows as questions over all distinct completions (sorted); None if this is not classification data.

    Classification data is text + label rows, or rows whose `completion_template` yields few distinct completions; each must
    occur at least twice on average. All questions share one list of candidates. A long prompt is truncated on the left so that
    the longest candidate fits.

    Raises:
        DataError, ConfigError, ModelError: as `encode`.
    """
    recipe = recipe_for(train, config)
    if recipe.form != "text-label" and config.completion_template is None:
        return None
    completions = [recipe.pair(row)[1] for row in train.rows]
    pairs = [recipe.pair(row) for row in evaluation.rows]
    distinct = sorted({*completions, *(completion for _, completion in pairs)})
    limit = MAX_LABEL_CHOICES if recipe.form == "text-label" else MAX_TEMPLATE_CHOICES
    if not 2 <= len(distinct) <= min(limit, (len(completions) + len(pairs)) // 2):
        return None
    coder = TokenCoder(tokenizer)
    prompts, candidates = _tokenise(coder, recipe, [prompt for prompt, _ in pairs], distinct)
    room = max_length - max(map(len, candidates)) - 1
    return [
        Choice(coder.cut_left(ids, room), candidates, distinct.index(completion), row.origin)
        for ids, (_, completion), row in zip(prompts, pairs, evaluation.rows, strict=True)
    ]


def _tokenise(
    coder: TokenCoder, recipe: Recipe, prompts: list[str], completions: list[str]
) -> tuple[list[list[int]], list[list[int]]]:
    if not recipe.chat:
        return coder.prompts(prompts), coder.batch(completions)
    prompt_ids = coder.batch([coder.chat.text(as_turns(prompt, "")[:1], generation=True) for prompt in prompts])
    chats = [coder.chat.rendered(as_turns(prompts[0], completion)) for completion in completions]
    candidates = []
    for ids, [(start, end, _)] in tokenise_chats(coder, chats):
        candidates.append([index for index in ids[start:end] if index not in coder.special_ids])
    return prompt_ids, candidates
