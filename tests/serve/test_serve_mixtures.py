"""Serving mixtures of experts. Oracle: transformers' own greedy loop on the model with one adapter loaded, a request alone."""

import json

import pytest
import torch
from mixtures import folder_of
from safetensors.torch import load_file, save_file

import lownibble as ln
from lownibble.decoding import choose
from lownibble.errors import AdapterError
from lownibble.serve.registry import Registry

PROMPTS = [[5, 9, 40, 71], [8], [33, 21, 60, 4, 17, 90, 12], list(range(3, 40))]
TARGETS = {
    "one": {"target_modules": "all-linear"},
    "two": {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["down_proj"], "use_rslora": True},
    "three": {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
}


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def base(request, tokenizer, tmp_path):
    return folder_of(request.param, tmp_path / "base", tokenizer)


@pytest.fixture
def adapters(base, tmp_path):
    """'one', 'two' and 'three', of unlike ranks and targets; all change experts."""
    for seed, (name, options) in enumerate(TARGETS.items()):
        model, _ = ln.load(str(base), quant="nf4")
        ln.add_lora(model, ln.LoraConfig(**{"r": 4, "init_lora_weights": False, **options}), seed=seed)
        ln.save_adapter(model, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


def registry(base, adapters, **options):
    return Registry(choose(ln.load(str(base), quant="nf4")[0]), adapters, 10**7, **options)


def alone(base, adapters, prompt, n, name):
    model, _ = ln.load(str(base), quant="nf4")
    if name:
        ln.load_adapter(model, adapters / name)
    model.generation_config.eos_token_id = None  # as the requests' ignore_eos
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def without_experts(folder):
    """Zero what an adapter adds to experts."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: 0 * tensor if ".experts." in key else tensor for key, tensor in tensors.items()}, file)


def test_mixed_adapters_give_what_each_gives_alone(base, adapters, engine, ask):
    made = engine(max_batch=3)
    cases = [(prompt, name) for prompt in PROMPTS for name in (None, *TARGETS)]
    expected = [alone(base, adapters, prompt, 8, name) for prompt, name in cases]
    assert len({tuple(tokens) for tokens in expected}) > 10, "the adapters make a difference"
    told = [ask(made, prompt, adapter=name)[1] for prompt, name in cases]
    for one in told:
        one.wait()
    assert [one.tokens for one in told] == expected
    without_experts(adapters / "one")
    assert [alone(base, adapters, prompt, 8, "one") for prompt in PROMPTS] != expected[1::4], "so do their experts' parts"


def test_what_is_held_are_the_values_of_the_file(base, adapters):
    """Oracle: the adapter as `load_adapter` sets it on the model."""
    model = ln.load_adapter(ln.load(str(base), quant="nf4")[0], adapters / "three")
    made = registry(base, adapters)
    loaded = made.acquire("three")
    held = {path: branch for paths, of in zip(made._paths, loaded.adapter.of, strict=True)
            for path, branch in zip(paths, of, strict=True) if branch}  # fmt: skip
    assert sorted({path.rpartition(".")[2] for path in held}) == ["down_proj", "gate_up_proj", "o_proj"]
    for path, branch in held.items():
        expected = model.get_submodule(path).adapter("default")
        assert torch.equal(branch.A, expected.lora_A.half())
        assert torch.equal(branch.B, expected.lora_B.half())
        assert branch.scale == expected.scale
    stored = load_file(adapters / "three" / "adapter_model.safetensors")
    assert loaded.nbytes == sum(2 * tensor.numel() for tensor in stored.values()), "every tensor of the file"


def test_an_adapter_of_other_experts_is_refused_by_name(base, adapters):
    folder = adapters / "one"
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("experts.base_layer.lora_A.weight"))
    fewer = {**tensors, key: tensors[key][:8].contiguous()}
    save_file(fewer, file)
    with pytest.raises(AdapterError, match=r"experts.base_layer.lora_A.weight' has shape \(8, 64\), not \(16, 64\)"):
        registry(base, adapters).acquire("one")
    save_file({k.replace("experts.base_layer.", "experts.gate_up_proj."): tensor for k, tensor in tensors.items()}, file)
    with pytest.raises(AdapterError, match=r"lacks '.*experts.base_layer.lora_A.weight'"):
        registry(base, adapters).acquire("one")
    save_file({k: tensor for k, tensor in tensors.items() if ".experts." not in k}, file)
    with pytest.raises(AdapterError, match=r"lacks '.*experts"):
        registry(base, adapters).acquire("one")
    save_file(tensors, file)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_parameters": None}))
    with pytest.raises(AdapterError, match=r"has no place for '.*experts"):
        registry(base, adapters).acquire("one")


def test_ranks_and_bytes_of_experts_count(base, adapters):
    with pytest.raises(AdapterError, match=r"has rank 4, above 3"):
        registry(base, adapters, max_rank=3).acquire("one")
    with pytest.raises(AdapterError, match=r"the largest that is taken has .* --max-adapter"):
        registry(base, adapters, max_bytes=10_000).acquire("one")
