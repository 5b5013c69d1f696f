"""What ranks exchange in a step, and the time it takes. One process a card, each with its share of a
step's rows (`share`).

- *ddp*: every rank holds the whole model. After a step's last backward pass the trained parameters' gradients are all-reduced,
  float32, in buffers of at most `BUFFER_BYTES`; larger ones where they are.
- *fsdp* (FSDP2, by decoder layer, and one group of the rest): a microbatch gathers each layer for forward and again for
  backward, where checkpointing computes it again, too; the rest once. Gradients are reduce-scattered as a group's backward ends.

Rings: all-reduce sends 2 (N - 1) / N of the bytes over each card's link, all-gather and reduce-scatter (N - 1) / N. Over more
cards than a node has, rings pass through the network, and each card sends at most as fast as a node does.

Offloaded shards are copied to the card before each gather, and gradients back, over the card's link to the host.

Time: ddp's all-reduce comes after the last gradient and is added to the step. fsdp's exchanges and copies run beside the
computation, and only what exceeds it counts; as nothing hides if they wait for each other, the upper bound is the sum of both.
`REACHED` is the share of a link's rate that is reached. None of it was measured by us.
"""

from __future__ import annotations

from typing import NamedTuple

from lownibble.config import PREFERENCE, LoraConfig, Parallel, TrainConfig
from lownibble.errors import ConfigError
from lownibble.optim.specs import BLOCK_8BIT, SMALLEST_8BIT, plain_name
from lownibble.planning.hardware import Device

BUFFER_BYTES = 64 << 20
"""Gradients that are summed over ranks are joined to buffers of at most this size."""

REACHED = (0.5, 0.75, 0.9)
"""Share of a link's rate that collectives reach: low, likely, high. A guess; large messages over NVLink are near the upper end,
PCIe without peer-to-peer transfers (consumer cards) is below the middle."""


def share(train: TrainConfig, ranks: int) -> TrainConfig:
    """What each of so many ranks runs of a step, which is the run's whatever their number: batches are split, or dealt whole.

    Raises:
        ConfigError: neither can be divided by the number of ranks.
    """
    rows, batches = train.batch_size, train.gradient_accumulation_steps
    if rows % ranks == 0:
        rows //= ranks
    elif batches % ranks == 0:
        batches //= ranks
    else:
        raise ConfigError(
            f"A step of batch_size={rows} x gradient_accumulation_steps={batches} cannot be dealt to {ranks} processes: one of "
            f"the two must be a multiple of {ranks}. Set --batch-size {-(-rows // ranks) * ranks}, or take another number of "
            "processes."
        )
    found: TrainConfig = train.with_options(batch_size=rows, gradient_accumulation_steps=batches)
    return found


def not_on_shards(train: TrainConfig, lora: LoraConfig | None = None, *, merge_aware: bool = False) -> tuple[str, str] | None:
    """The first of a run's options that fsdp does not go with, and a remedy, in words; None: it goes with all."""
    bias = "none" if lora is None else lora.bias
    for wrong, what, remedy in (
        (train.objective in PREFERENCE, f"objective='{train.objective}'", "Leave it out"),
        (train.gradient_checkpointing == "offload", "gradient_checkpointing='offload'", "Use gradient_checkpointing=true"),
        (train.cuda_graphs is True, "cuda_graphs=True, for which passes must not communicate", "Leave it out"),
        (merge_aware, "merge_aware, which packs whole layers between steps", "Leave it out"),
        (bias != "none", f"bias={bias!r}, which swaps biases in place", "Use bias='none'"),
    ):  # fmt: skip
        if wrong:
            return what, remedy
    return None


class CutError(ConfigError):
    """A rank's part of a tensor does not begin with a block of an optimiser's 8-bit moments."""


def cuts_a_block(part: int, ranks: int, optim: str) -> bool:
    """Whether parts of a tensor, of so many elements on each rank but the last, cut blocks of the optimiser's moments."""
    return "8bit" in plain_name(optim) and ranks > 1 and part * ranks >= SMALLEST_8BIT and part % BLOCK_8BIT != 0


class Exchange(NamedTuple):
    """Bytes of tensors that a rank exchanges: of all layers, of the other parameters (both 0 with ddp), and of gradients."""

    parallel: Parallel
    layers: int
    rest: int
    gradients: int

    def sent(self, cards: int, passes: int) -> float:
        """Bytes that each card sends in a step of so many microbatches."""
        share = (cards - 1) / cards
        if self.parallel == "ddp":
            return 2 * share * self.gradients
        return passes * share * (2 * self.layers + self.rest + self.gradients)

    def copied(self, cards: int, passes: int) -> float:
        """Bytes that each card copies from and to the host in such a step, if shards are there: its own part of what it sends."""
        return passes * (2 * self.layers + self.rest + self.gradients) / cards

    def step_s(self, computing: float, sending: float, at_worst: bool) -> float:
        """Seconds of a step that computes and sends for so long; `at_worst`: nothing of it at the same time."""
        return computing + sending if at_worst or self.parallel == "ddp" else max(computing, sending)


def link_of(device: Device, cards: int, per_node: int, given: float | None = None) -> float | None:
    """Bytes/s in each direction that a card can send at in a ring of `cards`; None: unknown. `given`: in GB/s, instead
    of the table's.

    Raises:
        ConfigError: more cards than a node has, and no number of whole nodes.
    """
    if cards > per_node and cards % per_node:
        raise ConfigError(f"{cards} GPUs are no whole nodes of {per_node}. Give another number, or --gpus-per-node.")
    if given is not None:
        return given * 1e9
    if device.link is None or cards <= per_node:
        return device.link
    return None if device.network is None else min(device.link, device.network)
