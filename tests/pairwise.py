"""Sampled grids: rows enough that every two values of different axes still meet."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of the axes' product in which every pair of values of two axes occurs; without chance, so the same ones every time.

    Greedy: each row is the first of those with the most pairs that are still missing. Not always the fewest rows there could be.
    """
    rows = list(product(*(range(len(axis)) for axis in axes)))
    pairs = {row: set(combinations(enumerate(row), 2)) for row in rows}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        row = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[row]
        chosen.append(row)
    return [tuple(axis[place] for axis, place in zip(axes, row, strict=True)) for row in sorted(chosen)]
