"""Operations on a `Tape`: the allocations of torch's, forward and backward. `n` counts elements; sizes are not checked."""

from __future__ import annotations

from collections.abc import Sequence

from lownibble.planning.tape import BOOL, FLOAT32, Tape, Value


def add(tape: Tape, a: Value, b: Value) -> Value:
    """a + b; one of them may be broadcast."""
    out = tape.new(max(a.n, b.n), max(a.itemsize, b.itemsize))
    tape.record([out], [a, b], [], lambda grads, _: [grads[0], grads[0]])
    return out


def shift(tape: Tape, a: Value) -> Value:
    """a plus a number."""
    out = tape.like(a)
    tape.record([out], [a], [], lambda grads, _: [grads[0]])
    return out


def scale(tape: Tape, a: Value) -> Value:
    """a times a number, or -a."""
    out = tape.like(a)
    tape.record([out], [a], [], lambda grads, _: [tape.like(grads[0])])  # type: ignore[arg-type]
    return out


def mul(tape: Tape, a: Value, b: Value) -> Value:
    """a * b; one of them may be broadcast."""
    n, itemsize = max(a.n, b.n), max(a.itemsize, b.itemsize)
    out = tape.new(n, itemsize)
    wants_a, wants_b = a.wants_grad, b.wants_grad
    a_size, b_size = a.itemsize, b.itemsize

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        return [tape.new(n, a_size) if wants_a else None, tape.new(n, b_size) if wants_b else None]

    tape.record([out], [a, b], [*[b] * wants_a, *[a] * wants_b], backward)
    return out


def square(tape: Tape, a: Value) -> Value:
    """a.pow(2)."""
    out = tape.like(a)

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        power = tape.like(saved[0])  # a to the first power is a copy, as torch has it
        doubled = tape.like(power)
        return [tape.like(doubled)]

    tape.record([out], [a], [a], backward)
    return out


def mean(tape: Tape, a: Value, rows: int) -> Value:
    """The mean of each of so many rows."""
    out = tape.new(rows, a.itemsize)
    n, itemsize = a.n, a.itemsize
    tape.record([out], [a], [], lambda grads, _: [tape.new(n, itemsize)])
    return out


def rsqrt(tape: Tape, a: Value) -> Value:
    """1 / sqrt(a)."""
    out = tape.like(a)

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        halved = tape.like(saved[0])
        cubed = tape.like(saved[0])
        result = tape.like(saved[0])
        del halved, cubed
        return [result]

    tape.record([out], [a], [out], backward)
    return out


def cast(tape: Tape, a: Value, itemsize: int) -> Value:
    """a in another type; itself where it has that one."""
    if a.itemsize == itemsize:
        return a
    out, before = tape.new(a.n, itemsize), a.itemsize
    tape.record([out], [a], [], lambda grads, _: [tape.new(out_n, before)])
    out_n = a.n
    return out


def view(tape: Tape, a: Value) -> Value:
    """The same elements in another shape or order, not moved."""
    out = a.view()
    tape.record([out], [a], [], lambda grads, _: [grads[0]])
    return out


def heads_first(tape: Tape, a: Value) -> Value:
    """(tokens, heads x size) as (heads, tokens, size), not moved. Its gradient comes in that order and is copied back."""
    out, n, itemsize = a.view(), a.n, a.itemsize
    tape.record([out], [a], [], lambda grads, _: [tape.new(n, itemsize)])
    return out


def rotate_half(tape: Tape, a: Value) -> Value:
    """The halves of the last dimension, the second one negated, changed places."""
    half = a.n // 2
    first, second = narrow(tape, a, half), narrow(tape, a, half)
    return concatenate(tape, [scale(tape, second), first])


def narrow(tape: Tape, a: Value, n: int) -> Value:
    """A part of a, not moved."""
    out, whole, itemsize = Value(a.storage, n, a.itemsize), a.n, a.itemsize
    tape.record([out], [a], [], lambda grads, _: [tape.new(whole, itemsize)])
    return out


def concatenate(tape: Tape, parts: list[Value]) -> Value:
    """Tensors one after the other."""
    out = tape.new(sum(part.n for part in parts), parts[0].itemsize)
    sizes = [part.n for part in parts]

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        whole = grads[0]
        assert whole is not None
        return [Value(whole.storage, n, whole.itemsize) for n in sizes]

    tape.record([out], parts, [], backward)
    return out


def activation(tape: Tape, a: Value) -> Value:
    """SiLU, GELU and their like: one operation that saves its input."""
    out = tape.like(a)
    tape.record([out], [a], [a], lambda grads, saved: [tape.like(saved[0])])
    return out


def embedding(tape: Tape, weight: Value, tokens: int, hidden: int) -> Value:
    """Rows of a table."""
    out = tape.new(tokens * hidden, weight.itemsize)
    n, itemsize = weight.n, weight.itemsize
    tape.record([out], [weight], [], lambda grads, _: [tape.new(n, itemsize)])
    return out


def layer_norm(tape: Tape, a: Value, weight: Value, bias: Value) -> Value:
    """torch's own: saves its input, and mean and deviation of each row."""
    rows = a.n // weight.n
    out, centre, deviation = tape.like(a), tape.new(rows, FLOAT32), tape.new(rows, FLOAT32)
    wants, trained = a.wants_grad, weight.wants_grad

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        of_input = tape.like(saved[0]) if wants else None
        return [of_input, tape.like(weight) if trained else None, tape.like(bias) if trained else None]

    tape.record([out], [a, weight, bias], [a, centre, deviation], backward)
    return out


def cube(tape: Tape, a: Value) -> Value:
    """a.pow(3)."""
    out = tape.like(a)

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        power = tape.like(saved[0])
        tripled = tape.like(power)
        return [tape.like(tripled)]

    tape.record([out], [a], [a], backward)
    return out


def tanh(tape: Tape, a: Value) -> Value:
    """tanh, which saves its result."""
    out = tape.like(a)
    tape.record([out], [a], [out], lambda grads, saved: [tape.like(saved[0])])
    return out


def gelu_new(tape: Tape, a: Value) -> Value:
    """The GELU that is written out: 0.5 a (1 + tanh(c (a + d a^3)))."""
    half = scale(tape, a)
    inner = scale(tape, add(tape, a, scale(tape, cube(tape, a))))
    return mul(tape, half, shift(tape, tanh(tape, inner)))


ACTIVATIONS = {"gelu_new": gelu_new}
"""`hidden_act` -> what it does; all others are one operation (`activation`)."""


def halves(tape: Tape, a: Value) -> tuple[Value, Value]:
    """Both halves of the last dimension, not moved; their gradients are put together again."""
    n, whole, itemsize = a.n // 2, a.n, a.itemsize
    first, second = (Value(a.storage, n, itemsize) for _ in range(2))
    tape.record([first, second], [a], [], lambda grads, _: [tape.new(whole, itemsize)])
    return first, second


def softmax(tape: Tape, a: Value, itemsize: int) -> Value:
    """Softmax in a type."""
    out, before = tape.new(a.n, itemsize), a.itemsize

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        result = tape.like(saved[0])
        return [result if itemsize == before else tape.new(result.n, before)]

    tape.record([out], [a], [out], backward)
    return out


def matmul(tape: Tape, a: Value, b: Value, n: int) -> Value:
    """A product of n elements."""
    out = tape.new(n, a.itemsize)

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        return [tape.like(saved[0]), tape.like(saved[1])]

    tape.record([out], [a, b], [a, b], backward)
    return out


def relu(tape: Tape, a: Value) -> Value:
    """ReLU, which saves its result."""
    out = tape.like(a)
    tape.record([out], [a], [out], lambda grads, saved: [tape.like(saved[0])])
    return out


def dropout(tape: Tape, a: Value, share: float, fused: bool) -> Value:
    """Dropout: fused it keeps a mask in bytes, else factors in a's type."""
    if not share:
        return a
    kept = tape.new(a.n, BOOL if fused else a.itemsize)
    out = tape.like(a)
    tape.record([out], [a], [kept], lambda grads, _: [tape.like(grads[0])])  # type: ignore[arg-type]
    return out


def lookup(tape: Tape, weight: Value, n: int, places: Value) -> Value:
    """n elements of a table's rows, which saves their places."""
    out = tape.new(n, weight.itemsize)
    tape.record([out], [weight], [places], lambda grads, _: [tape.like(weight)])
    return out


def add_in_place(tape: Tape, a: Value, b: Value) -> Value:
    """a += b, where b is broadcast; its gradient is a sum."""
    out = a.view()
    tape.record([out], [a, b], [], lambda grads, _: [grads[0], grads[0]])
    return out


def attention(tape: Tape, q: Value, k: Value, v: Value, rows: int, more: Sequence[Value] = ()) -> Value:
    """A fused kernel: its output has q's size; saves its inputs, its output and a number in float32 for each query and head, and
    `more`."""
    out, lse = tape.like(q), tape.new(rows, FLOAT32)
    sizes = [(value.n, value.itemsize) for value in (q, k, v)]

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        return [tape.new(n, itemsize) for n, itemsize in sizes]

    tape.record([out], [q, k, v], [q, k, v, out, lse, *more], backward)
    return out
