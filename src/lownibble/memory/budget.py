"""Fit a training step to a memory budget, by measuring microbatches in a dry run before the first step.

The dry run executes microbatches of growing size, each predicted from the previous ones to stay within the budget: the first have
a few tokens, the last is the largest that fits. Memory grows linearly with the tokens of a microbatch, apart from buffers of
constant size (the head's chunk), so a line through two measurements is exact or errs on the safe side. Optimiser states are not
allocated yet; their bytes are known and added.

Memory is saved in order of increasing cost (`SETTINGS`): only smaller microbatches; paged optimiser states (bit-identical);
gradient checkpointing (each layer's forward is computed twice); on CUDA, checkpoints in host memory (copied there and back, at no
time of their own if rows are long). The first setting that allows a microbatch of `ENOUGH_TOKENS`, or
the whole batch, is chosen, otherwise the one with the largest microbatch; smaller microbatches underuse the processor and cost
more than checkpointing does.

On a CPU the budget is for the resident set size of the process, Python and libraries included; on CUDA for what the allocator
reserves on the device (the driver's context is not included).

Rejected: estimating instead of measuring (the planner does that; here the model is loaded and can be measured); trying sizes
until memory runs out, as others do (on a CPU the system kills the process instead of reporting an error).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from lownibble.config import CHECKPOINTING, Checkpointing
from lownibble.errors import ConfigError

AIM = 0.98
"""Share of the budget that is used as the target."""

MARGIN: dict[Checkpointing, float] = {False: 1.13, True: 1.4, "offload": 1.4}
"""Gradient checkpointing -> safety factor on a microbatch's memory in the dry run. Equal-sized microbatches differ by C heap
fragmentation, most with checkpointing, which allocates and frees more: by up to almost this factor when measured (log.md)."""

ENOUGH_TOKENS = {"cpu": 128, "cuda": 1024}
"""Device type -> microbatch tokens above which a larger microbatch gains less than checkpointing costs. Measured with the
embedded model on the CPU (docs/log.md); not measured on CUDA."""

FIRST_TOKENS, GROWTH = 16, 4
"""Tokens of the dry run's first microbatch; maximum growth factor from one microbatch to the next."""

NOISE_BYTES, SLACK = 4 << 20, 1.05
"""Allowances in the estimate of the error message: measurement noise in the difference between two microbatches, which is
extrapolated from a few tokens to a whole row; and how much more another dry run with larger microbatches may find (log.md)."""

PRECISION = 0.03
"""The search ends when the next microbatch would be larger by at most this share."""


class Setting(NamedTuple):
    """Memory-saving options of a run."""

    paged: bool
    gradient_checkpointing: Checkpointing

    @property
    def words(self) -> str:
        """Phrase for a message: empty, or " with ..."."""
        how = self.gradient_checkpointing
        parts = ["paged optimiser states"] * self.paged + ([WORDS[how]] if how else [])
        return f" with {' and '.join(parts)}" if parts else ""


WORDS: dict[Checkpointing, str] = {True: "gradient checkpointing", "offload": "offloaded gradient checkpointing"}

SETTINGS = tuple(Setting(paged, how) for how in CHECKPOINTING for paged in (False, True))
"""In order of increasing cost."""


@dataclass(frozen=True)
class Needs:
    """Fixed requirements of a run: tokens of the longest row and of a batch as configured, microbatch tokens that are enough on
    its device, and resident bytes of optimiser states for each available setting."""

    longest_row: int
    whole: int
    enough: int
    state_bytes: dict[Setting, int]


class Bench(Protocol):
    """Measures microbatches."""

    def resident(self, setting: Setting) -> int:
        """Bytes in use between two microbatches, gradients included, optimiser states excluded."""

    def size(self, tokens: int) -> int:
        """Tokens of the largest microbatch of at most `tokens` tokens that the rows allow."""

    def peak(self, tokens: int) -> int | None:
        """Peak bytes of such a microbatch with the setting of the last `resident` call; None: out of memory."""


@dataclass(frozen=True)
class Probe:
    """One microbatch of the dry run (0 tokens: between microbatches); `peak_bytes` includes the future optimiser states."""

    paged: bool
    gradient_checkpointing: Checkpointing
    tokens: int
    peak_bytes: int


@dataclass(frozen=True)
class Fit:
    """The chosen settings. `max_tokens`: maximum tokens of a microbatch, None: as configured; `peak_bytes`: expected peak;
    `ranks`: on which ranks of a run that was measured."""

    max_tokens: int | None
    paged: bool
    gradient_checkpointing: Checkpointing
    peak_bytes: int
    probes: tuple[Probe, ...] = ()
    ranks: str = "alone"

    @property
    def room_bytes(self) -> int:
        """Bytes that a forward and backward pass may need above the resident bytes, margin included; 0 without probes."""
        of_setting = [p for p in self.probes if (p.paged, p.gradient_checkpointing) == (self.paged, self.gradient_checkpointing)]
        alone = self.peak_bytes - of_setting[0].peak_bytes if of_setting else 0
        return int(MARGIN[self.gradient_checkpointing] * alone)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fit:
        """Inverse of `to_dict`."""
        return cls(**{**values, "probes": tuple(Probe(**probe) for probe in values["probes"])})


def choose(budget_bytes: int, needs: Needs, bench: Bench) -> Fit:
    """Choose the cheapest setting and microbatch size within a budget.

    Raises:
        ConfigError: nothing fits; the message says by how much, and what would, or that the device is smaller than the budget.
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
    setting, search = list(searches.items())[-1]  # the setting that saves most; the minimum of all estimates would be biased low
    if search.ran_out is not None:
        tokens, peak = max(search.measured)
        fitted = (
            f"{tokens} tokens took {_size(peak)}. Set max_length={tokens} (--max-length)" if tokens else "Take a smaller model"
        )
        raise ConfigError(
            f"Training does not fit: memory ran out below the memory budget of {_size(budget_bytes)}, in a pass of "
            f"{search.ran_out} tokens{setting.words}. {fitted}, or a method that takes less (qlora, lora, full)."
        )
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
    """Search for the largest microbatch within a limit. `measured`: (tokens, peak bytes); `points`: the same with margin;
    `ran_out`: tokens of the one that there was no memory for, though the limit allowed it."""

    def __init__(self, limit: int, needs: Needs, bench: Bench, setting: Setting) -> None:
        self.limit, self.needs, self.bench = limit, needs, bench
        self.resident, self.margin = bench.resident(setting), MARGIN[setting.gradient_checkpointing]
        self.measured = [(0, self.resident)]
        self.points = [(0, self.resident)]
        self.ran_out: int | None = None

    def run(self) -> int | None:
        """Return the largest microbatch size in tokens; None if the longest row does not fit."""
        whole, wanted = self.needs.whole, FIRST_TOKENS
        while self.points[-1][1] <= self.limit:
            tokens, last = self.bench.size(min(wanted, whole)), self.points[-1][0]
            reaches = tokens == whole or last < self.needs.longest_row <= tokens  # decides whether a row or the batch fits
            enough = tokens <= last if reaches else tokens <= last * (1 + PRECISION)
            if enough:
                break
            if not self._measure(tokens):
                self.ran_out = tokens
                break
            wanted = min(GROWTH * tokens, self.largest())
        tokens, peak = self.points[-1]
        if peak > self.limit:
            if len(self.points) == 2 and tokens > 1:  # for a slope without constant-size buffers
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
        """Expected bytes for a `peak` that includes the margin."""
        return int(self.resident + (peak - self.resident) / self.margin)

    def _line(self) -> tuple[float, float]:
        """(intercept in bytes, bytes per token) through the last point and one of at most half its tokens, against noise."""
        x0, x1 = self._between()
        bytes_at = dict(self.points)
        slope = max(0.0, (bytes_at[x1] - bytes_at[x0]) / max(1, x1 - x0))
        return bytes_at[x1] - slope * x1, slope

    def _between(self) -> tuple[int, int]:
        """Tokens of the two points that define the line."""
        last = self.points[-1][0]
        return [n for n, _ in self.points if 2 * n <= last][-1], last

    def largest(self) -> int:
        """Tokens at which the line reaches the limit, at most the whole batch."""
        start, slope = self._line()
        if start + slope * self.needs.whole <= self.limit:
            return self.needs.whole
        return max(0, int((self.limit - start) / slope)) if slope else 0

    def at(self, tokens: int) -> int:
        """Bytes of a microbatch of `tokens` tokens, margin included: measured, or extrapolated with an allowance for noise."""
        measured = [peak for n, peak in self.points if n == tokens]
        if measured:
            return measured[-1]
        x0, x1 = self._between()
        start, slope = self._line()
        off = NOISE_BYTES * max(0, tokens - x1) / (x1 - x0) if x1 else 0.0
        return int(start + slope * tokens + off)


def _size(n_bytes: int) -> str:
    """Format bytes in GB (MB below one GB), rounded up, in the form that `memory_budget` accepts."""
    unit, name, steps = (10**9, "GB", 100) if n_bytes >= 10**9 else (10**6, "MB", 1)
    return f"{math.ceil(n_bytes * steps / unit) / steps:.{len(str(steps)) - 1}f} {name}"
