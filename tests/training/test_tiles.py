"""Modules in tiles of tokens. Oracles: the same step whole; autograd through the tiles' outputs put together; counted calls."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lownibble.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lownibble.data import Batch
from lownibble.lora import add_lora
from lownibble.models.info import compute_again
from lownibble.planning import tiles as lengths
from lownibble.training import run
from lownibble.training.loss import label_loss
from lownibble.training.passes import Passes
from lownibble.training.tiles import Tiled, _in_tiles

IDS = torch.arange(3, 30)


@pytest.fixture
def short_tiles(monkeypatch):
    """Tiles of at most 5 tokens in runs whose largest microbatch has more than 10."""
    monkeypatch.setattr(lengths, "TILE_TOKENS", 5)
    monkeypatch.setattr(lengths, "LONG_TOKENS", 10)


@pytest.fixture
def adapted(tiny):
    def make(family="llama", trained="lora", dropout=0.0, **options):
        torch.manual_seed(1)
        model = tiny(family, **options)
        if trained == "full":
            return model.requires_grad_(True).train()
        model = add_lora(model, LoraConfig(r=4, lora_dropout=dropout)).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        return model

    return make


def checkpoint(model):
    compute_again(model)
    return model


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("tokens", [1, 4096, 4097, 16384, 16385, 131072, 131071])
def test_tiles_are_equal_and_together_the_batch(tokens):
    found = lengths.tile_lengths(tokens)
    assert sum(found) == tokens
    assert max(found) - min(found) <= 1
    assert (len(found) == 1) == (tokens <= 4096)
    assert found[0] <= 4096
    assert lengths.is_long(tokens) == (tokens > 16384)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi"])
def test_the_step_is_the_whole_one_but_for_rounding(family, trained, short_tiles, adapted, batch):
    whole, model = (checkpoint(adapted(family, trained)) for _ in range(2))
    expected = label_loss(whole, *batch())
    expected.backward()
    with Tiled(model, IDS)():
        found = label_loss(model, *batch())
        found.backward()
    assert torch.allclose(found, expected, rtol=1e-5)
    assert float((gradients(model) - gradients(whole)).norm() / gradients(whole).norm()) < 1e-5
    assert all("forward" not in vars(module) for module in model.modules()), "the model is as it came"


def test_norms_and_mlp_run_in_tiles_and_attention_does_not(adapted):
    found = Tiled(adapted(), IDS)
    assert sorted(found.modules) == ["input_layernorm", "mlp", "norm", "post_attention_layernorm"]
    assert [len(found.modules[name]) for name in sorted(found.modules)] == [2, 2, 1, 2]
    assert "self_attn" in found.untiled


def test_mixtures_of_experts_are_left_whole(adapted):
    found = Tiled(adapted("mixtral", num_local_experts=4, sliding_window=None), IDS)
    assert "mlp" not in found.modules
    assert "mixture of experts" in found.untiled["mlp"]
    assert "input_layernorm" in found.modules


def test_what_reads_other_tokens_is_found_out(adapted):
    class Mixes(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x + x.roll(1, 1))

    model = adapted()
    model.model.layers[1].mlp = Mixes(model.model.layers[1].mlp)
    found = Tiled(model, IDS)
    assert found.untiled["mlp"] == "its output for a token depends on other tokens"
    assert "mlp" not in found.modules
    assert "norm" in found.modules


def test_dropout_is_drawn_again_in_backward(short_tiles, adapted):
    """Gradients are those of autograd through the tiles' outputs, for the masks that were drawn forward."""
    found = []
    for tiled in (True, False):
        mlp = adapted(dropout=0.5).model.layers[0].mlp
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(5)
        if tiled:
            out = _in_tiles(mlp, lambda tile, _, run=mlp.forward: run(tile), x)
        else:
            parts = x.reshape(1, 18, 32).split(lengths.tile_lengths(18), 1)
            out = torch.cat([mlp(part) for part in parts], 1).view_as(x)
        drawn = torch.rand(3)
        torch.manual_seed(6)
        (out * torch.randn_like(out)).sum().backward()
        found.append([out.detach(), x.grad, drawn, torch.rand(3), *[p.grad for p in mlp.parameters() if p.requires_grad]])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_autocast_is_that_of_the_forward_pass(short_tiles, adapted):
    found = []
    for tiled in (True, False):
        mlp = adapted(trained="full").model.layers[0].mlp
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = _in_tiles(mlp, lambda tile, _, run=mlp.forward: run(tile), x) if tiled else mlp(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        found.append([out.detach().float(), x.grad, *[p.grad for p in mlp.parameters()]])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


@pytest.mark.parametrize(("family", "times"), [("llama", 2), ("gemma2", 3)])
def test_under_a_checkpoint_an_mlp_runs_forward_as_often_as_said(family, times, short_tiles, adapted, batch):
    model = checkpoint(adapted(family))
    tiles, calls = len(lengths.tile_lengths(18)), []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    with Tiled(model, IDS)():
        calls.clear()
        label_loss(model, *batch()).backward()
    assert len(calls) == times * tiles


@pytest.mark.parametrize("method", ["qlora", "full"])
@pytest.mark.parametrize("packing", [False, True])
def test_long_batches_of_a_run_are_tiled(packing, method, tiny_model, tiny_data, short_tiles, monkeypatch):
    def losses():
        options = {"max_steps": 4, "batch_size": 2 if packing else 6, "max_length": 32, "packing": packing, "learning_rate": 1e-2}
        return run(RunConfig(
            model=str(tiny_model), method=method, data=DataConfig(path=str(tiny_data)), lora=LoraConfig(r=4),
            train=TrainConfig(gradient_checkpointing=True, **options),
        ))  # fmt: skip

    tiled = losses()
    monkeypatch.setattr(lengths, "LONG_TOKENS", 10**9)
    whole = losses()
    assert tiled.losses == pytest.approx(whole.losses, rel=1e-4)
    assert tiled.record["speed"]["tiled"] == ["input_layernorm", "mlp", "norm", "post_attention_layernorm"]
    assert "self_attn" in tiled.record["speed"]["untiled"]
    assert whole.record["speed"]["tiled"] is None


def test_a_run_of_long_batches_tiles_the_shorter_ones_too_and_compiles_none_of_them(tiny_model, tiny_data, short_tiles):
    options = {"max_steps": 2, "batch_size": 6, "max_length": 32, "torch_compile": True, "gradient_checkpointing": True}
    result = run(RunConfig(
        model=str(tiny_model), method="qlora", data=DataConfig(path=str(tiny_data)), lora=LoraConfig(r=4),
        train=TrainConfig(**options),
    ))  # fmt: skip
    assert result.record["speed"]["compiled"] is False
    assert "run in tiles of tokens" in result.record["speed"]["compile_reason"]
    micro = SimpleNamespace(whole=11, pack_to=None, computed=lambda batch: batch.input_ids.numel())
    passes = Passes(result.model, micro, torch.device("cpu"), None)
    passes._checkpointing = True
    batch = Batch(*[torch.ones(1, 6, dtype=torch.int64)] * 3)
    assert passes._runs_in_tiles(batch), "longer than a tile of 5 tokens, in a run whose largest batch is long"
    micro.whole = 10
    assert not passes._runs_in_tiles(batch)
