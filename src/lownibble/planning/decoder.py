"""A decoder-only model on a `Tape`, module by module as in transformers.

Local variables matter here: as in transformers' code, a tensor stays allocated as long as a variable refers to it.

In a compiled layer (`training/compiling.py`) norms, rotary embedding, activation function and residual sums are the operations of
`fused.py`; linear layers and attention are the same ones. The first layer is not compiled if its input needs no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lownibble.arch import ModelShape
from lownibble.config import Checkpointing
from lownibble.planning import fused
from lownibble.planning import operations as op
from lownibble.planning.experts import Mixture, goes_by_expert
from lownibble.planning.linear import LinearOnTape, Method, Runtime, SharedBuffers
from lownibble.planning.sharded import Groups
from lownibble.planning.tape import BOOL, FLOAT32, INT64, LayerInputs, Parameter, Tape, Value
from lownibble.planning.tiles import is_long, tile_lengths, tiled


class Decoder:
    """All parameters on the tape, and the forward pass without the head.

    Attributes:
        head: the head's weight; the embedding's if tied. head_adapter: A and B, or empty.
        groups: the parameters by group, where ranks hold parts of them.
    """

    def __init__(self, tape: Tape, shape: ModelShape, method: Method, run: Runtime) -> None:
        self.tape, self.shape, self.run, self.method = tape, shape, run, method
        self._all: list[Parameter] = []
        self.buffers, family, hidden = SharedBuffers(tape, run), shape.family, shape.hidden
        self.embedding = self._parameter(shape.vocab * hidden, shape.vocab)
        self.layers = [
            {
                linear.name.rpartition(".")[2]: LinearOnTape(
                    tape, f"model.layers.{layer}.{linear.name}", linear, method, run, self.buffers
                )
                for linear in shape.linears
            }
            for layer in range(shape.layers)
        ]  # fmt: skip
        self.norms = [[self._norm_parameters(hidden) for _ in range(family.norms)] for _ in range(shape.layers)]
        self.qk_norms = [[self._norm_parameters(shape.head_dim) for _ in range(2 * family.qk_norm)] for _ in range(shape.layers)]
        self.last_norm = self._norm_parameters(hidden)
        ours = goes_by_expert(shape, method)
        self.mixtures = [
            Mixture(tape, shape, method, run, self.buffers, layer, ours, self._parameter)
            for layer in range(shape.layers) if family.experts
        ]  # fmt: skip
        self.head = self.embedding if shape.tied else self._parameter(shape.vocab * hidden, shape.vocab)
        r = method.ranks.get("lm_head", 0)
        of_factors = [(r, hidden), (shape.vocab, r)] if r else []
        self.head_adapter = [tape.parameter(N * K, method.adapter_itemsize, "adapters", True, N) for N, K in of_factors]
        if family.head_bias:
            self._parameter(shape.vocab)
        self._frequencies = [tape.new(shape.head_dim // 2, FLOAT32, "weights") for _ in range(2)]
        self._tiles = [0]
        self._in_graph, self._spread = False, 0.0
        self.groups = self._grouped() if run.shards else None

    def _grouped(self) -> Groups:
        layers: list[list[Parameter]] = []
        for layer, linears in enumerate(self.layers):
            own = [*self.norms[layer], *self.qk_norms[layer]]
            layers.append([*(p for linear in linears.values() for p in linear.parameters), *(p for norm in own for p in norm)])
        for layer, mixture in enumerate(self.mixtures):
            layers[layer] += mixture.parameters
        inside = {id(each) for layer in layers for each in layer}
        return Groups(self.tape, layers, [each for each in (*self._all, *self.head_adapter) if id(each) not in inside])

    def _parameter(self, n: int, rows: int | None = None) -> Parameter:
        value = self.tape.parameter(n, self.run.itemsize, "weights", self.method.full, rows)
        self._all.append(value)
        return value

    def _norm_parameters(self, n: int) -> list[Parameter]:
        return [self._parameter(n) for _ in range(2 if self.shape.family.norm == "layer" else 1)]

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters but the head's adapter."""
        linears = [linear for layer in self.layers for linear in layer.values()]
        linears += [linear for mixture in self.mixtures for linear in mixture.linears]
        return self._all + [p for linear in linears for p in linear.parameters]

    def forward(self, rows: int, length: int, checkpointing: Checkpointing, spread: float = 0.0) -> Value:
        """Last hidden states (rows x length tokens); `spread`: see `Batch`."""
        tape, shape, self._spread = self.tape, self.shape, spread
        cut = bool(checkpointing) and is_long(rows * length)
        self._tiles = tile_lengths(rows * length) if cut else [rows * length]
        inputs = LayerInputs(tape) if checkpointing == "offload" else None
        if self.groups:
            self.groups.start()
        hidden = op.embedding(tape, self.embedding, rows * length, shape.hidden)
        if shape.family.scaled:
            hidden = op.scale(tape, hidden)
        embedded = hidden  # the model's code holds it until it returns
        positions = tape.new(length, INT64)
        masks = self._masks(rows, length)
        with tape.no_grad():
            cos, sin = self.angles(length)
        del positions
        for layer in range(shape.layers):

            def run(x: Value, layer: int = layer) -> Value:
                return self.layer(layer, x, cos, sin, rows)

            def checkpointed(x: Value, run: Callable[[Value], Value] = run) -> Value:
                return tape.checkpoint(run, x, inputs)

            way = checkpointed if checkpointing else run
            hidden = self.groups.run(layer, hidden, way) if self.groups else way(hidden)
        del masks
        self._in_graph = False
        last = self._tiled_norm(hidden, self.last_norm)
        del embedded
        return last

    def _masked(self, length: int) -> bool:
        return self.shape.softcap or (self.shape.window is not None and self.shape.window < length)

    def _masks(self, rows: int, length: int) -> list[Value]:
        if self.shape.family.sinks:  # of both kinds of layers, for eager attention
            return [self.tape.new(rows * length * length, self.run.itemsize) for _ in range(2)]
        return [self.tape.new(length * length, BOOL)] if self._masked(length) else []

    def angles(self, length: int) -> tuple[Value, Value]:
        """Cosines and sines of the rotary embedding."""
        size = self.run.itemsize
        tape, n = self.tape, length * self.shape.rotary_dim
        angles, both = tape.new(n // 2, FLOAT32), tape.new(n, FLOAT32)
        cos, sin = op.scale(tape, tape.new(n, FLOAT32)), op.scale(tape, tape.new(n, FLOAT32))
        del angles, both
        return op.cast(tape, cos, size), op.cast(tape, sin, size)

    def layer(self, layer: int, hidden: Value, cos: Value, sin: Value, rows: int) -> Value:
        """Output of a decoder layer (rows x length tokens)."""
        self._in_graph = self.run.compiled and (layer > 0 or self.embedding.trained)
        for linear in self.layers[layer].values():
            linear.in_graph = self._in_graph
        out = self._layer(layer, hidden, cos, sin, rows)
        out.recipe = None  # a graph's output is written
        return out

    def _layer(self, layer: int, hidden: Value, cos: Value, sin: Value, rows: int) -> Value:
        norms = self.norms[layer]
        residual = hidden
        hidden = self._tiled_norm(hidden, norms[0])
        if self.shape.family.parallel:
            attended = self._attention(layer, hidden, cos, sin, rows)
            fed = self._feed(layer, hidden)
            return self._add(self._add(attended, fed), residual)
        hidden = self._attention(layer, hidden, cos, sin, rows)
        if len(norms) == 4:
            hidden = self._tiled_norm(hidden, norms[1])
        hidden = self._add(residual, hidden)
        residual = hidden
        hidden = self._tiled_norm(hidden, norms[-2 if len(norms) == 4 else 1])
        hidden = self._feed(layer, hidden)
        if len(norms) == 4:
            hidden = self._tiled_norm(hidden, norms[3])
        return self._add(residual, hidden)

    def _add(self, a: Value, b: Value) -> Value:
        return fused.add(self.tape, a, b) if self._in_graph else op.add(self.tape, a, b)

    def _tiled_norm(self, x: Value, parameters: Sequence[Value]) -> Value:
        return self._in_tiles(lambda tile: self._norm(tile, parameters), x, parameters)

    def _feed(self, layer: int, x: Value) -> Value:
        if self.shape.family.experts:
            return self.mixtures[layer](x)
        attention = self.shape.family.linears[: 2 if self.shape.family.fused else 4]
        linears = [linear for name, linear in self.layers[layer].items() if name not in attention]
        return self._in_tiles(lambda tile: self._mlp(layer, tile), x, [p for linear in linears for p in linear.parameters])

    def _in_tiles(self, run: Callable[[Value], Value], x: Value, parameters: Sequence[Value]) -> Value:
        if len(self._tiles) == 1:
            return run(x)
        return tiled(self.tape, run, x, self._tiles, [p for p in parameters if p.trained])

    def _norm(self, x: Value, parameters: Sequence[Value]) -> Value:
        tape, weight = self.tape, parameters[0]
        rows = x.n // weight.n
        if self._in_graph:
            return fused.norm(tape, x, parameters)
        if self.shape.family.norm == "layer":
            return op.layer_norm(tape, x, weight, parameters[1])
        hidden = op.cast(tape, x, FLOAT32)
        if self.shape.family.norm == "rms1":
            output = op.mul(tape, hidden, op.rsqrt(tape, op.shift(tape, op.mean(tape, op.square(tape, hidden), rows))))
            del hidden
            output = op.mul(tape, output, op.shift(tape, op.cast(tape, weight, FLOAT32)))
            return op.cast(tape, output, x.itemsize)
        variance = op.mean(tape, op.square(tape, hidden), rows)
        hidden = op.mul(tape, hidden, op.rsqrt(tape, op.shift(tape, variance)))
        if self.shape.family.norm == "rms32":
            return op.cast(tape, op.mul(tape, weight, hidden), x.itemsize)
        return op.mul(tape, weight, op.cast(tape, hidden, x.itemsize))

    def _attention(self, layer: int, hidden: Value, cos: Value, sin: Value, rows: int) -> Value:
        tape, linears, shape = self.tape, self.layers[layer], self.shape
        if shape.family.fused:
            q_share, k_share = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
            tokens = hidden.n // shape.hidden
            whole, shares = linears["qkv_proj"](hidden), [tokens * n for n in (q_share, k_share, k_share)]
            if self._in_graph:
                query, key, value = fused.split(tape, whole, shares)
            else:
                query, key, value = (op.narrow(tape, whole, n) for n in shares)
            del whole
        else:
            copied = not self.qk_norms[layer] and not self._in_graph
            query = linears["q_proj"](hidden)
            if copied:
                query = op.heads_first(tape, query)
            key = linears["k_proj"](hidden)
            if copied:
                key = op.heads_first(tape, key)
            value = linears["v_proj"](hidden)
        if self.qk_norms[layer]:
            query, key = self._norm(query, self.qk_norms[layer][0]), self._norm(key, self.qk_norms[layer][1])
        query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)
        if shape.family.sinks:
            out = self._attention_with_sinks(query, key, value, rows)
        elif shape.softcap:
            out = self._plain_attention(query, key, value, rows)
        elif self.run.kernel_attention and shape.window is None:
            out = op.attention(tape, query, key, value, query.n // shape.head_dim)
        elif self._spread:
            n = query.n
            query, key, value = (op.gather(tape, each, round(self._spread * each.n)) for each in (query, key, value))
            out = op.gather(tape, self._torchs_attention(query, key, value), n)
        else:
            length = query.n // (shape.heads * shape.head_dim * rows)
            if self._masked(length) and shape.key_heads != shape.heads:  # with a mask, K and V are repeated for each query head
                key, value = (self._repeat(each, shape.heads // shape.key_heads) for each in (key, value))
            out = self._torchs_attention(query, key, value)
        if self._in_graph and shape.rotary_dim < shape.head_dim:
            out = fused.copy(tape, out)  # attention returns the layout of its query, here a concatenation
        return linears[shape.family.linears[1 if shape.family.fused else 3]](out)

    def _repeat(self, x: Value, times: int) -> Value:
        return fused.repeat(self.tape, x, times) if self._in_graph else op.concatenate(self.tape, [x] * times)

    def _rotate(self, x: Value, cos: Value, sin: Value) -> Value:
        tape = self.tape
        if self._in_graph:
            return fused.turn(tape, x)
        if self.shape.family.rotates_a_part:
            turned = x.n * self.shape.rotary_dim // self.shape.head_dim
            x, rest = op.narrow(tape, x, turned), op.narrow(tape, x, x.n - turned)
            return op.concatenate(tape, [self._turn(x, cos, sin), rest])
        return self._turn(x, cos, sin)

    def _turn(self, x: Value, cos: Value, sin: Value) -> Value:
        tape = self.tape
        if self.shape.family.sinks:
            first, second = op.halves(tape, x)
            return op.concatenate(tape, [self._turned_half(*each, cos, sin) for each in ((first, second), (second, first))])
        return op.add(tape, op.mul(tape, x, cos), op.mul(tape, op.rotate_half(tape, x), sin))

    def _turned_half(self, a: Value, b: Value, cos: Value, sin: Value) -> Value:
        return op.add(self.tape, op.mul(self.tape, a, cos), op.mul(self.tape, b, sin))

    def _torchs_attention(self, query: Value, key: Value, value: Value) -> Value:
        """torch's attention as CUDA's flash kernel: grouped K and V are not repeated; backward has gradients for all heads, and a
        float32 buffer of q's size."""
        tape, shape = self.tape, self.shape
        rows = query.n // shape.head_dim
        out, lse = tape.like(query), tape.new(rows, FLOAT32)

        def backward(grads: list[Value | None], saved: list[Value]) -> list[Value | None]:
            dq, dk, dv = (tape.like(each) for each in saved[:3])
            spread = [tape.like(saved[0]) for _ in range(2 * (saved[1].n != saved[0].n))]
            summed = tape.new(saved[0].n, FLOAT32)
            del spread, summed
            return [dq, dk, dv]

        tape.record([out], [query, key, value], [query, key, value, out, lse], backward)
        return out

    def _plain_attention(self, query: Value, key: Value, value: Value, rows: int) -> Value:
        """Eager attention: materialises the scores of all token pairs."""
        tape, shape = self.tape, self.shape
        tokens = query.n // (shape.heads * shape.head_dim)
        pairs = shape.heads * tokens * (tokens // rows)
        spread = shape.heads // shape.key_heads
        if self._in_graph:
            key, value = (fused.repeat(tape, each, spread) for each in (key, value))
            weights = fused.capped_softmax(tape, op.matmul(tape, query, key, pairs), shape.heads * tokens)
            return fused.copy(tape, op.matmul(tape, weights, value, query.n))
        if spread > 1:
            key, value = (op.scale(tape, op.concatenate(tape, [each] * spread)) for each in (key, value))
        scores = op.scale(tape, op.matmul(tape, query, key, pairs))
        scores = op.scale(tape, op.tanh(tape, op.scale(tape, scores)))
        scores = op.shift(tape, scores)
        weights = op.cast(tape, op.softmax(tape, scores, FLOAT32), query.itemsize)
        del scores
        return op.scale(tape, op.matmul(tape, weights, value, query.n))

    def _attention_with_sinks(self, query: Value, key: Value, value: Value, rows: int) -> Value:
        """Eager attention with a score besides those of all tokens, whose share goes nowhere."""
        tape, shape = self.tape, self.shape
        tokens = query.n // (shape.heads * shape.head_dim)
        pairs = shape.heads * tokens * (tokens // rows)
        key, value = (self._repeat(each, shape.heads // shape.key_heads) for each in (key, value))
        scores = op.shift(tape, op.scale(tape, op.matmul(tape, query, key, pairs)))
        combined = op.concatenate(tape, [scores, Value(scores.storage, shape.heads * tokens, scores.itemsize)])
        combined = op.less_maximum(tape, combined, shape.heads * tokens)
        weights = op.softmax(tape, combined, query.itemsize)
        del scores
        out = op.matmul(tape, op.narrow(tape, weights, pairs), value, query.n)
        del combined
        return fused.copy(tape, out)

    def _mlp(self, layer: int, x: Value) -> Value:
        tape, linears, names = self.tape, self.layers[layer], self.shape.family.linears
        activate = op.ACTIVATIONS.get(self.shape.activation, op.activation)
        if self.shape.family.fused:
            both = linears["gate_up_proj"](x)
            if self._in_graph:
                return linears["down_proj"](fused.activate(tape, [both], both.n // 2))
            gate, up = op.halves(tape, both)
            up = op.mul(tape, up, activate(tape, gate))
            return linears["down_proj"](up)
        if not self.shape.family.gated:
            x = linears[names[4]](x)
            x = fused.activate(tape, [x], x.n) if self._in_graph else activate(tape, x)
            return linears[names[5]](x)
        if self._in_graph:
            gate, up = linears["gate_proj"](x), linears["up_proj"](x)
            fed = fused.activate(tape, [gate, up], gate.n)
            del gate, up
            return linears["down_proj"](fed)
        gated = activate(tape, linears["gate_proj"](x))
        return linears["down_proj"](op.mul(tape, gated, linears["up_proj"](x)))
