"""The MLP of a mixture of experts on a `Tape`: router, and experts that are held in one tensor for all of them.

Experts that are neither packed nor adapted run transformers' pass: tokens are sorted by expert, and all experts are one grouped
matmul. If any layer's are, all run ours (`models/experts.py`) on the sorted rows. On CUDA a product is a kernel for all experts,
which decodes inside, or, with a codec without kernels, goes expert by expert, each written into the rows of a tensor for all. On
a CPU the pass goes expert by expert from tokens to tokens (`models/expert_pass.py`), decoding one expert at a time. What an
expert takes meanwhile is counted once, for an even share of the rows; how many the busiest one has, only the data tell.

Local variables matter, as in `decoder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lownibble.arch import Linear, ModelShape, expert_paths
from lownibble.planning import operations as op
from lownibble.planning.linear import LinearOnTape, Method, Runtime, SharedBuffers
from lownibble.planning.tape import FLOAT32, INT64, Leaf, Parameter, Tape, Value


class ExpertsOnTape(LinearOnTape):
    """A linear layer of all experts, dense or packed, with or without an adapter, as in `quant/experts.py` and
    `lora/experts.py`."""

    def __init__(
        self, tape: Tape, path: str, linear: Linear, method: Method, run: Runtime, buffers: SharedBuffers
    ) -> None:  # fmt: skip
        super().__init__(tape, path, linear, method, run, buffers)
        self.at_once = run.cuda and (not self.packed or path in method.fused)

    def __call__(self, x: Value) -> Value:
        """Forward pass for rows that are sorted by expert."""
        by_expert = self._adapted_rows if self.r else self._frozen_rows
        out = self._rows_at_once(x) if self.at_once else by_expert(x)
        return out if self.bias is None else op.add(self.tape, out, self.tape.new(out.n, out.itemsize))

    def _rows_at_once(self, x: Value) -> Value:
        tape, size, rows, wants_x = self.tape, self.run.itemsize, x.n // self.n_in, x.wants_grad
        low = tape.new(rows * self.r, size) if self.r else None
        out = tape.new(rows * self.n_out, size)

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            dlow = tape.new(rows * self.r, size) if self.r else None
            factors = [tape.new(each.n, FLOAT32) for each in self.adapter]
            dx = tape.new(rows * self.n_in, size) if wants_x else None
            del dlow
            return [dx, *factors]

        tape.record([out], [x, *self.adapter], [] if low is None else [x, low], backward)
        return out

    def share(self, rows: int) -> int:
        """An expert's rows of so many for all."""
        return -(-rows // self.n_experts)

    def rows_of_one(self, share: int) -> Value:
        """An expert's product, (share, out)."""
        tape, size, r = self.tape, self.run.itemsize, self.r
        if r:
            cast = tape.new(r * self.n_in, size) if size != self.of_adapter else None
            part = tape.new(share * r, size)
            del cast, part
        return self._product(share, self.n_out, r * self.n_out)

    def gradients_of_one(self, share: int, wants_x: bool = True) -> Value | None:
        """An expert's part of backward: the gradient of its rows, if wanted."""
        tape, size, r, of_adapter = self.tape, self.run.itemsize, self.r, self.of_adapter
        narrow, dlow = size != of_adapter, None
        if r:
            cast = tape.new(r * self.n_out, size) if narrow else None
            dlow = tape.new(share * r, size)
            del cast
            turned = [tape.new(r * self.n_out, each) for each in ([size] if narrow else []) + [of_adapter] * (not self.run.fused)]
            of_one = [tape.new(r * self.n_out, of_adapter)]
            del turned
            product = tape.new(r * self.n_in, size) if narrow else None
            of_one.append(tape.new(r * self.n_in, of_adapter))
            del product, of_one
        dx = self._product(share, self.n_in, r * self.n_in) if wants_x else None
        del dlow
        return dx

    def _frozen_rows(self, x: Value) -> Value:
        tape, size, rows = self.tape, self.run.itemsize, x.n // self.n_in
        out = tape.new(rows * self.n_out, size)
        self.rows_of_one(self.share(rows))

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            dx = tape.new(rows * self.n_in, size)
            self.gradients_of_one(self.share(rows))
            return [dx]

        tape.record([out], [x], [], backward)
        return out

    def _adapted_rows(self, x: Value) -> Value:
        tape, size, r, rows = self.tape, self.run.itemsize, self.r, x.n // self.n_in
        (A, B), share = self.adapter, self.share(rows)
        out, low = tape.new(rows * self.n_out, size), tape.new(rows * r, size)
        self.rows_of_one(share)
        wants_x = x.wants_grad

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            dA, dB = (tape.new(each.n, self.of_adapter) for each in (A, B))
            dx = tape.new(rows * self.n_in, size) if wants_x else None
            self.gradients_of_one(share, wants_x)
            return [dx, dA, dB]

        tape.record([out], [x, A, B], [x, low], backward)
        return out


def goes_by_expert(shape: ModelShape, method: Method) -> bool:
    """Whether a mixture's experts run our pass, as some are packed or adapted."""
    return any(path in method.packed or path in method.ranks for path, _ in expert_paths(shape))


class Mixture:
    """Router and experts of a decoder layer.

    Args:
        layer: its number. ours: it runs our pass. new: (elements, first dimension) -> a parameter that is the model's own.
    """

    def __init__(
        self, tape: Tape, shape: ModelShape, method: Method, run: Runtime, buffers: SharedBuffers, layer: int,
        ours: bool, new: Callable[[int, int], Parameter],
    ) -> None:  # fmt: skip
        self._tape, self._shape = tape, shape
        self.gate_up, self.down = self.linears = [
            ExpertsOnTape(tape, f"model.layers.{layer}.{linear.name}", linear, method, run, buffers)
            for linear in shape.expert_linears
        ]
        self._router = new(shape.experts * shape.hidden, shape.experts)
        self._router_bias = new(shape.experts, shape.experts) if shape.family.expert_bias else None
        self._pass = self._grouped_pass if not ours else self._pass_by_product if run.cuda else self._pass_by_expert

    @property
    def parameters(self) -> list[Parameter]:
        """Of experts and router."""
        router = [each for each in (self._router, self._router_bias) if each is not None]
        return [*(p for linear in self.linears for p in linear.parameters), *router]

    def __call__(self, x: Value) -> Value:
        """The sum over each token's experts, for all tokens."""
        tokens = x.n // self._shape.hidden
        rows = tokens * self._shape.active_experts
        shares, *held = self._route(x, tokens, rows)
        out = self._pass(x, shares, rows)
        del held
        return out

    def _route(self, x: Value, tokens: int, rows: int) -> tuple[Value, ...]:
        """The share of each token's experts, and what else the router returns."""
        tape, experts = self._tape, self._shape.experts
        scores = self._grouped(x, self._router, self._router_bias, tokens * experts)
        if self._shape.family.clamped:
            n, size = scores.n, scores.itemsize
            chosen, places = tape.new(rows, size), tape.new(rows, INT64)
            tape.record([chosen], [scores], [places], lambda grads, saved: [tape.new(n, size)])
            return op.softmax(tape, chosen, size), places, scores
        shares = op.softmax(tape, op.cast(tape, scores, FLOAT32), FLOAT32)
        chosen, places = tape.new(rows, FLOAT32), tape.new(rows, INT64)
        tape.record([chosen], [shares], [places], lambda grads, saved: [tape.new(tokens * experts, FLOAT32)])
        shares = op.mul(tape, chosen, tape.new(tokens, FLOAT32))
        return shares if self._shape.family.wide_shares else op.cast(tape, shares, x.itemsize), places, scores

    def _pass_by_expert(self, x: Value, shares: Value, rows: int) -> Value:
        """As `models/expert_pass.py`."""
        tape, size, first, second = self._tape, x.itemsize, self.gate_up, self.down
        share, width, narrow = first.share(rows), self._shape.hidden, x.itemsize != FLOAT32
        expert_of_row, order = tape.new(rows, INT64), tape.new(rows, INT64)
        shares, tokens = self._moved(shares, rows, order), tape.new(rows, INT64)
        out, fed = tape.new(x.n, FLOAT32), tape.new(rows * first.n_out, size)
        lows = [tape.new(rows * each.r, size) for each in self.linears if each.r]
        gathered = tape.new(share * width, size)
        made = first.rows_of_one(share)
        del gathered, made
        with tape.no_grad():
            h = self._gate(Value(fed.storage, share * first.n_out, size))
        h = tape.like(h)
        made = second.rows_of_one(share)
        made = op.cast(tape, made, FLOAT32)
        del h, made
        wants_x, adapters, n_shares, n_x = x.wants_grad, [*first.adapter, *second.adapter], shares.itemsize, x.n

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            dshares = tape.new(rows, n_shares)
            dx = tape.new(n_x, FLOAT32) if wants_x else None
            found = [tape.new(each.n, first.of_adapter) for each in adapters]
            dy = tape.new(share * width, FLOAT32)
            if narrow:
                dy = tape.new(share * width, size)
            before = Value(saved[0].storage, share * first.n_out, size, trained=True)
            before.leaf = Leaf(named=False)
            h = self._gate(before)
            weighted = tape.like(h)
            u = second.gradients_of_one(share)
            del weighted
            tape.backward(h, u)
            del h, u, dy
            gathered = tape.new(share * width, size)
            first.gradients_of_one(share, wants_x)
            del gathered, before
            return [dx if dx is None else op.cast(tape, dx, size), dshares, *found]

        tape.record([out], [x, shares, *adapters], [fed, x, shares, tokens, *lows], backward)
        summed = op.cast(tape, out, size)
        del out, fed, lows, expert_of_row, order, tokens
        return summed

    def _pass_by_product(self, x: Value, shares: Value, rows: int) -> Value:
        """As `models/experts.py`."""
        tape, width = self._tape, self._shape.hidden
        expert_of_row, order = tape.new(rows, INT64), tape.new(rows, INT64)
        current = self._moved(x, rows * width, tape.new(rows, INT64))
        both = self.gate_up(current)
        del current
        fed = self._gate(both)
        del both
        out = self.down(fed)
        out = op.mul(tape, out, self._moved(shares, rows, order))
        summed = self._summed(self._moved(out, out.n, tape.new(rows, INT64)), x)
        del out, fed, expert_of_row, order
        return summed

    def _grouped_pass(self, x: Value, shares: Value, rows: int) -> Value:
        tape, shape = self._tape, self._shape
        expert_of_row, order = tape.new(rows, INT64), tape.new(rows, INT64)
        current = self._moved(x, rows * shape.hidden, tape.new(rows, INT64))
        shares = self._moved(shares, rows, order)
        both = self._grouped(current, self.gate_up.parts[0], self.gate_up.bias, 2 * rows * shape.expert_ffn)
        fed = self._gate(both)
        del both
        out = self._grouped(fed, self.down.parts[0], self.down.bias, rows * shape.hidden)
        del fed
        weighted = op.mul(tape, out, shares)
        weighted = self._moved(weighted, out.n, tape.new(rows, INT64))
        summed = self._summed(weighted, x)
        del current, out, expert_of_row, order
        return summed

    def _summed(self, out: Value, x: Value) -> Value:
        """The sum over each token's experts, of x's size."""
        tape, result, n, size = self._tape, self._tape.new(x.n, out.itemsize), out.n, out.itemsize
        tape.record([result], [out], [], lambda grads, saved: [Value(grads[0].storage, n, size)])  # type: ignore[union-attr]
        del out
        return op.cast(tape, result, x.itemsize)

    def _gate(self, both: Value) -> Value:
        tape = self._tape
        if not self._shape.family.clamped:
            gate, up = op.halves(tape, both)
            return op.mul(tape, op.activation(tape, gate), up)
        gate, up = (op.activation(tape, op.narrow(tape, both, both.n // 2)) for _ in range(2))
        gated = op.mul(tape, gate, op.tanh(tape, op.scale(tape, gate)))
        return op.mul(tape, op.shift(tape, up), gated)

    def _moved(self, x: Value, n: int, order: Value) -> Value:
        """Gather rows of x, possibly repeated: n elements."""
        tape, before = self._tape, x.n
        out = tape.new(n, x.itemsize)
        itemsize = x.itemsize
        tape.record([out], [x], [order], lambda grads, _: [tape.new(before, itemsize)])
        return out

    def _grouped(self, x: Value, weight: Value, bias: Value | None, n: int) -> Value:
        """Grouped matmul with all experts' weights, or the router's: n result elements."""
        tape, before, itemsize = self._tape, x.n, x.itemsize
        out = tape.new(n, itemsize)
        wants_x, wants_weight = x.wants_grad, weight.trained

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            return [
                tape.new(before, itemsize) if wants_x else None,
                tape.like(weight) if wants_weight else None,
                tape.like(bias) if wants_weight and bias is not None else None,
            ]

        tape.record([out], [x, weight, bias], [*[weight] * wants_x, *[x] * wants_weight], backward)
        return out
