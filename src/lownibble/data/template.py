"""Tokenise rows, with a loss mask.

*Prompt and completion* are tokenised separately and concatenated, as at inference, where the completion's tokens follow a
prompt that was tokenised alone. Tokenising them together could merge tokens across the boundary. The completion ends with the
end-of-sequence token, which is trained even if it is also the padding token. Leading special tokens (BOS) are added to the
prompt once, unless the template already contains them.

Tokenizers that put a space before a text (SentencePiece's: Llama 2, Mistral, Phi-3) would put one into the middle of a row. What
goes on after another text is therefore tokenised behind an anchor, whose tokens are taken off again (`TokenCoder.after`). An
encoder-decoder model's answer does begin a text; its tokenizers, which end every text, are left to it.

*Conversations* are rendered by the tokenizer's own chat template and tokenised whole, without further special tokens, as
`apply_chat_template` does; `chat.py` says which characters the assistant wrote. If a token reaches across such a boundary (say
before content that starts with a line break), the pieces are tokenised separately, as at inference. The token that ends a turn is
trained; white space that the template puts after it is not. Turns with weight 0 have no labels.

*Text alone* gets the end-of-sequence token, and every token but the first is a label.

A prompt is truncated on the left (leading special tokens are kept) so that the completion stays whole if it fits; text and
messages are truncated at the end.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lownibble.config import DataConfig
from lownibble.data.chat import ChatRenderer, Rendered
from lownibble.data.forms import Form, Recipe, as_turns, recipe_for
from lownibble.data.rows import Dataset, Problems, Row
from lownibble.data.turns import Span
from lownibble.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", ":", "a")
"""Texts before what goes on, the first one that a tokenizer joins to nothing."""


class Example(NamedTuple):
    """One tokenised row: T token ids, T label flags (unshifted), its origin, and what an objective keeps beside them."""

    input_ids: list[int]
    is_label: list[bool]
    origin: str
    beside: Any = None


@dataclass(frozen=True)
class Encoded:
    """A tokenised data set: its examples in row order, its form, and how many rows were longer than `max_length` and therefore
    truncated, or dropped; of how many conversations only the last assistant turn is trained, because the template does not
    let the others be told apart; in how many preferences an answer was truncated, too; and of how many conversations the template
    leaves out the last turn's reasoning."""

    examples: list[Example]
    form: Form
    n_cut: int
    n_dropped: int = 0
    n_last_only: int = 0
    n_answers_cut: int = 0
    n_unsaid: int = 0


def digest_of(sides: Iterable[Encoded]) -> str:
    """SHA-256 of all tokens and labels: what a run is trained on, whatever template, tokenizer and date made it."""
    state = hashlib.sha256()
    for side in sides:
        for example in side.examples:
            state.update(array("q", example.input_ids).tobytes() + bytes(example.is_label) + b"|")
        state.update(b"\n")
    return state.hexdigest()


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, max_length: int) -> Encoded:
    """Tokenise a data set into examples of at most `max_length` tokens, each with at least one label token.

    Raises:
        DataError: rows are bad or have no label token left (with their origins).
        ConfigError: the templates do not fit the rows, or these are preferences.
        ModelError: the tokenizer lacks a required chat template or end-of-sequence token.
    """
    recipe = recipe_for(dataset, config)
    if recipe.form == "preference":
        raise ConfigError(
            f"The rows of '{dataset.name}' are preferences (chosen, rejected). Train on them with --objective dpo, orpo or kto."
        )
    coder = TokenCoder(tokenizer)
    problems = Problems(dataset.name)
    examples: list[Example] = []
    n_cut = n_dropped = n_last_only = n_unsaid = 0
    for row, tokens in zip(dataset.rows, tokenise(dataset.rows, recipe, coder, problems), strict=True):
        ids, is_label = _fit(tokens, coder, recipe.form, max_length)
        if not config.mask_prompt:
            is_label = [True] * len(ids)
        if is_label:
            is_label[0] = False
        n_tokens = len(tokens.prompt) + len(tokens.rest)
        if n_tokens > max_length and config.overlength == "drop":
            n_dropped += 1
            continue
        if n_tokens > max_length and config.overlength == "error":
            problems.add(
                row.origin, f"it has {n_tokens} tokens, and max_length is {max_length}. Shorten it, or raise max_length."
            )
        n_cut += n_tokens > max_length
        n_last_only += tokens.last_only
        n_unsaid += tokens.unsaid
        if not any(is_label):
            problems.add(row.origin, _no_label(n_tokens, max_length, recipe.form))
        examples.append(Example(ids, is_label, row.origin))
    problems.check()
    if not examples:
        raise DataError(f"All {n_dropped} rows of '{dataset.name}' are longer than max_length {max_length}. Raise it.")
    return Encoded(examples, recipe.form, n_cut, n_dropped, n_last_only, n_unsaid=n_unsaid)


def prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: DataConfig, room: int) -> list[list[int]]:
    """Token ids of each row's prompt for generation, truncated on the left to `room` tokens.

    Raises:
        ConfigError: the rows are text alone or whole conversations.
        DataError, ModelError: as `encode`.
    """
    recipe = recipe_for(dataset, config)
    if recipe.form in ("messages", "text"):
        raise ConfigError(f"The rows of '{dataset.name}' have no prompt to answer: they are {recipe.form}. Give them one.")
    coder = TokenCoder(tokenizer)
    texts = [recipe.pair(row)[0] for row in dataset.rows]
    if recipe.chat:
        ids = coder.batch([coder.chat.text(as_turns(text, "")[:1], generation=True) for text in texts])
    else:
        ids = coder.prompts(texts)
    return [coder.cut_left(prompt, room) for prompt in ids]


class Tokens(NamedTuple):
    """A row before truncation: a prompt without labels, and the rest with its label flags."""

    prompt: list[int]
    rest: list[int]
    is_label: list[bool]
    last_only: bool = False
    unsaid: bool = False


class TokenCoder:
    """A tokenizer wrapper for training: plain ids, leading and end tokens, and chat rendering."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer

    def batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def after(self, before: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as it goes on after another ("": as a text of its own), without special tokens. A special token
        that it follows is what it follows in the tokenizer's eyes, too: some put a space after those."""
        found: dict[int, list[int]] = {}
        left = [n for n, front in enumerate(before) if front] if self.opens else []
        for anchor in ANCHORS:
            anchors = [next((token for token in self._added if before[n].endswith(token)), anchor) for n in left]
            behind = self._behind(anchors, [texts[n] for n in left])
            found |= {n: ids for n, ids in zip(left, behind, strict=True) if ids is not None}
            left = [n for n in left if n not in found]
        alone = [n for n in range(len(texts)) if n not in found]
        found |= dict(zip(alone, self.batch([texts[n] for n in alone]), strict=True))
        return [found[n] for n in range(len(texts))]

    def _behind(self, anchors: list[str], texts: list[str]) -> list[list[int] | None]:
        """Token ids of each text behind an anchor; None where its first token joins the anchor, or the tokenizer does not keep
        that: some make a space of a new line, which a text's own space would join."""
        different = list(dict.fromkeys(anchors))
        ids_of = {
            anchor: ids if self.tokenizer.decode(ids).endswith(anchor) else []
            for anchor, ids in zip(different, self.batch(different), strict=True)
        }
        fronts, whole = [ids_of[anchor] for anchor in anchors], self.batch([*map(str.__add__, anchors, texts)])
        pairs = zip(fronts, whole, strict=True)
        return [ids[len(front) :] if front and ids[: len(front)] == front else None for front, ids in pairs]

    @cached_property
    def opens(self) -> bool:
        """Whether the tokenizer puts something before a text that is not there in the middle of one."""
        whole: list[int] = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        begins, ends, masks = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "mask"))
        if ends is not None and ends in whole[1:] and (whole[:1] != [begins] or masks is not None):
            return False  # an encoder's: T5 `a </s>`, mBART `a </s> en_XX`, BART `<s> a </s>`; decoders' have no mask
        probes = [*"aZ1("]
        alone = self.batch(probes)
        pairs = [pair for anchor in ANCHORS for pair in zip(self._behind([anchor] * 4, probes), alone, strict=True)]
        known = [ids != by_itself for ids, by_itself in pairs if ids is not None]
        return bool(known) and all(known)

    @cached_property
    def _added(self) -> list[str]:
        """The tokens that text is divided at, the longest first."""
        return sorted((token.content for token in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)

    def with_ends(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        """As `batch`, with the characters [start, end) of each token; None where the tokenizer does not know them."""
        if not texts or not getattr(self.tokenizer, "is_fast", False):
            return [(ids, None) for ids in self.batch(texts)]
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))

    def alone(self, token: int) -> str:
        """The text of one token, with its white space."""
        text: str = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def front(self) -> list[int]:
        """Leading special tokens: those the tokenizer puts before a text (often BOS, often none)."""
        plain = self.batch(["a"])[0]
        whole: list[int] = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = (n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
        return whole[: next(starts, 0)]

    @cached_property
    def end(self) -> int:
        """The end-of-sequence token.

        Raises:
            ModelError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise ModelError("The tokenizer has no end-of-sequence token. Set its eos_token in tokenizer_config.json.")
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        added = (index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special)
        return frozenset(self.tokenizer.all_special_ids).union(added)

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text as the start of a sequence: with the leading special tokens, once."""
        return [ids if self._starts(ids) else self.front + ids for ids in self.batch(texts)]

    def ended(self, ids: list[int]) -> list[int]:
        """The ids, with the end-of-sequence token appended unless already there."""
        return ids if ids and ids[-1] == self.end else [*ids, self.end]

    def cut_left(self, prompt: list[int], room: int) -> list[int]:
        """Truncate a prompt on the left to `room` tokens; leading special tokens and at least one token after them are kept."""
        kept = len(self.front) if self._starts(prompt) else 0
        room = max(room, kept + 1)
        return prompt if len(prompt) <= room else prompt[:kept] + prompt[len(prompt) - room + kept :]

    @cached_property
    def chat(self) -> ChatRenderer:
        """The tokenizer's chat template."""
        return ChatRenderer(self.tokenizer)

    def _starts(self, ids: list[int]) -> bool:
        return ids[: len(self.front)] == self.front


def tokenise_chats(coder: TokenCoder, chats: list[Rendered]) -> list[tuple[list[int], list[Span]]]:
    """Token ids of each conversation, and the spans of its assistant turns in tokens."""
    result = []
    for chat, (ids, ends) in zip(chats, coder.with_ends([chat.text for chat in chats]), strict=True):
        bounds = [bound for start, end, _ in chat.spans for bound in (start, end)]
        places = None if ends is None else _places(coder, ids, ends, bounds)
        if places is None:
            pieces = [chat.text[a:b] for a, b in itertools.pairwise([0, *bounds, len(chat.text)])]
            tokenised = coder.after(["", *(chat.text[max(0, bound - 64) : bound] for bound in bounds)], pieces)
            places = list(itertools.accumulate(len(piece) for piece in tokenised))[:-1]
            ids = list(itertools.chain.from_iterable(tokenised))
        spans = [
            (start, end if chat.marked else turn_end(coder, ids, start, end), number)
            for start, end, (_, _, number) in zip(places[::2], places[1::2], chat.spans, strict=True)
        ]
        result.append((ids, spans))
    return result


def _places(coder: TokenCoder, ids: list[int], ends: list[tuple[int, int]], bounds: list[int]) -> list[int] | None:
    """Number of tokens before each of some places in the text; None where a token reaches across one."""
    lasts = [end for _, end in ends]
    places = [bisect_right(lasts, bound) for bound in bounds]

    def across(place: int, bound: int) -> bool:
        if place == len(ends) or ends[place][0] < bound:
            return place < len(ends)
        # some tokenizers' places leave out the space that a token begins with
        return (lasts[place - 1] if place else 0) < bound and coder.alone(ids[place])[:1].isspace()

    return None if any(map(across, places, bounds)) else places


def turn_end(coder: TokenCoder, ids: list[int], start: int, end: int) -> int:
    """The end of a turn, excluding white space after its closing token."""
    closing = next((n for n in range(end - 1, start - 1, -1) if ids[n] in coder.special_ids), end - 1)
    return closing + 1 if not coder.tokenizer.decode(ids[closing + 1 : end]).strip() else end


def tokenise(rows: list[Row], recipe: Recipe, coder: TokenCoder, problems: Problems) -> list[Tokens]:
    """Each row's tokens; rows that the chat template refuses are added to `problems`, and raised.

    Raises:
        DataError, ModelError: as `encode`.
    """
    if recipe.chat:
        chats = []
        for row in rows:
            try:
                chats.append(coder.chat.rendered(*recipe.conversation(row)))
            except DataError as error:
                problems.add(row.origin, str(error))
        problems.check()
        return [
            _chat_tokens(ids, spans, recipe.form)._replace(last_only=chat.only_last, unsaid=chat.unsaid)
            for (ids, spans), chat in zip(tokenise_chats(coder, chats), chats, strict=True)
        ]
    if recipe.form == "text":
        texts = coder.prompts([row.fields["text"] for row in rows])
        return [Tokens([], ended, [True] * len(ended)) for ended in map(coder.ended, texts)]
    pairs = [recipe.pair(row) for row in rows]
    asked = [prompt for prompt, _ in pairs]
    prompts = coder.prompts(asked)
    completions = [coder.ended(ids) for ids in coder.after(asked, [completion for _, completion in pairs])]
    return [Tokens(prompt, rest, [True] * len(rest)) for prompt, rest in zip(prompts, completions, strict=True)]


def _chat_tokens(ids: list[int], spans: list[Span], form: Form) -> Tokens:
    is_label = [False] * len(ids)
    for start, end, _ in spans:
        is_label[start:end] = [True] * (end - start)
    n_prompt = 0 if form == "messages" else spans[0][0]
    return Tokens(ids[:n_prompt], ids[n_prompt:], is_label[n_prompt:])


def _fit(tokens: Tokens, coder: TokenCoder, form: Form, max_length: int) -> tuple[list[int], list[bool]]:
    prompt = tokens.prompt
    if form not in ("messages", "text"):
        prompt = coder.cut_left(prompt, max_length - len(tokens.rest))
    ids, is_label = prompt + tokens.rest, [False] * len(prompt) + tokens.is_label
    return ids[:max_length], is_label[:max_length]


def _no_label(n_tokens: int, max_length: int, form: Form) -> str:
    if n_tokens > max_length:
        return (
            f"no label token is left of its {n_tokens} tokens within max_length {max_length}. "
            "Raise max_length, or shorten or remove the row."
        )
    cause = "it has no assistant turn that is trained" if form == "messages" else f"it has {n_tokens} token"
    return f"no label token: {cause}. Mend or remove the row."
