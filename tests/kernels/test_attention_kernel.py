"""Causal attention over segments, forward and backward. Oracle: autograd through torch's attention, in double precision."""

import contextlib
from itertools import pairwise

import pytest
import torch

from lownibble.errors import BackendError, InputError
from lownibble.kernels import cpu, ops

BACKENDS = ["reference"]
with contextlib.suppress(BackendError):
    BACKENDS += ["cpu"] if cpu.library().has_attention() else []

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""Sums of up to 300 products of order one in float32, through an exponential good to 2 units in the last place."""


def _inputs(B, heads, key_heads, T, D, *, by_token=True):
    """q, k, v and the output's gradient; as transformers has them, a token's heads side by side, or a head's tokens."""
    torch.manual_seed(T)
    shapes = [(B, T, count, D) if by_token else (B, count, T, D) for count in (heads, key_heads, key_heads)]
    q, k, v = (torch.randn(shape).transpose(1, 2) if by_token else torch.randn(shape) for shape in shapes)
    return q, k, v, torch.randn(B, T, heads, D)


def _expected(q, k, v, dout, cu_seqlens, scaling):
    q, k, v = (t.double().detach().requires_grad_() for t in (q, k, v))
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    pieces = []
    for a, b in pairwise(cu_seqlens):
        row, part = a // T, slice(a % T, a % T + b - a)
        one = [t[row : row + 1, :, part] for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]
        pieces.append(torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scaling)[0].transpose(0, 1))
    out = torch.cat(pieces).view(q.shape[0], T, q.shape[1], q.shape[3])
    return [out, *torch.autograd.grad(out, (q, k, v), dout.double())]


CASES = {
    "one token": ((1, 1, 1, 1, 16), [0, 1]),
    "rows": ((2, 4, 2, 33, 32), [0, 33, 66]),
    "padded rows": ((2, 4, 2, 20, 16), [0, 13, 20, 40]),
    "packed": ((1, 3, 1, 75, 64), [0, 5, 6, 6, 70, 75]),
    "longer than a block": ((1, 2, 2, 300, 48), [0, 97, 300]),
    "a whole block": ((1, 2, 1, 192, 64), [0, 192]),
    "wide heads": ((1, 2, 1, 70, 208), [0, 70]),
}


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(backend, case, by_token):
    shape, cu_seqlens = CASES[case]
    q, k, v, dout = _inputs(*shape, by_token=by_token)
    scaling = 0.7 * shape[-1] ** -0.5
    places = torch.tensor(cu_seqlens)
    with ops.use_backend(backend):
        out, lse = ops.attention(q, k, v, places, scaling)
        gradients = ops.attention_backward(dout, q, k, v, out, lse, places, scaling)
    for found, expected in zip((out, *gradients), _expected(q, k, v, dout, cu_seqlens, scaling), strict=True):
        torch.testing.assert_close(found, expected.float(), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v, dout = _inputs(1, 2, 1, 40, 32)
    q = q * 100
    places = torch.tensor([0, 40])
    with ops.use_backend(backend):
        out, lse = ops.attention(q, k, v, places, 1.0)
        dq, dk, dv = ops.attention_backward(dout, q, k, v, out, lse, places, 1.0)
    expected = _expected(q, k, v, dout, [0, 40], 1.0)
    torch.testing.assert_close(out, expected[0].float(), rtol=1e-3, atol=1e-3)  # scores of 1e3: an ulp of them is 1e-4
    assert all(torch.isfinite(t).all() for t in (dq, dk, dv))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_segment(backend):
    q, k, v, _ = _inputs(1, 2, 1, 40, 32)
    k[0, 0, 12] = float("nan")
    with ops.use_backend(backend):
        out, _ = ops.attention(q, k, v, torch.tensor([0, 10, 20, 40]), 0.2)
    assert torch.isnan(out[0, 12:20]).all()
    assert torch.isfinite(out[0, :12]).all()
    assert torch.isfinite(out[0, 20:]).all()


def test_threads_do_not_change_the_result():
    if "cpu" not in BACKENDS:
        pytest.skip("needs AVX-512")
    q, k, v, dout = _inputs(2, 6, 2, 100, 32)
    places, before, found = torch.tensor([0, 60, 100, 200]), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, lse = cpu.attention(q, k, v, places, 0.2)
            found.append((out, *cpu.attention_backward(dout, q, k, v, out, lse, places, 0.2)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("cu_seqlens", [[0, 30], [1, 40], [0, 50, 40], [0, 25, 40], []])
def test_borders_that_leave_a_row_are_refused(cu_seqlens):
    if "cpu" not in BACKENDS:
        pytest.skip("needs AVX-512")
    q, k, v, _ = _inputs(2, 2, 1, 20, 32)
    with pytest.raises(InputError, match="cu_seqlens"):
        cpu.attention(q, k, v, torch.tensor(cu_seqlens, dtype=torch.long), 0.2)


def test_heads_of_an_odd_size_are_refused():
    if "cpu" not in BACKENDS:
        pytest.skip("needs AVX-512")
    q, k, v, _ = _inputs(1, 2, 1, 20, 24)
    with pytest.raises(InputError, match="multiple of 16"):
        cpu.attention(q, k, v, torch.tensor([0, 20]), 0.2)
