"""Events of a training run, in order: `Fitted` (with a memory budget) and `Started`, then `Stepped` or `Skipped`, `Evaluated`
and `Saved`, then `Finished`; `Warned` at any time.

The loop yields events and never prints; sinks (`sinks.py`) turn them into progress bars, files and curves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lownibble.config import Checkpointing


@dataclass(frozen=True)
class Started:
    """Before the first step. `first_step` is above 0 after a resume; `compile_seconds` is the time to compile the layers;
    `compute` is the frozen-base matmul precision that 'auto' chose, and why; `adapted` counts the adapted layers by kind;
    `shared` is `Trainer.shared` where it counts tokens; `eval_rows` are evaluated next (0: none before the first step)."""

    total_steps: int
    first_step: int
    rows: int
    cut_rows: int
    trainable_parameters: int
    all_parameters: int
    compiled: bool = False
    compile_seconds: float = 0.0
    compile_reason: str = ""
    compute: str = ""
    adapted: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    eval_rows: int = 0


@dataclass(frozen=True)
class Fitted:
    """How training fits into the memory budget. `max_tokens`: maximum tokens per microbatch, padding included (None: batches as
    configured, up to `whole_tokens`); `peak_bytes`: the expected peak."""

    budget_bytes: int
    peak_bytes: int
    max_tokens: int | None
    whole_tokens: int
    paged: bool
    gradient_checkpointing: Checkpointing
    seconds: float


@dataclass(frozen=True)
class Stepped:
    """One optimiser step. `tokens` excludes padding, `padded_tokens` includes it; `loss` is the mean over label tokens."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    padded_tokens: int
    label_tokens: int
    samples: int
    seconds: float


@dataclass(frozen=True)
class Skipped:
    """A step skipped because its loss or gradient was not finite; `reason` names the origin."""

    step: int
    reason: str
    seconds: float


@dataclass(frozen=True)
class Warned:
    """A warning for the user; the run continues."""

    message: str


@dataclass(frozen=True)
class Evaluated:
    """Mean loss over the label tokens of the evaluation rows; for classification data also the scores and `correct` per row."""

    step: int
    loss: float
    label_tokens: int
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)
    correct: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: str


@dataclass(frozen=True)
class Finished:
    """After the last step."""

    steps: int
    seconds: float


Event = Fitted | Started | Stepped | Skipped | Warned | Evaluated | Saved | Finished
