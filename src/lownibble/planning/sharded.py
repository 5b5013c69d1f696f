"""FSDP2 on a `Tape`: parameters held in parts, by group gathered while they are used, gradients reduced to parts.

As torch's `fully_shard` with each decoder layer a group, gathered again in backward, and one group for the rest (embedding, last
norm, head), gathered for a pass. A rank holds the first dimension of each tensor divided by the number of ranks, rounded up, and
a gathered tensor has that many times the part's elements. A group is received in a flat buffer and copied out of it. While a
layer runs, the next one's buffer is there, in forward (`training.sharding.prefetch`) and in backward; in forward its own one,
too, which torch keeps for a copy that is still on its way. Gradients are whole within a layer's backward; then they go to a flat
buffer, which is kept until the next layer's is made, and come out as this rank's part.

Buffers are allocated and freed where torch issues gathers, in the same order on a CPU, which waits for each, and on CUDA, which
goes on on streams of their own. There a freed buffer is used again by later gathers only: that is in what is reserved.

Offloaded shards are copied to the device tensor by tensor, from there into a group's flat buffer, and freed. Gradients' parts go
to the host as soon as they are there.

Oracle: the step of small models with torch's `fully_shard`, on a process group that moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lownibble.planning.exchange import Exchange
from lownibble.planning.tape import Parameter, Tape, Value


class Groups:
    """A model's parameters by group: decoder layers, then the rest.

    Args:
        layers: parameters of each layer. rest: all others.
    """

    def __init__(self, tape: Tape, layers: Sequence[Sequence[Parameter]], rest: Sequence[Parameter]) -> None:
        self._tape, self._groups, self._last = tape, [*layers, rest], len(layers)
        self._whole: dict[int, list[Value]] = {}
        self._ahead: dict[int, Value] = {}
        self._parts: dict[int, Value] = {}
        self._reduced: Value | None = None
        trained = sum(self._flat_bytes(number, trained=True) for number in range(len(self._groups)))
        in_layers = sum(self._flat_bytes(number) for number in range(self._last))
        tape.exchange = Exchange("fsdp", in_layers, self._flat_bytes(self._last), trained)

    def start(self) -> None:
        """Gather the group of the rest, for forward and backward."""
        if self._last not in self._whole:
            self._gather(self._last)

    def hold(self, number: int) -> None:
        """Have a group whole, as it is read."""
        shards = self._tape.shards
        self._whole[number] = [self._tape.new(shards * each.part, each.itemsize, "gathered") for each in self._groups[number]]

    def run(self, number: int, x: Value, layer: Callable[[Value], Value]) -> Value:
        """`layer(x)`, gathered meanwhile, as it is for its backward."""
        received = self._gather(number)
        if number + 1 < self._last:
            self._ahead[number + 1] = self._buffer(number + 1)
        x = self._then(x, lambda: self._end(number))
        out = layer(x)
        del self._whole[number], received
        return self._then(out, lambda: self._begin(number))

    def finish(self) -> None:
        """Backward has ended: of groups whose inputs need no gradient, and of the rest."""
        for number in range(len(self._groups)):
            self._end(number)
        self._reduced = None
        self._ahead.clear()

    def _flat_bytes(self, number: int, *, trained: bool = False) -> int:
        chosen = [each for each in self._groups[number] if each.trained or not trained]
        return sum(self._tape.shards * each.part * each.itemsize for each in chosen)

    def _buffer(self, number: int) -> Value:
        tape = self._tape
        copies = [tape.new(each.part, each.itemsize, "communication") for each in self._groups[number] if tape.offloaded]
        received = tape.new(self._flat_bytes(number), 1, "communication")
        del copies
        return received

    def _gather(self, number: int) -> Value:
        """Have a group whole; returns the buffer that it was copied out of."""
        received = self._ahead.pop(number, None) or self._buffer(number)
        self.hold(number)
        return received

    def _begin(self, number: int) -> None:
        """A layer's backward begins."""
        self._gather(number)
        if number:
            self._ahead[number - 1] = self._buffer(number - 1)

    def _end(self, number: int) -> None:
        self._whole.pop(number, None)
        leaves = [each.leaf for each in self._groups[number] if each.leaf is not None and each.leaf.grad is not None]
        if not leaves:
            return
        n_bytes = self._flat_bytes(number, trained=True)
        self._reduced = None
        self._reduced = self._tape.new(n_bytes, 1, "communication")
        for leaf in leaves:
            leaf.grad = None
        part = self._tape.new(n_bytes // self._tape.shards, 1, "gradients")
        if not self._tape.offloaded:
            self._parts.setdefault(number, part)  # those of later microbatches are added to it

    def _then(self, x: Value, what: Callable[[], None]) -> Value:
        """x, with something to be done when backward gets there."""
        out = x.view()

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            what()
            return [grads[0]]

        self._tape.record([out], [x], [], backward)
        return out
