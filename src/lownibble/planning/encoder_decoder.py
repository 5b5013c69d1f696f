"""T5 on a `Tape`: an encoder and a decoder with cross-attention, as in transformers.

Instead of RoPE, attention has a relative position bias, looked up once in each stack's first layer. On a CPU the fused kernel
does not support a per-head bias with dropout or a gradient, so the scores are materialised; on CUDA it does.
"""

from __future__ import annotations

from lownibble.arch import Linear, ModelShape
from lownibble.planning import operations as op
from lownibble.planning.linear import LinearOnTape, Method, Runtime, SharedBuffers
from lownibble.planning.tape import FLOAT32, INT64, Tape, Value

Layer = dict[str, LinearOnTape]
"""Name of a linear layer within its block -> the linear layer."""


class EncoderDecoder:
    """All parameters on the tape, and the forward pass without the head; see `Decoder`."""

    def __init__(self, tape: Tape, shape: ModelShape, method: Method, run: Runtime) -> None:
        self.tape, self.shape, self.run, self.method = tape, shape, run, method
        self.buffers = SharedBuffers(tape, run)
        self.embedding = self._parameter(shape.vocab * shape.hidden)
        self.encoder = self._layers("encoder", shape.layers, shape.linears)
        self.decoder = self._layers("decoder", shape.decoder_layers, shape.decoder_linears)
        self.norms = [[self._parameter(shape.hidden) for _ in range(2)] for _ in self.encoder]
        self.norms += [[self._parameter(shape.hidden) for _ in range(3)] for _ in self.decoder]
        self.last_norms = [self._parameter(shape.hidden) for _ in range(2)]
        self.distances = [self._parameter(shape.buckets * shape.heads) for _ in range(2)]
        self.head = self.embedding if shape.tied else self._parameter(shape.vocab * shape.hidden)
        r = method.ranks.get("lm_head", 0)
        self.head_adapter = [
            tape.parameter(r * n, method.adapter_itemsize, "adapters", True) for n in (shape.hidden, shape.vocab) if r
        ]

    def _parameter(self, n: int) -> Value:
        return self.tape.parameter(n, self.run.itemsize, "weights", self.method.full)

    def _layers(self, stack: str, count: int, linears: tuple[Linear, ...]) -> list[Layer]:
        def linear(layer: int, each: Linear) -> LinearOnTape:
            path = f"{stack}.block.{layer}.{each.name}"
            return LinearOnTape(self.tape, path, each, self.method, self.run, self.buffers)

        return [{each.name: linear(layer, each) for each in linears} for layer in range(count)]

    def forward(self, rows: int, length: int, targets: int, checkpointing: bool) -> Value:
        """The decoder's last hidden states (rows x targets tokens); the encoder reads rows x length tokens."""
        read = self._stack(0, rows, length, None, length, checkpointing)
        return self._stack(1, rows, targets, read, length, checkpointing)

    def _stack(self, which: int, rows: int, length: int, read: Value | None, sources: int, checkpointing: bool) -> Value:
        tape, shape = self.tape, self.shape
        layers, norms = (self.encoder, self.norms[: shape.layers]), (self.decoder, self.norms[shape.layers :])
        chosen, of_norms = (layers, norms)[which]
        hidden = op.dropout(tape, op.embedding(tape, self.embedding, rows * length, shape.hidden), shape.dropout, self.run.cuda)
        if read is not None and not self.run.cuda:
            causal = tape.new(length * length, 1)
        shared: list[tuple[Value, Value | None]] = []

        def biases() -> tuple[Value, Value | None]:
            """The stack's self- and cross-attention biases; made in its first layer, and again when that is recomputed."""
            cross = None if read is None else tape.new(shape.heads * length * sources, self.run.itemsize)
            if cross is not None and checkpointing:
                cross.trained = True  # as in transformers, so that the first layer's result has a graph
            return self._bias(which, length), cross

        for number, (layer, weights) in enumerate(zip(chosen, of_norms, strict=True)):

            def run(x: Value, number: int = number, layer: Layer = layer, weights: list[Value] = weights) -> Value:
                bias, cross = biases() if number == 0 else shared[0]
                if not shared:
                    shared.append((bias, cross))
                return self._layer(layer, weights, x, bias, cross, read, rows, length, sources)

            hidden = tape.checkpoint(run, hidden) if checkpointing else run(hidden)
        if read is not None and not self.run.cuda:
            del causal
        return op.dropout(tape, self._norm(hidden, self.last_norms[which]), shape.dropout, self.run.cuda)

    def _bias(self, which: int, length: int) -> Value:
        """Relative position bias (heads, length, length), looked up by distance."""
        tape = self.tape
        buckets = tape.new(length * length, INT64)
        bias = op.lookup(tape, self.distances[which], length * length * self.shape.heads, buckets)
        del buckets
        return bias

    def _layer(
        self, layer: Layer, weights: list[Value], x: Value, bias: Value, cross: Value | None, read: Value | None, rows: int,
        length: int, sources: int,
    ) -> Value:  # fmt: skip
        x = self._attend(layer, "layer.0.SelfAttention", x, self._norm(x, weights[0]), None, bias, rows, length, length)
        if read is not None:
            assert cross is not None
            normed = self._norm(x, weights[1])
            x = self._attend(layer, "layer.1.EncDecAttention", x, normed, read, cross, rows, length, sources)
        return self._feed(layer, f"layer.{1 if read is None else 2}.DenseReluDense", x, self._norm(x, weights[-1]))

    def _norm(self, x: Value, weight: Value) -> Value:
        tape = self.tape
        rows = x.n // weight.n
        variance = op.mean(tape, op.square(tape, op.cast(tape, x, FLOAT32)), rows)
        hidden = op.mul(tape, x, op.rsqrt(tape, op.shift(tape, variance)))
        return op.mul(tape, weight, op.cast(tape, hidden, x.itemsize))

    def _attend(
        self, layer: Layer, name: str, residual: Value, normed: Value, read: Value | None, bias: Value, rows: int,
        length: int, sources: int,
    ) -> Value:  # fmt: skip
        tape, shape, run = self.tape, self.shape, self.run
        source = normed if read is None else read
        query = op.heads_first(tape, layer[f"{name}.q"](normed))
        key, value = (op.heads_first(tape, layer[f"{name}.{what}"](source)) for what in ("k", "v"))
        mask = tape.new(shape.heads * length * sources, run.itemsize)
        if run.cuda or (shape.dropout == 0 and not bias.wants_grad):
            out = op.attention(tape, query, key, value, rows * shape.heads * length, [mask] * run.cuda)
        else:
            out = self._plain_attention(query, key, value, bias, rows * shape.heads * length * sources)
        del mask, query, key, value
        out = layer[f"{name}.o"](out if run.cuda else op.shift(tape, out))  # on a CPU copied to tokens-first order
        return op.add(tape, residual, op.dropout(tape, out, shape.dropout, run.cuda))

    def _plain_attention(self, query: Value, key: Value, value: Value, bias: Value, pairs: int) -> Value:
        """Eager attention: materialises the scores of all token pairs; a trained bias is added in place, its gradient summed over
        rows."""
        tape, shape = self.tape, self.shape
        scores = op.matmul(tape, op.scale(tape, query), op.scale(tape, key), pairs)
        if bias.wants_grad:
            scores = op.add_in_place(tape, scores, op.view(tape, bias))
        weights = op.softmax(tape, scores, query.itemsize)
        del scores
        weights = op.dropout(tape, weights, shape.dropout, self.run.cuda)
        return op.matmul(tape, weights, value, query.n)

    def _feed(self, layer: Layer, name: str, residual: Value, x: Value) -> Value:
        tape, shape, cuda = self.tape, self.shape, self.run.cuda
        activate = op.ACTIVATIONS.get(shape.activation, op.relu if shape.activation == "relu" else op.activation)
        if f"{name}.wi_0" in layer:
            gated = activate(tape, layer[f"{name}.wi_0"](x))
            x = op.mul(tape, gated, layer[f"{name}.wi_1"](x))
            del gated
        else:
            x = activate(tape, layer[f"{name}.wi"](x))
        x = layer[f"{name}.wo"](op.dropout(tape, x, shape.dropout, cuda))
        return op.add(tape, residual, op.dropout(tape, x, shape.dropout, cuda))
