"""8-bit products. Oracles: the plain-torch reference for the compiled kernels, `torch._int_mm` for the reference's sums, the
formulas of `kernels/ops.py`, and the exact layer for what int8 compute may change."""

import pytest
import torch

import lownibble as ln
from lownibble.errors import BackendError, InputError
from lownibble.kernels import cpu, ops, reference
from lownibble.lora.layer import LoraLinear
from lownibble.quant import QuantLinear, eightbit, quantize

try:
    HAS_INT8 = cpu.has_int8()
except BackendError:
    HAS_INT8 = False
needs_vnni = pytest.mark.skipif(not HAS_INT8, reason="no compiled kernels, or no AVX-512 VNNI")

SHAPES = [(1, 1, 64), (5, 33, 64), (12, 64, 128), (13, 192, 576), (100, 70, 192), (25, 31, 1536)]
"""(T, N, K): a row, tiles of 12 rows with and without a rest, panels of 32 columns with and without a rest."""

ROUNDING = 2e-6
"""Of the largest output: the sums are exact; products with scales and the low-rank sum (r = 7) are rounded in another order."""


def make(N, K, block_size=64, double_quant=True, quant_type="nf4", seed=0):
    generator = torch.Generator().manual_seed(seed)
    config = ln.QuantConfig(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    return quantize(torch.randn(N, K, generator=generator) * 0.05, config)


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def untiled(rows, T):
    """(T, C) codes, (T, parts) scales and starts from the compiled kernels' tiles of 12 rows and groups of 4 columns."""
    groups, parts = -(-rows.columns // 4), -(-rows.columns // 64)
    codes = rows.codes.view(-1, groups, 12, 4).transpose(1, 2).reshape(-1, groups * 4)[:T, : rows.columns]
    scale, start = (t.view(-1, parts, 12).transpose(1, 2).reshape(-1, parts)[:T] for t in (rows.scale, rows.start))
    return codes, scale, start


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("codec", [(64, True, "nf4"), (32, False, "fp4"), (4096, True, "nf4")], ids=str)
@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
def test_compiled_kernels_equal_the_reference(T, N, K, codec, threads):
    weight = make(N, K, *codec)
    x, dy, low = random(T, K), random(T, N), random(T, 7)
    bias, lora_B, lora_A = random(N), random(N, 7), random(7, K)
    found = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for backend in (reference, cpu):
            scale = backend.row_scales(*weight.parts, weight.shape, weight.nested)
            x_rows, dy_rows = backend.quantize_rows(x), backend.quantize_rows(dy, scale)
            arguments = (*weight.parts, weight.shape, scale)
            y = backend.matmul_8bit(x_rows, *arguments, False, ops.Addition(bias, low, lora_B.t(), 0.5), weight.nested)
            dx = backend.matmul_8bit(dy_rows, *arguments, True, ops.Addition(None, low, lora_A, 2.0), weight.nested)
            found[backend] = scale, x_rows, dy_rows, y, dx
    finally:
        torch.set_num_threads(before)
    (scale, x_rows, dy_rows, y, dx), (scale_c, x_rows_c, dy_rows_c, y_c, dx_c) = found[reference], found[cpu]
    assert torch.equal(scale, scale_c)
    for plain, compiled in ((x_rows, x_rows_c), (dy_rows, dy_rows_c)):
        codes, scales, start = untiled(compiled, T)
        assert torch.equal(plain.codes[: codes.numel()].view_as(codes), codes)
        assert torch.equal(plain.scale[: scales.numel()].view_as(scales), scales)
        sums = [part.sum(1, dtype=torch.int32) for part in codes.split(64, 1)]
        assert torch.equal(start, -128 * torch.stack(sums, 1))
    for plain, compiled in ((y, y_c), (dx, dx_c)):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=ROUNDING * float(plain.abs().max()))


@pytest.mark.parametrize("transposed", [False, True])
def test_reference_sums_equal_int_mm(transposed):
    weight, scale_of = make(48, 128), reference.row_scales
    scale = scale_of(*weight.parts, weight.shape, weight.nested)
    assert torch.equal(scale, weight.dequantize().abs().amax(1) / 127)  # every row has a value at a constant: +-1 is in the table
    q_NK = (weight.dequantize() / scale.unsqueeze(1)).round().to(torch.int8)
    x = random(20, 48 if transposed else 128)
    rows = reference.quantize_rows(x, scale if transposed else None)
    codes, scales = rows.codes[: x.numel()].view_as(x), rows.scale[: 20 * -(-rows.columns // 64)].view(20, -1)
    values = codes * scales.repeat_interleave(64, 1)[:, : rows.columns]  # x as its codes stand for it
    expected = (values.double() @ (q_NK if transposed else q_NK.t()).double()).float() * (1 if transposed else scale)
    found = reference.matmul_8bit(rows, *weight.parts, weight.shape, scale, transposed, ops.Addition(), weight.nested)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_vnni)])
@pytest.mark.parametrize(("T", "N", "K"), [(3, 0, 64), (3, 2, 0), (0, 2, 64)])
def test_products_of_nothing(backend, T, N, K):
    weight = make(N, K) if N * K else quantize(torch.empty(N, K), "nf4")
    bias = random(N)
    with ln.use_backend(backend):
        y = eightbit.forward(ops.quantize_rows(torch.ones(T, K)), weight, ops.Addition(bias), torch.float32)
        dx = eightbit.backward(torch.ones(T, N), weight, ops.Addition())
    assert y.shape == (T, N)
    assert dx.shape == (T, K)
    if K == 0:
        assert torch.equal(y, bias.expand(T, N))
    if N == 0:
        assert (dx == 0).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_vnni)])
def test_special_rows(backend):
    weight = quantize(torch.cat([torch.zeros(3, 64), random(4, 64)]), "nf4")
    x = random(4, 64)
    x[1] = 0
    x[2, 5], x[3, 63] = float("nan"), float("inf")
    with ln.use_backend(backend):
        y = eightbit.forward(eightbit.shared_rows(x), weight, ops.Addition(), torch.float32)
        empty = eightbit.forward(eightbit.shared_rows(x[:0]), weight, ops.Addition(), torch.float32)
    assert torch.isfinite(y[:2]).all()
    assert not torch.isfinite(y[2:]).any()  # never a silent number
    assert (y[1] == 0).all()
    assert (y[0, :3].abs() < 1e-3).all()
    assert empty.shape == (0, 7)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_vnni)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapter_is_exact_and_the_base_within_a_hundredth(backend, dtype, dropout):
    T, N, K, r = 50, 96, 192, 8
    layers = {}
    for compute in ("exact", "int8"):
        layer = LoraLinear(QuantLinear(make(N, K), random(N).to(dtype), compute=compute))
        adapter = layer.add("default", r, 16, dropout, use_rslora=False)
        adapter.lora_A.data, adapter.lora_B.data = random(r, K, seed=2) * 0.1, random(N, r, seed=3) * 0.1
        layers[compute] = layer.train()
    dy, results = random(2, T // 2, N, seed=4).to(dtype), {}
    with ln.use_backend(backend):
        for compute, layer in layers.items():
            x = random(2, T // 2, K).to(dtype).requires_grad_()
            torch.manual_seed(0)
            y = layer(x)
            adapter = layer.adapters["default"]
            results[compute] = (y.detach(), *torch.autograd.grad(y, [x, adapter.lora_A, adapter.lora_B], dy))
    exact, ours = results["exact"], results["int8"]
    for index in (0, 1):
        assert ours[index].dtype == dtype
        error = float((ours[index] - exact[index]).norm() / exact[index].norm())
        assert 1e-4 < error < 0.015  # it is another product, and a close one
    for index in (2, 3):
        torch.testing.assert_close(ours[index], exact[index], rtol=0, atol=1e-6 * float(exact[index].abs().max()))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_vnni)])
def test_one_input_is_scaled_once(backend, monkeypatch):
    calls = []
    plain = ops.quantize_rows
    monkeypatch.setattr(ops, "quantize_rows", lambda *a: calls.append(1) or plain(*a))
    layers = [QuantLinear(make(64, 64, seed=seed), compute="int8") for seed in range(3)]
    x = random(2, 20, 64)
    with ln.use_backend(backend):
        first = [layer(x) for layer in layers]
        assert len(calls) == 1
        for layer in layers:
            layer(x.clone())
        assert len(calls) == 4
        x.mul_(2)
        again = [layer(x) for layer in layers]
        assert len(calls) == 5
        with torch.inference_mode():
            y = x * 1
            inside = layers[0](y)
    torch.testing.assert_close(inside, again[0])
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(two, 2 * one)


def test_rows_are_of_the_backend_in_use():
    if not HAS_INT8:
        pytest.skip("needs two backends")
    layer, x = QuantLinear(make(64, 64), compute="int8"), random(20, 64)
    first = layer(x)
    with ln.use_backend("reference"):
        torch.testing.assert_close(layer(x), first, rtol=0, atol=ROUNDING * float(first.abs().max()))


def test_refusals():
    with pytest.raises(InputError, match=r"multiple of 64 long.* 'odd' is 8 x 80\. Use compute='exact', or add"):
        eightbit.check_weight(make(8, 80), "odd")
    with pytest.raises(BackendError, match=r"no kernel for 'cuda:0' yet\. Use compute='exact'"):
        eightbit.choose("int8", torch.device("cuda:0"))
    assert eightbit.choose("auto", torch.device("cuda:0")) == "exact"


@needs_vnni
def test_other_instruction_sets_are_refused():
    before = cpu.isa()
    cpu.select_isa("scalar")
    try:
        with pytest.raises(BackendError, match=r"AVX-512 VNNI.* 'scalar'.* Use compute='exact'"):
            eightbit.choose("int8", torch.device("cpu"))
        with pytest.raises(BackendError, match="AVX-512 VNNI"):
            cpu.quantize_rows(random(3, 64))
    finally:
        cpu.select_isa(before)


@needs_vnni
def test_compiled_arguments_are_checked():
    weight = make(64, 64)
    scale = cpu.row_scales(*weight.parts, weight.shape, weight.nested)
    rows = cpu.quantize_rows(random(3, 128))
    with pytest.raises(InputError, match=r"'x' must have 64 columns\. Got 128"):
        cpu.matmul_8bit(rows, *weight.parts, weight.shape, scale, False, ops.Addition(), weight.nested)
    rows = cpu.quantize_rows(random(3, 64))
    wrong = ops.Addition(None, random(3, 2), random(64, 2))
    with pytest.raises(InputError, match="'factor' must be"):
        cpu.matmul_8bit(rows, *weight.parts, weight.shape, scale, False, wrong, weight.nested)
