"""Sampled grids. Oracle: the whole grid's pairs, counted."""

from itertools import combinations, product

import pytest
from pairwise import pairwise


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (2, 2, 2), (14, 3, 4), (9, 2, 3, 2), (5, 1, 4, 3, 2)], ids=str)
def test_every_pair_meets_in_few_rows(sizes):
    axes = [[f"{axis}-{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    rows = pairwise(*axes)
    assert set(rows) <= set(product(*axes))
    assert len(set(rows)) == len(rows)
    found = {pair for row in rows for pair in combinations(row, 2)}
    assert found == {pair for row in product(*axes) for pair in combinations(row, 2)}
    first, second = sorted(sizes)[-2:]
    assert first * second <= len(rows) <= 1.5 * first * second
    assert rows == pairwise(*axes)
