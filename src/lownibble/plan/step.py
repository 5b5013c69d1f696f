"""A training step of Lownibble on a `Tape`: the model's modules as transformers writes them, our own linears and loss.

Names of local variables matter here: a tensor is in use as long as a function's variable refers to it, here as in the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lownibble.arch import Linear, ModelShape
from lownibble.plan import operations as op
from lownibble.plan.tape import BFLOAT16, FLOAT32, INT64, Storage, Tape, Value

CHUNK_BYTES = 64 * 2**20
"""As in `training/loss.py`: largest size of one chunk of float32 logits."""


class Batch(NamedTuple):
    """One forward pass: rows, tokens of a row (padding included), label tokens."""

    rows: int
    length: int
    labels: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.rows * self.length


@dataclass(frozen=True)
class Runtime:
    """How a device computes.

    Attributes:
        itemsize: bytes of an element of dense weights and activations.
        fused: the product with a 4-bit weight decodes it inside the kernel; else into one buffer for all layers.
        kernel_softmax: the head's softmax allocates nothing.
    """

    itemsize: int
    fused: bool
    kernel_softmax: bool


@dataclass(frozen=True)
class Method:
    """What is trained, and how the frozen weights are stored.

    Attributes:
        full: all weights are trained.
        quantised: bytes of a 4-bit weight's codes and constants by its number of elements; None: dense.
        ranks: name of a layer's linear -> rank of its adapter; absent: none.
    """

    full: bool = False
    quantised: Callable[[int], list[int]] | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    head_rank: int = 0


class _LinearOnTape:
    """A linear layer: dense and trained, or frozen (dense or 4-bit) with an adapter of rank r or none."""

    def __init__(self, tape: Tape, linear: Linear, method: Method, run: Runtime, scratch: _Scratch) -> None:
        self.tape, self.run, self.scratch = tape, run, scratch
        self.n_in, self.n_out, self.r = linear.in_features, linear.out_features, method.ranks.get(linear.name, 0)
        n = self.n_in * self.n_out
        self.packed = method.quantised is not None
        self.weight: Value | None = None
        if method.quantised is None:
            self.weight = tape.parameter(n, run.itemsize, method.full)
            self.parts: list[Value] = [self.weight]
        else:
            self.parts = [tape.parameter(size, 1) for size in method.quantised(n)]
        self.bias = tape.parameter(self.n_out, run.itemsize, method.full) if linear.bias else None
        self.A = tape.parameter(self.r * self.n_in, FLOAT32, True) if self.r else None
        self.B = tape.parameter(self.r * self.n_out, FLOAT32, True) if self.r else None

    @property
    def trained(self) -> list[Value]:
        """Its parameters that want a gradient."""
        return [p for p in (*self.parts, self.bias, self.A, self.B) if p is not None and p.trained]

    def __call__(self, x: Value) -> Value:
        tokens = x.n // self.n_in
        if self.r:
            return self._adapted(x, tokens)
        if self.packed:
            return self._frozen(x, tokens)
        return self._dense(x, tokens)

    def _dense(self, x: Value, tokens: int) -> Value:
        """torch's linear."""
        tape, size, weight = self.tape, self.run.itemsize, self.weight
        assert weight is not None
        out = tape.new(tokens * self.n_out, size)
        wants_x, wants_w = x.wants_grad, weight.trained

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            dx = tape.new(tokens * self.n_in, size) if wants_x else None
            dw = tape.new(weight.n, size) if wants_w else None
            db = tape.new(self.n_out, size) if wants_w and self.bias is not None else None
            return [dx, dw, db]

        tape.record([out], [x, weight, self.bias], [*[weight] * wants_x, *[x] * wants_w], backward)
        return out

    def _product(self, tokens: int, columns: int, factor: int) -> Value:
        """(tokens, columns): something with the weight, plus a low-rank branch whose factor has so many elements."""
        tape, size = self.tape, self.run.itemsize
        if self.packed and not (self.run.fused and size == FLOAT32):
            self.scratch.need(self.n_in * self.n_out)
        out = tape.new(tokens * columns, size)
        if factor and size != FLOAT32 and (self.packed or columns):
            tape.new(factor, size)
        return out

    def _frozen(self, x: Value, tokens: int) -> Value:
        """`quant/linear.py`: nothing is saved."""
        out = self._product(tokens, self.n_out, 0)
        self.tape.record([out], [x], [], lambda grads, saved: [self._product(tokens, self.n_in, 0)])
        return out

    def _adapted(self, x: Value, tokens: int) -> Value:
        """`lora/product.py`."""
        tape, size, r = self.tape, self.run.itemsize, self.r
        A, B = self.A, self.B
        assert A is not None
        assert B is not None
        cast = tape.new(A.n, size) if size != FLOAT32 else None
        low = tape.new(tokens * r, size)
        del cast
        out = self._product(tokens, self.n_out, B.n)
        wants_x = x.wants_grad

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            cast = tape.new(B.n, size) if size != FLOAT32 else None
            dlow = tape.new(tokens * r, size)
            del cast
            dA = tape.new(A.n, size)
            if size != FLOAT32:
                dA = tape.new(A.n, FLOAT32)
            turned = tape.new(B.n, size)
            if size != FLOAT32:
                turned = tape.new(B.n, FLOAT32)
            dB = tape.new(B.n, FLOAT32)
            del turned
            dx = self._product(tokens, self.n_in, A.n) if wants_x else None
            return [dx, dA, dB]

        tape.record([out], [x, A, B], [x, low], backward)
        return out


class _Scratch:
    """The buffer that 4-bit weights are decoded into: as large as the largest so far."""

    def __init__(self, tape: Tape, itemsize: int) -> None:
        self.tape, self.itemsize = tape, itemsize
        self.buffer: Value | None = None

    def need(self, n: int) -> None:
        """Make room for so many elements."""
        if self.buffer is None or self.buffer.n < n:
            self.buffer = self.tape.new(n, self.itemsize)


class Model:
    """A decoder-only model on a tape."""

    def __init__(self, tape: Tape, shape: ModelShape, method: Method, run: Runtime) -> None:
        self.tape, self.shape, self.run, self.method = tape, shape, run, method
        scratch = _Scratch(tape, run.itemsize)
        family = shape.family
        self.embedding = tape.parameter(shape.vocab * shape.hidden, run.itemsize, method.full)
        self.layers = [
            {linear.name: _LinearOnTape(tape, linear, method, run, scratch) for linear in shape.linears} for _ in range(shape.layers)
        ]
        each = shape.hidden
        self.norms = [[self._norm_parameter(each) for _ in range(family.norms)] for _ in range(shape.layers)]
        self.qk_norms = [
            [self._norm_parameter(shape.head_dim) for _ in range(2 * family.qk_norm)] for _ in range(shape.layers)
        ]
        self.last_norm = self._norm_parameter(each)
        self.head = self.embedding if shape.tied else tape.parameter(shape.vocab * shape.hidden, run.itemsize, method.full)
        self.frequencies = [tape.new(shape.head_dim // 2, FLOAT32) for _ in range(2)]

    def _norm_parameter(self, n: int) -> Value:
        return self.tape.parameter(n, self.run.itemsize, self.method.full)

    @property
    def trained(self) -> list[Value]:
        """All parameters that want a gradient."""
        others = [self.embedding, *sum(self.norms, []), *sum(self.qk_norms, []), self.last_norm]
        others += [] if self.shape.tied else [self.head]
        return [p for p in others if p.trained] + [
            p for layer in self.layers for linear in layer.values() for p in linear.trained
        ]

    # modules

    def _norm(self, x: Value, weight: Value) -> Value:
        tape, rows = self.tape, x.n // weight.n
        if self.shape.family.norm == "rms1":
            hidden = op.cast(tape, x, FLOAT32)
            normed = op.mul(tape, hidden, op.rsqrt(tape, op.shift(tape, op.mean(tape, op.square(tape, hidden), rows))))
            del hidden
            out = op.mul(tape, normed, op.shift(tape, op.cast(tape, weight, FLOAT32)))
            return op.cast(tape, out, x.itemsize)
        hidden = op.cast(tape, x, FLOAT32)
        variance = op.mean(tape, op.square(tape, hidden), rows)
        hidden = op.mul(tape, hidden, op.rsqrt(tape, op.shift(tape, variance)))
        return op.mul(tape, weight, op.cast(tape, hidden, x.itemsize))

    def _rotate(self, q: Value, k: Value, cos: Value, sin: Value) -> tuple[Value, Value]:
        tape = self.tape
        q_embed = op.add(tape, op.mul(tape, q, cos), op.mul(tape, op.rotate_half(tape, q), sin))
        k_embed = op.add(tape, op.mul(tape, k, cos), op.mul(tape, op.rotate_half(tape, k), sin))
        return q_embed, k_embed

    def _attention(self, layer: int, hidden: Value, cos: Value, sin: Value) -> Value:
        tape, linears = self.tape, self.layers[layer]
        query = op.heads_first(tape, linears["self_attn.q_proj"](hidden))
        key = op.heads_first(tape, linears["self_attn.k_proj"](hidden))
        value = linears["self_attn.v_proj"](hidden)
        if self.qk_norms[layer]:
            query = self._norm(query, self.qk_norms[layer][0])
            key = self._norm(key, self.qk_norms[layer][1])
        query, key = self._rotate(query, key, cos, sin)
        out = op.attention(tape, query, key, value, query.n // self.shape.head_dim)
        return linears["self_attn.o_proj"](out)

    def _mlp(self, layer: int, x: Value) -> Value:
        tape, linears = self.tape, self.layers[layer]
        gated = op.activation(tape, linears["mlp.gate_proj"](x))
        return linears["mlp.down_proj"](op.mul(tape, gated, linears["mlp.up_proj"](x)))

    def _layer(self, layer: int, hidden: Value, cos: Value, sin: Value) -> Value:
        tape, norms = self.tape, self.norms[layer]
        residual = hidden
        hidden = self._norm(hidden, norms[0])
        hidden = self._attention(layer, hidden, cos, sin)
        if len(norms) == 4:
            hidden = self._norm(hidden, norms[1])
        hidden = op.add(tape, residual, hidden)
        residual = hidden
        hidden = self._norm(hidden, norms[-2] if len(norms) == 4 else norms[1])
        hidden = self._mlp(layer, hidden)
        if len(norms) == 4:
            hidden = self._norm(hidden, norms[3])
        return op.add(tape, residual, hidden)

    def forward(self, batch: Batch, checkpointing: bool) -> Value:
        """Last hidden states."""
        tape, shape, size = self.tape, self.shape, self.run.itemsize
        hidden = op.embedding(tape, self.embedding, batch.tokens, shape.hidden)
        positions = tape.new(batch.length, INT64)
        with tape.no_grad():
            n = batch.length * shape.head_dim
            angles = tape.new(n // 2, FLOAT32)
            both = tape.new(n, FLOAT32)
            cos = op.scale(tape, tape.new(n, FLOAT32))
            sin = op.scale(tape, tape.new(n, FLOAT32))
            cos, sin = op.cast(tape, cos, size), op.cast(tape, sin, size)
            del angles, both
        del positions
        for layer in range(shape.layers):
            if checkpointing:
                hidden = tape.checkpoint(lambda x, layer=layer: self._layer(layer, x, cos, sin), hidden)  # type: ignore[misc]
            else:
                hidden = self._layer(layer, hidden, cos, sin)
        return self._norm(hidden, self.last_norm)


def loss(model: Model, batch: Batch, checkpointing: bool) -> Value:
    """`training/loss.py`."""
    hidden = model.forward(batch, checkpointing)
    model.tape.mark("forward")
    tape, shape, size = model.tape, model.shape, model.run.itemsize
    L, H, V = batch.labels, shape.hidden, shape.vocab
    places = tape.new(L, INT64)
    gathered = tape.new(L * H, size)
    whole = hidden.n

    def scatter(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        zeros = tape.new(whole, size)
        return [tape.like(zeros)]

    tape.record([gathered], [hidden], [places], scatter)
    del hidden
    wants_hidden, head = gathered.wants_grad, model.head
    dhidden = tape.like(gathered) if wants_hidden else None
    dhead = tape.like(head) if head.trained else None
    chunk = max(16, CHUNK_BYTES // (4 * V))
    if not head.trained:
        rows = -(-L // -(-L // chunk))
        logits = tape.new(rows * V, size)
        scores = logits if size == FLOAT32 else tape.new(rows * V, FLOAT32)
        if size != FLOAT32:
            tape.new(rows * V, size)
        del logits, scores
    else:
        rows = min(chunk, L)
        logits = tape.new(rows * V, size)
        scores = logits if size == FLOAT32 else tape.new(rows * V, FLOAT32)
        dlogits = scores if size == FLOAT32 else tape.new(rows * V, size)
        del scores
        dchunk = tape.new(rows * H, size) if wants_hidden else None
        dpart = tape.like(head)
        del logits, dlogits, dchunk, dpart
    out = tape.new(1, FLOAT32)
    kept = [value for value in (dhidden, dhead) if value is not None]

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        results = list(saved)
        return [results.pop(0) if wants_hidden else None, results.pop(0) if head.trained else None]

    tape.record([out], [gathered, head], kept, backward)
    return out
