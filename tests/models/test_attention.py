"""Attention over packed rows. Oracle: the same rows alone, under the model's own attention."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lownibble.errors import ModelError
from lownibble.kernels import ops
from lownibble.models import attention
from lownibble.models.attention import inputs, segment_attention
from lownibble.models.head import hidden_states
from lownibble.models.info import info
from lownibble.training.loss import check_packing, check_rows, check_unmasked

LENGTHS = (12, 12, 7, 3, 1)
MODELS = {
    "llama": ("llama", {}),
    "llama, no groups": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "mistral, wide window": ("mistral", {"sliding_window": 12}),
    "gemma2, every other layer a window": ("gemma2", {"sliding_window": 4, "attn_logit_softcapping": None}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "phi": ("phi", {}),
    "granite": ("granite", {"attention_multiplier": 0.3}),
}
"""Grouped and plain heads, windows, learned positions, partial rotary, a scale of its own."""

REFUSED = {
    "gemma2": ({}, "asks for softcap"),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "asks for s_aux"),
    "stablelm": ({}, "cu_seqlens of the rows do not arrive"),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}, "cannot be swapped"
    ),
    "bloom": ({"n_head": 4}, "takes no position_ids"),
    "mamba": ({}, "takes no position_ids"),
    "jamba": ({"num_experts": 4, "use_mamba_kernels": False}, "not the same packed as alone"),
    "recurrent_gemma": ({}, "not the same packed as alone"),
}  # fmt: skip


def some_rows(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (1, length), generator=generator) for length in lengths]


def alone_and_packed(model, rows):
    alone = torch.cat([hidden_states(model, row, torch.ones_like(row)) for row in rows], 1)
    whole = torch.cat(rows, 1)
    with segment_attention(model):
        return alone, hidden_states(model, whole, torch.ones_like(whole), [row.shape[1] for row in rows])


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))  # float32, sums in another order


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_are_as_they_are_alone(tiny, name):
    family, options = MODELS[name]
    model = tiny(family, **options)
    with torch.no_grad():
        alone, packed = alone_and_packed(model, some_rows())
        assert_same(packed, alone)
        whole = torch.cat(some_rows(), 1)
        mixed = hidden_states(model, whole, torch.ones_like(whole))
    assert (mixed - alone).abs().max() > 0.1 * alone.abs().max(), "the test must be able to see a leak"


@pytest.mark.parametrize("name", MODELS)
def test_gradients_too(tiny, name):
    family, options = MODELS[name]
    model = tiny(family, **options).requires_grad_(True)
    other = copy.deepcopy(model)
    weights = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(1))
    (alone_and_packed(other, some_rows())[0] * weights).sum().backward()
    (alone_and_packed(model, some_rows())[1] * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_no_mask_is_built(tiny, monkeypatch):
    """The first thing that attention gets instead of a mask is None, windows included."""
    seen = []
    model = tiny("mistral", sliding_window=4)
    monkeypatch.setitem(
        attention.AttentionInterface()._global_mapping, attention.PACKED,
        lambda *args, **kwargs: (seen.append(args[4]), attention._attend_packed(*args, **kwargs))[1],
    )  # fmt: skip
    alone_and_packed(model, some_rows())
    assert seen == [None, None]


def test_rows_of_one_length_are_one_call(tiny, monkeypatch):
    shapes = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **k: (shapes.append(q.shape), sdpa(q, *a, **k))[1])
    model = tiny()
    with torch.no_grad(), segment_attention(model):
        whole = torch.cat(some_rows(), 1)
        hidden_states(model, whole, torch.ones_like(whole), LENGTHS)
    assert shapes == [(2, 4, 12, 8), (1, 4, 7, 8), (1, 4, 3, 8), (1, 4, 1, 8)] * 2  # two layers


@pytest.mark.parametrize("name", MODELS)
def test_right_padded_rows_need_no_mask(tiny, batch, name):
    family, options = MODELS[name]
    model, (ids, mask, _) = tiny(family, **options), batch(rows=3, length=11)
    window, obstacle = options.get("sliding_window", 99), attention.causal_obstacle(model, 11)
    if family == "gemma2" or window < 12:
        assert obstacle in (
            "its attention is 'eager', not torch's",
            f"its attention has a window of {window} tokens, and rows are longer",
        )
        return
    assert obstacle == ""
    with torch.no_grad():
        expected = hidden_states(model, ids, mask)
        info(model).needs_mask = False
        with attention.causal_attention(model):
            found = hidden_states(model, ids, mask)
    assert model.config._attn_implementation == "sdpa"
    assert_same(found[mask.bool()], expected[mask.bool()])


def test_attention_of_another_kind_keeps_its_masks(tiny, batch):
    model = tiny("llama")
    model.set_attn_implementation("eager")
    assert attention.causal_obstacle(model, 9) == "its attention is 'eager', not torch's"
    chunks = tiny("llama")
    chunks.config.attention_chunk_size = 8
    assert "chunks of 8 tokens" in attention.causal_obstacle(chunks, 9)
    assert attention.causal_obstacle(chunks, 7) == ""
    capped, (ids, mask, _) = tiny("gemma2"), batch()
    assert not check_unmasked(capped, ids, mask, attention.causal_attention), "its scores are capped"
    assert capped.config._attn_implementation != attention.CAUSAL


def test_the_models_own_attention_comes_back(tiny):
    for family, options in (("llama", {}), ("gemma2", {"attn_logit_softcapping": None})):
        model = tiny(family, **options)
        before = model.config._attn_implementation
        with segment_attention(model):
            assert model.config._attn_implementation == attention.PACKED
        assert model.config._attn_implementation == before
        with pytest.raises(IndexError), segment_attention(model):
            model.base_model(input_ids=torch.tensor([[10**6]]))
        assert model.config._attn_implementation == before


def test_the_borders(tiny):
    found = inputs(tiny(), torch.ones(1, 6), [3, 1, 2])
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 3


KERNEL = {
    "llama": ("llama", {"head_dim": 16}),
    "no groups": ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "granite": ("granite", {"head_dim": 16, "hidden_size": 64, "attention_multiplier": 0.3}),
}
"""Models whose attention runs on our kernel: a scale of its own, norms of queries and keys."""


@pytest.fixture
def kernel():
    if not getattr(ops.backend(ops.active_backend()), "has_attention", lambda _: False)(16):
        pytest.skip("this machine has no attention kernel")


@pytest.mark.parametrize("name", KERNEL)
def test_packed_rows_on_the_kernel(kernel, tiny, name):
    family, options = KERNEL[name]
    model = tiny(family, **options)
    with segment_attention(model):
        assert model.config._attn_implementation == attention.ROWS
    other = copy.deepcopy(model)
    alone, _ = alone_and_packed(other, some_rows())
    _, packed = alone_and_packed(model, some_rows())
    assert_same(packed.detach(), alone.detach())
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    (alone * weights).sum().backward()
    (packed * weights).sum().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-4 * float(b.grad.abs().max()), msg=name)


@pytest.mark.parametrize("name", KERNEL)
def test_a_padded_batch_on_the_kernel(kernel, tiny, batch, name):
    family, options = KERNEL[name]
    model = tiny(family, **options)
    ids, mask, _ = batch()
    assert check_rows(model, ids, mask) == ""
    other, kept = copy.deepcopy(model), mask.bool()
    expected = hidden_states(other, ids, mask)
    with segment_attention(model):
        found = hidden_states(model, ids, mask)
        assert_same(found[kept].detach(), expected[kept].detach())
        (found[kept] * torch.arange(found.shape[-1])).sum().backward()
    (expected[kept] * torch.arange(found.shape[-1])).sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-4 * float(b.grad.abs().max()))


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("llama", {}, "no kernel for heads of 8"), ("mistral", {"head_dim": 16, "sliding_window": 4}, "a window"),
        ("llama", {"head_dim": 16, "attention_dropout": 0.1}, "has dropout"), ("gemma2", {"head_dim": 16}, "a window|softcap"),
    ],
)  # fmt: skip
def test_other_attention_stays_the_models_own(kernel, tiny, batch, family, options, says):
    ids, mask, _ = batch()
    assert re.search(says, check_rows(tiny(family, **options), ids, mask))


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_packed_is_refused(tiny, family):
    options, reason = REFUSED[family]
    model = tiny(family, **options)
    with pytest.raises(ModelError, match=rf"cannot be trained with packing: .*{reason}.*packing=False"):
        check_packing(model, [row[0].tolist() for row in some_rows((20, 5))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_packing_accepts_what_can(tiny, dtype):
    for family, options in MODELS.values():
        model = tiny(family, dtype=dtype, **options).train()
        check_packing(model, [row[0].tolist() for row in some_rows((20, 5))])
        assert model.training


def test_a_convolution_that_runs_on_over_borders_is_refused(tiny):
    class Smear(nn.Module):
        """A layer that mixes in a little of the token before."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x_BTH):
            return self.inner(x_BTH) + 0.2 * F.pad(x_BTH, (0, 0, 1, 0))[:, :-1]

    model = tiny()
    model.model.layers[0].mlp = Smear(model.model.layers[0].mlp)
    with pytest.raises(ModelError, match="not the same packed as alone"):
        check_packing(model, [row[0].tolist() for row in some_rows((20, 5))])


def dense_varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What torch's documentation says of `varlen_attn`, by a dense mask: (T, heads, D), window (left, right) beside the token."""
    assert query.dim() == 3
    assert max_q == max_k == int(cu_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    row = torch.repeat_interleave(torch.arange(len(cu_q) - 1), cu_q.diff())
    at = torch.arange(len(query))
    left, right = window_size
    mask = (row[:, None] == row) & (at[:, None] + right >= at)
    if left >= 0:
        mask &= at[:, None] - left <= at
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_variable_length_kernel_gets_what_it_documents(tiny, monkeypatch, name):
    """CUDA's path with the kernel replaced by its documentation: shapes, scale, window and groups arrive as it wants them."""
    family, options = MODELS[name]
    calls = []
    monkeypatch.setattr(attention, "_takes_varlen", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: (calls.append(1), dense_varlen(*a, **k))[1])
    with torch.no_grad():
        alone, packed = alone_and_packed(tiny(family, **options), some_rows())
    assert len(calls) == 2
    assert_same(packed, alone)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_the_variable_length_kernel_on_a_gpu(tiny, monkeypatch, name):
    family, options = MODELS[name]
    model = tiny(family, **options).to("cuda", torch.bfloat16)
    rows = [row.cuda() for row in some_rows()]
    calls = []
    kernel = attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: (calls.append(1), kernel(*a, **k))[1])
    alone, packed = alone_and_packed(model, rows)
    assert calls
    assert ((packed - alone).float().norm() / alone.float().norm()) < 2e-2  # bfloat16 in another order
    packed.sum().backward()
