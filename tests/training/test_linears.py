"""Dense linear layers on Lownibble's kernels. Oracles: torch's own layer in double precision, and runs without the kernels."""

from collections import Counter

import pytest
import torch
from torch import nn

import lownibble as ln
from lownibble.config import DataConfig, EvalConfig, LoraConfig, RunConfig, TrainConfig
from lownibble.data import encode
from lownibble.data import load as load_data
from lownibble.errors import BackendError
from lownibble.kernels import cpu
from lownibble.models.linears import installed, linear, on_own_kernels, own_forwards
from lownibble.study import evaluate as evaluation
from lownibble.training import run
from lownibble.training.compiling import Compiled, torchs_own_warnings_off
from lownibble.training.loop import Trainer

try:
    HAS_MATMUL = bool(cpu.library().has_matmul())
except BackendError:
    HAS_MATMUL = False
needs_kernels = pytest.mark.skipif(not HAS_MATMUL, reason="no compiled kernels, or no AVX-512")


def gradients(layer, x, dy):
    y = layer(x)
    trained = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    return y, *torch.autograd.grad(y, trained, dy)


@needs_kernels
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 11), (40,), (0,)])
def test_outputs_and_gradients_are_torchs(shape, bias, compiled):
    torch.manual_seed(0)
    layer = nn.Linear(128, 50, bias=bias)
    x, dy = torch.randn(*shape, 128, requires_grad=True), torch.randn(*shape, 50)
    expected = gradients(layer.double(), x.detach().double().requires_grad_(), dy.double())
    layer.float()
    run_layer = torch.compile(layer, backend="aot_eager", dynamic=True) if compiled else layer
    with on_own_kernels(layer):
        assert "forward" in vars(layer)
        found = gradients(run_layer, x, dy)
    assert "forward" not in vars(layer)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 * max([1.0, *exact.detach().abs().flatten().tolist()]))


@needs_kernels
def test_transposed_inputs_and_expanded_gradients():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 9), torch.randn(64, 7)
    expected = torch.autograd.grad(layer(x.t()).sum(), list(layer.parameters()))
    with on_own_kernels(layer):
        found = torch.autograd.grad(layer(input=x.t()).sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected)


@needs_kernels
def test_only_what_backward_needs_is_saved():
    def saved(layer, x):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
            layer(x)
        return sorted(map(tuple, kept))

    for trained, wanted in ((True, False), (False, True), (True, True)):
        layer, x = nn.Linear(64, 9).requires_grad_(trained), torch.randn(5, 64, requires_grad=wanted)
        with on_own_kernels(layer):
            assert saved(layer, x) == [(5, 64)] * trained + [(9, 64)] * wanted


@needs_kernels
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operators_keep_torchs_rules():
    for trained, wanted in ((True, True), (True, False), (False, True)):
        for bias in (None, torch.randn(9, requires_grad=True)):
            x, weight = torch.randn(5, 64, requires_grad=wanted), torch.randn(9, 64, requires_grad=trained)
            torch.library.opcheck(linear, (x, weight, bias))


@needs_kernels
def test_what_does_not_suit_is_left_to_torch():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    class Shard(torch.Tensor):
        pass

    sharded = nn.Linear(64, 8)
    sharded.weight = nn.Parameter(torch.randn(8, 64).as_subclass(Shard))

    class Other(nn.Linear):
        def forward(self, x, scale=1.0):
            return scale * super().forward(x)

    empty, hooked = nn.Linear(64, 1, bias=False), nn.Linear(64, 8)
    empty.weight = nn.Parameter(torch.empty(0, 64))
    hooked.forward = lambda x: x
    layers = {
        "suits": nn.Linear(64, 8), "odd": nn.Linear(65, 8), "16-bit": nn.Linear(64, 8).bfloat16(), "router": Router(64, 8),
        "hooked": hooked, "packed": ln.QuantLinear.from_linear(nn.Linear(64, 64), "nf4"),
        "elsewhere": nn.Linear(64, 8, device="meta"), "sharded": sharded,
        "empty": empty, "other": Other(64, 8),
    }  # fmt: skip
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    with on_own_kernels(nn.ModuleDict(layers)):
        changed = {name for name, layer in layers.items() if vars(layer).get("forward") is not before[name]}
        with torch.autocast("cpu", torch.bfloat16):
            assert layers["suits"](torch.randn(2, 64)).dtype == torch.bfloat16
    assert changed == {"suits"}
    with ln.use_backend("reference"), on_own_kernels(layers["suits"]):
        assert "forward" not in vars(layers["suits"])


@needs_kernels
def test_outputs_may_be_changed_in_place():
    """As OLMo's layers do with `clip_qkv`."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 9), torch.randn(2, 5, 64)

    def trained():
        return torch.autograd.grad(layer(x).clamp_(-0.3, 0.3).square().sum(), list(layer.parameters()))

    expected = trained()
    with on_own_kernels(layer):
        torch.testing.assert_close(trained(), expected)


@needs_kernels
def test_a_bias_may_lie_apart():
    layer, x = nn.Linear(64, 9), torch.randn(5, 64)
    layer.bias = nn.Parameter(torch.randn(9, 2)[:, 0])
    expected = layer(x)
    with on_own_kernels(layer):
        torch.testing.assert_close(layer(x), expected)


@needs_kernels
def test_layers_share_a_graph(widen):
    """Of all layers of a model, and of the next run's."""
    model, _ = ln.load(str(widen(num_hidden_layers=4)), device="cpu")
    model.requires_grad_(True).train()
    graphs = []

    def count(graph, given):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for _ in range(2):
        with installed(own_forwards(model)), torchs_own_warnings_off(), Compiled(model, backend=count)():
            model(torch.tensor([[1, 2, 3, 4]]), use_cache=False).logits.sum().backward()
    assert len(graphs) == 1
    assert "lownibble.linear" in str(graphs[0].code)


@needs_kernels
@pytest.mark.parametrize(("method", "targets"), [("full", "all-linear"), ("lora", ["q_proj"])])
def test_a_run_is_that_without_them(widen, tiny_data, tmp_path, monkeypatch, method, targets):
    """Full fine-tuning, and LoRA's layers without an adapter, by the kernels and by torch: as far apart as rounding puts them."""
    model, steps, losses = widen(num_hidden_layers=2), 4, []
    gradients_of, product, outer = Counter(), cpu.matmul_dense, cpu.outer

    def multiply(x, weight, transposed, *given, **named):
        gradients_of["x"] += transposed
        return product(x, weight, transposed, *given, **named)

    monkeypatch.setattr(cpu, "matmul_dense", multiply)
    monkeypatch.setattr(cpu, "outer", lambda *given, **named: gradients_of.update(["weight"]) or outer(*given, **named))
    for backend in ("cpu", "reference"):
        with ln.use_backend(backend):
            result = run(RunConfig(
                model=str(model), method=method,
                data=DataConfig(path=str(tiny_data), prompt_template="review : {text} :", completion_template=" {label}"),
                lora=LoraConfig(r=4, target_modules=targets),
                train=TrainConfig(max_steps=steps, batch_size=4, max_length=32, output_dir=str(tmp_path / backend)),
            ))  # fmt: skip
        losses.append(torch.tensor(result.losses))
        if backend == "cpu":  # seven layers, of which the first decoder layer's q, k, v need no gradient of x under adapters
            assert gradients_of["x"] >= steps * (2 * 7 if method == "full" else 7 + 3)
            assert gradients_of["weight"] >= steps * 2 * 7 * (method == "full")
            counted = gradients_of.copy()
    assert gradients_of == counted
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


@needs_kernels
@pytest.mark.parametrize("how", ["run", "steps", "evaluation"])
def test_they_are_there_for_passes_only(widen, tiny_data, monkeypatch, how):
    """Of a run, of steps that are taken one by one (as measurements in turns take them), and of an evaluation."""
    folder, calls, product = widen(), [], cpu.matmul_dense
    model, tokenizer = ln.load(str(folder), device="cpu")
    monkeypatch.setattr(cpu, "matmul_dense", lambda x, weight, *given, **named: (
        calls.append(len(weight)) or product(x, weight, *given, **named)
    ))  # fmt: skip
    data, options = ln.DataConfig(path=str(tiny_data)), ln.TrainConfig(max_steps=1, max_length=16)
    if how == "run":
        ln.train(model, tokenizer, data, options)
    elif how == "steps":
        trainer = Trainer(model, tokenizer, encode(load_data(data)[0], tokenizer, data, 16).examples, [], options)
        trainer.set_up()
        calls.clear()
        trainer.step(0, next(iter(trainer.micro.steps(0))))
    else:
        monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: (model.eval(), tokenizer))
        evaluation.evaluate(EvalConfig(model=str(folder), task="classification", data=str(tiny_data), train={"max_length": 16}))
    assert calls.count(128) >= 2, "gate and up of an MLP"
    assert not any("forward" in vars(module) for module in model.modules())
