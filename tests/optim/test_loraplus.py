"""LoRA+. Oracle: PEFT's `create_loraplus_optimizer` with torch's AdamW: parameter groups, and losses over some steps."""

import pytest
import torch
from torch import nn

import lownibble as ln
from lownibble.config import CompareConfig, LoraConfig, PlanConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.lora import lora_layers
from lownibble.optim import OptimizerSpec, close_states, make_optimizer, set_learning_rate
from lownibble.registry import OPTIMIZERS
from lownibble.training.loop import Trainer

RATE, RATIO = 2e-3, 16.0
CASES = {
    "matrices": ({}, 0.1),
    "biases": ({"bias": "all"}, 0.1),
    "dora, copies": ({"use_dora": True, "modules_to_save": ["lm_head", "norm"]}, 0.0),
}
"""LoRA options, and the weight decay: PEFT decays magnitudes and RMS norms, too."""


def fast_of(model):
    return [p for name, p in model.named_parameters() if name.endswith(".lora_B")]


def losses(model, optimizer, batches):
    found = []
    model.train()
    for ids, mask, labels in batches:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def kinds_of(optimizer, decay):
    """(rate, weight decay, shape) of every parameter; without decay, none."""
    return sorted(
        (group["lr"], group["weight_decay"] if decay else 0, tuple(parameter.shape))
        for group in optimizer.param_groups for parameter in group["params"]
    )  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw", "paged_adamw"])
@pytest.mark.parametrize("case", CASES)
def test_groups_and_losses_are_pefts(peft, tiny, batch, clone, case, optim):
    from peft.optimizers import create_loraplus_optimizer

    options, decay = CASES[case]
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    base = tiny(attention_bias=True, tie_word_embeddings=False)
    torch.manual_seed(0)  # PEFT's start
    theirs, ours = peft.get_peft_model(clone(base), peft.LoraConfig(**options)), ln.add_lora(clone(base), LoraConfig(**options))
    for path, layer in lora_layers(ours, "default"):
        layer.adapter("default").lora_A.data.copy_(theirs.base_model.model.get_submodule(path).lora_A["default"].weight)
        layer.adapter("default").scale = theirs.base_model.model.get_submodule(path).scaling["default"]
    optimizers = (
        create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=decay),
        make_optimizer(optim, ours.parameters(), RATE, decay, fast=fast_of(ours), ratio=RATIO),
    )
    held = [kinds_of(optimizer, decay) for optimizer in optimizers]
    assert held[0] == held[1]
    batches = [batch(seed) for seed in range(8)]
    expected = losses(theirs, optimizers[0], batches)
    assert losses(ours, optimizers[1], batches) == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == len(expected)  # steps were taken
    close_states(optimizers[1])


def test_the_schedule_keeps_the_ratio():
    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]
    optimizer = make_optimizer("adamw", parameters, RATE, 0.1, fast=parameters[1:2], ratio=RATIO)
    set_learning_rate(optimizer, 1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 1e-4 * RATIO, 1e-4 * RATIO]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    plain = make_optimizer("adamw", parameters, RATE, 0.1)
    assert [(group["lr"], len(group["params"])) for group in plain.param_groups] == [(RATE, 2), (RATE, 1)]


def test_an_optimiser_that_joins_its_groups_is_refused(monkeypatch):
    def build(groups, paging):
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=groups[0]["lr"])

    monkeypatch.setitem(OPTIMIZERS._entries, "joined", OptimizerSpec(build, lambda n, itemsize: 0))
    parameters = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 3))]
    assert make_optimizer("joined", parameters, RATE, 0.0)
    with pytest.raises(ConfigError, match=r"needs an optimiser that keeps parameter groups apart\. Got optim='joined'"):
        make_optimizer("joined", parameters, RATE, 0.0, fast=parameters[1:], ratio=RATIO)


@pytest.mark.parametrize(
    "make",
    [
        lambda train: RunConfig(method="full", train=train), lambda train: PlanConfig(method="full", train=train),
        lambda train: CompareConfig(methods=["lora", "full"], train=train),
    ],
)  # fmt: skip
def test_full_fine_tuning_refuses_it(make):
    with pytest.raises(ConfigError, match=r"'loraplus_lr_ratio' of TrainConfig is for adapters\. Got method 'full'"):
        make(TrainConfig(loraplus_lr_ratio=RATIO))


def test_a_model_without_adapters_refuses_it(tiny, tokenizer):
    with pytest.raises(ConfigError, match=r"is for adapters\. Got a model without one\. Leave it out, or call add_lora"):
        Trainer(tiny(), tokenizer, [], [], TrainConfig(loraplus_lr_ratio=RATIO))
