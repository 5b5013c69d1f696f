"""Operations of a compiled decoder layer on a `Tape`, as torch's compiler fuses them on CUDA (`training/compiling.RECOMPUTED`).

One kernel stands for each chain of elementwise operations and reductions: it allocates what it returns, nothing in between. A
result that follows elementwise from saved tensors is not saved but computed again in backward (`tape.Recipe`), also where a
matmul reads it: outputs of norms, and the activation function times the gate. Saved are
what matmuls and attention return, the layer's input, sums of two such tensors, and the deviations of norms. `n` counts elements.
"""

from __future__ import annotations

from collections.abc import Sequence

from lownibble.planning.tape import FLOAT32, Recipe, Tape, Value


def _sources(*values: Value) -> list[Value]:
    """What the values are computed again from, or they themselves where they are saved."""
    return [source for value in values for source in (value.recipe.sources if value.recipe else [value])]


def add(tape: Tape, a: Value, b: Value) -> Value:
    """a + b, of one size."""
    out = tape.like(a)
    tape.record([out], [a, b], [], lambda grads, _: [grads[0], grads[0]])
    if a.recipe or b.recipe:
        out.recipe = Recipe(tape, out, _sources(a, b))
    return out


def norm(tape: Tape, x: Value, parameters: Sequence[Value]) -> Value:
    """A norm of rows as wide as its weight; saves each row's float32 deviation, and its mean if there is a bias."""
    out = tape.like(x)
    statistics = [tape.new(x.n // parameters[0].n, FLOAT32) for _ in parameters]
    n, itemsize = x.n, x.itemsize
    sources = [*_sources(x), *statistics]

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        return [tape.new(n, itemsize), *(tape.like(each) if each.trained else None for each in parameters)]

    tape.record([out], [x, *parameters], sources, backward)
    out.recipe = Recipe(tape, out, sources)
    return out


def turn(tape: Tape, x: Value) -> Value:
    """The rotary embedding of x. Attention's input is saved, also where it follows from a norm's: torch does not compute long
    chains again."""
    out, n, itemsize = tape.like(x), x.n, x.itemsize
    tape.record([out], [x], [], lambda grads, _: [tape.new(n, itemsize)])
    return out


def repeat(tape: Tape, x: Value, times: int) -> Value:
    """Heads of x repeated."""
    n, itemsize = x.n, x.itemsize
    out = tape.new(n * times, itemsize)
    tape.record([out], [x], [], lambda grads, _: [tape.new(n, itemsize)])
    out.recipe = Recipe(tape, out, _sources(x))
    return out


def split(tape: Tape, x: Value, sizes: Sequence[int]) -> list[Value]:
    """Slices of x, no copy; their gradients are written into one tensor."""
    n, itemsize = x.n, x.itemsize
    parts = [Value(x.storage, size, itemsize) for size in sizes]
    tape.record(parts, [x], [], lambda grads, _: [tape.new(n, itemsize)])
    return parts


def copy(tape: Tape, x: Value) -> Value:
    """x in another layout; its gradient is a view."""
    out = tape.like(x)
    tape.record([out], [x], [], lambda grads, _: [grads[0]])
    return out


def activate(tape: Tape, parts: Sequence[Value], n: int) -> Value:
    """The activation function, n elements, of one tensor; times another one, or of one half of it times the other. The first of
    two gradients is written into the incoming one."""
    out, itemsize = tape.new(n, parts[0].itemsize), parts[0].itemsize
    reused, sources = parts[0].n == n, _sources(*parts)
    written = [part.n for part in parts][reused:]

    def backward(grads: list[Value | None], saved: list[Value]) -> Sequence[Value | None]:
        return [*(grads if reused else []), *(tape.new(each, itemsize) for each in written)]

    tape.record([out], parts, sources, backward)
    out.recipe = Recipe(tape, out, sources)
    return out


def rescale(tape: Tape, z: Value, magnitude: Value, gain: Value) -> Value:
    """DoRA: z times each output's gain, which follows from its magnitude."""
    out, sources = tape.like(z), [z, gain]
    tape.record([out], [z, magnitude], sources, lambda grads, saved: [tape.like(saved[0]), tape.like(magnitude)])
    out.recipe = Recipe(tape, out, sources)
    return out


def capped_softmax(tape: Tape, scores: Value, rows: int) -> Value:
    """Attention's weights from scores that are capped; saves the scores, and each row's float32 maximum and sum."""
    out, sources = tape.like(scores), [scores, *(tape.new(rows, FLOAT32) for _ in range(2))]
    tape.record([out], [scores], sources, lambda grads, saved: [tape.like(saved[0])])
    out.recipe = Recipe(tape, out, sources)
    return out
