"""Label data as multiple choice: which completion does the model find most likely?

For classification this scores a model without generating: the prompt is followed by each completion that occurs in the data,
and the likelier one is the answer. It asks the same of a base model that has never seen the format as of a tuned one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lownibble.config import DataConfig
from lownibble.data.forms import Recipe, as_turns, recipe_for
from lownibble.data.rows import Dataset
from lownibble.data.template import TokenCoder, render_chat, tokenise_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE_CHOICES = 20
"""Distinct completions of a completion_template up to which rows count as label data."""

MAX_LABEL_CHOICES = 200
"""The same for text + label rows, where a label is meant; beyond it, it is a value and no class."""


class Choice(NamedTuple):
    """One question: prompt ids, ids of each candidate (no end-of-sequence), index of the right one, and its origin."""

    prompt_ids: list[int]
    candidates: list[list[int]]
    answer: int
    origin: str


def choices(
    train: Dataset, evaluation: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_length: int
) -> list[Choice] | None:
    """The evaluation rows as questions over all completions of the data, in sorted order; None where it is no label data.

    Label data is text + label rows, or a `completion_template` that gives few distinct completions, each at least twice on
    average. All questions share one list of candidates. A long prompt is cut from its left so that the longest candidate
    fits.

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
    prompt_ids = coder.batch([coder.render(as_turns(prompt, "")[:1], generation=True) for prompt in prompts])
    chats = [render_chat(coder, as_turns(prompts[0], completion)) for completion in completions]
    candidates = []
    for ids, [(start, end)] in tokenise_chats(coder, chats):
        candidates.append([index for index in ids[start:end] if index not in coder.special_ids])
    return prompt_ids, candidates
