"""Joined low-rank products in compiled layers. Oracles: the layers as they are; counts of operators in torch's graphs."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import fx

import lownibble as ln
from lownibble.config import LoraConfig, QuantConfig
from lownibble.lora import add_lora
from lownibble.lora.joined import JoinLowRank, lora_product, lora_product_backward, low_ranks, low_ranks_backward
from lownibble.quant import eightbit
from lownibble.rehearsal.compiled import backend
from lownibble.training.compiling import Compiled, torchs_own_warnings_off

LAYERS = 3


def adapted(folder, *, quant="nf4", compute="exact", **lora):
    model, _ = ln.load(str(folder), quant=None if quant is None else QuantConfig(quant_type=quant, compute=compute))
    add_lora(model, LoraConfig(**{"r": 4, "lora_alpha": 8} | lora))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def gradients(model, layers=None):
    """Loss and gradients of one batch, through `layers` if given."""
    ids = torch.arange(24).view(2, 12) % 13
    model.train()
    model.zero_grad()
    with torchs_own_warnings_off(), layers() if layers else nullcontext():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def operators(monkeypatch):
    """Operators of each graph after joining."""
    found: list[Counter[str]] = []
    whole = JoinLowRank.__call__

    def counted(self, graph: fx.Graph) -> None:
        whole(self, graph)
        names = (str(node.target).split(".") for node in graph.nodes)
        found.append(Counter(name[1] for name in names if name[0] == "lownibble"))

    monkeypatch.setattr(JoinLowRank, "__call__", counted)
    torch._dynamo.reset()
    return found


def made():
    return backend(SimpleNamespace(fused=False), join=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [{"quant": None}, {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 20}, {"alora_invocation_tokens": [4, 5]}],
)
def test_gradients_are_those_of_the_layers_apart(how, widen, operators):
    """Those of all layers packed are compared where Inductor runs the graph."""
    model = adapted(widen(num_hidden_layers=LAYERS, attention_bias=True), **how)
    expected = gradients(model)
    found = gradients(model, Compiled(model, backend=made()))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + 1e-9)
    assert all(each["low_ranks"] == each["low_ranks_backward"] > 0 for each in operators)


@pytest.mark.slow
def test_each_input_is_read_once_and_each_product_is_there_once(widen, operators):
    """q, k, v share an input, gate and up one; o and down have their own."""
    model = adapted(widen(num_hidden_layers=LAYERS))
    gradients(model, Compiled(model, backend=made()))
    counts = {"low_ranks": 2, "lora_product": 5, "lora_matmul": 2}
    assert operators
    assert all(each == counts | {f"{name}_backward": count for name, count in counts.items()} for each in operators)


@pytest.mark.slow
def test_with_dropout_nothing_is_joined(widen, operators):
    model = adapted(widen(num_hidden_layers=LAYERS), lora_dropout=0.5)
    gradients(model, Compiled(model, backend=made()))
    assert operators
    assert all(each["lora_matmul"] == each["lora_matmul_backward"] == 7 for each in operators)


@pytest.mark.slow
def test_8bit_rows_of_a_shared_input_are_joined_too(widen, operators):
    with ln.use_backend("reference"):
        model = adapted(widen(num_hidden_layers=LAYERS), compute="fp8")
        expected = gradients(model)
        found = gradients(model, Compiled(model, backend=made()))
    assert [each["low_ranks"] for each in operators] == [2] * len(operators)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()) + 1e-9)


@pytest.mark.slow
def test_inductor_runs_the_joined_graph(widen, operators):
    model = adapted(widen(num_hidden_layers=LAYERS))
    expected = gradients(model)
    found = gradients(model, Compiled(model, join=True))
    assert [each["low_ranks"] for each in operators] == [2] * len(operators)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()) + 1e-9)


@pytest.mark.parametrize("compute", ["exact", "fp8"])
def test_the_operators_keep_torchs_rules(compute, widen):
    checks = ("test_faketensor",) if compute == "fp8" else ("test_schema", "test_faketensor")
    with ln.use_backend("reference"):
        model = adapted(widen(num_hidden_layers=1), compute=compute)
        layer = model.model.layers[0].self_attn.q_proj
        adapter, weight, spec, code_type = layer.adapter(layer.active), layer.base.flat, layer.base.spec, layer.base.code_type
        A, B = adapter.lora_A.detach(), adapter.lora_B.detach()
        x, dy = torch.randn(2, 5, layer.in_features), torch.randn(2, 5, layer.out_features)
        rows, low = eightbit.rows_of(x, code_type), torch.randn(10, 4)
        calls = {
            low_ranks: (x, [A, A]), low_ranks_backward: (x, [low, low], [A, A], True),
            lora_product: (x, low, weight, spec, None, B, 2.0, rows),
            lora_product_backward: (dy, low, weight, spec, B, layer.in_features, 2.0, code_type, True),
        }  # fmt: skip
        for operator, arguments in calls.items():
            torch.library.opcheck(operator, arguments, test_utils=checks)
