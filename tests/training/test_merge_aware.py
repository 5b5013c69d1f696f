"""Merge-aware training: what is trained is what `merge` packs.

Oracles: the formula with a detached difference (straight through) in plain torch; `pack_sum` anew; the merged model's own codes
and evaluation loss; the uninterrupted run; PEFT.
"""

import shutil

import pytest
import torch
from tiny_folders import write_t5

import lownibble as ln
from lownibble.config import LoraConfig, QuantConfig, RunConfig
from lownibble.data import load as load_data
from lownibble.errors import ConfigError, ModelError, TargetError
from lownibble.kernels import ops
from lownibble.lora import lora_layers
from lownibble.lora.held import HELD
from lownibble.lora.layer import LoraLinear
from lownibble.lora.merge_aware import MergeAware
from lownibble.lora.variants import LORA
from lownibble.optim import make_optimizer
from lownibble.quant import QuantLinear, quantize
from lownibble.quant.sums import pack_sum
from lownibble.registry import INITS, OPTIMIZERS, VARIANTS
from lownibble.training import run
from lownibble.training.making import make_trainer

QUANT = {
    "nf4": {},
    "nf4, absmax in float32": {"double_quant": False, "block_size": 32},
    "int4": {"quant_type": "int4"},
    "int3": {"quant_type": "int3", "block_size": 32, "double_quant": False},
    "mixed": {"pattern": {"down_proj": {"quant_type": "fp4"}, r"layers\.1\..*": {"quant_type": "int4", "block_size": 32}}},
}  # fmt: skip


@pytest.fixture
def wide(widen):
    return widen()


@pytest.fixture
def config(wide, tiny_data, tmp_path):
    def make(quant=None, output="run", lora=None, model=wide, **options):
        train = {"max_steps": 4, "batch_size": 4, "max_length": 32, "learning_rate": 0.01, "save_steps": 2}
        train |= {"output_dir": str(tmp_path / output), **options.pop("train", {})}
        data = {"path": str(tiny_data), "max_eval_rows": 16}
        lora = {"r": 4, **(lora or {})}
        return RunConfig(
            model=str(model), data=data, device="cpu", merge_aware=True, quant=quant or {}, lora=lora, train=train, **options
        )

    return make


def layer_of(quant, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = 0.1 * torch.randn(48, 64, generator=generator)
    base = QuantLinear(quantize(weight, HELD), torch.randn(48, generator=generator) if bias else None)
    layer = LoraLinear(base)
    adapter = layer.add("a", 4, 8, 0.0, False, MergeAware(quant))
    for parameter in adapter.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return layer, adapter


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [QUANT["nf4"], QUANT["int4"]], ids=["nf4", "int4"])
def test_a_layer_computes_the_packed_sum_with_gradients_straight_through(options, bias):
    quant = QuantConfig(**options)
    layer, adapter = layer_of(quant, bias)
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves = [x, adapter.lora_A, adapter.lora_B]
    y = layer(x)
    found = torch.autograd.grad(y.square().sum(), leaves)

    exact = layer.base.weight.dequantize(torch.float32) + adapter.scale * adapter.lora_B @ adapter.lora_A
    rounded = quantize(exact, quant).dequantize(torch.float32)
    expected = x @ (exact + (rounded - exact).detach()).t()
    expected = expected + layer.base.bias if bias else expected
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x[:1, :2]), y[:1, :2], rtol=1e-5, atol=1e-5)


def test_generation_leaves_a_weight_that_can_be_trained():
    layer, adapter = layer_of(QuantConfig())
    x = torch.randn(7, 64)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert adapter.lora_A.grad.any()


@pytest.mark.parametrize("change", ["values", "kernels"])
def test_a_graph_keeps_its_weight_unless_its_matrices_change_in_place(change):
    """The packed weight is written again in its own memory by steps only: another graph may hold it otherwise."""
    layer, adapter = layer_of(QuantConfig())
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    loss = layer(x).square().sum()
    if change == "values":
        values, adapter.lora_B.data = adapter.lora_B.data, adapter.lora_B.data + 1
        layer(x).sum().backward()
        adapter.lora_B.data = values
    else:
        with ops.use_backend("reference"), torch.no_grad():
            layer(x)
    torch.testing.assert_close(torch.autograd.grad(loss, x), expected)
    with torch.no_grad():
        layer(x)
        held = adapter.variant.packed.codes
        adapter.lora_B.add_(1)
        layer(x)
    assert adapter.variant.packed.codes is held


def test_16_bit_activations():
    layer, adapter = layer_of(QuantConfig())
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    y = layer(x.bfloat16().requires_grad_())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert adapter.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if not name.startswith("another")])
def test_the_weight_is_packed_once_a_step(optim, monkeypatch, tmp_path):
    layer, adapter = layer_of(QuantConfig())
    optimizer = make_optimizer(optim, adapter.parameters(), 0.1, 0.0, folder=tmp_path)
    x, packed = torch.randn(5, 64), []
    monkeypatch.setattr("lownibble.lora.merge_aware.pack_sum", lambda *of: packed.append(1) or pack_sum(*of))
    for step in range(3):
        for _ in range(2):
            layer(x).square().sum().backward()
        with torch.no_grad():
            layer(x)
        assert len(packed) == step + 1
        held = adapter.variant.packed
        anew = pack_sum(layer.base.weight, adapter.lora_A, adapter.lora_B, adapter.scale, QuantConfig())
        assert torch.equal(held.codes, anew.codes)
        assert torch.equal(held.absmax, anew.absmax)
        optimizer.step()
    if hasattr(optimizer, "close"):
        optimizer.close()


def evaluate(folder, config):
    """The evaluation loss of a model folder on the rows of a run."""
    model, tokenizer = ln.load(str(folder), device="cpu")
    ln.add_lora(model, LoraConfig(r=1))
    train = config.train.with_options(output_dir=None)
    return make_trainer(model, tokenizer, load_data(config.data), config.data, train)[0].evaluate(0).loss


@pytest.mark.parametrize(
    ("name", "targets"), [*((name, "all-linear") for name in QUANT), ("mixed", ["q_proj", "down_proj", "lm_head"])], ids=str
)
def test_the_merged_model_has_the_codes_that_were_trained(config, tmp_path, name, targets):
    asked = config(QUANT[name], lora={"target_modules": targets})
    trained = run(asked)
    codec = asked.quant.quant_type
    merged = ln.merge(tmp_path / "run" / "adapter", tmp_path / "merged", onto=codec, measure_tokens=0)
    assert merged["onto"] == codec
    model, _ = ln.load(str(tmp_path / "merged"), device="cpu")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 14
    changed = 0
    for path, layer in layers.items():
        live = trained.model.get_submodule(path)
        weight = live.adapter("default").variant.packed if isinstance(live, LoraLinear) else live.weight
        assert weight.facts()["quant_type"] == layer.quant_type
        assert all(torch.equal(a, b) for a, b in zip(weight.tensors().values(), layer.flat, strict=True)), path
        if isinstance(live, LoraLinear):
            packed = quantize(live.base.weight.dequantize(), asked.quant.for_layer(path))
            changed += not torch.equal(packed.codes, weight.codes)
    assert changed >= 4, "the steps moved codes"
    assert evaluate(tmp_path / "merged", asked) == pytest.approx(trained.eval_loss, rel=1e-6)
    assert trained.record["model"]["merge_aware"].startswith(f"{codec}/")
    assert trained.record["model"]["compute_chosen"] == "exact (merge-aware layers have exact products)"
    assert trained.record["evaluations"][0]["loss"] > trained.eval_loss


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "int4"])
def test_resumes_bit_for_bit_and_is_planned(config, tmp_path, name):
    whole = run(config(QUANT[name], "whole"))
    run(config(QUANT[name], "cut"))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    resumed = run(config(QUANT[name], "cut", train={"resume": True}))
    assert resumed.losses == whole.losses
    assert resumed.eval_loss == whole.eval_loss
    adapters = [(tmp_path / each / "adapter" / "adapter_model.safetensors").read_bytes() for each in ("whole", "cut")]
    assert adapters[0] == adapters[1]

    memory = whole.record["memory"]
    kinds = memory["planned"]["plan"]["kinds"]
    assert (kinds["codes"], kinds["constants"]) == (memory["codes_bytes"], memory["constants_bytes"])
    held = sum(m.in_features * m.out_features for m in whole.model.modules() if isinstance(m, QuantLinear))
    assert memory["codes_bytes"] == 1.5 * held, "8 bits and 4"
    entries = [each for each in memory["ledger"]["tensors"] if each["kind"] == "codes"]
    assert sum(each["bytes"] for each in entries) == memory["codes_bytes"]


def test_auto_packs_and_what_is_measured_is_the_packed_model(config, tmp_path):
    run(config())
    merged = ln.merge(tmp_path / "run" / "adapter", tmp_path / "merged", measure_tokens=128)
    assert merged["onto"] == "nf4"
    models = merged["measured"]["models"]
    assert set(models) == {"live", "base", "dequantized", "original", "nf4"}
    assert models["nf4"]["kept"] == 1
    assert models["dequantized"]["kept"] < 1
    assert merged["measured"]["layers"]["nf4"]["error_over_delta_worst"] == 0
    with pytest.raises(ConfigError, match=r"onto 'int4': the result is packed as nf4, which the adapter was trained for\. Merge"):
        ln.merge(tmp_path / "run" / "adapter", tmp_path / "other", onto="int4", measure_tokens=0)


def test_the_adapter_loads_on_other_bases_with_a_word(config, wide, tmp_path, batch):
    run(config())
    for quant in (None, "nf4", "int8"):
        model, _ = ln.load(str(wide), quant=quant, device="cpu")
        with pytest.warns(
            UserWarning, match=r"trained merge-aware, for a model packed as nf4/64 double-quantised .* merge it first"
        ):
            ln.load_adapter(model, tmp_path / "run" / "adapter")
        assert all(layer.adapter("default").variant is LORA for _, layer in lora_layers(model, "default"))


def test_peft_reads_the_adapter(peft, config, wide, tmp_path):
    from transformers import AutoModelForCausalLM

    trained = run(config())
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wide), tmp_path / "run" / "adapter")
    ours = dict(lora_layers(trained.model, "default"))["model.layers.1.mlp.up_proj"].adapter("default")
    assert torch.equal(theirs.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight, ours.lora_B)


def test_an_adapter_is_trained_on(config, tmp_path):
    first = run(config())
    options = config(output="second").with_options(adapter=str(tmp_path / "run" / "adapter"), lora=LoraConfig())
    second = run(options)
    assert second.record["evaluations"][0]["loss"] == pytest.approx(first.eval_loss, rel=1e-6)


def test_rows_of_no_whole_blocks_are_held_by_row(tiny_model, config, tmp_path):
    trained = run(config({"block_size": 32}, model=tiny_model))
    assert {layer.base.block_size for _, layer in lora_layers(trained.model, "default")} == {"row"}
    ln.merge(tmp_path / "run" / "adapter", tmp_path / "merged", onto="nf4", measure_tokens=0)
    assert evaluate(tmp_path / "merged", config()) == pytest.approx(trained.eval_loss, rel=1e-6)


def test_layers_that_transformers_reads_dense_are_plain_lora(config, tmp_path):
    trained = run(config(model=write_t5(tmp_path / "t5"), quant={"block_size": 32}))
    kinds = {
        path.rpartition(".")[2]: type(layer.adapter("default").variant) for path, layer in lora_layers(trained.model, "default")
    }
    assert kinds.pop("wo") is type(LORA)
    assert set(kinds.values()) == {MergeAware}
    ln.merge(tmp_path / "run" / "adapter", tmp_path / "merged", onto="nf4", measure_tokens=0)
    assert evaluate(tmp_path / "merged", config()) == pytest.approx(trained.eval_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "lora"}, "with method 'lora', which packs nothing. Use method qlora"),
        ({"method": "full"}, "with method 'full', which packs nothing. Use method qlora"),
        ({"lora": {"lora_dropout": 0.1}}, "with lora_dropout 0.1: .* Set lora_dropout=0"),
        ({"quant": {"compute": "int8"}}, "with compute 'int8': its products are exact. Leave compute out"),
    ],
)
def test_options_that_contradict_are_named(options, words):
    with pytest.raises(ConfigError, match=f"'merge_aware' of RunConfig cannot be done {words}"):
        RunConfig(merge_aware=True, **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"quant": {"quant_type": "int8"}}, ConfigError, r"_proj' in int8, and int8 is no coarser\. Use a quant_type of fewer"),
        ({"quant": {"pattern": {"up_proj": {"quant_type": "fp8"}}}}, ConfigError, r"up_proj' in int8, and fp8 is no coarser"),
        ({"lora": {"target_modules": ["lm_head"]}}, ConfigError, r"rounds adapted layers that are packed, and there is none\."),
        ({"train": {"torch_compile": True}}, ConfigError, r"torch_compile=True cannot be done: merge-aware layers pack"),
    ],
)
def test_what_cannot_be_rounded_is_named_before_training(config, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        run(config(**options))
    assert not (tmp_path / "run" / "record.json").exists()


def test_quantised_checkpoints_are_refused(config, wide, tmp_path):
    run(config())
    ln.merge(tmp_path / "run" / "adapter", tmp_path / "merged", onto="nf4", measure_tokens=0)
    with pytest.raises(
        ModelError, match=r"merged' is stored quantised, as bitsandbytes; merge-aware training rounds dense weights\."
    ):
        run(config(model=tmp_path / "merged", output="again"))


def test_adapters_that_are_more_than_lora_are_refused(config, monkeypatch):
    class Other(type(LORA)):
        plain = False

    monkeypatch.setitem(VARIANTS._entries, "lora", Other())
    with pytest.raises(TargetError, match="is for plain LoRA, and this adapter is more"):
        run(config())


def test_initialisations_that_change_the_base_are_refused(config, monkeypatch):
    monkeypatch.setitem(INITS._entries, "changing", lambda adapter, start: start.packed)
    with pytest.raises(TargetError, match=r"'changing' changes packed weights, .* train without --merge-aware"):
        run(config(lora={"init_lora_weights": "changing"}))


def test_saved_adapters_with_dropout_are_refused(config, wide, tmp_path):
    model, _ = ln.load(str(wide), quant="nf4", device="cpu")
    ln.save_adapter(ln.add_lora(model, LoraConfig(r=4, lora_dropout=0.1)), tmp_path / "dropping")
    with pytest.raises(TargetError, match=r"Got lora_dropout = 0\.1\. Set lora_dropout=0"):
        run(config().with_options(adapter=str(tmp_path / "dropping"), lora=LoraConfig()))
