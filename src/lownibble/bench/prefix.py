"""`lownibble bench prefix`: time to first token of requests whose prompts begin alike, with and without the prefix cache.

A wave is `REQUESTS` requests at once, `EACH` of each adapter; all prompts begin with the same `PREFIX_TOKENS` tokens and end with
`OWN_TOKENS` of their own. Keys and values of a prefix depend on the adapter, so it is shared within one adapter only. Waves take
turns in one engine, each round with a prefix of its own:

    without   the prefix cache is off: every prompt is read
    cold      nobody has sent the prefix before: each adapter reads it once, and the adapter's other requests wait for it
    warm      the prefix of the wave before, with other ends: only these are read

and two with adapters of the same size that are active from an invocation after the prefix on (activated LoRA), so that the
prefix is the base's for all of them:

    activated without   the prefix cache is off
    activated           nobody has sent the prefix before: one request reads it, and all others wait for it

A cold wave cannot come far below the share of prompt tokens that it has to read (`read`), whatever the order: half and a little
where two requests share an adapter; with activated ones a 32nd and a little. `same` is the share of greedy tokens that are those
of the same prompts without the cache. A wave of short prompts, not counted, loads the adapters.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from lownibble.bench.serve import answers, write_adapters
from lownibble.config import ServeConfig
from lownibble.errors import ConfigError
from lownibble.measuring.turns import ratio, spread
from lownibble.serve.engine import Engine
from lownibble.serve.server import make_service

REQUESTS, EACH, PREFIX_TOKENS, OWN_TOKENS = 32, 2, 512, 32

INVOCATION = [1, 520]
"""The first of an activated adapter's own tokens."""

WAVES = ("without", "cold", "warm", "activated without", "activated")


class Wave(NamedTuple):
    """A wave's result: seconds to the first token of each request, share of prompt tokens that were read, and output tokens."""

    first_s: list[float]
    read: float
    outputs: list[list[int]]


def bench_prefix(*, peers: bool = False, repeats: int = 3, tokens: int = 8) -> dict[str, Any]:
    """Measure waves on the embedded model.

    Args:
        repeats: counted rounds of the waves, with `tokens` new tokens per request.
    Raises:
        ConfigError: `peers` is given; the comparison is with the prefix cache off.
    """
    if peers:
        raise ConfigError("'bench prefix' has no peers: it compares with the prefix cache off. Leave --peers out.")
    rounds: list[dict[str, Wave]] = []
    with tempfile.TemporaryDirectory(prefix="lownibble-prefix-") as folder:
        write_adapters(Path(folder), REQUESTS // EACH)
        write_adapters(Path(folder), REQUESTS // EACH, "b", alora_invocation_tokens=INVOCATION)
        context = PREFIX_TOKENS + OWN_TOKENS + tokens
        service = make_service(
            ServeConfig(model="demo", adapters=folder, max_batch=REQUESTS, max_context=context, cache_budget="4GB")
        )
        for kind in ("a", "b"):
            _wave(service.engine, kind, _prompts(0, 0, prefix=1), tokens, cached=False)
        for seed in range(1, 1 + repeats):
            same, other = (_prompts(seed, ends, PREFIX_TOKENS) for ends in (0, 1))
            fresh = _prompts(-seed, 0, PREFIX_TOKENS)
            waves = {
                "without": ("a", same, False), "cold": ("a", same, True), "warm": ("a", other, True),
                "activated without": ("b", fresh, False), "activated": ("b", fresh, True),
            }  # fmt: skip
            order = WAVES if seed % 2 else ("cold", "warm", "without", "activated", "activated without")
            rounds.append({
                name: _wave(service.engine, kind, prompts, tokens, cached=cached)
                for name in order for kind, prompts, cached in [waves[name]]
            })  # fmt: skip
        service.engine.close(0)
    medians = {name: [statistics.median(each[name].first_s) for each in rounds] for name in WAVES}
    figures: dict[str, dict[str, Any]] = {
        name: {
            "first_token_s": spread(medians[name]), "last_first_token_s": spread([max(each[name].first_s) for each in rounds]),
            "read": statistics.mean(each[name].read for each in rounds),
        }
        for name in WAVES
    }  # fmt: skip
    for name, plain in (("cold", "without"), ("activated", "activated without")):
        figures[name]["same"] = min(_same(each[name].outputs, each[plain].outputs) for each in rounds)
    ratios = {f"{name}_vs_without": ratio(medians[name], medians["without"]) for name in ("cold", "warm")}
    ratios["activated_vs_without"] = ratio(medians["activated"], medians["activated without"])
    workload = {
        "model": "demo", "requests": REQUESTS, "adapters": REQUESTS // EACH, "prefix_tokens": PREFIX_TOKENS,
        "own_tokens": OWN_TOKENS, "new_tokens": tokens, "rounds": repeats, "r": 16,
    }  # fmt: skip
    headlines = {f"{name}: s to the first token": one["first_token_s"]["median"] for name, one in figures.items()}
    headlines |= {name: one["median"] for name, one in ratios.items()}
    return {"workload": workload, "waves": figures, "ratios": ratios, "headlines": headlines}


def _same(ones: list[list[int]], others: list[list[int]]) -> float:
    pairs = [pair for one, other in zip(ones, others, strict=True) for pair in zip(one, other, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def _prompts(seed: int, ends: int, prefix: int) -> list[list[int]]:
    """The prompts of a wave: `prefix` tokens of this seed, then tokens of their own."""
    draw = random.Random(f"prefix {seed}")
    common = [draw.randrange(100, 40_000) for _ in range(prefix)]
    draw = random.Random(f"ends {seed} {ends}")
    own = OWN_TOKENS - len(INVOCATION)
    return [common + INVOCATION + [draw.randrange(100, 40_000) for _ in range(own)] for _ in range(REQUESTS)]


def _wave(engine: Engine, kind: str, prompts: list[list[int]], tokens: int, *, cached: bool = True) -> Wave:
    """All requests at once, of adapters of this kind, until the last has ended."""
    engine.prefix_cache = cached
    names = [f"{kind}{index % (REQUESTS // EACH)}" for index in range(len(prompts))]
    outputs, ends = answers(engine, prompts, names, tokens)
    reused = sum(end.reused_tokens for end in ends)
    return Wave([end.first_s for end in ends], 1 - reused / sum(map(len, prompts)), outputs)
