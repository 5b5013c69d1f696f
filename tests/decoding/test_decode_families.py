"""Decoding by transformers' own modules. Oracle: transformers' `generate` on each prompt alone, with its own cache."""

import gc
import weakref

import pytest
import torch
from families import NEW, adapter_of, alone, build, decoded, louder, quiet, rows
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

import lownibble as ln
from lownibble.decoding import choose
from lownibble.decoding.modules import ModulesDecoder, PastCache
from lownibble.errors import ModelError
from lownibble.kernels import cpu, ops
from lownibble.models.caches import cache_argument, cache_in

TOGETHER = ("gemma3_text", "gemma2", "phi", "gpt2", "glm", "qwen3", "opt", "gpt_oss", "deepseek_v3", "cohere2", "gemma4")
APART = {
    "falcon": "interface", "bloom": "no positions", "mamba": "no positions", "qwen3_next": "kind 'linear_attention'",
    "llama4_text": "chunk", "jamba": "kind 'linear_attention'",
}  # fmt: skip


@pytest.mark.parametrize("kind", [*TOGETHER, *APART])
def test_mixed_sequences_give_the_tokens_of_each_alone(kind):
    model = louder(build(kind, 96))
    with quiet():
        decoder = choose(model)
    assert isinstance(decoder, ModulesDecoder)
    assert decoder.together == (kind in TOGETHER)
    assert "all sequences at once" in decoder.note if kind in TOGETHER else APART[kind] in decoder.note
    expected = [alone(model, prompt) for prompt in rows()]
    assert len({tuple(tokens) for tokens in expected}) > 2
    assert decoded(decoder, rows(), [None] * 4) == expected


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2", "deepseek_v3", "falcon"])
def test_adapters_are_mixed_in_a_step(kind):
    """Of linear layers and Conv1D, together and apart. Oracle: transformers' generate with the adapter active in the layers."""
    model = louder(build(kind, 96))
    for seed, name in enumerate(("one", "two")):
        targets = ["q_b_proj", "o_proj", "shared_experts.down_proj"] if kind == "deepseek_v3" else "all-linear"
        ln.add_lora(model, ln.LoraConfig(r=2 + seed, target_modules=targets, init_lora_weights=False), name=name, seed=seed)
    model.eval()
    adapters = [None, "one", "two", "one"]
    expected = []
    for prompt, name in zip(rows(), adapters, strict=True):
        ln.set_adapter(model, name)
        expected.append(alone(model, prompt))
    ln.set_adapter(model, None)
    assert expected[1:] != [alone(model, prompt) for prompt in rows()[1:]]
    with quiet():
        decoder = choose(model)
    held = {name: adapter_of(model, decoder, name) for name in ("one", "two")}
    assert decoded(decoder, rows(), [held.get(name) for name in adapters]) == expected
    assert decoded(decoder, rows(), [None] * 4) == [alone(model, prompt) for prompt in rows()], "nothing is left behind"


def test_dense_layers_compute_with_the_kernels(monkeypatch):
    """For a step, and with a forward function that someone else gave a layer meanwhile left alone."""
    if ops.active_backend("cpu") != "cpu" or not cpu.library().has_matmul():
        pytest.skip("no compiled kernels, or no AVX-512")
    model, calls, product = louder(build("phi", 96)), [], cpu.matmul_dense
    expected = [alone(model, prompt) for prompt in rows()]
    monkeypatch.setattr(cpu, "matmul_dense", lambda *given, **named: calls.append(given) or product(*given, **named))
    with quiet():
        decoder = choose(model)
    assert len(calls) > len(list(model.model.layers)), "the trial, too"
    calls.clear()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = own = lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert decoded(decoder, rows(), [None] * 4) == expected
    assert calls
    assert all(given[1].data_ptr() != layer.weight.data_ptr() for given in calls)
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == {"model.layers.0.self_attn.q_proj"}
    assert layer.forward is own


def test_what_decode_runs_is_the_models_own_adapter():
    model = louder(build("phi", 96))
    ln.add_lora(model, ln.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, use_dora=True)).eval()
    ids = torch.tensor([[0, 0, 9, 8, 7], [5, 6, 7, 8, 9]])
    asked = {
        "attention_mask": (ids > 0).long(),
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    assert torch.equal(model.generate(ids, **asked, custom_generate=ln.decode), model.generate(ids, **asked))


@pytest.mark.parametrize("kind", ["gemma3_text", "falcon", "mamba"])
def test_a_slot_goes_on_from_a_prefix_or_starts_anew(kind):
    model = louder(build(kind, 96))
    with quiet():
        decoder = choose(model)
    cache = decoder.cache(1, 64)
    prompt = torch.tensor(rows()[3])
    with torch.inference_mode():
        first = decoder.prompt(prompt, 0, cache)
        kept = cache.resume(0, 20)
        assert kept == (0 if kind == "mamba" else 20)
        again = decoder.prompt(prompt[kept:], 0, cache, position=kept)
    torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-4)
    if kind == "gemma3_text":  # all is allocated at once
        assert cache.nbytes == decoder.slot_bytes(64)
    else:
        assert cache.nbytes == decoder.slot_bytes(40)
        assert (decoder.slot_bytes(1000) == cache.nbytes) == (kind == "mamba"), "recurrent states do not grow"


SIZES = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
ROPES = {
    "longrope": lambda: Phi3Config(
        **SIZES, max_position_embeddings=64, original_max_position_embeddings=32,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4},
    ),
    "dynamic": lambda: LlamaConfig(
        **SIZES, max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
}  # fmt: skip
"""Models whose angles change beyond 32 tokens."""


@pytest.mark.parametrize("rope_type", ROPES)
def test_contexts_end_where_rotary_angles_change(rope_type):
    """Oracle: the model's own pass over the whole."""
    with quiet():
        model = louder(AutoModelForCausalLM.from_config(ROPES[rope_type]()).eval())
        decoder = choose(model)
    with pytest.raises(ModelError, match=f"'{rope_type}' change beyond 32 tokens.* 33 were asked for"):
        decoder.cache(1, 33)

    def difference(cache, n):
        prompt = torch.tensor(rows()[3][:n])
        with torch.inference_mode():
            decoder.prompt(prompt[:24], 0, cache)
            found = decoder.prompt(prompt[24:], 0, cache, position=24)
            return float((found[0] - model(prompt.unsqueeze(0)).logits[0, -1]).abs().max())

    assert difference(decoder.cache(1, 32), 32) < 1e-4
    assert difference(PastCache(1, 40), 40) > 1e-2, "there is a reason"


def test_a_model_is_tried_once(monkeypatch):
    """With its weights as they are; and the finding does not keep the model."""
    model, trials = build("falcon", 96), []
    trial = ModulesDecoder._trial
    monkeypatch.setattr(ModulesDecoder, "_trial", lambda self, *args: trials.append(1) or trial(self, *args))
    with quiet():
        first, second = choose(model), choose(model)
        assert len(trials) == 1
        assert (first.note, first.together, first.slot_bytes(9)) == (second.note, second.together, second.slot_bytes(9))
        half = choose(model.bfloat16())
    assert len(trials) == 2
    assert half.slot_bytes(9) == first.slot_bytes(9) // 2
    kept = weakref.ref(model)
    del model, first, second, half
    gc.collect()
    assert kept() is None


def test_training_mode_is_refused():
    with pytest.raises(ModelError, match="training mode"):
        choose(build("gpt2", 96).train())


@pytest.mark.parametrize("kind", ["gemma3_text", "mamba"])
def test_a_cache_that_holds_something_is_refused(kind):
    model, prompt = build(kind, 96), torch.tensor([[5, 6, 7]])
    asked = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "custom_generate": ln.decode}
    with quiet(), torch.no_grad():
        begun = {cache_argument(model): cache_in(model(prompt, use_cache=True))}
        with pytest.raises(ModelError, match="go on from a cache"):
            model.generate(torch.cat([prompt, prompt], 1), **asked, **begun)
        assert model.generate(prompt, **asked).shape == (1, 5)
