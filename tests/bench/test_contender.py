"""What the benchmark takes for the work of a step, against the formula of an adapted layer."""

import torch
from torch import nn

from lownibble.bench.contender import _flops
from lownibble.lora.layer import LoraLinear


def test_the_work_of_an_adapted_layer_is_its_products_and_no_more():
    T, N, K, r = 12, 24, 40, 4
    layer = LoraLinear(nn.Linear(K, N, bias=False).requires_grad_(False))
    layer.add("default", r, alpha=8, dropout=0.0, use_rslora=False)
    x = torch.randn(T, K, requires_grad=True)
    assert _flops(lambda: layer(x).sum()) == 4 * T * N * K + 6 * T * r * (N + K)
    assert _flops(lambda: layer(x.detach()).sum()) == 2 * T * N * K + T * r * (6 * N + 4 * K)
