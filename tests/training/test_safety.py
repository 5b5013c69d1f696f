"""Nothing is lost: damaged checkpoints, signals, values that are not finite, checks after saving. Oracle: the undisturbed run."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lownibble.errors import OutputError, TrainingError
from lownibble.training import checkpoint, run, sharding, verify
from lownibble.training.events import Evaluated, Finished, Skipped, Stepped
from lownibble.training.sinks import Sink, read_events

ADAPTER = "adapter/adapter_model.safetensors"


def config_of(tiny_model, tiny_data, folder, **options):
    train = {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-2, "max_length": 24, "save_steps": 2, "eval_steps": None}
    return RunConfig(
        model=str(tiny_model), method="lora", data=DataConfig(path=str(tiny_data)), lora=LoraConfig(r=4),
        train=TrainConfig(**{**train, **options}, output_dir=str(folder)),
    )  # fmt: skip


def resumed(config):
    return config.with_options(train=config.train.with_options(resume=True))


class Cut(Sink):
    """Interrupts after a step."""

    def __init__(self, step):
        self.step = step

    def __call__(self, event):
        if isinstance(event, Stepped) and event.step == self.step:
            raise KeyboardInterrupt


def cut_run(config, step):
    with pytest.raises(KeyboardInterrupt):
        run(config, sinks=[Cut(step)])


def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "a flipped bit": lambda folder: flip(folder / "state.safetensors"),
    "cut short": lambda folder: (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:-7]),
    "empty": lambda folder: (folder / "state.safetensors").write_bytes(b""),
    "missing": lambda folder: (folder / "state.safetensors").unlink(),
    "another step": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 6', '"step": 7')
    ),
    "not JSON": lambda folder: (folder / "state.json").write_text("{"),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tiny_model, tiny_data, tmp_path, damage):
    whole = run(config_of(tiny_model, tiny_data, tmp_path / "whole"))
    config = config_of(tiny_model, tiny_data, tmp_path / "cut")
    cut_run(config, 7)
    DAMAGE[damage](tmp_path / "cut" / "checkpoints" / "step-000006")
    result = run(resumed(config))
    assert [warning for warning in result.record["warnings"] if "step-000006' is damaged" in warning]
    assert result.losses == whole.losses
    one, two = (load_file(tmp_path / name / ADAPTER) for name in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_damaged_checkpoints_only_are_an_error(tiny_model, tiny_data, tmp_path):
    config = config_of(tiny_model, tiny_data, tmp_path / "out")
    cut_run(config, 7)
    for folder in (tmp_path / "out" / "checkpoints").iterdir():
        flip(folder / "state.safetensors")
    with pytest.raises(OutputError, match=r"no whole checkpoint.*step-000006.*step-000004.*new --output"):
        run(resumed(config))


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (999_000, 999_500, 1_000_000, 1_000_500):
        checkpoint.save(tmp_path, step, sharding.parts(model), optimizer, {}, {})
    (tmp_path / "step-copied by hand").mkdir()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-1000000", "step-1000500"]
    assert checkpoint.newest(tmp_path)[0].step == 1_000_500


def test_damaged_checkpoints_are_none_of_those_that_are_kept(tmp_path):
    """A run that began with one before them has saved another since."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (10, 20):
        checkpoint.save(tmp_path, step, sharding.parts(model), optimizer, {}, {})
    for step in (20, 30):
        (tmp_path / f"step-{step:06d}").mkdir(exist_ok=True)
        (tmp_path / f"step-{step:06d}" / "state.json").write_text("{")
    checkpoint.save(tmp_path, 12, sharding.parts(model), optimizer, {}, {})
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000010", "step-000012"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tiny_model, tiny_data, tmp_path, forked, number):
    command = [
        sys.executable, "-m", "lownibble.cli.main", "train", "--json", "--model", str(tiny_model), "--data", str(tiny_data),
        "--method", "lora", "--r", "4", "--max-steps", "3000", "--batch-size", "8", "--max-length", "24",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events = tmp_path / "out" / "events.jsonl"
    while process.poll() is None and not (events.exists() and "Stepped" in events.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert json.loads(output.splitlines()[-1])["status"] == "interrupted"
    steps = [event.step for event in read_events(events) if isinstance(event, Stepped)]
    assert f"Stopped after step {steps[-1]} of 3000, which is saved. Resume with --resume." in errors
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{steps[-1]:06d}"]


def test_a_stopped_run_goes_on_to_the_same_bits(tiny_model, tiny_data, tmp_path):
    whole = run(config_of(tiny_model, tiny_data, tmp_path / "whole"))
    config = config_of(tiny_model, tiny_data, tmp_path / "cut")

    class Terminate(Sink):
        def __call__(self, event):
            if isinstance(event, Stepped) and event.step == 5:
                signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 8"):
        run(config, sinks=[Terminate()])
    assert signal.getsignal(signal.SIGTERM) is before
    assert run(resumed(config)).losses == whole.losses


def test_a_signal_after_the_last_step_stops_who_started_the_run(tiny_model, tiny_data, tmp_path):
    config = config_of(tiny_model, tiny_data, tmp_path / "out")

    class Terminate(Sink):
        def __call__(self, event):
            if isinstance(event, Finished):
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt, match="the run is complete, saved in") as stopped:
        run(config, sinks=[Terminate()])
    assert stopped.value.signal == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt, match="result") as stopped:
        run(config.with_options(train=config.train.with_options(output_dir=None)), sinks=[Terminate()])
    assert len(stopped.value.result.losses) == 8
    assert json.loads((tmp_path / "out" / "record.json").read_text())["status"] == "ok"


def poison(model, path, steps, what):
    """Make a module's output (or the gradient that goes into it) NaN in some training steps."""
    seen = {"step": 0}
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def count(module, arguments):
        seen["step"] += module.training and torch.is_grad_enabled()

    def spoil(module, arguments, output):
        if seen["step"] in steps and module.training:
            if what == "output":
                return output * float("nan")
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    model.register_forward_pre_hook(count)
    model.base_model.register_forward_pre_hook(count)
    model.get_submodule(path).register_forward_hook(spoil)
    return parameter


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("output", r"module 'model\.layers\.1\.mlp\.down_proj' \(LoraLinear\) gives values that are not finite"),
        ("gradient", r"the gradient of 'model\.layers\.1\.mlp\.down_proj\..*lora_B' is not finite"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped(tiny_model, tiny_data, what, says):
    model, tokenizer = ln.load(str(tiny_model))
    ln.add_lora(model, LoraConfig(r=4))
    poison(model, "model.layers.1.mlp.down_proj", {3}, what)
    before = {}

    class Keep(Sink):
        def __call__(self, event):
            if isinstance(event, (Stepped, Skipped)):
                before[event.step] = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    train = TrainConfig(max_steps=5, batch_size=8, learning_rate=1e-2, max_length=24, eval_steps=None, torch_compile=False)
    result = ln.train(model, tokenizer, DataConfig(path=str(tiny_data)), train, sinks=[Keep()])
    [skipped] = result.record["skipped"]
    assert skipped["step"] == 3
    assert re.search(says, skipped["reason"]), skipped["reason"]
    assert [step["step"] for step in result.record["steps"]] == [1, 2, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(before[2], before[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before[3], before[4], strict=True))
    json.dumps(result.record, allow_nan=False)


def test_three_in_a_row_end_the_run(tiny_model, tiny_data, tmp_path):
    model, tokenizer = ln.load(str(tiny_model))
    ln.add_lora(model, LoraConfig(r=4))
    poison(model, "model.layers.0.self_attn.o_proj", {4, 5, 6, 7, 8}, "output")
    train = TrainConfig(
        max_steps=9, batch_size=8, max_length=24, save_steps=3, eval_steps=None, torch_compile=False, output_dir=str(tmp_path)
    )
    with pytest.raises(TrainingError, match=r"Steps 4 to 6 were not taken.*layers\.0\.self_attn\.o_proj.*step-000003'"):
        ln.train(model, tokenizer, DataConfig(path=str(tiny_data)), train)


def test_what_was_saved_is_checked(tiny_model, tiny_data, tmp_path):
    result = run(config_of(tiny_model, tiny_data, tmp_path / "out"))
    saved = result.record["saved"]
    assert saved["equal_after_reading_back"] is True
    assert saved["layers"] == 14
    assert saved["layers_whose_B_is_zero"] == 0
    assert saved["rows_that_train_the_end_of_sequence"] == saved["rows"] == 72
    assert saved["tied_weights"] == {"configured": True, "tied": True}
    assert result.record["warnings"] == []
    assert set(result.model.state_dict()) == set(run(config_of(tiny_model, tiny_data, tmp_path / "other")).model.state_dict())


def test_an_adapter_that_learned_nothing_is_said(tiny_model, tiny_data, tmp_path, capsys):
    model, tokenizer = ln.load(str(tiny_model))
    ln.add_lora(model, LoraConfig(r=4))
    train = TrainConfig(max_steps=1, batch_size=8, max_length=24, warmup_ratio=1.0, output_dir=str(tmp_path / "warm"))
    record = ln.train(model, tokenizer, DataConfig(path=str(tiny_data)), train).record  # the first step of a warm-up has rate 0
    assert "every B of the adapter is zero" in record["warnings"][-1]
    assert "every B" in capsys.readouterr().err


def test_a_disk_that_lies_is_found(tiny_model, tiny_data, tmp_path, monkeypatch):
    from lownibble.lora import adapter

    real = adapter.tensorfile.write

    def write(path, entries, parts, metadata=None):
        if "adapter_model" in path.name:
            parts = ((key, first, values + 0.1 * ("lora_B" in key)) for key, first, values in parts)
        real(path, entries, parts, metadata)

    monkeypatch.setattr(adapter.tensorfile, "write", write)
    with pytest.raises(OutputError, match="is not the one in memory"):
        run(config_of(tiny_model, tiny_data, tmp_path / "out"))


def test_a_model_trained_in_full_is_read_back(tiny_model, tiny_data, tmp_path, monkeypatch):
    config = config_of(tiny_model, tiny_data, tmp_path / "out").with_options(method="full")
    assert run(config).record["saved"]["equal_after_reading_back"] is True
    before = verify.check_model

    def damaged(model, folder, *rest, **options):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] += 1
        save_file(tensors, file, {"format": "pt"})
        return before(model, folder, *rest, **options)

    monkeypatch.setattr(verify, "check_model", damaged)
    other = config.with_options(train=config.train.with_options(output_dir=str(tmp_path / "other")))
    with pytest.raises(OutputError, match=r"'model\.norm\.weight'.*is not what was trained"):
        run(other)


def test_the_ledger_adds_up_and_names_upcasts(tiny_model, tiny_data, tmp_path):
    ln.load(str(tiny_model), dtype="bfloat16")[0].save_pretrained(tmp_path / "half")
    for file in tiny_model.iterdir():
        if not (tmp_path / "half" / file.name).exists():
            (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    record = run(config_of(tmp_path / "half", tiny_data, tmp_path / "out").with_options(method="qlora")).record["memory"]
    for kind in ("weights", "codes", "constants", "adapters", "gradients"):
        assert sum(entry["bytes"] for entry in record["ledger"]["tensors"] if entry["kind"] == kind) == record[f"{kind}_bytes"]
    [upcast] = record["ledger"]["upcasts"]
    assert (upcast["kind"], upcast["from"], upcast["to"]) == ("weights", "bfloat16", "float32")
    assert upcast["bytes"] == record["weights_bytes"]


def test_a_skipped_step_is_part_of_the_history(tiny_model, tiny_data, tmp_path):
    """A resumed run tells what was skipped before it."""
    config = config_of(tiny_model, tiny_data, tmp_path / "out", max_steps=6)
    cut_run(config, 5)
    events = tmp_path / "out" / "events.jsonl"
    with events.open("a") as file:
        file.write(json.dumps({"event": "Skipped", "step": 3, "reason": "a test", "seconds": 0.1}) + "\n")
    record = run(resumed(config)).record
    assert [skipped["reason"] for skipped in record["skipped"]] == ["a test"]
    assert [e.step for e in read_events(events) if isinstance(e, Evaluated)]
