"""Training on 8-bit products. Oracles: the same run in exact compute, and the same run again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.errors import BackendError, InputError
from lownibble.kernels import cpu
from lownibble.models.attention import kernel_obstacle
from lownibble.models.head import Head
from lownibble.quant import QuantLinear, eightbit, exact_products, quantize
from lownibble.quant.dense import DenseProducts
from lownibble.training import run
from lownibble.training.loss import check_packing, check_rows, label_loss

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "quality-cpu.json"
DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}

try:
    needs_vnni = pytest.mark.skipif(not cpu.has_int8(), reason="no AVX-512 VNNI")
except BackendError:
    needs_vnni = pytest.mark.skip(reason="no compiled kernels")


@pytest.fixture(scope="module")
def wide_model(widen):
    """The tiny model, as wide as 8-bit products need."""
    return widen()


def train(model, data, output, compute, **options):
    config = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-2, "max_length": 32, "output_dir": str(output)} | options
    return run(RunConfig(
        model=str(model), method="qlora", data=DataConfig(path=str(data), **DATA), lora=LoraConfig(r=4, lora_alpha=8),
        quant=QuantConfig(compute=compute), train=TrainConfig(**config),
    ))  # fmt: skip


@pytest.mark.slow
@needs_vnni
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_losses_follow_exact_compute_and_repeat_bit_for_bit(wide_model, tiny_data, tmp_path, packing, gradient_checkpointing):
    options = {"packing": packing, "gradient_checkpointing": gradient_checkpointing}
    exact = train(wide_model, tiny_data, tmp_path / "exact", "exact", **options)
    first = train(wide_model, tiny_data, tmp_path / "first", "int8", **options)
    again = train(wide_model, tiny_data, tmp_path / "again", "int8", **options)
    assert exact.record["model"]["compute"] == ["exact"]
    assert first.record["model"]["compute"] == ["int8"]
    assert first.losses != exact.losses
    assert first.losses == pytest.approx(exact.losses, rel=0.05)
    assert first.losses[-1] < 0.8 * first.losses[0]
    assert first.losses == again.losses
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("first", "again")]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


@pytest.mark.slow
def test_going_on_in_another_compute_is_told(wide_model, tiny_data, tmp_path):
    with ln.use_backend("reference"):
        train(wide_model, tiny_data, tmp_path / "run", "fp8", max_steps=2, save_steps=1)
        for compute, told in (
            ("fp8", []),
            ("exact", ["the run started with the frozen base in compute 'fp8' and resumes with 'exact'"]),
        ):
            again = train(wide_model, tiny_data, tmp_path / "run", compute, max_steps=2, save_steps=1, resume=True)
            assert [warning for warning in again.record["warnings"] if "compute" in warning] == told


@pytest.mark.slow
def test_fp8_follows_exact_compute_on_the_reference_kernels(wide_model, tiny_data, tmp_path):
    """No CPU has float8 units; the kernels' equality with the reference is held elsewhere. Observed: 0.3 % at most, and less than
    0.1 % at the first step, from products that are 4 % apart."""
    with ln.use_backend("reference"):
        exact = train(wide_model, tiny_data, tmp_path / "exact", "exact")
        fp8 = train(wide_model, tiny_data, tmp_path / "fp8", "fp8")
    assert fp8.record["model"]["compute"] == ["fp8"]
    assert fp8.losses != exact.losses
    assert fp8.losses == pytest.approx(exact.losses, rel=0.02)
    assert fp8.losses[-1] < 0.8 * fp8.losses[0]


@pytest.mark.slow
@needs_vnni
def test_auto_takes_what_is_proven_where_it_runs_and_says_why(wide_model, tiny_model, tiny_data, tmp_path, monkeypatch):
    wide = train(wide_model, tiny_data, tmp_path / "wide", "auto").record["model"]
    assert (wide["compute"], wide["head_compute"]) == (["int8"], "int8")
    assert wide["compute_chosen"].startswith("int8 (faster")
    narrow = train(tiny_model, tiny_data, tmp_path / "narrow", "auto").record["model"]
    assert (narrow["compute"], "multiple of 64" in narrow["compute_chosen"]) == (["exact"], True)
    with ln.use_backend("reference"):
        plain = train(wide_model, tiny_data, tmp_path / "plain", "auto").record["model"]
    assert (plain["compute"], "compiled kernels" in plain["compute_chosen"]) == (["exact"], True)
    monkeypatch.setattr(cpu.library(), "has_int8", lambda: False)
    without = train(wide_model, tiny_data, tmp_path / "without", "auto").record["model"]
    assert (without["compute"], "AVX-512 VNNI" in without["compute_chosen"]) == (["exact"], True)
    assert train(wide_model, tiny_data, tmp_path / "asked", "exact").record["model"]["compute_chosen"] == ""


@needs_vnni
def test_auto_is_decided_in_training_for_a_model_that_was_loaded_before(wide_model, tiny_data):
    model, tokenizer = ln.load(str(wide_model), quant="nf4")
    ln.add_lora(model, LoraConfig(r=4, lora_alpha=8))
    assert {m.compute for m in model.modules() if isinstance(m, QuantLinear)} == {"exact"}
    config = TrainConfig(max_steps=2, batch_size=4, max_length=32)
    record = ln.train(model, tokenizer, DataConfig(path=str(tiny_data), **DATA), config).record["model"]
    assert record["compute"] == ["int8"]
    assert {m.compute for m in model.modules() if isinstance(m, QuantLinear)} == {"exact"}, "as it was loaded"
    model, tokenizer = ln.load(str(wide_model), quant=QuantConfig(compute="exact"))
    ln.add_lora(model, LoraConfig(r=4, lora_alpha=8))
    assert ln.train(model, tokenizer, DataConfig(path=str(tiny_data), **DATA), config).record["model"]["compute"] == ["exact"]


@needs_vnni
def test_auto_stays_exact_where_nothing_is_proven():
    weights = [quantize(torch.randn(64, 64), "nf4")]
    assert eightbit.automatic(weights, torch.float32, torch.device("cpu"))[0] == "int8"
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float32, "cuda"), (torch.bfloat16, "mps")):
        compute, reason = eightbit.automatic(weights, dtype, torch.device(device))
        assert (compute, "not been proven" in reason) == ("exact", True)


def test_what_auto_takes_is_what_the_record_proves():
    """The rule: every figure of both tasks differs by less than seeds do."""
    record = json.loads(RECORD.read_text())
    proven = all(figure["within"] for task in record["tasks"].values() for figure in task["figures"].values())
    assert len(record["tasks"]) == 2
    assert record["workload"]["seeds"] >= 3
    assert (record["workload"]["max_eval_rows"], record["workload"]["head"]) == (1000, "int8")
    assert ({"cpu": "int8"} if proven else {}) == eightbit.PROVEN


@needs_vnni
def test_padded_rows_run_on_our_attention_all_the_same():
    """The comparison that decides it must not take steps of 8 bits for another attention, as it did on the embedded model."""
    model, tokenizer = ln.load("demo", quant=QuantConfig(compute="int8"))
    tokenizer.padding_side = "right"
    batch = tokenizer(["A film of great charm and not a little wit.", "Dull."], return_tensors="pt", padding=True)
    assert check_rows(model, batch["input_ids"], batch["attention_mask"]) == ""


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_vnni)])
def test_the_frozen_head_is_multiplied_in_8_bits_too(wide_model, monkeypatch, backend):
    ids = torch.randint(3, 20, (4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    with ln.use_backend(backend):
        model, _ = ln.load(str(wide_model), quant=QuantConfig(compute="int8"))
        ln.add_lora(model, LoraConfig(r=4, init_lora_weights=False))
        plain = Head._plain
        for make_plain in (plain, lambda head, _: DenseProducts(head.module.weight)):
            monkeypatch.setattr(Head, "_plain", make_plain)
            model.zero_grad()
            loss = label_loss(model, ids, torch.ones_like(ids), ids)
            loss.backward()
            found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
        assert Head(model).plain.code_type is None
        monkeypatch.setattr(Head, "_plain", plain)
        assert Head(model).plain.code_type is torch.int8
        with exact_products(model):
            assert Head(model).plain.code_type is None, "comparisons are exact"
    (loss, gradient), (exact_loss, exact_gradient) = found
    assert loss == pytest.approx(exact_loss, rel=0.01)
    assert 1e-4 < float((gradient - exact_gradient).norm() / exact_gradient.norm()) < 0.05


def test_comparisons_leave_the_model_as_it_was(wide_model):
    with ln.use_backend("reference"):
        model, _ = ln.load(str(wide_model), quant=QuantConfig(compute="int8"))
        model.train()
        ids = torch.arange(3, 15).view(2, 6)
        assert check_rows(model, ids, torch.ones_like(ids)) == kernel_obstacle(model)
        check_packing(model, [[3, 4, 5], [6, 7]])
    assert model.training
    assert {m.compute for m in model.modules() if isinstance(m, QuantLinear)} == {"int8"}


@pytest.mark.parametrize("compute", [pytest.param("int8", marks=needs_vnni), "fp8"])
def test_packing_is_not_refused_for_steps_of_8_bits(wide_model, compute):
    """A row of two tokens is computed exactly when it is alone."""
    with ln.use_backend("cpu" if compute == "int8" else "reference"):
        model, _ = ln.load(str(wide_model), quant=QuantConfig(compute=compute))
        check_packing(model, [list(range(3, 20)), [3, 4]])


@needs_vnni
def test_a_model_that_is_too_narrow_is_refused_by_name(tiny_model):
    with pytest.raises(InputError, match=r"multiple of 64 long.*'model\.layers\.0\.\S+' is \d+ x \d+"):
        ln.load(str(tiny_model), quant=QuantConfig(compute="int8"))
