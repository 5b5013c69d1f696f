"""Decoding of mixtures of experts. Oracle: transformers' own `generate` on the same layers, with one adapter active."""

import pytest
import torch
from architectures import config_of
from families import louder, quiet
from mixtures import folder_of
from transformers import AutoConfig, AutoModelForCausalLM

import lownibble as ln
from lownibble.decoding import CpuDecoder
from lownibble.decoding.form import read_adapter
from lownibble.decoding.mixture import Tokens
from lownibble.errors import ModelError
from lownibble.kernels.decoder import LowRank, Segment

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # as in test_decode
DECODED = ("mixtral", "qwen3_moe")
"""Those whose attention the decoder knows."""


def adapted(folder, names=("one",), quant="nf4", **options):
    """A packed mixture with adapters that matter."""
    model, _ = ln.load(str(folder), quant=quant)
    for seed, name in enumerate(names):
        config = {"r": 2 + seed, "target_modules": "all-linear", "init_lora_weights": False, **options}
        ln.add_lora(model, ln.LoraConfig(**config), name=name, seed=seed)
    return model.eval()


def asked():
    """Two prompts, the first padded on the left."""
    ids = torch.randint(4, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {
        "input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True,
        "output_logits": True,
    }  # fmt: skip


@pytest.mark.parametrize("quant", ["nf4", ln.QuantConfig(quant_type="int8", block_size="row")], ids=["nf4", "int8"])
@pytest.mark.parametrize("names", [(), ("one",)], ids=["base", "adapted"])
@pytest.mark.parametrize("kind", DECODED)
def test_same_tokens_as_transformers(kind, names, quant, tokenizer, tmp_path):
    model = adapted(folder_of(kind, tmp_path / "model", tokenizer), names, quant)
    expected, found = model.generate(**asked()), model.generate(**asked(), custom_generate=ln.decode)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("targets", [{"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}, {}])
@pytest.mark.parametrize("kind", DECODED)
def test_tokens_of_different_adapters_in_one_step(kind, targets, tokenizer, tmp_path):
    """Oracle: the model's own pass over each sequence alone. The model is as it was afterwards."""
    names = ("one", "two", "three")
    folder = folder_of(kind, tmp_path / "model", tokenizer)
    model, plain = adapted(folder, names, **targets), ln.load(str(folder), quant="nf4")[0].eval()
    ids = torch.randint(4, 96, (4, 9), generator=torch.Generator().manual_seed(2))
    expected = []
    with torch.no_grad():
        for row, name in zip(ids, (*names, None), strict=True):
            if name:
                ln.set_adapter(model, name)
            expected.append((model if name else plain)(row.unsqueeze(0)).logits[0])
    assert min((a - b).abs().max() for i, a in enumerate(expected) for b in expected[:i]) > 0.1, "each adapter matters"
    decoder = CpuDecoder(model)
    segments = [Segment(9 * i, 9 * i + 9, read_adapter(model, name)) for i, name in enumerate(names)]
    slots, positions = torch.arange(4).repeat_interleave(9), torch.arange(9).repeat(4)
    with torch.inference_mode():
        found = decoder.step(ids.flatten(), slots, positions, decoder.cache(4, 16), segments=segments)
    torch.testing.assert_close(found.view(4, 9, -1), torch.stack(expected), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[2:3]).logits[0], expected[2])


@pytest.mark.parametrize(
    ("kind", "says"),
    [("gpt_oss", "attention has sinks"), ("deepseek_v3", "other projections"), ("glm4_moe", "a part of each head")],
)
def test_mixtures_of_another_attention_run_on_transformers_modules(kind, says, tokenizer, tmp_path):
    model = adapted(folder_of(kind, tmp_path / "model", tokenizer))
    with pytest.raises(ModelError, match=f"(?s)({says}).*leave custom_generate out"):
        CpuDecoder(model)
    expected, found = model.generate(**asked()), model.generate(**asked(), custom_generate=ln.decode)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits[-1], expected.logits[-1], **CLOSE)


def test_windows_that_only_the_mask_has_are_not_left_out(tokenizer, tmp_path):
    """Qwen2-MoE's attention is not told of them. It is longer than what the decoder compares, the prompt longer still."""
    with quiet():
        config = config_of("qwen2_moe", len(tokenizer)).to_dict()
        config |= {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
        louder(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = adapted(tmp_path, ())
    with pytest.raises(ModelError, match="only its attention mask has the sliding window"):
        CpuDecoder(model)
    prompts = {name: asked()[name][1:].repeat(1, 4) for name in ("input_ids", "attention_mask")}
    expected, found = (model.generate(**asked() | prompts, **loop) for loop in ({}, {"custom_generate": ln.decode}))
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_dense_experts_are_refused_by_name(tokenizer, tmp_path):
    folder = folder_of("qwen3_moe", tmp_path / "model", tokenizer)
    model, _ = ln.load(str(folder), quant=ln.QuantConfig(skip_modules=["lm_head", "experts"]))
    with pytest.raises(ModelError, match=r"experts.gate_up_proj of layer 0 is not on packed weights"):
        CpuDecoder(model.eval())


def test_rows_are_those_of_tokens_where_branches_are():
    """A layer without branches may be given any rows."""
    tokens, branch = Tokens(), LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    tokens.count, tokens.branches = 4, [(1, 3, [None, branch])]
    assert torch.equal(tokens.add(0, None, torch.ones(3, 2), torch.zeros(3, 2)), torch.zeros(3, 2))
    with pytest.raises(ModelError, match="3 rows for 4 tokens"):
        tokens.add(1, None, torch.ones(3, 2), torch.zeros(3, 2))
    expected = torch.tensor([0.0, 2, 2, 0])[:, None].expand(4, 2)
    assert torch.equal(tokens.add(1, None, torch.ones(4, 2), torch.zeros(4, 2)), expected)
