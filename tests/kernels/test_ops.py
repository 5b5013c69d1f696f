"""Every kernel operation on every backend, instruction set, type and awkward shape.

The Triton kernels run on the GPU where there is one, else in Triton's interpreter, on the cases chosen in `conftest.py`. Oracles:
the plain-torch reference for the compiled and the Triton kernels (bit for bit, except the products), bitsandbytes for the bytes
(codes, constants, nested constants) of every backend, and float64 products for the products.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    DTYPES,
    NESTED_BLOCK_SIZE,
    ROUNDOFF,
    assert_same_bits,
    gemv_bound,
    matmul_bound,
    nested_constants,
    random,
    running,
    variants,
)
from pairwise import pairwise
from torch import Tensor

from lownibble.errors import BackendError, InputError
from lownibble.kernels import cpu, ops, reference
from lownibble.kernels.types import Epilogue, FourBit, Nested, Scaled8bit
from lownibble.quant.codebook import codebook, dynamic8, dynamic8_lookup

QUANT_TYPES = ["nf4", "fp4"]
SIZES = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 1000, 4096, 4097, 64 * 256 * 2 + 64 * 3 + 5]
"""Empty, one element, odd, around a group of 16 and a block, a nested block and a bit."""

try:
    HAS_MATMUL = bool(cpu.library().has_matmul())
except BackendError:
    HAS_MATMUL = False


def _heavy_tailed(n: int) -> Tensor:
    """Student's t with one degree of freedom: outliers thousands of times the median."""
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.tan((uniform - 0.5) * 3.1415).float()


def _ties(quant_type: str, n: int) -> Tensor:
    """Values exactly on the midpoints between codes, each block scaled by a power of two (so that scaling is exact)."""
    bounds = codebook(quant_type).bounds
    values = torch.cat([bounds, bounds.new_tensor([1.0])]).repeat(-(-n // 16))[:n].view(-1)
    powers = torch.arange(n).div(64, rounding_mode="floor").remainder(7) - 3
    return values * 2.0**powers


SPECIAL = {
    "heavy-tailed": lambda quant_type: _heavy_tailed(64 * 40 + 10),
    "ties": lambda quant_type: _ties(quant_type, 64 * 16 + 32),
    "negative ties": lambda quant_type: -_ties(quant_type, 64 * 16 + 32),
    "zeros": lambda quant_type: torch.zeros(64 * 3 + 7),
    "zeros then ones": lambda quant_type: torch.cat([torch.zeros(64 * 2), torch.ones(64)]),
    "all equal": lambda quant_type: torch.full((64 * 4 + 3,), -0.37),
    "tiny": lambda quant_type: random(64 * 4 + 5) * 1e-38,
    "subnormal": lambda quant_type: random(64 * 4) * 1e-42,
    "huge": lambda quant_type: random(64 * 4 + 5) * 1e37,
}


def _check_4bit(kernels: ops.Backend, x: Tensor, quant_type: str, block_size: int) -> None:
    table = codebook(quant_type)
    codes, absmax = kernels.quantize_4bit(x, table.bounds, table.order, block_size)
    expected_codes, expected_absmax = reference.quantize_4bit(x, table.bounds, table.order, block_size)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(absmax, expected_absmax)
    absmax_8bit, nested = nested_constants(absmax)
    for dtype in DTYPES:
        for constants, decode_with in ((absmax, None), (absmax_8bit, nested)):
            out = torch.full((x.numel(),), 7.0, dtype=dtype)
            expected = torch.empty_like(out)
            weight = FourBit(codes, constants, table.values, block_size, x.shape, decode_with)
            assert kernels.dequantize_4bit(weight, out) is out
            reference.dequantize_4bit(weight, expected)
            assert_same_bits(out, expected)


SUMS = [(1, 32), (3, 15), (7, 80), (37, 64), (64, 801), (300, 192), (2, 4096)]
"""Rows and columns: one block, blocks over row ends, several tiles, a short last block, a row as long as the largest block."""


def _sum(N: int, K: int, r: int, group: int) -> tuple[Scaled8bit, Tensor, Tensor]:
    """An int8 weight and factors whose sums are exact in float32, in any order."""
    generator = torch.Generator().manual_seed(N * K)
    codes = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    scale = 2.0 ** torch.randint(-6, -3, (N * K // group,), generator=generator)
    low, A = (torch.randint(-4, 5, shape, generator=generator) / 8 for shape in ((N, r), (r, K)))
    return Scaled8bit(codes, scale, group), low, A


@pytest.mark.parametrize(("shape", "r", "block_size"), pairwise(SUMS, [1, 4, 16, 19], [16, 64, 4096]), ids=str)
def test_a_quantised_sum_equals_the_quantised_exact_one(
    kernels: ops.Backend, shape: tuple[int, int], r: int, block_size: int
) -> None:
    N, K = shape
    for quant_type in QUANT_TYPES:
        table = codebook(quant_type)
        for group in {K, 16 if K % 16 == 0 else K}:
            base, low, A = _sum(N, K, r, group)
            total = base.codes.double().view(-1, group) * base.scale.double().unsqueeze(1)
            exact = (total.view(N, K) + low.double() @ A.double()).float().view(-1)
            expected = reference.quantize_4bit(exact, table.bounds, table.order, block_size)
            found = kernels.quantize_sum_4bit(base, low, A, table.bounds, table.order, block_size)
            for ours, theirs in zip(found, expected, strict=True):
                assert_same_bits(ours, theirs)


def test_a_quantised_sum_of_any_numbers_is_within_a_rounding(kernels: ops.Backend) -> None:
    table, N, K, r = codebook("nf4"), 96, 192, 16
    base = _sum(N, K, r, 64)[0]._replace(scale=random(N * K // 64, seed=1).abs() * 0.01)
    low, A = random(N * r, seed=2).view(N, r), random(r * K, seed=3).view(r, K)
    codes, absmax = kernels.quantize_sum_4bit(base, low, A, table.bounds, table.order, 64)
    total = (base.codes.double().view(-1, 64) * base.scale.double().unsqueeze(1)).view(N, K) + low.double() @ A.double()
    expected_codes, expected_absmax = reference.quantize_4bit(total.float().view(-1), table.bounds, table.order, 64)
    torch.testing.assert_close(absmax, expected_absmax, rtol=1e-5, atol=1e-5)
    assert (codes != expected_codes).float().mean() < 0.002, "only values next to a bound may fall on its other side"


@pytest.mark.parametrize(("n", "dtype", "block_size"), pairwise(SIZES, DTYPES, [16, 64, 128, 4096]), ids=str)
def test_4bit_equals_reference(kernels: ops.Backend, n: int, dtype: torch.dtype, block_size: int) -> None:
    for quant_type in QUANT_TYPES:
        _check_4bit(kernels, random(n, dtype, seed=n), quant_type, block_size)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("special", SPECIAL)
def test_4bit_equals_reference_on_special_values(kernels: ops.Backend, special: str, quant_type: str) -> None:
    _check_4bit(kernels, SPECIAL[special](quant_type), quant_type, 64)


def test_4bit_equals_reference_across_threads(kernels: ops.Backend) -> None:
    x = random(300_000 + 33)  # large enough for the parallel path, with a short last block
    _check_4bit(kernels, x, "nf4", 64)


@pytest.mark.parametrize("offset", [0, 1])
def test_large_outputs_equal_reference(kernels: ops.Backend, offset: int) -> None:
    """From 2^23 elements on, aligned outputs are written around the caches; an output that starts inside a line is not."""
    n, table = 2**23 + 2**15 + 70, codebook("nf4")
    codes = torch.randint(256, (n // 2,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    absmax = torch.rand(-(-n // 4096), generator=torch.Generator().manual_seed(1))
    out = torch.empty(n + offset)[offset:]
    weight = FourBit(codes, absmax, table.values, 4096, torch.Size([n]))
    kernels.dequantize_4bit(weight, out)
    assert_same_bits(out, reference.dequantize_4bit(weight, torch.empty(n)))


@pytest.mark.parametrize("bits", range(0, 1 << 16, 1 << 12))
def test_rounding_to_half_types_equals_torch(kernels: ops.Backend, bits: int) -> None:
    """Every float32 exponent with fractions around the rounding points of both 16-bit types, through `values` = 1."""
    high = torch.arange(bits, bits + (1 << 12)).view(-1, 1) << 16
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF])
    absmax = (high | low).view(-1).to(torch.int32).view(torch.float32)
    absmax = absmax[absmax.isfinite()]
    codes, values = torch.zeros(absmax.numel() * 8, dtype=torch.uint8), torch.ones(16)
    for dtype in DTYPES:
        out = torch.empty(absmax.numel(), 16, dtype=dtype)
        kernels.dequantize_4bit(FourBit(codes, absmax, values, 16, out.shape), out)
        assert_same_bits(out, absmax.to(dtype).view(-1, 1).expand(-1, 16).contiguous())


@pytest.mark.parametrize("n", SIZES)
def test_8bit_equals_reference(kernels: ops.Backend, n: int) -> None:
    for x in (random(n, seed=n), _heavy_tailed(n), torch.zeros(n), random(n) * 1e-42):
        codes, absmax = kernels.quantize_8bit(x, dynamic8_lookup(), NESTED_BLOCK_SIZE)
        expected_codes, expected_absmax = reference.quantize_8bit(x, dynamic8_lookup(), NESTED_BLOCK_SIZE)
        assert_same_bits(codes, expected_codes)
        assert_same_bits(absmax, expected_absmax)
        decoded = kernels.dequantize_8bit(codes, absmax, dynamic8(), NESTED_BLOCK_SIZE)
        assert_same_bits(decoded, reference.dequantize_8bit(codes, absmax, dynamic8(), NESTED_BLOCK_SIZE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "K", "block_size"),
    [
        (1, 1, 64),
        (3, 5, 16),  # many rows in a block
        (7, 64, 64),
        (5, 100, 64),  # rows start inside blocks
        (33, 333, 128),  # odd rows start in the middle of a byte
        (9, 4096, 4096),
        (6, 1088, 64),  # whole blocks; columns in several steps, the last one short
        (6, 48, 16),
        (2, 5000, 4096),
        (259, 576, 64),  # parallel
        (301, 577, 64),  # parallel, general path
    ],
)
def test_gemv_4bit(kernels: ops.Backend, N: int, K: int, block_size: int, dtype: torch.dtype) -> None:
    table = codebook("nf4")
    codes, absmax = reference.quantize_4bit(random(N * K, seed=K), table.bounds, table.order, block_size)
    absmax_8bit, nested = nested_constants(absmax)
    for constants, decode_with in ((absmax, None), (absmax_8bit, nested)):
        weight = FourBit(codes, constants, table.values, block_size, torch.Size((N, K)), decode_with)
        weight_NK = reference.dequantize_4bit(weight, torch.empty(N, K))
        for T in (1, 2, 3, 4, 8, 13):
            x_TK = random(T * K, dtype, seed=T).view(T, K)
            exact_TN = x_TK.double() @ weight_NK.double().t()
            y_TN = kernels.gemv_4bit(x_TK, weight)
            assert y_TN.dtype == dtype
            assert y_TN.shape == (T, N)
            assert bool(((y_TN.double() - exact_TN).abs() <= gemv_bound(x_TK, weight_NK, exact_TN, kernels)).all())


MATMULS = [
    (1, 1, 64, 64, 1),
    (3, 5, 100, 64, 2),  # rows that start inside blocks: decoded first
    (8, 48, 64, 16, 4),  # blocks too small for the kernel: decoded first
    (7, 33, 64, 32, 3),  # one short tile, one short panel
    (9, 100, 192, 4096, 16),  # one block
    (17, 130, 704, 64, 5),  # two parts of the sum
    (50, 700, 64, 128, 16),  # blocks run on over row ends; two parts, transposed
    (0, 3, 64, 64, 2),
    (3, 0, 64, 64, 2),
]
"""T, N, K, block size, r."""


@pytest.mark.parametrize(("sizes", "transposed", "dtype"), pairwise(MATMULS, [False, True], DTYPES), ids=str)
def test_matmul_4bit(kernels: ops.Backend, sizes: tuple[int, int, int, int, int], transposed: bool, dtype: torch.dtype) -> None:
    T, N, K, block_size, r = sizes
    if kernels.name == "triton" and N * K > 20_000:
        pytest.skip("too slow in the interpreter")
    table = codebook("nf4")
    codes, absmax = reference.quantize_4bit(random(N * K, seed=K), table.bounds, table.order, block_size)
    absmax_8bit, nested = nested_constants(absmax)
    terms, columns = (N, K) if transposed else (K, N)
    x, low = random(T * terms, dtype, seed=1).view(T, terms), random(T * r, dtype, seed=2).view(T, r)
    bias, lora = random(columns, seed=3), random(columns * r, seed=4)
    epilogues = [
        Epilogue(),
        Epilogue(bias),
        Epilogue(None, low, lora.view(r, columns), 0.5),
        Epilogue(bias, low, lora.view(columns, r).t(), 2.0),
    ]
    for constants, decode_with in ((absmax, None), (absmax_8bit, nested)):
        weight = FourBit(codes, constants, table.values, block_size, torch.Size((N, K)), decode_with)
        weight_NK = reference.dequantize_4bit(weight, torch.empty(N, K))
        factor_CM = weight_NK if transposed else weight_NK.t()
        for epilogue in epilogues:
            exact = x.double() @ factor_CM.double()
            if epilogue.bias is not None:
                exact += epilogue.bias.double()
            if epilogue.low is not None and epilogue.factor is not None:
                exact += epilogue.scale * epilogue.low.double() @ epilogue.factor.double()
            y = kernels.matmul_4bit(x, weight, transposed, epilogue)
            assert y.dtype == dtype
            assert y.shape == (T, columns)
            assert bool(((y.double() - exact).abs() <= matmul_bound(x, factor_CM, epilogue, exact)).all())


@pytest.mark.skipif(not HAS_MATMUL, reason="no compiled product with the instruction set of this machine")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("N", [48, 500])
def test_matmul_4bit_does_not_depend_on_threads_nor_on_other_rows(N: int, transposed: bool) -> None:
    table, K, T = codebook("nf4"), 640, 61
    codes, absmax = reference.quantize_4bit(random(N * K), table.bounds, table.order, 64)
    x, low = random(T * (N if transposed else K)).view(T, -1), random(T * 3).view(T, 3)
    epilogue = Epilogue(None, low, random(3 * (K if transposed else N)).view(3, -1), 0.5)
    weight = FourBit(codes, absmax, table.values, 64, torch.Size((N, K)))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 40):
        torch.set_num_threads(count)
        results.append(cpu.matmul_4bit(x, weight, transposed, epilogue))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(other, results[0])
    few = cpu.matmul_4bit(x[:5].contiguous(), weight, transposed, epilogue._replace(low=low[:5].contiguous()))
    assert_same_bits(few, results[0][:5])


@pytest.mark.skipif(not HAS_MATMUL, reason="no compiled product with the instruction set of this machine")
def test_matmul_4bit_refuses_wrong_tensors() -> None:
    codes = torch.zeros(64 * 32, dtype=torch.uint8)
    weight = FourBit(codes, torch.ones(64), codebook("nf4").values, 64, torch.Size((64, 64)))
    x, nothing = torch.ones(2, 64), Epilogue()
    cpu.matmul_4bit(x, weight, False, nothing)
    for wrong in (torch.ones(2, 63), torch.ones(64, 2).t(), torch.ones(2, 64, device="meta")):
        with pytest.raises(InputError, match="'x_TC' must be a contiguous"):
            cpu.matmul_4bit(wrong, weight, False, nothing)
    for epilogue, words in (
        (Epilogue(torch.ones(63)), "'bias' must be"),
        (Epilogue(None, torch.ones(3, 4), torch.ones(4, 64)), "'low' must be"),
        (Epilogue(None, torch.ones(2, 4), torch.ones(4, 63)), "'factor' must be"),
        (Epilogue(None, torch.ones(2, 4), torch.ones(4, 64).double()), "'factor' must be"),
    ):
        with pytest.raises(InputError, match=words):
            cpu.matmul_4bit(x, weight, False, epilogue)


@pytest.mark.parametrize(("T", "N", "K"), [(0, 3, 64), (2, 0, 64), (2, 3, 0), (0, 0, 0)])
def test_gemv_4bit_of_nothing(kernels: ops.Backend, T: int, N: int, K: int) -> None:
    codes, absmax = torch.zeros(N * K // 2, dtype=torch.uint8), torch.zeros(N * K // 64)
    y_TN = kernels.gemv_4bit(torch.ones(T, K), FourBit(codes, absmax, codebook("nf4").values, 64, torch.Size((N, K))))
    assert torch.equal(y_TN, torch.zeros(T, N))


def test_gemv_4bit_does_not_depend_on_threads(kernels: ops.Backend) -> None:
    if kernels.name == "reference":
        pytest.skip("torch's matmul promises nothing about threads")
    table, (N, K) = codebook("nf4"), (301, 512)
    codes, absmax = reference.quantize_4bit(random(N * K), table.bounds, table.order, 64)
    x_TK = random(3 * K).view(3, K)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(kernels.gemv_4bit(x_TK, FourBit(codes, absmax, table.values, 64, torch.Size((N, K)))))
    torch.set_num_threads(threads)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.peer
@pytest.mark.parametrize(("quant_type", "block_size", "double_quant"), pairwise(QUANT_TYPES, [64, 128], [False, True]))
def test_bytes_equal_bitsandbytes(kernels: ops.Backend, quant_type: str, block_size: int, double_quant: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    table = codebook(quant_type)
    inputs = {name: make(quant_type) for name, make in SPECIAL.items()}
    inputs |= {f"random {n} {dtype}": random(n, dtype, seed=n) for n in SIZES if n > 1 for dtype in DTYPES}
    for name, x in inputs.items():
        codes, absmax = kernels.quantize_4bit(x, table.bounds, table.order, block_size)
        theirs, state = bitsandbytes.quantize_4bit(
            x, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
        )
        assert torch.equal(codes, theirs.view(-1)), name
        if not double_quant:
            assert_same_bits(absmax, state.absmax)
            continue
        offset = absmax.mean()
        absmax_codes, nested_absmax = kernels.quantize_8bit(absmax - offset, dynamic8_lookup(), NESTED_BLOCK_SIZE)
        assert torch.equal(absmax_codes, state.absmax), name
        assert torch.equal(nested_absmax, state.state2.absmax), name
        assert torch.equal(offset, state.offset), name


@pytest.mark.peer
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_values_equal_bitsandbytes(kernels: ops.Backend, quant_type: str, dtype: torch.dtype, double_quant: bool) -> None:
    """Whole blocks a row only: bitsandbytes 0.50's AVX-512 kernel is wrong on other rows. Zero may have either sign: code 8 of
    fp4 is -0 here and +0 there."""
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    weight_NK = random(24 * 192).view(24, 192).to(dtype)
    codes, state = bitsandbytes.quantize_4bit(weight_NK, blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
    nested = Nested(dynamic8(), state.state2.absmax, state.offset.view(1)) if double_quant else None
    values = codebook(quant_type).values
    weight = FourBit(codes.view(-1), state.absmax, values, 64, weight_NK.shape, nested)
    out = kernels.dequantize_4bit(weight, torch.empty(24, 192, dtype=dtype))
    assert torch.equal(out, bitsandbytes.dequantize_4bit(codes, state))


@settings(max_examples=100)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=200),
    quant_type=st.sampled_from(QUANT_TYPES),
    block_size=st.sampled_from([16, 64, 128]),
    variant=st.sampled_from(variants()),
)
def test_round_trip(values: list[float], quant_type: str, block_size: int, variant: str) -> None:
    """A value moves by at most half the widest gap between codes; every block keeps its largest magnitude."""
    table, x = codebook(quant_type), torch.tensor(values)
    with running(variant) as kernels:
        codes, absmax = kernels.quantize_4bit(x, table.bounds, table.order, block_size)
        decoded = kernels.dequantize_4bit(FourBit(codes, absmax, table.values, block_size, x.shape), torch.empty_like(x))
    scale = absmax.repeat_interleave(block_size)[: x.numel()].double()
    half_gap = float(table.values.sort().values.diff().max()) / 2
    error = (decoded.double() - x.double()).abs()
    assert bool((error <= scale * (half_gap + 4 * ROUNDOFF[torch.float32])).all())
    largest = scale.eq(x.double().abs())
    assert torch.equal(decoded[largest].abs(), x[largest].abs())


def _good_weight() -> FourBit:
    return FourBit(torch.zeros(128, dtype=torch.uint8), torch.ones(4), codebook("nf4").values, 64, torch.Size((4, 64)))


_NESTED = Nested(dynamic8(), torch.ones(1), torch.zeros(1))

BAD = {
    "codes too short": {"codes": torch.zeros(127, dtype=torch.uint8)},
    "codes too long": {"codes": torch.zeros(129, dtype=torch.uint8)},
    "codes of another type": {"codes": torch.zeros(128, dtype=torch.int8)},
    "codes not contiguous": {"codes": torch.zeros(256, dtype=torch.uint8)[::2]},
    "codes elsewhere": {"codes": torch.zeros(128, dtype=torch.uint8, device="meta")},
    "absmax too short": {"absmax": torch.ones(3)},
    "absmax of another type": {"absmax": torch.ones(4, dtype=torch.float64)},
    "absmax coded without nested": {"absmax": torch.zeros(4, dtype=torch.uint8)},
    "absmax plain with nested": {"nested": _NESTED},
    "nested absmax missing": {"absmax": torch.zeros(4, dtype=torch.uint8), "nested": _NESTED._replace(absmax=torch.ones(0))},
    "nested values too short": {"absmax": torch.zeros(4, dtype=torch.uint8), "nested": _NESTED._replace(values=torch.ones(16))},
    "nested offset missing": {"absmax": torch.zeros(4, dtype=torch.uint8), "nested": _NESTED._replace(offset=torch.ones(0))},
    "nested block size": {"absmax": torch.zeros(4, dtype=torch.uint8), "nested": _NESTED._replace(block_size=100)},
    "values too short": {"values": torch.ones(15)},
    "block size not a power of two": {"block_size": 48},
    "block size too small": {"block_size": 8},
    "block size too large": {"block_size": 8192},
}


def _accepts_cpu_tensors(kernels: ops.Backend) -> bool:
    return kernels.name != "triton" or not torch.cuda.is_available()


@pytest.mark.parametrize("case", BAD)
def test_wrong_tensors_raise(unsafe_kernels: ops.Backend, case: str) -> None:
    weight = _good_weight()
    if _accepts_cpu_tensors(unsafe_kernels):
        unsafe_kernels.dequantize_4bit(weight, torch.empty(256))
    weight = weight._replace(**BAD[case])
    with pytest.raises(InputError):
        unsafe_kernels.dequantize_4bit(weight, torch.empty(256))
    with pytest.raises(InputError):
        unsafe_kernels.gemv_4bit(torch.ones(1, 64), weight)


def test_wrong_inputs_and_outputs_raise(unsafe_kernels: ops.Backend) -> None:
    weight, table = _good_weight(), codebook("nf4")
    with pytest.raises(InputError, match="'out' must be float32, bfloat16 or float16"):
        unsafe_kernels.dequantize_4bit(weight, torch.empty(256, dtype=torch.float64))
    with pytest.raises(InputError, match=r"'out' must be a contiguous tensor of 256 elements of torch\.float32 on cpu"):
        unsafe_kernels.dequantize_4bit(weight, torch.empty(32, 8).t())
    with pytest.raises(InputError, match="'x_TK' must be a contiguous"):
        unsafe_kernels.gemv_4bit(torch.ones(64, 2).t(), weight)
    with pytest.raises(InputError, match="'x' must be a contiguous"):
        unsafe_kernels.quantize_4bit(torch.ones(64)[::2], table.bounds, table.order, 64)
    with pytest.raises(InputError, match="'x' must be float32"):
        unsafe_kernels.quantize_4bit(torch.ones(64, dtype=torch.int32), table.bounds, table.order, 64)
    with pytest.raises(InputError, match="'bounds' must be"):
        unsafe_kernels.quantize_4bit(torch.ones(64), table.values, table.order, 64)
    with pytest.raises(InputError, match="'lookup' must be"):
        unsafe_kernels.quantize_8bit(torch.ones(64), dynamic8_lookup()[:256], 256)
    with pytest.raises(InputError, match="'absmax' must be"):
        unsafe_kernels.dequantize_8bit(torch.zeros(257, dtype=torch.uint8), torch.ones(1), dynamic8(), 256)


@pytest.mark.parametrize("block_size", [0, 8, 48, 8192])
def test_block_sizes_that_a_kernel_cannot_do_raise(unsafe_kernels: ops.Backend, block_size: int) -> None:
    table, words = codebook("nf4"), f"a power of two from 16 to 4096. Got {block_size}. .*'reference' backend"
    with pytest.raises(InputError, match=words):
        unsafe_kernels.quantize_4bit(torch.ones(64), table.bounds, table.order, block_size)
    with pytest.raises(InputError, match=words):
        unsafe_kernels.quantize_8bit(torch.ones(64), dynamic8_lookup(), block_size)
    with pytest.raises(InputError, match=words):
        unsafe_kernels.dequantize_8bit(torch.zeros(64, dtype=torch.uint8), torch.ones(1), dynamic8(), block_size)
    with pytest.raises(InputError, match=words):
        unsafe_kernels.dequantize_4bit(_good_weight()._replace(block_size=block_size), torch.empty(256))


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif("cpu-scalar" not in variants(), reason="no compiled library")
def test_environment_variable_forces_the_instruction_set() -> None:
    code = "from lownibble.kernels import cpu; print(cpu.isa())"
    assert _python(code, LOWNIBBLE_ISA="scalar").stdout == "scalar\n"
    refused = _python(code, LOWNIBBLE_ISA="mmx")
    assert refused.returncode == 1
    assert "BackendError: The instruction set 'mmx' cannot run here. Available: " in refused.stderr


@pytest.mark.skipif("cpu-scalar" not in variants(), reason="no compiled library")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_in_the_process() -> None:
    code = (
        "from lownibble.kernels import cpu; cpu.library(); import pathlib; "
        "print({l.split()[-1] for l in pathlib.Path('/proc/self/maps').read_text().splitlines() if 'gomp' in l or 'iomp' in l})"
    )
    runtimes = _python(code)
    assert runtimes.returncode == 0, runtimes.stderr
    assert runtimes.stdout.count(".so") == 1, runtimes.stdout


def test_missing_library_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lownibble.kernels.cpu.loading._FOLDER", tmp_path)
    missing = cpu.library.__wrapped__
    with pytest.raises(BackendError, match="The compiled library is missing: it was never built; reinstall lownibble"):
        missing()
    (tmp_path / "_native.txt").write_text("no C++ compiler was found at install time ('g++'); install one and reinstall.\n")
    with pytest.raises(BackendError, match=r"missing: no C\+\+ compiler was found at install time"):
        missing()


def test_a_card_whose_kernels_cannot_be_built_computes_in_plain_torch_and_says_so_once(monkeypatch, caplog):
    def load():
        raise BackendError("Triton cannot build what launches its kernels (Failed to find C compiler). Install a C compiler.")

    monkeypatch.setitem(ops.BACKENDS, "triton", load)
    monkeypatch.delitem(ops._loaded, "triton", raising=False)
    monkeypatch.setattr(ops, "_warned", set())
    assert ops.active_backend("cuda") == "reference"
    if not torch.cuda.is_available():
        assert not caplog.text, "nothing computes there"
    ops._warned.clear()
    caplog.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [ops.active_backend("cuda") for _ in range(2)] == ["reference"] * 2
    assert caplog.text.count("Install a C compiler") == 1
    monkeypatch.delitem(ops._loaded, "triton")
