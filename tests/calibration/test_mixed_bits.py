"""Mixed precision. Oracles: gradients by autograd with respect to perturbed outputs; all choices, by brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lownibble.calibration import mixed
from lownibble.calibration.mixed import TRIMMED, Tokens, candidates, choose, loss_increase, sample_tokens
from lownibble.errors import ConfigError
from lownibble.quant import is_linear, quantize


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 30)), min_size=1, max_size=3), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_no_choice_within_the_budget_costs_less(layers, share):
    costs = {f"l{i}": {f"c{j}": cost for j, (cost, _) in enumerate(of)} for i, of in enumerate(layers)}
    sizes = {f"l{i}": {f"c{j}": size for j, (_, size) in enumerate(of)} for i, of in enumerate(layers)}
    least, most = (sum(pick(of.values()) for of in sizes.values()) for pick in (min, max))
    budget = least + share * (most - least)
    chosen = choose(costs, sizes, budget)
    assert sum(sizes[path][codec] for path, codec in chosen.items()) <= budget * (1 + 1e-6)
    found = sum(costs[path][codec] for path, codec in chosen.items())
    every = [dict(zip(costs, each, strict=True)) for each in itertools.product(*costs.values())]
    fitting = [each for each in every if sum(sizes[p][c] for p, c in each.items()) <= budget * (1 - 1e-9)]
    best = min((sum(costs[p][c] for p, c in each.items()) for each in fitting), default=found)
    assert found <= best + 1e-4 * max(1, max(max(of.values()) for of in costs.values()))


def test_a_budget_that_nothing_fits_is_an_error():
    with pytest.raises(ConfigError, match=r"the smallest takes 1\.50 x as much\. Raise 'bits'"):
        choose({"a": {"x": 1.0}}, {"a": {"x": 15}}, 10)
    with pytest.raises(ConfigError, match=r"Got quant_type 'fp8'\. Choose one of those"):
        candidates("fp8")
    assert candidates("int4") == ("int2", "int3", "int4", "int8")


def test_gradients_are_those_of_the_loss_by_the_layers_outputs(tiny):
    model = tiny("llama")
    rows = torch.randint(3, 96, (3, 8), generator=torch.Generator().manual_seed(0))
    paths = [path for path, module in model.named_modules() if is_linear(module) and path != "lm_head"]
    inputs = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: inputs.update({path: args[0].detach()})
        )
        for path in paths
    ]
    found = sample_tokens(model, rows, paths)
    for hook in hooks:
        hook.remove()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for path in paths[::3]:
        layer = model.get_submodule(path)
        added = torch.zeros(3, 8, layer.weight.shape[0], requires_grad=True)
        handle = layer.register_forward_hook(lambda module, inputs, output, added=added: output + added)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").backward()
        handle.remove()
        torch.testing.assert_close(found[path].gradients, added.grad.flatten(0, 1), rtol=1e-4, atol=1e-7)
        assert torch.equal(found[path].inputs, inputs[path].flatten(0, 1))
        assert found[path].share == 1 / rows.numel()
    assert not any(module._forward_hooks for module in model.modules())


def test_some_tokens_stand_for_all(tiny, monkeypatch):
    model = tiny("llama")
    rows = torch.randint(3, 96, (3, 8), generator=torch.Generator().manual_seed(0))
    paths = [path for path, module in model.named_modules() if is_linear(module) and path != "lm_head"]
    every = sample_tokens(model, rows, paths)
    widths = sum(sum(model.get_submodule(path).weight.shape) for path in paths)
    monkeypatch.setattr(mixed, "SAMPLE_BYTES", 12 * widths * 4)  # half of the tokens
    some = sample_tokens(model, rows, paths)
    for path in paths:
        assert torch.equal(some[path].inputs, every[path].inputs[::2])
        assert torch.equal(some[path].gradients, every[path].gradients[::2])
        assert some[path].share == 2 * every[path].share


def test_the_increase_is_the_quadratic_form_over_all_but_the_largest_tokens():
    generator = torch.Generator().manual_seed(1)
    weight, x, g = (torch.randn(shape, generator=generator) for shape in ((6, 64), (400, 64), (400, 6)))
    packed = quantize(weight, "int4")
    x[7] *= 1000  # an outlier
    off = weight - packed.dequantize(torch.float32)
    terms = torch.einsum("ti,ij,tj->t", g.double(), off.double(), x.double()).square()
    kept = torch.cat([terms[:7], terms[8:]]).sort().values[: 400 - int(TRIMMED * 400)]
    found = loss_increase(weight, packed, Tokens(x, g, 1 / 400))
    assert found == pytest.approx(float(0.5 * kept.sum() / 400), rel=1e-4)
    assert found < 0.1 * float(0.5 * terms.mean())
