"""The chunked loss. Oracle: `torch.nn.functional.cross_entropy` on the model's own full logits."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lownibble as ln
from lownibble.errors import ModelError
from lownibble.models.head import Head, check_head, hidden_states
from lownibble.quant import QuantLinear
from lownibble.training import loss as loss_module
from lownibble.training.loss import label_loss, token_losses

MODELS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"final_logit_softcapping": 2.0, "tie_word_embeddings": True}),
    "gemma2 without cap": ("gemma2", {"final_logit_softcapping": None}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "phi": ("phi", {}),
}
"""Softcapped, divided, multiplied, tied, and a head with a bias."""

TOLERANCE = {torch.float32: (1e-5, 3e-4), torch.bfloat16: (2e-2, 0.1)}
"""(relative of the loss, of a gradient's largest entry): float32, sums in another order, whose errors grow
through two layers of backward; bf16 rounds 8 bits in every layer, and
the two ways round the gradient of the logits at different places."""


def oracle(model, ids, mask, labels, n_total=None):
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    total = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    return total / (n_total or int((labels[:, 1:] != -100).sum()))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def full(model):
    return model.requires_grad_(True)


def head_only(model):
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    return model


def embeddings_only(model):
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


def lora(model, **options):
    return ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights=False, **options))


def quantised_head(model):
    model.lm_head = QuantLinear.from_linear(model.lm_head)
    return lora(model)


TRAINED = {
    "everything": full,
    "head": head_only,
    "embeddings": embeddings_only,
    "lora": lora,
    "lora on the head": lambda model: lora(model, target_modules=["lm_head", "o_proj"]),
    "lora on the head only": lambda model: lora(model, target_modules=["lm_head"]),
    "head copied": lambda model: lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "all copied": lambda model: lora(model, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "quantised head": quantised_head,
}


def assert_same(model, dtype, ours, theirs):
    (loss, found), (expected_loss, expected) = ours, theirs
    relative, of_largest = TOLERANCE[dtype]
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=relative)
    assert found.keys() == expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        atol = of_largest * float(gradient.abs().max())
        torch.testing.assert_close(
            found[name].float(), gradient.float(), rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def compare(model, batch, dtype=torch.float32):
    ids, mask, labels = batch(rows=3)
    expected_loss = oracle(model, ids, mask, labels)
    expected = gradients(model, expected_loss)
    loss = label_loss(model, ids, mask, labels)
    assert_same(model, dtype, (loss, gradients(model, loss)), (expected_loss, expected))


@pytest.mark.parametrize("chunk", ["whole", "small"])
@pytest.mark.parametrize("trained", ["everything", "head", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradients(tiny, batch, monkeypatch, name, trained, chunk):
    if chunk == "small":
        monkeypatch.setattr(loss_module, "_chunk_tokens", lambda row_bytes, device: 4)  # 17 labels: 4 chunks and a short one
    family, options = MODELS[name]
    compare(TRAINED[trained](tiny(family, **options)), batch)


@pytest.mark.parametrize(
    ("trained", "tied"), [(what, tied) for what in TRAINED for tied in (False, True) if not (tied and what == "quantised head")]
)  # fmt: skip
def test_what_is_trained(tiny, batch, trained, tied):
    with loss_module.chunks_of(1):  # the least: 16 tokens of 17
        compare(TRAINED[trained](tiny(tie_word_embeddings=tied)), batch)


def test_a_head_that_lies_transposed(tiny, batch):
    """Its gradient is summed up in one that does not."""
    model = full(tiny(hidden_size=64))
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().t().contiguous().t())
    assert not head.weight.is_contiguous()
    compare(model, batch)


@pytest.mark.parametrize("trained", ["everything", "lora", "lora on the head", "head copied"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "gemma2"])
def test_bfloat16(tiny, batch, name, trained):
    family, options = MODELS[name]
    compare(TRAINED[trained](tiny(family, dtype=torch.bfloat16, **options)), batch, torch.bfloat16)


def test_gradients_of_bfloat16_are_as_good_as_the_plain_ones(tiny, batch):
    """Against float32 on the same weights, the chunked loss is no further away than bf16 autograd is."""
    model = full(tiny(dtype=torch.bfloat16))
    ids, mask, labels = batch(rows=3)
    exact_model = copy.deepcopy(model).float()
    exact = gradients(exact_model, oracle(exact_model, ids, mask, labels))
    plain = gradients(model, oracle(model, ids, mask, labels))
    ours = gradients(model, label_loss(model, ids, mask, labels))
    errors = [sum(float((g[k].float() - exact[k]).square().sum()) for k in exact) ** 0.5 for g in (ours, plain)]
    assert errors[0] <= 1.2 * errors[1]


def test_accumulated_batches_are_one_mean_over_tokens(tiny, batch):
    """Rows with different numbers of labels: the gradients of parts add up to the gradient of the whole."""
    model = full(tiny())
    ids, mask, labels = batch(rows=4)
    labels[0, :6] = -100
    total = int((labels[:, 1:] != -100).sum())
    expected_loss = oracle(model, ids, mask, labels)
    expected = gradients(model, expected_loss)
    model.zero_grad()
    parts = [label_loss(model, ids[i : i + 1], mask[i : i + 1], labels[i : i + 1], total) for i in range(4)]
    for part in parts:
        part.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_same(model, torch.float32, (sum(parts), found), (expected_loss, expected))


def test_a_part_without_labels_counts_nothing(tiny, batch):
    model = full(tiny())
    ids, mask, labels = batch()
    loss = label_loss(model, ids, mask, torch.full_like(labels, -100), n_total=5)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_loss_can_be_scaled_before_backward(tiny, batch):
    model = full(tiny())
    arguments = batch()
    plain = gradients(model, label_loss(model, *arguments))
    scaled = gradients(model, label_loss(model, *arguments) * 3)
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name], 3 * gradient)


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_padding(tiny, batch, side):
    """Rows alone, without padding, are the oracle."""
    model = full(tiny())
    ids, _, labels = batch(rows=2, length=7)
    labels[:, 1:] = ids[:, 1:]
    pad = torch.zeros(2, 0 if side == "none" else 3, dtype=torch.int64)
    parts = (lambda a, b: (b, a)) if side == "left" else (lambda a, b: (a, b))
    padded = [torch.cat(parts(t, pad + fill), 1) for t, fill in ((ids, 0), (torch.ones_like(ids), 0), (labels, -100))]
    expected = oracle(model, ids, torch.ones_like(ids), labels)
    assert label_loss(model, *padded).item() == pytest.approx(expected.item(), rel=TOLERANCE[torch.float32][0])


def test_extreme_logits(tiny, batch):
    """Logits in the hundreds: no overflow, and the gradient of a certain answer is zero."""
    model = full(tiny())
    model.lm_head.weight.data *= 500
    compare(model, batch)


def test_without_gradient_nothing_is_kept(tiny, batch):
    model = full(tiny())
    ids, mask, labels = batch()
    with torch.no_grad():
        loss = label_loss(model, ids, mask, labels)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(oracle(model, ids, mask, labels).item(), rel=1e-5)


@pytest.mark.parametrize("plain", [True, False])
def test_full_logits_never_exist(tiny, batch, monkeypatch, plain):
    monkeypatch.setattr(loss_module, "_chunk_tokens", lambda row_bytes, device: 5)
    model, largest = full(tiny()), 0
    if not plain:
        monkeypatch.setattr(Head, "_plain", lambda *_: None)

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if "mm" in func.name() and out.shape[1] == model.config.vocab_size:
                largest = max(largest, len(out))
            return out

    with Largest():
        label_loss(model, *batch(rows=3)).backward()
    assert largest == 5


def test_a_plain_head_has_the_gradients_of_any_head(tiny, batch, monkeypatch):
    monkeypatch.setattr(loss_module, "_chunk_tokens", lambda row_bytes, device: 5)
    model, arguments = full(tiny()), batch(rows=3)
    plain = gradients(model, label_loss(model, *arguments))
    monkeypatch.setattr(Head, "_plain", lambda *_: None)
    for name, gradient in gradients(model, label_loss(model, *arguments)).items():
        torch.testing.assert_close(plain[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_token_losses(tiny, batch, monkeypatch, name):
    monkeypatch.setattr(loss_module, "_chunk_tokens", lambda row_bytes, device: 4)
    family, options = MODELS[name]
    model = tiny(family, **options)
    ids, mask, _ = batch()
    mask[:] = 1
    hidden = hidden_states(model, ids, mask)[:, :-1].flatten(0, 1)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(token_losses(Head(model), hidden, ids[:, 1:].flatten()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_check_head_accepts_what_is_known(tiny, name, dtype):
    family, options = MODELS[name]
    model = tiny(family, dtype=dtype, **options).train()
    check_head(model)
    check_head(lora(model))
    assert model.training


CHANGES = {"shift": lambda y: y + 1, "scale": lambda y: y * 1.01, "cap": torch.tanh, "order": lambda y: y.flip(-1)}


@pytest.mark.parametrize("case", CHANGES)
def test_check_head_refuses_what_is_not(tiny, case):
    model, change = tiny(), CHANGES[case]
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", change(output.logits)))
    with pytest.raises(ModelError, match="LlamaForCausalLM changes its logits in a way that is not known"):
        check_head(model)


def test_a_model_without_a_head(tiny):
    with pytest.raises(ModelError, match="LlamaModel has no output embeddings"):
        Head(tiny().model)
