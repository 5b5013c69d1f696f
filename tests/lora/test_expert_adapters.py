"""Adapters on the experts of mixtures. Oracle: PEFT's `target_parameters`."""

import copy
import json
import warnings

import pytest
import torch
from mixtures import ATTENTION, MIXTURES, build, decode_into, folder_of, known, logits, quiet, some_ids, theirs
from safetensors.torch import load_file

import lownibble as ln
from lownibble.errors import AdapterError, TargetError
from lownibble.kernels import ops
from lownibble.lora import adapter as files
from lownibble.lora import lora_layers, remove_adapter
from lownibble.lora.experts import LoraExperts, _LoraExperts
from lownibble.models import experts
from lownibble.quant.codecs import quantize_experts
from lownibble.quant.experts import Ends, dense_product, frozen_product

WEIGHTS = ["gate_up_proj", "down_proj"]
STEPS, RELATIVE = 10, 1e-5  # issue 25
LOGITS = {"rtol": 1e-5, "atol": 2e-5}  # as in test_lora_peft


def attention_of(model):
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return [name for name in ATTENTION if name in names]


def with_peft(peft, model, **options):
    config = {"r": 4, "lora_alpha": 8, "target_modules": attention_of(model), "init_lora_weights": False, **options}
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**config)).eval()


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT looks at modules only, and uses them
@pytest.mark.parametrize("kind", MIXTURES)
def test_files_are_pefts_both_ways(peft, kind, tokenizer, tmp_path):
    base = theirs(folder_of(kind, tmp_path / "model", tokenizer))
    model = with_peft(peft, copy.deepcopy(base), target_parameters=WEIGHTS, rank_pattern={"down_proj": 2})
    expected = logits(model, some_ids())
    assert (expected - logits(base, some_ids())).abs().max() > 0.1, "the adapter matters"
    model.save_pretrained(tmp_path / "peft")
    ours = ln.load_adapter(copy.deepcopy(base), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(ours, some_ids()), expected, **LOGITS)
    ln.save_adapter(ours, tmp_path / "ours")
    theirs_file, our_file = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("peft", "ours"))
    assert theirs_file.keys() == our_file.keys()
    assert all(torch.equal(theirs_file[key], our_file[key]) for key in our_file)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(logits(back, some_ids()), expected)


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["down_proj"], ["layers.1.mlp.experts.down_proj", "gate_up_proj"]])
def test_one_of_the_weights_or_some_layers(peft, targets, tokenizer, tmp_path):
    base = theirs(folder_of("qwen3_moe", tmp_path / "model", tokenizer))
    model = with_peft(peft, copy.deepcopy(base), target_parameters=targets)
    model.save_pretrained(tmp_path / "peft")
    ours = ln.load_adapter(copy.deepcopy(base), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(ours, some_ids()), logits(model, some_ids()), **LOGITS)
    ln.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back, some_ids()), logits(model, some_ids()), **LOGITS)


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_losses_of_ten_steps_are_pefts(peft, kind, quant, tokenizer, tmp_path):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    reference, (model, _) = theirs(folder), ln.load(str(folder), quant=quant)
    if quant:
        decode_into(reference, model)
    oracle = with_peft(peft, reference, target_parameters=WEIGHTS, init_lora_weights=True)
    oracle.save_pretrained(tmp_path / "start")
    ln.load_adapter(model, tmp_path / "start", trainable=True)
    losses = [steps_of(each.train()) for each in (oracle, model)]
    assert losses[0][0] - losses[0][-1] > 0.01, "it learns"
    assert losses[1] == pytest.approx(losses[0], rel=RELATIVE)


def steps_of(model):
    optimizer, ids, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), some_ids(), []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


BACKENDS = [name for name, status in ops.backend_status().items() if status == "ok"]
"""Triton in its interpreter where there is no GPU, for which a loop and kernels for all experts at once are compared."""


@pytest.mark.parametrize("held", ["nf4", "int8", "dense", "turned", "trained"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_formula(backend, held):
    """Oracle: torch's autograd through dense weights per expert."""
    drawn, device = torch.Generator().manual_seed(0), "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    ends, shape, r = Ends(torch.tensor([3, 3, 7, 9], dtype=torch.int32, device=device), 10), (4, 10, 64), 2
    weights = torch.randn(shape, generator=drawn).to(device)
    packed = quantize_experts(weights, ln.QuantConfig(quant_type=held)) if held in ("nf4", "int8") else weights
    packed = weights.transpose(1, 2).contiguous().transpose(1, 2) if held == "turned" else packed
    weights = packed.clone() if isinstance(packed, torch.Tensor) else packed.dequantize()
    sizes = (10, 64), (4, r, 64), (4, 10, r)
    x, A, B = (torch.randn(size, generator=drawn).to(device).requires_grad_() for size in sizes)
    dy = torch.randn(10, 10, generator=drawn).to(device)
    tensors = [x] if held == "trained" else [x, A, B]
    with ln.use_backend(backend):
        if held == "trained":
            tensors.append(packed.requires_grad_())
            y = dense_product(x, packed, ends)
        else:
            y = _LoraExperts.apply(x, packed, ends, A, B, 0.5, None, [])
        frozen = frozen_product(x.detach().requires_grad_(), packed, ends)
        (frozen_dx,) = torch.autograd.grad(frozen, frozen.grad_fn.next_functions[0][0].variable, dy)
        with torch.no_grad():
            decoded = frozen_product(x, packed, ends)
    found = torch.autograd.grad(y, tensors, dy)
    weights.requires_grad_()
    matrices = weights if held == "trained" else weights + 0.5 * B @ A
    rows = [slice(0, 3), slice(3, 3), slice(3, 7), slice(7, 9)]

    def products(matrices):
        each = (x[part] @ matrices[expert].t() for expert, part in enumerate(rows))
        return torch.cat([*each, torch.zeros(1, 10, device=device)])

    expected, plain = products(matrices), products(weights)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for each in (frozen, decoded):
        torch.testing.assert_close(each, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frozen_dx, torch.autograd.grad(plain, x, dy)[0], rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad(expected, [x, weights] if held == "trained" else tensors, dy)
    for ours, gradient in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)
    assert not found[1][1].any(), "an expert without rows has no gradient"


@pytest.mark.parametrize("rounded", [False, True])
def test_16_bit_activations_take_adapters_rounded_once_and_give_float32_gradients(rounded):
    """Kernels for all experts at once against the loop: roundings apart."""
    if ops.backend_status()["triton"] != "ok":
        pytest.skip("no triton")
    drawn, device = torch.Generator().manual_seed(0), "cuda" if torch.cuda.is_available() else "cpu"
    packed = quantize_experts(torch.randn((4, 48, 64), generator=drawn).to(device), ln.QuantConfig())
    x = torch.randn((40, 64), generator=drawn).to(device, torch.bfloat16)
    A, B = (torch.randn(size, generator=drawn).to(device).requires_grad_() for size in ((4, 8, 64), (4, 48, 8)))
    ends = torch.tensor([11, 11, 25, 40], dtype=torch.int32, device=device)

    def step(backend):
        with ln.use_backend(backend):
            leaf = x.clone().requires_grad_()
            copies = [A.detach().bfloat16(), B.detach().bfloat16()] if rounded else []
            y = _LoraExperts.apply(leaf, packed, Ends(ends, 40), A, B, 0.5, None, copies)
            return y, *torch.autograd.grad(y.float().square().sum(), [leaf, A, B])

    for ours, expected in zip(step("triton"), step("reference"), strict=True):
        assert ours.dtype == expected.dtype
        assert (ours - expected).abs().max() < 0.02 * expected.abs().max()


def test_all_linear_includes_experts_unless_told_otherwise(tokenizer, tmp_path):
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    model, _ = ln.load(str(folder), quant="nf4")
    ln.add_lora(model, ln.LoraConfig(r=2))
    adapted = [path for path, layer in lora_layers(model, "default") if isinstance(layer, LoraExperts)]
    assert adapted == [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in WEIGHTS]
    files.save_adapter(model, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_parameters"] == sorted(WEIGHTS)
    assert "target_experts" not in written, "PEFT does not know it"
    model, _ = ln.load(str(folder), quant="nf4")
    ln.add_lora(model, ln.LoraConfig(r=2, target_experts=False))
    assert not any(isinstance(layer, LoraExperts) for _, layer in lora_layers(model, "default"))


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_removing_an_adapter_leaves_the_model_as_it_was(quant, tokenizer, tmp_path):
    model, _ = ln.load(str(folder_of("gpt_oss", tmp_path / "model", tokenizer)), quant=quant)
    expected, names = logits(model, some_ids()), {name for name, _ in model.named_parameters()}
    ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights=False))
    assert not torch.equal(logits(model, some_ids()), expected)
    remove_adapter(model, "default")
    assert {name for name, _ in model.named_parameters()} == names
    torch.testing.assert_close(logits(model, some_ids()), expected, rtol=1e-5, atol=1e-6)
    if quant is None:
        assert experts.shapes(model), "parameters of the container again"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"target_parameters": ["experts.w13"]},
            r"\['experts.w13'\] match no weight of experts. Candidates: down_proj, gate_up_proj",
        ),
        ({"target_parameters": ["q_proj.bias"]}, "match no weight of experts"),
        ({"target_parameters": ["x_proj.weight"]}, "match no linear module's weight"),
        ({"lora_dropout": 0.1}, r"cannot be combined with lora_dropout = 0.1.*--no-target-experts"),
        ({"use_dora": True}, "cannot be combined with use_dora"),
        ({"init_lora_weights": "pissa"}, "cannot be combined with init_lora_weights = 'pissa'"),
        ({"rank_pattern": {"w1": 3}}, "rank_pattern 'w1' matches no targeted module"),
    ],
)
def test_what_experts_cannot_do_is_refused_by_name(options, said, tokenizer, tmp_path):
    model, _ = ln.load(str(folder_of("mixtral", tmp_path / "model", tokenizer)), quant="nf4")
    with pytest.raises(TargetError, match=said):
        ln.add_lora(model, ln.LoraConfig(r=2, **options))
    assert not list(lora_layers(model, "default"))


def test_an_adapter_of_other_experts_is_refused_by_name(tokenizer, tmp_path):
    model, _ = ln.load(str(folder_of("mixtral", tmp_path / "model", tokenizer)), quant="nf4")
    ln.add_lora(model, ln.LoraConfig(r=2))
    ln.save_adapter(model, tmp_path / "adapter")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tmp_path / "model", num_local_experts=6)
    with pytest.raises(AdapterError, match=r"experts.base_layer.lora_A.weight' has shape \(8, 64\), not \(12, 64\)"):
        ln.load_adapter(AutoModelForCausalLM.from_config(config), tmp_path / "adapter", any_base=True)


def test_a_module_that_is_trained_in_full_keeps_its_experts_to_itself(tokenizer, tmp_path):
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    model, _ = ln.load(str(folder))
    ln.add_lora(model, ln.LoraConfig(r=2, modules_to_save=["mlp.experts"]))
    assert not any(isinstance(layer, LoraExperts) for _, layer in lora_layers(model, "default"))
    ln.save_adapter(model, tmp_path / "adapter")
    ln.load_adapter(ln.load(str(folder))[0], tmp_path / "adapter")
    ln.add_lora(model, ln.LoraConfig(r=2, target_parameters=[]), name="second")
    assert not any(isinstance(layer, LoraExperts) for _, layer in lora_layers(model, "second"))


def test_a_linear_layer_named_by_its_weight_stays_in_the_file(peft, tokenizer, tmp_path):
    base = theirs(folder_of("qwen3_moe", tmp_path / "model", tokenizer))
    model = with_peft(peft, copy.deepcopy(base), target_modules=["q_proj"], target_parameters=["o_proj.weight", "down_proj"])
    model.save_pretrained(tmp_path / "peft")
    ours = ln.load_adapter(copy.deepcopy(base), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(ours, some_ids()), logits(model, some_ids()), **LOGITS)
    ln.save_adapter(ours, tmp_path / "ours")
    for again in (peft.PeftModel.from_pretrained, ln.load_adapter):
        torch.testing.assert_close(
            logits(again(copy.deepcopy(base), tmp_path / "ours").eval(), some_ids()), logits(model, some_ids()), **LOGITS
        )


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"layers_to_transform": [0]}, {0}),
        ({"exclude_modules": r".*layers\.0\..*"}, {1}),
        ({"exclude_modules": ["experts"]}, set()),
        ({"target_modules": ["q_proj"], "target_parameters": ["down_proj"], "layers_to_transform": [1]}, {1}),
        ({"target_modules": ["q_proj"], "target_parameters": ["down_proj"], "exclude_modules": r".*layers\.0\..*"}, {1}),
    ],
)  # fmt: skip
def test_layers_and_exclusions_reach_experts(options, layers, tokenizer, tmp_path):
    model, _ = ln.load(str(folder_of("qwen3_moe", tmp_path / "model", tokenizer)))
    ln.add_lora(model, ln.LoraConfig(r=2, **options))
    adapted = [path for path, layer in lora_layers(model, "default") if isinstance(layer, LoraExperts)]
    assert {int(path.split(".")[2]) for path in adapted} == layers
    ln.save_adapter(model, tmp_path / "adapter")
    again = ln.load_adapter(ln.load(str(tmp_path / "model"))[0], tmp_path / "adapter")
    assert {path for path, _ in lora_layers(again, "default")} == {path for path, _ in lora_layers(model, "default")}


def test_removing_the_last_adapter_gives_the_container_back(tokenizer, tmp_path):
    model = theirs(folder_of("qwen3_moe", tmp_path / "model", tokenizer))
    before, names = model.config._experts_implementation, [name for name, _ in model.named_parameters()]
    ln.add_lora(model, ln.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj"]), name="one")
    ln.add_lora(model, ln.LoraConfig(r=2), name="two")
    remove_adapter(model, "one")
    assert model.config._experts_implementation == experts.IMPLEMENTATION
    remove_adapter(model, "two")
    assert model.config._experts_implementation == before
    assert [name for name, _ in model.named_parameters()] == names, "PEFT wraps them in this order"


def test_experts_named_as_modules_are_pointed_to_the_option(tokenizer, tmp_path):
    model, _ = ln.load(str(folder_of("qwen3_moe", tmp_path / "model", tokenizer)))
    with pytest.raises(TargetError, match=r"\['down_proj'\] are weights of experts. Name them in target_parameters"):
        ln.add_lora(model, ln.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def test_what_peft_will_not_load_is_said_before_training(tokenizer, tmp_path):
    model, _ = ln.load(str(folder_of("deepseek_v3", tmp_path / "model", tokenizer)))
    with pytest.warns(
        UserWarning, match="PEFT will not load this adapter, because of lora_dropout: it takes down_proj, gate_proj"
    ):
        ln.add_lora(model, ln.LoraConfig(r=2, lora_dropout=0.1, target_experts=False))


def test_experts_of_another_form_get_no_adapter_and_this_is_said(tokenizer, tmp_path):
    model = theirs(folder_of("llama4_text", tmp_path / "model", tokenizer))
    with pytest.warns(UserWarning, match=r"4 weights of experts of Llama4ForCausalLM \(down_proj, gate_up_proj\) get no adapter"):
        ln.add_lora(model, ln.LoraConfig(r=2))


@pytest.mark.parametrize("kind", ["laguna", "inkling2_text", "mixtral", "deepseek_v3"])
def test_tensors_that_peft_would_misplace_are_said(peft, kind, tmp_path):
    """Oracle: what PEFT's conversion of the file's tensors leaves of their names."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert

    known(kind)
    with quiet():
        model = ln.add_lora(build(kind, 96), ln.LoraConfig(r=2))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ln.save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    with quiet():
        lost = tensors.keys() - convert(build(kind, 96), config, dict(tensors)).keys()
    said = [str(each.message) for each in told if "PEFT does not apply" in str(each.message)]
    assert bool(lost) == (kind in ("laguna", "inkling2_text"))
    assert len(said) == bool(lost)
    if lost:
        assert f"does not apply {len(lost)} of this adapter's {len(tensors)} tensors" in said[0]
        assert any(f"('{key}' to " in said[0] for key in lost)
