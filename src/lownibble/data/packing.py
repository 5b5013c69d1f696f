"""Which rows go together when rows are packed: best-fit decreasing within shuffled chunks.

Rows are shuffled, cut into chunks of a thousand, and each chunk is packed: longest row first, into the fullest pack that still
takes it. Rows stay whole. The method is TRL's "bfd"; packing anew in each epoch's order, rather than once, changes the company a
row keeps. The chunk bounds the work and keeps the choice random; a chunk leaves about half a pack unfilled.

Within a batch rows come longest first: they do not see each other, so order is free, and rows of one length side by side are one
call of attention (see `models/attention.py`).

Rejected: cutting rows at the end of a pack (an answer without its prompt); one pass over the whole data (sorted by length, an
epoch's packs would be all alike).
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

CHUNK_ROWS = 1024


def pack(rows: Sequence[int], lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows (indices into `lengths`) in packs of at most `max_length` tokens; each row occurs once."""
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
) -> list[list[int]]:
    """Batches of `batch_size` packs each, as lists of rows, longest first; `order` is the epoch's shuffled order."""
    packs: list[list[int]] = []
    for start in range(0, len(order), CHUNK_ROWS):
        packs += pack(order[start : start + CHUNK_ROWS], lengths, max_length)
    generator.shuffle(packs)
    return [
        sorted((row for rows in packs[start : start + batch_size] for row in rows), key=lengths.__getitem__, reverse=True)
        for start in range(0, len(packs), batch_size)
    ]
