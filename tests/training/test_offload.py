"""Checkpoints on the host. Oracles: checkpointing on the device, bit for bit; what weak references say is still held."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lownibble.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError
from lownibble.lora import add_lora
from lownibble.memory.usage import is_exhausted
from lownibble.models.info import compute_again
from lownibble.training import offload, run
from lownibble.training.distributed import ALONE
from lownibble.training.fitting import MemoryGoneError
from lownibble.training.loss import label_loss
from lownibble.training.offload import Offloaded, PinnedCopies, PinnedMemoryError
from lownibble.training.passes import Passes

CPU = torch.device("cpu")
DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}


class OtherBuffers:
    """A host that is other memory of the CPU. `log`: what was copied, by layer; `held`: storages that were stored."""

    def __init__(self, device=CPU):
        self.log, self.held, self._hosts = [], [], []

    def store(self, x):
        self.log.append(("store", len(self._hosts)))
        self.held.append(weakref.ref(x.untyped_storage()))
        self._hosts.append(x.clone())
        return self._hosts[-1], ("store", len(self._hosts) - 1)

    def fetch(self, host):
        number = next(i for i, each in enumerate(self._hosts) if each is host)
        self.log.append(("fetch", number))
        return host.clone(), ("fetch", number)

    def wait(self, event):
        self.log.append(("wait", *event))


@pytest.fixture
def on_cpu(monkeypatch):
    """A CPU whose checkpoints can be offloaded; the copies that were made, a list for each run."""
    made = []

    def copies(device):
        made.append(OtherBuffers())
        return made[-1]

    monkeypatch.setitem(offload.COPIES, "cpu", copies)
    return made


@pytest.fixture
def adapted(tiny):
    def make(layers=4, family="llama", **lora):
        torch.manual_seed(1)
        model = add_lora(tiny(family, num_hidden_layers=layers), LoraConfig(r=4, **lora)).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        return model

    return make


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def equal(ours, theirs):
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_gradients_are_those_of_checkpointing_on_the_device(on_cpu, adapted, batch, family):
    found = []
    for how in (True, "offload"):
        model = adapted(family=family, lora_dropout=0.2)
        torch.manual_seed(2)
        if how is True:
            compute_again(model)
            label_loss(model, *batch()).backward()
        else:
            with Offloaded(model, CPU)():
                label_loss(model, *batch()).backward()
        found.append(gradients(model))
    assert equal(*found)
    assert all("forward" not in vars(module) for module in model.modules()), "the model is as it came"


def test_an_input_leaves_the_device_when_the_next_layer_begins_and_comes_back_one_layer_ahead(on_cpu, adapted, batch):
    model = adapted(layers=4)
    with Offloaded(model, CPU)():
        loss = label_loss(model, *batch())
        [copies] = on_cpu
        gc.collect()
        assert [held() is not None for held in copies.held] == [False, False, False, True], "the last one is needed first"
        assert copies.log == [
            ("store", 0), ("wait", "store", 0), ("store", 1), ("wait", "store", 1), ("store", 2), ("wait", "store", 2),
            ("store", 3),
        ]  # fmt: skip
        copies.log.clear()
        loss.backward()
    assert copies.log == [
        ("wait", "store", 3), ("fetch", 2), ("wait", "fetch", 2), ("fetch", 1), ("wait", "fetch", 1), ("fetch", 0),
        ("wait", "fetch", 0),
    ]  # fmt: skip


def test_after_a_pass_that_ended_early_no_copy_is_under_way(on_cpu, adapted, batch):
    """Else the next pass would get memory into which a copy is still written."""
    model = adapted(layers=4)

    def fail(*_):
        raise RuntimeError("no memory")

    def step():
        with Offloaded(model, CPU)():
            loss = label_loss(model, *batch())
            model.model.layers[2].mlp.register_forward_pre_hook(fail)  # when it is recomputed
            loss.backward()

    with pytest.raises(RuntimeError, match="no memory"):
        step()
    begun = {each for each in on_cpu[0].log if each[0] != "wait"}
    assert ("fetch", 1) in begun, "on its way when layer 2 failed"
    assert begun == {each[1:] for each in on_cpu[0].log if each[0] == "wait"}


def test_without_gradients_nothing_is_stored(on_cpu, adapted, batch):
    model = adapted(layers=2)
    with Offloaded(model, CPU)(), torch.no_grad():
        label_loss(model, *batch())
    assert on_cpu[0].log == []


def trained(model, data, output, how, method="qlora", **options):
    lora = options.pop("lora", {"r": 4})
    config = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "max_length": 32, "output_dir": str(output)} | options
    result = run(RunConfig(
        model=str(model), method=method, data=DataConfig(path=str(data), **DATA), lora=LoraConfig(**lora),
        train=TrainConfig(gradient_checkpointing=how, **config),
    ))  # fmt: skip
    return result, [load_file(file) for file in sorted(output.glob("adapter/*.safetensors"))]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "lora": {"r": 4, "lora_dropout": 0.1}}, {"packing": True, "batch_size": 2},
        pytest.param({"torch_compile": True, "lora": {"r": 4, "use_dora": True}}, marks=pytest.mark.slow),
    ],
    ids=["accumulation, dropout", "packing", "compiled, dora"],
)  # fmt: skip
def test_a_run_has_the_bits_of_one_that_checkpoints_on_the_device(options, widen, tiny_data, tmp_path, on_cpu):
    model = widen(num_hidden_layers=3)
    ours, theirs = (trained(model, tiny_data, tmp_path / str(how), how, **options) for how in ("offload", True))
    close = pytest.approx(theirs[0].losses, rel=1e-4 if options.get("torch_compile") else 0)
    assert ours[0].losses == close, "compiled layers are compiled with the checkpoint in them, or outside of them"
    if not options.get("torch_compile"):
        assert [sorted(file) for file in ours[1]] == [sorted(file) for file in theirs[1]]
        assert all(torch.equal(a[name], b[name]) for a, b in zip(ours[1], theirs[1], strict=True) for name in a)
    stores = sum(kind == "store" for kind, *_ in on_cpu[0].log)
    assert stores > 0
    assert stores % 3 == 0


@pytest.mark.slow
def test_a_full_run_too(tiny_model, tiny_data, tmp_path, on_cpu):
    ours, theirs = (trained(tiny_model, tiny_data, tmp_path / str(how), how, method="full")[0] for how in ("offload", True))
    assert ours.losses == theirs.losses


def test_a_cpu_has_nothing_to_offload_to(tiny_model, tiny_data, tmp_path):
    with pytest.raises(
        ConfigError, match=r"tensors on 'cpu' are in the host's memory already\. Use --gradient-checkpointing true"
    ):
        trained(tiny_model, tiny_data, tmp_path, "offload")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device has pinned memory")
def test_without_pinned_memory_that_is_said():
    with pytest.raises(ConfigError, match=r"pinned host memory cannot be had here \(.*\)\. Use --gradient-checkpointing true"):
        PinnedCopies(torch.device("cuda"))


def test_a_model_whose_layers_are_not_known_is_refused(on_cpu, adapted):
    model = adapted(layers=2)
    model._no_split_modules = None
    with pytest.raises(ConfigError, match="the decoder layers of LlamaForCausalLM are not known"):
        Offloaded(model, CPU)


@pytest.mark.gpu
def test_pinned_copies_have_the_bits_and_leave_the_device(adapted, batch):
    device, found, peaks = torch.device("cuda"), [], []
    for how in (True, "offload"):
        model = adapted(layers=8).to(device)
        rows = [each.to(device) for each in batch(rows=64, length=64)]
        if how is True:
            compute_again(model)
        wrapped = Offloaded(model, device) if how == "offload" else None
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            if wrapped:
                with wrapped():
                    label_loss(model, *rows).backward()
            else:
                label_loss(model, *rows).backward()
        torch.cuda.synchronize()
        found.append([gradient.cpu() for gradient in gradients(model)])
        peaks.append(torch.cuda.max_memory_allocated())
        del model, wrapped
    assert equal(*found)
    assert peaks[1] < peaks[0]


class NoRoom(OtherBuffers):
    """A host that cannot pin as much."""

    def store(self, x):
        raise PinnedMemoryError("1.00 GB of pinned host memory could not be had")


@pytest.mark.slow
def test_a_host_without_room_is_out_of_memory_and_loses_no_step(widen, tiny_data, tmp_path, monkeypatch):
    assert is_exhausted(PinnedMemoryError("..."))
    folder, calls, plain = tmp_path / "run", [], Passes.backward
    monkeypatch.setitem(offload.COPIES, "cpu", NoRoom)

    def backward(self, *args, **options):
        calls.append(self._checkpointing)
        if len(calls) > 2 and self._checkpointing is True:  # no room from the third step on
            raise MemoryError
        return plain(self, *args, **options)

    monkeypatch.setattr(Passes, "backward", backward)
    with pytest.raises(MemoryGoneError, match=r"in step 3, with one row .* and offloaded gradient checkpointing"):
        trained(widen(), tiny_data, folder, True, batch_size=1, torch_compile=False)
    assert calls[-1] == "offload"
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()] == ["step-000002"]


def test_without_pinned_memory_a_run_does_not_turn_to_it(widen, monkeypatch):
    def refused(device):
        raise ConfigError("pinned host memory cannot be had here")

    model = AutoModelForCausalLM.from_pretrained(widen())
    passes = Passes(model, SimpleNamespace(pack_to=None, ranks=ALONE), CPU, None)
    monkeypatch.setitem(offload.COPIES, "cpu", OtherBuffers)
    assert passes.can_offload
    monkeypatch.setitem(offload.COPIES, "cpu", refused)
    assert not passes.can_offload
