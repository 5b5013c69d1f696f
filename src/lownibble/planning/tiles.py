"""Tiles of tokens: how a long microbatch's norms and MLP are cut up (`training/tiles.py`), and the same on a `Tape`.

A tile of `TILE_TOKENS` tokens is enough for matrix products at full speed on any card, and decoding a 4-bit weight again for
each takes a few percent of its product. Its intermediates, about eight tensors as wide as the MLP, are 0.9 GB for an 8B model,
less than one hidden state of 131,072 tokens; untiled they would be 17 GB. A run whose largest microbatch has at most
`LONG_TOKENS` is not cut: there the layer's intermediates are of the size of its weights. In other runs every microbatch is cut
that is longer than a tile, so that a shorter one takes no more memory than the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lownibble.planning.tape import Tape, Value

TILE_TOKENS, LONG_TOKENS = 4096, 16384


def is_long(tokens: int) -> bool:
    """Whether a run whose largest microbatch has so many tokens runs in tiles, with checkpointing."""
    return tokens > LONG_TOKENS


def tile_lengths(tokens: int) -> list[int]:
    """Tokens of each tile of a microbatch in a long run, as equal as can be."""
    count = max(1, -(-tokens // TILE_TOKENS))
    return [(tokens + i) // count for i in reversed(range(count))]


def tiled(
    tape: Tape, run: Callable[[Value], Value], x: Value, lengths: Sequence[int], parameters: Sequence[Value]
) -> Value:  # fmt: skip
    """`run` over tiles of x with these tokens; backward computes each tile again. `parameters`: the trained ones it reads.

    Only two tiles are run: what the others allocate and free repeats the second.
    """
    width = x.n // sum(lengths)
    lengths = lengths[:2]
    kept = x.view()
    tape.record([kept], [x, *parameters], [x], lambda grads, _: [grads[0], *[None] * len(parameters)])
    out = tape.like(x)
    with tape.no_grad():
        for length in lengths:
            run(Value(kept.storage, length * width, kept.itemsize))
    node, wants, itemsize = kept.node, x.wants_grad, x.itemsize

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        dout = grads[0]
        assert dout is not None
        assert node is not None
        x = node.saved[0].unpack()
        dx, totals = tape.like(x), list[Value]()
        for length in lengths:
            tile = Value(x.storage, length * width, itemsize, trained=wants)
            of_tile = Value(dout.storage, length * width, itemsize)
            found = tape.gradients(lambda tile=tile: run(tile), of_tile, [tile, *parameters])[wants:]  # type: ignore[misc]
            totals = totals or found
            del found
        return [dx if wants else None, *totals]

    tape.record([out], [kept, *parameters], [], backward)
    return out
