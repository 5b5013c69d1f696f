"""FSDP2 on a `Tape`: parameters held in parts, by group gathered while they are used, gradients reduced to parts.

As torch's `fully_shard` with each decoder layer a group, gathered again in backward, and one group for the rest (embedding, last
norm, head), gathered from a pass's first use of it to its end. A rank holds the first dimension of each tensor divided by the
number of ranks, rounded up, and a gathered tensor has that many times the part's elements. A group is received in a flat buffer
and copied out of it. In forward the buffer is kept until the next layer has copied its own; in backward it is given back at
once, and the next layer's is there while a layer runs. Gradients are whole within a layer's backward; then they go to a flat
buffer, which is kept until the next layer's is made, and come out as this rank's part.

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
        self._received: Value | None = None
        self._reduced: Value | None = None
        trained = sum(self._flat_bytes(number, trained=True) for number in range(len(self._groups)))
        in_layers = sum(self._flat_bytes(number) for number in range(self._last))
        tape.exchange = Exchange("fsdp", in_layers, self._flat_bytes(self._last), trained)

    def start(self) -> None:
        """Gather the group of the rest, for forward and backward."""
        self.gather(self._last)

    def gather(self, number: int) -> None:
        """Gather a group for forward."""
        if number not in self._whole:
            received = self._buffer(number)
            self._copy_out(number)
            self._received = received

    def run(self, number: int, x: Value, layer: Callable[[Value], Value]) -> Value:
        """`layer(x)`, gathered meanwhile, as it is for its backward."""
        self.gather(number)
        x = self._then(x, lambda: self._end(number))
        out = layer(x)
        del self._whole[number]
        return self._then(out, lambda: self._begin(number))

    def forwarded(self) -> None:
        """The model has returned: the last layer's buffer is given back."""
        self._received = None

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

    def _copy_out(self, number: int) -> None:
        shards = self._tape.shards
        self._whole[number] = [self._tape.new(shards * each.part, each.itemsize, "gathered") for each in self._groups[number]]

    def _begin(self, number: int) -> None:
        """A layer's backward begins."""
        received = self._ahead.pop(number, None) or self._buffer(number)
        self._copy_out(number)
        del received
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
