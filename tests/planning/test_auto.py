"""`--parallel auto`. Oracles: what `plan` marks, and what `train` refuses to shard; arithmetic on the plan's interval."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from lownibble.config import LoraConfig, PlanConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.planning import hardware
from lownibble.planning.plan import plan
from lownibble.training import sharding

NOT_ON_SHARDS = {
    "dpo": {"method": "lora", "train": {"objective": "dpo"}}, "orpo": {"method": "lora", "train": {"objective": "orpo"}},
    "kto": {"method": "full", "train": {"objective": "kto"}}, "merge-aware": {"method": "qlora", "merge_aware": True},
    "graphs": {"method": "lora", "train": {"cuda_graphs": True}},
    "offloaded checkpoints": {"method": "lora", "train": {"gradient_checkpointing": "offload"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("memory_bytes", "shards_packed", "mode"), [(1 << 40, False, "ddp"), (1, True, "fsdp"), (1, False, "ddp")]
)
def test_auto_says_why_a_run_that_does_not_fit_is_not_sharded(monkeypatch, memory_bytes, shards_packed, mode):
    here = dataclasses.replace(hardware.this_machine(), memory_bytes=memory_bytes)
    monkeypatch.setattr(sharding, "device_of", lambda _: here)
    monkeypatch.setattr(sharding, "SHARDS_PACKED", shards_packed)
    said = pytest.warns(UserWarning, match=r"does not fit a device, and it cannot be sharded: parallel='fsdp' .* packed weights")
    with said if (memory_bytes, mode) == (1, "ddp") else nullcontext():
        assert sharding.mode_of(RunConfig(model="demo", method="qlora"), torch.device("cpu"), 2) == mode


def options_of(case):
    return {**NOT_ON_SHARDS[case], "train": TrainConfig(batch_size=4, **NOT_ON_SHARDS[case].get("train", {}))}


@pytest.mark.parametrize("case", NOT_ON_SHARDS)
def test_what_train_refuses_to_shard_is_not_planned_and_not_taken(monkeypatch, case):
    options = options_of(case)
    with pytest.raises(ConfigError, match="parallel='fsdp' cannot be done with"):
        sharding.check(RunConfig(model="demo", **options))
    found = plan(PlanConfig(model="llama-3-8b", gpu="rtx-4090", gpus=[2], **options))
    assert {row.ranks.parallel for row in found.rows} == {"ddp"}
    assert "it does not go with" in found.refused["fsdp"]
    monkeypatch.setattr(sharding, "device_of", lambda _: dataclasses.replace(hardware.device("t4"), memory_bytes=1))
    with pytest.warns(UserWarning, match="does not fit a device, and it cannot be sharded: parallel='fsdp' cannot be done with"):
        assert sharding.mode_of(RunConfig(model="demo", **options), torch.device("cuda"), 2) == "ddp"


def test_parts_that_cut_blocks_of_8_bit_moments_are_not_planned_and_not_taken(monkeypatch):
    """As `sharding.check_blocks`, which sees the tensors once they are loaded: 6 parts of 4096 x 16 begin within a block."""
    config = PlanConfig(
        model="llama-3-8b", gpu="rtx-4090", gpus=[4, 6], method="lora", train=TrainConfig(batch_size=12, optim="adamw_8bit")
    )
    found = plan(config)
    assert [(row.ranks.gpus, row.ranks.parallel) for row in found.rows] == [(4, "ddp"), (4, "fsdp"), (6, "ddp")]
    assert found.refused["fsdp"].startswith("6 processes would cut blocks of adamw_8bit's moments")
    with pytest.raises(ConfigError, match="6 processes would cut blocks"):
        plan(config.with_options(train=config.train.with_options(parallel="fsdp")))
    monkeypatch.setattr(sharding, "device_of", lambda _: dataclasses.replace(hardware.device("t4"), memory_bytes=1 << 33))
    run = RunConfig(model="llama-3-8b", method="lora", train=config.train)
    assert sharding.mode_of(run, torch.device("cuda"), 4) == "fsdp"
    with pytest.warns(UserWarning, match="cannot be sharded: 6 processes would cut blocks"):
        assert sharding.mode_of(run, torch.device("cuda"), 6) == "ddp"


def test_biases_are_not_trained_on_shards():
    with pytest.raises(ConfigError, match="parallel='fsdp' cannot be done with bias='all'"):
        sharding.check(RunConfig(model="demo", lora=LoraConfig(bias="all")))


def test_merge_aware_training_is_not_planned_with_fsdp():
    with pytest.raises(ConfigError, match="cannot be planned with fsdp: it does not go with merge_aware"):
        plan("demo", gpu="t4", gpus=[2], method="qlora", merge_aware=True, parallel="fsdp", batch_size=4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("qlora", {"batch_size": 10}), ("qlora", {"batch_size": 14}), ("qlora", {"batch_size": 18}),
        ("qlora", {"batch_size": 10, "torch_compile": False}), ("qlora", {"batch_size": 8, "torch_compile": False}),
        ("qlora", {"batch_size": 10, "gradient_checkpointing": True}), ("lora", {"batch_size": 2}),
        ("qlora", {"batch_size": 2, "optim": "paged_adamw"}),
    ],
)  # fmt: skip
def test_train_takes_what_the_plan_marks(monkeypatch, method, options):
    device = hardware.device("rtx-4090")
    monkeypatch.setattr(sharding, "device_of", lambda _: device)
    train = TrainConfig(max_length=512, **options)
    rows = plan(PlanConfig(model="llama-3-8b", gpu="rtx-4090", gpus=[2], method=method, train=train)).rows
    ddp = next(row.verdict for row in rows if row.ranks.parallel == "ddp")
    as_given = (ddp.train.optim, ddp.train.gradient_checkpointing) == (train.optim, train.gradient_checkpointing)
    fits = as_given and ddp.memory.device.high <= device.memory_bytes
    assert [row.ranks.parallel for row in rows if row.ranks.is_auto] == ["ddp" if fits else "fsdp"]
    config = RunConfig(model="llama-3-8b", method=method, train=train)
    if not fits and method == "qlora" and not sharding.SHARDS_PACKED:  # of which the plan knows nothing
        with pytest.warns(UserWarning, match="Use torch 2.12 or later"):
            assert sharding.mode_of(config, torch.device("cuda"), 2) == "ddp"
        return
    assert sharding.mode_of(config, torch.device("cuda"), 2) == ("ddp" if fits else "fsdp")
