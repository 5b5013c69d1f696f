"""Products of experts' matrices on every backend. Oracle: float64 products of each expert's decoded matrix, for the products; the
plain-torch reference decodes.

The Triton kernels run in the interpreter where there is no GPU. Bounds are those of `oracles.py`."""

import pytest
import torch
from oracles import DTYPES, ROUNDOFF, matmul_bound, random
from pairwise import pairwise
from torch import Tensor

import lownibble as ln
from lownibble.errors import InputError
from lownibble.kernels import ops, reference
from lownibble.kernels.types import NO_EPILOGUE, Epilogue, FourBit, Grouped, of_expert
from lownibble.quant.codecs import quantize_experts

CODECS = ["nf4", "fp4", "nf4 doubly", "nf4/128", "mxfp4", "int8", "int4", "int3", "dense", "dense turned"]
ROWS = {
    "some without": [0, 5, 5, 22], "all on one": [0, 0, 19, 19], "one each": [1, 2, 3, 4], "none": [0, 0, 0, 0],
    "rows after the last": [3, 3, 20, 20],
}  # fmt: skip
"""By expert, the end of its rows; there are 23 rows after 'rows after the last', else as many as the last end."""
SHAPES = [(4, 40, 128), (4, 130, 64), (4, 33, 96)]
"""Whole blocks; more than a tile of columns; blocks of 64 that cross the ends of rows, and an odd number of rows."""


def stack(codec: str, shape: tuple[int, int, int]):
    """Random matrices of experts, as the kernels take them."""
    dense = random(torch.Size(shape).numel(), seed=sum(shape)).view(shape)
    if codec.startswith("dense"):
        return dense if codec == "dense" else dense.transpose(1, 2).contiguous().transpose(1, 2)
    quant_type, _, size = codec.removesuffix(" doubly").partition("/")
    size = int(size or (32 if quant_type not in ("nf4", "fp4") else 64))
    config = ln.QuantConfig(quant_type=quant_type, block_size=size, double_quant=codec.endswith("doubly"))
    return quantize_experts(dense, config).stack


def decoded(weights, expert: int, dtype: torch.dtype) -> Tensor:
    """An expert's matrix rounded to the dtype of the product."""
    one = of_expert(weights, expert)
    if isinstance(one, Tensor):
        return one.to(dtype)
    decode = reference.dequantize_4bit if isinstance(one, FourBit) else reference.dequantize_grouped
    return decode(one, torch.empty(one.shape, dtype=dtype))


def check_product(kernels: ops.Backend, weights, ends: list[int], S: int, dtype: torch.dtype, transposed: bool, rank: int):
    n_experts, N, K = weights.shape
    terms, columns = (N, K) if transposed else (K, N)
    x = random(S * terms, dtype, seed=S).view(S, terms)
    epilogue = NO_EPILOGUE
    if rank:
        factor = random(n_experts * columns * rank, seed=rank).view(n_experts, columns, rank).transpose(1, 2)
        epilogue = Epilogue(None, random(S * rank, dtype, seed=3).view(S, rank), factor, 0.5)
    y = kernels.matmul_experts(x, weights, torch.tensor(ends, dtype=torch.int32), transposed, epilogue)
    assert (y.dtype, tuple(y.shape)) == (dtype, (S, columns))
    start = 0
    for expert, end in enumerate(ends):
        rows, start = slice(start, end), end
        matrix = decoded(weights, expert, dtype)
        right = (matrix if transposed else matrix.t()).double()
        exact, own = x[rows].double() @ right, NO_EPILOGUE
        if rank:
            own = Epilogue(None, epilogue.low[rows], epilogue.factor[expert].to(dtype), 0.5)
            exact = exact + 0.5 * own.low.double() @ own.factor.double()
        assert bool(((y[rows].double() - exact).abs() <= matmul_bound(x[rows], right, own, exact)).all()), expert
    assert not y[start:].any()


@pytest.mark.parametrize(("codec", "shape", "dtype", "transposed", "rows", "rank"), pairwise(
    CODECS, SHAPES, DTYPES, [False, True], list(ROWS), [0, 3, 20]
), ids=str)  # fmt: skip
def test_products_are_those_of_each_experts_matrix(kernels, codec, shape, dtype, transposed, rows, rank) -> None:
    ends = ROWS[rows]
    check_product(
        kernels, stack(codec, shape), ends, max(ends[-1], 23 * (rows == "rows after the last")), dtype, transposed, rank
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_the_rows_of_each_expert(kernels, rows, dtype) -> None:
    ends = ROWS[rows]
    S, P, Q = max(ends[-1], 1), 7, 70
    a, b = random(S * P, dtype, seed=1).view(S, P), random(S * Q, dtype, seed=2).view(S, Q)
    out = kernels.outer_experts(a, b, torch.tensor(ends, dtype=torch.int32), 0.5, torch.float32)
    assert (out.dtype, tuple(out.shape)) == (torch.float32, (len(ends), P, Q))
    start = 0
    for expert, end in enumerate(ends):
        exact = 0.5 * a[start:end].double().t() @ b[start:end].double()
        sizes = 0.5 * a[start:end].double().abs().t() @ b[start:end].double().abs()
        assert bool(((out[expert].double() - exact).abs() <= 3 * ROUNDOFF[dtype] * sizes + 2.0**-24).all()), expert
        start = end


def test_many_experts_and_rows_take_the_largest_tiles(kernels) -> None:
    """More rows than experts times the largest tile, one expert with several tiles, one without rows in the middle."""
    check_product(kernels, stack("nf4", (3, 16, 64)), [150, 150, 421], 421, torch.bfloat16, False, 0)
    check_product(kernels, random(70 * 3 * 16).view(70, 3, 16), list(range(1, 71)), 70, torch.float32, True, 0)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    kernels = ops.backend("triton") if ops.backend_status()["triton"] == "ok" else pytest.skip("no triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, ends = torch.ones(5, 128, device=device), torch.tensor([1, 2, 3, 5], dtype=torch.int32, device=device)
    weights = quantize_experts(random(4 * 40 * 128).view(4, 40, 128).to(device), ln.QuantConfig()).stack
    grouped = quantize_experts(random(4 * 40 * 128).view(4, 40, 128).to(device), ln.QuantConfig(quant_type="int8")).stack
    assert isinstance(weights, FourBit)
    assert isinstance(grouped, Grouped)
    low = Epilogue(None, x[:, :2].contiguous(), torch.ones(4, 2, 41, device=device))
    for arguments in (
        (x.double(), weights, ends, False, NO_EPILOGUE),
        (x[:, :64].contiguous(), weights, ends, False, NO_EPILOGUE),
        (x, weights, ends.long(), False, NO_EPILOGUE),
        (x, weights, ends[:3], False, NO_EPILOGUE),
        (x, weights._replace(codes=weights.codes[:-1]), ends, False, NO_EPILOGUE),
        (x, weights._replace(absmax=weights.absmax.view(-1)[:-4]), ends, False, NO_EPILOGUE),
        (x, grouped._replace(scale=grouped.scale.view(-1)[:-4]), ends, False, NO_EPILOGUE),
        (x, grouped._replace(order=torch.arange(128, dtype=torch.int32, device=device).repeat(4)), ends, False, NO_EPILOGUE),
        (x, weights, ends, False, low),
        (x, weights, ends, False, Epilogue(torch.ones(40, device=device))),
    ):
        with pytest.raises(InputError):
            kernels.matmul_experts(*arguments)
    with pytest.raises(InputError):
        kernels.outer_experts(x, x[:4], ends, 1.0, torch.float32)
