"""The memory budget: what of a training step to give up so that it fits, found by measuring before the first step.

A dry run sends forward and backward passes of growing size through the model, each chosen so that by the ones before it stays
within the budget: the first are a few tokens, the last the largest that fits. Memory goes up with the tokens of a pass along a
line, but for what is there at any size (the head's chunk), so a line through two measurements is right or errs on the safe
side. Optimiser states are not there yet; their bytes are known and added.

What can be given up, in the order of what it costs (`SETTINGS`): nothing but the size of the forward pass; the optimiser's
states in memory (paging; the same bits); activations (checkpointing: each layer is computed twice). The first setting that leaves
a forward pass of `ENOUGH_TOKENS` is taken, or else the one that leaves the most; smaller passes keep the processor waiting, and
cost more than checkpointing does.

On a CPU the budget is for the whole process as the system sees it (resident set), Python and libraries included; on CUDA for what
the allocator reserves on the device (the driver's context comes on top of it).

Rejected: estimating instead of measuring (the planner does that; here the model is loaded and the truth one pass away); trying
sizes until memory runs out, as others do (on a CPU the system ends the process instead of telling it).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from lownibble.errors import ConfigError

AIM = 0.98
"""Share of the budget that is planned for."""

MARGIN = {False: 1.13, True: 1.4}
"""Checkpointing or not -> how much more than in the dry run a pass may take. Passes of one size differ by what the C heap makes
of their tensors' sizes, most where tensors come and go (checkpointing); up to so much before there was a margin (log.md)."""

ENOUGH_TOKENS = {"cpu": 128, "cuda": 1024}
"""Type of device -> tokens of a forward pass from which a larger one brings less than checkpointing costs. On the CPU measured
with the embedded model (docs/log.md); on CUDA not measured."""

FIRST_TOKENS, GROWTH = 16, 4
"""Size of the first pass of the dry run, and how much larger than the last one the next may be."""

NOISE_BYTES, SLACK = 4 << 20, 1.05
"""What a refusal's estimate allows for: how far a difference between two passes may be off, since it leads from a few tokens to a
whole row; and how much more another dry run, with larger passes, may find (log.md)."""

PRECISION = 0.03
"""The search ends when the next pass would be larger by less than this."""


class Setting(NamedTuple):
    """What is given up."""

    paged: bool
    gradient_checkpointing: bool

    @property
    def words(self) -> str:
        """For a sentence: nothing, or " with ..."."""
        parts = ["paged optimiser states"] * self.paged + ["gradient checkpointing"] * self.gradient_checkpointing
        return f" with {' and '.join(parts)}" if parts else ""


SETTINGS = (Setting(False, False), Setting(True, False), Setting(False, True), Setting(True, True))
"""In the order of what they cost."""


@dataclass(frozen=True)
class Needs:
    """What a run cannot change: tokens of its longest row and of a batch as configured, how many tokens of a forward pass are
    enough on its device, and the bytes of optimiser states with each setting that is open to it."""

    longest_row: int
    whole: int
    enough: int
    state_bytes: dict[Setting, int]


class Bench(Protocol):
    """Where passes are tried."""

    def resident(self, setting: Setting) -> int:
        """Bytes in use between two passes, gradients included, optimiser states left out."""

    def size(self, tokens: int) -> int:
        """Tokens of the largest pass of at most so many that can be made of the rows."""

    def peak(self, tokens: int) -> int | None:
        """Highest bytes in use during such a pass, with the setting of the last call of `resident`; None: memory ran out."""


@dataclass(frozen=True)
class Probe:
    """One pass of the dry run, or none (0 tokens); `peak_bytes` includes the optimiser states that come later."""

    paged: bool
    gradient_checkpointing: bool
    tokens: int
    peak_bytes: int


@dataclass(frozen=True)
class Fit:
    """What was chosen. `max_tokens`: most tokens of a forward pass, None: as configured; `peak_bytes`: what is expected."""

    max_tokens: int | None
    paged: bool
    gradient_checkpointing: bool
    peak_bytes: int
    probes: tuple[Probe, ...] = ()

    @property
    def room_bytes(self) -> int:
        """What a forward and backward pass may take while it runs."""
        of_setting = [p for p in self.probes if (p.paged, p.gradient_checkpointing) == (self.paged, self.gradient_checkpointing)]
        alone = self.peak_bytes - of_setting[0].peak_bytes if of_setting else 0
        return int(MARGIN[self.gradient_checkpointing] * alone)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fit:
        """What `to_dict` gave."""
        return cls(**{**values, "probes": tuple(Probe(**probe) for probe in values["probes"])})


def choose(budget_bytes: int, needs: Needs, bench: Bench) -> Fit:
    """The cheapest way of training within a budget.

    Raises:
        ConfigError: nothing fits; says by how much, and what would.
    """
    found: list[Fit] = []
    probes: list[Probe] = []
    searches: dict[Setting, _Search] = {}
    for setting, states in needs.state_bytes.items():
        search = searches[setting] = _Search(int(AIM * budget_bytes) - states, needs, bench, setting)
        tokens = search.run()
        probes += [Probe(*setting, n, peak + states) for n, peak in search.measured]
        if tokens is None:
            continue
        expected = search.without_margin(search.at(tokens)) + states
        found.append(Fit(None if tokens == needs.whole else tokens, *setting, expected, tuple(probes)))
        if tokens >= min(needs.whole, needs.enough):
            return found[-1]
    if found:
        return max(found, key=lambda fit: fit.max_tokens or needs.whole)
    setting, search = list(searches.items())[-1]  # what gives up most; the least of all estimates would be the luckiest one
    needed = int(SLACK * (search.at(needs.longest_row) + needs.state_bytes[setting]) / AIM)
    most = search.largest()
    what = (
        f"one row of {needs.longest_row} tokens"
        if len(search.points) > 1
        else "the model with its gradients and optimiser states"
    )
    raise ConfigError(
        f"Training does not fit into a memory budget of {_size(budget_bytes)}: {what}{setting.words} takes about "
        f"{_size(needed)}, {_size(needed - budget_bytes)} more. Set "
        f"memory_budget='{_size(needed)}' (--memory-budget){f', max_length={most}' if most else ''}, or a method that "
        "takes less (qlora, lora, full)."
    )


class _Search:
    """The largest pass within a limit, by passes of growing size. `measured`: (tokens, bytes); `points`: with their margin."""

    def __init__(self, limit: int, needs: Needs, bench: Bench, setting: Setting) -> None:
        self.limit, self.needs, self.bench = limit, needs, bench
        self.resident, self.margin = bench.resident(setting), MARGIN[setting.gradient_checkpointing]
        self.measured = [(0, self.resident)]
        self.points = [(0, self.resident)]

    def run(self) -> int | None:
        """Tokens, at least those of the longest row; None: not even those fit."""
        whole, wanted = self.needs.whole, FIRST_TOKENS
        while self.points[-1][1] <= self.limit:
            tokens, last = self.bench.size(min(wanted, whole)), self.points[-1][0]
            reaches = tokens == whole or last < self.needs.longest_row <= tokens  # a row more or less decides whether it fits
            enough = tokens <= last if reaches else tokens <= last * (1 + PRECISION)
            if enough or not self._measure(tokens):
                break
            wanted = min(GROWTH * tokens, self.largest())
        tokens, peak = self.points[-1]
        if peak > self.limit:
            if len(self.points) == 2 and tokens > 1:  # for a line without what the first pass has at any size
                self._measure(tokens // 2)
                self.points.sort()
            tokens = self.bench.size(self.largest())
        return tokens if tokens >= self.needs.longest_row else None

    def _measure(self, tokens: int) -> bool:
        peak = self.bench.peak(tokens)
        if peak is not None:
            self.measured.append((tokens, peak))
            self.points.append((tokens, int(self.resident + self.margin * (peak - self.resident))))
        return peak is not None

    def without_margin(self, peak: int) -> int:
        """What is expected where at most `peak` may come."""
        return int(self.resident + (peak - self.resident) / self.margin)

    def _line(self) -> tuple[float, float]:
        """(bytes of no token, bytes of a token) by the last point and one of half its tokens or less: close ones say nothing."""
        x0, x1 = self._between()
        bytes_at = dict(self.points)
        slope = max(0.0, (bytes_at[x1] - bytes_at[x0]) / max(1, x1 - x0))
        return bytes_at[x1] - slope * x1, slope

    def _between(self) -> tuple[int, int]:
        """The tokens of the two points that the line goes through."""
        last = self.points[-1][0]
        return [n for n, _ in self.points if 2 * n <= last][-1], last

    def largest(self) -> int:
        """Tokens at which the line meets the limit, at most the whole batch."""
        start, slope = self._line()
        if start + slope * self.needs.whole <= self.limit:
            return self.needs.whole
        return max(0, int((self.limit - start) / slope)) if slope else 0

    def at(self, tokens: int) -> int:
        """Bytes of a pass of so many tokens: as measured; or by the line, and what that may be off."""
        measured = [peak for n, peak in self.points if n == tokens]
        if measured:
            return measured[-1]
        x0, x1 = self._between()
        start, slope = self._line()
        off = NOISE_BYTES * max(0, tokens - x1) / (x1 - x0) if x1 else 0.0
        return int(start + slope * tokens + off)


def _size(n_bytes: int) -> str:
    """In gigabytes (megabytes where it is less than one), never less than it is; `memory_budget` takes it."""
    unit, name, steps = (10**9, "GB", 100) if n_bytes >= 10**9 else (10**6, "MB", 1)
    return f"{math.ceil(n_bytes * steps / unit) / steps:.{len(str(steps)) - 1}f} {name}"
