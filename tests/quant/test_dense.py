"""Products with a dense matrix. Oracles: torch's in double precision, and for 8 bits the plain-torch reference, whose sums
`test_eightbit.py` holds to formulas."""

import pytest
import torch

import lownibble as ln
from lownibble.errors import BackendError, InputError
from lownibble.kernels import cpu, ops, reference
from lownibble.kernels.types import Epilogue
from lownibble.quant.dense import DenseProducts, code_type_for, forget

try:
    HAS_INT8, HAS_MATMUL = cpu.has_int8(), bool(cpu.library().has_matmul())
except BackendError:
    HAS_INT8 = HAS_MATMUL = False
needs_kernels = pytest.mark.skipif(not HAS_MATMUL, reason="no compiled kernels, or no AVX-512")
needs_vnni = pytest.mark.skipif(not HAS_INT8, reason="no compiled kernels, or no AVX-512 VNNI")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_vnni)]
INT8 = torch.int8

SHAPES = [(1, 1, 64), (13, 33, 192), (5, 2048, 64), (25, 2049, 128), (12, 6200, 64), (7, 33, 2112)]
"""(T, N, K): tiles of 12 rows and panels of 32 columns with and without a rest, sums of one, two and four times 2048 terms."""

ROUNDING = 2e-6
"""Of the largest output: sums of codes are exact, parts are added in another order."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scales(weight):
    return weight.abs().amax(1) / 127


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
def test_compiled_kernels_equal_the_reference(T, N, K, threads):
    weight = random(N, K)
    weight[N // 2] = 0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for transposed in (False, True):
            x, columns = random(T, N if transposed else K, seed=1), K if transposed else N
            found = []
            for backend in (reference, cpu):
                rows = backend.quantize_rows(x, scales(weight) if transposed else None)
                out = torch.full((T, columns), float("nan"))
                found.append(backend.matmul_8bit_dense(rows, weight, scales(weight), transposed, out))
                assert found[-1] is out
            atol = ROUNDING * float(found[0].abs().max())
            torch.testing.assert_close(found[1], found[0], rtol=0, atol=atol)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_scale_is_too_small_for_saturates(backend, transposed):
    weight, x = random(64, 64), random(12, 64, seed=1)
    scale = scales(weight) / 3
    with ln.use_backend(backend):
        rows = ops.quantize_rows(x, scale if transposed else None)
        found = ops.matmul_8bit_dense(rows, weight, scale, transposed, torch.empty(12, 64))
    codes = (weight / scale.unsqueeze(1)).round().clamp(-128, 127) * scale.unsqueeze(1)
    expected = x @ (codes if transposed else codes.t())
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("T", "N", "K"), [*SHAPES, (8, 100, 704), (21, 650, 64), (3, 0, 64), (0, 5, 64), (4, 7, 50)])
def test_exact_products_are_torchs(T, N, K, threads):
    """Bound: that of a float32 sum of so many terms, each rounded once."""
    weight, before = random(N, K), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way, columns in (("forward", N), ("backward", K)):
            x, factor = random(T, N + K - columns, seed=1), weight.t() if way == "forward" else weight
            out = torch.full((T, columns), float("nan"))
            assert getattr(DenseProducts(weight), way)(x, out) is out
            bound = (len(factor) + 1) * 2**-24 * (x.abs().double() @ factor.abs().double())
            assert ((out - x.double() @ factor.double()).abs() <= bound).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("r", [0, 5])
@pytest.mark.parametrize(("T", "N", "K"), [(1, 1, 64), (13, 33, 192), (21, 650, 64), (9, 130, 704), (0, 5, 64), (4, 7, 50)])
def test_products_with_something_added(T, N, K, r, biased, backend):
    """Bound: as above; a bias and r more terms."""
    weight = random(N, K)
    for transposed, columns in ((False, N), (True, K)):
        x, low, factor = random(T, N + K - columns, seed=1), random(T, r, seed=2), random(columns, r, seed=3).t()
        bias = random(columns, seed=4) if biased else None
        epilogue = Epilogue(bias, low, factor, 0.5) if r else Epilogue(bias)
        matrix = weight if transposed else weight.t()
        expected = x.double() @ matrix.double() + 0.5 * (low.double() @ factor.double()) + (0 if bias is None else bias.double())
        sizes = x.abs().double() @ matrix.abs().double() + low.abs().double() @ factor.abs().double() + 4 * biased
        with ln.use_backend(backend):
            found, out = ops.matmul_dense(x, weight, transposed, epilogue), torch.full((T, columns), float("nan"))
            assert ops.matmul_dense(x, weight, transposed, epilogue, out) is out
        assert torch.equal(found, out)
        assert ((out - expected).abs() <= (len(matrix) + r + 3) * 2**-24 * sizes).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("T", "P", "Q"), [(1, 1, 64), (13, 33, 192), (1500, 7, 64), (650, 50, 128), (5, 2049, 64), (0, 5, 64), (7, 0, 64), (3, 8, 50)]
)
def test_outer_products_are_torchs(T, P, Q, threads, backend):
    a, b, held = random(T, P), random(T, Q, seed=1), random(P, Q, seed=2)
    expected, sizes = a.double().t() @ b.double(), a.abs().double().t() @ b.abs().double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ln.use_backend(backend):
            found, out = ops.outer(a, b), torch.full((P, Q), float("nan"))
            assert ops.outer(a, b, out) is out
            more = held.clone()
            assert ops.outer(a, b, more, adds=True) is more
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, out)
    assert ((found - expected).abs() <= (T + 1) * 2**-24 * sizes).all()
    assert ((more - held - expected).abs() <= (T + 2) * 2**-24 * (sizes + held.abs())).all()


@needs_kernels
def test_an_outer_product_takes_any_values():
    a, b = random(9, 20), random(9, 64, seed=1)
    a[3, 5], b[2, 7] = float("nan"), float("inf")
    found = cpu.outer(a, b)
    assert not found[5].isfinite().any()
    assert not found[:, 7].isfinite().any()
    assert found[:5, :7].isfinite().all()


@pytest.mark.parametrize("weight", [random(70, 64).bfloat16(), random(64, 70).t()], ids=["16 bits", "transposed"])
def test_other_matrices_are_left_to_torch(weight):
    x = random(5, 64, seed=1).to(weight.dtype)
    assert torch.equal(DenseProducts(weight).forward(x, x.new_empty(5, 70)), x @ weight.t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_are_close_to_torchs(backend):
    weight, x, dy = random(3000, 128), random(30, 128, seed=1), random(30, 3000, seed=2)
    exact, ours = DenseProducts(weight), DenseProducts(weight, INT8)
    with ln.use_backend(backend):
        for way, source in (("forward", x), ("backward", dy)):
            expected = source @ (weight.t() if way == "forward" else weight)
            found = getattr(exact, way)(source, torch.empty_like(expected))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
            error = (getattr(ours, way)(source, torch.empty_like(expected)) - expected).norm() / expected.norm()
            assert 1e-3 < error < 0.015  # of 8 bits, and no more


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_so(backend):
    weight, x = random(40, 64), random(3, 64, seed=1)
    weight[7, 3], x[1, 5] = float("nan"), float("inf")
    with ln.use_backend(backend):
        y = DenseProducts(weight, INT8).forward(x, torch.empty(3, 40))
        dx = DenseProducts(weight, INT8).backward(torch.ones(3, 40), torch.empty(3, 64))
    assert not y[1].isfinite().any()
    assert not y[:, 7].isfinite().any()
    assert y[[0, 2]][:, :7].isfinite().all()
    assert not dx.isfinite().any()


def test_scales_follow_the_matrix(monkeypatch):
    weight, x, reads = random(8, 64), random(2, 64, seed=1), []
    plain = torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *a, **k: reads.append(1) or plain(*a, **k))
    with ln.use_backend("reference"):
        first, again = (DenseProducts(weight, INT8).forward(x, torch.empty(2, 8)) for _ in range(2))
        assert len(reads) == 1
        weight.mul_(2)
        doubled = DenseProducts(weight, INT8).forward(x, torch.empty(2, 8))
        weight.data.mul_(2)  # no version tells of it
        forget()
        quadrupled = DenseProducts(weight, INT8).forward(x, torch.empty(2, 8))
    assert torch.equal(first, again)
    assert torch.equal(doubled, 2 * first)
    assert torch.equal(quadrupled, 4 * first)
    assert len(reads) == 3


@needs_kernels
def test_wrong_arguments_of_exact_products_are_refused():
    good = {"x_TC": random(2, 64), "weight_NK": random(8, 64), "transposed": False, "out": torch.empty(2, 8)}
    cpu.matmul_dense(**good)
    wrong = {
        "'x_TC' must be": {"transposed": True},
        "'weight_NK' must be": {"weight_NK": random(8, 64).double()},
        "'out' must be": {"out": torch.empty(2, 16)[:, ::2]},
    }
    for message, changed in wrong.items():
        with pytest.raises(InputError, match=message):
            cpu.matmul_dense(**{**good, **changed})
    for changed in ({"a_TP": random(3, 5)}, {"b_TQ": random(64, 2).t()}, {"out": torch.empty(6, 64)}):
        with pytest.raises(InputError, match="must be a contiguous tensor"):
            cpu.outer(**{"a_TP": random(2, 5), "b_TQ": random(2, 64), "out": torch.empty(5, 64)} | changed)


@needs_vnni
def test_wrong_arguments_are_refused():
    weight, rows = random(8, 64), cpu.quantize_rows(random(2, 64))
    good = {"x": rows, "weight_NK": weight, "row_scale": scales(weight), "transposed": False, "out": torch.empty(2, 8)}
    cpu.matmul_8bit_dense(**good)
    wrong = {
        "must have 8 columns": {"transposed": True},
        "'weight_NK' must be": {"weight_NK": weight.double()},
        "'row_scale' must be": {"row_scale": torch.ones(7)},
        "'out' must be": {"out": torch.empty(2, 9)},
        "'codes' must be": {"x": rows._replace(rows=200)},
        "multiple of 64": {"weight_NK": random(8, 65)},
    }
    for message, changed in wrong.items():
        with pytest.raises(InputError, match=message):
            cpu.matmul_8bit_dense(**{**good, **changed})


class Model(torch.nn.Module):
    def __init__(self, compute, **head):
        super().__init__()
        self.base = ln.QuantLinear.from_linear(torch.nn.Linear(64, 64), ln.QuantConfig())
        self.base.compute = compute
        self.head = torch.nn.Linear(head.pop("width", 64), 100, bias=False, **head).requires_grad_(False)


def test_a_frozen_head_is_computed_as_the_base_is():
    with ln.use_backend("reference"):
        for compute, expected in {"exact": None, "int8": INT8, "fp8": None}.items():
            model = Model(compute)
            assert code_type_for(model, model.head.weight) is expected
        trained, narrow, half = Model("int8"), Model("int8", width=80), Model("int8", dtype=torch.bfloat16)
        trained.head.requires_grad_(True)
        for model in (trained, narrow, half):
            assert code_type_for(model, model.head.weight) is None
        assert code_type_for(model.head, model.head.weight) is None, "nothing is packed"


def test_bytes_of_a_row_are_what_it_takes():
    N = 1000
    rows = reference.quantize_rows(random(12, N))
    taken = 12 * N * 4 + sum(tensor.nbytes for tensor in (rows.codes, rows.scale, rows.start))
    assert DenseProducts(random(N, 64), INT8).row_bytes * 12 == taken
    assert DenseProducts(random(N, 64)).row_bytes == 4 * N
