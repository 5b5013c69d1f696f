"""The calibration pass of a start that looks at layers' inputs, on a tape: `calibration/layers.py` and `lora/init.py`.

It comes before the first step, with the model in memory and no gradient or optimiser state. The last decoder layer that has
adapters is counted, when all others have theirs: the hidden states of all rows, a few rows within the layer, second moments of
its inputs, then what each start allocates. The symmetric eigenproblem is LAPACK's `syevd`: besides the copy of the matrix that
becomes the vectors, it takes two more of its size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lownibble.arch import Linear, ModelShape
from lownibble.planning.decoder import Decoder
from lownibble.planning.linear import Method, Runtime
from lownibble.planning.tape import BOOL, FLOAT32, INT64, Tape, Value

FLOAT64 = 8
TOKENS_AT_ONCE = 2048
"""Of `calibration.layers`."""


class Rows(NamedTuple):
    """Calibration rows: their number, and tokens in each."""

    number: int
    length: int


def rows_of(n_tokens: int, length: int) -> Rows:
    """As many rows as `calibration.join_rows` makes of at most `n_tokens` tokens."""
    length = min(length, n_tokens // 2)
    number = n_tokens // length
    return Rows(number, length - (number == length))


def run_calibration(shape: ModelShape, method: Method, run: Runtime, rows: Rows, init: str) -> Tape:
    """The tape of a calibration pass, with the marks 'model' and 'calibration'.

    Args:
        init: the start's name, in `STARTS`.
    """
    tape = Tape(run.round_to, shards=run.shards or 1)
    model = Decoder(tape, shape, method, run)
    tape.mark("model")
    with tape.no_grad():
        ids = tape.new(rows.number * rows.length, INT64)
        states = tape.new(rows.number * rows.length * shape.hidden, run.itemsize)
        embedded = tape.like(states)  # the model's code keeps it while the layers run
        cos, sin = model.angles(rows.length)
        few = min(rows.number, max(1, TOKENS_AT_ONCE // rows.length))
        last = max(i for i in range(shape.layers) if any(path.startswith(f"model.layers.{i}.") for path in method.ranks))
        part = Value(states.storage, few * rows.length * shape.hidden, run.itemsize)
        if model.groups:
            model.groups.hold(last)
            model.groups.hold(shape.layers)  # the rest, which is read first
        measured = [linear for linear in shape.linears if f"model.layers.{last}.{linear.name}" in method.ranks]
        widths = _widths(measured)
        late = widths[-1:] if measured[-1:] == [*shape.linears[-1:]] else []  # the MLP's last, after its widest tensors
        moments = [_moment(tape, n, run, few * rows.length) for n in widths[: len(widths) - len(late)]]
        newest = None if late else tape.new(few * rows.length * measured[-1].in_features, run.itemsize)  # an input that is kept
        model.layer(last, part, cos, sin, few)
        del newest
        moments += [_moment(tape, n, run, few * rows.length) for n in late]
        for linear in measured:
            path = f"model.layers.{last}.{linear.name}"
            STARTS[init](tape, linear, method.ranks[path], path in method.packed)
        del moments
        whole = tape.like(states) if few < rows.number else None
        model.layer(last, part, cos, sin, few)
        del whole
    tape.mark("calibration")
    del model, ids, embedded
    return tape


def _widths(measured: list[Linear]) -> list[int]:
    """Widths of the distinct inputs: that of q, k and v, that of o, of gate and up, of down."""
    inputs = {linear.name.rpartition(".")[2].split("_")[0]: linear.in_features for linear in measured}
    same = {"k": "q", "v": "q", "up": "gate"}
    return [n for name, n in inputs.items() if same.get(name) not in inputs]


def _moment(tape: Tape, n: int, run: Runtime, tokens: int) -> Value:
    matrix = tape.new(n * n)
    if run.itemsize != FLOAT32:
        tape.new(tokens * n)  # the input in float32
    return matrix


def _eigenvectors(tape: Tape, n: int) -> Value:
    """`torch.linalg.eigh` of (n, n) float64 that the caller holds; the vectors in descending order."""
    vectors, work = tape.new(n * n, FLOAT64), tape.new(2 * n * n, FLOAT64)
    del work
    flipped = tape.like(vectors)
    del vectors
    return flipped


def _eva(tape: Tape, linear: Linear, r: int, packed: bool) -> None:
    K = linear.in_features
    double = tape.new(K * K, FLOAT64)
    _eigenvectors(tape, K)
    del double


def _qera(tape: Tape, linear: Linear, r: int, packed: bool) -> None:
    """As `lora/init.py`: the root, what was lost times the root, its leading part, and the root taken out again."""
    K, N = linear.in_features, linear.out_features
    damped, factor = tape.new(K * K), tape.new(K * K)
    del damped
    checked = [tape.new(K * K, BOOL), tape.new(K * K), tape.new(K * K, BOOL)]
    del checked
    root = tape.new(K * K, FLOAT64)
    del factor
    lost = _lost(tape, N * K)
    weighted = tape.new(N * K, FLOAT64)
    del lost
    right = _leading(tape, weighted, N, K, r)
    del weighted
    solved = [tape.new(K * K, FLOAT64), tape.like(right)]
    del solved, root


def _qera_approx(tape: Tape, linear: Linear, r: int, packed: bool) -> None:
    K, N = linear.in_features, linear.out_features
    damped = tape.new(K * K)
    del damped
    lost = _lost(tape, N * K)
    weighted = tape.like(lost)
    del lost
    _leading(tape, weighted, N, K, r)


def _lost(tape: Tape, n: int) -> Value:
    """W - Q in float64: both in float32 first."""
    weight, decoded = tape.new(n), tape.new(n)
    lost = tape.new(n)
    del weight, decoded
    double = tape.new(n, FLOAT64)
    del lost
    return double


def _leading(tape: Tape, matrix: Value, N: int, K: int, r: int) -> Value:
    """`lora.init.leading` of (N, K) float64 that the caller holds."""
    n = min(N, K)
    product = tape.new(n * n, FLOAT64)
    vectors = _eigenvectors(tape, n)
    del product
    other = tape.new(r * max(N, K), FLOAT64)
    del vectors
    return other


STARTS: dict[str, Callable[[Tape, Linear, int, bool], None]] = {
    "eva": _eva,
    "qera": _qera,
    "qera_approx": _qera_approx,
    "auto": _qera,
}
"""Start -> what it allocates for a layer."""
