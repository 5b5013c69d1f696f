"""Optimiser specs: constructor, state bytes, and paged counterpart. Imports no torch, because the planner uses it too.

    adamw              torch's fused AdamW
    paged_adamw        bit-identical to adamw; states paged, partly in memory        (transformers: paged_adamw_32bit)
    adamw_8bit         both moments in 8 bits                                        (transformers: adamw_8bit, adamw_bnb_8bit)
    paged_adamw_8bit   8-bit moments, paged                                          (transformers: paged_adamw_8bit)

External optimisers are added as an `OptimizerSpec` in `registry.OPTIMIZERS`: a torch optimiser whose states are tensors is
checkpointed, resumed and counted like these.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lownibble.errors import ConfigError
from lownibble.registry import OPTIMIZERS

if TYPE_CHECKING:
    import torch

PAGE_BYTES = 1 << 20
"""Page size of optimiser states on a CPU, and the smallest on CUDA: small enough that a page just read is still in the L2 cache
when used, large enough to hide Python's overhead."""

LARGEST_PAGE, FEWEST_PAGES = 32 << 20, 4
"""Page size on CUDA, where a copy over PCIe is fastest in tens of MiB and a page is one launch; smaller where fewer than four
would be resident (one in use, others on their way). Powers of two, to which the pinned-memory allocator would round up anyway."""

SMALLEST_PAGED, SHARE_PAGED = 16 << 20, 10
"""Default page budget of a paged optimiser: minimum bytes, and divisor of its total state bytes; the larger applies."""

SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
"""Minimum elements of a parameter for 8-bit moments, and elements per block (which share one absmax)."""

FLOAT32 = 4

Groups = list[dict[str, Any]]
"""Parameter groups, each with 'params', 'lr', 'betas', 'eps' and 'weight_decay'."""


@dataclass(frozen=True)
class Paging:
    """Budget for resident states (None: a tenth, at least 16 MiB), and the folder of the file with the rest."""

    budget_bytes: int | None = None
    folder: Path | None = None


def page_budget(total: int, budget: int | None) -> int:
    """Bytes of states of `total` bytes that a paged optimiser keeps resident: the budget given, or the default."""
    return max(SMALLEST_PAGED, total // SHARE_PAGED) if budget is None else budget


def page_bytes(total: int, budget: int | None, device_type: str) -> int:
    """Page size for states of `total` bytes, of which `budget` bytes are resident (None: all). On CUDA, what fits is one page."""
    if device_type != "cuda":
        return PAGE_BYTES
    whole = max(1, -(-total // PAGE_BYTES)) * PAGE_BYTES
    if budget is None or whole <= budget:
        return whole
    return max(PAGE_BYTES, min(LARGEST_PAGE, 1 << (budget // FEWEST_PAGES).bit_length() - 1))


def resident_bytes(total: int, budget: int | None, device_type: str) -> int:
    """Bytes of the resident pages of states of `total` bytes, as `PagedAdamW.planned_bytes` of the pages it has laid out."""
    page = page_bytes(total, budget, device_type)
    pages = -(-total // page)
    return page * (pages if budget is None else min(pages, budget // page))


@dataclass(frozen=True)
class OptimizerSpec:
    """Specification of an optimiser.

    Attributes:
        build: (groups, paging) -> the optimiser, or 'module:function', imported on first use.
        state_bytes: (elements, bytes per element) of a parameter -> bytes of its states.
        plain, paged: names of the unpaged and the paged optimiser with the same states, or None.
        skips_on_device: whether `step` honours the attribute `found_inf` as torch's fused optimisers do: None, or a () float32
            tensor on the parameters' device, 1 to leave parameters and moments as they are, else 0. `optim.skipped` is to be
            called once that is known.
    """

    build: Callable[[Groups, Paging], torch.optim.Optimizer] | str
    state_bytes: Callable[[int, int], int]
    plain: str | None = None
    paged: str | None = None
    skips_on_device: bool = False

    def make(self, groups: Groups, paging: Paging) -> torch.optim.Optimizer:
        """Create the optimiser over these groups."""
        if not isinstance(self.build, str):
            return self.build(groups, paging)
        module, _, function = self.build.partition(":")
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), function)(groups, paging)
        return made


def spec(name: str) -> OptimizerSpec:
    """The spec of the named optimiser."""
    found: OptimizerSpec = OPTIMIZERS[name]
    return found


def plain_name(name: str) -> str:
    """Name of the unpaged optimiser with the same states."""
    return spec(name).plain or name


def paged_name(name: str) -> str | None:
    """Name of the paged optimiser with the same states, or None."""
    return spec(name).paged


def is_paged(name: str) -> bool:
    """Whether the optimiser pages its states."""
    return spec(name).paged == name


def check_paged(name: str, budget: int | None) -> None:
    """Check that a page budget is given for a paged optimiser alone.

    Raises:
        ConfigError: it is not.
    """
    if budget is not None and not is_paged(name):
        instead = f"Set optim='{paged_name(name)}' (--optim), or leave the budget out." if paged_name(name) else "Leave it out."
        raise ConfigError(f"The 'optim_page_budget' of TrainConfig is for paged optimisers. Got optim='{name}'. {instead}")


def check_budget(budget: int, page: int) -> None:
    """Check that a budget holds a page, both in bytes.

    Raises:
        ConfigError: it does not.
    """
    if budget < page:
        raise ConfigError(
            f"The page budget of the optimiser must be at least one page, {page / 2**20:g} MiB. Got {budget} bytes. Raise "
            "'optim_page_budget' (--optim-page-budget)."
        )


def both_moments(n: int, itemsize: int) -> int:
    """State bytes of two moments in the parameter's dtype."""
    return 2 * n * itemsize


def both_moments_8bit(n: int, itemsize: int) -> int:
    """State bytes of two 8-bit moments with a float32 absmax per block; small parameters have float32 moments."""
    return 2 * n * FLOAT32 if n < SMALLEST_8BIT else 2 * n + 2 * FLOAT32 * -(-n // BLOCK_8BIT)


ADAMW = OptimizerSpec("lownibble.optim.adamw:fused", both_moments, "adamw", "paged_adamw", skips_on_device=True)
PAGED_ADAMW = OptimizerSpec("lownibble.optim.adamw:paged", both_moments, "adamw", "paged_adamw", skips_on_device=True)
ADAMW_8BIT = OptimizerSpec(
    "lownibble.optim.adamw:eight_bit", both_moments_8bit, "adamw_8bit", "paged_adamw_8bit", skips_on_device=True
)
PAGED_ADAMW_8BIT = OptimizerSpec(
    "lownibble.optim.adamw:paged_eight_bit", both_moments_8bit, "adamw_8bit", "paged_adamw_8bit", skips_on_device=True
)
