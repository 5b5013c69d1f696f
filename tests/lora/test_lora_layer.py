"""LoraLinear and its autograd function. Oracles: finite differences (gradcheck, float64) and the formula in plain torch."""

import pytest
import torch
from defaults import default_dtype
from torch import nn
from torch.utils.checkpoint import checkpoint

import lownibble as ln
from lownibble.kernels.decoded import release_scratch
from lownibble.lora import LoraLinear
from lownibble.lora.product import LoraMatmul, _keep_mask
from lownibble.quant import QuantLinear
from lownibble.quant.codecs.fourbit import FourBitWeight

T, K, N, R = 5, 24, 10, 3
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 6e-3}
"""Absolute error on outputs of order 3: some tens of roundings in float32; half types round x A^T, the product and the sum."""


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(kind: str = "dense", *, bias: bool = True, dropout: float = 0.0, dtype=torch.float32) -> LoraLinear:
    linear = nn.Linear(K, N, bias=bias)
    linear.weight.data = random(N, K, seed=1) / 4
    if bias:
        linear.bias.data = random(N, seed=2)
    base = linear.to(dtype) if kind == "dense" else QuantLinear.from_linear(linear.to(dtype), kind)
    layer = LoraLinear(base.requires_grad_(False))
    adapter = layer.add("default", R, 6.0, dropout, False)
    adapter.lora_A.data = random(R, K, seed=3) / 4
    adapter.lora_B.data = random(N, R, seed=4) / 4
    return layer


def plain(layer: LoraLinear, x, mask=1.0):
    """y = x W^T + bias + scale * (mask x A^T) B^T in float64."""
    weight = layer.base.weight if isinstance(layer.base, nn.Linear) else layer.base.weight.dequantize(torch.float32)
    adapter = layer.adapters["default"]
    low = (x.double() * mask) @ adapter.lora_A.double().t() @ adapter.lora_B.double().t()
    y = x.double() @ weight.double().t() + adapter.scale * low
    return y if layer.base.bias is None else y + layer.base.bias.double()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [None, "frozen", "trained"])
def test_gradcheck_dense(bias, dropout):
    inputs = [random(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate([(T, K), (N, K), (N,), (R, K), (N, R)])]
    x, weight, b, lora_A, lora_B = inputs
    for tensor in (x, lora_A, lora_B, *([b] if bias == "trained" else [])):
        tensor.requires_grad_()
    b = None if bias is None else b
    assert torch.autograd.gradcheck(
        lambda *t: LoraMatmul.apply(t[0], weight, b if bias != "trained" else t[3], t[1], t[2], 1.5, dropout, 7, None, (), None),
        (x, lora_A, lora_B, *([b] if bias == "trained" else [])),
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4", "fp4"])
def test_output_and_gradients_equal_the_formula(kind, dtype, dropout):
    layer = make(kind, dropout=dropout, dtype=dtype).train()
    adapter = layer.adapters["default"]
    layer.base.bias.requires_grad_()
    x = random(2, T, K, dtype=dtype, seed=9).requires_grad_()
    dy = random(2, T, N, dtype=dtype, seed=10)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    mask = _keep_mask(x.detach().view(-1, K), dropout, seed).view_as(x) if dropout else 1.0
    expected = plain(layer, x, mask)
    wanted = [x, adapter.lora_A, adapter.lora_B, layer.base.bias]
    gradients = torch.autograd.grad(y, wanted, dy)
    expected_gradients = torch.autograd.grad(expected, wanted, dy.double())
    assert y.dtype == dtype
    assert adapter.lora_A.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=ROUNDING[dtype])
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=ROUNDING[dtype] * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_with_and_without_gradient_give_the_same(kind):
    layer, x = make(kind), random(2, 3, T, K)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=ROUNDING[torch.float32])
        torch.testing.assert_close(layer(x[0, 0, :1]), expected[0, 0, :1], rtol=0, atol=ROUNDING[torch.float32])
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=ROUNDING[torch.float32])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_training_after_inference_mode(backend):
    """The shared buffer must not be an inference tensor when training takes it over."""
    layer, x = make("nf4"), random(T, K)
    release_scratch()
    with ln.use_backend(backend):
        with torch.inference_mode():
            layer(x)
        layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_dropout_follows_the_seed_and_the_mode():
    layer, x = make(dropout=0.5).train(), random(400, K)
    torch.manual_seed(1)
    first, other = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(other, first)
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x).double(), plain(layer, x), rtol=0, atol=ROUNDING[torch.float32])
    mask = _keep_mask(x, 0.5, 5)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert mask.mean().item() == pytest.approx(1, abs=0.05)  # 9600 draws: 5 standard deviations


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_bias_of_another_dtype(backend):
    """A bfloat16 bias in the base, float32 activations."""
    layer = LoraLinear(QuantLinear.from_linear(nn.Linear(64, 48).bfloat16()))
    layer.add("a", r=4, alpha=8, dropout=0.0, use_rslora=False)
    x = random(9, 64).requires_grad_()
    with ln.use_backend(backend):
        y = layer(x)
        y.sum().backward()
        expected = layer.base(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0, atol=ROUNDING[torch.float32])


def test_no_input_gradient_where_none_is_wanted(monkeypatch):
    layer = make("nf4")
    products = []
    matmul = FourBitWeight.matmul
    monkeypatch.setattr(FourBitWeight, "matmul", lambda self, *a, **k: products.append(1) or matmul(self, *a, **k))
    layer(random(T, K)).sum().backward()
    assert len(products) == 1  # forward only
    layer(random(T, K).requires_grad_()).sum().backward()
    assert len(products) == 3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_saved_for_backward(dropout):
    """x once, A, B, x A^T and the packed tensors: no decoded weight and no mask."""
    layer = make("nf4", dropout=dropout).train()
    x, saved = random(T, K).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    adapter = layer.adapters["default"]
    packed = [tuple(t.shape) for t in layer.weight.tensors().values()]
    assert sorted(tuple(t.shape) for t in saved) == sorted([(T, K), (R, K), (N, R), (T, R), *packed])
    assert {x.data_ptr(), adapter.lora_A.data_ptr(), adapter.lora_B.data_ptr()} <= {t.data_ptr() for t in saved}
    y.sum().backward()


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_gradient_checkpointing_gives_the_same_bits(kind):
    layer = make(kind, dropout=0.3).train()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(2)
        x = random(T, K).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.adapters.parameters())])
        layer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_casting_the_model_leaves_master_weights():
    layer = make("nf4").to(torch.bfloat16)
    assert {p.dtype for p in layer.adapters.parameters()} == {torch.float32}
    assert layer(random(T, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_meta_device_takes_a_layer():
    layer = make("nf4").to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert all(p.requires_grad for p in layer.adapters.parameters())


def test_master_weights_are_float32_whatever_the_default():
    with default_dtype(torch.bfloat16):
        fresh = make().add("other", R, 6.0, 0.0, False)
        assert {p.dtype for p in fresh.parameters()} == {torch.float32}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 6 / 3**0.5)])
def test_scale(rslora, scale):
    assert make().add("other", 3, 6.0, 0.0, rslora).scale == pytest.approx(scale)
