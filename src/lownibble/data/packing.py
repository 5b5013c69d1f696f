"""Packing: best-fit decreasing within shuffled chunks.

Rows are shuffled and split into chunks of 1024; each chunk is packed longest row first, into the fullest pack with enough room.
Rows are never split. The method is TRL's "bfd"; packing again in each epoch's order, rather than once, varies which rows share a
pack. Chunking bounds the work and keeps packs random; each chunk leaves about half a pack unfilled.

Within a batch rows are sorted longest first: they do not attend to each other, so their order is free, and adjacent rows of
equal length share one attention call (see `models/attention.py`).

Rejected: splitting rows at the end of a pack (an answer without its prompt); packing the whole data set at once (sorted by
length, the packs of all epochs would be alike).
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

CHUNK_ROWS = 1024


def pack(rows: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack rows (indices into `lengths`) into packs of at most `max_length` tokens; each row occurs once."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for row in sorted(rows, key=lengths.__getitem__, reverse=True):
        place = bisect_left(room, (lengths[row],))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = max_length, len(packs)
            packs.append([])
        packs[number].append(row)
        insort(room, (left - lengths[row], number))
    return packs


def packed_batches(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, max_length: int, generator: random.Random
) -> list[list[list[int]]]:
    """Batches of `batch_size` packs, which are lists of row indices; `order` is the epoch's shuffled order."""
    packs: list[list[int]] = []
    for start in range(0, len(order), CHUNK_ROWS):
        packs += pack(order[start : start + CHUNK_ROWS], lengths, max_length)
    generator.shuffle(packs)
    return [packs[start : start + batch_size] for start in range(0, len(packs), batch_size)]


def joined(packs: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """The rows of these packs, longest first."""
    return sorted((row for rows in packs for row in rows), key=lengths.__getitem__, reverse=True)
