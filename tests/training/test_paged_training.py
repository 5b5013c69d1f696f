"""Paged optimisers in whole runs. Oracles: the same run unpaged, and the run not interrupted."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError, OutputError, TrainingError
from lownibble.optim import specs
from lownibble.training import Sink, Stepped, run

PAGE = 4096
DATA_TEMPLATES = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """The tiny model's states would fit into one page of the usual size."""
    monkeypatch.setattr(specs, "PAGE_BYTES", PAGE)


def _config(tiny_model, tiny_data, method="full", **options):
    train = {
        "max_steps": 8, "batch_size": 8, "learning_rate": 5e-3, "max_length": 32, "save_steps": 2, "eval_steps": 8,
        "weight_decay": 0.1,
    } | options  # fmt: skip
    return RunConfig(
        model=str(tiny_model), method=method, data=DataConfig(path=str(tiny_data), **DATA_TEMPLATES),
        lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1), quant=QuantConfig(block_size=32), train=TrainConfig(**train),
    )  # fmt: skip


class _Stop(Sink):
    def __call__(self, event):
        if isinstance(event, Stepped) and event.step == 5:
            raise KeyboardInterrupt


def _interrupted(config, optim_after=None):
    with pytest.raises(KeyboardInterrupt):
        run(config, sinks=[_Stop()])
    changes = {"resume": True} if optim_after is None else {"resume": True, **optim_after}
    return run(config.with_options(train=config.train.with_options(**changes)))


def _same(one, other):
    return one.losses == other.losses and all(
        torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("bits", ["", "_8bit"])
def test_a_paged_run_is_the_unpaged_run(tiny_model, tiny_data, tmp_path, method, bits):
    plain = run(_config(tiny_model, tiny_data, method, optim=f"adamw{bits}"))
    options = {"optim": f"paged_adamw{bits}", "optim_page_budget": f"{2 * PAGE}B", "output_dir": str(tmp_path / "out")}
    paged = run(_config(tiny_model, tiny_data, method, **options))
    assert _same(plain, paged)
    memory, unpaged = paged.record["memory"], plain.record["memory"]
    assert memory["optimizer_state_bytes"] == unpaged["optimizer_state_bytes"] > 2 * PAGE
    parameters = sum(p.requires_grad for p in paged.model.parameters())
    assert memory["optimizer_bytes"] <= 2 * PAGE + 4 * parameters, "pages in memory and each parameter's step"
    last = max((tmp_path / "out" / "checkpoints").iterdir())
    held = [value.nbytes for name, value in load_file(last / "state.safetensors").items() if name.startswith("optimizer/")]
    assert sum(held) == memory["optimizer_state_bytes"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names <= {"adapter", "model", "checkpoints", "events.jsonl", "record.json", ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("bits", ["", "_8bit"])
def test_a_paged_run_cut_and_resumed_gives_the_same_bits(tiny_model, tiny_data, tmp_path, method, bits):
    options = {"optim": f"paged_adamw{bits}", "optim_page_budget": f"{PAGE}B"}
    whole = run(_config(tiny_model, tiny_data, method, **options))
    assert _same(whole, _interrupted(_config(tiny_model, tiny_data, method, output_dir=str(tmp_path / "cut"), **options)))


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["", "_8bit"])
@pytest.mark.parametrize("paged_first", [True, False])
def test_either_kind_goes_on_from_the_others_checkpoint(tiny_model, tiny_data, tmp_path, bits, paged_first):
    paged = {"optim": f"paged_adamw{bits}", "optim_page_budget": f"{3 * PAGE}B"}
    plain = {"optim": f"adamw{bits}", "optim_page_budget": None}
    before, after = (paged, plain) if paged_first else (plain, paged)
    whole = run(_config(tiny_model, tiny_data, **plain))
    assert _same(whole, _interrupted(_config(tiny_model, tiny_data, output_dir=str(tmp_path / "cut"), **before), after))


@pytest.mark.slow
def test_8_bit_states_do_not_go_on_as_32_bit_ones(tiny_model, tiny_data, tmp_path):
    with pytest.raises(OutputError, match=r"train.optim: 'adamw_8bit' -> 'adamw'"):
        _interrupted(_config(tiny_model, tiny_data, output_dir=str(tmp_path / "cut"), optim="adamw_8bit"), {"optim": "adamw"})


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_and_spares_its_checkpoint(tiny_model, tiny_data, tmp_path, monkeypatch):
    options = {"optim": "paged_adamw", "optim_page_budget": f"{2 * PAGE}B"}
    whole = run(_config(tiny_model, tiny_data, **options))
    config = _config(tiny_model, tiny_data, output_dir=str(tmp_path / "cut"), **options)
    write, full = os.pwritev, []

    class _Fill(Sink):
        def __call__(self, event):
            full.extend([True] if isinstance(event, Stepped) and event.step == 5 else [])

    def pwritev(*arguments):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.raises(TrainingError, match=r"No space left on device.*--resume"):
        run(config, sinks=[_Fill()])
    full.clear()
    assert _same(whole, run(config.with_options(train=config.train.with_options(resume=True))))


def test_unusable_options_are_named_before_training(tiny_model, tiny_data, tmp_path):
    with pytest.raises(ConfigError, match="for paged optimisers"):
        run(_config(tiny_model, tiny_data, optim_page_budget="64MB"))
    with pytest.raises(ConfigError, match="at least one page"):
        run(_config(tiny_model, tiny_data, optim="paged_adamw", optim_page_budget="100B", output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_checkpoint_takes_no_memory_for_the_states(tmp_path):
    """The process's own peak, in a process of its own: 64 MiB of states through 4 MiB of pages, saved and restored."""
    code = f"""
import torch
from pathlib import Path
from torch import nn
from lownibble.optim import make_optimizer
from lownibble.training import checkpoint, sharding
from lownibble.memory import usage
device, folder = torch.device("cpu"), Path({str(tmp_path)!r})
def fresh():
    model = nn.Linear(1 << 11, 1 << 12, bias=False)
    return model, make_optimizer("paged_adamw", model.parameters(), 1e-3, 0.0, page_budget=4 << 20, folder=folder)
one, two = fresh(), fresh()
one[0].weight.grad = torch.ones_like(one[0].weight)
one[1].step()
two[1].open()
saving = lambda: checkpoint.save(folder, 1, sharding.parts(one[0]), one[1], {{}}, {{}})
restoring = lambda: checkpoint.restore(checkpoint.newest(folder)[0], sharding.parts(two[0]), two[1], {{}})
for work in (saving, restoring):
    usage.reset_peak(device)
    before = usage.used_bytes(device)
    work()
    print(usage.peak_bytes(device) - before)
assert torch.equal(one[0].weight, two[0].weight)
for (*_, first, values), (*_, other, theirs) in zip(one[1].parts(change=False), two[1].parts(change=False), strict=True):
    assert first == other and torch.equal(values, theirs)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    saved, restored = map(int, found.stdout.split())
    assert saved < 16 << 20
    assert restored < 16 << 20  # its own pages, first touched here, are 4 of them
