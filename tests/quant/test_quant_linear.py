"""QuantLinear. Oracle: `nn.Linear` on the dequantised weight."""

import copy
from functools import partial

import pytest
import torch
from defaults import default_dtype
from pairwise import pairwise
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lownibble as ln
from lownibble.errors import InputError
from lownibble.kernels.decoded import release_scratch, scratch
from lownibble.quant import QuantLinear, is_plain_linear
from lownibble.quant.codecs.fourbit import FourBitWeight
from lownibble.quant.linear import MATVEC_MAX_ROWS, _computes_linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Relative to the largest output: sums of 80 products in another order; half types round the weight, the sum and the bias."""

CONFIGS = [
    ln.QuantConfig(quant_type=quant_type, double_quant=double_quant, block_size=block_size)
    for quant_type, double_quant, block_size in (("nf4", True, 64), ("nf4", False, 128), ("fp4", True, 32), ("fp4", False, 64))
]


def pair(config="nf4", *, bias=True, dtype=torch.float32, n_in=80, n_out=33, seed=0):
    """(QuantLinear, the `nn.Linear` of the same values)."""
    torch.manual_seed(seed)
    linear = nn.Linear(n_in, n_out, bias=bias).to(dtype)
    packed = QuantLinear.from_linear(linear, config)
    linear.weight.data = packed.weight.dequantize(dtype)
    return packed, linear.requires_grad_(False)


def assert_close(actual, expected, dtype):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    atol = TOLERANCE[dtype] * float(expected.detach().abs().max()) if expected.numel() else 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("config", "dtype", "bias"), pairwise(CONFIGS, list(TOLERANCE), [False, True]))
def test_forward_and_input_gradient(config, dtype, bias, backend):
    packed, dense = pair(config, bias=bias, dtype=dtype)
    with ln.use_backend(backend):
        for shape in [(rows, 80) for rows in (0, 1, MATVEC_MAX_ROWS, MATVEC_MAX_ROWS + 1, 70)] + [(80,), (2, 1, 80), (2, 3, 80)]:
            x = torch.randn(shape).to(dtype)
            with torch.no_grad():
                assert_close(packed(x), dense(x), dtype)
            assert_close(packed(x), dense(x), dtype)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            y = packed(ours)
            assert_close(y, dense(theirs), dtype)
            dy = torch.randn(y.shape).to(dtype)
            y.backward(dy)
            dense(theirs).backward(dy)
            assert_close(ours.grad, theirs.grad, dtype)


@pytest.mark.parametrize(("rows", "fused"), [(1, True), (MATVEC_MAX_ROWS, True), (MATVEC_MAX_ROWS + 1, False)])
def test_few_rows_take_the_matrix_vector_product(monkeypatch, rows, fused):
    packed, _ = pair()
    calls = []
    for name in ("matvec", "matmul"):
        real = getattr(FourBitWeight, name)
        monkeypatch.setattr(FourBitWeight, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
    packed(torch.randn(rows, 80))
    assert calls == ["matvec" if fused else "matmul"]


def test_inputs_that_are_not_contiguous():
    packed, dense = pair()
    for x in (torch.randn(80, 3).t(), torch.randn(3, 160)[:, ::2], torch.randn(80, 9).t(), torch.randn(2, 80, 3).transpose(1, 2)):
        assert_close(packed(x), dense(x), torch.float32)


def test_two_layers_share_the_buffer_and_stay_right():
    """Backward decodes again, after others have overwritten the buffer."""
    first, dense_first = pair(n_in=80, n_out=80, seed=1)
    second, dense_second = pair(n_in=80, n_out=96, seed=2)
    x = torch.randn(9, 80).requires_grad_()
    second(first(x).relu()).square().sum().backward()
    ours, x.grad = x.grad, None
    dense_second(dense_first(x).relu()).square().sum().backward()
    assert_close(ours, x.grad, torch.float32)


def test_bias_can_be_trained():
    packed, dense = pair()
    packed.bias.requires_grad_()
    dense.bias.requires_grad_()
    x = torch.randn(9, 80)
    packed(x).square().sum().backward()
    dense(x).square().sum().backward()
    assert_close(packed.bias.grad, dense.bias.grad, torch.float32)
    packed.to(torch.float32)
    assert packed.bias.grad is not None


def test_gradient_checkpointing():
    packed, _ = pair()
    x = torch.randn(9, 80).requires_grad_()
    packed(x).square().sum().backward()
    plain, x.grad = x.grad, None
    checkpoint(packed, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, plain)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.quant_type}/{c.double_quant}")
def test_state_dict_and_safetensors(config, tmp_path):
    packed, _ = pair(config)
    save_file(packed.state_dict(), tmp_path / "layer.safetensors")
    other = QuantLinear.from_linear(nn.Linear(80, 33), config)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(6, 80)
    assert torch.equal(other(x), packed(x))
    nested = {"nested_absmax", "offset"} if config.double_quant else set()
    assert packed.state_dict().keys() == {"codes", "absmax", "bias"} | nested
    assert not any(p.requires_grad for p in packed.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.quant_type}/{c.double_quant}")
def test_casting_keeps_the_constants(config, dtype):
    packed, _ = pair(config)
    before = {name: p.clone() for name, p in packed.named_parameters() if name != "bias"}
    identity = {name: id(p) for name, p in packed.named_parameters()}
    for cast in (
        lambda m: m.to(dtype),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.float(),
        lambda m: m.to("cpu", dtype),
    ):
        cast(nn.Sequential(packed))
        after = dict(packed.named_parameters())
        assert all(after[name].dtype == p.dtype and torch.equal(after[name], p) for name, p in before.items())
        assert {name: id(p) for name, p in after.items()} == identity
    assert packed.bias.dtype == dtype
    assert packed(torch.randn(6, 80, dtype=dtype)).dtype == dtype


def test_deepcopy_is_independent():
    packed, _ = pair()
    other = copy.deepcopy(packed)
    x = torch.randn(6, 80)
    assert torch.equal(other(x), packed(x))
    other.codes.data.zero_()
    assert not torch.equal(other(x), packed(x))


def test_scratch_is_one_buffer_and_is_released():
    release_scratch()
    small = scratch(torch.Size((3, 4)), torch.float32, torch.device("cpu"))
    large = scratch(torch.Size((30, 4)), torch.float32, torch.device("cpu"))
    again = scratch(torch.Size((3, 4)), torch.float32, torch.device("cpu"))
    assert large.data_ptr() == again.data_ptr() != small.data_ptr()
    assert release_scratch() == 480
    assert release_scratch() == 0


def test_training_after_inference_mode():
    packed, _ = pair()
    release_scratch()
    x = torch.randn(9, 80)
    for backend in ("reference", "cpu"):
        with ln.use_backend(backend):
            with torch.inference_mode():
                packed(x)
            packed(x.requires_grad_()).sum().backward()


def test_gradient_penalties_are_refused():
    """Backward is written by hand: a second derivative would read a buffer that others have overwritten."""
    packed, _ = pair()
    x = torch.randn(9, 80).requires_grad_()
    (dx,) = torch.autograd.grad(packed(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()


def test_repr_says_what_it_is():
    assert "80, 33, bias=True, nf4/64, double_quant" in repr(pair()[0])


def test_the_view_of_the_weight_follows_the_parameters():
    packed, _ = pair()
    other, _ = pair(seed=1)
    x, first = torch.randn(3, 80), packed.weight
    assert packed.weight is first  # made once
    before = packed(x)
    twin = copy.deepcopy(packed)
    assert twin.weight.codes is twin.codes
    packed.load_state_dict(other.state_dict())  # copied into the same parameters
    torch.testing.assert_close(packed(x), other(x), rtol=0, atol=0)
    packed.load_state_dict(twin.state_dict(), assign=True)  # other parameters
    torch.testing.assert_close(packed(x), before, rtol=0, atol=0)
    packed.codes.data = other.codes.data.clone()  # moved: another place, the same parameter
    assert torch.equal(packed.weight.four_bit.codes, other.codes.view(-1))
    torch.testing.assert_close(twin(x), before, rtol=0, atol=0)


class _Own(nn.Linear):
    """As Falcon's."""

    def forward(self, input):
        return input @ self.weight.T + self.bias


class _Router(nn.Linear):
    def forward(self, input):
        return super().forward(input).softmax(-1)


@pytest.mark.parametrize(
    "mode", [FakeTensorMode, partial(torch.device, "meta"), torch.inference_mode, partial(default_dtype, torch.bfloat16)],
    ids=["fake", "meta", "inference", "bfloat16"],
)  # fmt: skip
def test_what_a_layer_computes_is_found_out_in_any_mode(mode):
    _computes_linear.cache_clear()
    with mode():
        assert is_plain_linear(_Own(5, 3))
        assert not is_plain_linear(_Router(5, 3))


def test_the_meta_device_takes_and_gives_layers():
    packed, _ = pair()
    away = packed.to("meta")
    assert away is packed
    assert {tensor.device.type for tensor in away.state_dict().values()} == {"meta"}
    with pytest.raises(NotImplementedError):
        away.bfloat16().to("cpu")
    again, whole = away.to_empty(device="cpu"), pair()[0]
    again.load_state_dict(whole.state_dict())
    x = torch.randn(7, 80)
    assert again.absmax.dtype == whole.absmax.dtype
    assert torch.equal(again(x).float(), whole.bfloat16()(x).float())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, of another category from 2.15 on
@pytest.mark.parametrize("rows", [2, 8])
def test_a_derivative_forward_is_refused_not_lost(rows):
    packed, x = pair()[0], torch.randn(rows, 80)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        packed(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_float64_is_refused_by_name(quant_type, rows):
    packed = QuantLinear.from_linear(nn.Linear(64, 8), quant_type)
    with pytest.raises(InputError, match=r"'x\w*' must be .*Got torch\.float64\. Convert it"):
        packed(torch.randn(rows, 64).double())
