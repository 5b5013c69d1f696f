"""Which positions of a sequence layers keep, and where: a `Span` for the layers of each window.

Layers without a window keep all positions. Those with one keep what the next token reads of the past, `window - 1` positions, and
room for a step's tokens. Where a step would go beyond the room, what it reads of the past is moved to the front of the slot, and
all before that is lost. So keys and values stay in one piece and in order, and kernels read them as whole contexts; a window is
moved once in `PROMPT_TOKENS` tokens. A ring needs no moves, but lies in two pieces, and would take the same room: the tokens of a
part of a prompt are written before the first of them reads.

A sequence can go on after n tokens where what token n reads is still there: anywhere before the first move, then from the last
one on, and after the tokens that were marked, whose window is copied aside before it is lost.
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
    """How many places layers with a window have for a slot of `capacity` tokens."""
    return capacity if window is None else min(capacity, 2 * (window - 1) + PROMPT_TOKENS)


class Copied(NamedTuple):
    """Places [begin, end) of a slot that are copied to those from `to` on."""

    begin: int
    end: int
    to: int


class Span:
    """The positions that layers with one window keep of each slot.

    Attributes:
        places: of a slot. first: by slot, the position that is at place 0; the next ones follow.
        mark: by slot, after how many tokens another sequence may want to go on; 0: none.
    """

    def __init__(self, window: int | None, slots: int, capacity: int) -> None:
        self.places, self.first, self.mark = places_of(window, capacity), [0] * slots, [0] * slots
        self._before = capacity if window is None else window - 1  # positions that a token reads beside its own
        self._room = self.places if self.places == capacity else self.places - self._before
        self._aside = [0] * slots  # after how many tokens what lies in the places beyond the room lets a sequence go on

    def _begin(self, n: int) -> int:
        """The first position that the token at position n reads."""
        return max(0, n - self._before)

    def keeps(self, slot: int, n: int) -> bool:
        """Whether a sequence can go on after the first n tokens of a slot."""
        return n in (0, self._aside[slot]) or self.first[slot] <= self._begin(n)

    def reach(self, slot: int, n: int) -> int:
        """After how many of a slot's first n tokens a sequence can go on."""
        return n if self.keeps(slot, n) else self._aside[slot] if self._aside[slot] <= n else 0

    def fork(self, source: int, target: int, n: int) -> Copied:
        """What to copy from a slot for another that goes on after the first n tokens."""
        self.mark[target], self._aside[target] = n, 0
        if self.first[source] <= self._begin(n):
            self.first[target] = self.first[source]
            return Copied(0, n - self.first[source], 0)
        self.first[target] = self._begin(n)
        return Copied(self._room, self._room + n - self._begin(n), 0)

    def enter(self, part: Part) -> list[Copied]:
        """Make room for tokens that come next in their slot: what to copy, in order, before they are written.

        Raises:
            InputError: they are too many, or earlier positions that they see are lost.
        """
        slot, begin, end, position = part
        mark, aside, reads = self.mark[slot], self._aside[slot], self._begin(position)
        first, copies = self.first[slot] if position else 0, list[Copied]()
        if first > reads:
            if position != aside:
                raise InputError(f"Slot {slot} has lost positions that position {position} sees: it keeps those from {first} on.")
            first = reads
            copies.append(Copied(self._room, self._room + position - first, 0))
        if aside > position:  # of a sequence that was here before
            aside = 0
        if 0 < mark <= position and mark != aside and first <= self._begin(mark) and self._room < self.places:
            aside = mark
            copies.append(Copied(self._begin(mark) - first, mark - first, self._room))
        if position + end - begin - first > self._room:
            copies.append(Copied(reads - first, position - first, 0))
            first = reads
            if position + end - begin - first > self._room:
                raise InputError(
                    f"A slot has {self._room} places. Got {end - begin} tokens at once, which see {position - first} others."
                )
        self.first[slot], self._aside[slot] = first, aside
        return copies
