"""Mixed precision. Oracles: gradients by autograd with respect to perturbed outputs; all choices, by brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lownibble.calibration import Moments
from lownibble.calibration.mixed import candidates, choose, gradient_squares, loss_increase
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
    found = gradient_squares(model, rows, paths)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for path in paths[::3]:
        layer = model.get_submodule(path)
        added = torch.zeros(3, 8, layer.weight.shape[0], requires_grad=True)
        handle = layer.register_forward_hook(lambda module, inputs, output, added=added: output + added)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").backward()
        handle.remove()
        torch.testing.assert_close(found[path], added.grad.square().sum((0, 1)) / rows.numel(), rtol=1e-4, atol=1e-7)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_increase_is_the_quadratic_form_over_tokens():
    generator = torch.Generator().manual_seed(1)
    weight, x, g = (torch.randn(shape, generator=generator) for shape in ((6, 64), (400, 64), (500, 6)))
    packed = quantize(weight, "int4")
    moments, squares = Moments(x.T @ x / len(x), len(x)), g.square().mean(0)
    off = (weight - packed.dequantize(torch.float32)) @ x.T  # (6, tokens)
    expected = 0.5 * (off.square().mean(1) * squares).sum()
    assert loss_increase(weight, packed, moments, squares) == pytest.approx(float(expected), rel=1e-4)
