"""Models that take images, too, decoded for text. Oracle: transformers' `generate` on the whole model."""

import pytest
import torch
from families import config_of, louder, quiet
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import lownibble as ln
from lownibble.decoding import CpuDecoder, choose, generate
from lownibble.errors import AdapterError, ModelError
from lownibble.quant import QuantLinear

IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
ASKED = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def model():
    """Gemma 3 with a vision model, on 4-bit weights; an image takes four tokens."""
    config = config_of("gemma3", 97)
    config.mm_tokens_per_image, config.image_token_id = 4, 96
    with quiet():
        found = louder(AutoModelForCausalLM.from_config(config).eval())
    for name, module in list(found.model.named_modules()):
        if isinstance(module, nn.Linear) and not name.startswith("vision_tower.head"):  # torch reads its weights itself
            found.model.set_submodule(name, QuantLinear.from_linear(module))
    return found


@pytest.mark.parametrize("adapted", [False, True])
def test_the_language_model_is_decoded(model, adapted):
    """An adapter of all linear layers, the vision model's too, changes what its branches of the language model change."""
    asked = {**ASKED, "attention_mask": torch.ones_like(IDS), "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(IDS, **asked)
    if adapted:
        ln.add_lora(model, ln.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    with quiet():
        decoder = choose(model)
    assert isinstance(decoder, CpuDecoder)
    assert decoder.note == "the CPU's decoder with compiled layers, of the language model alone: for text"
    assert all(path.startswith("model.language_model.layers.") for of_layer in decoder.paths for path in of_layer)
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in decoder.unread
    expected, found = (model.generate(IDS, **asked, **one) for one in ({}, {"custom_generate": ln.decode}))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.allclose(found.logits[0], plain.logits[0], atol=1e-2) != adapted
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_images_are_refused(model):
    config = model.config.vision_config
    pixels = torch.zeros(2, config.num_channels, config.image_size, config.image_size)
    ids = IDS.clone()
    ids[:, : model.config.mm_tokens_per_image] = model.config.image_token_id
    model.generate(ids, **ASKED, pixel_values=pixels)
    for images in ({"pixel_values": pixels}, {"token_type_ids": (ids == model.config.image_token_id).long()}):
        with pytest.raises(ModelError, match=r"does not do .*(mm_encoder_outputs|pixel_values|token_type_ids)"):
            model.generate(ids, **ASKED, **images, custom_generate=ln.decode)


def test_adapters_under_earlier_names_are_read(model, clone, tmp_path):
    """Of transformers 4.50, as checkpoints still have them. Names of no layer are refused as before."""
    own = "model.language_model.layers.0.self_attn.q_proj"
    options = {"r": 2, "target_modules": [own, "v_proj", "fc1"], "alpha_pattern": {own: 64.0}, "init_lora_weights": False}
    adapted = ln.add_lora(clone(model), ln.LoraConfig(**options))
    ln.save_adapter(adapted, tmp_path)
    options_file = tmp_path / "adapter_config.json"
    options_file.write_text(options_file.read_text().replace("model.language_model.", "language_model.model."))
    file, here = tmp_path / "adapter_model.safetensors", "base_model.model.model."
    saved = load_file(file)
    earlier = {
        f"{here}language_model.": "base_model.model.language_model.model.",
        f"{here}vision_tower.": "base_model.model.vision_tower.vision_model.",
    }
    for names in (earlier, dict.fromkeys(earlier, "base_model.model.another.")):
        tensors = dict(saved)
        for new, old in names.items():
            tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
        assert not any(key.startswith(here) for key in tensors)
        save_file(tensors, file, {"format": "pt"})
        if names is earlier:
            ln.load_adapter(again := clone(model), tmp_path)
            assert [one.get_submodule(own).adapters["default"].scale for one in (again, adapted)] == [32, 32]
            ln.save_adapter(again, tmp_path / "again")
            found = load_file(tmp_path / "again" / file.name)
            assert found.keys() == saved.keys()
            assert all(torch.equal(found[key], saved[key]) for key in saved)
        else:
            with pytest.raises(AdapterError, match="does not fit this model: lacks"):
                ln.load_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids"])
def test_processors_mark_text_with_zeros(name):
    assert not generate._is_input(name, torch.zeros(1, 4, dtype=torch.int64))
    assert generate._is_input(name, torch.ones(1, 4, dtype=torch.int64))
