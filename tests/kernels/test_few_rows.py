"""Products of few rows with 4-bit weights, attention over slots and low-rank branches of rows by the Triton kernels, in the
interpreter or on a GPU. Oracles: float64 products of the reference's weights; torch's attention on each row alone; a loop."""

import importlib.util

import numpy as np
import pytest
import torch
from oracles import gemv_bound, nested_constants, random
from torch.nn.functional import scaled_dot_product_attention

import lownibble as ln
from lownibble.kernels import ops, reference
from lownibble.kernels.decoder import LowRank
from lownibble.kernels.rows import Attending, RowAdapters
from lownibble.kernels.types import FourBit, Grouped
from lownibble.quant.codebook import codebook, levels

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if CUDA:
    pytestmark = [pytestmark, pytest.mark.gpu]


@pytest.fixture(autouse=True)
def triton_kernels():
    with np.errstate(all="ignore"), ln.use_backend("triton"):  # the interpreter computes in numpy
        yield ops.backend("triton")


def on_device(weight):
    nested = weight.nested and weight.nested._replace(**{
        name: getattr(weight.nested, name).to(DEVICE) for name in ("values", "absmax", "offset")
    })  # fmt: skip
    tensors = {name: value.to(DEVICE) for name, value in weight._asdict().items() if isinstance(value, torch.Tensor)}
    return weight._replace(nested=nested, **tensors)


def four_bit(N, K, block, doubly):
    table = codebook("nf4")
    codes, absmax = reference.quantize_4bit(random(N * K, seed=K), table.bounds, table.order, block)
    absmax, nested = nested_constants(absmax) if doubly else (absmax, None)
    return FourBit(codes, absmax, table.values, block, torch.Size((N, K)), nested)


def grouped(kind, N, K, size):
    generator = torch.Generator().manual_seed(K)

    def some_bytes(count):
        return torch.randint(256, (count,), generator=generator, dtype=torch.uint8)

    zero = some_bytes(-(-N * K // size // 2)) if kind == "int4" else None
    scale = random(N * K // size, seed=1)
    return Grouped(some_bytes(N * K // 2), 4, levels(kind), scale, zero, None, size, torch.Size((N, K)))


WEIGHTS = {
    "nf4": lambda: four_bit(70, 192, 64, False),
    "nf4, double quantisation, long rows": lambda: four_bit(5, 4608, 64, True),
    "nf4, large blocks": lambda: four_bit(9, 1024, 512, True),
    "int4": lambda: grouped("int4", 67, 256, 128),
    "mxfp4": lambda: grouped("mxfp4", 3, 96, 32),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_of_few_rows(triton_kernels, name, dtype):
    weight = WEIGHTS[name]()
    (N, K), is_4bit = weight.shape, isinstance(weight, FourBit)
    dense = (reference.dequantize_4bit if is_4bit else reference.dequantize_grouped)(weight, torch.empty(N, K))
    there = on_device(weight)
    for T in (1, 2, 17):
        x = random(T * K, dtype, seed=T).view(T, K)
        assert triton_kernels.takes_few(x, weight)
        exact = x.double() @ dense.double().t()
        found = [(ops.gemv_4bit if is_4bit else ops.gemv_grouped)(x.to(DEVICE), there) for _ in range(2)]
        assert torch.equal(*found), "sums have one order"
        assert (found[0].dtype, found[0].shape) == (dtype, (T, N))
        assert bool(((found[0].cpu().double() - exact).abs() <= gemv_bound(x, dense, exact, triton_kernels)).all())


def test_columns_split_among_programs_are_added_in_order(triton_kernels, monkeypatch):
    """With few outputs. The same sums in one part differ by rounding only."""
    from lownibble.kernels import triton_few

    weight, x = on_device(four_bit(16, 2048, 64, True)), random(3 * 2048, torch.float16).view(3, 2048).to(DEVICE)
    launched = []
    launch = triton_few._launch
    monkeypatch.setattr(triton_few, "_launch", lambda kernel, n, *a, **k: launched.append(n) or launch(kernel, n, *a, **k))
    split = ops.gemv_4bit(x, weight)
    assert launched == [16, 1]
    monkeypatch.setattr(triton_few, "FEW_ROWS", triton_few.FEW_ROWS._replace(programs=1))
    torch.testing.assert_close(split, ops.gemv_4bit(x, weight), rtol=2e-3, atol=2e-3)
    assert launched == [16, 1, 1]


def test_what_the_programs_do_not_take_is_left_to_the_others(triton_kernels):
    takes = triton_kernels.takes_few
    good, x = four_bit(4, 128, 64, True), torch.ones(2, 128, dtype=torch.bfloat16)
    assert takes(x, good)
    assert not takes(x.float(), good)
    assert not takes(torch.ones(65, 128, dtype=torch.bfloat16), good)
    assert not takes(torch.ones(2, 96, dtype=torch.bfloat16), four_bit(4, 96, 64, False)), "blocks cross the ends of rows"
    assert not takes(x, grouped("int4", 4, 128, 128)._replace(bits=3))
    assert not takes(x, None)
    layer = ln.quant.QuantLinear.from_linear(torch.nn.Linear(128, 40, bias=False).bfloat16()).to(DEVICE)
    rows = random(16 * 128, torch.bfloat16).view(16, 128).to(DEVICE)
    with torch.no_grad():
        y = layer(rows)
        torch.testing.assert_close(y, rows @ layer.weight.dequantize().t(), rtol=2**-7, atol=2**-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer.weight), "matmul", lambda *_, **__: pytest.fail("16 rows were multiplied with a decoded weight"))
        with torch.no_grad():
            assert torch.equal(layer(rows), y)


ATTENTION = {
    "grouped heads": ({"heads": 6, "key_heads": 2, "D": 16, "DV": 16}, Attending()),
    "one head, other sizes": ({"heads": 1, "key_heads": 1, "D": 24, "DV": 40}, Attending(scaling=0.3)),
    "head sizes of latent attention": ({"heads": 2, "key_heads": 1, "D": 192, "DV": 128}, Attending()),
    "a window": ({"heads": 4, "key_heads": 4, "D": 16, "DV": 16}, Attending(window=70)),
    "a cap and sinks": (
        {"heads": 4, "key_heads": 2, "D": 16, "DV": 16},
        Attending(softcap=0.7, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_over_slots(name, dtype):
    """Rows of one token, of one block, and over several parts; the rest of the capacity is not read."""
    sizes, how = ATTENTION[name]
    H, n, D, DV, C = sizes["heads"], sizes["key_heads"], sizes["D"], sizes["DV"], 300
    slots, positions = torch.tensor([3, 0, 2]), torch.tensor([0, 63, 291])
    q = random(3 * H * D, dtype, seed=1).view(3, H, D)
    keys, values = random(4 * n * C * D, dtype, seed=2).view(4, n, C, D), random(4 * n * C * DV, dtype, seed=3).view(4, n, C, DV)
    expected = []
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        keys[slot, :, position + 1 :], values[slot, :, position + 1 :] = float("nan"), float("nan")
        first = 0 if how.window is None else max(0, position + 1 - how.window)
        k, v = (t[slot, :, first : position + 1].double().repeat_interleave(H // n, 0) for t in (keys, values))
        if how.sinks is None:
            expected.append(scaled_dot_product_attention(q[row, :, None].double(), k, v, scale=how.scaling)[:, 0])
            continue
        scores = (k @ q[row, :, :, None].double())[..., 0] * D**-0.5
        scores = torch.cat([torch.tanh(scores / how.softcap) * how.softcap, how.sinks[:, None].double()], 1)
        expected.append((scores.softmax(1)[:, None, :-1] @ v)[:, 0])
    how = how._replace(sinks=None if how.sinks is None else how.sinks.to(DEVICE))
    arguments = [t.to(DEVICE) for t in (q, keys, values, slots, positions)]
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    found = ops.attend_slots(*arguments, how)
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), torch.stack(expected), **close)
    keys.nan_to_num_()
    values.nan_to_num_()
    plain = reference.attend_slots(*(t.to(DEVICE) for t in (q, keys, values, slots, positions)), how)
    torch.testing.assert_close(found, plain, **close)


def tables(branches, dtype):
    """Two adapters' branches of each of three linear layers, as a step has them."""
    held = [[one and LowRank(one.A.to(DEVICE, dtype), one.B.to(DEVICE, dtype), one.scale) for one in of] for of in branches]
    pointers = torch.tensor(
        [[[one.A.data_ptr(), one.B.data_ptr()] if one else [0, 0] for one in of] for of in held], device=DEVICE
    )
    ranks = torch.tensor([[len(one.A) // 16 if one else 0 for one in of] for of in held], dtype=torch.int32, device=DEVICE)
    scales = torch.tensor([[one.scale if one else 0.0 for one in of] for of in held], device=DEVICE)
    largest = 16 * int(ranks.max())
    return RowAdapters(torch.empty(0), pointers, ranks, scales, largest, dtype, frozenset(range(3)), held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_rank_branches_of_rows(dtype, monkeypatch):
    """Different ranks, rows without an adapter, an adapter without a branch. As many launches for one adapter as for all."""
    from lownibble.kernels import triton_decode

    launched = []
    launch = triton_decode._launch
    monkeypatch.setattr(triton_decode, "_launch", lambda kernel, n, *a, **k: launched.append(n) or launch(kernel, n, *a, **k))
    K, N = 1100, 150
    branches = [
        [None, LowRank(random(16 * K, seed=1).view(16, K) / 30, random(N * 16, seed=2).view(N, 16), 0.5), None],
        [None, LowRank(random(32 * K, seed=3).view(32, K) / 30, random(N * 32, seed=4).view(N, 32), 2.0), None],
        [LowRank(torch.ones(16, K), torch.ones(N, 16), 1.0), None, None],
    ]  # fmt: skip
    step = tables(branches, dtype)
    x, y = random(5 * K, dtype, seed=5).view(5, K), random(5 * N, dtype, seed=6).view(5, N)
    for places in ([1, 0, -1, 2, 1], [0, 0, 0, 0, 0], [-1] * 5):
        found = y.to(DEVICE)
        expected = y.double()
        for row, place in enumerate(places):
            if place >= 0 and (one := branches[place][1]):
                A, B = one.A.to(dtype).double(), one.B.to(dtype).double()
                expected[row] += (x[row].double() @ A.t()) @ B.t() * one.scale
        found = found.clone()
        ops.add_low_rank_rows(found, x.to(DEVICE), step._replace(at=torch.tensor(places, device=DEVICE)), 1)
        close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
        torch.testing.assert_close(found.cpu().double(), expected, **close)
        plain = y.clone().to(DEVICE)
        reference.add_low_rank_rows(plain, x.to(DEVICE), step._replace(at=torch.tensor(places, device=DEVICE)), 1)
        wide = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-5, "atol": 2**-4}
        torch.testing.assert_close(found, plain, **wide)
    assert len(set(launched)) == 2
    assert len(launched) == 2 * 3
