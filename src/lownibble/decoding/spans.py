"""Which positions of a sequence layers keep, and where: a `Span` for the layers of each window.

Layers without a window keep all positions. Those with one keep what the next token reads of the past, `window - 1` positions, and
room for a step's tokens. Where a step would go beyond the room, what it reads of the past is moved to the front of the slot, and
all before that is lost. So keys and values stay in one piece and in order, and kernels read them as whole contexts; a window is
moved once in `PROMPT_TOKENS` tokens. A ring needs no moves, but lies in two pieces, and would take the same room: the tokens of a
part of a prompt are written before the first of them reads.

A sequence can go on after n tokens where what token n reads is still there: anywhere before the first move, then from the last
one on.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lownibble.decoding.decoder import PROMPT_TOKENS
from lownibble.errors import InputError


class Part(NamedTuple):
    """Tokens [begin, end) of a step: those of one slot, at positions from `position` on."""

    slot: int
    begin: int
    end: int
    position: int


def parts_of(slots: Tensor, positions: Tensor) -> list[Part]:
    """The runs of tokens of the same slot."""
    found: list[Part] = []
    for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if found and found[-1].slot == slot:
            found[-1] = found[-1]._replace(end=i + 1)
        else:
            found.append(Part(slot, i, i + 1, position))
    return found


def places_of(window: int | None, capacity: int) -> int:
    """How many positions of a slot of `capacity` tokens layers with a window keep."""
    return capacity if window is None else min(capacity, window - 1 + PROMPT_TOKENS)


class Span:
    """The positions that layers with one window keep of each slot.

    Attributes:
        length: places of a slot.
        first: by slot, the position that is at place 0; the next ones follow.
    """

    def __init__(self, window: int | None, slots: int, capacity: int) -> None:
        self.length, self.first = places_of(window, capacity), [0] * slots
        self._before = capacity if window is None else window - 1  # positions that a token reads beside its own

    def keeps(self, slot: int, n: int) -> bool:
        """Whether a sequence can go on after the first n tokens of a slot."""
        return n == 0 or self.first[slot] <= max(0, n - self._before)

    def enter(self, part: Part) -> tuple[int, int]:
        """Make room for tokens that come next in their slot: the places [begin, end) that move to its front, or (0, 0).

        Raises:
            InputError: they are too many, or earlier positions that they see are lost.
        """
        slot, begin, end, position = part
        if not position:
            self.first[slot] = 0
        first = self.first[slot]
        if not self.keeps(slot, position):
            raise InputError(f"Slot {slot} has lost positions that position {position} sees: it keeps those from {first} on.")
        if position + end - begin - first <= self.length:
            return 0, 0
        kept = min(position, self._before)
        if kept + end - begin > self.length:
            raise InputError(f"A slot has {self.length} places. Got {end - begin} tokens at once, which see {kept} others.")
        self.first[slot] = position - kept
        return position - kept - first, position - first
