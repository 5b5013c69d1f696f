"""Decoding on the 4-bit base. Oracle: transformers' own `generate` and forward on the same layers."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from defaults import default_dtype
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import TextStreamer

import lownibble as ln
from lownibble.decoding import CpuDecoder, choose, decoder
from lownibble.decoding.generate import _state
from lownibble.errors import ModelError
from lownibble.lora import remove_adapter
from lownibble.lora.active import adapter_off
from lownibble.quant import QuantLinear

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Two layers and a head in float32, summed in another order, on logits of order one."""


@pytest.fixture
def quantized(tiny):
    """A tiny model of a family with all linear layers but the head on 4-bit weights."""

    def make(family="llama", **options):
        model = tiny(family, **options)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                model.set_submodule(name, QuantLinear.from_linear(module))
        return model

    return make


def _adapt(model, r=4, **options):
    ln.add_lora(model, ln.LoraConfig(r=r, target_modules=["q_proj", "down_proj", "v_proj"], **options))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return model.eval()


def _prompts():
    """Two prompts, the first shorter: padded on the left."""
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    "llama with gelu": {"hidden_act": "gelu"},
    "gemma": {"head_dim": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 12, "layer_types": LAYERS},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_transformers(quantized, family):
    model = quantized(family.split()[0], **FAMILIES[family])
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers 5.17 computes it by SDPA, without the cap
    asked = {**_prompts(), "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    CpuDecoder(model)
    expected, found = model.generate(**asked), model.generate(**asked, custom_generate=ln.decode)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_default_dtypes_do_not_matter(quantized):
    model = _adapt(quantized())
    with torch.no_grad():
        expected = model(**_prompts()).logits[:, -1]
    asked = {**_prompts(), "max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with default_dtype(torch.bfloat16):
        CpuDecoder(model)
        found = model.generate(**asked, custom_generate=ln.decode)
    torch.testing.assert_close(found.logits[0], expected, **CLOSE)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    "quant",
    [{"quant_type": "int8", "block_size": "row"}, {"quant_type": "int4"}, {"pattern": {"down_proj": {"quant_type": "int8"}}}],
    ids=["int8", "int4", "mixed"],
)
def test_same_tokens_with_other_codecs(tiny, quant, adapted):
    """Layers that are not all in 4 bits run in torch."""
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    config = ln.QuantConfig(**quant)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, QuantLinear.from_linear(module, config.for_layer(name)))
    model = _adapt(model) if adapted else model
    asked = {**_prompts(), "max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected, found = model.generate(**asked), model.generate(**asked, custom_generate=ln.decode)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_with_an_adapter(quantized, family, options):
    model = quantized(family, head_dim=8)
    plain = model.generate(**_prompts(), max_new_tokens=10, do_sample=False, custom_generate=ln.decode)
    _adapt(model, **options)
    CpuDecoder(model)
    expected = model.generate(**_prompts(), max_new_tokens=10, do_sample=False)
    found = model.generate(**_prompts(), max_new_tokens=10, do_sample=False, custom_generate=ln.decode)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_a_changed_adapter_and_head_are_seen(quantized):
    """What is kept from call to call must not outlive what it was made from."""
    model = _adapt(quantized())
    for change in (lambda p: p.mul_(-2), lambda p: p.neg_()):
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name == "lm_head.weight":
                with torch.no_grad():
                    change(parameter)
        asked = {**_prompts(), "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**asked, custom_generate=ln.decode), model.generate(**asked))


def test_sampling_draws_the_same_tokens(quantized):
    model = quantized()
    asked = {**_prompts(), "max_new_tokens": 12, "do_sample": True, "top_k": 20, "temperature": 0.8, "repetition_penalty": 1.2}
    torch.manual_seed(3)
    expected = model.generate(**asked)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**asked, custom_generate=ln.decode), expected)


def test_stops_where_transformers_stops(quantized, capsys, tmp_path):
    """A row that has met its end is padded on; the streamer gets each token."""
    model = quantized()
    asked = {**_prompts(), "max_new_tokens": 20, "do_sample": False}
    rows = model.generate(**asked)
    asked["eos_token_id"] = int(rows[0, 9])  # the third new token of the first row
    expected = model.generate(**asked)
    assert torch.equal(model.generate(**asked, custom_generate=ln.decode), expected)

    class Words:
        def decode(self, ids, **_):
            return " ".join(map(str, torch.as_tensor(ids).flatten().tolist())) + "\n"

    del asked["eos_token_id"]
    tokenizer = SimpleNamespace(eos_token_id=int(rows[0, 9]), chat_template=None, all_special_tokens=[], added_tokens_decoder={})
    assert torch.equal(model.generate(**asked, custom_generate=ln.decode, chat_tokenizer=tokenizer), expected)
    asked["eos_token_id"] = tokenizer.eos_token_id

    one = {**asked, "input_ids": asked["input_ids"][1:], "attention_mask": asked["attention_mask"][1:]}
    shown = []
    streamer = TextStreamer(Words())
    for options in ({"streamer": streamer}, {"token_streamer": streamer, "custom_generate": ln.decode}):
        model.generate(**one, **options)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


def test_head_exact_in_bfloat16_is_read_from_a_copy(quantized):
    model = quantized()
    assert CpuDecoder(model)._half is None
    other = quantized(seed=1)
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.bfloat16())
    assert CpuDecoder(other)._half is not None
    asked = {**_prompts(), "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for a, b in zip(
        other.generate(**asked).logits, other.generate(**asked, custom_generate=ln.decode).logits, strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b, **CLOSE)


def test_long_prompts_go_in_parts(quantized, monkeypatch):
    model = quantized()
    tokens = torch.randint(3, 96, (23,), generator=torch.Generator().manual_seed(2))
    whole, parts = (CpuDecoder(model).cache(1, 23) for _ in range(2))
    expected = CpuDecoder(model).prompt(tokens, 0, whole)
    monkeypatch.setattr("lownibble.decoding.decoder.PROMPT_TOKENS", 5)
    torch.testing.assert_close(CpuDecoder(model).prompt(tokens, 0, parts), expected, **CLOSE)
    torch.testing.assert_close(parts.contexts[0].keys, whole.contexts[0].keys, **CLOSE)
    assert parts.nbytes == 2 * 2 * 2 * 23 * 8 * 4


REFUSED = {
    "olmo2": ({}, "is made of"),
    "gpt2": ({}, "not called 'layers'"),
    "llama long": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    "helium": ({"head_dim": 8}, "something else"),
    "granitemoehybrid": ({"layer_types": ["attention"] * 2, "num_local_experts": 0, "mamba_n_heads": 4}, "not called 'layers'"),
    "mixtral": ({"num_local_experts": 2}, "experts.gate_up_proj of layer 0 is not on packed weights"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_of_another_form_run_on_transformers_modules(quantized, family):
    options, says = REFUSED[family]
    model = quantized(family.split()[0], **options)
    with pytest.raises(ModelError, match=f"(?s)({says}).*leave custom_generate out"):
        CpuDecoder(model)
    assert re.search(says, choose(model).note)
    asked = {**_prompts(), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**asked, custom_generate=ln.decode), model.generate(**asked))


def test_queries_that_are_scaled_by_their_position(quantized):
    """From a position on that the check of the first tokens does not reach. Oracle: the model's own pass over the whole."""
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16, "mscale": 1.0,
        "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.5,
    }  # fmt: skip
    model = quantized("ministral3", head_dim=8, max_position_embeddings=256, rope_parameters=rope)
    found = choose(model)
    assert "queries are scaled by their position" in found.note
    ids = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = found.step(ids, torch.zeros_like(ids), torch.arange(40), found.cache(1, 40))
        torch.testing.assert_close(logits, model(ids.unsqueeze(0)).logits[0], **CLOSE)


def test_a_model_that_fails_the_check_is_checked_once(quantized, monkeypatch):
    model = quantized("helium", head_dim=8)
    for _ in range(2):
        with pytest.raises(ModelError, match="something else"):
            CpuDecoder(model)
        monkeypatch.setattr(CpuDecoder, "_check", lambda self: pytest.fail("checked again"))


def test_dense_layers_training_mode_and_half_precision_are_refused(tiny, quantized):
    for model, says in (
        (tiny(), "not on a packed weight"),
        (quantized().train(), "training mode"),
        (quantized().bfloat16(), "bfloat16"),
    ):
        with pytest.raises(ModelError, match=says):
            CpuDecoder(model)


class Card(TorchFunctionMode):
    """A stand-in for a GPU: tensors made with device 'cuda' lie on the CPU, are marked, and must not meet others."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_card = [hasattr(t, "on_card") for t in given]
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda" if on_card[0] else "cpu")
        marked = any(on_card)
        if "device" in kwargs:
            marked = torch.device(kwargs.pop("device")).type == "cuda"
        elif marked and func is not torch.Tensor.__getitem__:
            assert all(on_card), f"{func} of tensors on two devices"
        if func is torch.Tensor.cpu:
            return args[0].clone() if marked else args[0]
        found = func(*args, **kwargs)
        if marked and isinstance(found, torch.Tensor):
            found.on_card = True
        return found


def test_a_step_is_described_on_the_host_and_sampled_on_the_device(monkeypatch):
    """A model on a card. The decoder asserts what `Decoder.step` says; anything else that meets on two devices raises."""
    seen = []

    class OnCard:
        draws = False

        def cache(self, slots, capacity):
            return None

        def prompt(self, tokens, slot, cache, adapter, active_from):
            assert adapter is None
            assert tokens.device.type == "cpu"
            seen.append(tokens.tolist())
            return torch.nn.functional.one_hot(torch.tensor([3 + slot], device="cuda"), 9).float()

        def step(self, tokens, slots, positions, cache, segments):
            assert {t.device.type for t in (tokens, slots, positions)} == {"cpu"}
            seen.append((tokens.tolist(), slots.tolist(), positions.tolist()))
            return torch.nn.functional.one_hot(torch.tensor([5, 6], device="cuda")[slots.tolist()], 9).float()

    def stopping(ids, scores):
        return torch.tensor([ids.shape[1] >= 5] * 2, device=ids.device)

    monkeypatch.setattr("lownibble.decoding.generate.choose", lambda model: OnCard())
    monkeypatch.setattr("lownibble.decoding.generate.end_tokens", lambda model, tokenizer: [4])
    with Card():
        ids, pad = torch.tensor([[0, 7], [8, 7]], device="cuda"), torch.tensor(0, device="cuda")
        options = SimpleNamespace(num_beams=1, max_length=5, _pad_token_tensor=pad, do_sample=False, output_scores=False,
                                  output_logits=False, return_dict_in_generate=False)  # fmt: skip
        mask = torch.tensor([[0, 1], [1, 1]], device="cuda")
        model = nn.Identity()  # nobody asks it
        found = ln.decode(model, ids, lambda ids, scores: scores, stopping, options, chat_tokenizer=True, attention_mask=mask)
        assert found.device.type == "cuda"
    assert found.tolist() == [[0, 7, 3, 5, 5], [8, 7, 4, 0, 0]]
    assert seen == [[7], [8, 7], ([3], [0], [1]), ([5], [0], [2])], "a row that has ended takes no part"


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"output_attentions": True, "return_dict_in_generate": True}])
def test_options_that_are_not_done_are_refused(quantized, option):
    with pytest.raises(ModelError, match=next(iter(option))):
        quantized().generate(**_prompts(), max_new_tokens=2, do_sample=False, custom_generate=ln.decode, **option)


def test_positions_and_masks_that_are_not_counted_are_refused(quantized):
    model, prompts = quantized(), _prompts()
    asked = {"max_new_tokens": 3, "do_sample": False, "custom_generate": ln.decode}
    counted = (prompts["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = model.generate(**prompts, **asked)
    assert torch.equal(model.generate(**prompts, position_ids=counted, **asked), expected)
    with pytest.raises(ModelError, match="position_ids that do not count"):
        model.generate(**prompts, position_ids=counted + (counted > 2) * 9, **asked)
    with pytest.raises(ModelError, match="rows without tokens"):
        model.generate(**{**prompts, "attention_mask": prompts["attention_mask"] * torch.tensor([[1], [0]])}, **asked)
    four = torch.zeros(2, 1, 7, 7)
    with pytest.raises(ModelError, match="attention_mask of another shape"):
        ln.decode(model, prompts["input_ids"], None, None, SimpleNamespace(num_beams=1), attention_mask=four)


def test_a_row_that_a_turns_end_has_ended_is_filled_without_a_pad_token(quantized):
    model, prompts = quantized(), _prompts()
    asked = {**prompts, "max_new_tokens": 8, "do_sample": False}
    end = int(model.generate(**asked)[0, 9])
    tokenizer = SimpleNamespace(
        eos_token_id=end, chat_template=None, all_special_tokens=[], added_tokens_decoder={}, pad_token_id=1
    )
    expected = model.generate(**asked, eos_token_id=end, pad_token_id=1)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    found = model.generate(**asked, custom_generate=ln.decode, chat_tokenizer=tokenizer)
    assert torch.equal(found, expected)
    assert found[0, -1] == 1


def test_threads_take_turns(tiny):
    """A model that runs as transformers' modules has another attention inside a call."""
    model = tiny("phi")
    before, switch = model.config._attn_implementation, sys.getswitchinterval()
    prompts = [torch.randint(3, 96, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 14)]

    def ask(ids):
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        return [model.generate(**asked, custom_generate=ln.decode).tolist() for _ in range(6)]

    expected = [ask(ids) for ids in prompts]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(ask, prompts)) == expected
    finally:
        sys.setswitchinterval(switch)
    assert model.config._attn_implementation == before


ACTIVATED = {"alora_invocation_tokens": [7, 8]}


def _invoking(length=9):
    """Rows, of different lengths and so padded on the left, that invoke in the middle, at the end, at once, and not at all."""
    rows = [[5, 6, 7, 8, 9, 10, 7, 8, 11], [20, 21, 7, 8], [7, 8, 30, 31, 32], [40, 41, 8, 7, 42, 43]]
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_an_activated_adapter_is_on_from_the_prompts_invocation_on(quantized, family):
    """On both decoders as in transformers' own loop, which runs the modules."""
    model, prompts = quantized(family), _invoking()
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False, **ACTIVATED))
    model.eval()
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**prompts, **options)
    assert torch.equal(model.generate(**prompts, **options, custom_generate=ln.decode), expected)
    with torch.no_grad(), adapter_off(model):
        base = model.generate(**prompts, **options)
    assert torch.equal(base[3], expected[3])
    assert not torch.equal(base[:3], expected[:3])
    with torch.no_grad():
        again = model.generate(**prompts, **options)
    assert torch.equal(again, expected), "the adapter is on again"


def test_hooks_of_adapters_are_registered_once(quantized):
    """By transformers' modules each call has a decoder of its own; what graphs depend on stays as it was."""
    model, prompts = quantized("gpt2"), _invoking()
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False, **ACTIVATED))
    model.eval()
    seen = []
    for _ in range(3):
        found = model.generate(**prompts, max_new_tokens=3, do_sample=False, pad_token_id=0, custom_generate=ln.decode)
        seen.append((found.tolist(), sum(len(module._forward_hooks) for module in model.modules()), _state(model)))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1] > 0
    remove_adapter(model, "default")
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False, target_modules=["c_proj"], **ACTIVATED), seed=5)
    model.eval()
    asked = {**prompts, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**asked, custom_generate=ln.decode), model.generate(**asked)), "other modules"


def test_a_long_prompt_is_on_from_the_right_token_of_its_part_on(quantized, monkeypatch):
    model = quantized()
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False, **ACTIVATED))
    model.eval()
    ids = torch.tensor([[*range(10, 31), 7, 8, 40, 41]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    for at_once in (1, 5, 21, 22, 24):
        monkeypatch.setattr(decoder, "PROMPT_TOKENS", at_once)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, custom_generate=ln.decode
        )
        assert torch.equal(found, expected)


def test_a_decoder_alone_does_not_take_an_activated_adapter(quantized):
    model = quantized()
    ln.add_lora(model, ln.LoraConfig(r=4, **ACTIVATED))
    with pytest.raises(ModelError, match="on some tokens only"):
        CpuDecoder(model.eval())
