"""The calibration pass. Oracle: sums over an ordinary forward pass in float64, one row at a time."""

import pytest
import torch
from defaults import default_dtype
from torch import nn

import lownibble.calibration.layers as walking
from lownibble.calibration import Moments, join_rows, walk
from lownibble.errors import DataError, ModelError, QuantizationError
from lownibble.quant import is_linear


def linears(model):
    return [path for path, module in model.named_modules() if is_linear(module)]


def plain_moments(model, rows, paths):
    """Path -> E[x x^T], by hooks on the whole model."""
    found = {}

    def hook(path):
        def add(module, inputs):
            x = inputs[0].double().flatten(0, -2)
            found[path] = found.get(path, 0) + x.T @ x

        return add

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    with torch.no_grad():
        for row in rows:
            model(input_ids=row.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return {path: matrix / rows.numel() for path, matrix in found.items()}


def taken(model, rows, paths, change=None):
    found, visits = {}, []

    def visit(moments):
        visits.append(list(moments))
        found.update(moments)
        if change is not None:
            change(moments)

    walk(model, rows, paths, visit)
    return found, visits


@pytest.fixture
def rows():
    return torch.randint(3, 96, (5, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral"])
def test_moments_are_those_of_an_ordinary_pass(tiny, rows, monkeypatch, family):
    monkeypatch.setattr(walking, "TOKENS_AT_ONCE", 24)  # two rows at a time, and one
    model = tiny(family)
    paths = linears(model)
    expected, before = plain_moments(model, rows, paths), model(input_ids=rows).logits
    found, visits = taken(model, rows, paths)
    assert sorted(found) == sorted(paths)
    assert sum(map(len, visits)) == len(paths)
    for path, moments in found.items():
        torch.testing.assert_close(moments.matrix.double(), expected[path], rtol=1e-4, atol=1e-5)
        assert moments.tokens == rows.numel()
    assert torch.equal(model(input_ids=rows).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("family", "n_rows"), [("bloom", 5), ("mpt", 4)])
def test_arguments_that_are_not_of_rows_are_left_whole(tiny, monkeypatch, family, n_rows):
    """BLOOM's alibi is of rows x heads, MPT's of heads: as many as rows here."""
    monkeypatch.setattr(walking, "TOKENS_AT_ONCE", 24)
    sizes = {"n_head": 4, "n_layer": 2} if family == "bloom" else {"n_heads": 4, "n_layers": 2, "d_model": 32}
    model = tiny(family, **sizes)
    rows = torch.randint(3, 96, (n_rows, 12), generator=torch.Generator().manual_seed(1))
    paths = [path for path in linears(model) if path != "lm_head"]
    found, _ = taken(model, rows, paths)
    expected = plain_moments(model, rows[: n_rows - (family == "mpt")], paths)
    for path, moments in found.items():
        torch.testing.assert_close(moments.matrix.double(), expected[path], rtol=1e-4, atol=1e-5)


def test_layers_that_read_the_same_tensor_share_a_matrix(tiny, rows):
    found, _ = taken(tiny("llama"), rows, linears(tiny("llama")))
    q, k, o = (found[f"model.layers.0.self_attn.{name}_proj"].matrix for name in "qko")
    assert q is k
    assert q is not o


def test_the_next_layer_sees_what_the_changed_one_puts_out(tiny, clone, rows):
    model = tiny("llama")
    changed = clone(model)
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.mul_(3)
    later = [path for path in linears(model) if path.startswith("model.layers.1")]
    expected = plain_moments(changed, rows, later)

    def change(moments):
        if "model.layers.0.mlp.down_proj" in moments:
            layer = model.model.layers[0].mlp
            layer.down_proj = nn.Linear(*layer.down_proj.weight.shape[::-1], bias=False)
            layer.down_proj.weight = changed.model.layers[0].mlp.down_proj.weight

    found, _ = taken(model, rows, linears(model), change)
    for path in later:
        torch.testing.assert_close(found[path].matrix.double(), expected[path], rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_known_are_measured_all_at_once(tiny, rows):
    model = tiny("llama")
    paths = linears(model)
    expected = plain_moments(model, rows, paths)
    model._no_split_modules = None
    found, visits = taken(model, rows, paths)
    assert len(visits) == 1
    for path in paths:
        torch.testing.assert_close(found[path].matrix.double(), expected[path], rtol=1e-4, atol=1e-5)


def test_an_error_leaves_the_model_as_it_was(tiny, rows):
    model = tiny("llama")
    with pytest.raises(RuntimeError, match="stop"):
        taken(model, rows, linears(model), lambda moments: (_ for _ in ()).throw(RuntimeError("stop")))
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_encoders_are_refused(tiny):
    model = tiny("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="has an encoder"):
        walk(model, torch.ones(2, 4, dtype=torch.long), [], lambda moments: None)


@pytest.mark.parametrize(("n_tokens", "length"), [(1000, 64), (400, 512), (256, 16), (300, 7)])
def test_rows_are_joined_without_padding(n_tokens, length):
    rows = [list(range(100 * i, 100 * i + 30)) for i in range(40)]
    joined = join_rows(rows, n_tokens, length, seed=3)
    assert len(joined) >= 2
    assert len(joined) != joined.shape[1] <= length
    assert n_tokens - joined.shape[1] - len(joined) < joined.numel() <= n_tokens
    whole = joined.flatten().tolist()
    assert all(whole[i : i + 30] in rows for i in range(0, len(whole) - 29, 30))
    assert whole[:30] != rows[0]  # in random order
    assert torch.equal(joined, join_rows(rows, n_tokens, length, seed=3))


def test_too_few_tokens_are_an_error():
    with pytest.raises(DataError, match=r"have 60 tokens, of which 60 may be used; at least 256 are needed"):
        join_rows([[1] * 30] * 2, 1000, 64)


def test_the_root_is_a_factor_and_singular_moments_are_damped():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    moments = Moments(x.T @ x / 50, 50)
    root = moments.root()
    torch.testing.assert_close(root @ root.T, moments.damped())
    assert torch.equal(root, root.tril())
    few = Moments(torch.outer(x[0], x[0]), 1)
    assert torch.isfinite(few.root()).all()
    dead = moments.matrix.clone()
    dead[3] = dead[:, 3] = 0
    assert Moments(dead, 50).damped()[3, 3] > 0
    with pytest.raises(QuantizationError, match="cannot be factored"):
        Moments(torch.full((4, 4), float("nan")), 9).root()
    for factor in (Moments(torch.zeros(4, 4), 9).root, lambda: Moments(torch.zeros(4, 4), 9).inverse_root(torch.arange(4))):
        with pytest.raises(QuantizationError, match="cannot be factored"):
            factor()


def test_moments_are_summed_in_float32_whatever_the_default():
    with default_dtype(torch.bfloat16):
        (moments := walking._Sum()).add(torch.ones(1000, 2, dtype=torch.bfloat16))
    assert torch.equal(moments.matrix, torch.full((2, 2), 1000.0))
