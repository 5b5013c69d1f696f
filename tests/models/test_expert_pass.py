"""The training pass through experts, expert by expert. Oracle: transformers' own over dense weights with the adapters added."""

import pytest
import torch
from mixtures import MIXTURES, decode_into, folder_of, some_ids, theirs
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import lownibble as ln
from lownibble.lora.experts import LoraExperts
from lownibble.lora.layer import LoraLinear
from lownibble.models import expert_pass, experts
from lownibble.models.experts import containers


@pytest.fixture
def passes(monkeypatch):
    """How often the pass has run."""
    count = []
    run = expert_pass.expert_pass
    monkeypatch.setattr(experts, "expert_pass", lambda *given: (count.append(1), run(*given))[1])
    return count


def adapted(folder, quant, **lora):
    model, _ = ln.load(str(folder), quant=quant)
    model = ln.add_lora(model, ln.LoraConfig(r=3, **lora))
    random = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return model


def gradients(model, wanted):
    """By name, of the sum of all logits' squares."""
    found = torch.autograd.grad(model(input_ids=some_ids()).logits.pow(2).sum(), [tensor for _, tensor in wanted])
    return {name: value for (name, _), value in zip(wanted, found, strict=True)}


class Sum(nn.Module):
    """(E, out, in), or turned, plus scale B A: parametrises a dense weight by an adapter."""

    def __init__(self, adapter, turned):
        super().__init__()
        self.lora_A, self.lora_B = (nn.Parameter(each.detach().clone()) for each in (adapter.lora_A, adapter.lora_B))
        self.scale, self.turned = adapter.scale, turned

    def forward(self, weight):
        delta = self.scale * self.lora_B @ self.lora_A
        return weight + (delta.mT if self.turned else delta)


BOTH = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("weights", [BOTH, ("down_proj",)], ids=str)
def test_gradients_are_those_of_transformers_pass(kind, quant, weights, passes, tokenizer, tmp_path):
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    attention = "kv_b_proj" if kind == "deepseek_v3" else "k_proj"
    model, reference = adapted(folder, quant, target_modules=[attention], target_parameters=list(weights)), theirs(folder)
    if quant:
        decode_into(reference, model)
    ours, others = [], []
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            of_experts = isinstance(layer, LoraExperts)
            holder, name = path.rpartition(".")[::2] if of_experts else (path, "weight")
            module = reference.get_submodule(holder)
            made = Sum(layer.adapter("default"), of_experts and module.is_transposed)
            register_parametrization(module, name, made)
            for matrix in ("lora_A", "lora_B"):
                ours.append((f"{path}.{matrix}", getattr(layer.adapter("default"), matrix)))
                others.append((f"{path}.{matrix}", getattr(made, matrix)))
    found, expected = gradients(model, ours), gradients(reference, others)
    assert len(passes) == len(list(containers(model)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


def test_rows_of_all_experts_are_never_made(passes, tokenizer, tmp_path):
    """Beside what is saved, (S, 2F): nothing of S x K, for 8 active experts of 16."""
    sizes = {"num_experts": 16, "num_experts_per_tok": 8, "hidden_size": 64, "moe_intermediate_size": 8, "vocab_size": 96}
    config = AutoConfig.from_pretrained(folder_of("qwen3_moe", tmp_path / "model", tokenizer), **sizes)
    model = ln.add_lora(AutoModelForCausalLM.from_config(config, dtype=torch.float32), ln.LoraConfig(r=2))
    ids = torch.randint(4, 96, (4, 64), generator=torch.Generator().manual_seed(0))
    model.lm_head = torch.nn.Identity()
    with Largest() as seen:
        model(input_ids=ids).logits.sum().backward()
    assert passes
    assert ids.numel() * 8 * 16 <= seen.numel < ids.numel() * 8 * 64 / 2


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("trained", ["weights", "bias"])
def test_where_more_than_adapters_is_trained_another_pass_runs(trained, passes, tokenizer, tmp_path):
    model = adapted(folder_of("gpt_oss", tmp_path / "model", tokenizer), None, target_modules=[], target_parameters=["down_proj"])
    for _, container in containers(model):
        (container.gate_up_proj if trained == "weights" else container.down_proj_bias).requires_grad_()
    model(input_ids=some_ids()).logits.sum().backward()
    assert not passes
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_in_16_bits_it_is_as_exact_as_the_pass_by_product(monkeypatch, tokenizer, tmp_path):
    folder = folder_of("gpt_oss", tmp_path / "model", tokenizer)
    exact = adapted(folder, None)
    wanted = [(name, tensor) for name, tensor in exact.named_parameters() if tensor.requires_grad]
    expected = gradients(exact, wanted)
    model = exact.to(torch.bfloat16)
    by_expert = gradients(model, wanted)
    monkeypatch.setattr(experts, "sides_of", lambda container, held: None)
    by_product = gradients(model, wanted)
    for name, value in expected.items():
        assert by_expert[name].dtype == torch.float32
        off, other = ((found[name] - value).norm() for found in (by_expert, by_product))
        assert 0 < off < 1.5 * other, name
