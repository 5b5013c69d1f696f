"""Sequences that begin alike, computed once. Oracles: the set of their beginnings; the sequences alone under the model's own
attention."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lownibble.kernels import ops
from lownibble.models import attention
from lownibble.models.attention import prefix_attention, spread_out
from lownibble.models.head import hidden_states
from lownibble.models.prefixes import tree
from lownibble.training import loss
from lownibble.training.loss import check_prefixes

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)


def beginnings(sequences):
    return [tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))]


@given(sequences=SEQUENCES)
def test_a_tree_has_each_beginning_once(sequences):
    found, expected = tree(sequences), beginnings(sequences)
    assert found.input_ids.shape == found.positions.shape == (1, len(set(expected)))
    nodes = [expected[place] for place in found.first.tolist()]
    assert len(set(nodes)) == len(nodes)
    assert [nodes[node] for node in found.spread.tolist()] == expected
    assert found.input_ids[0].tolist() == [node[-1] for node in nodes]
    assert found.positions[0].tolist() == [len(node) - 1 for node in nodes]
    T = max(map(len, sequences))
    padded = [(row, place) for row, sequence in enumerate(sequences) for place in range(len(sequence))]
    places = torch.tensor([row * T + place for row, place in padded])
    assert [nodes[node] for node in found.places(places, T).tolist()] == expected


def test_groups_share_nothing_with_each_other():
    sequences = [[1, 2], [1, 2], [1, 3], [1, 2]]
    assert tree(sequences).input_ids.tolist() == [[1, 2, 3]]
    apart = tree(sequences, [0, 1, 0, 1])
    assert apart.input_ids.tolist() == [[1, 2, 1, 2, 3]]
    assert apart.spread.tolist() == [0, 1, 2, 3, 0, 4, 2, 3]


MODELS = {
    "llama": ("llama", {}),
    "llama, kernel": ("llama", {"head_dim": 16}),
    "qwen3, kernel": ("qwen3", {"head_dim": 16}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "gemma2, every other layer a window": ("gemma2", {"sliding_window": 4, "attn_logit_softcapping": None}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "phi": ("phi", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Both of our attentions, windows, learned positions, partial rotary, norms of queries and keys, experts."""


def some_sequences():
    ids = torch.randint(3, 96, (50,), generator=torch.Generator().manual_seed(5)).tolist()
    return [ids[:12], [*ids[:9], *ids[20:24]], ids[:9], [*ids[:3], *ids[30:41]], ids[41:44]]


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_gradients_are_those_of_the_sequences_alone(tiny, name):
    family, options = MODELS[name]
    model = tiny(family, **options).requires_grad_(True)
    other, sequences = copy.deepcopy(model), some_sequences()
    kernel = getattr(ops.backend(ops.active_backend()), "has_attention", lambda _: False)(16) and "kernel" in name
    assert not check_prefixes(model, *sequences[:2])
    expected = torch.cat([hidden_states(other, torch.tensor([ids]), None)[0] for ids in sequences])
    found = tree(sequences)
    assert found.input_ids.numel() < len(expected)
    with prefix_attention(model):
        assert model.config._attn_implementation == attention.PREFIXED[attention.ROWS if kernel else attention.PACKED]
        nodes = hidden_states(model, found.input_ids, None, prefixes=found)[0]
        whole = spread_out(nodes, 0, found.spread)
        torch.testing.assert_close(whole, expected, rtol=0, atol=3e-6 * float(expected.detach().abs().max()))
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        (whole * weights).sum().backward()
    (expected * weights).sum().backward()
    for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-4 * float(b.grad.abs().max()), msg=key)


REFUSED = {
    "gemma2": ({}, "asks for softcap"),
    "bloom": ({"n_head": 4}, "takes no position_ids"),
    "jamba": ({"num_experts": 4, "use_mamba_kernels": False}, "not the same so"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "not the same so"),
    "stablelm": ({}, "does not arrive"),
}
"""Capped scores, positions in attention's bias, recurrent states, convolutions, attention that is not handed arguments."""


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot(tiny, family):
    options, why = REFUSED[family]
    model = tiny(family, **options)
    before = model.config._attn_implementation
    assert why in check_prefixes(model, *some_sequences()[:2])
    assert model.config._attn_implementation == before


def test_out_of_memory_is_not_for_the_model_to_answer(tiny, monkeypatch):
    def exhausted(model, ids, mask, *, prefixes=None):
        if prefixes is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return hidden_states(model, ids, mask)

    monkeypatch.setattr(loss, "hidden_states", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        check_prefixes(tiny(), *some_sequences()[:2])
