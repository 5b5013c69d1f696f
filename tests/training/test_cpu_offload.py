"""FSDP2's shards in host memory: what is refused, and where things are. CPUs have one memory, so calls are recorded, and fake
tensors refuse operations between a CPU and a GPU that is not there. On a card: `tests/parallel/test_offloaded.py`."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.distributed.fsdp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import CPUOffloadPolicy

from lownibble.config import LoraConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.lora import LowRank, adapter
from lownibble.lora.variants import variant_of
from lownibble.memory.budget import SETTINGS, Fit
from lownibble.memory.usage import is_exhausted
from lownibble.models import load
from lownibble.models.info import decoder_layers, pass_device
from lownibble.optim import make_optimizer, open_states, step_if_finite
from lownibble.training import fitting, sharding
from lownibble.training.distributed import Ranks
from lownibble.training.fitting import Fitting, recorded_fit
from lownibble.training.loop import Trainer
from lownibble.training.sharding import Part, Sharding

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OFFLOADED = TrainConfig(parallel="fsdp", fsdp_cpu_offload=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": "auto"}, "is for shards. Got parallel='auto'. Set parallel='fsdp'"),
        ({"parallel": "ddp"}, "is for shards. Got parallel='ddp'. Set parallel='fsdp'"),
        ({"optim": "paged_adamw_8bit"}, r"Got 'paged_adamw_8bit'. Set optim='adamw_8bit' \(--optim\)"),
        ({"gradient_checkpointing": "offload"}, "Set gradient_checkpointing=True"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"parallel": "fsdp", "fsdp_cpu_offload": True, **options})


@pytest.mark.parametrize("train", [OFFLOADED, TrainConfig(parallel="fsdp")], ids=["offloaded", "on the GPU"])
def test_every_group_is_given_its_place_and_passes_theirs(train, tiny_model, monkeypatch):
    calls = []

    def fully_shard(module, **options):
        calls.append((module, options["offload_policy"]))
        for setting in ("gradient_divide_factor", "force_sum_reduction_for_comms"):
            setattr(module, f"set_{setting}", lambda value: None)
        for way in ("forward", "backward"):
            setattr(module, f"set_modules_to_{way}_prefetch", lambda modules: None)

    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", fully_shard)
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *_: None)
    shards = Sharding(Ranks(0, 2, "fsdp"), CUDA, RunConfig(method="full", train=train))
    model, _ = load(str(tiny_model), device="cpu", by_layer=shards)
    assert [module for module, _ in calls] == [*decoder_layers(model).values(), model]
    for _, policy in calls:
        assert getattr(policy, "pin_memory", None) is (True if train is OFFLOADED else None)
    assert pass_device(model) == CUDA
    assert model.get_input_embeddings().weight.device == CPU


def test_nothing_is_pinned_for_a_cpu():
    policy = sharding.offload_policy(OFFLOADED, CPU)
    assert isinstance(policy, CPUOffloadPolicy)
    assert not policy.pin_memory


class Recorded(Ranks):
    """The first of two ranks; sums are recorded by device."""

    summed: ClassVar[list[str]] = []

    def _reduced(self, counts, how):
        return list(counts)

    def add_up(self, tensors, buffer=None):
        self.summed.extend(tensor.device.type for tensor in tensors)


@pytest.fixture
def ranks():
    Recorded.summed = []
    return Recorded(0, 2, "fsdp")


@pytest.mark.parametrize("reached", [True, False], ids=["", "no gradients"])
def test_the_loss_is_summed_on_the_gpu_and_gradients_are_used_on_the_cpu(ranks, reached):
    with FakeTensorMode():
        shards = [nn.Parameter(torch.empty(shape)) for shape in ((4, 3), (5,))]
        parts = {}
        for number, shard in enumerate(shards):
            shard.grad = torch.empty_like(shard) if reached else None
            whole = nn.Parameter(torch.empty(2 * shard.shape[0], *shard.shape[1:]))
            parts[str(number)] = Part(shard, whole, tuple(whole.shape))
        loss = torch.empty((), dtype=torch.bfloat16, device=CUDA)
        trainer = SimpleNamespace(
            ranks=ranks, parts=parts, device=CUDA, parameter_device=CPU, passes=None, config=OFFLOADED,
            micro=SimpleNamespace(batches=lambda rows: [], empty=list), objective=SimpleNamespace(prepare=lambda *_: None),
            _backward=lambda *_: [loss],
        )  # fmt: skip
        _, _, values = Trainer._gradients(trainer, 0, [])
        assert (values.shape, values.dtype, values.device) == ((2,), torch.float32, CPU)
        optimizer = make_optimizer("adamw", shards, 1e-3, 0.0)
        open_states(optimizer)
        step_if_finite(optimizer, values, on_device=True)
        assert {state.device for of in optimizer.state.values() for state in of.values()} == {CPU}
    assert ranks.summed == ["cuda", "cpu"]


def test_a_memory_budget_counts_no_states_and_does_not_page_them(monkeypatch):
    found = []

    def choose(limit, needs, bench):
        found.append(needs.state_bytes)
        return Fit(None, False, False, 0)

    monkeypatch.setattr(fitting, "choose", choose)
    micro = SimpleNamespace(longest_row=8, whole=16)
    passes = SimpleNamespace(can_checkpoint=True, can_offload=False, model=nn.Linear(1, 1))
    trainer = Trainer.__new__(Trainer)
    trainer.parameter_device, trainer.device = CPU, CUDA
    config = OFFLOADED.with_options(memory_budget="1GB")
    taken = Fitting(config, micro, passes, None, CPU).choose(None, trainer._planned_state_bytes)
    assert taken.ranks == "alone"
    assert found == [{setting: 0 for setting in SETTINGS if not setting.paged and setting.gradient_checkpointing != "offload"}]


def test_a_fit_holds_only_for_shards_in_the_same_place():
    on_device = OFFLOADED.with_options(fsdp_cpu_offload=False)
    fit = Fit(64, False, True, 10**6)
    for before in (OFFLOADED, on_device):
        past = SimpleNamespace(config={"train": before.to_dict()}, fit=fit.to_dict())
        for now in (OFFLOADED, on_device):
            assert recorded_fit(now, past) == (fit if now is before else None)


def test_a_start_on_the_gpu_is_written_with_matrices_that_were_gathered_on_the_cpu(monkeypatch):
    with FakeTensorMode():
        held = LowRank(variant_of(LoraConfig(r=2)), 6, 5, 2, 1.0, 0.0, CUDA)
        held.keep_start(held.lora_A, held.lora_B)
        for name in ("lora_A", "lora_B"):
            held._parameters[name] = nn.Parameter(torch.empty(getattr(held, name).shape))
        part = SimpleNamespace(adapter=held, keys={"lora_A": "A", "lora_B": "B"})
        monkeypatch.setattr(adapter, "_parts", lambda model, name: [part])
        monkeypatch.setattr(adapter, "_others", lambda model, name: {})
        found = adapter.file_tensors(nn.Module(), "default")
        assert {key: (tuple(value.shape), value.device) for key, value in found.items()} == {
            "A": ((4, 6), CPU),
            "B": ((5, 4), CPU),
        }


def test_lack_of_pinned_memory_is_lack_of_memory():
    assert is_exhausted(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"))
