"""Runs of mixtures of experts, end to end. Oracles: the run without the option, the run that was not interrupted, PEFT."""

import copy
import json
import shutil

import pytest
import torch
from mixtures import MIXTURES, decode_into, folder_of, logits, some_ids, theirs
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import lownibble as ln
from lownibble.config import RunConfig
from lownibble.errors import BackendError
from lownibble.kernels import ops
from lownibble.lora.experts import LoraExperts
from lownibble.lora.portable import WEIGHTS_FILE
from lownibble.quant.experts import Ends
from lownibble.training import run
from lownibble.training.loss import label_loss

try:
    from lownibble.kernels import cpu

    HAS_INT8 = cpu.has_int8()
except BackendError:
    HAS_INT8 = False

TRAIN = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "max_length": 24, "eval_steps": 4}


def config_of(folder, data, output, method="qlora", lora=None, **options):
    return RunConfig(
        model=str(folder), method=method, data=data, lora=ln.LoraConfig(**{"r": 2, **(lora or {})}),
        train=ln.TrainConfig(**TRAIN, output_dir=str(output), **options),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_saved_adapter_changes_the_logits_where_it_is_loaded(peft, kind, method, tokenizer, tmp_path, rows_of):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    result = run(config_of(folder, rows_of(16), tmp_path / "out", method))
    assert any(isinstance(module, LoraExperts) for module in result.model.modules())
    assert result.eval_loss < result.record["evaluations"][0]["loss"]
    base, expected = theirs(folder), logits(result.model.eval(), some_ids())
    if method == "qlora":
        decode_into(base, result.model)
    assert (expected - logits(base, some_ids())).abs().max() > 1e-3
    reloaded = ln.load_adapter(ln.load(str(folder), quant="nf4" if method == "qlora" else None)[0], tmp_path / "out" / "adapter")
    assert torch.equal(logits(reloaded.eval(), some_ids()), expected)
    with_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(logits(with_peft, some_ids()), expected, rtol=1e-4, atol=1e-5)


def weights(folder):
    return load_file(folder / "adapter" / WEIGHTS_FILE)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_options_that_change_no_values(options, tokenizer, tmp_path, rows_of):
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    accumulated = options.get("gradient_accumulation_steps", 1)
    plain = config_of(folder, rows_of(16), tmp_path / "plain")
    other = config_of(folder, rows_of(16), tmp_path / "other", **options)
    other = other.with_options(train=other.train.with_options(batch_size=4 // accumulated))
    run(plain)
    run(other)
    found, expected = weights(tmp_path / "other"), weights(tmp_path / "plain")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-2, atol=2e-4)


@pytest.mark.slow
def test_packed_rows_learn_as_well(tokenizer, tmp_path, rows_of):
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    plain, packed = (
        run(config_of(folder, rows_of(32), tmp_path / f"{packing}", packing=packing)).eval_loss for packing in (False, True)
    )
    assert packed == pytest.approx(plain, abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_INT8, reason="no AVX-512 VNNI")
def test_products_of_experts_in_eight_bits(tokenizer, tmp_path, rows_of):
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    config = AutoConfig.from_pretrained(folder, moe_intermediate_size=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    results = {}
    for compute in ("exact", "int8", "auto"):
        config = config_of(folder, rows_of(32), tmp_path / compute).with_options(quant=ln.QuantConfig(compute=compute))
        results[compute] = run(config)
    assert results["auto"].record["model"]["compute"] == ["int8"]
    assert results["int8"].losses != results["exact"].losses
    assert results["int8"].losses == pytest.approx(results["exact"].losses, rel=0.01)


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tokenizer, tmp_path, rows_of):
    folder = folder_of("gpt_oss", tmp_path / "model", tokenizer)
    run(config_of(folder, rows_of(16), tmp_path / "whole", save_steps=2))
    first = config_of(folder, rows_of(16), tmp_path / "resumed", save_steps=2)
    run(first)
    newest = max((tmp_path / "resumed" / "checkpoints").iterdir(), key=lambda path: int("".join(filter(str.isdigit, path.name))))
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "resumed" / "adapter")
    run(first.with_options(train=first.train.with_options(resume=True)))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_is_adapted_is_said(tokenizer, tmp_path, rows_of):
    folder = folder_of("mixtral", tmp_path / "model", tokenizer)
    run(config_of(folder, rows_of(16), tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["model"]["adapted"] == {"linear layers": 8, "weights of experts": 4}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_full_fine_tuning_is_saved_under_the_checkpoints_names(kind, tokenizer, tmp_path, rows_of):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    train = ln.TrainConfig(**{**TRAIN, "learning_rate": 1e-3}, output_dir=str(tmp_path / "out"))
    result = run(RunConfig(model=str(folder), method="full", data=rows_of(16), train=train))
    again = theirs(tmp_path / "out" / "model")
    torch.testing.assert_close(logits(again, some_ids()), logits(result.model.eval(), some_ids()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "quant"), [("qwen3_moe", "nf4"), pytest.param("gpt_oss", "mxfp4", marks=pytest.mark.slow), ("mixtral", None)]
)
def test_a_step_with_all_experts_at_once_is_the_loops(kind, quant, tokenizer, tmp_path):
    """On Triton's kernels, in the interpreter where there is no GPU, against the reference's loop on the same device."""
    if ops.backend_status()["triton"] != "ok":
        pytest.skip("no triton")
    folder, ids = folder_of(kind, tmp_path / "model", tokenizer), some_ids()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = ln.load(str(folder), quant=quant and ln.QuantConfig(quant_type=quant, block_size=32, double_quant=False))
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False))
    model.to(device)
    waited = []

    def step(backend):
        model.zero_grad()
        with ln.use_backend(backend), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ends, "segments", lambda ends, loop=Ends.segments: waited.append(backend) or loop(ends))
            loss = label_loss(model, ids.to(device), torch.ones_like(ids).to(device), ids.to(device))
            loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **gradients}

    ours, expected = step("triton"), step("reference")
    assert set(waited) == {"reference"}
    assert sum("experts" in name for name in ours) == 2 * 2 * 2
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=name)
