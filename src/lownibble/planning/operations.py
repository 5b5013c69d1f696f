"""Operations on a `Tape`, with torch's allocations in forward and backward. `n` counts elements; sizes are not checked."""

from __future__ import annotations

from collections.abc import Sequence

from lownibble.planning.tape import BOOL, FLOAT32, INT64, Tape, Value


def add(tape: Tape, a: Value, b: Value) -> Value:
    """a + b; one of them may be broadcast."""
    out = tape.new(max(a.n, b.n), max(a.itemsize, b.itemsize))
    tape.record([out], [a, b], [], lambda grads, _: [grads[0], grads[0]])
    return out


def shift(tape: Tape, a: Value) -> Value:
    """a plus a scalar."""
    out = tape.like(a)
    tape.record([out], [a], [], lambda grads, _: [grads[0]])
    return out


def scale(tape: Tape, a: Value) -> Value:
    """a times a scalar, or -a."""
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
        wide: list[Value | None] = [tape.new(n, itemsize) if wants else None for wants in (wants_a, wants_b)]
        for i, size in enumerate((a_size, b_size)):
            if size != itemsize and wide[i] is not None:
                wide[i] = tape.new(n, size)
        return wide

    tape.record([out], [a, b], [*[b] * wants_a, *[a] * wants_b], backward)
    return out


def square(tape: Tape, a: Value) -> Value:
    """a.pow(2)."""
    out = tape.like(a)

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        power = tape.like(saved[0])  # a.pow(1) is a copy in torch
        doubled = tape.like(power)
        return [tape.like(doubled)]

    tape.record([out], [a], [a], backward)
    return out


def mean(tape: Tape, a: Value, rows: int) -> Value:
    """The mean of each of `rows` rows."""
    out = tape.new(rows, a.itemsize)
    n, itemsize = a.n, a.itemsize
    tape.record([out], [a], [], lambda grads, _: [tape.new(n, itemsize)])
    return out


def less_maximum(tape: Tape, a: Value, rows: int) -> Value:
    """a minus the maximum of each of `rows` rows; saves the maxima's places."""
    highest, places, out = tape.new(rows, a.itemsize), tape.new(rows, INT64), tape.like(a)
    n, itemsize = a.n, a.itemsize
    tape.record([highest], [a], [places], lambda grads, _: [tape.new(n, itemsize)])
    tape.record([out], [a, highest], [], lambda grads, _: [grads[0], tape.new(n, itemsize)])
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
    """Cast to another dtype; a itself if it has that size already."""
    if a.itemsize == itemsize:
        return a
    out, before = tape.new(a.n, itemsize), a.itemsize
    tape.record([out], [a], [], lambda grads, _: [tape.new(out_n, before)])
    out_n = a.n
    return out


def view(tape: Tape, a: Value) -> Value:
    """A view: the same elements in another shape or order, no copy."""
    out = a.view()
    tape.record([out], [a], [], lambda grads, _: [grads[0]])
    return out


def heads_first(tape: Tape, a: Value) -> Value:
    """(tokens, heads x size) viewed as (heads, tokens, size), no copy; its gradient is copied back to the original order."""
    out, n, itemsize = a.view(), a.n, a.itemsize
    tape.record([out], [a], [], lambda grads, _: [tape.new(n, itemsize)])
    return out


def rotate_half(tape: Tape, a: Value) -> Value:
    """Swap the halves of the last dimension, the second one negated (RoPE)."""
    half = a.n // 2
    first, second = narrow(tape, a, half), narrow(tape, a, half)
    return concatenate(tape, [scale(tape, second), first])


def narrow(tape: Tape, a: Value, n: int) -> Value:
    """A slice of a, no copy."""
    out, whole, itemsize = Value(a.storage, n, a.itemsize), a.n, a.itemsize
    tape.record([out], [a], [], lambda grads, _: [tape.new(whole, itemsize)])
    return out


def gather(tape: Tape, a: Value, n: int) -> Value:
    """n elements of a, by indices that are held elsewhere."""
    out, whole, itemsize = tape.new(n, a.itemsize), a.n, a.itemsize
    tape.record([out], [a], [], lambda grads, _: [tape.new(whole, itemsize)])
    return out


def concatenate(tape: Tape, parts: list[Value]) -> Value:
    """Concatenate tensors."""
    out = tape.new(sum(part.n for part in parts), parts[0].itemsize)
    sizes = [part.n for part in parts]

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        whole = grads[0]
        assert whole is not None
        return [Value(whole.storage, n, whole.itemsize) for n in sizes]

    tape.record([out], parts, [], backward)
    return out


def activation(tape: Tape, a: Value) -> Value:
    """SiLU, GELU and other activations: one operation that saves its input."""
    out = tape.like(a)
    tape.record([out], [a], [a], lambda grads, saved: [tape.like(saved[0])])
    return out


def embedding(tape: Tape, weight: Value, tokens: int, hidden: int) -> Value:
    """Embedding lookup: (tokens, hidden)."""
    out = tape.new(tokens * hidden, weight.itemsize)
    n, itemsize = weight.n, weight.itemsize
    tape.record([out], [weight], [], lambda grads, _: [tape.new(n, itemsize)])
    return out


def layer_norm(tape: Tape, a: Value, weight: Value, bias: Value) -> Value:
    """torch's layer norm: saves its input, and each row's mean and deviation in float32."""
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
    """tanh; saves its result."""
    out = tape.like(a)
    tape.record([out], [a], [out], lambda grads, saved: [tape.like(saved[0])])
    return out


def gelu_new(tape: Tape, a: Value) -> Value:
    """The tanh approximation of GELU, as separate operations: 0.5 a (1 + tanh(c (a + d a^3)))."""
    half = scale(tape, a)
    inner = scale(tape, add(tape, a, scale(tape, cube(tape, a))))
    return mul(tape, half, shift(tape, tanh(tape, inner)))


ACTIVATIONS = {"gelu_new": gelu_new}
"""`hidden_act` -> its operations; all others are one operation (`activation`)."""


def halves(tape: Tape, a: Value) -> tuple[Value, Value]:
    """Both halves of the last dimension, no copy; their gradients are concatenated."""
    n, whole, itemsize = a.n // 2, a.n, a.itemsize
    first, second = (Value(a.storage, n, itemsize) for _ in range(2))
    tape.record([first, second], [a], [], lambda grads, _: [tape.new(whole, itemsize)])
    return first, second


def softmax(tape: Tape, a: Value, itemsize: int) -> Value:
    """Softmax with a result of `itemsize` bytes per element."""
    out, before = tape.new(a.n, itemsize), a.itemsize

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        result = tape.like(saved[0])
        return [result if itemsize == before else tape.new(result.n, before)]

    tape.record([out], [a], [out], backward)
    return out


def matmul(tape: Tape, a: Value, b: Value, n: int) -> Value:
    """Matrix product with n result elements."""
    out = tape.new(n, a.itemsize)

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        return [tape.like(saved[0]), tape.like(saved[1])]

    tape.record([out], [a, b], [a, b], backward)
    return out


def relu(tape: Tape, a: Value) -> Value:
    """ReLU; saves its result."""
    out = tape.like(a)
    tape.record([out], [a], [out], lambda grads, saved: [tape.like(saved[0])])
    return out


def dropout(tape: Tape, a: Value, share: float, fused: bool) -> Value:
    """Dropout: saves a byte mask if `fused`, else factors in a's dtype."""
    if not share:
        return a
    kept = tape.new(a.n, BOOL if fused else a.itemsize)
    out = tape.like(a)
    tape.record([out], [a], [kept], lambda grads, _: [tape.like(grads[0])])  # type: ignore[arg-type]
    return out


def lookup(tape: Tape, weight: Value, n: int, places: Value) -> Value:
    """Table lookup with n result elements; saves the indices `places`."""
    out = tape.new(n, weight.itemsize)
    tape.record([out], [weight], [places], lambda grads, _: [tape.like(weight)])
    return out


def add_in_place(tape: Tape, a: Value, b: Value) -> Value:
    """a += b with b broadcast; b's gradient is summed over the broadcast."""
    out = a.view()
    tape.record([out], [a, b], [], lambda grads, _: [grads[0], grads[0]])
    return out


def attention(tape: Tape, q: Value, k: Value, v: Value, rows: int, more: Sequence[Value] = ()) -> Value:
    """Fused attention: output of q's size; saves its inputs, its output, a float32 log-sum-exp per query and head (`rows`), and
    `more`."""
    out, lse = tape.like(q), tape.new(rows, FLOAT32)
    sizes = [(value.n, value.itemsize) for value in (q, k, v)]

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        return [tape.new(n, itemsize) for n, itemsize in sizes]

    tape.record([out], [q, k, v], [q, k, v, out, lse, *more], backward)
    return out
