"""Simulation of torch's CUDA caching allocator: device memory reserved for a sequence of allocations and frees.

Rules of c10/cuda/CUDACachingAllocator.cpp (torch 2.11 to 2.13, default settings): sizes are rounded up to 512 bytes. Up to 1 MiB,
tensors come from the small pool, with segments of 2 MiB; below 10 MiB, from segments of 20 MiB; larger ones get their own
segment, rounded up to 2 MiB. The best-fit free block is taken, and split if at least 512 bytes (small) or more than 1 MiB (large)
remain; adjacent free blocks are merged. Segments are never released, so reserved memory never falls.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

ROUND = 512
SMALL, SMALL_SEGMENT = 1 << 20, 2 << 20
MEDIUM, MEDIUM_SEGMENT = 10 << 20, 20 << 20
LARGE_ROUND = 2 << 20


class _Block:
    """A block of a segment in the small or large pool; `before` and `after` are its neighbours in the segment."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool = False) -> None:
        self.address, self.size, self.small = address, size, small
        self.before: _Block | None = None
        self.after: _Block | None = None
        self.free = True


class _Pool:
    """Free blocks as (size, address, block), smallest first; addresses are unique."""

    def __init__(self, smallest_rest: int) -> None:
        self.smallest_rest = smallest_rest
        self.blocks: list[tuple[int, int, _Block]] = []

    def take(self, size: int) -> _Block | None:
        place = bisect_left(self.blocks, (size,))
        return self.blocks.pop(place)[2] if place < len(self.blocks) else None

    def put(self, block: _Block) -> None:
        insort(self.blocks, (block.size, block.address, block))

    def remove(self, block: _Block) -> None:
        self.blocks.pop(bisect_left(self.blocks, (block.size, block.address)))


class Allocator:
    """The simulated allocator. `reserved`: bytes taken from the device so far."""

    def __init__(self) -> None:
        self.reserved = 0
        self._pools = {True: _Pool(ROUND), False: _Pool(SMALL + 1)}
        self._held: dict[int, _Block] = {}
        self._next = 0

    def allocate(self, key: int, n_bytes: int) -> None:
        """Allocate a tensor."""
        if n_bytes == 0:
            return
        size = -(-n_bytes // ROUND) * ROUND
        pool = self._pools[size <= SMALL]
        block = pool.take(size) or self._segment(size)
        if block.size - size >= pool.smallest_rest:
            rest = _Block(block.address + size, block.size - size, block.small)
            rest.before, rest.after = block, block.after
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            pool.put(rest)
        block.free = False
        self._held[key] = block

    def _segment(self, size: int) -> _Block:
        if size <= SMALL:
            whole = SMALL_SEGMENT
        elif size < MEDIUM:
            whole = MEDIUM_SEGMENT
        else:
            whole = -(-size // LARGE_ROUND) * LARGE_ROUND
        self.reserved += whole
        self._next += whole + ROUND  # segments are never neighbours
        return _Block(self._next - whole - ROUND, whole, size <= SMALL)

    def free(self, key: int) -> None:
        """Free a tensor."""
        block = self._held.pop(key, None)
        if block is None:
            return
        pool = self._pools[block.small]
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                block = _joined(block, neighbour)
        block.free = True
        pool.put(block)


def _joined(a: _Block, b: _Block) -> _Block:
    first, second = (a, b) if a.address < b.address else (b, a)
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first


def reserved_bytes(events: Iterable[tuple[int, int]]) -> int:
    """Bytes reserved after a sequence of allocations (key, bytes) and frees (key, negative bytes)."""
    allocator = Allocator()
    for key, n_bytes in events:
        if n_bytes > 0:
            allocator.allocate(key, n_bytes)
        else:
            allocator.free(key)
    return allocator.reserved
