"""Plans of one of several ranks. Oracles: arithmetic by hand, and torch's fully_shard on a process group that moves nothing."""

import dataclasses
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_step import SIZES, as_trained, evenly, needs_kernel, packed, peak_of_events
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from lownibble.arch import all_paths, read_shape
from lownibble.config import LoraConfig, QuantConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.kernels.decoded import release_scratch
from lownibble.lora import add_lora
from lownibble.models.attention import kernel_obstacle, segment_attention
from lownibble.models.info import compute_again
from lownibble.planning import hardware
from lownibble.planning.exchange import BUFFER_BYTES, REACHED, Exchange, link_of
from lownibble.planning.linear import Method, Runtime
from lownibble.planning.memory import plan_memory
from lownibble.planning.models import find_shape
from lownibble.planning.plan import plan
from lownibble.planning.show import tables
from lownibble.planning.speed import HOST_MEMORY, plan_speed
from lownibble.planning.step import Batch, run_step
from lownibble.quant.experts import Ends
from lownibble.training.distributed import Ranks
from lownibble.training.loss import loss_at
from lownibble.training.sharding import SHARDS_PACKED, prefetch, rest_gathered

TINY = read_shape({
    "model_type": "llama", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 50,
})  # fmt: skip
CPU, H100 = hardware.device("cpu"), hardware.device("h100")
BUFFERS = 2 * 3 * 4
"""Bytes of the two tables of frequencies, of half a head each; every rank has them."""


def memory(shape, device, method, parallel=None, ranks=1, **options):
    train = TrainConfig(**{"batch_size": 1, "max_length": 8, "parallel": parallel or "auto", **options})
    quant, lora = QuantConfig(), LoraConfig(r=3)
    return plan_memory(shape, device, method, quant=quant, lora=lora, train=train, parallel=parallel, ranks=ranks)


def test_parts_by_hand():
    """Of eight ranks, each has a row or two of each tensor, or three, all of them float32."""
    found = memory(TINY, CPU, "lora", "fsdp", 8)
    q, k, v, o = 2 * 12, 1 * 12, 1 * 12, 2 * 12  # of (12, 12), (6, 12), (6, 12), (12, 12)
    mlp = 3 * 12 + 3 * 12 + 2 * 20  # of (20, 12), (20, 12), (12, 20)
    norms, rest = 2 * 2, 7 * 12 + 7 * 12 + 2  # of (12,) each; of (50, 12) twice and (12,)
    layer = q + k + v + o + mlp + norms
    A = 1 * (6 * 12 + 20)  # of (3, 12) six times, and (3, 20)
    B = (2 + 1 + 1 + 2 + 3 + 3 + 2) * 3
    assert found.kinds["weights"] == 4 * (3 * layer + rest) + BUFFERS
    assert found.kinds["adapters"] == 4 * 3 * (A + B)
    assert found.kinds["optimizer"] == 2 * 4 * 3 * (A + B)
    assert found.exchange == Exchange("fsdp", 8 * 4 * 3 * (layer + A + B), 8 * 4 * rest, 8 * 4 * 3 * (A + B))


def test_packed_parts_by_hand():
    """Of eight ranks: codes, block constants, their own constants and the offset, each rounded up."""
    found = memory(TINY, CPU, "qlora", "fsdp", 8)
    codes = [-(-n // 2 // 8) for n in (144, 72, 72, 144, 240, 240, 240)]
    absmax = [-(-blocks // 8) for blocks in (3, 2, 2, 3, 4, 4, 4)]
    assert found.kinds["codes"] == 3 * sum(codes)
    assert found.kinds["constants"] == 3 * (sum(absmax) + 7 * 4 + 7 * 4)


def test_what_is_gathered_by_hand():
    """At the peak of a checkpointed step, in the head or in a layer: the rest, and a layer or none."""
    layers = 6
    shape = dataclasses.replace(TINY, layers=layers)
    found = memory(shape, CPU, "lora", "fsdp", 8, max_length=64, gradient_checkpointing=True)
    _, in_layers, rest, trained = found.exchange
    assert found.worst == "backward"
    assert found.kinds["gathered"] == rest + in_layers // layers
    assert found.kinds["communication"] in {in_layers // layers, (in_layers + trained) // layers}


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_one_rank_holds_what_one_card_does(method):
    alone, one = (memory(TINY, CPU, method, parallel) for parallel in (None, "fsdp"))
    assert one.instants["model"] == alone.instants["model"]
    held = ("weights", "codes", "constants", "adapters", "optimizer")
    assert [one.kinds[kind] for kind in held] == [alone.kinds[kind] for kind in held]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_ddp_is_one_card_and_a_flat_buffer(method):
    alone, rank = (memory(TINY, CPU, method, parallel, 4, gradient_accumulation_steps=2) for parallel in (None, "ddp"))
    n_bytes = 4 * alone.trained_parameters
    assert {name: n for name, n in rank.instants.items() if name != "all-reduce"} == alone.instants
    held = sum(alone.kinds[kind] for kind in ("weights", "codes", "constants", "adapters", "optimizer", "workspace"))
    assert rank.instants["all-reduce"] == held + n_bytes + n_bytes  # gradients, and the buffer
    assert rank.exchange == Exchange("ddp", 0, 0, n_bytes)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_on_cuda_too(method):
    alone, rank = (memory(find_shape("demo"), H100, method, parallel, 4) for parallel in (None, "ddp"))
    assert {name: n for name, n in rank.instants.items() if name != "all-reduce"} == alone.instants
    buffer = min(4 * alone.trained_parameters, BUFFER_BYTES)
    assert rank.instants["all-reduce"] > alone.instants["model"] + 4 * alone.trained_parameters + buffer - 512


def test_the_buffer_of_gradients_is_bounded():
    alone, rank = (memory(find_shape("demo"), CPU, "full", parallel, 2) for parallel in (None, "ddp"))
    held = sum(alone.kinds[kind] for kind in ("weights", "optimizer", "workspace"))
    assert 4 * alone.trained_parameters > BUFFER_BYTES
    assert rank.instants["all-reduce"] == held + 4 * alone.trained_parameters + BUFFER_BYTES


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("model", ["llama-2-7b", "qwen3-30b-a3b"])
def test_more_cards_never_hold_more(model, method):
    shape = find_shape(model)
    needs = [memory(shape, H100, method, "fsdp", ranks).allocated.likely for ranks in (1, 2, 3, 4, 8, 64)]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == len(needs)


def shard(model, ranks):
    """Shard it as training does; returns the bytes that a rank holds."""
    mesh = dist.init_device_mesh("cpu", (ranks,))
    layers = model.get_decoder().layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    prefetch(layers)
    return sum(p.to_local().untyped_storage().nbytes() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def measured(model, batch, passes, ranks):
    """(bytes that a rank holds, then the highest bytes of a step above them)."""
    held = shard(model, ranks)
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
    places, labels = torch.arange(batch.labels), torch.zeros(batch.labels, dtype=torch.int64)
    whole = partial(rest_gathered, model, Ranks(0, ranks, "fsdp"))
    with torch.no_grad(), whole():
        model(ids[:1, :1])  # as a run's checks do: torch takes the first module that runs for the root
    attention = nullcontext() if kernel_obstacle(model) else segment_attention(model)
    release_scratch()
    with attention, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(passes):
            with whole():
                total = loss_at(model, ids, None, places, labels)
                total.backward()
                del total
    return held, peak_of_events(profiler)


def of_a_rank(config, method, checkpointing, batch, passes, ranks):
    """`measured`, in a process group of so many ranks, of which this process is one, that moves nothing."""
    Ends.of = evenly
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    torch.manual_seed(0)
    model = as_trained(AutoModelForCausalLM.from_config(config).train(), method)
    if checkpointing:
        compute_again(model)
    return measured(model, batch, passes, ranks)


def held_with(config, init, ranks):
    """Bytes that a rank holds of an adapted model with this start, in a group as above."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    model = AutoModelForCausalLM.from_config(config)
    return shard(add_lora(model, LoraConfig(r=3, init_lora_weights=init)), ranks)


def in_a_process(function, *arguments):
    """In one of its own: a profile counts what an earlier one saw allocated below zero when it is freed."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["lownibble.training", "torch.distributed.fsdp", "hypothesis"])
    with ProcessPoolExecutor(1, mp_context=forking) as pool:
        return pool.submit(function, *arguments).result()


@needs_kernel
@pytest.mark.parametrize(
    ("ranks", "model_type", "method", "checkpointing", "passes"),
    [
        (4, "llama", "full", False, 1), (4, "llama", "lora", True, 2), (4, "llama", "qlora", False, 2),
        (3, "llama", "qlora", True, 1), (16, "llama", "lora", False, 1), (3, "qwen3", "full", True, 2),
        (5, "gemma", "lora", False, 1), (3, "mixtral", "qlora", True, 1), (8, "mixtral", "full", False, 1),
        (16, "mixtral", "lora", False, 1), (16, "mixtral", "qlora", False, 1),
    ],
)  # fmt: skip
def test_equals_fully_shard(ranks, model_type, method, checkpointing, passes):
    if method == "qlora" and not SHARDS_PACKED:
        pytest.skip("this torch shards floats only")
    more = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None} if model_type == "mixtral" else {}
    config = AutoConfig.for_model(model_type, **{**SIZES, "num_hidden_layers": 5, **more})
    batch = Batch(2, 64, 100)
    held, peak = in_a_process(of_a_rank, config, method, checkpointing, batch, passes, ranks)
    shape = read_shape(config.to_dict())
    adapted = {} if method == "full" else dict.fromkeys(all_paths(shape), 16)
    run = Runtime(4, fused=True, kernel_attention=True, decode_buffers=1, shards=ranks)
    ways = Method(method == "full", *packed(shape, method), adapted)
    tape = run_step(shape, ways, run, batch, checkpointing=checkpointing, passes=passes)
    _, begin, weights = tape.marks[0]
    used = ours = 0
    for _, n in tape.events[begin : tape.marks[-1][1]]:
        used += n
        ours = max(ours, used)
    assert weights == pytest.approx(held, abs=100)
    assert ours == pytest.approx(peak, rel=0.01)


def test_every_rank_has_the_whole_start_that_was_taken_out_of_the_base():
    config = AutoConfig.for_model("llama", **SIZES)
    found = plan_memory(
        read_shape(config.to_dict()), CPU, "lora", quant=QuantConfig(), lora=LoraConfig(r=3, init_lora_weights="pissa"),
        train=TrainConfig(batch_size=1, max_length=8), parallel="fsdp", ranks=4,
    )  # fmt: skip
    assert found.kinds["weights"] + found.kinds["adapters"] == pytest.approx(in_a_process(held_with, config, "pissa", 4), abs=100)


def test_offloaded_parts_are_in_host_memory_by_hand():
    """Of eight ranks on a card, weights in bfloat16: what is left there is gathered, or is a copy on its way."""
    on_card, found = (memory(TINY, H100, "lora", "fsdp", 8, fsdp_cpu_offload=off) for off in (False, True))
    tables, A, B = 2 * 512, 6 * 12 + 20, 14 * 3  # in blocks of 512 bytes
    assert found.instants["model"] == found.kinds["weights"] == tables
    assert {found.kinds[kind] for kind in ("codes", "constants", "adapters", "optimizer")} == {0}
    norms, rest = 2 * 2, 7 * 12 + 7 * 12 + 2
    layer = 24 + 12 + 12 + 24 + 36 + 36 + 40 + norms
    adapters = 4 * 3 * (A + B)
    assert found.host_kinds == {
        "weights": 2 * (3 * layer + rest), "adapters": adapters, "gradients": adapters, "optimizer": 2 * adapters,
    }  # fmt: skip
    pinned_layer = 64 + 32 + 32 + 64 + 128 + 128 + 128 + 2 * 4
    a, b = (
        6 * 64 + 128,
        2 * 32 + 16 + 16 + 64 + 64 + 32,
    )  # of 12, 12, 12, 12, 12, 12 and 20 values of A; 6, 3, 3, 6, 9, 9 and 6 of B
    assert found.host_bytes == 3 * pinned_layer + 256 + 256 + 4 + 2 * 3 * (a + b) + 2 * adapters
    assert found.exchange == on_card.exchange
    assert found.kinds["gathered"] == on_card.kinds["gathered"]
    assert on_card.host_kinds == {}
    assert on_card.host_bytes == 0


def test_a_cpu_has_no_other_memory():
    assert memory(TINY, CPU, "lora", "fsdp", 8, fsdp_cpu_offload=True) == memory(TINY, CPU, "lora", "fsdp", 8)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_copies_to_and_from_the_host_are_time(method):
    """The same step with shards on the card, copies of its own parts, and the optimiser's step on the host."""
    shape, options = find_shape("demo"), {"batch_size": 2, "max_length": 64, "gradient_accumulation_steps": 2}
    card = dataclasses.replace(H100, flops=1e30, bandwidth=1e30)
    train, found = TrainConfig(**options), memory(shape, card, method, "fsdp", 4, **options, fsdp_cpu_offload=True)
    speed = plan_speed(shape, card, method, train, found, cards=4, link=1e30)
    copied = 2 * (2 * found.exchange.layers + found.exchange.rest + found.exchange.gradients) / 4
    update = 6 * found.host_kinds["gradients"] + 2 * found.host_kinds["optimizer"]
    for seconds, share, rate in zip(speed.step_s, reversed(REACHED), reversed(HOST_MEMORY), strict=True):
        assert seconds == pytest.approx(copied / (63e9 * share) + update / rate)
    assert plan_speed(shape, dataclasses.replace(card, host=None), method, train, found, cards=4, link=1e30) is None


def test_a_plan_of_offloaded_shards():
    options = {"gpu": "rtx-4090", "gpus": [2], "method": "full", "batch_size": 2, "parallel": "fsdp"}
    (on_card,), (found,) = (plan("llama-2-13b", **options, fsdp_cpu_offload=off).rows for off in (False, True))
    assert not on_card.verdict.fits
    assert (found.verdict.words, found.verdict.train.optim) == ("fits", "adamw")
    assert found.speed.step_s.likely > on_card.speed.step_s.likely
    planned = plan("llama-2-13b", **options, fsdp_cpu_offload=True)
    written = json.loads(json.dumps(planned.to_dict(), allow_nan=False))
    assert written["rows"][0]["memory"]["host_bytes"] >= sum(written["rows"][0]["memory"]["host_kinds"].values()) > 50 * 2**30
    assert written["sources"]["rtx-4090"]["host"].startswith("pcie-4-x16")
    console = Console(width=200)
    with console.capture() as shown:
        console.print(*tables(planned))
    assert "shards in host memory" in shown.get()
    assert f"in host memory {found.verdict.memory.host_bytes / 2**30:.2f}" in shown.get()


def test_what_is_sent_by_hand():
    assert Exchange("ddp", 0, 0, 100).sent(4, 3) == 2 * 100 * 3 / 4
    assert Exchange("fsdp", 1000, 50, 100).sent(4, 3) == 3 * (2 * 1000 + 50 + 100) * 3 / 4
    assert Exchange("fsdp", 1000, 50, 100).sent(1, 3) == Exchange("ddp", 0, 0, 100).sent(1, 3) == 0


def test_time_of_an_exchange_by_hand():
    ddp, fsdp = Exchange("ddp", 0, 0, 1), Exchange("fsdp", 1, 1, 1)
    assert [ddp.step_s(3, 2, worst) for worst in (False, True)] == [5, 5]
    assert [fsdp.step_s(3, 2, worst) for worst in (False, True)] == [3, 5]
    assert [fsdp.step_s(3, 4, worst) for worst in (False, True)] == [4, 7]


@given(st.integers(2, 8), st.floats(1, 1000))
@settings(max_examples=20)
def test_a_step_takes_as_long_as_computing_and_sending(cards, gb_per_s):
    shape, train = find_shape("demo"), TrainConfig(batch_size=2, max_length=64)
    link = link_of(H100, cards, 8, gb_per_s)
    for parallel in ("ddp", "fsdp"):
        found = memory(shape, H100, "full", parallel, cards, batch_size=2, max_length=64)
        computing = plan_speed(shape, H100, "full", train, found, cards=cards, link=1e30).step_s
        speed = plan_speed(shape, H100, "full", train, found, cards=cards, link=link)
        sent = found.exchange.sent(cards, 1)
        low, likely, high = (sent / (gb_per_s * 1e9 * share) for share in reversed(REACHED))
        if parallel == "ddp":
            assert speed.step_s == pytest.approx((computing.low + low, computing.likely + likely, computing.high + high))
        else:
            assert speed.step_s == pytest.approx((max(computing.low, low), max(computing.likely, likely), computing.high + high))
        assert speed.tokens == cards * 2 * 64
        assert speed.tokens_per_s.likely == pytest.approx(speed.tokens / speed.step_s.likely)


def test_links():
    assert link_of(H100, 8, 8) == H100.link
    assert link_of(H100, 16, 8) == min(H100.link, H100.network)
    assert link_of(hardware.device("rtx-4090"), 16, 8) == hardware.device("rtx-4090").network
    assert link_of(H100, 16, 8, 3) == 3e9
    by_hand = hardware.device("memory=24,bandwidth=1000,tflops=165")
    assert link_of(by_hand, 2, 8) is None
    with pytest.raises(ConfigError, match="12 GPUs are no whole nodes of 8"):
        link_of(H100, 12, 8)


def test_every_device_has_links():
    for name in hardware.names():
        found = hardware.device(name)
        assert found.link > 0
        assert found.network > 0
        assert found.host <= 63e9
        assert {"link", "network", "host"} <= dict(found.sources).keys()


def test_a_plan_of_several():
    found = plan("demo", gpu="t4", gpus=[2, 8], tokens=10**6, price=2.0, batch_size=8, max_length=64)
    assert [(row.ranks.gpus, row.ranks.parallel, row.verdict.method) for row in found.rows] == [
        (gpus, parallel, method) for gpus in (2, 8) for parallel in ("ddp", "fsdp") for method in ("full", "lora", "qlora")
    ]
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"]
    assert {row["parallel"] for row in written if row["is_auto"]} == {"ddp"}, "it fits a card as it is"
    for row, of_json in zip(found.rows, written, strict=True):
        rate = row.speed.tokens_per_s.likely
        assert of_json["dollars_per_million_tokens"]["likely"] == pytest.approx(2 * row.ranks.gpus * 1e6 / rate / 3600)
        assert row.speed.dollars.likely == pytest.approx(of_json["dollars_per_million_tokens"]["likely"])
        assert "gathered" in of_json["memory"]["kinds"]
        assert of_json["memory"]["exchange_bytes"]["parallel"] == row.ranks.parallel
    alone = plan("demo", gpu="t4", tokens=10**6, batch_size=2, max_length=64).to_dict()["rows"]
    assert not {"gpus", "parallel", "is_auto"} & alone[0].keys()
    assert "gathered" not in alone[0]["memory"]["kinds"]


def test_auto_takes_fsdp_where_the_model_does_not_fit_a_card():
    found = plan("llama-2-13b", gpu="h100", gpus=[4], method="full", batch_size=4, max_length=64).rows
    assert [(row.ranks.parallel, row.ranks.is_auto, row.verdict.fits) for row in found] == [
        ("ddp", False, False), ("fsdp", True, True),
    ]  # fmt: skip


def test_checkpoints_are_not_offloaded_on_shards():
    found = plan("llama-65b", gpu="a100-80gb", gpus=[2], method="lora", batch_size=8, max_length=512).rows
    assert {row.ranks.parallel: row.verdict.train.gradient_checkpointing for row in found}["fsdp"] is True
    found = plan("llama-2-7b", gpu="t4", gpus=[2], method="lora", gradient_checkpointing="offload")
    assert [row.ranks.parallel for row in found.rows] == ["ddp"]
    assert found.refused["fsdp"] == "it does not go with gradient_checkpointing='offload'"


def test_without_a_known_link_there_is_no_speed():
    gpu = "memory=24,bandwidth=1000,tflops=165"
    assert plan("demo", gpu=gpu, gpus=[2], parallel="ddp", method="lora").rows[0].speed is None
    assert plan("demo", gpu=gpu, gpus=[2], parallel="ddp", method="lora", link_gb_per_s=10.0).rows[0].speed is not None


def test_a_model_that_cannot_be_sharded_is_planned_with_ddp():
    found = plan("t5-base", gpu="t4", gpus=[2], method="lora")
    assert [row.ranks.parallel for row in found.rows] == ["ddp"]
    assert "has an encoder" in found.refused["fsdp"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("demo", {"gpus": [0]}, r"The 'gpus' of PlanConfig must be a list of integer >= 1 items. Got 0"),
        ("demo", {"gpus": ["x"]}, r"The 'gpus' of PlanConfig must be a list of integer >= 1 items. Got 'x'"),
        ("demo", {"gpus": [2], "parallel": "tensor"}, "The 'parallel' of TrainConfig must be one of 'auto', 'ddp', 'fsdp'"),
        ("demo", {"gpus": [2], "link_gb_per_s": 0}, "The 'link_gb_per_s' of PlanConfig must be a number > 0"),
        ("demo", {"parallel": "fsdp"}, "The 'parallel' of TrainConfig is for several GPUs"),
        ("demo", {"link_gb_per_s": 2}, "The 'link_gb_per_s' of PlanConfig is for several GPUs"),
        ("demo", {"gpus": [2], "gpu": "cpu"}, "processes on a CPU share its memory"),
        ("demo", {"gpus": [12], "gpu": "t4"}, "12 GPUs are no whole nodes of 8"),
        ("demo", {"parallel": "fsdp", "fsdp_cpu_offload": True}, "The 'parallel' of TrainConfig is for several GPUs"),
        (
            "demo",
            {"gpus": [2], "parallel": "fsdp", "gradient_checkpointing": "offload"},
            "with fsdp: it does not go with gradient_checkpointing='offload'",
        ),
        ("t5-base", {"gpus": [2], "gpu": "t4", "parallel": "fsdp"}, "'t5-base' cannot be planned with fsdp: .* has an encoder"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ConfigError, match=message):
        plan(model, **options)
