"""Memory simulation of torch: tensors without values, autograd with torch's execution order and tensor lifetimes.

Instead of estimating a training step's memory by a formula with constants, the planner runs the step operation by operation, at
the sizes of a model that may exceed this machine, in pure Python and a fraction of a second. Each operation allocates what
torch's does and saves the same tensors for backward; its backward follows torch's derivatives
(tools/autograd/derivatives.yaml), temporaries included. As in torch, memory is freed when Python drops the last reference: a
`Storage` is freed by its own `__del__`, so lifetimes need no bookkeeping. The engine runs nodes in torch's order (latest first,
gradients accumulated in place), and checkpointing is the non-reentrant variant with early stop. In a compiled layer, a tensor
that follows elementwise from others is not saved but computed again, once, when backward first reads it (`Recipe`).

Oracle: torch's profiler on a real step of small models on a CPU; tests hold the peak to it (0.5% for most families of decoders),
and to a trace of the step on fake tensors (`rehearsal/trace.py`).

Rejected: a closed formula for each phase (published ones omit backward's temporaries, which decide the peak with activation
checkpointing; a formula with them would be this program written out); tracing alone (needs torch and transformers, and seconds).
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lownibble.planning.exchange import Exchange

FLOAT32, BFLOAT16, INT64, BOOL = 4, 2, 8, 1
"""Bytes per element."""


_ALONE = 2
"""`sys.getrefcount` of a storage with one value: the value's reference, and the call argument's."""


class Storage:
    """Bytes allocated on construction and freed when the last reference is dropped."""

    __slots__ = ("key", "n_bytes", "tape")

    def __init__(self, tape: Tape, n_bytes: int, kind: str) -> None:
        self.tape, self.n_bytes, self.key = tape, n_bytes, len(tape.kinds)
        tape.kinds.append(kind)
        tape.change(self.key, n_bytes)

    def __del__(self) -> None:
        self.tape.change(self.key, -self.n_bytes)


class Value:
    """A tensor: its storage, elements, bytes per element, where its gradient goes, and how backward computes it again."""

    __slots__ = ("itemsize", "leaf", "n", "node", "output", "recipe", "storage", "trained")

    def __init__(self, storage: Storage, n: int, itemsize: int, trained: bool = False) -> None:
        self.storage, self.n, self.itemsize, self.trained = storage, n, itemsize, trained
        self.node: Node | None = None
        self.output = 0
        self.leaf: Leaf | None = None
        self.recipe: Recipe | None = None

    @property
    def wants_grad(self) -> bool:
        """Whether it needs a gradient."""
        return self.trained or self.node is not None

    def view(self) -> Value:
        """The same storage, detached from the graph."""
        return Value(self.storage, self.n, self.itemsize)


class Parameter(Value):
    """A parameter; `part`: the elements of it that a rank holds."""

    __slots__ = ("part",)

    def __init__(self, storage: Storage, n: int, itemsize: int, trained: bool, part: int) -> None:
        super().__init__(storage, n, itemsize, trained)
        self.part = part


class Recipe:
    """A tensor that backward computes again, from `sources`, at its first use; it is freed after the last one."""

    __slots__ = ("_like", "_made", "_tape", "sources")

    def __init__(self, tape: Tape, value: Value, sources: Sequence[Value]) -> None:
        self.sources = [each.view() for each in sources]
        self._tape, self._like = tape, (value.n, value.itemsize)
        self._made: Value | None = None

    def run(self) -> Value:
        """The tensor."""
        self._made = self._made or self._tape.new(*self._like)
        return self._made


Grads = list["Value | None"]
Backward = Callable[[Grads, "list[Value]"], "Sequence[Value | None]"]


class Node:
    """An autograd graph node: saved tensors, backward function, and the edges its gradients go to."""

    __slots__ = ("backward", "edges", "grads", "saved", "sequence")

    def __init__(self, sequence: int, backward: Backward, edges: list[Value | None], saved: list[_Saved], outputs: int) -> None:
        self.sequence, self.backward, self.saved = sequence, backward, saved
        self.edges = [_Edge(value) if value is not None and value.wants_grad else None for value in edges]
        self.grads: Grads = [None] * outputs


class Leaf:
    """A parameter's gradient, and the running sum of its gradients within a backward pass; not `named`: of no parameter."""

    __slots__ = ("grad", "grads", "named")

    def __init__(self, named: bool = True) -> None:
        self.grad: Value | None = None
        self.grads: Grads = [None]
        self.named = named


class _Edge:
    """Where a gradient goes: a node's output or a parameter, and the size it must have there."""

    __slots__ = ("n", "output", "target")

    def __init__(self, value: Value) -> None:
        if value.node is None and value.leaf is None:
            value.leaf = Leaf()
        target = value.node or value.leaf
        assert target is not None
        self.target: Node | Leaf = target
        self.output, self.n = value.output, value.n


class _Saved:
    """A saved tensor; under checkpointing, a slot that recomputation fills."""

    __slots__ = ("region", "value")

    def __init__(self, value: Value | Recipe | None, region: Region | None) -> None:
        self.value, self.region = value, region

    def unpack(self) -> Value:
        if self.value is None:
            assert self.region is not None
            self.region.run_again()
        assert self.value is not None
        return self.value.run() if isinstance(self.value, Recipe) else self.value


class _Enough(Exception):  # noqa: N818 - not an error
    """Early stop: all saved tensors of a checkpointed region are recomputed."""


class Region:
    """A checkpointed region: its saved tensors are dropped, and recomputed when the first of them is needed; `whole`: those that
    a compiled graph would compute again later, too."""

    def __init__(self, tape: Tape, run: Callable[[], object], whole: bool) -> None:
        self._tape, self._run, self._whole = tape, run, whole
        self.places: list[_Saved] = []
        self.filled = 0

    def run_again(self) -> None:
        """Recompute the region's saved tensors."""
        tape = self._tape
        before, tape.filling, self.filled = tape.filling, self, 0
        try:
            self._run()
        except _Enough:
            pass
        finally:
            tape.filling = before

    def fill(self, value: Value) -> None:
        """Fill the next slot; raises `_Enough` after the last one."""
        self.places[self.filled].value = value.view() if self._whole else value.recipe or value.view()
        self.filled += 1
        if self.filled == len(self.places):
            self.places = []  # the nodes hold them
            raise _Enough


class LayerInputs:
    """Inputs of checkpointed layers on the host, as `training/offload.py` keeps them: on the device is the newest one in forward,
    in backward the one in use and the one before it."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._on_device: list[Value | None] = []
        self._sizes: list[tuple[int, int]] = []

    def store(self, x: Value) -> Callable[[], Value]:
        """Keep x on the host; returns what brings it back."""
        if self._on_device:
            self._on_device[-1] = None
        number = len(self._sizes)
        self._sizes.append((x.n, x.itemsize))
        self._on_device.append(x)
        self._tape.host_bytes = max(self._tape.host_bytes, sum(pinned_bytes(n * size) for n, size in self._sizes))
        return lambda: self._load(number)

    def _load(self, number: int) -> Value:
        x = self._fetch(number)
        self._on_device[number] = None
        if number:
            self._on_device[number - 1] = self._fetch(number - 1)
        return x

    def _fetch(self, number: int) -> Value:
        return self._on_device[number] or self._tape.new(*self._sizes[number])


def pinned_bytes(n_bytes: int) -> int:
    """Bytes of pinned host memory for a tensor: torch rounds them to a power of two (ATen/core/CachingHostAllocator.h)."""
    return 1 << max(0, n_bytes - 1).bit_length()


class Tape:
    """Record of all allocations and frees, and the bytes in use.

    Attributes:
        events: (storage's number, bytes), negative for a free; for the allocator.
        kinds: kind of memory of each storage, by its number.
        marks: (name, events so far, bytes in use) at the end of each phase.
        used: bytes in use now.
        offloaded: whether parameters are in host memory (FSDP's offloaded shards).
        host_bytes: host memory for offloaded checkpoints or shards; pinned tensors are rounded up (`pinned_bytes`).
        host_kinds: kind -> bytes of the tensors of offloaded shards, as they are.
        compiled: whether it is a step of compiled decoder layers.
        shards: ranks that each parameter is divided among.
        parts: (elements on this rank, bytes per element) of every trained parameter.
        exchange: what ranks exchange, if they do.
    """

    def __init__(self, round_to: int = 1, *, compiled: bool = False, shards: int = 1, offloaded: bool = False) -> None:
        self.host_bytes, self.compiled, self.shards, self.offloaded = 0, compiled, shards, offloaded
        self.host_kinds: dict[str, int] = {}
        self.parts: list[tuple[int, int]] = []
        self.exchange: Exchange | None = None
        self.events: list[tuple[int, int]] = []
        self.kinds: list[str] = []
        self.marks: list[tuple[str, int, int]] = []
        self.round_to, self.used = round_to, 0
        self.filling: Region | None = None
        self._dropping: Region | None = None
        self._sequence = 0
        self._recording = True

    def change(self, key: int, n_bytes: int) -> None:
        """Record an allocation or a free (negative bytes)."""
        self.events.append((key, n_bytes))
        self.used += n_bytes

    def mark(self, name: str) -> None:
        """Mark the end of a phase."""
        self.marks.append((name, len(self.events), self.used))

    def hold(self, sizes: Sequence[int], kind: str) -> None:
        """Insert allocations of these sizes at the first mark, never freed; for a finished tape."""
        _, place, _ = self.marks[0]
        first = len(self.kinds)
        self.kinds += [kind] * len(sizes)
        self.events[place:place] = [(first + number, n) for number, n in enumerate(sizes)]
        self.marks = [(name, at + len(sizes), used + sum(sizes)) for name, at, used in self.marks]

    def insert(self, name: str, n_bytes: int, kind: str) -> None:
        """Insert a phase after the last backward pass, in which so many bytes are allocated and freed; for a finished tape."""
        number = max(number for number, (phase, _, _) in enumerate(self.marks) if phase == "backward") + 1
        _, place, used = self.marks[number - 1]
        n_bytes, key = -(-n_bytes // self.round_to) * self.round_to, len(self.kinds)
        self.kinds.append(kind)
        self.events[place:place] = [(key, n_bytes), (key, -n_bytes)]
        later = [(phase, at + 2, used) for phase, at, used in self.marks[number:]]
        self.marks[number:] = [(name, place + 2, used), *later]

    def copy(self) -> Tape:
        """A copy of a finished tape."""
        other = Tape(self.round_to, compiled=self.compiled)
        other.events, other.kinds, other.marks, other.used = [*self.events], [*self.kinds], [*self.marks], self.used
        other.host_bytes, other.host_kinds = self.host_bytes, {**self.host_kinds}
        return other

    # tensors

    def new(self, n: int, itemsize: int = FLOAT32, kind: str = "activations") -> Value:
        """Allocate a tensor."""
        return Value(Storage(self, -(-n * itemsize // self.round_to) * self.round_to, kind), n, itemsize)

    def parameter(self, n: int, itemsize: int, kind: str, trained: bool = False, rows: int | None = None) -> Parameter:
        """Allocate a parameter, or a rank's part of it; `rows`: its first dimension, default that of a vector."""
        rows = rows or n
        part = -(-rows // self.shards) * (n // rows)
        if trained:
            self.parts.append((part, itemsize))
        if self.offloaded:
            self.hold_on_host([part * itemsize], kind, pinned=True)
        return Parameter(self.new(0 if self.offloaded else part, itemsize, kind).storage, n, itemsize, trained, part)

    def hold_on_host(self, sizes: Sequence[int], kind: str, *, pinned: bool) -> None:
        """Count tensors of offloaded shards in host memory."""
        self.host_kinds[kind] = self.host_kinds.get(kind, 0) + sum(sizes)
        self.host_bytes += sum(map(pinned_bytes, sizes)) if pinned else sum(sizes)

    def like(self, value: Value) -> Value:
        """Allocate a tensor of the same size and dtype."""
        return self.new(value.n, value.itemsize)

    # the graph

    @property
    def recording(self) -> bool:
        """Whether operations are recorded for backward."""
        return self._recording

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Disable graph recording."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    def record(
        self, outputs: Sequence[Value], inputs: Sequence[Value | None], saved: Sequence[Value], backward: Backward
    ) -> None:  # fmt: skip
        """Add a graph node from inputs to outputs. `saved` is held until its backward has run, as that one's second argument."""
        if not self._recording or not any(value is not None and value.wants_grad for value in inputs):
            return
        node = Node(self._sequence, backward, list(inputs), [self._save(value) for value in saved], len(outputs))
        self._sequence += 1
        for number, output in enumerate(outputs):
            output.node, output.output = node, number

    def _save(self, value: Value) -> _Saved:
        if self.filling is not None:
            self.filling.fill(value)
            return _Saved(None, None)  # backward never runs through the recomputed graph
        if self._dropping is not None:
            place = _Saved(None, self._dropping)
            self._dropping.places.append(place)
            return place
        return _Saved(value.recipe or value.view(), None)

    def checkpoint(self, function: Callable[[Value], Value], x: Value, inputs: LayerInputs | None = None) -> Value:
        """`function(x)` with activation checkpointing: backward recomputes saved tensors from x, kept in `inputs` if given. As
        in transformers, a checkpoint without `inputs` is inside of a compiled layer's graph, whose backward runs the whole layer
        again; one with `inputs` is outside of it."""
        wants = x.wants_grad
        load = x.view if inputs is None else inputs.store(x.view())

        def again() -> object:
            detached = load()
            detached.trained = wants
            return function(detached)

        before, self._dropping = self._dropping, Region(self, again, inputs is None)
        try:
            return function(x)
        finally:
            self._dropping = before

    def gradients(self, run: Callable[[], Value], gradient: Value, of: Sequence[Value]) -> list[Value]:
        """The gradients of tensors in what `run` computes now, as torch.autograd.grad; parameters' own are left alone."""
        before = [each.leaf for each in of]
        leaves = [Leaf(named=False) for _ in of]
        for each, leaf in zip(of, leaves, strict=True):
            each.leaf = leaf
        try:
            out = run()
        finally:
            for each, own in zip(of, before, strict=True):
                each.leaf = own
        self.backward(out, gradient)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def backward(self, root: Value, gradient: Value | None = None) -> None:
        """Compute the gradients of all parameters that `root` depends on; `gradient`: its own, default that of a scalar."""
        if root.node is None:
            return
        root.node.grads[root.output] = gradient or self.like(root)
        del gradient
        waiting = _dependencies(root.node)
        ready = [(-root.node.sequence, root.node)]
        while ready:
            _, node = heapq.heappop(ready)
            results = self._results(node)
            for edge in node.edges:
                gradient = results.pop(0)
                if edge is None:
                    continue
                target = edge.target
                if gradient is not None:
                    held = target.grads[edge.output]
                    target.grads[edge.output] = gradient if held is None else self._sum(held, gradient)
                    del held
                waiting[id(target)] -= 1
                if waiting[id(target)] == 0:
                    if isinstance(target, Node):
                        heapq.heappush(ready, (-target.sequence, target))
                    else:
                        self._accumulate(target)
                del gradient
            del node

    def _results(self, node: Node) -> list[Value | None]:
        grads, node.grads = node.grads, []
        results = list(node.backward(grads, [saved.unpack() for saved in node.saved]))
        del grads
        for i, (edge, result) in enumerate(zip(node.edges, results, strict=True)):
            if edge is not None and result is not None and result.n > edge.n:
                results[i] = self.new(edge.n, result.itemsize)  # summed over the broadcast dimensions
                del result
        node.saved = []
        return results

    def _accumulate(self, leaf: Leaf) -> None:
        """The first gradient becomes the parameter's; those of later microbatches are added in place."""
        (gradient,), leaf.grads = leaf.grads, [None]
        if leaf.grad is None and gradient is not None:
            leaf.grad = gradient.view()
            if leaf.named:
                self.kinds[gradient.storage.key] = "gradients"

    def _sum(self, held: Value, gradient: Value) -> Value:
        """Add gradients, in place if the first one's storage has no other owner."""
        alone = sys.getrefcount(held.storage) == _ALONE
        return held if alone else self.like(held)


def _dependencies(root: Node) -> dict[int, int]:
    """id of a node or leaf -> number of gradients it waits for."""
    counts: dict[int, int] = {}
    seen, stack = {id(root)}, [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            counts[id(edge.target)] = counts.get(id(edge.target), 0) + 1
            if isinstance(edge.target, Node) and id(edge.target) not in seen:
                seen.add(id(edge.target))
                stack.append(edge.target)
    return counts
