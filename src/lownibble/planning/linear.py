"""Linear layers on a `Tape`: dense, frozen packed (`quant/linear.py`), with an adapter (`lora/product.py`, `lora/dora.py`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lownibble.arch import Linear
from lownibble.planning import fused
from lownibble.planning import operations as op
from lownibble.planning.tape import FLOAT32, Parameter, Tape, Value
from lownibble.quant.layouts import TensorSpec

SMALLEST_CHUNK, CHUNK_SHARE = 64 << 20, 128
"""Bytes of a logits chunk on a CPU and on small devices; on larger ones a chunk is a power of two of at most 1 / CHUNK_SHARE of
their memory. The head is read again for each chunk: at a vocabulary of 128,256 the smallest one is 130 tokens, and reading a
1 GB head for each took twice the time of its products on an H100 (DESIGN section 6)."""


def chunk_bytes(device_bytes: int | None) -> int:
    """Maximum bytes of one logits chunk, at most 256 MiB, by device memory; None: a CPU. Also used in training.

    Counted in float32, which they are in on a CPU for the loss; 16-bit logits on CUDA take half.
    """
    if device_bytes is None or device_bytes < SMALLEST_CHUNK * CHUNK_SHARE:
        return SMALLEST_CHUNK
    return int(min(256 << 20, 1 << (device_bytes // CHUNK_SHARE).bit_length() - 1))


@dataclass(frozen=True)
class Runtime:
    """How a device computes.

    Attributes:
        itemsize: bytes per element of dense weights and activations.
        fused: matmul kernels dequantise packed weights internally; else into a buffer shared by all layers.
        kernel_attention: attention uses Lownibble's kernel, unless the model has a window or a softcap.
        decode_buffers: shared buffers for dequantised weights; on CUDA, autograd's own thread has a second one.
        round_to: allocation granularity in bytes.
        chunk_bytes: maximum bytes of one logits chunk, counted in float32.
        cuda: dropout saves a byte mask instead of factors, and fused attention takes a bias.
        compiled: decoder layers are compiled.
        shards: FSDP's ranks, each of which holds a part of every parameter; 0: parameters are whole.
        offloaded: those parts are in host memory.
    """

    itemsize: int
    fused: bool
    kernel_attention: bool
    decode_buffers: int
    round_to: int = 1
    cuda: bool = False
    chunk_bytes: int = SMALLEST_CHUNK
    compiled: bool = False
    shards: int = 0
    offloaded: bool = False


@dataclass(frozen=True)
class Method:
    """What is trained, and how the frozen weights are stored.

    Attributes:
        full: all weights are trained.
        packed: path of each packed linear -> its codes, then each of its constants; other linears are dense.
        fused: paths of those whose codec has a matmul kernel that dequantises internally.
        ranks: path of a linear -> rank of its adapter; absent: none. adapter_itemsize: bytes per element of its matrices.
        dora: the adapters are DoRA's.
        rounded: path of each merge-aware linear -> the codes and constants that it computes with, besides `packed`.
        tiled: paths of those whose sum with the adapter is packed by tiles; of others it is a float32 weight first.
    """

    full: bool = False
    packed: Mapping[str, list[TensorSpec]] = field(default_factory=dict)
    fused: Collection[str] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    adapter_itemsize: int = FLOAT32
    dora: bool = False
    rounded: Mapping[str, list[TensorSpec]] = field(default_factory=dict)
    tiled: Collection[str] = ()


class SharedBuffers:
    """Buffers for dequantised weights, and on CPUs for logits (`kernels/decoded.py`); each grows to the largest need so far."""

    def __init__(self, tape: Tape, run: Runtime) -> None:
        self._tape, self._run = tape, run
        self._buffers: list[Value | None] = [None] * run.decode_buffers
        self._sum: Value | None = None

    def need(self, n: int, count: int | None = None) -> None:
        """Grow the first `count` buffers (None: all) to at least n elements."""
        for i, held in enumerate(self._buffers[:count]):
            if held is None or n > held.n:
                self._buffers[i] = held = None
                self._buffers[i] = self._tape.new(n, self._run.itemsize, "workspace")

    def need_sum(self, n: int) -> None:
        """As `need`, of the float32 buffer of the thread that runs forward passes: another one where weights are narrower."""
        if self._run.itemsize == FLOAT32:
            self.need(n, 1)
        elif self._sum is None or n > self._sum.n:
            self._sum = None
            self._sum = self._tape.new(n, FLOAT32, "workspace")


class LinearOnTape:
    """A linear layer, dense (trained or frozen) or packed, with or without an adapter, as `method` says for its path. `in_graph`:
    it is in a compiled decoder layer."""

    def __init__(
        self, tape: Tape, path: str, linear: Linear, method: Method, run: Runtime, buffers: SharedBuffers
    ) -> None:  # fmt: skip
        self.tape, self.run, self.buffers, self.in_graph = tape, run, buffers, False
        self.n_in, self.n_out, self.r = linear.in_features, linear.out_features, method.ranks.get(path, 0)
        self.n_experts = linear.experts or 1
        n, n_biases, rows = self.n_experts * self.n_in * self.n_out, self.n_experts * self.n_out, linear.experts or None
        self.packed, self.fused = path in method.packed, run.fused and path in method.fused
        if not self.packed:
            self.parts = [tape.parameter(n, run.itemsize, "weights", method.full, rows or self.n_out)]
        else:
            self.parts = self._stored(method.packed[path])
        self.rounded, self.tiled = path in method.rounded, path in method.tiled
        if self.rounded:
            self.parts += self._stored(method.rounded[path])
        self.bias = tape.parameter(n_biases, run.itemsize, "weights", method.full, rows) if linear.bias else None
        self.of_adapter, of_adapter = method.adapter_itemsize, method.adapter_itemsize
        of_factors = [(self.r, self.n_in), (self.n_out, self.r)] if self.r else []
        self.adapter = [tape.parameter(self.n_experts * N * K, of_adapter, "adapters", True, rows or N) for N, K in of_factors]
        self.magnitude: Parameter | None = None
        if self.r and method.dora:
            self.magnitude = tape.parameter(self.n_out, of_adapter, "adapters", True)
            self.row_squares = tape.new(self.n_out, FLOAT32, "weights")

    def _stored(self, specs: Sequence[TensorSpec]) -> list[Parameter]:
        kinds = ("codes", *["constants"] * (len(specs) - 1))
        return [self.tape.parameter(spec.n_bytes, 1, kind, rows=spec.shape[0]) for kind, spec in zip(kinds, specs, strict=True)]

    @property
    def parameters(self) -> list[Parameter]:
        """All parameters: weight, bias and adapter."""
        return [each for each in (*self.parts, self.bias, *self.adapter, self.magnitude) if each is not None]

    def __call__(self, x: Value) -> Value:
        """Forward pass."""
        if self.magnitude is not None:
            return self._rescaled(x, self.magnitude)
        if self.r:
            return self._adapted(x)
        return self._frozen(x) if self.packed else self._dense(x)

    def _dense(self, x: Value) -> Value:
        tape, size, weight, tokens = self.tape, self.run.itemsize, self.parts[0], x.n // self.n_in
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
        """(tokens, columns): matmul with the weight, plus a low-rank branch whose matrix has `factor` elements (0: none)."""
        tape, size = self.tape, self.run.itemsize
        fused = self.fused and size == FLOAT32
        if self.packed and not fused:
            self.buffers.need(self.n_in * self.n_out)
        out = tape.new(tokens * columns, size)
        if factor and size != self.of_adapter:
            tape.new(factor, size)
        return out

    def _frozen(self, x: Value) -> Value:
        tokens = x.n // self.n_in
        out = self._product(tokens, self.n_out, 0)
        self.tape.record([out], [x], [], lambda grads, saved: [self._product(tokens, self.n_in, 0)])
        if self.bias is None:
            return out
        biased = self.tape.like(out)
        self.tape.record([biased], [out], [], lambda grads, saved: [grads[0]])
        return biased

    def _adapted(self, x: Value) -> Value:
        tape, size, r, tokens = self.tape, self.run.itemsize, self.r, x.n // self.n_in
        A, B = self.adapter
        if self.rounded and not self.tiled:
            self.buffers.need_sum(self.n_in * self.n_out)
        narrow = size != self.of_adapter
        cast = tape.new(A.n, size) if narrow else None
        low = tape.new(tokens * r, size)
        del cast
        out = self._product(tokens, self.n_out, 0 if self.rounded else B.n)
        if not tape.recording:  # the base's product is added to the adapter's
            tape.like(out)
        wants_x = x.wants_grad

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            cast = tape.new(B.n, size) if narrow else None
            dlow = tape.new(tokens * r, size)
            del cast
            dA = tape.new(A.n, size)
            if narrow:
                dA = tape.new(A.n, self.of_adapter)
            turned = tape.new(B.n, size)
            if narrow:
                turned = tape.new(B.n, self.of_adapter)
            dB = tape.new(B.n, self.of_adapter)
            del turned
            dx = self._product(tokens, self.n_in, 0 if self.rounded else A.n) if wants_x else None
            del dlow
            return [dx, dA, dB]

        tape.record([out], [x, A, B], [x, low], backward)
        return out

    def _rescaled(self, x: Value, magnitude: Value) -> Value:
        """DoRA: the norm of each row, then LoRA's product, scaled in place."""
        tape, norm = self.tape, self._norm()
        z = self._adapted(x)
        gain = tape.like(norm)
        if self.in_graph:
            return fused.rescale(tape, z, magnitude, gain)
        y = z.view()

        def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
            y, gain = saved
            dz, divisor, total = tape.like(y), tape.like(gain), tape.like(gain)
            dmagnitude = tape.like(total)
            del divisor, total
            return [dz, dmagnitude]

        tape.record([y], [z, magnitude], [y, gain], backward)
        return y

    def _norm(self) -> Value:
        tape, (A, B) = self.tape, self.adapter
        cast = tape.new(A.n, self.run.itemsize) if self.run.itemsize != self.of_adapter else None
        product = self._product(self.r, self.n_out, 0)
        del cast
        product = op.cast(tape, product, FLOAT32)
        square, inner = tape.new(self.r * self.r), tape.like(B)
        del product, square
        norm = tape.new(self.n_out)
        del inner
        return norm
