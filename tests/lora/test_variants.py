"""The seam of variants: one defined here, with a parameter more than LoRA, goes through training, files and merging.

Oracles: the formula in plain torch and the live adapter's own logits.
"""

from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lownibble as ln
from lownibble.decoding import CpuDecoder
from lownibble.errors import AdapterError, ModelError
from lownibble.lora.active import adapter_configs
from lownibble.lora.layer import LoraLinear
from lownibble.lora.variants import LORA, Variant, variant_of
from lownibble.registry import VARIANTS


class _ScaledRows(Variant):
    """y = (1 + g) * (x W^T + scale (x A^T) B^T) + bias, with a trained g (out,) that starts at zero."""

    keys: ClassVar = {**LORA.keys, "gain": "lora_gain"}

    def shapes(self, n_in, n_out, r):
        return {**LORA.shapes(n_in, n_out, r), "gain": (n_out,)}

    def forward(self, base, adapter, x, dropout):
        y = LORA.forward(base, adapter, x, dropout)
        if base.bias is None:
            return y * (1 + adapter.gain)
        return (y - base.bias) * (1 + adapter.gain) + base.bias

    def merge(self, weight, parameters, scale):
        return LORA.merge(weight, parameters, scale).mul_((1 + parameters["gain"]).unsqueeze(1))


@pytest.fixture
def scaled_rows(monkeypatch):
    monkeypatch.setitem(VARIANTS._entries, "lora", _ScaledRows())


def logits(model, batch):
    ids, mask, _ = batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.float()


def test_lora_is_what_a_configuration_gives():
    assert variant_of(ln.LoraConfig()) is LORA
    assert LORA.plain


def test_a_layer_computes_what_its_variant_says(scaled_rows):
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(6, 4).requires_grad_(False))
    adapter = layer.add("a", r=2, alpha=4, dropout=0.0, use_rslora=False, variant=variant_of(ln.LoraConfig()))
    for parameter in adapter.parameters():
        parameter.data.normal_()
    x = torch.randn(3, 6, requires_grad=True)
    y = layer(x)
    weight = (layer.base.weight + 2 * adapter.lora_B @ adapter.lora_A) * (1 + adapter.gain).unsqueeze(1)
    torch.testing.assert_close(y, x @ weight.t() + layer.base.bias)
    given = torch.autograd.grad(y.square().sum(), [x, *adapter.parameters()])
    expected = torch.autograd.grad((x @ weight.t() + layer.base.bias).square().sum(), [x, *adapter.parameters()])
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    layer.half()
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters()), "master weights stay"


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_it_is_saved_loaded_and_merged(scaled_rows, write, adapt, batch, tmp_path, quant):
    folder = write("llama")
    live, adapter = adapt(folder, quant)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        ends = {key.split("_proj.")[1] for key in file.keys()}  # noqa: SIM118 - no mapping
    assert ends == {"lora_A.weight", "lora_B.weight", "lora_gain"}
    again, _ = ln.load(str(folder), quant=quant)
    ln.load_adapter(again, adapter)
    assert torch.equal(logits(again.eval(), batch), logits(live, batch))
    ln.merge(adapter, tmp_path / "merged", onto="original" if quant is None else "dequantized", measure_tokens=0)
    merged, _ = ln.load(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged, batch), logits(live, batch), rtol=1e-3, atol=1e-4)


def test_loras_files_do_not_fit_it(write, adapt, scaled_rows, monkeypatch):
    folder = write("llama")
    with monkeypatch.context() as back:
        back.setitem(VARIANTS._entries, "lora", LORA)
        _, adapter = adapt(folder)
    model, _ = ln.load(str(folder), quant="nf4")
    with pytest.raises(AdapterError, match=r"lacks '.*lora_gain'"):
        ln.load_adapter(model, adapter)
    assert not adapter_configs(model)


def test_batched_decoding_refuses_more_than_a_low_rank_sum(scaled_rows, write, adapt):
    model, _ = adapt(write("llama", hidden_size=64, intermediate_size=128, head_dim=16))
    with pytest.raises(ModelError, match="more than a low-rank sum"):
        CpuDecoder(model)
