"""Runs within a memory budget, and runs that run out of memory. Oracles: the run with memory enough; made-up memories."""

import importlib
import json
import re

import pytest
import torch

from lownibble.config import CHECKPOINTING, DataConfig, LoraConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError, TrainingError
from lownibble.memory import budget, usage
from lownibble.memory.dryrun import DryRun
from lownibble.training import evaluate, offload, run, verify
from lownibble.training.events import Fitted, Stepped
from lownibble.training.making import prepare
from lownibble.training.passes import Passes
from lownibble.training.sinks import ProgressSink, Sink, read_events

EXHAUSTED = (
    "[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)


def config_of(tiny_model, tiny_data, method="lora", **options):
    train = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2, "max_length": 24, "eval_steps": 6}
    return RunConfig(
        model=str(tiny_model), method=method, data=DataConfig(path=str(tiny_data)), lora=LoraConfig(r=4),
        train=TrainConfig(**{**train, **options}),
    )  # fmt: skip


@pytest.fixture
def made_up(monkeypatch):
    """Memory of 100 MB and 1 MB a token (0.1 MB with checkpointing), whatever the machine."""
    tried = []

    def resident(self, setting):
        self.rate = {False: 1e6, True: 1e5, "offload": 1e4}[setting.gradient_checkpointing]
        return 10**8

    def peak(self, tokens):
        tried.append(tokens)
        return int(10**8 + self.rate * tokens)

    monkeypatch.setitem(budget.ENOUGH_TOKENS, "cpu", 16)
    monkeypatch.setattr(DryRun, "resident", resident)
    monkeypatch.setattr(DryRun, "peak", peak)
    monkeypatch.setattr(usage, "highest_bytes", lambda device: 10**8)
    monkeypatch.setattr(usage, "peak_bytes", lambda device: 10**8)
    return tried


class Keep(Sink):
    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_smaller_passes_give_the_same_losses(tiny_model, tiny_data, made_up, method, packing):
    options = {"packing": packing, "gradient_accumulation_steps": 2, "batch_size": 2 if packing else 8}
    whole = run(config_of(tiny_model, tiny_data, method, **options))
    kept = Keep()
    fitted = run(config_of(tiny_model, tiny_data, method, memory_budget="150MB", **options), sinks=[kept])
    fit = fitted.record["memory"]["budget"]
    assert 20 < fit["max_tokens"] <= 41 < fit["whole_tokens"]
    assert (fit["budget_bytes"], fit["highest_bytes"], fit["paged"]) == (150 * 10**6, 10**8, False)
    assert [p["tokens"] for p in fit["probes"]][:2] == [0, 16]
    assert fitted.losses == pytest.approx(whole.losses, rel=2e-5)
    assert fitted.eval_loss == pytest.approx(whole.eval_loss, rel=2e-5)
    steps = [(e.tokens, e.label_tokens, e.samples) for e in kept.events if isinstance(e, Stepped)]
    assert steps == [(s["tokens"], s["label_tokens"], s["samples"]) for s in whole.record["steps"]]
    [told] = [event for event in kept.events if isinstance(event, Fitted)]
    assert told.max_tokens == fit["max_tokens"]


@pytest.mark.slow
def test_a_budget_that_suffices_changes_nothing(tiny_model, tiny_data, made_up):
    plain = run(config_of(tiny_model, tiny_data))
    fitted = run(config_of(tiny_model, tiny_data, memory_budget="2GB"))
    assert fitted.losses == plain.losses
    assert fitted.record["memory"]["budget"]["max_tokens"] is None


def test_checkpointing_and_paging_come_when_they_must(tiny_model, tiny_data, made_up):
    plain = run(config_of(tiny_model, tiny_data))
    fitted = run(config_of(tiny_model, tiny_data, memory_budget="115MB"))
    fit = fitted.record["memory"]["budget"]
    assert fit["gradient_checkpointing"]
    assert fitted.losses == pytest.approx(plain.losses, rel=2e-5)


def test_what_was_chosen_is_said(tiny_model, tiny_data, made_up, capsys):
    run(config_of(tiny_model, tiny_data, memory_budget="112MB"), sinks=[ProgressSink("lora")])
    said = capsys.readouterr().err
    fit = r"forward passes of up to \d+ tokens instead of 80 with gradient checkpointing"
    assert re.search(rf"lora: memory budget 0\.1\d GB: {fit}; 0\.1\d GB expected", said)


def test_too_small_a_budget_is_refused_before_anything_is_trained(tiny_model, tiny_data, made_up, tmp_path):
    with pytest.raises(ConfigError, match=r"does not fit into a memory budget of 100 MB: .* Set memory_budget='\d+ MB'"):
        run(config_of(tiny_model, tiny_data, memory_budget="100MB", output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "checkpoints").exists()


class Stop(Sink):
    def __call__(self, event):
        if isinstance(event, Stepped) and event.step == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_resumed_keeps_its_fit_and_its_bits(tiny_model, tiny_data, made_up, tmp_path):
    options = {"memory_budget": "150MB", "save_steps": 2}
    whole = run(config_of(tiny_model, tiny_data, output_dir=str(tmp_path / "whole"), **options))
    with pytest.raises(KeyboardInterrupt):
        run(config_of(tiny_model, tiny_data, output_dir=str(tmp_path / "cut"), **options), sinks=[Stop()])
    made_up.clear()
    resumed = run(config_of(tiny_model, tiny_data, output_dir=str(tmp_path / "cut"), resume=True, **options))
    assert made_up == [], "the fit is in the checkpoint: no dry run"
    assert resumed.losses == whole.losses
    assert isinstance(read_events(tmp_path / "cut" / "events.jsonl")[0], Fitted)


@pytest.mark.slow
def test_a_smaller_budget_on_resuming_is_kept_to(tiny_model, tiny_data, made_up, tmp_path):
    whole = run(config_of(tiny_model, tiny_data))
    options = {"save_steps": 2, "output_dir": str(tmp_path / "cut")}
    with pytest.raises(KeyboardInterrupt):
        run(config_of(tiny_model, tiny_data, memory_budget="1GB", **options), sinks=[Stop()])
    resumed = run(config_of(tiny_model, tiny_data, memory_budget="150MB", resume=True, **options))
    assert resumed.record["memory"]["budget"]["max_tokens"] <= 41
    assert resumed.losses == pytest.approx(whole.losses, rel=2e-5)


class Shrink(Sink):
    """After a step, no pass fits any more."""

    def __init__(self, limit, step):
        self.limit, self.step = limit, step

    def __call__(self, event):
        if isinstance(event, Stepped) and event.step == self.step:
            self.limit["tokens"] = 0


@pytest.fixture
def small_machine(monkeypatch):
    """Memory runs out in a pass of more tokens than `limit["tokens"]`, or of any without checkpointing."""
    limit = {"tokens": 60, "checkpointing": False}
    before = Passes.backward

    def backward(self, batch, n_total, *, measured=False, replay=False):
        loss = before(self, batch, n_total, measured=measured)
        if batch.input_ids.numel() > limit["tokens"] or (
            CHECKPOINTING.index(self._checkpointing) < CHECKPOINTING.index(limit["checkpointing"])
        ):
            raise RuntimeError(EXHAUSTED)  # after the gradients were made: they must not count twice
        return loss

    monkeypatch.setattr(Passes, "backward", backward)
    return limit


@pytest.mark.slow
def test_a_step_without_memory_begins_again_with_smaller_passes(tiny_model, tiny_data, small_machine, tmp_path):
    small_machine["tokens"] = 10**9
    whole = run(config_of(tiny_model, tiny_data, gradient_accumulation_steps=2))
    small_machine["tokens"] = 60
    result = run(config_of(tiny_model, tiny_data, gradient_accumulation_steps=2, output_dir=str(tmp_path / "out")))
    assert result.losses == pytest.approx(whole.losses, rel=2e-5)
    [warning] = result.record["warnings"]
    assert re.match(r"memory ran out in step 1, which began again: forward passes have at most \d+ tokens", warning)


def test_then_checkpointing(tiny_model, tiny_data, small_machine):
    whole = run(config_of(tiny_model, tiny_data, batch_size=1, max_steps=3))
    small_machine["checkpointing"] = True
    result = run(config_of(tiny_model, tiny_data, batch_size=1, max_steps=3))
    assert result.losses == pytest.approx(whole.losses, rel=2e-5)
    assert "gradient checkpointing" in result.record["warnings"][0]


@pytest.fixture
def a_host(monkeypatch):
    """A CPU that has another memory to offload to."""

    class Copies:
        def __init__(self, device):
            self.store, self.fetch, self.wait = (lambda x: (x.clone(), None)), (lambda x: (x.clone(), None)), lambda _: None

    monkeypatch.setitem(offload.COPIES, "cpu", Copies)


def test_then_offloaded_checkpoints(tiny_model, tiny_data, small_machine, a_host):
    whole = run(config_of(tiny_model, tiny_data, batch_size=1, max_steps=3))
    small_machine["checkpointing"] = "offload"
    result = run(config_of(tiny_model, tiny_data, batch_size=1, max_steps=3))
    assert result.losses == pytest.approx(whole.losses, rel=2e-5)
    assert "from now on with gradient checkpointing" in result.record["warnings"][0]
    assert "from now on with offloaded gradient checkpointing" in result.record["warnings"][1]


def test_a_budget_chooses_offloaded_checkpoints_where_there_is_a_host(tiny_model, tiny_data, made_up, a_host, capsys):
    plain = run(config_of(tiny_model, tiny_data))
    fitted = run(config_of(tiny_model, tiny_data, memory_budget="103MB"), sinks=[ProgressSink("lora")])
    assert fitted.record["memory"]["budget"]["gradient_checkpointing"] == "offload"
    assert fitted.losses == pytest.approx(plain.losses, rel=2e-5)
    assert "with offloaded gradient checkpointing" in capsys.readouterr().err


def test_with_nothing_left_to_give_up_the_steps_taken_are_saved(tiny_model, tiny_data, small_machine, tmp_path):
    options = {"output_dir": str(tmp_path / "out")}
    small_machine["tokens"] = 10**9
    whole = run(config_of(tiny_model, tiny_data))
    with pytest.raises(TrainingError, match=r"Memory ran out in step 3, with one row of \d+ tokens .* Lower max_length"):
        run(config_of(tiny_model, tiny_data, **options), sinks=[Shrink(small_machine, 2)])
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-000002"]
    small_machine["tokens"] = 10**9
    assert run(config_of(tiny_model, tiny_data, resume=True, **options)).losses == pytest.approx(whole.losses, rel=2e-5)


@pytest.fixture
def small_evaluation(monkeypatch):
    """Memory runs out in an evaluation pass of more tokens than `limit["tokens"]`."""
    limit, before = {"tokens": 60}, evaluate.hidden_states

    def hidden_states(model, input_ids, attention_mask, **others):
        if input_ids.numel() > limit["tokens"]:
            raise RuntimeError(EXHAUSTED)
        return before(model, input_ids, attention_mask, **others)

    monkeypatch.setattr(evaluate, "hidden_states", hidden_states)
    return limit


def test_an_evaluation_without_memory_begins_again_with_smaller_passes(tiny_model, tiny_data, small_evaluation):
    small_evaluation["tokens"] = 10**9
    whole = run(config_of(tiny_model, tiny_data))
    small_evaluation["tokens"] = 60
    result = run(config_of(tiny_model, tiny_data))
    assert result.eval_loss == pytest.approx(whole.eval_loss, rel=1e-6)
    assert result.losses == whole.losses
    assert result.record["warnings"]
    for warning in result.record["warnings"]:
        assert re.match(r"memory ran out in the evaluation after step 0: its forward passes have at most \d+ tokens", warning)


def test_an_evaluation_with_nothing_left_to_give_up_saves_the_steps_taken(tiny_model, tiny_data, small_evaluation, tmp_path):
    options = {"output_dir": str(tmp_path / "out"), "eval_steps": 3}
    small_evaluation["tokens"] = 10**9
    whole = run(config_of(tiny_model, tiny_data))
    with pytest.raises(TrainingError, match=r"Memory ran out in the evaluation after step 3, with one row"):
        run(config_of(tiny_model, tiny_data, **options), sinks=[Shrink(small_evaluation, 3)])
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-000003"]
    small_evaluation["tokens"] = 10**9
    assert run(config_of(tiny_model, tiny_data, resume=True, **options)).losses == whole.losses


def test_memory_gone_in_the_update_is_one_clear_error(tiny_model, tiny_data, tmp_path, monkeypatch):
    taken = []

    def step(self, closure=None):
        taken.append(before(self))
        if len(taken) == 5:
            raise RuntimeError(EXHAUSTED)

    before = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(TrainingError, match=r"outside of a forward pass\. The last checkpoint is '.*step-000004'\. Free some"):
        run(config_of(tiny_model, tiny_data, output_dir=str(tmp_path / "out"), save_steps=2))


def test_memory_gone_while_loading_is_one_clear_error(tiny_model, tiny_data, monkeypatch):
    def load(*_, **__):
        raise MemoryError

    monkeypatch.setattr(importlib.import_module("lownibble.training.making"), "load", load)
    with pytest.raises(TrainingError, match=r"Memory ran out while '.*' was loaded"):
        run(config_of(tiny_model, tiny_data))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_memory_gone_after_saving_is_a_warning(tiny_model, tiny_data, tmp_path, monkeypatch, method):
    def load_file(*_):
        raise RuntimeError("unable to mmap 3000 bytes from file <adapter_model.safetensors>: Cannot allocate memory (12)")

    monkeypatch.setattr(verify, "load_file", load_file)
    monkeypatch.setattr(verify, "safe_open", load_file)
    result = run(config_of(tiny_model, tiny_data, method, output_dir=str(tmp_path / "out")))
    assert "is saved, but there was no memory left to read it back" in result.record["warnings"][0]
    assert json.loads((tmp_path / "out" / "record.json").read_text())["adapter_bytes"] > 0
    assert "saved" not in result.record


def test_another_error_is_not_taken_for_it(tiny_model, tiny_data, monkeypatch):
    def backward(self, batch, n_total, *, measured=False, replay=False):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Passes, "backward", backward)
    with pytest.raises(RuntimeError, match="shapes"):
        run(config_of(tiny_model, tiny_data))


def test_the_dry_run_measures_this_model_and_leaves_nothing(tiny_model, tiny_data):
    """The real thing: passes of a model grow along a line, and weights, gradients and random state are as before."""
    trainer, _ = prepare(config_of(tiny_model, tiny_data, memory_budget="64GB", batch_size=64))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.set_up()
    assert trainer.fit.max_tokens is None
    tokens = [probe.tokens for probe in trainer.fit.probes]
    assert tokens[0] == 0
    assert tokens[-1] == trainer.micro.whole
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert trainer.fit.probes[-1].peak_bytes > 10**8, "the process, not the tensors alone"
    json.dumps(trainer.fit.to_dict())


@pytest.mark.parametrize("packing", [False, True])
def test_the_dry_run_tries_the_largest_pass_that_can_come(tiny_model, tiny_data, packing):
    trainer, _ = prepare(config_of(tiny_model, tiny_data, packing=packing, gradient_accumulation_steps=2))
    micro = trainer.micro
    for tokens in (micro.longest_row, 20, 33, 50, micro.whole):
        if tokens < micro.longest_row:
            continue
        largest = micro.largest(tokens)
        assert micro.size(tokens) == largest.input_ids.numel()
        micro.max_tokens = tokens
        for _, rows in zip(range(40), micro.steps(), strict=False):
            for batch in micro.batches(rows):
                assert batch.input_ids.numel() <= largest.input_ids.numel() <= tokens
                assert batch.n_label_tokens <= largest.n_label_tokens
