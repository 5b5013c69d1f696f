"""Checkpoints that differ from their model in names, shapes or tying. Oracle: `from_pretrained` on the same folder."""

import pytest
import torch
from mixtures import decode_into
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import lownibble as ln
from lownibble.errors import ModelError
from lownibble.models import skeleton
from lownibble.models.checkpoint import Checkpoint
from lownibble.models.conversion import ModelTensors
from lownibble.models.sources import ModelSource

WEIGHTS = "model.safetensors"


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def logits(model, batch):
    ids, mask, _ = batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.float()


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def mixture(write, tokenizer, tmp_path):
    folder = tmp_path / "mixture"
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_head_beside_a_tied_configuration_is_the_files(write, adapt, batch, tmp_path):
    folder = write("llama", tie_word_embeddings=True)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    expected = logits(theirs(folder), batch)
    live, adapter = adapt(folder, None)
    model, _ = ln.load(str(folder))
    assert torch.equal(logits(model, batch), expected)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert torch.equal(logits(model, batch), expected), "nothing ties it again"
    ln.merge(adapter, tmp_path / "merged", onto="original", measure_tokens=0)
    merged = logits(theirs(tmp_path / "merged"), batch)
    torch.testing.assert_close(merged, logits(live, batch), rtol=1e-3, atol=1e-4)


def test_the_same_head_stored_twice_stays_tied(write):
    folder = write("llama", tie_word_embeddings=True)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model, _ = ln.load(str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_tensor_under_its_other_name(write, batch):
    folder = write("llama", tie_word_embeddings=True)
    edit(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    model, _ = ln.load(str(folder))
    assert torch.equal(logits(model, batch), logits(theirs(folder), batch))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_buffers_of_old_files_are_left_out(write, batch):
    folder = write("llama")
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    model, _ = ln.load(str(folder))
    assert torch.equal(logits(model, batch), logits(theirs(folder), batch))


def test_a_checkpoint_without_the_models_prefix(write, batch):
    folder = write("gpt2")
    expected = logits(theirs(folder), batch)

    def strip(tensors):
        for key in [key for key in tensors if key.startswith("transformer.")]:
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)

    edit(folder, strip)
    model, _ = ln.load(str(folder))
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_experts_stored_apart_are_fused(mixture, batch, quant):
    stored = set(load_file(mixture / WEIGHTS))
    assert any(".experts.3.w1.weight" in key for key in stored), "as Mixtral's own files are"
    model, _ = ln.load(str(mixture), quant=quant)
    reference = theirs(mixture)
    if quant:
        decode_into(reference, model)
    torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-4, atol=1e-5)


def test_a_mixture_is_merged_under_its_own_names(mixture, adapt, batch, tmp_path):
    live, adapter = adapt(mixture, None, target_modules=["q_proj", "v_proj"])
    ln.merge(adapter, tmp_path / "merged", onto="original", measure_tokens=0)
    before, after = load_file(mixture / WEIGHTS), load_file(tmp_path / "merged" / WEIGHTS)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.endswith(("q_proj.weight", "v_proj.weight"))}
    torch.testing.assert_close(logits(theirs(tmp_path / "merged"), batch), logits(live, batch), rtol=1e-3, atol=1e-4)


def test_an_expert_that_is_missing_is_an_error(mixture):
    edit(mixture, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"))
    with pytest.raises(ModelError, match=r"down_proj' has shape \(3, .*do not belong together"):
        ln.load(str(mixture))


def test_shapes_are_known_before_anything_is_read(mixture, monkeypatch):
    source = ModelSource(mixture, "mixture")
    checkpoint = Checkpoint(source)
    monkeypatch.setattr(checkpoint, "read", lambda key: pytest.fail(f"'{key}' was read"))
    tensors = ModelTensors(skeleton(source, torch.float32), checkpoint)
    assert tensors.facts("model.layers.0.mlp.experts.gate_up_proj") == (torch.float32, (4, 96, 32))
    assert [names for names in tensors.together() if len(names) > 1] == []


def test_gpt2_trains_and_merges_as_pefts(write, peft, batch, tmp_path):
    folder = write("gpt2")
    model, _ = ln.load(str(folder))
    ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights=False), seed=1)
    ln.save_adapter(model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted.eval(), batch), logits(model.eval(), batch), rtol=1e-4, atol=1e-5)
    ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="original", base=str(folder), measure_tokens=0)
    merged = theirs(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, batch), logits(adapted.merge_and_unload(), batch), rtol=1e-4, atol=1e-5)
