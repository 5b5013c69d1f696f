"""Plans of merge-aware runs. Oracles: torch's profiler on a real step; the run's own choice of what is held."""

import pytest
import torch
from pairwise import pairwise
from test_step import SIZES, TOLERANCE, measured, model_of, needs_kernel
from transformers import AutoConfig, T5Config

from lownibble.arch import paths, read_shape
from lownibble.config import LoraConfig, PlanConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.lora import add_lora
from lownibble.lora.inject import match_targets
from lownibble.lora.merge_aware import held_as
from lownibble.models.info import compute_again, info
from lownibble.models.load import quantizable
from lownibble.models.skeleton import empty_model
from lownibble.planning import hardware, plan
from lownibble.planning.memory import merge_aware, plan_memory
from lownibble.planning.step import Batch
from lownibble.quant import QuantLinear, quantize

QUANT = {
    "nf4": {}, "nf4, plain constants": {"double_quant": False}, "int4": {"quant_type": "int4"},
    "int3": {"quant_type": "int3", "block_size": 32}, "mixed": {"pattern": {"down_proj": {"quant_type": "int4"}}},
}  # fmt: skip


def merge_aware_model(config, quant, lora, dtype):
    model = model_of(config, "full").to(dtype)
    held = held_as(model, quant, match_targets(model, lora))
    for path, how in quantizable(model, held).items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        linear = getattr(owner, name)
        setattr(owner, name, QuantLinear(quantize(linear.weight.data.float(), how).with_dtype(dtype), linear.bias))
    info(model).merge_aware = quant
    return add_lora(model, lora)


@needs_kernel
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("name", "checkpointing", "dtype"), pairwise(list(QUANT), [False, True], [torch.float32, torch.bfloat16]), ids=str
)
def test_a_plan_has_the_bytes_of_the_real_step(name, checkpointing, dtype):
    """Weights, and the highest bytes of a step in which the packed weights are made."""
    quant, lora, batch = QuantConfig(**QUANT[name]), LoraConfig(), Batch(2, 64, 100)
    config = AutoConfig.for_model("llama", **SIZES)
    model = merge_aware_model(config, quant, lora, dtype)
    if checkpointing:
        compute_again(model)
    weights, peak = measured(model, batch, 2)
    shape = read_shape(config.to_dict())
    held, rounded = merge_aware(shape, quant, lora)
    train = TrainConfig(gradient_checkpointing=checkpointing, gradient_accumulation_steps=2, optim="adamw")
    found = plan_memory(
        shape, hardware.this_machine(), "qlora", quant=held, rounded=rounded, lora=lora, train=train, batch=batch,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    step = max(n for instant, n in found.instants.items() if instant != "update") - 2 * 4 * found.trained_parameters
    assert step == pytest.approx(weights + peak, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("quant", "targets"),
    [
        ({}, "all-linear"), ({"quant_type": "int4", "block_size": 32}, ["q_proj", "down_proj"]),
        ({"pattern": {"o_proj": {"quant_type": "int8", "block_size": "row"}}}, ["q_proj", "v_proj"]),
        ({"skip_modules": ["lm_head", "gate_proj"]}, "all-linear"),
    ],
)  # fmt: skip
def test_what_is_held_is_what_a_run_holds(quant, targets):
    config, quant, lora = (
        AutoConfig.for_model("llama", **SIZES).to_dict(),
        QuantConfig(**quant),
        LoraConfig(target_modules=targets),
    )
    check(config, quant, lora)


def test_layers_that_packed_checkpoints_hold_dense_are_not_rounded():
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    rounded = check(T5Config(**sizes, feed_forward_proj="gated-gelu").to_dict(), QuantConfig(), LoraConfig())
    assert {path.rpartition(".")[2] for path in rounded} == {"q", "k", "v", "o", "wi_0", "wi_1"}


def check(config, quant, lora):
    model = empty_model(config, torch.float32)
    theirs = held_as(model, quant, match_targets(model, lora))
    shape = read_shape(config)
    ours, rounded = merge_aware(shape, quant, lora)
    for path, _ in paths(shape):
        assert ours.for_layer(path) == theirs.for_layer(path).with_options(compute=ours.compute)
    return rounded


def test_it_takes_the_weights_of_8_bits_more_than_plain_qlora():
    options = {"gpu": "rtx-4090", "method": "qlora", "max_length": 64, "batch_size": 1}
    plain, aware = (plan.plan("llama-2-7b", merge_aware=on, **options).rows[0].verdict.memory for on in (False, True))
    n = sum(linear.in_features * linear.out_features for _, linear in paths(plan.find_shape("llama-2-7b")))
    assert aware.kinds["codes"] - plain.kinds["codes"] == n
    assert aware.kinds["constants"] - plain.kinds["constants"] == 4 * n / 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "all"}, "PlanConfig cannot be done with method 'all', which is of several. Use method qlora"),
        ({"method": "lora"}, "with method 'lora', which packs nothing"),
        ({"method": "qlora", "lora": LoraConfig(lora_dropout=0.1)}, "with lora_dropout 0.1"),
        ({"method": "qlora", "lora": LoraConfig(init_lora_weights="qera")}, "with init_lora_weights 'qera', which corrects"),
    ],
)
def test_what_merge_aware_training_is_not_for_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        PlanConfig(merge_aware=True, **options)


@pytest.mark.parametrize("options", [{"adapter_dtype": "bfloat16"}, {"use_dora": True}])
def test_what_the_planner_does_not_know_of_it_is_said(options):
    with pytest.raises(ConfigError, match="The planner knows merge-aware training of the families of its own tape"):
        plan.plan("llama-2-7b", gpu="rtx-4090", method="qlora", merge_aware=True, **options)
    with pytest.raises(ConfigError, match=r"holds 'model\.layers\.0\.mlp\.down_proj' in int8, and int8 is no coarser"):
        plan.plan("llama-2-7b", gpu="rtx-4090", method="qlora", merge_aware=True, quant_type="int8")


def test_the_plan_beside_a_run_is_of_the_same_bytes(tmp_path, monkeypatch):
    from tiny_folders import write_data, write_model

    from lownibble.memory import planned
    from lownibble.training.making import prepare

    model = str(write_model(tmp_path / "model"))
    lora, quant = LoraConfig(r=4), QuantConfig(block_size=32)
    train = TrainConfig(max_steps=2, batch_size=2, max_length=16)
    for dtype in ("float32", "bfloat16"):
        asked = RunConfig(
            model=model, data=str(write_data(tmp_path)), merge_aware=True, lora=lora, quant=quant, train=train, dtype=dtype
        )
        batch, found = planned.plan_of(prepare(asked)[0])
        shape = plan.find_shape(model)
        held, rounded = merge_aware(shape, quant, lora)
        assert found == plan_memory(
            shape, hardware.this_machine(), "qlora", quant=held, rounded=rounded, lora=lora, train=train, batch=batch, dtype=dtype
        )


def test_auto_is_planned_as_it_is_decided():
    options = {"gpu": "a100-80gb", "method": "qlora", "max_length": 512}

    def peak(**more):
        return plan.plan("llama-2-7b", **options, **more).rows[0].verdict.memory.to_dict()

    assert peak(init_lora_weights="auto") == peak(init_lora_weights="qera") != peak()
    assert peak(init_lora_weights="auto", merge_aware=True) == peak(merge_aware=True)
