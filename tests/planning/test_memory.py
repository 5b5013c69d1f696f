"""From options to a step. Oracles: the real quantiser, optimisers and injection; bundled models' published parameters."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lownibble.arch import paths, read_shape
from lownibble.config import LoraConfig, QuantConfig, TrainConfig
from lownibble.errors import ConfigError, ModelError, TargetError
from lownibble.lora import add_lora
from lownibble.lora.active import lora_layers
from lownibble.models.load import quantizable
from lownibble.optim import close_states, make_optimizer, planned_bytes, specs
from lownibble.optim import state_bytes as optimizer_state_bytes
from lownibble.planning import hardware, models
from lownibble.planning.memory import _ranks, packed_layers, plan_memory, state_bytes
from lownibble.planning.plan import plan
from lownibble.quant import quantize

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=100
)


@pytest.mark.parametrize("name", models.names())
def test_bundled_models_have_their_published_parameters(name):
    assert models.find_shape(name).parameters == models.published_parameters(name)


def test_a_model_is_found_by_its_hub_id_its_folder_and_its_file(tmp_path):
    assert models.find_shape("meta-llama/Llama-2-7b-hf").layers == 32
    CONFIG.save_pretrained(tmp_path)
    assert models.find_shape(str(tmp_path)) == read_shape(tmp_path)
    assert models.find_shape(str(tmp_path / "config.json")).hidden == 64


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ModelError, match=r"There is no model 'lama-2-7b'. Did you mean 'llama-2-7b'\?"):
        models.find_shape("lama-2-7b")


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(ConfigError, match=r"There is no GPU 'rtx-4900' in the table. Did you mean 'rtx-4090'\?"):
        hardware.device("rtx-4900")


@pytest.mark.parametrize(
    "text",
    [
        "memory=24", "memory=24,bandwidth=1,tflops=x", "memory=0,bandwidth=1,tflops=1", "size=1",
        "memory=nan,bandwidth=1,tflops=1", "memory=24,bandwidth=inf,tflops=1", "memory=24,memory=80,bandwidth=1,tflops=1",
    ],
)  # fmt: skip
def test_a_gpu_by_hand_needs_all_its_figures(text):
    with pytest.raises(ConfigError, match=r"--gpu"):
        hardware.device(text)


@pytest.mark.parametrize("name", hardware.names())
def test_every_figure_has_a_source(name):
    found = hardware.device(name)
    assert {figure for figure, _ in found.sources} >= {"memory", "bandwidth", "tflops"}
    assert all("2026" in source for _, source in found.sources)
    assert hardware.device(found.title.replace(" SXM", "").replace(" 12GB", "")) == found


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "int4"])
def test_packed_layers_are_as_large_as_packed_weights(quant_type):
    shape = read_shape(CONFIG.to_dict())
    config = QuantConfig(quant_type=quant_type, block_size=32, pattern={"down_proj": {"quant_type": "int8"}})
    for path, tensors in packed_layers(shape, config).items():
        linear = dict(paths(shape))[path]
        packed = quantize(torch.randn(linear.out_features, linear.in_features), config.for_layer(path))
        assert [(each.n_bytes, each.shape) for each in tensors] == [(t.nbytes, tuple(t.shape)) for t in packed.tensors().values()]


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("shapes", [[(64, 64), (7,)], [(1024, 512), (512, 512), (512,)], [(3000, 2000)]])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_optimiser_states(optim, shapes, device_type, monkeypatch):
    """On CUDA: its sizes of pages, on the CPU."""
    size = specs.page_bytes
    monkeypatch.setattr(specs, "page_bytes", lambda total, budget, _: size(total, budget, device_type))
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = make_optimizer(optim, parameters, 1e-3, 0.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = planned_bytes(optim, optimizer) if optim.startswith("paged") else optimizer_state_bytes(optimizer).total
    close_states(optimizer)
    ours = sum(state_bytes([(p.numel(), 4) for p in parameters], TrainConfig(optim=optim), device_type))
    assert ours == pytest.approx(real, abs=1 << 20), "to a page"


@pytest.mark.parametrize(
    "options",
    [
        {}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": r".*\.mlp\..*"}, {"layers_to_transform": [0, 2]},
        {"rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 32}}, {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_targets_are_those_of_injection(options):
    config = LoraConfig(r=8, **options)
    model = add_lora(LlamaForCausalLM(CONFIG), config)
    theirs = {path: layer.adapter("default").r for path, layer in lora_layers(model, "default")}
    assert _ranks(read_shape(CONFIG.to_dict()), config) == theirs


def test_targets_that_match_nothing_are_named():
    with pytest.raises(TargetError, match="Candidates: down_proj, gate_proj"):
        _ranks(read_shape(CONFIG.to_dict()), LoraConfig(target_modules=["query"]))


def test_what_a_plan_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="does not know 'bias'"):
        _ranks(read_shape(CONFIG.to_dict()), LoraConfig(bias="all"))
    with pytest.raises(ConfigError, match=r"does not know use_dora with lora_dropout\. Got 0\.1\. Leave it out"):
        _ranks(read_shape(CONFIG.to_dict()), LoraConfig(use_dora=True, lora_dropout=0.1))
    with pytest.raises(ConfigError, match="does not know use_dora with an adapted lm_head"):
        _ranks(read_shape(CONFIG.to_dict()), LoraConfig(use_dora=True, target_modules=["lm_head"]))


def test_dora_adds_a_magnitude_and_a_norm_a_row():
    lora, dora = (plan_of(lora=LoraConfig(use_dora=on)) for on in (False, True))
    rows = sum(linear.out_features for _, linear in paths(models.find_shape("llama-2-7b")))
    assert dora.trained_parameters - lora.trained_parameters == rows
    assert dora.kinds["weights"] - lora.kinds["weights"] == pytest.approx(4 * rows, abs=512 * 300)
    assert dora.kinds["optimizer"] - lora.kinds["optimizer"] == 8 * rows
    assert dora.kinds["activations"] > lora.kinds["activations"]


def plan_of(model="llama-2-7b", gpu="rtx-4090", method="qlora", lora=None, **train):
    return plan_memory(
        models.find_shape(model), hardware.device(gpu), method, quant=QuantConfig(), lora=lora or LoraConfig(),
        train=TrainConfig(**{"batch_size": 1, **train}),
    )  # fmt: skip


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_was_taken_out_of_the_base_is_kept(init):
    plain, found = plan_of(method="qlora"), plan_of(method="qlora", lora=LoraConfig(init_lora_weights=init))
    assert found.allocated.likely - plain.allocated.likely == 4 * plain.trained_parameters
    assert plain.kinds["adapters"] == (4 + 2) * plain.trained_parameters, "and their copies in 16 bits"
    assert plan_of(lora=LoraConfig(init_lora_weights="qera_approx")).allocated == plain.allocated


def test_kinds_add_up_to_what_is_allocated():
    for method in ("full", "lora", "qlora"):
        found = plan_of(method=method)
        assert sum(found.kinds.values()) == found.allocated.likely == max(found.instants.values())
        assert found.allocated.low <= found.allocated.likely <= found.allocated.high
        assert found.allocated.likely <= found.reserved.likely <= found.device.likely


def test_weights_are_what_the_model_has():
    shape = models.find_shape("llama-2-7b")
    assert plan_of(method="lora").kinds["weights"] == pytest.approx(2 * shape.parameters, rel=1e-4)
    assert plan_of(method="full").kinds["optimizer"] == pytest.approx(8 * shape.parameters, rel=1e-4)
    packed = plan_of(method="qlora").kinds
    assert packed["codes"] == shape.linear_parameters / 2
    assert packed["codes"] + packed["constants"] == pytest.approx(4.127 / 8 * shape.linear_parameters, rel=1e-3)


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"max_length": 1024}, {"gradient_checkpointing": False}])
def test_more_takes_more(change):
    base = {"gradient_checkpointing": True}
    assert plan_of(**{**base, **change}).allocated.likely > plan_of(**base).allocated.likely


def test_the_published_peak_of_qlora_65b_is_within_reach():
    """The paper's 65B on 48 GB: batch 1 x 512, checkpointed, paged. 12 GB, as an article has it, is not."""
    lora = LoraConfig(r=64)
    found = plan_of("llama-65b", lora=lora, gradient_checkpointing=True, optim="paged_adamw")
    assert 36 * 2**30 < found.device.low < found.device.high < 48 * 2**30


def test_a_process_of_a_torch_with_cuda_holds_its_libraries(monkeypatch):
    assert hardware._has_cuda_libraries() == (torch.version.cuda is not None)
    for has, expected in ((False, hardware.PROCESS), (True, hardware.PROCESS_WITH_CUDA)):
        monkeypatch.setattr(hardware, "_has_cuda_libraries", lambda has=has: has)
        assert hardware.this_machine().process_bytes == expected


def test_a_process_holds_its_tokenizer():
    """Gemma's takes 268 MiB and the embedded model's 18, which is nothing on a card."""
    small, large = (replace(plan_of(), vocab=n, on_device=hardware.this_machine()) for n in (49152, 262144))
    more = [b - a for a, b in zip(small.device, large.device, strict=True)]
    assert 0 < more[0] < more[1] < (268 - 18 - 3) * 2**20 < more[2] < (268 - 18 + 3) * 2**20
    assert replace(small, vocab=1000).device == small.device
    on_card = replace(large, on_device=hardware.device("rtx-4090"))
    assert on_card.device == replace(on_card, vocab=0).device


def test_planning_does_not_import_torch():
    code = "import sys, lownibble; lownibble.plan('llama-2-7b', gpu='rtx-4090'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_adapters_of_16_bits_take_half_and_have_no_copies():
    shape, device = models.find_shape("llama-2-7b"), hardware.device("a100-80gb")
    options = {"quant": QuantConfig(), "lora": LoraConfig(r=64), "train": TrainConfig(batch_size=1, max_length=64)}
    wide, narrow = (
        plan_memory(shape, device, "qlora", adapter_dtype=dtype, **options).kinds for dtype in ("float32", "bfloat16")
    )
    for kind, share in {"adapters": 1 / 3, "optimizer": 1 / 2}.items():
        assert narrow[kind] == pytest.approx(wide[kind] * share, rel=0.01), kind


def test_what_is_skipped_stays_dense():
    shape, options = read_shape(CONFIG.to_dict()), {"lora": LoraConfig(), "train": TrainConfig(batch_size=1, max_length=8)}
    device = hardware.device("cpu")
    for skip in (["lm_head"], ["lm_head", "down_proj"], ["lm_head", "model.layers.1"], ["lm_head", "self_attn"]):
        model = LlamaForCausalLM(CONFIG)
        quant = QuantConfig(skip_modules=skip)
        kinds = plan_memory(shape, device, "qlora", quant=quant, **options).kinds
        packed = sum(model.get_submodule(path).weight.numel() for path in quantizable(model, quant))
        assert kinds["codes"] == packed / 2
        dense = sum(p.nbytes for p in model.parameters()) - 4 * packed
        assert kinds["weights"] == pytest.approx(dense, abs=1000)
    with pytest.raises(ConfigError, match="skip_modules 'wrong'"):
        plan_memory(shape, device, "qlora", quant=QuantConfig(skip_modules=["wrong"]), **options)
    with pytest.raises(ConfigError, match="quantised head"):
        plan_memory(shape, device, "qlora", quant=QuantConfig(skip_modules=[]), **options)


@pytest.mark.parametrize("gpu", ["rtx-4090", "cpu"])
@pytest.mark.parametrize(("options", "says"), [
    ({"optim_page_budget": "4MB"}, r"for paged optimisers\. Got optim='adamw'\. Set optim='paged_adamw'"),
    ({"optim": "paged_adamw", "optim_page_budget": "4KB"}, r"at least one page, 1 MiB\. Got 4000 bytes"),
])  # fmt: skip
def test_page_budgets_that_the_optimiser_refuses_are_not_planned(options, says, gpu):
    with pytest.raises(ConfigError, match=says):
        plan("smollm2-135m", gpu=gpu, method="lora", **options)
    plan("smollm2-135m", gpu=gpu, method="lora", optim="paged_adamw", optim_page_budget="1048576B")
