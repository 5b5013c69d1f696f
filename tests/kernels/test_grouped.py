"""The kernels of grouped weights on every backend and instruction set. Oracles: the plain-torch reference, bit for bit; for the
reference the formula, one code at a time; float64 products."""

import pytest
import torch
from oracles import DTYPES, assert_same_bits, gemv_bound, matmul_bound, nested_constants, random
from pairwise import pairwise
from torch import Tensor

import lownibble as ln
from lownibble.errors import InputError
from lownibble.kernels import cpu, ops, reference
from lownibble.kernels.types import Epilogue, Grouped, Nested
from lownibble.quant import layouts
from lownibble.quant.codebook import dynamic8, levels

CODECS = [name for name in layouts.GROUPED if not name.endswith("_act")]
SHAPES = [((3, 64), 32), ((5, 192), 64), ((2, 24), 24), ((7, 40), 40), ((2, 4096), 4096), ((70, 1024), 128), ((3, 5, 64), 64)]
"""Shape and group size: groups with a part of 16 left, one group a row, one large group, several threads, experts."""

GEMVS = [((3, 64), 32), ((2, 24), 24), ((9, 40), 40), ((259, 576), 64)]


def weight(quant_type: str, shape: tuple[int, ...], size: int, *, doubly: bool = False, ordered: bool = False) -> Grouped:
    """Random bits; every code occurs, NaN of fp8 too."""
    kind, n, generator = layouts.GROUPED[quant_type], torch.Size(shape).numel(), torch.Generator().manual_seed(n_of(shape))
    n_groups = n // size

    def some_bytes(count: int) -> Tensor:
        return torch.randint(256, (count,), generator=generator, dtype=torch.uint8)

    codes, zero = some_bytes(layouts.n_bytes_of(n, kind.bits)), some_bytes(layouts.n_bytes_of(n_groups, kind.bits))
    if not kind.packed:
        codes = codes.view(torch.float8_e4m3fn if kind.is_float else torch.int8)
    scale, nested = random(n_groups, seed=1), None
    if doubly:
        scale, nested = nested_constants(scale)
    order = torch.randperm(shape[-1], generator=generator).int() if ordered else None
    zero = zero if kind.zero else None
    return Grouped(codes, kind.bits, levels(quant_type), scale, zero, order, size, torch.Size(shape), nested)


def n_of(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def finite(packed: Grouped) -> Grouped:
    """The same without NaN of fp8."""
    if packed.codes.dtype is not torch.float8_e4m3fn:
        return packed
    plain = packed.codes.view(torch.uint8)
    return packed._replace(codes=torch.where(plain & 0x7F == 0x7F, 0, plain).to(torch.uint8).view(torch.float8_e4m3fn))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("quant_type", CODECS)
def test_reference_is_the_formula(quant_type: str, ordered: bool) -> None:
    packed = finite(weight(quant_type, (2, 48), 24, ordered=ordered))
    out = reference.dequantize_grouped(packed, torch.empty(2, 48))
    codes = "".join(f"{byte:08b}" for byte in packed.codes.view(torch.uint8).tolist())
    zeros = "".join(f"{byte:08b}" for byte in packed.zero.tolist()) if packed.zero is not None else "0" * 64

    def code(string: str, i: int) -> int:
        return int(string[packed.bits * i : packed.bits * (i + 1)], 2)

    for i in range(96):
        zero = code(zeros, i // 24) if packed.zero is not None else 0
        value = (packed.values[code(codes, i)] - zero) * packed.scale[i // 24]
        column = i % 48 if packed.order is None else int(packed.order[i % 48])
        assert out[i // 48, column] == value


@pytest.mark.parametrize(
    ("shape", "size", "quant_type", "doubly", "ordered"),
    [(*sizes, *how) for sizes, *how in pairwise(SHAPES, CODECS, [False, True], [False, True])], ids=str,
)  # fmt: skip
def test_grouped_equals_reference(
    kernels: ops.Backend, shape: tuple[int, ...], size: int, quant_type: str, doubly: bool, ordered: bool
) -> None:
    packed = weight(quant_type, shape, size, doubly=doubly, ordered=ordered)
    for dtype in DTYPES:
        out, expected = torch.full(shape, 7.0, dtype=dtype), torch.empty(shape, dtype=dtype)
        assert kernels.dequantize_grouped(packed, out) is out
        reference.dequantize_grouped(packed, expected)
        assert torch.equal(out.isnan(), expected.isnan())
        assert_same_bits(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("quant_type", ["int3", "fp8"])
@pytest.mark.parametrize("offset", [0, 1])
def test_large_grouped_outputs_equal_reference(kernels: ops.Backend, quant_type: str, offset: int) -> None:
    """From 2^23 elements on, aligned outputs are written around the caches; one that starts inside a line is not."""
    packed = finite(weight(quant_type, (2049, 4096), 64))
    out = torch.empty(2049 * 4096 + offset)[offset:]
    kernels.dequantize_grouped(packed, out)
    assert_same_bits(out, reference.dequantize_grouped(packed, torch.empty(2049 * 4096)))


@pytest.mark.parametrize(
    ("shape", "size", "quant_type", "dtype", "doubly"),
    [(*sizes, *how) for sizes, *how in pairwise(GEMVS, CODECS, DTYPES, [False, True])], ids=str,
)  # fmt: skip
def test_gemv_grouped(
    kernels: ops.Backend, shape: tuple[int, int], size: int, quant_type: str, dtype: torch.dtype, doubly: bool
) -> None:
    packed, (N, K) = finite(weight(quant_type, shape, size, doubly=doubly)), shape
    weight_NK = reference.dequantize_grouped(packed, torch.empty(N, K))
    for T in (1, 2, 3, 4, 9):
        x_TK = random(T * K, dtype, seed=T).view(T, K)
        exact_TN = x_TK.double() @ weight_NK.double().t()
        y_TN = kernels.gemv_grouped(x_TK, packed)
        assert (y_TN.dtype, tuple(y_TN.shape)) == (dtype, (T, N))
        assert bool(((y_TN.double() - exact_TN).abs() <= gemv_bound(x_TK, weight_NK, exact_TN, kernels)).all())


@pytest.mark.parametrize(
    ("sizes", "quant_type", "dtype", "transposed"),
    pairwise(
        [(7, 33, 64, 32), (9, 20, 192, 192), (17, 130, 704, 64), (8, 48, 80, 80), (5, 20, 64, 8)], CODECS, DTYPES, [False, True]
    ),
    ids=str,
)
def test_matmul_grouped(
    kernels: ops.Backend, sizes: tuple[int, int, int, int], quant_type: str, dtype: torch.dtype, transposed: bool
) -> None:
    T, N, K, size = sizes
    packed = finite(weight(quant_type, (N, K), size, doubly=True))
    weight_NK = reference.dequantize_grouped(packed, torch.empty(N, K))
    factor_CM = weight_NK if transposed else weight_NK.t()
    terms, columns = factor_CM.shape
    x, low = random(T * terms, dtype, seed=1).view(T, terms), random(T * 3, dtype, seed=2).view(T, 3)
    for epilogue in (Epilogue(), Epilogue(random(columns, seed=3), low, random(columns * 3, seed=4).view(columns, 3).t(), 2.0)):
        exact = x.double() @ factor_CM.double()
        if epilogue.bias is not None and epilogue.low is not None and epilogue.factor is not None:
            exact += epilogue.bias.double() + epilogue.scale * epilogue.low.double() @ epilogue.factor.double()
        y = kernels.matmul_grouped(x, packed, transposed, epilogue)
        assert (y.dtype, tuple(y.shape)) == (dtype, (T, columns))
        assert bool(((y.double() - exact).abs() <= matmul_bound(x, factor_CM, epilogue, exact)).all())


@pytest.mark.parametrize(("T", "N", "K"), [(0, 3, 64), (2, 0, 64), (2, 3, 0), (0, 0, 0)])
def test_grouped_of_nothing(kernels: ops.Backend, T: int, N: int, K: int) -> None:
    size = 64 if K else 0
    codes, scale = torch.zeros(N * K // 2, dtype=torch.uint8), torch.zeros(N * K // 64)
    packed = Grouped(codes, 4, levels("int4"), scale, None, None, size, torch.Size((N, K)))
    assert kernels.dequantize_grouped(packed, torch.empty(N, K)).shape == (N, K)
    assert torch.equal(kernels.gemv_grouped(torch.ones(T, K), packed), torch.zeros(T, N))
    assert torch.equal(kernels.matmul_grouped(torch.ones(T, N), packed, True, Epilogue()), torch.zeros(T, K))


def test_gemv_grouped_does_not_depend_on_threads(kernels: ops.Backend) -> None:
    if kernels.name == "reference":
        pytest.skip("torch's matmul promises nothing about threads")
    packed, x_TK, threads, results = weight("int3", (301, 512), 64), random(3 * 512).view(3, 512), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(kernels.gemv_grouped(x_TK, packed))
    torch.set_num_threads(threads)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_act_order_permutes_activations(dtype: torch.dtype, transposed: bool) -> None:
    """Products of a weight whose columns are grouped by strength are those of the decoded weight."""
    packed = ln.quantize(random(24 * 128).view(24, 128), "int4_act", statistics=random(128, seed=1).square())
    dense = packed.dequantize(torch.float32)
    factor_CM = dense if transposed else dense.t()
    terms, columns = factor_CM.shape
    x, low = random(9 * terms, dtype, seed=1).view(9, terms), random(9 * 3, dtype, seed=2).view(9, 3)
    epilogue = Epilogue(random(columns, seed=3), low, random(columns * 3, seed=4).view(3, columns), 0.5)
    exact = x.double() @ factor_CM.double() + random(columns, seed=3).double()
    exact += 0.5 * low.double() @ epilogue.factor.double()
    y = packed.matmul(x, transposed=transposed, epilogue=epilogue)
    assert bool(((y.double() - exact).abs() <= matmul_bound(x, factor_CM, epilogue, exact)).all())
    if not transposed:
        exact = x[:1].double() @ factor_CM.double()
        assert bool(((packed.matvec(x[:1]).double() - exact).abs() <= gemv_bound(x[:1], dense, exact)).all())


def good() -> Grouped:
    return weight("int4", (4, 64), 32)


_NESTED = Nested(dynamic8(), torch.ones(1), torch.zeros(1))
BAD = {
    "codes too short": {"codes": torch.zeros(127, dtype=torch.uint8)},
    "codes of another type": {"codes": torch.zeros(128, dtype=torch.int8)},
    "codes elsewhere": {"codes": torch.zeros(128, dtype=torch.uint8, device="meta")},
    "bits": {"bits": 5},
    "codes too short for their bits": {"bits": 8, "codes": torch.zeros(128, dtype=torch.int8), "values": torch.zeros(256)},
    "values too short": {"values": torch.zeros(8)},
    "scale too short": {"scale": torch.ones(7)},
    "scale coded without nested": {"scale": torch.zeros(8, dtype=torch.uint8)},
    "nested missing": {"scale": torch.zeros(8, dtype=torch.uint8), "nested": _NESTED._replace(absmax=torch.ones(0))},
    "zero too short": {"zero": torch.zeros(3, dtype=torch.uint8)},
    "zero of another type": {"zero": torch.zeros(4, dtype=torch.int8)},
    "groups over the end of a row": {"group_size": 48},
    "groups inside a byte": {"group_size": 4},
    "order too short": {"order": torch.zeros(32, dtype=torch.int32)},
    "order of another type": {"order": torch.zeros(64, dtype=torch.int64)},
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_grouped_tensors_raise(unsafe_kernels: ops.Backend, case: str) -> None:
    wrong = good()._replace(**BAD[case])
    with pytest.raises(InputError):
        unsafe_kernels.dequantize_grouped(wrong, torch.empty(256))
    with pytest.raises(InputError):
        unsafe_kernels.gemv_grouped(torch.ones(1, 64), wrong)
    with pytest.raises(InputError):
        unsafe_kernels.matmul_grouped(torch.ones(1, 64), wrong, False, Epilogue())


def test_wrong_grouped_inputs_raise(unsafe_kernels: ops.Backend) -> None:
    with pytest.raises(InputError, match="'out' must be float32, bfloat16 or float16"):
        unsafe_kernels.dequantize_grouped(good(), torch.empty(256, dtype=torch.float64))
    with pytest.raises(InputError, match="'out' must be a contiguous tensor of 256 elements"):
        unsafe_kernels.dequantize_grouped(good(), torch.empty(64, 4).t())
    with pytest.raises(InputError, match="'x_TK' must be a contiguous"):
        unsafe_kernels.gemv_grouped(torch.ones(64, 2).t(), good())
    ordered = weight("int4", (4, 64), 32, ordered=True)
    for call in (lambda: unsafe_kernels.gemv_grouped(torch.ones(1, 64), ordered),
                 lambda: unsafe_kernels.matmul_grouped(torch.ones(1, 64), ordered, False, Epilogue())):  # fmt: skip
        with pytest.raises(InputError, match="Products take grouped weights without 'order'"):
            call()


@pytest.mark.skipif(ops.backend_status()["cpu"] != "ok", reason="no compiled library")
@pytest.mark.parametrize("column", [-1, 64])
def test_an_order_outside_of_the_row_raises(column: int) -> None:
    ordered = weight("int4", (4, 64), 32, ordered=True)
    ordered.order[3] = column
    with pytest.raises(InputError, match="'order' must be columns below 64"):
        cpu.dequantize_grouped(ordered, torch.empty(256))
