"""How merge-aware training holds its base, from shapes alone. No torch: the planner uses it too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lownibble.config import QuantConfig
from lownibble.errors import ConfigError
from lownibble.quant import layouts

HELD = QuantConfig(quant_type="int8", block_size=64, double_quant=False)
"""How adapted layers are held in training; in blocks of a row where rows are not whole blocks."""


def held(
    leaves: Mapping[str, QuantConfig], shapes: Mapping[str, Sequence[int]], rounded: Iterable[str]
) -> dict[str, QuantConfig]:
    """Path -> how each packed layer is held: those that an adapter rounds as `HELD`, others as they leave.

    Args:
        leaves: path -> how each packed layer leaves. shapes: path -> (out, in). rounded: paths of the adapted ones among them.
    Raises:
        ConfigError: there is none to round, or one leaves in no fewer bits than it is held in.
    """
    rounded = sorted(rounded)
    if not rounded:
        raise ConfigError(
            "Merge-aware training rounds adapted layers that are packed, and there is none. Target other modules, or skip fewer."
        )
    found = dict(leaves)
    for path in rounded:
        n_out, n_in = shapes[path]
        if layouts.n_bytes((n_out, n_in), leaves[path]) >= n_out * n_in:
            raise ConfigError(
                f"Merge-aware training holds '{path}' in int8, and {leaves[path].quant_type} is no coarser. Use a quant_type of "
                "fewer bits, or train without --merge-aware."
            )
        found[path] = HELD if n_in % int(HELD.block_size) == 0 else HELD.with_options(block_size="row")
    return found
