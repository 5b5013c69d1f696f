"""Preference rows as examples and batches (DPO, ORPO, KTO).

Text is tokenised as in `template.py`: the prompt alone, then the answer, which ends with the end-of-sequence token. Conversations
are rendered by the chat template (`chat.py`). An answer begins where its first assistant turn does, after the header, and ends
with the rendering; white space that the template puts after the last turn belongs to it, as in TRL, so that log-probabilities are
TRL's. Where a row is longer than max_length its prompt is cut on the left, alike for both answers, down to half of max_length;
what is too long then, the answers lose at their ends. TRL keeps the prompt whole and leaves out rows whose prompt alone fills
max_length: a long prompt leaves a token of the answers, which tells nothing. To keep the answers whole would leave a token of
the prompt.

*A pair is one example*, so that batches, microbatches and memory budgets deal with pairs as with any row: its tokens are the
chosen sequence, then the rejected one, each filled up with `GAP` to the length of the longer. So its length is what it takes in a
padded batch, where it becomes two sequences: first all chosen ones, then all rejected ones. Beside these a batch holds their tree
(`models/prefixes.py`), for models that compute what sequences begin with alike once.

*KTO* compares with the mean of log-ratios of prompts with answers to other prompts. As in TRL the answers of each `group` rows
(the batch size), in the order of the data, move on by one row. That does not depend on the order of training, so the reference
log-probabilities of these sequences can be computed before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lownibble.config import PREFERENCE, DataConfig, TrainConfig
from lownibble.data.batches import IGNORE, Batch, collate
from lownibble.data.forms import Form, as_turns, messages_problem, text_problem, value_problem
from lownibble.data.pairs import Preference, Said, labelled_of, pair_of
from lownibble.data.rows import Dataset, Problems, Row
from lownibble.data.template import Encoded, Example, TokenCoder, encode, tokenise_chats
from lownibble.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lownibble.models.prefixes import Prefixes

TAKEN_APART = 1000
"""Pairs that are taken apart together, into good answers and bad ones after them."""

GAP = -1
"""Fills up the shorter sequence of a pair."""


@dataclass(eq=False)
class Beside:
    """What a preference objective keeps beside an example's tokens.

    Attributes:
        n_prompt: tokens of the prompt, which its sequences share.
        label: of KTO, whether the answer is good.
        mismatched: of KTO, the prompt with the answer to another one.
        n_computed: of a pair, its tokens, of which those that both sequences begin with count once; 0: not counted.
        reference: log-probabilities under the reference model of the chosen and the rejected answer; of KTO, of the answer and
            the mismatched one. None: not computed.
    """

    n_prompt: int
    label: bool | None = None
    mismatched: Example | None = None
    n_computed: int = 0
    reference: tuple[float, float] | None = None


def check_rows(dataset: Dataset, data: DataConfig, objective: str) -> list[tuple[Row, Preference]]:
    """The preferences of all rows, for `objective` ('dpo', 'orpo' or 'kto').

    Raises:
        DataError: rows are bad (names the first few, with what to do).
        ConfigError: an option of `data` is not for preference rows.
    """
    for name in ("prompt_template", "completion_template", "trained_turns", "mask_prompt"):
        if getattr(data, name) != DataConfig.model_fields[name].default:
            raise ConfigError(f"The '{name}' of DataConfig is not for objective '{objective}'. Leave it out.")
    problems, found = Problems(dataset.name), list[tuple[Row, Preference]]()
    for row in dataset.rows:
        try:
            for preference in labelled_of(row.fields) if objective == "kto" else [pair_of(row.fields)]:
                found.append((row, _as_chat(preference) if data.use_chat_template else preference))
                _check(preference)
        except DataError as error:
            problems.add(row.origin, str(error))
    kinds = {isinstance(preference.prompt, str) for _, preference in found}
    if len(kinds) > 1:
        first = isinstance(found[0][1].prompt, str)
        other = next(row for row, preference in found if isinstance(preference.prompt, str) != first)
        problems.add(other.origin, "text among conversations, or the reverse. Give all rows of a data set one form.")
    problems.check()
    return found


def _as_chat(preference: Preference) -> Preference:
    if not isinstance(preference.prompt, str):
        return preference
    turns = [as_turns(preference.prompt, str(answer)) for answer in preference.answers]
    return preference._replace(prompt=turns[0][:1], answers=tuple(turn[1:] for turn in turns))


def _check(preference: Preference) -> None:
    names = ("chosen", "rejected") if preference.label is None else ("completion",)
    for name, said in zip(("prompt", *names), (preference.prompt, *preference.answers), strict=True):
        if isinstance(said, str):
            if problem := value_problem(said, text=True):
                raise DataError(f"'{name}' {problem}. Fill it, or remove the row.")
        elif not said:
            raise DataError(f"'{name}' has no message of its own. Mend or remove the row.")
        elif problem := messages_problem(said) or text_problem(preference.tools):
            raise DataError(f"'{name}': {problem}")
        elif name != "prompt" and said[0]["role"] != "assistant":
            raise DataError(
                f"'{name}' must begin with an assistant's message after the prompt, and begins with one of '{said[0]['role']}'. "
                "Mend the prompt, or remove the row."
            )


class _Sequences(NamedTuple):
    prompt: list[int]
    answers: list[list[int]]


def encode_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, max_length: int, objective: str, group: int
) -> Encoded:  # fmt: skip
    """Tokenise preference rows into examples whose sequences have at most `max_length` tokens.

    Args:
        objective: 'dpo' and 'kto' have labels on answers, 'orpo' on the chosen prompt too.
        group: rows among which KTO's mismatched answers are exchanged; 0: there are none.
    Raises:
        DataError: rows are bad, or have no difference left within `max_length`. ConfigError: see `check_rows`.
        ModelError: the tokenizer lacks a required chat template or end-of-sequence token.
    """
    found = _good_ones_first(check_rows(dataset, data, objective))
    coder, problems = TokenCoder(tokenizer), Problems(dataset.name)
    examples, n_cut, n_answers_cut, n_dropped = list[Example](), 0, 0, 0
    for (row, preference), sequences in zip(found, _tokenise(found, coder, problems), strict=True):
        longest = len(sequences.prompt) + max(map(len, sequences.answers))
        if longest > max_length and data.overlength == "drop":
            n_dropped += 1
            continue
        if longest > max_length and data.overlength == "error":
            problems.add(row.origin, f"it has {longest} tokens, and max_length is {max_length}. Shorten it, or raise max_length.")
        n_cut += longest > max_length
        prompt, answers = _fit(sequences, coder, max_length)
        n_answers_cut += answers != sequences.answers
        if not all(answers) or (len(answers) == 2 and answers[0] == answers[1]):
            what = "the answers are the same" if all(answers) else "an answer has no token left"
            problems.add(row.origin, f"{what} within max_length {max_length}. Raise it, or remove the row (overlength = 'drop').")
            continue
        if preference.label is None:
            examples.append(_pair(prompt, answers, row.origin, whole_chosen=objective == "orpo"))
        else:
            examples.append(_single(prompt, answers[0], row.origin, Beside(len(prompt), preference.label)))
    problems.check()
    if not examples:
        raise DataError(f"All {n_dropped} rows of '{dataset.name}' are longer than max_length {max_length}. Raise it.")
    if objective == "kto" and group:
        _mismatch(examples, group, max_length)
    form: Form = "unpaired" if objective == "kto" else "preference"
    return Encoded(examples, form, n_cut, n_dropped, n_answers_cut=n_answers_cut)


def _good_ones_first(found: list[tuple[Row, Preference]]) -> list[tuple[Row, Preference]]:
    """Labelled answers of pairs, all good ones before all bad ones of so many rows, as TRL takes pairs apart: answers that are
    exchanged with their neighbours' would else be answers to the same prompt."""
    if not any(one is other for (one, _), (other, _) in itertools.pairwise(found)):
        return found
    parts = (found[first : first + 2 * TAKEN_APART] for first in range(0, len(found), 2 * TAKEN_APART))
    return [each for part in parts for each in sorted(part, key=lambda each: not each[1].label)]


def encode_for(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, train: TrainConfig
) -> Encoded:  # fmt: skip
    """Tokenise rows for a built-in objective; others are taken for the next-token one. Raises as `encode`."""
    if train.objective in PREFERENCE:
        return encode_preferences(dataset, tokenizer, data, train.max_length, train.objective, train.batch_size)
    return encode(dataset, tokenizer, data, train.max_length)


def _tokenise(found: list[tuple[Row, Preference]], coder: TokenCoder, problems: Problems) -> list[_Sequences]:
    if not found or isinstance(found[0][1].prompt, str):
        asked = [str(preference.prompt) for _, preference in found]
        prompts = coder.prompts(asked)
        pairs = [(prompt, str(each)) for prompt, (_, of) in zip(asked, found, strict=True) for each in of.answers]
        answers = iter(coder.after([prompt for prompt, _ in pairs], [answer for _, answer in pairs]))
        return [
            _Sequences(prompt, [coder.ended(ids) for ids in itertools.islice(answers, len(of.answers))])
            for prompt, (_, of) in zip(prompts, found, strict=True)
        ]
    chats, counts = [], []
    for row, preference in found:
        try:
            chats += [_rendered(coder, preference, answer) for answer in preference.answers]
            counts.append(len(preference.answers))
        except DataError as error:
            problems.add(row.origin, str(error))
    problems.check()
    tokenised = iter(tokenise_chats(coder, chats))
    return [_parted(list(itertools.islice(tokenised, count))) for count in counts]


def _rendered(coder: TokenCoder, preference: Preference, answer: Said) -> Any:
    turns = [*preference.prompt, *answer]
    trained = [n >= len(preference.prompt) for n in range(len(turns))]
    rendered = coder.chat.rendered(turns, preference.tools, trained)  # type: ignore[arg-type]
    if not rendered.spans:
        raise DataError("the chat template prints no answer. Mend or remove the row.")
    return rendered


def _parted(tokenised: list[tuple[list[int], list[Any]]]) -> _Sequences:
    """Prompt and answers of rendered conversations: the prompt is what stands before the first trained turn in all of them."""
    n_prompt = min(spans[0][0] for _, spans in tokenised)
    first = tokenised[0][0]
    while any(ids[:n_prompt] != first[:n_prompt] for ids, _ in tokenised):
        n_prompt -= 1
    return _Sequences(first[:n_prompt], [ids[n_prompt:] for ids, _ in tokenised])


def _fit(sequences: _Sequences, coder: TokenCoder, max_length: int) -> tuple[list[int], list[list[int]]]:
    prompt = coder.cut_left(sequences.prompt, max(max_length - max(map(len, sequences.answers)), max_length // 2))
    return prompt, [answer[: max(0, max_length - len(prompt))] for answer in sequences.answers]


def _single(prompt: list[int], answer: list[int], origin: str, beside: Beside) -> Example:
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer), origin, beside)


def _pair(prompt: list[int], answers: list[list[int]], origin: str, *, whole_chosen: bool) -> Example:
    length = len(prompt) + max(map(len, answers))
    ids, is_label = list[int](), list[bool]()
    for answer, whole in zip(answers, (whole_chosen, False), strict=True):
        gap = length - len(prompt) - len(answer)
        ids += [*prompt, *answer, *[GAP] * gap]
        is_label += [*[False] * bool(prompt), *[whole] * (len(prompt) - 1), *[True] * len(answer), *[False] * gap]
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*answers, strict=False)))
    return Example(ids, is_label, origin, Beside(len(prompt), n_computed=len(prompt) + sum(map(len, answers)) - alike))


def _mismatch(examples: list[Example], group: int, max_length: int) -> None:
    for first in range(0, len(examples), group):
        part = examples[first : first + group]
        for example, other in zip(part, [part[-1], *part[:-1]], strict=True):
            n_prompt, n_other = example.beside.n_prompt, other.beside.n_prompt
            prompt, answer = example.input_ids[:n_prompt], other.input_ids[n_other:]
            answer = answer[: max(1, max_length - n_prompt)]
            example.beside.mismatched = _single(prompt, answer, example.origin, Beside(n_prompt))


def sequences_of(example: Example) -> list[tuple[list[int], list[bool]]]:
    """Token ids and label flags of an example's sequences, without gaps: a pair's chosen and rejected one, else its only one."""
    if not isinstance(example.beside, Beside) or example.beside.label is not None:
        return [(example.input_ids, example.is_label)]
    return _halves(example)


def _halves(example: Example) -> list[tuple[list[int], list[bool]]]:
    half = len(example.input_ids) // 2
    halves = (slice(0, half), slice(half, 2 * half))
    pairs = [list(zip(example.input_ids[part], example.is_label[part], strict=True)) for part in halves]
    kept = [[(token, flag) for token, flag in pair if token != GAP] for pair in pairs]
    return [([token for token, _ in pair], [flag for _, flag in pair]) for pair in kept]


@dataclass
class PreferenceBatch(Batch):
    """Padded sequences (S, T): of pairs, all chosen ones and then all rejected ones; of KTO, one a row.

    Attributes:
        n_prompt: (S,) int64, tokens of each sequence's prompt.
        reference: (rows, 2) float32, `Beside.reference` of each row, or None.
        desirable: of KTO, (rows,) bool.
        mismatched: of KTO, the prompts with the answers to others.
        pairs: whether the sequences are pairs.
        of_step: what ties the rows of a step together (`training/preference.py`), () float32, or None.
        prefixes: the sequences' tree.
    """

    n_prompt: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    desirable: torch.Tensor | None = None
    mismatched: PreferenceBatch | None = None
    pairs: bool = True
    of_step: torch.Tensor | None = None
    prefixes: Prefixes | None = None

    @property
    def n_rows(self) -> int:
        """Number of examples in the batch."""
        return len(self.input_ids) // (1 + self.pairs)

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """Move the batch to a device, without waiting for it."""
        from lownibble.transfers import to_device

        moved = super().to(device)
        assert isinstance(moved, PreferenceBatch)
        for name in ("n_prompt", "reference", "desirable", "of_step"):
            value = getattr(self, name)
            setattr(moved, name, None if value is None else to_device(value, device))
        moved.prefixes = None if self.prefixes is None else self.prefixes.to(device)
        return moved

    def joined(self, other: PreferenceBatch) -> PreferenceBatch:
        """The sequences of this batch and then those of another, both of collated rows, as one batch on the host."""
        import torch
        from torch.nn.functional import pad

        from lownibble.models.prefixes import tree

        batches = [batch.to("cpu") for batch in (self, other)]
        T = max(batch.input_ids.shape[1] for batch in batches)

        def all_of(name: str, value: int) -> torch.Tensor:
            parts = [getattr(batch, name) for batch in batches]
            return torch.cat([pad(part, (0, T - part.shape[1]), value=value) for part in parts])

        ids_ST, mask_ST = all_of("input_ids", 0), all_of("attention_mask", 0)
        sequences = [ids[:n] for ids, n in zip(ids_ST.tolist(), mask_ST.sum(1).tolist(), strict=True)]
        return PreferenceBatch(ids_ST, mask_ST, all_of("labels", IGNORE), pairs=self.pairs, prefixes=tree(sequences))


def collate_preferences(examples: Sequence[Example], pad_token_id: int, *, pairs: bool) -> PreferenceBatch:
    """Collate examples of `encode_preferences`; others (of a dry run) are halves of pairs whose gaps count as tokens, and share
    nothing with other examples."""
    import torch

    rows = None if all(isinstance(example.beside, Beside) for example in examples) else list(range(len(examples)))
    if not pairs:
        batch = _collated(list(examples), pad_token_id, rows, pairs=False)
        beside = [example.beside for example in examples]
        if all(isinstance(each, Beside) for each in beside):
            batch.n_prompt = torch.tensor([each.n_prompt for each in beside])
            batch.reference = _references(beside)
            batch.desirable = torch.tensor([bool(each.label) for each in beside])
            if all(each.mismatched is not None for each in beside):
                batch.mismatched = _collated([each.mismatched for each in beside], pad_token_id, None, pairs=False)
        return batch
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        known = isinstance(example.beside, Beside)
        whole = example if known else example._replace(input_ids=[max(0, token) for token in example.input_ids])
        for part, (ids, flags) in zip(parts, _halves(whole), strict=True):
            part.append(Example(ids, flags, example.origin))
    batch = _collated([*parts[0], *parts[1]], pad_token_id, rows and rows * 2, pairs=True)
    beside = [example.beside for example in examples]
    if all(isinstance(each, Beside) for each in beside):
        batch.n_prompt = torch.tensor([each.n_prompt for each in beside] * 2)
        batch.reference = _references(beside)
    return batch


def _collated(
    examples: list[Example], pad_token_id: int, groups: list[int] | None, *, pairs: bool
) -> PreferenceBatch:  # fmt: skip
    from lownibble.models.prefixes import tree

    plain, prefixes = collate(examples, pad_token_id), tree([example.input_ids for example in examples], groups)
    return PreferenceBatch(plain.input_ids, plain.attention_mask, plain.labels, pairs=pairs, prefixes=prefixes)


def _references(beside: list[Beside]) -> torch.Tensor | None:
    import torch

    known = [each.reference for each in beside if each.reference is not None]
    return torch.tensor(known, dtype=torch.float32) if len(known) == len(beside) else None
