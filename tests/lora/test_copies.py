"""Adapters beside one that trains modules in full (`modules_to_save`). Oracle: every saved adapter loads on the base alone."""

import pytest
import torch

import lownibble as ln
from lownibble.errors import TargetError

FIRST = "model.layers.0.mlp"
REACHING = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "only there": {"target_modules": r".*layers\.0\.mlp\.down_proj"},
    "a weight": {"target_modules": ["q_proj"], "target_parameters": ["down_proj.weight"]},
    "a module in full": {"target_modules": ["q_proj"], "modules_to_save": ["mlp.down_proj"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
}
APART = {
    "all that can": {"target_modules": "all-linear"},
    "another layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "excluded": {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*layers\.0\.mlp\..*"},
    "the same module": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["layers.0.mlp"], "bias": "all"},
}


def beside(model, options, tmp_path):
    ln.add_lora(model, ln.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=[FIRST]), name="first")
    ln.add_lora(model, ln.LoraConfig(r=2, **options), name="second")
    ln.save_adapter(model, tmp_path, name="second")


class Twice(torch.nn.Linear):
    """A part with a method that the model's code calls."""

    def twice(self, x):
        return 2 * self(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_has_what_its_module_has(tiny, clone, dtype):
    """Models read sizes of their parts, and call methods of them."""
    model = tiny().to(dtype)
    model.model.part = Twice(3, 5, bias=False).to(dtype)
    ln.add_lora(model, ln.LoraConfig(r=2, modules_to_save=["embed_tokens", "part"]))
    body = clone(model).model
    assert (body.embed_tokens.padding_idx, body.embed_tokens.num_embeddings, body.part.out_features) == (0, 96, 5)
    body.part.current.weight.data.fill_(3)
    assert torch.equal(body.part.twice(torch.ones(2, 3, dtype=dtype)), torch.full((2, 5), 18, dtype=dtype))
    with pytest.raises(AttributeError, match="no attribute 'thrice'"):
        _ = body.part.thrice


def with_biases(tiny):
    return tiny(attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("case", REACHING)
def test_what_another_adapter_trains_in_full_is_refused(tiny, tmp_path, case):
    model = with_biases(tiny)
    with pytest.raises(TargetError, match=f"Adapter 'first' trains '{FIRST}' in full .* can change '{FIRST}.*Leave it out"):
        beside(model, REACHING[case], tmp_path)
    ln.add_lora(with_biases(tiny), ln.LoraConfig(r=2, **REACHING[case]))  # the base alone has it


def test_a_head_in_full_is_no_target_of_another_adapter(tiny):
    model = ln.add_lora(tiny(), ln.LoraConfig(r=2, modules_to_save=["lm_head"]), name="first")
    ln.add_lora(model, ln.LoraConfig(r=2), name="second")
    with pytest.raises(TargetError, match="no other adapter can change 'lm_head'"):
        ln.add_lora(model, ln.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), name="third")


@pytest.mark.parametrize("case", APART)
def test_what_is_beside_loads_on_the_base_alone(tiny, batch, tmp_path, case):
    model = with_biases(tiny)
    beside(model, {**APART[case], "init_lora_weights": False}, tmp_path)
    ids = batch()[0]
    with torch.no_grad():
        alone = ln.load_adapter(with_biases(tiny), tmp_path)(input_ids=ids).logits
        assert torch.equal(alone, model(input_ids=ids).logits)


def test_experts_beside_load_on_the_base_alone(tiny, tmp_path):
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    model = tiny("qwen3_moe", **sizes)
    first = ln.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=[f"{FIRST}.experts"])
    ln.add_lora(model, first, name="first")
    ln.add_lora(model, ln.LoraConfig(r=2), name="second")
    ln.save_adapter(model, tmp_path, name="second")
    ln.load_adapter(tiny("qwen3_moe", **sizes), tmp_path)
    named = ln.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj"])
    with pytest.raises(TargetError, match=rf"can change '{FIRST}\.experts\.gate_up_proj'"):
        ln.add_lora(model, named, name="third")
