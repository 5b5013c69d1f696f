"""`lownibble bench chats`: what the number of turns costs, in time and memory, where a conversation has the same text.

A conversation of `N_WORDS` words is split into 10 and into 100 turns, rendered, its assistant turns found, and tokenised
(`data.encode`), with the chat template of the embedded model and, with `--peers`, those that TRL ships. A method that renders
every prefix of a conversation would cost about ten times as much for 100 turns. The two take turns; memory is Python's own peak
(`tracemalloc`), in a pass of its own.

Some templates go over all messages again for each of them (Gemma 4): then `apply_chat_template` itself costs the square of the
turns, which is measured beside it (`template_ratio`), and nothing that renders with it can cost less.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
import tracemalloc
from pathlib import Path
from typing import Any

from lownibble.config import DataConfig
from lownibble.data import Dataset, Row, encode
from lownibble.data.chat import ChatRenderer
from lownibble.errors import ConfigError, DataError
from lownibble.measuring.turns import ratio, spread

N_WORDS = 20_000
TURNS = (10, 100)
_WORDS = ("the", "a", "film", "was", "good", "bad", "plot", "actor", "very", "fine", "with", "and", "of", "scene", "story")


def bench_chats(peers: bool = False, repeats: int = 7) -> dict[str, Any]:
    """Encode the same text in few and in many turns, `repeats` times each."""
    from lownibble.models import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve("demo"))
    found, refused = {}, {}
    for name, template in {"demo": tokenizer.chat_template, **(_trl() if peers else {})}.items():
        made = copy.deepcopy(tokenizer)
        made.chat_template = template
        try:
            found[name] = _measure(made, repeats)
        except DataError as error:
            refused[name] = str(error)
    linear = {name: each for name, each in found.items() if each["template_ratio"]["median"] < TURNS[1] / TURNS[0]}
    time_of = f"time of {TURNS[1]} turns, of {TURNS[0]}, worst of"
    return {
        "workload": {"words": N_WORDS, "turns": TURNS, "rounds": repeats, "tokenizer": "demo"},
        "templates": found,
        "refused": refused,
        "headlines": {
            "templates": len(found),
            "those that go over all messages again for each": len(found) - len(linear),
            f"{time_of} the others": max(each["time_ratio"]["median"] for each in linear.values()),
            f"{time_of} all": max(each["time_ratio"]["median"] for each in found.values()),
            "memory, worst of all": max(each["memory_ratio"] for each in found.values()),
        },
    }


def _trl() -> dict[str, str]:
    """Name -> chat template that TRL ships."""
    try:
        import trl
    except ImportError:
        raise ConfigError("'bench chats --peers' takes TRL's chat templates. Install trl, or leave --peers out.") from None
    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


def _conversation(n_turns: int) -> Dataset:
    generator = random.Random(0)
    words = [generator.choice(_WORDS) for _ in range(N_WORDS)]
    size = N_WORDS // n_turns
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": " ".join(words[n * size : (n + 1) * size])} for n in range(n_turns)
    ]
    return Dataset("chats", [Row({"messages": turns}, f"chats:{n_turns}")])


def _measure(tokenizer: Any, rounds: int) -> dict[str, Any]:
    (few, many), chat = (_conversation(n) for n in TURNS), ChatRenderer(tokenizer)

    def encoded(conversation: Dataset) -> int:
        return len(encode(conversation, tokenizer, DataConfig(), 10 * N_WORDS).examples[0].input_ids)

    def seconds(conversation: Dataset) -> float:
        started = time.perf_counter()
        encoded(conversation)
        return time.perf_counter() - started

    def peak(conversation: Dataset) -> int:
        tracemalloc.start()
        try:
            encoded(conversation)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def alone(conversation: Dataset) -> float:
        started = time.perf_counter()
        chat.text(conversation.rows[0].fields["messages"])
        return time.perf_counter() - started

    tokens = [encoded(few), encoded(many)]  # warms up, too
    times = [(seconds(few), seconds(many)) for _ in range(rounds)]
    of_few, of_many = zip(*times, strict=True)
    peaks = [statistics.median(peak(each) for _ in range(3)) for each in (few, many)]
    return {
        "tokens": tokens, "seconds": [spread(of_few), spread(of_many)], "time_ratio": ratio(of_many, of_few),
        "template_ratio": ratio(*zip(*[(alone(many), alone(few)) for _ in range(rounds)], strict=True)),
        "peak_bytes": peaks, "memory_ratio": peaks[1] / peaks[0],
    }  # fmt: skip
