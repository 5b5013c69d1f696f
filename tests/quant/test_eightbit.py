"""8-bit products. Oracles: the plain-torch reference for the compiled and the Triton kernels, float64 sums of its codes for the
reference's, the formulas of `kernels/ops.py`, and the exact layer for what 8-bit compute may change."""

import numpy as np
import pytest
import torch
from pairwise import pairwise
from triton_interpreter import INTERPRETED

import lownibble as ln
from lownibble.errors import BackendError, InputError
from lownibble.kernels import cpu, ops, reference
from lownibble.kernels.types import LARGEST_CODE, Epilogue
from lownibble.lora.layer import LoraLinear
from lownibble.quant import QuantLinear, eightbit, quantize

try:
    HAS_INT8 = cpu.has_int8()
except BackendError:
    HAS_INT8 = False
needs_vnni = pytest.mark.skipif(not HAS_INT8, reason="no compiled kernels, or no AVX-512 VNNI")
needs_triton = pytest.mark.skipif(ops.backend_status()["triton"] != "ok", reason="no triton")
CUDA = torch.cuda.is_available()
INT8, FP8 = torch.int8, torch.float8_e4m3fn
code_types = pytest.mark.parametrize("code_type", [INT8, FP8], ids=str)


def scales_rows(code_type):
    """Skip the test where the product of this type, in the interpreter a CPU's, knows one scale for a whole matrix only."""
    if code_type == FP8 and not CUDA and torch.__version__ < "2.12":
        pytest.skip("this torch multiplies float8 on CPUs with one scale only")


KERNELS = [
    pytest.param("reference", INT8, id="reference-int8"),
    pytest.param("reference", FP8, id="reference-fp8"),
    pytest.param("cpu", INT8, id="cpu-int8", marks=needs_vnni),
    *(pytest.param("triton", code_type, id=f"triton-{code_type}") for code_type in (INT8, FP8) if INTERPRETED),
]
"""(backend, type of the codes), where it runs on CPU tensors."""

SHAPES = [(1, 1, 64), (5, 33, 64), (12, 64, 128), (13, 192, 576), (100, 70, 192), (25, 31, 1536)]
"""(T, N, K): a row, tiles of 12 rows with and without a rest, panels of 32 columns with and without a rest."""

ROUNDING = 2e-6
"""Of the largest output: the sums are exact; products with scales and the low-rank sum (r = 7) are rounded in another order.
Float8's sums of 64 products of 8 bits of mantissa are rounded too, in float32."""

LIBRARY_SHAPES = [(1, 16, 64), (5, 48, 64), (12, 64, 128), (13, 192, 576), (100, 80, 192)]
"""(T, N, K) that the vendor's products take."""

LIBRARY_ROUNDING = {INT8: 2e-6, FP8: 2.0**-8}
"""Of the largest output: integer sums are exact; float8's products come in bfloat16, whose rounding is 2^-9, and are summed in
another order, on capability 9.0 with some 14 bits."""


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
            scale = backend.row_scales(weight.four_bit)
            x_rows, dy_rows = backend.quantize_rows(x), backend.quantize_rows(dy, scale)
            arguments = (weight.four_bit, scale)
            y = backend.matmul_8bit(x_rows, *arguments, False, Epilogue(bias, low, lora_B.t(), 0.5))
            dx = backend.matmul_8bit(dy_rows, *arguments, True, Epilogue(None, low, lora_A, 2.0))
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


def unpadded(rows):
    """(T, C) codes and (T, parts) scales from the reference's and the Triton kernels' rows."""
    T, C, parts = rows.rows, rows.columns, 1 if rows.part is None else -(-rows.columns // 64)
    return rows.codes[: T * C].view(T, C).cpu(), rows.scale[: T * parts].view(T, parts).cpu()


def same_bytes(one, two):
    return one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))


@needs_triton
@pytest.mark.parametrize(
    ("shape", "codec", "code_type"),
    pairwise(LIBRARY_SHAPES, [(64, True, "nf4"), (32, False, "fp4"), (4096, True, "nf4")], [INT8, FP8]), ids=str,
)  # fmt: skip
def test_library_products_equal_the_reference(shape, codec, code_type):
    T, N, K = shape
    scales_rows(code_type)
    if CUDA and code_type == FP8 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no float8, or rounded to it through float16")
    there = torch.device("cuda" if CUDA else "cpu")
    weight, found = make(N, K, *codec), []
    x, dy, low = random(T, K), random(T, N), random(T, 7)
    bias, lora_B, lora_A = random(N), random(N, 7), random(7, K)
    for backend, device, part in ((reference, torch.device("cpu"), {"part": None}), (ops.backend("triton"), there, {})):
        four_bit = weight.to(device).four_bit
        scale = backend.row_scales(four_bit, code_type)
        x_rows = backend.quantize_rows(x.to(device), None, code_type, **part)
        dy_rows = backend.quantize_rows(dy.to(device), scale, code_type, **part)
        forward = Epilogue(bias.to(device), low.to(device), lora_B.to(device).t(), 0.5)
        backward = Epilogue(None, low.to(device), lora_A.to(device), 2.0)
        y = backend.matmul_8bit(x_rows, four_bit, scale, False, forward, torch.float32)
        dx = backend.matmul_8bit(dy_rows, four_bit, scale, True, backward, torch.float32)
        found.append((scale.cpu(), *unpadded(x_rows), *unpadded(dy_rows), y.cpu(), dx.cpu()))
    *plain_bytes, y_plain, dx_plain = found[0]
    *bytes_found, y, dx = found[1]
    for ours, plain in zip(bytes_found, plain_bytes, strict=True):
        assert same_bytes(ours, plain)
    for ours, plain in ((y, y_plain), (dx, dx_plain)):
        torch.testing.assert_close(ours, plain, rtol=0, atol=LIBRARY_ROUNDING[code_type] * float(plain.abs().max()))


@needs_triton
@code_types
@pytest.mark.parametrize("codec", [(64, True, "nf4"), (32, False, "fp4"), (4096, False, "nf4"), (256, True, "nf4")], ids=str)
@pytest.mark.parametrize(("N", "K"), [(16, 64), (80, 192), (48, 576)])
def test_weights_are_decoded_to_8_bits_as_rows_and_transposed(N, K, codec, code_type):
    if CUDA and code_type == FP8 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no float8, or rounded to it through float16")
    weight, triton = make(N, K, *codec), ops.backend("triton")
    scale = reference.row_scales(weight.four_bit, code_type)
    scaled = weight.dequantize().double() / scale.double().unsqueeze(1)  # next to a tie of the codes it may round otherwise
    four_bit = weight.to("cuda" if CUDA else "cpu").four_bit
    expected = reference._codes(
        reference._values(weight.four_bit) * (reference._constants(weight.four_bit) * (1 / scale)[:, None]), code_type
    )
    for transposed in (False, True):
        made = triton.decode_8bit(four_bit, scale.to(four_bit.codes.device), transposed, code_type).cpu()
        codes = made.t().contiguous() if transposed else made.clone()
        assert same_bytes(codes, expected.view(N, K).contiguous())
        assert float((codes.double() - scaled).abs().max()) <= (0.5 if code_type == INT8 else 16) * (1 + 1e-5)


@needs_triton
def test_sizes_that_the_library_does_not_take_are_refused():
    triton, weight = ops.backend("triton"), make(24, 64)
    rows = triton.quantize_rows(random(4, 64), None, INT8)
    with pytest.raises(InputError, match=r"multiple of 16\. Got 24 x 64\. Use compute='exact'"):
        triton.matmul_8bit(rows, weight.four_bit, triton.row_scales(weight.four_bit), False, Epilogue(), torch.float32)
    with ln.use_backend("triton"), pytest.raises(InputError, match=r"'odd'.*multiple of 16\. Got 24 x 64"):
        eightbit.check_weight(weight, "odd", "int8")
    weight = make(32, 64)
    with pytest.raises(InputError, match=r"one scale a row.* Got parts of 64"):
        triton.matmul_8bit(
            reference.quantize_rows(random(4, 64)),
            weight.four_bit,
            triton.row_scales(weight.four_bit),
            False,
            Epilogue(),
            torch.float32,
        )


@needs_triton
@code_types
def test_triton_scales_special_rows_as_the_reference(code_type):
    top = LARGEST_CODE[code_type]
    ties = torch.arange(64) - 31.5  # of integers, and of float8 from 8 to 16, where its steps are one
    x = torch.stack([
        torch.zeros(64), -torch.zeros(64), torch.cat([ties[1:], torch.tensor([float(top)])]), torch.arange(64) * 2 - 63.0,
        torch.arange(64) * 7.0, random(64) * 1e-38, random(64) * 1e-42, random(64) * 1e37, random(64) * 2.0 ** -torch.arange(64),
        *(random(64).index_fill(0, torch.tensor([5]), value) for value in (torch.nan, -torch.nan, torch.inf, -torch.inf)),
        torch.full((64,), torch.inf),
    ])  # fmt: skip
    with np.errstate(all="ignore"):  # numpy's, in the interpreter
        ours = ops.backend("triton").quantize_rows(x.to("cuda" if CUDA else "cpu"), None, code_type)
    plain = reference.quantize_rows(x, None, code_type, None)
    (codes, scale), (plain_codes, plain_scale) = unpadded(ours), unpadded(plain)
    assert same_bytes(codes, plain_codes)
    torch.testing.assert_close(scale, plain_scale, rtol=0, atol=0, equal_nan=True)
    assert (codes[2, :-1].float() == (ties[1:].round() if code_type == INT8 else ties[1:].to(FP8).float())).all()
    assert not scale[9:].isfinite().any()


def test_float8_rows_are_torchs_casts_of_the_scaled_values():
    x = random(7, 128)
    codes, scale = unpadded(reference.quantize_rows(x, None, FP8))
    parts = x.view(7, 2, 64)
    largest = parts.abs().amax(2, keepdim=True)
    assert same_bytes(codes, (parts * (torch.tensor(448.0) / largest)).clamp(-448, 448).view(7, 128).to(FP8))
    assert torch.equal(scale, largest.squeeze(2) / 448)
    assert (codes.float().view(7, 2, 64).abs().amax(2) == 448).all()


@code_types
@pytest.mark.parametrize("transposed", [False, True])
def test_reference_sums_are_the_codes_products(transposed, code_type):
    weight, top = make(48, 128), LARGEST_CODE[code_type]
    scale = reference.row_scales(weight.four_bit, code_type)
    assert torch.equal(scale, weight.dequantize().abs().amax(1) / top)  # every row has a value at a constant: +-1 is in the table
    scaled = weight.dequantize() / scale.unsqueeze(1)
    q_NK = (scaled.round() if code_type == INT8 else scaled).to(code_type).float()
    x = random(20, 48 if transposed else 128)
    rows = reference.quantize_rows(x, scale if transposed else None, code_type)
    codes, scales = unpadded(rows)
    values = codes.float() * scales.repeat_interleave(64, 1)[:, : rows.columns]  # x as its codes stand for it
    expected = (values.double() @ (q_NK if transposed else q_NK.t()).double()).float() * (1 if transposed else scale)
    found = reference.matmul_8bit(rows, weight.four_bit, scale, transposed, Epilogue())
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


@pytest.mark.parametrize(("backend", "code_type"), KERNELS)
@pytest.mark.parametrize(("T", "N", "K"), [(3, 0, 64), (3, 16, 0), (0, 16, 64)])
def test_products_of_nothing(backend, code_type, T, N, K):
    weight = make(N, K) if N * K else quantize(torch.empty(N, K), "nf4")
    bias = random(N)
    with ln.use_backend(backend):
        y = eightbit.forward(ops.quantize_rows(torch.ones(T, K), None, code_type), weight, Epilogue(bias), torch.float32)
        dx = eightbit.backward(torch.ones(T, N), weight, Epilogue(), code_type)
    assert y.shape == (T, N)
    assert dx.shape == (T, K)
    if K == 0:
        assert torch.equal(y, bias.expand(T, N))
    if N == 0:
        assert (dx == 0).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_vnni)])
def test_the_terms_added_may_be_of_the_outputs_dtype(backend):
    weight, low, factor, bias = make(48, 64), random(5, 3).bfloat16(), random(3, 48, seed=1).bfloat16(), random(48).bfloat16()
    with ln.use_backend(backend):
        rows, found = ops.quantize_rows(random(5, 64)), []
        for added in (Epilogue(bias, low, factor, 0.5), Epilogue(bias.float(), low.float(), factor.float(), 0.5)):
            scales = ops.row_scales(weight.four_bit)
            found.append(ops.matmul_8bit(rows, weight.four_bit, scales, False, added, torch.bfloat16))
    assert torch.equal(*found)


@pytest.mark.parametrize(("backend", "code_type"), KERNELS)
def test_special_rows(backend, code_type):
    if backend == "triton":
        scales_rows(code_type)
    weight = quantize(torch.cat([torch.zeros(3, 64), random(13, 64)]), "nf4")
    x = random(4, 64)
    x[1] = 0
    x[2, 5], x[3, 63] = float("nan"), float("inf")
    with ln.use_backend(backend), np.errstate(all="ignore"):  # numpy's, in the interpreter
        y = eightbit.forward(eightbit.shared_rows(x, code_type), weight, Epilogue(), torch.float32)
        empty = eightbit.forward(eightbit.shared_rows(x[:0], code_type), weight, Epilogue(), torch.float32)
    assert torch.isfinite(y[:2]).all()
    assert not torch.isfinite(y[2:]).any()  # never a silent number
    assert (y[1] == 0).all()
    assert (y[0, :3].abs() < 1e-3).all()
    assert empty.shape == (0, 16)


BASE_ERROR = {INT8: 0.015, FP8: 0.045}
"""Of the product's norm. int8: a step is 1/127 of a part's or row's largest value, some three times the root mean square.
fp8: with three bits of mantissa rounding has a root mean square of 2.7 % (2^-3 / sqrt(12) of a step's start, over an octave), in
both operands 3.8 %. In bfloat16 the output's rounding is added, 0.2 %."""


@pytest.mark.parametrize(("backend", "code_type", "dtype", "dropout"), [
    pytest.param(*kernel.values, *others, marks=kernel.marks)
    for kernel, *others in pairwise(KERNELS, [torch.float32, torch.bfloat16], [0.0, 0.3])
])  # fmt: skip
def test_adapter_is_exact_and_the_base_is_close(backend, code_type, dtype, dropout):
    if backend == "triton":
        scales_rows(code_type)
    T, N, K, r = 50, 96, 192, 8
    layers, eight_bit = {}, next(name for name, kind in eightbit.CODE_TYPES.items() if kind == code_type)
    for compute in ("exact", eight_bit):
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
    exact, ours = results["exact"], results[eight_bit]
    for index in (0, 1):
        assert ours[index].dtype == dtype
        error = float((ours[index] - exact[index]).norm() / exact[index].norm())
        assert 1e-4 < error < BASE_ERROR[code_type]  # it is another product, and a close one
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
        if backend == "reference":
            QuantLinear(make(64, 64), compute="fp8")(x)
            assert len(calls) == 7, "in another type it is scaled again"
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


def test_narrow_weights_are_refused():
    with pytest.raises(InputError, match=r"compute='fp8'.* multiple of 64 long.* 'odd' is 8 x 80\. Use compute='exact', or add"):
        eightbit.check_weight(make(8, 80), "odd", "fp8")


CUDA_REFUSALS = {
    ("int8", (7, 5)): r"compute='int8' needs .*capability 8\.0 or later\. 'cuda:0' has 7\.5\. Use compute='exact'\.$",
    ("fp8", (7, 5)): r"compute='fp8' needs .*capability 8\.9 or later\. 'cuda:0' has 7\.5\. Use compute='exact'\.$",
    ("fp8", (8, 6)): r"8\.9 or later\. 'cuda:0' has 8\.6\. Use compute='int8' or compute='exact'\.$",
    ("int8", (8, 0)): None,
    ("int8", (12, 0)): None,
    ("fp8", (8, 9)): None,
    ("fp8", (9, 0)): None,
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize(("compute", "capability"), CUDA_REFUSALS)
def test_cuda_devices_without_the_units_are_refused(compute, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device, refusal = torch.device("cuda:0"), CUDA_REFUSALS[compute, capability]
    if refusal is None:
        assert eightbit.choose(compute, device) == compute
        return
    with pytest.raises(BackendError, match=refusal):
        eightbit.choose(compute, device)
    with ln.use_backend("triton"), pytest.raises(BackendError, match=refusal):
        eightbit.choose(compute, device)


@pytest.mark.parametrize("compute", eightbit.CODE_TYPES)
@pytest.mark.parametrize("device", ["cuda:0", "cpu", "mps"])
def test_plain_kernels_are_refused_unless_asked_for(compute, device, monkeypatch):
    missing = {name: BackendError(f"The {name} kernels are not there.") for name in ("cpu", "triton")}
    monkeypatch.setattr(ops, "_loaded", missing)
    with pytest.raises(
        BackendError, match=rf"compute='{compute}' has no fast kernel on '{device}'.*triton kernels are not there"
    ):
        eightbit.choose(compute, torch.device(device))
    with ln.use_backend("reference"):
        assert eightbit.choose(compute, torch.device(device)) == compute
    assert eightbit.choose("auto", torch.device(device)) == "exact"


@pytest.mark.skipif(ops.backend_status()["cpu"] != "ok", reason="no compiled library")
def test_fp8_is_refused_by_the_compiled_kernels():
    refusal = r"compute='fp8' needs a CUDA device of .*8\.9 or later.* Use compute='int8' or compute='exact'"
    with pytest.raises(BackendError, match=refusal):
        eightbit.choose("fp8", torch.device("cpu"))
    with pytest.raises(BackendError, match=refusal):
        QuantLinear.from_linear(torch.nn.Linear(64, 64), ln.QuantConfig(compute="fp8"))
    for call in (lambda: cpu.quantize_rows(random(3, 64), None, FP8), lambda: scales_on_cpu(FP8)):
        with pytest.raises(BackendError, match=refusal):
            call()


def scales_on_cpu(code_type):
    weight = make(64, 64)
    return cpu.row_scales(weight.four_bit, code_type)


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
    scale = cpu.row_scales(weight.four_bit)
    rows = cpu.quantize_rows(random(3, 128))
    with pytest.raises(InputError, match=r"'x' must have 64 columns\. Got 128"):
        cpu.matmul_8bit(rows, weight.four_bit, scale, False, Epilogue())
    rows = cpu.quantize_rows(random(3, 64))
    wrong = Epilogue(None, random(3, 2), random(64, 2))
    with pytest.raises(InputError, match="'factor' must be"):
        cpu.matmul_8bit(rows, weight.four_bit, scale, False, wrong)


@needs_triton
def test_triton_arguments_are_checked():
    weight, triton = make(64, 64), ops.backend("triton")
    scale, on = random(64), torch.device("cuda" if CUDA else "cpu")
    four_bit = weight.to(on).four_bit

    def product(columns=64, row_scale=scale, shape=weight.shape, **changes):
        rows = triton.quantize_rows(random(3, columns).to(on))._replace(**changes)
        triton.matmul_8bit(rows, four_bit._replace(shape=shape), row_scale.to(on), False, Epilogue(), torch.float32)

    product()
    with pytest.raises(InputError, match=r"'x' must have 64 columns\. Got 128"):
        product(128)
    with pytest.raises(InputError, match=r"codes of 'x' must be torch\.int8 or torch\.float8_e4m3fn\. Got torch\.uint8"):
        product(codes=torch.zeros(12 * 64, dtype=torch.uint8, device=on))
    with pytest.raises(InputError, match="'codes' must be"):
        product(codes=torch.zeros(3 * 64 + 1, dtype=torch.int8, device=on))
    with pytest.raises(InputError, match="'scale' must be"):
        product(scale=torch.ones(2, device=on))
    with pytest.raises(InputError, match="'row_scale' must be"):
        product(row_scale=random(63))
    with pytest.raises(InputError, match=r"multiple of 64 long, in blocks of at least 32\. Got 128 x 32 in blocks of 64"):
        product(32, shape=torch.Size((128, 32)))
    with pytest.raises(InputError, match="'x_TC' must be"):
        triton.quantize_rows(random(64, 3).t().to(on))
    with pytest.raises(InputError, match="'x_TC' must be"):
        triton.quantize_rows(random(3, 64).double().to(on))
    with pytest.raises(InputError, match="'column_scale' must be"):
        triton.quantize_rows(random(3, 64).to(on), random(63).to(on))
    with pytest.raises(InputError, match="'codes' must be"):
        triton.row_scales(four_bit._replace(shape=torch.Size((65, 64))))
