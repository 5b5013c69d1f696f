"""Row forms, and the text or conversation that a row is rendered to.

The form is detected from the fields of the first row; all rows must have the same one:

    messages            a list of {role, content}, with tool calls, content parts and a weight per turn; `tools` beside it
    prompt-completion   `prompt` and `completion`, or any fields that templates render to them
    text-label          `text` and `label`, with a short default template if none is given
    text                `text` alone: language modelling
    preference          `chosen` and `rejected`, with or without `prompt` (`pairs.py`)

If a row fits several forms, the first in this list wins. Templates are `str.format` over the row's fields; a template in the
configuration takes precedence over the data set's own (`demo`), and that over the form's default. Only the fields that are used
are checked, so an empty, null or NaN cell elsewhere in the row is ignored. (JSON has no NaN: `files.py` refuses it anywhere.)

Rows in other tools' formats have been converted before (`dialects.py`). This module handles strings only; `template` tokenises
them.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from numbers import Number
from typing import Any, Literal, NamedTuple
from uuid import UUID

from lownibble.config import DataConfig
from lownibble.data.dialects import TRAIN, n_asked
from lownibble.data.pairs import PAIRED, pair_of
from lownibble.data.rows import Dataset, Problems, Row, canonical
from lownibble.data.turns import REASONING_KEYS
from lownibble.errors import ConfigError, DataError

Form = Literal["messages", "prompt-completion", "text-label", "text", "preference", "unpaired"]
"""The form of rows; 'unpaired' (answers with a label) is never detected: an objective takes other forms for it."""

FIELDS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text-label": ("text", "label"),
    "text": ("text",),
    "preference": PAIRED,
}
"""The required fields of each form, in order of precedence."""

LABEL_PROMPT = "{text}\nLabel:"
LABEL_COMPLETION = " {label}"


PLAIN = (str, Number, date, time, timedelta, UUID)
"""Types that a template prints as a reader would; dates with a time are dates, true and false are numbers."""

TRAINED = (TRAIN, "training", "weight")
"""Keys of a message that say whether its turn is trained: true or false, 1 or 0 (`weight` is OpenAI's); no template sees them."""


ASKED = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING_KEYS, *TRAINED)
"""Keys of a message that say what it says, and whether it is trained."""


class Conversation(NamedTuple):
    """Messages as the chat template takes them, the row's tools, and which messages may be trained."""

    messages: list[dict[str, Any]]
    tools: Any
    trained: list[bool]


def _is_trained(turn: dict[str, Any]) -> bool:
    return all(bool(turn[key]) for key in TRAINED if turn.get(key) is not None)


@dataclass(frozen=True)
class Recipe:
    """How the rows of one data set are rendered to text; see `recipe_for`."""

    form: Form
    prompt_template: str | None
    completion_template: str | None
    use_chat_template: bool
    trained_turns: str = "all"
    mask_prompt: bool = True

    @property
    def chat(self) -> bool:
        """Whether the tokenizer's chat template is needed."""
        return self.form == "messages" or self.use_chat_template

    def pair(self, row: Row) -> tuple[str, str]:
        """Rendered prompt and completion of a row (every form but `messages` and `text`)."""
        assert self.prompt_template is not None
        assert self.completion_template is not None
        return self.prompt_template.format(**row.fields), self.completion_template.format(**row.fields)

    def conversation(self, row: Row) -> Conversation:
        """The conversation of a row; for other forms than `messages`, its prompt and completion as two turns."""
        if self.form != "messages":
            return Conversation(as_turns(*self.pair(row)), None, [True, True])
        turns = row.fields["messages"]
        messages = [{key: value for key, value in turn.items() if key not in TRAINED} for turn in turns]
        trained = [_is_trained(turn) for turn in turns]
        if self.trained_turns == "last":
            last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
            trained = [is_trained and n == last for n, is_trained in enumerate(trained)]
        return Conversation(messages, row.fields.get("tools"), trained)

    def identity(self, row: Row) -> bytes:
        """Canonical bytes of what a row asks (of a conversation, what stands before the first answer to a user, without keys such
        as ids, which no template reads; of text alone, all of it); rows that share them share a split."""
        if self.form == "messages":
            turns = [{key: value for key, value in turn.items() if key in ASKED} for turn in row.fields["messages"]]
            roles = [turn["role"] for turn in turns]
            asked = roles.index("user") if "user" in roles else 0
            first = roles.index("assistant", asked) if "assistant" in roles[asked:] else 0
            return canonical(turns[:first] or turns)
        if self.form == "text":
            return canonical(row.fields["text"])
        if self.form == "preference":
            return canonical(pair_of(row.fields).prompt)
        assert self.prompt_template is not None
        return canonical([row.fields[name] for name in sorted(set(_field_names(self.prompt_template)))])


def as_turns(prompt: str, completion: str) -> list[dict[str, Any]]:
    """A prompt and its completion as a user and an assistant turn, stripped of surrounding white space."""
    return [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": completion.strip()}]


def recipe_for(dataset: Dataset, config: DataConfig) -> Recipe:
    """Determine the form and the templates of a data set, and check every row against them.

    Raises:
        ConfigError: a template is malformed, only one of the two is given and there is no default, or `use_chat_template` does
            not apply.
        DataError: a row lacks a field, or a field has the wrong type, is empty or NaN; or the rows have mixed forms.
    """
    if not dataset.rows:
        raise DataError(f"The data set '{dataset.name}' has no rows. Give it at least one.")
    first = dataset.rows[0]
    empty = {name for name in first.fields if all(row.fields.get(name) is None for row in dataset.rows)}
    empty = empty if _form_of(first, empty) else set()
    form = _form_of(first, empty)
    prompt = config.prompt_template
    completion = config.completion_template
    if prompt is not None or completion is not None:
        defaults = _default_templates(dataset, form)
        if defaults is None and (prompt is None or completion is None):
            missing = "prompt_template" if prompt is None else "completion_template"
            raise ConfigError(f"The '{missing}' of DataConfig is missing: these rows have no default one. Give both templates.")
        prompt, completion = (own or default for own, default in zip((prompt, completion), defaults or (None, None), strict=True))
        labelled = form == "text-label" and completion is not None and "label" in _field_names(completion)
        form = "text-label" if labelled else "prompt-completion"
    elif form is None:
        raise DataError(
            f"{first.origin}: cannot tell what these rows are; their fields are {_listed(first.fields)}. Name the fields "
            "messages, prompt + completion, text + label, text or chosen + rejected, or set prompt_template and "
            "completion_template."
        )
    else:
        prompt, completion = _default_templates(dataset, form) or (None, None)
    assert form is not None
    if config.use_chat_template and form == "text":
        raise ConfigError(
            "'use_chat_template' of DataConfig needs a prompt and a completion; these rows are text alone. Unset it."
        )
    if config.trained_turns != "all" and form != "messages":
        raise ConfigError(f"'trained_turns' of DataConfig is for conversations; these rows are of the form {form}. Unset it.")
    if config.trained_turns != "all" and not config.mask_prompt:
        raise ConfigError("'trained_turns' of DataConfig chooses turns, and mask_prompt = false trains all text. Unset one.")
    recipe = Recipe(form, prompt, completion, config.use_chat_template, config.trained_turns, config.mask_prompt)
    templated = config.prompt_template is not None or config.completion_template is not None
    _check_rows(dataset, recipe, None if templated else empty)
    return recipe


def _form_of(row: Row, empty: Collection[str] = ()) -> Form | None:
    """The form of a row; `empty`: columns without a value in any row, which decide nothing."""
    known = row.fields.keys() - set(empty)
    return next((form for form, fields in FIELDS.items() if known.issuperset(fields)), None)


def _default_templates(dataset: Dataset, form: Form | None) -> tuple[str, str] | None:
    if dataset.prompt_template is not None and dataset.completion_template is not None:
        return dataset.prompt_template, dataset.completion_template
    return {"prompt-completion": ("{prompt}", "{completion}"), "text-label": (LABEL_PROMPT, LABEL_COMPLETION)}.get(form or "")


def _field_names(template: str) -> list[str]:
    """Names of the row fields that a template uses, those inside of formats (`{text:{width}}`) too.

    Raises:
        ConfigError: the template is not a valid format string, or has a field without a name.
    """
    try:
        fields = [(name, spec or "") for _, name, spec, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"The template {template!r} is malformed: {error}. Write {{{{ and }}}} for literal braces.") from None
    names = [name for name, _ in fields]
    if not all(name and not name.isdigit() and not set(name) & set(".[") for name in names):
        raise ConfigError(
            f"The template {template!r} has a field that is no plain field name. Name a row's field, as in {{text}}."
        )
    return names + [inner for _, spec in fields for inner in _field_names(spec)]


def _check_rows(dataset: Dataset, recipe: Recipe, empty: Collection[str] | None) -> None:
    """Check every row; `empty`: see `_form_of`, None where the configuration's templates decide the form."""
    problems = Problems(dataset.name)
    if recipe.prompt_template is None or recipe.completion_template is None:
        names: list[str] = list(FIELDS[recipe.form])
    else:
        names = list(dict.fromkeys(_field_names(recipe.prompt_template) + _field_names(recipe.completion_template)))
    for row in dataset.rows:
        problem = _row_problem(row, recipe, names, None if empty is None else _form_of(row, empty))
        if problem:
            problems.add(row.origin, problem)
    problems.check()


def _row_problem(row: Row, recipe: Recipe, names: list[str], form: Form | None) -> str | None:
    """What is wrong with a row, or None. `form`: the row's own form, checked against the recipe's; None skips that check."""
    missing = [name for name in names if name not in row.fields]
    if missing:
        return f"the field '{missing[0]}' is missing; the row has {_listed(row.fields)}. Give all rows the fields they need."
    if form is not None and form != recipe.form:
        return f"a {form} row among {recipe.form} rows. Give all rows of a data set the same fields."
    if recipe.form == "messages":
        turns = row.fields["messages"]
        if problem := messages_problem(turns) or text_problem(row.fields.get("tools")):
            return problem
        untrained = next((n for n in range(n_asked(turns), len(turns)) if not _is_trained(turns[n])), None)
        if untrained is not None and not recipe.mask_prompt:
            return f"message {untrained + 1} is not to be trained, and mask_prompt = false trains all text. Unset one."
        return None
    if recipe.form == "preference":
        try:
            pair_of(row.fields)
        except DataError as error:
            return str(error)
        return None
    for name in names:
        problem = value_problem(row.fields[name], text=name in ("text", "prompt", "completion"))
        if problem:
            return f"the field '{name}' {problem}. Fill it, or remove the row."
    if recipe.form == "text":
        return None
    try:
        prompt, completion = recipe.pair(row)
    except (ValueError, TypeError, MemoryError, OverflowError) as error:
        return f"the template does not fit the row's values: {error or type(error).__name__}. Mend the template's format."
    if not prompt.strip() or not completion.strip():
        return f"the {'completion' if prompt.strip() else 'prompt'} is empty. Fill it, or remove the row."
    return None


def value_problem(value: Any, text: bool) -> str | None:
    """What is wrong with a field's value, or None; `text`: it must be text that is not empty."""
    if value is None:
        return "is null"
    if isinstance(value, (float, Decimal)) and not math.isfinite(value):
        return f"is {value}"
    if not isinstance(value, (str,) if text else PLAIN):
        return f"must be text{'' if text else ', a number or a date'}, not {type(value).__name__} ({str(value)[:40]})"
    if isinstance(value, str):
        if text and not value.strip():
            return "is empty"
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "has half of a surrogate pair, which is no character"
    return None


def messages_problem(messages: Any) -> str | None:
    """What is wrong with a conversation, and what to do, or None."""
    if not isinstance(messages, list) or not messages:
        return "'messages' must be a list of {role, content} that is not empty. Mend or remove the row."
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            return f"message {number} must be an object with 'role' and 'content'. Mend or remove the row."
        for key in TRAINED:
            if turn.get(key) not in (None, 0, 1):
                return f"the '{key}' of message {number} must be 0 or 1, and is {turn[key]!r}. Mend or remove the row."
        if problem := _calls_problem(turn.get("tool_calls")):
            return f"the tool_calls of message {number} {problem}. Mend or remove the row."
        if problem := _content_problem(turn):
            return f"the content of message {number} {problem}. Fill it, or remove the row."
    return text_problem(messages)


def text_problem(value: Any) -> str | None:
    """Whether there is text in it that no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return "a message has half of a surrogate pair, which is no character. Mend or remove the row."
    except (RecursionError, ValueError):
        return "a message is nested too deeply. Remove the row."
    return None


def _calls_problem(calls: Any) -> str | None:
    if calls is None:
        return None
    sound = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(inner := call.get("function", call), dict) and isinstance(inner.get("name"), str)
        for call in calls
    )
    return None if sound else "must be a list of {function: {name, arguments}}"


def _content_problem(turn: dict[str, Any]) -> str | None:
    content = turn.get("content")
    if isinstance(content, list):
        if not content:
            return "is an empty list"
        problem = next((problem for part in content if (problem := _part_problem(part))), None)
        text = "".join(part if isinstance(part, str) else part["text"] for part in content) if problem is None else ""
        empty = not text.strip() and turn["role"] not in ("system", "tool") and not turn.get("tool_calls")
        return problem or ("is empty" if empty else None)
    if content is None and turn.get("tool_calls"):
        return None
    problem = value_problem(content, text=True)
    may_be_empty = turn["role"] in ("system", "tool") or turn.get("tool_calls")
    return None if problem == "is empty" and may_be_empty else problem


def _part_problem(part: Any) -> str | None:
    if isinstance(part, str):
        return None
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return f"has a part that is no {{type, ...}} object ({str(part)[:40]})"
    if part["type"] != "text":
        return f"has a part of type '{part['type']}', and only text can be trained"
    if not isinstance(part.get("text"), str):
        return "has a text part without text"
    return None


def _listed(fields: dict[str, Any]) -> str:
    return ", ".join(fields) if fields else "none"
