"""Adapters rounded once for a pass. Oracle: each layer rounding its own."""

import pytest
import torch

import lownibble as ln
from lownibble.config import LoraConfig, QuantConfig
from lownibble.lora.layer import LowRank, RoundedAdapters
from lownibble.training.loss import label_loss


@pytest.mark.parametrize("quant", [None, QuantConfig()])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_dropout": 0.3}])
def test_a_pass_computes_what_layers_that_round_compute(quant, variant, tiny_model):
    model, _ = ln.load(str(tiny_model), quant=quant, dtype="bfloat16")
    ln.add_lora(model, LoraConfig(r=4, **variant))
    layers = [m for m in model.modules() if isinstance(m, LowRank)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    rounded = RoundedAdapters(model, torch.bfloat16)
    ids = torch.arange(24).view(2, 12) % 20

    def step():
        model.train()
        torch.manual_seed(0)
        with ln.use_backend("reference"):
            loss = label_loss(model, ids, torch.ones_like(ids), ids)
            loss.backward()
        gradients = [p.grad for layer in layers for p in layer.parameters()]
        model.zero_grad(set_to_none=True)
        return loss.detach(), gradients

    expected, gradients = step()
    with torch.no_grad():
        for layer in layers:
            layer.lora_A.mul_(2)
    changed, _ = step()
    assert not torch.equal(expected, changed)
    with rounded():
        assert all(len(layer.rounded) == 2 and layer.rounded[0].dtype == torch.bfloat16 for layer in layers)
        found, _ = step()
    assert torch.equal(found, changed)
    assert not any(layer.rounded for layer in layers)
    with torch.no_grad():
        for layer in layers:
            layer.lora_A.div_(2)
    with rounded():
        again, own = step()
    assert torch.equal(again, expected)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(own, gradients, strict=True))
