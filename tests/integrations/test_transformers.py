"""The drop-in for transformers, PEFT and TRL. Oracles: our own loader, bitsandbytes' bytes, PEFT over the decoded weights."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_folders import write_model, write_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig

import lownibble as ln
from lownibble.errors import ConfigError, QuantizationError
from lownibble.integrations.transformers import NF4Config, NF4Linear
from lownibble.quant import QuantLinear, linear


@pytest.fixture
def folder(write):
    return write("llama", hidden_size=64, intermediate_size=128)


def logits(model, batch):
    ids, mask, _ = batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def packed(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(**options), dtype=torch.float32).eval()


OPTIONS = {"default": {}, "fp4, plain constants": {"quant_type": "fp4", "double_quant": False}, "block 128": {"block_size": 128}}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_weights_as_our_own_loader(write, batch, case, tied):
    folder = write("llama", tie_word_embeddings=tied, attention_bias=True)
    model = load(folder, **OPTIONS[case])
    ours, _ = ln.load(str(folder), quant=ln.QuantConfig(**OPTIONS[case]))
    assert len(packed(model)) == 14
    assert torch.equal(logits(model, batch), logits(ours, batch))
    assert model.num_parameters() < ours.num_parameters()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_linear_layers_with_a_forward_of_their_own_are_packed(write):
    """What they compute is tried out while transformers makes a model without values, in its dtype."""
    linear._computes_linear.cache_clear()
    folder = write("falcon")
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), dtype=dtype)
        assert {path.rpartition(".")[2] for path in packed(model)} == {
            "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"
        }  # fmt: skip
    ours, _ = ln.load(str(folder), quant="nf4")
    assert sum(isinstance(module, QuantLinear) for module in ours.modules()) == len(packed(model))


def test_layers_whose_weights_the_model_reads_itself_stay_dense(write, batch, tmp_path):
    folder = write("mamba", state_size=8, time_step_rank=4)
    with pytest.warns(UserWarning, match=r"2 layers of MambaForCausalLM \(dt_proj\) stay dense"):
        model = load(folder)
    assert {path.rpartition(".")[2] for path in packed(model)} == {"in_proj", "x_proj", "out_proj"}
    model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="stay dense"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_bytes_are_those_of_bitsandbytes(bitsandbytes, folder, tmp_path):
    load(folder).save_pretrained(tmp_path / "ours")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "quant_state" in key:
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(value.tolist()))
        else:
            assert torch.equal(ours[key], value), key


@pytest.mark.parametrize(("dtype", "codec"), [(torch.float32, "nf4"), (torch.bfloat16, "nf4"), (torch.float32, "int8")])
def test_saved_and_loaded_again(folder, batch, tmp_path, tokenizer, dtype, codec):
    config = NF4Config(quant_type=codec)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype).eval()
    assert len(packed(again)) == 14
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert again.config.quantization_config.quant_method == "lownibble"
    again.save_pretrained(tmp_path / "twice")
    twice = load_file(tmp_path / "twice" / "model.safetensors")
    assert twice.keys() == again.state_dict().keys()
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", dtype=dtype).eval()
    assert torch.equal(logits(third, batch), logits(model, batch))
    ours, _ = ln.load(str(tmp_path / "saved"), dtype=dtype)
    assert torch.equal(logits(ours, batch), logits(model, batch))


def test_the_meta_device_takes_a_model(folder):
    model = load(folder).to("meta")
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_a_state_goes_into_another_model(folder, batch, codec):
    model, other = load(folder, quant_type=codec), load(folder, quant_type="fp4")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, batch), logits(model, batch))
    assert torch.equal(logits(copy.deepcopy(model), batch), logits(model, batch))
    one, another = (each.model.layers[0].mlp.up_proj for each in (model, load(folder, quant_type="fp4")))
    another.load_state_dict(one.state_dict())
    assert torch.equal(another.dequantize(), one.dequantize())


def test_codes_without_their_constants_are_missing_keys(folder):
    model = load(folder)
    state = {key: value for key, value in model.state_dict().items() if "q_proj.weight." not in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj\.weight\.absmax"):
        model.load_state_dict(state)


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_compiled_without_a_break(folder, codec):
    model = load(folder, quant_type=codec)
    x = torch.randn(7, 64, requires_grad=True)
    layer = model.model.layers[0].mlp.up_proj
    expected = layer(x)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found.sum().backward()
    assert x.grad is not None


def test_part_of_a_model_elsewhere_is_refused(folder):
    with pytest.raises(ConfigError, match="cannot keep part of a model on the CPU or the disk"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), device_map={"model": 0, "lm_head": "cpu"})


def test_casts_leave_codes_and_constants(folder, batch):
    model = load(folder)
    before = {key: value.clone() for key, value in model.model.layers[0].mlp.up_proj.state_dict().items()}
    model.to(torch.bfloat16)
    after = model.model.layers[0].mlp.up_proj.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert logits(model, batch).dtype == torch.bfloat16


def decoded(model):
    """The model with dense layers of the weights that the packed ones compute with."""
    for path, layer in packed(model).items():
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.data = layer.packed.dequantize(torch.float32)
        model.set_submodule(path, linear)
    return model


def test_peft_trains_on_it_as_on_the_decoded_weights(peft, folder, batch):
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    found = []
    for model in (load(folder), decoded(load(folder))):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config).train()
        ids, mask, labels = batch()
        loss = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}))
    (loss, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    assert len(gradients) == 28
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


CODECS = {
    "nf4": {}, "int8": {"quant_type": "int8"}, "fp8": {"quant_type": "fp8"}, "int4": {"quant_type": "int4"},
    "mxfp4": {"quant_type": "mxfp4", "block_size": 32, "double_quant": False},
}  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
def test_peft_trains_dora_as_on_the_decoded_weights(peft, folder, batch, tmp_path, codec):
    """It takes the norms of the weight's rows, from the layer. Our own DoRA computes what was trained."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, lora_dropout=0.1)
    (ids, mask, labels), losses = batch(), []
    for model in (load(folder, **CODECS[codec]), decoded(load(folder, **CODECS[codec]))):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config).train()
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
        losses.append([])
        for _ in range(4):
            loss = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
        if len(losses) == 1:
            adapted.save_pretrained(tmp_path / "adapter")
            trained = logits(adapted.eval(), batch)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.01
    ours, _ = ln.load(str(folder), quant=ln.QuantConfig(**CODECS[codec]))
    ln.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours, batch), trained, rtol=0, atol=2e-5)


MERGED = {
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
}


@pytest.mark.parametrize("codec", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("safe", [False, True])
def test_codes_are_not_merged_into_silently(peft, folder, batch, codec, method, safe):
    """PEFT fails to add to them, or puts the sum in their place, and the layer refuses to compute."""
    name, options = MERGED[method]
    model = peft.get_peft_model(load(folder, **CODECS[codec]), getattr(peft, name)(target_modules=["down_proj"], **options))
    with pytest.raises((RuntimeError, ConfigError), match=r"size of tensor a|codes of a packed layer were replaced"):
        logits(model.merge_and_unload(safe_merge=safe), batch)


@pytest.mark.parametrize("codec", ["nf4", "int8", "fp8"])
def test_codes_are_not_taken_for_the_weight(peft, folder, batch, codec):
    """HiRA multiplies the weight by what it learns, and asks no layer but bitsandbytes' for its values."""
    config = peft.HiraConfig(r=4, target_modules=["down_proj"])
    with pytest.raises(RuntimeError, match="size of tensor a"):
        logits(peft.get_peft_model(load(folder, **CODECS[codec]), config), batch)


def test_prepared_for_kbit_training_with_checkpointing(peft, folder, batch):
    """The articles' own lines."""
    model = peft.prepare_model_for_kbit_training(load(folder), use_gradient_checkpointing=True)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
    ids, mask, labels = batch()
    model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(gradient is not None for gradient in trained.values())
    assert any(gradient.any() for name, gradient in trained.items() if "lora_B" in name)


def test_a_peft_adapter_comes_back_through_our_loader(peft, folder, batch, tmp_path):
    model = peft.get_peft_model(load(folder), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    ours, _ = ln.load(str(folder), quant="nf4")
    ln.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours, batch), logits(model, batch), rtol=0, atol=2e-5)


def test_encoder_decoder(tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(write_t5(tmp_path), quantization_config=NF4Config(), dtype=torch.float32).eval()
    skipped = ["lm_head", "wo"]  # transformers keeps T5's wo in float32
    ours, _ = ln.load(str(tmp_path), quant=ln.QuantConfig(skip_modules=skipped))
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.no_grad():
        found, expected = (m(input_ids=ids, decoder_input_ids=ids[:, :4]).logits for m in (model, ours))
    assert packed(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_names_of_bitsandbytes(folder, batch):
    theirs = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": ["lm_head"], "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": torch.uint8,
    }  # fmt: skip
    model = load(folder, **theirs)
    assert logits(model, batch).dtype == torch.float32
    exact = load(folder, quant_type="fp4", double_quant=False)
    difference = (logits(model, batch) - logits(exact, batch)).abs().max()
    assert 1e-4 < float(difference) < 0.2  # products in bfloat16
    again = NF4Config.from_dict(model.config.quantization_config.to_dict())
    assert again.to_dict() == NF4Config(**theirs).to_dict()


def test_skipped_modules_stay_dense(folder):
    model = load(folder, skip_modules=["lm_head", "down_proj"])
    assert len(packed(model)) == 12
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize(("family", "options"), [("llama", {"attention_bias": True}), ("gpt2", {})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dequantized_model_is_a_dense_one(write, batch, tmp_path, family, options, dtype):
    model = load(write(family, **options))
    expected = logits(model, batch)
    dense = model.dequantize(dtype=dtype)
    assert not packed(dense)
    assert not hasattr(dense.config, "quantization_config")
    linear = dense.transformer.h[0].mlp.c_fc if family == "gpt2" else dense.model.layers[0].mlp.up_proj
    assert linear.weight.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(logits(dense, batch), expected, rtol=0, atol=2e-5)
        dense.save_pretrained(tmp_path / "dense")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
        torch.testing.assert_close(logits(again, batch), expected, rtol=0, atol=2e-5)


def test_bad_options_and_weights(tiny, folder, tmp_path):
    with pytest.raises(ConfigError, match="The 'quant_type' of QuantConfig must be"):
        NF4Config(quant_type="nf5")
    with pytest.raises(ConfigError, match=r"QuantConfig has no option 'blocksize'. Did you mean 'block_size'"):
        NF4Config(blocksize=64)
    with pytest.raises(ConfigError, match="The 'load_in_8bit' of NF4Config cannot be True"):
        NF4Config(load_in_8bit=True)
    with pytest.raises(ConfigError, match="The 'compute_dtype' of NF4Config must be one of float32"):
        NF4Config(bnb_4bit_compute_dtype=torch.int8)
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises((QuantizationError, RuntimeError), match=r"conversion|NaN or infinite"):
        load(tmp_path / "bad")


@pytest.mark.slow
def test_the_example_runs(peft, tmp_path, forked):
    """The articles' code with one import changed; its adapter merges."""
    pytest.importorskip("trl")
    folder = write_model(tmp_path / "model")
    script = Path(__file__).parents[2] / "examples" / "qlora_with_transformers.py"
    command = [sys.executable, str(script), str(folder), "3"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "trainable params" in run.stdout
    adapter = tmp_path / "runs" / "qlora-with-transformers" / "adapter"
    result = ln.merge(adapter, tmp_path / "merged", trained_on="quantized", onto="dequantized", measure_tokens=0)
    assert result["base"]["stored"] == "nf4/64 double-quantised"


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_with_peft_on_top(peft, tmp_path):
    """TRL's own trainer, on text: the loss falls, and the adapter it saves changes what the model says."""
    trl = pytest.importorskip("trl", "1.16", reason="TRL 1.15 asks for Triton's kernels on a CPU, too")
    folder = write_model(tmp_path / "model")
    rows = Dataset.from_list([{"text": "the film was good : positive"}, {"text": "the plot was bad : not positive"}] * 16)
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=rows,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=12, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
        ),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
