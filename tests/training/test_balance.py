"""The auxiliary load-balancing loss of mixtures. Oracle: transformers' loss with `output_router_logits`."""

import pytest
import torch
from mixtures import folder_of, some_ids, theirs

import lownibble as ln
from lownibble.errors import ConfigError
from lownibble.training import balance
from lownibble.training.loss import label_loss


def padded():
    ids = some_ids()
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("pad", [False, True])
def test_loss_and_gradients_are_transformers(kind, pad, tokenizer, tmp_path):
    model = theirs(folder_of(kind, tmp_path / "model", tokenizer))
    ids, mask, labels = padded() if pad else (some_ids(), torch.ones_like(some_ids()), some_ids())
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.3
    output = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True, use_cache=False)
    assert output.aux_loss > 0.1
    output.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    balance.set_up(model, 0.3)
    loss = label_loss(model, ids, mask, labels)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(output.loss.detach()), rel=1e-5)
    routers = [name for name in expected if name.endswith(("gate.weight", "router.weight"))]
    assert routers
    for name in routers:
        torch.testing.assert_close(model.get_parameter(name).grad, expected[name], rtol=1e-3, atol=1e-6)


def test_it_is_what_the_configuration_asks_for(tokenizer, tmp_path):
    model = theirs(folder_of("mixtral", tmp_path / "model", tokenizer))
    assert not balance.set_up(model, None), "transformers' default is off"
    model.config.output_router_logits = True
    assert balance.set_up(model, None)
    assert not balance.set_up(model, 0.0)


def test_a_model_without_it_is_refused(tokenizer, tmp_path, tiny):
    for model in (tiny(), theirs(folder_of("glm4_moe", tmp_path / "model", tokenizer))):
        with pytest.raises(ConfigError, match=r"'router_aux_loss_coef' is for mixtures .* has none. Leave it out"):
            balance.of(model, 0.01)


@pytest.mark.parametrize("train_router", [False, True])
def test_a_run_trains_with_it_and_with_the_router_as_asked(train_router, tokenizer, tmp_path, rows_of):
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    first = {}
    for coefficient in (None, 0.5):
        model, loaded = ln.load(str(folder), quant="nf4")
        ln.add_lora(model, ln.LoraConfig(r=2, modules_to_save=["mlp.gate"] if train_router else []))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and ".gate." in name}
        assert bool(before) is train_router
        config = ln.TrainConfig(max_steps=3, batch_size=2, max_length=24, learning_rate=1e-2, router_aux_loss_coef=coefficient)
        result = ln.train(model, loaded, rows_of(12), config)
        first[coefficient] = result.losses[0]
        assert all(not torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert first[0.5] > first[None] + 0.3
