"""Sequences that begin alike, laid out so that each token after the same beginning is computed once.

In a causal decoder the hidden state of a token depends on the tokens up to it alone. So the answers to one prompt share its
hidden states, and sequences form a tree: embeddings, norms, linear layers and MLPs run over its nodes, one row (1, U) of tokens,
each at the position that it has in its sequences. Only attention sees whole sequences, and reads a node's query, key and value
for each of them (`attention.py`). "Accelerating Direct Preference Optimization with Prefix Sharing" (arXiv 2410.20305) does this
for a pair, with a block mask; a tree takes any number of sequences, and what answers begin with alike too.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lownibble.transfers import to_device


class Prefixes(NamedTuple):
    """S sequences of N tokens in all, U of which are computed; tensors are int64.

    Attributes:
        input_ids, positions: (1, U), the tokens that are computed.
        spread: (N,), for each token of the sequences, one after the other, its place among those.
        first: (U,), the inverse: for each place, the first token of the sequences that it stands for.
        begins: (S + 1,), where in N the sequences begin, and where the last one ends.
        lengths: of the sequences.
    """

    input_ids: Tensor
    positions: Tensor
    spread: Tensor
    first: Tensor
    begins: Tensor
    lengths: tuple[int, ...]

    def places(self, places_L: Tensor, T: int) -> Tensor:
        """(L,) places among the U tokens, of indices into the sequences padded on the right to (S, T) and flattened."""
        row_L = places_L // T
        return self.spread.index_select(0, self.begins.index_select(0, row_L) + places_L - row_L * T)

    def to(self, device: torch.device | str) -> Prefixes:
        """Move the tensors to a device, without waiting for it."""
        ids, positions, spread, first, begins = (to_device(tensor, device) for tensor in self[:5])
        return Prefixes(ids, positions, spread, first, begins, self.lengths)


def tree(sequences: Sequence[Sequence[int]], groups: Sequence[int] | None = None) -> Prefixes:
    """The tree of sequences of token ids, on the host. `groups`: a number for each; those of other groups share nothing."""
    nodes: dict[tuple[int, int], int] = {}
    ids, positions, spread, first = list[int](), list[int](), list[int](), list[int]()
    for number, sequence in enumerate(sequences):
        node = -1 - (groups[number] if groups else 0)
        for position, token in enumerate(sequence):
            node = nodes.setdefault((node, token), len(ids))
            if node == len(ids):
                ids.append(token)
                positions.append(position)
                first.append(len(spread))
            spread.append(node)
    lengths = tuple(len(sequence) for sequence in sequences)
    begins = _int64([0, *accumulate(lengths)])
    return Prefixes(_int64(ids).unsqueeze(0), _int64(positions).unsqueeze(0), _int64(spread), _int64(first), begins, lengths)


def _int64(values: Sequence[int]) -> Tensor:
    """A tensor through a buffer: `torch.tensor` takes twenty times as long."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)
