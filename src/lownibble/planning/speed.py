"""Step time: FLOPs over the device's reached FLOP/s, plus bytes moved over its bandwidth.

FLOPs are those of the step's matrix products; bytes are the reads and writes of weights (packed and dequantised), optimiser
states, gradients and activations. The two times are added, since kernels of one stream seldom overlap. Offloaded checkpoints are
copied meanwhile: they count only if they take longer than all of it. What ranks exchange is in `exchange.py`; where shards are
offloaded, the optimiser's step on the host comes after it (`host_seconds`). The share of peak FLOP/s that a device reaches is
measured by `lownibble plan --calibrate`; the default is `EFFICIENCY`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lownibble.arch import ModelShape
from lownibble.config import Method, TrainConfig
from lownibble.planning.exchange import REACHED
from lownibble.planning.hardware import Device
from lownibble.planning.memory import MemoryPlan, sequences_of_row
from lownibble.planning.tiles import is_long, tile_lengths

EFFICIENCY = (0.3, 0.5, 0.7)
"""Share of a CUDA device's peak FLOP/s that matrix products reach in training: low, likely, high. Not measured by us; from the
tokens/s published by torchtune (8B on a 4090, 3B on an A100) and fms-acceleration (Mistral-7B on an A100) it is 0.34 to 0.6
without a second forward pass (checkpointing) and up to 0.9 with one."""


class Range(NamedTuple):
    """A figure: lower bound, likely, upper bound."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True)
class SpeedPlan:
    """FLOPs and bytes of a step on one card, and the resulting seconds; tokens, tokens/s, and for a total of tokens hours and
    dollars, of all cards."""

    flops: float
    moved_bytes: float
    tokens: int
    step_s: Range
    tokens_per_s: Range
    hours: Range | None
    dollars: Range | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        named = {name: value._asdict() if isinstance(value, Range) else value for name, value in vars(self).items()}
        return {**asdict(self), **named}


def plan_speed(
    shape: ModelShape, device: Device, method: Method, train: TrainConfig, memory: MemoryPlan, *, tokens: int | None = None,
    price: float | None = None, cards: int = 1, link: float | None = None,
) -> SpeedPlan | None:  # fmt: skip
    """Time of a step, and of `tokens` tokens; None if the device's speed is unknown, or that of a link that is used.

    Args:
        price: dollars per hour of a card, instead of the device's.
        cards: their number. link: bytes/s that each can send at (`exchange.link_of`).
    """
    if device.flops is None or device.bandwidth is None or (cards > 1 and link is None):
        return None
    if memory.host_kinds and device.host is None:
        return None
    per_step = cards * _tokens(train)
    flops, moved = step_flops(shape, method, memory, train), moved_bytes(memory, method, train, cards)
    shares = (device.efficiency or {}).get(method, EFFICIENCY)
    copied = copied_seconds(memory, train)
    step = Range(*(max(copied, flops / (device.flops * share) + moved / device.bandwidth) for share in reversed(shares)))
    if memory.exchange is not None and link is not None:
        sent = memory.exchange.sent(cards, train.gradient_accumulation_steps)
        copied = memory.exchange.copied(cards, train.gradient_accumulation_steps)
        seconds = sent / link + (copied / device.host if memory.host_kinds and device.host else 0)
        sending = [seconds / share for share in reversed(REACHED)]
        at_worst = (False, False, True)
        step = Range(*map(memory.exchange.step_s, step, sending, at_worst))
    step = Range(*(each + updating for each, updating in zip(step, host_seconds(memory), strict=True)))
    rate = Range(*(per_step / seconds for seconds in reversed(step)))
    hours = Range(*(tokens / each / 3600 for each in reversed(rate))) if tokens else None
    dollars = None if hours is None else dollars_of(hours, device, price, cards)
    return SpeedPlan(flops, moved, per_step, step, rate, hours, dollars)


def dollars_of(hours: Range, device: Device, price: float | None = None, cards: int = 1) -> Range | None:
    """Dollars for hours of so many cards; None if there is no price. `price`: an hour of a card, instead of the device's."""
    prices = (price, price) if price is not None else device.price
    if prices is None:
        return None
    low, high = (cards * each for each in prices)
    return Range(hours.low * low, hours.likely * (low + high) / 2, hours.high * high)


def _tokens(train: TrainConfig) -> int:
    return train.batch_size * sequences_of_row(train) * train.max_length * train.gradient_accumulation_steps


def forwards_without_gradients(train: TrainConfig) -> float:
    """Forward passes for each training pass, over as many tokens: the reference model's of dpo and kto, once for each row or with
    each step, and those of kto's mismatched answers, under both models."""
    if train.objective not in ("dpo", "kto"):
        return 0.0
    reference = 1.0 if train.precompute_ref_log_probs is False else 1 / max(1.0, train.num_train_epochs)
    has_kl = train.objective == "kto" and train.loss_type != "apo_zero_unpaired"
    return 2 * reference + 1 if has_kl else reference


def step_flops(shape: ModelShape, method: Method, memory: MemoryPlan, train: TrainConfig) -> float:
    """FLOPs of a step."""
    return _tokens(train) * flops_per_token(shape, method, memory.adapters_per_token, train)


def flops_per_token(shape: ModelShape, method: Method, adapters: int, train: TrainConfig) -> float:
    """FLOPs of a step per token: per weight 2 in forward, 2 for the input gradient, and 2 for its own gradient if trained;
    attention over half the row (all of it if bidirectional); a second forward pass with checkpointing. An encoder-decoder model
    is assumed to read and write rows of `max_length`. Objectives over preferences have passes without gradients besides.
    Of a mixture count the experts that a token passes through, and so of the parameters in `adapters`."""
    layers, attention, low_rank, head = _forward_flops(shape, adapters, train.max_length)
    forward = layers + attention + low_rank
    backward = layers * (2 if method == "full" else 1) + 2.5 * attention + 2 * low_rank
    more = forwards_without_gradients(train) * (forward + head)
    return forward * (2 if train.gradient_checkpointing else 1) + backward + head * (3 if method == "full" else 2) + more


def forward_flops_per_token(shape: ModelShape, adapters: int, length: int) -> float:
    """FLOPs per token of a forward pass over rows of so many tokens."""
    return sum(_forward_flops(shape, adapters, length))


def _forward_flops(shape: ModelShape, adapters: int, length: int) -> tuple[int, int, int, int]:
    """Of the layers' weights, attention, adapters and the head."""
    halves = shape.layers + 3 * shape.decoder_layers + (shape.layers if shape.decoder_layers else 0)
    return (
        2 * (shape.linear_parameters + shape.active_expert_parameters), 2 * halves * shape.heads * shape.head_dim * length,
        2 * adapters, 2 * shape.vocab * shape.hidden,
    )  # fmt: skip


HOST_BANDWIDTH = 20e9
"""Bytes/s between host and device for offloaded checkpoints: PCIe 4.0 x16, 31.5e9 in its specification, less protocol and other
traffic; not measured by us."""


def copied_seconds(memory: MemoryPlan, train: TrainConfig) -> float:
    """Time to copy offloaded checkpoints to the host and back; they are copied while layers compute."""
    if train.gradient_checkpointing != "offload":
        return 0.0
    return 2 * memory.host_bytes * train.gradient_accumulation_steps / HOST_BANDWIDTH


HOST_MEMORY = (10e9, 20e9, 40e9)
"""Bytes/s of host memory for each rank's optimiser step: low, likely, high. A guess: half of a desktop's, or an eighth of a
server's with eight GPUs."""


def host_seconds(memory: MemoryPlan) -> Range:
    """Time of the optimiser's step on the host, if shards are there. A trained parameter is read and written, its gradient (of as
    many bytes) read for the norm, read and written to be clipped, and read; states are read and written."""
    moved = 6 * memory.host_kinds.get("gradients", 0) + 2 * memory.host_kinds.get("optimizer", 0)
    return Range(*(moved / rate for rate in reversed(HOST_MEMORY)))


def moved_bytes(memory: MemoryPlan, method: Method, train: TrainConfig, cards: int = 1) -> float:
    """Approximate bytes read from and written to device memory in a step. With fsdp all ranks' parts are read, after they were
    written to a flat buffer and copied out of it, wherever they are between passes."""
    sharded = memory.exchange is not None and memory.exchange.parallel == "fsdp"
    parts = cards if sharded else 1
    kinds, passes = memory.kinds, train.gradient_accumulation_steps
    times = 3 if train.gradient_checkpointing else 2
    tokens = train.batch_size * train.max_length
    tiles = len(tile_lengths(tokens)) if train.gradient_checkpointing and is_long(tokens) else 1
    held = memory.host_kinds or kinds
    weights = parts * sum(held.get(kind, 0) for kind in ("weights", "codes", "constants"))
    decoded = (
        2 * 4 * parts * held.get("codes", 0) * tiles if method == "qlora" else 0
    )  # written and read in 16 bits, four times the codes
    activations = 2 * kinds["activations"] * times
    gathered = 3 * (2 * memory.exchange.layers + memory.exchange.rest) if sharded and memory.exchange else 0
    update = 2 * kinds["optimizer"] + 3 * kinds["gradients"] if held is kinds else 0
    return passes * (times * (weights + decoded) + activations + gathered) + update
