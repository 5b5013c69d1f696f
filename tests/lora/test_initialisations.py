"""Initialisations. Oracles: singular value decompositions of the whole error, PEFT's PiSSA, OLoRA and LoftQ, live logits."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_folders import WORDS, write_data, write_model

import lownibble as ln
from lownibble.config import CORRECT, KEEP_THEIR_START, LOOK_AT_INPUTS, DataConfig, QuantConfig, RunConfig
from lownibble.errors import AdapterError, ModelError, QuantizationError, TargetError
from lownibble.lora import lora_layers, remove_adapter
from lownibble.lora.init import KAIMING_NORM, find, leading
from lownibble.lora.provenance import from_metadata
from lownibble.models.info import info
from lownibble.planning.calibrated import STARTS
from lownibble.quant import QuantLinear, is_linear
from lownibble.registry import INITS

QUANT = QuantConfig(block_size=32, compute="exact")
CORRECTING = ["loftq", "qera", "qera_approx", "auto"]
CHANGING = ["pissa", "olora"]


@pytest.fixture
def folder(tmp_path):
    """A dense model folder whose weights are far from rounding to nothing."""
    write_model(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(5)
    for key, value in tensors.items():
        if key.endswith("_proj.weight"):
            tensors[key] = 0.2 * torch.randn(value.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path / "base"


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, len(WORDS), (9, 40), generator=generator)


def config(init, **options):
    return ln.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": init, **options})


def added(folder, init, ids, quant=QUANT, **options):
    model, _ = ln.load(str(folder), quant=quant)
    return ln.add_lora(model, config(init, **options), calibration=ids)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def dense_weights(folder):
    return {key.removesuffix(".weight"): value for key, value in load_file(folder / "model.safetensors").items()}


def delta(layer):
    adapter = layer.adapter("default")
    return (adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()).detach()


def best(error, r):
    left, values, right = torch.linalg.svd(error.double(), full_matrices=False)
    return left[:, :r] @ torch.diag(values[:r]) @ right[:r]


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (9, 9), (3, 5)])
def test_the_leading_part_is_the_singular_value_decompositions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, right = leading(matrix, 4)
    torch.testing.assert_close(left @ right, best(matrix, 4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("quant_type", ["nf4", "int3"])
def test_loftq_is_the_best_approximation_of_what_was_lost(folder, ids, quant_type):
    model = added(folder, "loftq", None, QuantConfig(quant_type=quant_type, block_size=32 if quant_type == "nf4" else "row"))
    weights = dense_weights(folder)
    for path, layer in lora_layers(model, "default"):
        lost = weights[path] - layer.base.weight.dequantize(torch.float32)
        torch.testing.assert_close(delta(layer), best(lost, 4), rtol=1e-4, atol=1e-6)
        norms = layer.adapter("default").lora_A.norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, KAIMING_NORM))


def inputs_of(model, path, ids):
    """(tokens, in) inputs of a layer, in float64."""
    found = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    logits(model, ids)
    handle.remove()
    return found[0].flatten(0, 1).double()


def test_qera_is_the_best_correction_of_the_layers_outputs(folder, ids):
    """Oracle: QERA's theorem 1 with the symmetric root. The inputs of q, k and v are taken from the finished model: they come
    from corrected decoder layers; the rest of a layer is measured before the layer is corrected."""
    model, loftq = added(folder, "qera", ids), added(folder, "loftq", None)
    weights = dense_weights(folder)
    others = dict(lora_layers(loftq, "default"))
    for path, layer in lora_layers(model, "default"):
        x = inputs_of(model, path, ids)
        moments = x.T @ x / len(x)
        moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments))  # as Moments.damped
        values, vectors = torch.linalg.eigh(moments)
        root = vectors @ torch.diag(values.sqrt()) @ vectors.T
        lost = (weights[path] - layer.base.weight.dequantize(torch.float32)).double()
        expected = best(lost @ root, 4) @ torch.linalg.inv(root)
        if path.endswith(("q_proj", "k_proj", "v_proj")):
            torch.testing.assert_close(delta(layer), expected, rtol=2e-3, atol=2e-4)

        def wrong(layer, lost=lost, x=x):
            return (x @ (lost - delta(layer)).T).square().mean()

        assert wrong(layer) < wrong(others[path])


def test_qera_approx_weighs_inputs_one_by_one(folder, ids):
    model = added(folder, "qera_approx", ids)
    weights = dense_weights(folder)
    for path in (f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkv"):
        layer = model.get_submodule(path)
        squares = inputs_of(model, path, ids).square().mean(0)
        root = (squares + 0.01 * squares.mean()).sqrt()
        lost = (weights[path] - layer.base.weight.dequantize(torch.float32)).double()
        torch.testing.assert_close(delta(layer), best(lost * root, 4) / root, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("init", CORRECTING)
def test_corrected_models_are_nearer_to_the_dense_one(folder, ids, init):
    dense, _ = ln.load(str(folder))
    plain, _ = ln.load(str(folder), quant=QUANT)
    target = logits(dense, ids)
    corrected = added(folder, init, ids)
    assert (logits(corrected, ids) - target).square().mean() < 0.8 * (logits(plain, ids) - target).square().mean()


def test_conv1d_layers_are_read_as_they_are_packed(write):
    folder = write("gpt2", n_embd=32, n_head=4, n_layer=1, n_positions=64)
    dense, _ = ln.load(str(folder))
    model, _ = ln.load(str(folder), quant=QUANT)
    ln.add_lora(model, config("loftq"))
    for path, layer in lora_layers(model, "default"):
        lost = dense.get_submodule(path).weight.t() - layer.base.weight.dequantize(torch.float32)
        torch.testing.assert_close(delta(layer), best(lost, 4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("init", CORRECTING)
def test_on_a_dense_base_nothing_is_lost(folder, init):
    expected, found = added(folder, True, None, None), added(folder, init, None, None)
    others = dict(lora_layers(expected, "default"))
    for path, layer in lora_layers(found, "default"):
        assert torch.equal(layer.adapter("default").lora_A, others[path].adapter("default").lora_A)
        assert not layer.adapter("default").lora_B.any()


@pytest.mark.parametrize("quant", [None, QUANT], ids=["dense", "nf4"])
def test_eva_takes_the_directions_in_which_the_inputs_vary_most(folder, ids, quant):
    model = added(folder, "eva", ids, quant)
    before, _ = ln.load(str(folder), quant=quant)
    torch.testing.assert_close(logits(model, ids), logits(before, ids), rtol=1e-5, atol=1e-5)
    for path, layer in lora_layers(model, "default"):
        _, _, right = torch.linalg.svd(inputs_of(model, path, ids), full_matrices=False)
        overlap = (layer.adapter("default").lora_A.double() @ right[:4].T).detach()
        torch.testing.assert_close(overlap @ overlap.T, torch.eye(4).double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", CHANGING)
def test_what_goes_into_the_adapter_is_pefts_and_leaves_the_base(folder, ids, init, peft):
    model = added(folder, init, None, None)
    dense, _ = ln.load(str(folder))
    before = logits(dense, ids)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    names = sorted({path.rpartition(".")[2] for path, _ in lora_layers(model, "default")})
    theirs = peft.get_peft_model(dense, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules=names))
    for path, layer in lora_layers(model, "default"):
        other = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(layer.base.weight, other.base_layer.weight, rtol=1e-4, atol=1e-5)
        ours = layer.adapter("default")
        expected = other.lora_B["default"].weight.double() @ other.lora_A["default"].weight.double()
        torch.testing.assert_close(ours.lora_B.double() @ ours.lora_A.double(), expected, rtol=1e-4, atol=1e-5)
        for a, b in ((ours.lora_A, other.lora_A["default"].weight), (ours.lora_B.T, other.lora_B["default"].weight.T)):
            torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=1e-4, atol=1e-5)  # split as PEFT splits


def trained(model):
    """Move every A and B, as training would."""
    generator = torch.Generator().manual_seed(9)
    for _, layer in lora_layers(model, "default"):
        for parameter in layer.adapter("default").parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


SCALES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.mark.parametrize("case", SCALES)
@pytest.mark.parametrize("init", CHANGING)
def test_an_adapter_of_a_changed_dense_base_fits_the_base_as_it_was(folder, ids, tmp_path, init, case, peft):
    model = trained(added(folder, init, None, None, **SCALES[case]))
    expected = logits(model, ids)
    saved = ln.save_adapter(model, tmp_path / "adapter")
    assert json.loads((saved / "adapter_config.json").read_text())["init_lora_weights"] is True
    for load in (lambda base: ln.load_adapter(base, saved), lambda base: peft.PeftModel.from_pretrained(base, str(saved))):
        base, _ = ln.load(str(folder))
        torch.testing.assert_close(logits(load(base), ids), expected, rtol=1e-3, atol=1e-3)
    ln.merge(str(saved), str(tmp_path / "merged"), onto="original", measure_tokens=0)
    torch.testing.assert_close(logits(ln.load(str(tmp_path / "merged"))[0], ids), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("init", CHANGING)
def test_an_adapter_of_a_changed_packed_base_changes_it_again(folder, ids, tmp_path, init):
    model = trained(added(folder, init, None))
    expected = logits(model, ids)
    saved = ln.save_adapter(model, tmp_path / "adapter")
    base, _ = ln.load(str(folder), quant=QUANT)
    again = ln.load_adapter(base, saved)
    assert torch.equal(logits(again, ids), expected)
    twice = ln.save_adapter(again, tmp_path / "twice")
    assert (twice / "adapter_model.safetensors").read_bytes() == (saved / "adapter_model.safetensors").read_bytes()
    ln.load_adapter(again, saved, name="second")  # the same start: nothing to change
    assert torch.equal(logits(again, ids), expected)
    ln.merge(str(saved), str(tmp_path / "merged"), onto="dequantized", measure_tokens=0)
    torch.testing.assert_close(logits(ln.load(str(tmp_path / "merged"))[0], ids), expected, rtol=1e-4, atol=1e-4)
    nf4 = {"onto": "nf4", "measure_tokens": 0, "force": True}
    ln.merge(str(saved), str(tmp_path / "packed"), **nf4)
    total = dict(lora_layers(model, "default"))["model.layers.0.mlp.up_proj"]
    wanted = ln.quantize(total.base.weight.dequantize(torch.float32) + delta(total).float(), QUANT)
    found = ln.load(str(tmp_path / "packed"))[0].get_submodule("model.layers.0.mlp.up_proj").weight
    assert (found.tensors()["codes"] != wanted.tensors()["codes"]).float().mean() < 0.01


def test_where_the_base_cannot_be_changed_again_it_is_refused(folder, ids, tmp_path):
    saved = ln.save_adapter(trained(added(folder, "pissa", None)), tmp_path / "adapter")
    base, _ = ln.load(str(folder), quant=QUANT)
    ln.add_lora(base, ln.LoraConfig(r=2), name="other")
    before = logits(base, ids)
    with pytest.raises(TargetError, match="other adapters were trained on"):
        ln.load_adapter(base, saved)
    assert torch.equal(logits(base, ids), before)
    assert list(info(base).adapters.configs) == ["other"]
    with pytest.raises(AdapterError, match="started with init_lora_weights='pissa'"):
        ln.load_adapter(ln.load(str(folder), quant=QuantConfig(quant_type="int8", block_size="row"))[0], saved)
    with pytest.warns(UserWarning, match="trained on nf4/32"):
        ln.load_adapter(ln.load(str(folder))[0], saved)


@pytest.mark.parametrize("quant", [None, QUANT], ids=["dense", "nf4"])
def test_other_adapters_are_refused_on_a_changed_base(folder, tmp_path, quant):
    plain = ln.save_adapter(trained(added(folder, True, None, quant)), tmp_path / "plain")
    model = added(folder, "pissa", None, quant)
    with pytest.raises(AdapterError, match="base was changed by init_lora_weights='pissa' of another adapter"):
        ln.load_adapter(model, plain, name="plain")
    with pytest.raises(TargetError, match="base was changed by init_lora_weights='pissa' of another adapter"):
        ln.add_lora(model, ln.LoraConfig(), name="new")
    other, _ = ln.load(str(folder), quant=quant)
    ln.add_lora(other, ln.LoraConfig(r=2, target_modules=["q_proj"]), name="first")
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(TargetError, match="which other adapters were trained on"):
        ln.add_lora(other, config("pissa", target_modules=["v_proj"]), name="second")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    assert info(other).changed_base is None


@pytest.mark.parametrize("more", [{"modules_to_save": ["norm"]}, {"bias": "lora_only"}])
def test_whatever_else_a_changed_base_trains_is_trained_and_loaded(write, tmp_path, batch, more):
    folder = write("llama", hidden_size=64, intermediate_size=128, attention_bias=True)
    model, _ = ln.load(str(folder), quant=QUANT)
    ln.add_lora(model, config("pissa", **more))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    extra = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert extra
    saved = ln.save_adapter(model, tmp_path / "adapter")
    again = ln.load_adapter(ln.load(str(folder), quant=QUANT)[0], saved)
    assert torch.equal(logits(again, batch()[0]), logits(model, batch()[0]))


def test_inputs_that_are_not_finite_are_named(folder, ids):
    model, _ = ln.load(str(folder))
    model.model.layers[0].input_layernorm.weight.data.fill_(float("inf"))
    with pytest.raises(
        ModelError, match=r"inputs of 'model\.layers\.0\.self_attn\.q_proj' over the calibration rows are not finite"
    ):
        ln.add_lora(model, config("eva"), calibration=ids)


@pytest.mark.parametrize("init", CORRECTING)
def test_a_correcting_adapter_says_what_it_corrects(folder, ids, tmp_path, init):
    model = trained(added(folder, init, ids))
    saved = ln.save_adapter(model, tmp_path / "adapter")
    again = ln.load_adapter(ln.load(str(folder), quant=QUANT)[0], saved)
    assert torch.equal(logits(again, ids), logits(model, ids))
    twice = ln.save_adapter(again, tmp_path / "twice")
    for each in (saved, twice):
        with pytest.warns(
            UserWarning, match=rf"its start by '{init}' makes up for what packing lost there\), and these are dense"
        ):
            ln.load_adapter(ln.load(str(folder))[0], each)
    remove_adapter(again, "default")
    ln.add_lora(again, config(True))
    assert "corrects" not in from_metadata(metadata_of(ln.save_adapter(again, tmp_path / "plain")))


def metadata_of(adapter):
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("init", ["qera"])
def test_a_layer_without_a_closed_form_is_named(folder, ids, init):
    model, _ = ln.load(str(folder), quant=QUANT)
    model.model.layers[1].input_layernorm.weight.data.zero_()
    with pytest.raises(
        QuantizationError, match=r"'model\.layers\.1\.self_attn\.q_proj' cannot be started by .*'qera': The second moments"
    ):
        ln.add_lora(model, config(init), calibration=ids)
    assert not info(model).adapters.configs


def test_rows_longer_than_the_models_positions_are_refused(write):
    folder = write("gpt2", n_embd=32, n_head=4, n_layer=1, max_position_embeddings=24)
    model, _ = ln.load(str(folder))
    rows = torch.randint(3, 90, (3, 25), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ModelError, match=r"have 25 tokens, and GPT2LMHeadModel has 24 positions\. Join .* length=24\)"):
        ln.add_lora(model, config("eva"), calibration=rows)
    ln.add_lora(model, config("eva"), calibration=rows[:, :24])


@pytest.mark.parametrize("init", CORRECTING)
def test_starts_that_correct_are_refused_for_merge_aware_training(folder, ids, init):
    model, _ = ln.load(str(folder), quant=QuantConfig(quant_type="int8", block_size="row"))
    info(model).merge_aware = QUANT
    with pytest.raises(TargetError, match=rf"'{init}' starts at what packing lost, and merge-aware training packs anew"):
        ln.add_lora(model, config(init), calibration=ids)
    assert not info(model).adapters.configs


def test_what_the_planner_knows_of_initialisations_is_what_they_say():
    assert {name for name in INITS if find(name).takes_out} == set(KEEP_THEIR_START)
    assert {name for name in INITS if find(name).calibrated} == set(LOOK_AT_INPUTS) == set(STARTS)
    assert {name for name in INITS if find(name).corrects} == set(CORRECT)
    assert not [name for name in INITS if find(name).takes_out and find(name).keeps_base]


@pytest.mark.parametrize(("init", "again"), [("qera", False), ("loftq", False), ("eva", False), ("pissa", True)])
def test_a_resumed_run_starts_no_adapters_anew(folder, tmp_path, monkeypatch, init, again):
    rows = write_data(tmp_path)
    started = []

    def train(steps, **more):
        options = {"max_steps": steps, "batch_size": 8, "max_length": 32, "save_steps": 2, "lr_scheduler_type": "constant"}
        data = DataConfig(path=str(rows), calibration_tokens=300, max_eval_rows=8)
        options |= {"output_dir": str(tmp_path / "out"), **more}
        return ln.run(RunConfig(model=str(folder), quant=QUANT, lora=config(init), data=data, train=options))

    start = find(init).function
    counted = replace(find(init), function=lambda adapter, given: started.append(given.path) or start(adapter, given))
    monkeypatch.setattr(f"lownibble.lora.init.{init}", counted)
    train(2)
    assert started
    started.clear()
    assert len(train(3, resume=True).losses) == 3
    assert bool(started) == again


def test_what_an_initialisation_lacks_is_said(folder, ids, tmp_path, tiny):
    dense, _ = ln.load(str(folder))
    packed, _ = ln.load(str(folder), quant=QUANT)
    with pytest.raises(TargetError, match=r"'qera' looks at the inputs of the layers: give add_lora calibration rows"):
        ln.add_lora(packed, config("qera"))
    for model in (dense, packed):
        assert all(is_linear(m) or isinstance(m, QuantLinear) for p, m in model.named_modules() if p.endswith("_proj"))
        assert not info(model).adapters.configs
    with pytest.raises(TargetError, match=r"'lm_head', which the embeddings share"):
        ln.add_lora(dense, config("pissa", target_modules=["lm_head"]))
    ln.export(str(folder), str(tmp_path / "four-bits"), format="bnb-4bit", quant=QUANT)
    with pytest.raises(ModelError, match=r"dense weight of .* is needed and not to be had"):
        ln.add_lora(ln.load(str(tmp_path / "four-bits"), quant=QUANT)[0], config("loftq"))


def test_an_expert_that_no_calibration_token_reaches_is_named(tiny):
    model = tiny("llama")
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    model.model.layers[0].extra = torch.nn.Linear(8, 8)
    with pytest.raises(TargetError, match=r"'model\.layers\.0\.extra' was not reached by the calibration rows"):
        ln.add_lora(model, config("eva"), calibration=torch.randint(3, 90, (3, 20)))
    assert not [m for m in model.modules() if type(m).__name__ == "LoraLinear"]


@pytest.mark.slow
@pytest.mark.parametrize(("init", "method"), [("qera", "qlora"), ("pissa", "qlora"), ("pissa", "lora"), ("eva", "lora")])
def test_runs_are_resumed_to_the_same_bits(folder, tmp_path, init, method):
    rows = tmp_path / "rows"
    rows.mkdir()
    write_data(rows)

    def train(output, steps, **more):
        options = {"max_steps": steps, "batch_size": 8, "max_length": 32, "save_steps": 2, "lr_scheduler_type": "constant"}
        data = DataConfig(path=str(rows), prompt_template="review : {text} sentiment :", completion_template=" {label}")
        return ln.run(
            RunConfig(
                model=str(folder), method=method, quant=QUANT, lora=config(init), data=data.with_options(calibration_tokens=512),
                train={**options, "output_dir": str(output), **more},
            )
        )  # fmt: skip

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    train(tmp_path / "parts", 4, resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert whole.record["saved"]["equal_after_reading_back"]


def test_initialisations_do_not_warn(folder, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for init in (*CORRECTING, *CHANGING, "eva"):
            added(folder, init, ids)
