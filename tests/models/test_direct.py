"""Layers whose weights the model's code reads itself. Oracles: the code of six architectures; training; transformers."""

import threading

import pytest
import torch
from architectures import build, quiet

import lownibble as ln
from lownibble.config import DataConfig, QuantConfig, TrainConfig
from lownibble.lora import load_adapter, lora_layers, save_adapter
from lownibble.models import direct
from lownibble.models.direct import read_directly, without_effect
from lownibble.quant import QuantLinear

MAMBA = {"state_size": 8, "time_step_rank": 4, "num_hidden_layers": 2, "hidden_size": 32}
QUANT = QuantConfig(block_size=32)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """No test lives on what another has found."""
    monkeypatch.setattr(direct, "_known", {})


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("mamba", {"dt_proj"}), ("falcon_mamba", {"dt_proj"}), ("jamba", {"dt_proj"}), ("rwkv", {"output", "value"}),
        ("longcat_flash", {"classifier"}), ("gemma3n_text", {"correction_coefs", "prediction_coefs"}), ("llama", set()),
        ("mamba2", set()), ("qwen3_moe", set()),
    ],
)  # fmt: skip
def test_they_are_found_without_values(model_type, names):
    with quiet():
        model = build(model_type, 96)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    found = {path.rpartition(".")[2] for path in read_directly(model)}
    assert found - {"lm_head"} == names  # of a head that is shared the embeddings read the weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert state == {key: value for key, value in vars(model).items() if not key.startswith("_")}


@pytest.mark.parametrize("quant", [None, QUANT.with_options(skip_modules=["dt_proj", "lm_head"])])
def test_they_get_no_adapter_where_it_would_do_nothing(write, quant):
    model, _ = ln.load(str(write("mamba", **MAMBA)), quant=quant)
    with pytest.warns(
        UserWarning, match=r"2 layers of MambaForCausalLM \(dt_proj\) get no adapter: its code reads their weights"
    ):
        ln.add_lora(model, ln.LoraConfig(r=2))
    adapted = {path.rpartition(".")[2] for path, _ in lora_layers(model, "default")}
    assert adapted == {"in_proj", "x_proj", "out_proj"}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter)
    model(input_ids=torch.arange(3, 12).unsqueeze(0)).logits.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.parametrize("targets", [["in_proj", "dt_proj"], ".*_proj"])
def test_named_as_targets_they_are_refused(write, targets):
    model, _ = ln.load(str(write("mamba", **MAMBA)))
    with pytest.raises(ln.errors.TargetError, match=r"dt_proj\) cannot carry an adapter.*Leave them out of target_modules"):
        ln.add_lora(model, ln.LoraConfig(r=2, target_modules=targets))


def test_an_adapter_beside_them_is_saved_and_loaded(write, tmp_path):
    folder = str(write("mamba", **MAMBA))
    model, again = ln.load(folder)[0], ln.load(folder)[0]
    with pytest.warns(UserWarning, match="get no adapter"):
        ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights=False))
    save_adapter(model, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    ids = torch.arange(3, 12).unsqueeze(0)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


def test_a_model_is_not_touched_by_looking(write):
    model, _ = ln.load(str(write("llama")))
    model.lock, called = threading.Lock(), []
    model.model.layers[0].register_forward_hook(lambda *given: called.append(given))
    state = torch.random.get_rng_state()
    assert without_effect(model, ["model.layers.0.self_attn.q_proj"]) == []
    assert not called
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_architecture_is_looked_at_once_wherever_its_folder_is(write):
    for name, layers, known in (("one", 2, 1), ("other", 2, 1), ("deeper", 3, 2)):
        model, _ = ln.load(str(write("llama", name=name, num_hidden_layers=layers)))
        assert without_effect(model, ["model.layers.0.self_attn.q_proj"]) == []
        assert len(direct._known) == known


@pytest.mark.parametrize("model_type", ["rwkv", "gemma3n_text", "llama"])
def test_layers_that_are_called_too_keep_their_adapters(model_type):
    with quiet():
        model = build(model_type, 96)
    linears = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert without_effect(model, linears) == []


def dense_of(model):
    return {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def test_they_stay_dense_and_the_model_trains(write, tmp_path):
    folder = write("mamba", **MAMBA)
    with pytest.warns(UserWarning, match=r"2 layers of MambaForCausalLM \(dt_proj\) stay dense: its code reads their weights"):
        model, tokenizer = ln.load(str(folder), quant=QUANT)
    assert dense_of(model) == {"dt_proj", "lm_head"}
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    with pytest.warns(UserWarning, match="get no adapter"):
        ln.add_lora(model, ln.LoraConfig(r=2))
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "w1 w2 w3 w4 w{i}"}}\n' for i in range(8)))
    data = DataConfig(path=str(tmp_path / "rows.jsonl"))
    assert len(ln.train(model, tokenizer, data, TrainConfig(max_steps=2, batch_size=2, torch_compile=False)).losses) == 2


def test_no_word_of_what_is_skipped(write):
    model, _ = ln.load(str(write("mamba", **MAMBA)), quant=QUANT.with_options(skip_modules=["dt_proj"]))
    assert "dt_proj" in dense_of(model)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_a_packed_checkpoint_runs_and_transformers_loads_it(write, tmp_path, bitsandbytes, rounding):
    from transformers import AutoModelForCausalLM

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "w1 w2 w3 w4 w5 w6 w7 w8"}\n' * 60)
    calibration = {"calibration": str(rows), "calibration_tokens": 400, "max_length": 16} if rounding == "gptq" else {}
    folder, out = write("mamba", **MAMBA), tmp_path / "out"
    with pytest.warns(UserWarning, match="stay dense"):
        ln.quantize_model(str(folder), out, rounding=rounding, quant=QuantConfig(), **calibration)
    ours, theirs = ln.load(str(out))[0], AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert dense_of(ours) == {"dt_proj", "lm_head"}
    for layer, other in zip(ours.backbone.layers, theirs.backbone.layers, strict=True):
        assert torch.equal(layer.mixer.dt_proj.weight, other.mixer.dt_proj.weight)
        assert torch.equal(layer.mixer.x_proj.weight.tensors()["codes"], other.mixer.x_proj.weight.data.view(-1, 1))
    with torch.no_grad():
        assert torch.isfinite(ours(input_ids=torch.arange(3, 12).unsqueeze(0)).logits).all()
