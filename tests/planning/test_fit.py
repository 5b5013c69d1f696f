"""What fits, and what to take. Oracles: memories worked out by hand, and planning every value."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lownibble.config import LoraConfig, PlanConfig, QuantConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.planning import hardware
from lownibble.planning.fit import RELIEFS, judge, largest, recommend, reliefs
from lownibble.planning.memory import plan_memory
from lownibble.planning.models import find_shape
from lownibble.planning.plan import plan
from lownibble.planning.speed import HOST_BANDWIDTH, plan_speed

GIB = 2**30


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(1, 10**7), st.integers(1, 3), st.integers(3, 5000))
def test_the_largest_is_the_largest(start, slope, limit, least, most):
    found = largest(least, most, limit, lambda n: start + slope * n)
    best = max([n for n in range(least, most + 1) if start + slope * n <= limit], default=0)
    assert found <= best
    assert best - found <= found // 100


def test_steps_in_what_is_needed_do_not_mislead_the_search():
    assert largest(1, 1000, 5000, lambda n: 4000 if n < 37 else 6000) == 36


def device(gib):
    return dataclasses.replace(hardware.device("rtx-4090"), memory_bytes=int(gib * GIB))


def memory_of(method, train):
    """Llama-2-7B for real; the devices are made up."""
    return plan_memory(
        find_shape("smollm2-1.7b"), hardware.device("rtx-4090"), method, quant=QuantConfig(), lora=LoraConfig(), train=train
    )  # fmt: skip


@pytest.fixture(scope="module")
def needs():
    """Bytes that LoRA takes with each relief."""
    train = TrainConfig(batch_size=4)
    return {relief.words: memory_of("lora", options).device.high for relief, options in reliefs(train, offloads=True)}


@pytest.mark.parametrize("relief", RELIEFS, ids=lambda relief: relief.words)
def test_the_cheapest_relief_that_suffices_is_taken(needs, relief):
    cheaper = [n for words, n in needs.items() if words != relief.words and n <= needs[relief.words]]
    train = TrainConfig(batch_size=4)
    verdict = judge("lora", device(needs[relief.words] / GIB + 0.001), train, memory_of, offloads=True)
    assert verdict.fits
    assert verdict.memory.device.high <= verdict.device.memory_bytes
    order = [each.words for each in RELIEFS]
    assert order.index(verdict.words) <= order.index(relief.words) or cheaper


def test_what_does_not_fit_is_told_by_how_much(needs):
    least = min(needs.values())
    verdict = judge("lora", device((least - GIB) / GIB), TrainConfig(batch_size=4), memory_of, offloads=True)
    assert not verdict.fits
    assert verdict.over_bytes == pytest.approx(GIB, abs=2)
    assert verdict.words == "no: 1.0 GiB over"


def test_checkpoints_are_offloaded_only_where_they_can_be():
    asked = TrainConfig(gradient_checkpointing=True)
    assert [train.gradient_checkpointing for _, train in reliefs(asked)] == [True, True]
    assert [train.gradient_checkpointing for _, train in reliefs(asked, offloads=True)] == [True, True, "offload", "offload"]


def test_what_was_asked_for_is_not_given_up():
    options = [train for _, train in reliefs(TrainConfig(gradient_checkpointing=True, optim="paged_adamw_8bit"))]
    assert [(o.gradient_checkpointing, o.optim) for o in options] == [(True, "paged_adamw_8bit")]


@pytest.mark.parametrize(
    ("gpu", "method", "reason"),
    [
        ("h200", "lora", "LoRA fits as it is"),
        ("memory=12,bandwidth=500,tflops=50", "qlora", "QLoRA fits as is; LoRA needs"),
        ("memory=4,bandwidth=500,tflops=50", None, "Nothing fits. Nearest is qlora"),
    ],
)
def test_the_recommendation(gpu, method, reason):
    found = plan("llama-2-7b", gpu=gpu, batch_size=1)
    chosen, reasons = next(iter(found.advice.values()))
    assert chosen == method
    assert reasons[0].startswith(reason)


def test_every_rule_can_hold():
    class V:
        def __init__(self, words, checkpointed=False, over=0):
            self.fits, self.words, self.over_bytes, self.method = not words.startswith("no"), words, over, "qlora"
            self.train = TrainConfig(gradient_checkpointing=checkpointed)

    no, plain, paged, slow = V("no", over=5), V("fits"), V("fits with paging"), V("fits with checkpointing", True)
    cases = [
        ((no, plain, plain), "lora"), ((no, slow, plain), "qlora"), ((no, paged, slow), "lora"), ((no, no, slow), "qlora"),
        ((no, slow, slow), "lora"), ((no, no, no), None),
    ]  # fmt: skip
    for verdicts, method in cases:
        assert recommend(dict(zip(("full", "lora", "qlora"), verdicts, strict=True)))[0] == method


def test_a_plan_of_one_device_has_the_largest_batch_and_row():
    row = next(row for row in plan("smollm2-1.7b", gpu="t4", method="qlora", batch_size=2, max_length=256).rows)
    for option, value in (("batch_size", row.largest_batch_size), ("max_length", row.largest_max_length)):
        same = {"batch_size": 2, "max_length": 256, "gradient_checkpointing": row.verdict.train.gradient_checkpointing}
        at = plan("smollm2-1.7b", gpu="t4,t4", method="qlora", **{**same, option: value}).rows[0].verdict
        over = plan("smollm2-1.7b", gpu="t4,t4", method="qlora", **{**same, option: int(1.05 * value) + 1}).rows[0].verdict
        assert at.words == "fits"
        assert over.words != "fits"


def test_speed_hours_and_dollars():
    found = plan("llama-2-7b", gpu="a100-80gb", method="lora", batch_size=4, tokens=10**7, price=2.0).rows[0].speed
    assert found.tokens == 4 * 512
    assert found.step_s.low < found.step_s.likely < found.step_s.high
    assert found.tokens_per_s.likely == pytest.approx(found.tokens / found.step_s.likely)
    assert found.hours.likely == pytest.approx(10**7 / found.tokens_per_s.likely / 3600)
    assert found.dollars.likely == pytest.approx(2 * found.hours.likely)
    least = 4 * 512 * 4 * 6.6e9 / 312e12  # two for each weight, forward and backward, at the peak
    assert found.step_s.low > least


def test_options_find_their_group_and_unknown_ones_are_named():
    assert plan("demo", gpu="t4", r=4, quant_type="fp4", max_length=64).config.lora.r == 4
    with pytest.raises(ConfigError, match="PlanConfig has no option 'max_lenght'"):
        plan("demo", gpu="t4", max_lenght=64)
    with pytest.raises(ConfigError, match="'gpu' of PlanConfig must name a device"):
        plan(PlanConfig(gpu=","))


def test_a_plan_is_json():
    import json

    found = json.loads(json.dumps(plan("demo", gpu="t4,a100-40gb", tokens=1000).to_dict(), allow_nan=False))
    assert [row["device"] for row in found["rows"]] == ["t4"] * 3 + ["a100-40gb"] * 3
    assert found["rows"][0]["memory"]["allocated_bytes"]["likely"] > 0
    assert set(found["sources"]["t4"]) >= {"memory", "bandwidth", "tflops"}


def test_a_long_row_fits_with_offloaded_checkpoints():
    """Pinned memory for 32 layers' inputs, 2^30 bytes each; their copies hide behind the computation."""
    found = plan("llama-3-8b", gpu="rtx-4090", method="qlora", batch_size=1, max_length=131072).rows[0]
    assert found.verdict.words == "fits with offloaded checkpoints"
    assert found.verdict.memory.host_bytes == found.verdict.to_dict()["memory"]["host_bytes"] == 32 * 2**30
    on_device = plan("llama-3-8b", gpu="h200", method="qlora", batch_size=1, max_length=131072, gradient_checkpointing=True)
    assert on_device.rows[0].verdict.words == "fits with checkpointing"
    assert on_device.rows[0].verdict.memory.host_bytes == 0


def test_copies_that_take_longer_than_the_step_are_its_time():
    shape, device = find_shape("llama-3-8b"), hardware.device("rtx-4090")
    train = TrainConfig(batch_size=1, max_length=4096, gradient_checkpointing="offload", gradient_accumulation_steps=2)
    memory = plan_memory(shape, device, "qlora", quant=QuantConfig(), lora=LoraConfig(), train=train)
    assert memory.host_bytes == 32 * 2 * 4096 * 4096
    hidden = plan_speed(shape, device, "qlora", train, memory)
    fast = plan_speed(shape, dataclasses.replace(device, flops=1e18, bandwidth=1e18), "qlora", train, memory)
    plain = plan_speed(shape, device, "qlora", train, dataclasses.replace(memory, host_bytes=0))
    assert hidden == plain
    assert fast.step_s.likely == pytest.approx(2 * 2 * 32 * 2**25 / HOST_BANDWIDTH)


@pytest.mark.parametrize(("model", "gpu", "why"), [("demo", "cpu", "a CPU has no other memory"), ("t5-base", "t4", "an encoder")])
def test_what_cannot_be_offloaded_is_refused_and_not_tried(model, gpu, why):
    with pytest.raises(ConfigError, match=rf"offloaded checkpoints: .*{why}\. Use --gradient-checkpointing true"):
        plan(model, gpu=gpu, method="lora", gradient_checkpointing="offload")
    assert plan(model, gpu=gpu, method="lora", batch_size=10**5).rows[0].verdict.words.startswith("no:")
