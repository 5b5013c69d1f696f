"""Several adapters in one model, taking them out again, bad options and damaged files. Oracle: the model as it was before."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lownibble as ln
from lownibble.errors import AdapterError, TargetError
from lownibble.lora import LoraLinear, remove_adapter
from lownibble.lora.adapter_file import AdapterFile
from lownibble.models.info import compute_again
from lownibble.registry import INITS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OPTIONS = {
    "low rank": {"init_lora_weights": False},
    "biases": {"init_lora_weights": False, "bias": "all", "target_modules": ["q_proj"]},
    "copies": {"init_lora_weights": False, "modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]},
}


def logits(model, batch):
    ids, mask, _ = batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def train_a_step(model, batch, seed=0):
    ids, mask, labels = batch(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()
    model.zero_grad()
    return model


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}, {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def same(before, after) -> bool:
    return (
        before[0].keys() == after[0].keys()
        and before[1] == after[1]
        and all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", OPTIONS)
def test_adapters_by_name(tiny, batch, case, tied, tmp_path):
    """Each gives its own logits whatever was active in between; None and removal give the base's, bit for bit."""
    model = tiny(attention_bias=True, tie_word_embeddings=tied)
    base, before = logits(model, batch), state(model)
    ln.add_lora(model, ln.LoraConfig(**OPTIONS[case]), name="one", seed=1)
    one = logits(train_a_step(model, batch), batch)
    ln.add_lora(model, ln.LoraConfig(target_modules=["v_proj", "q_proj"], init_lora_weights=False, r=3), name="two", seed=2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".two." in n for n in trained)
    two = logits(train_a_step(model, batch), batch)
    assert not torch.allclose(one, two, atol=1e-3)
    ln.save_adapter(model, tmp_path, name="one")  # while the other is active
    for name, expected in (("one", one), (None, base), ("two", two), (None, base), ("one", one)):
        ln.set_adapter(model, name)
        assert torch.equal(logits(model, batch), expected), name
    remove_adapter(model, "two")
    assert torch.equal(logits(model, batch), one)
    remove_adapter(model, "one")
    assert torch.equal(logits(model, batch), base)
    assert same((before[0], set()), state(model))
    assert torch.equal(logits(ln.load_adapter(model, tmp_path, name="again"), batch), one)


def test_removing_the_active_adapter_activates_the_oldest(tiny, batch):
    model = tiny()
    for name in ("a", "b", "c"):
        ln.add_lora(model, ln.LoraConfig(init_lora_weights=False), name=name, seed=ord(name))
    ln.set_adapter(model, "a")
    first = logits(model, batch)
    ln.set_adapter(model, "b")
    second = logits(model, batch)
    remove_adapter(model, "c")
    assert torch.equal(logits(model, batch), second)
    remove_adapter(model, "b")
    assert torch.equal(logits(model, batch), first)


def test_copies_compute_in_float32_inside_a_bfloat16_model(tiny, batch, tmp_path):
    model = tiny(dtype=torch.bfloat16)
    base = logits(model, batch)
    ln.add_lora(model, ln.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm", "lm_head", "mlp"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, batch).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model, batch), base, rtol=0, atol=0.05)  # bf16: some roundings fewer, on logits of order 3
    train_a_step(model, batch)
    assert not torch.equal(logits(model, batch), base)
    ln.save_adapter(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


@pytest.mark.parametrize("case", OPTIONS)
def test_recomputed_activations_give_the_same_gradients(tiny, batch, case):
    ids, mask, labels = batch()
    found = []
    for recompute in (False, True):
        model = ln.add_lora(tiny(attention_bias=True), ln.LoraConfig(**OPTIONS[case], lora_dropout=0.2)).train()
        if recompute:
            compute_again(model)
        torch.manual_seed(0)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_deepcopy_is_independent(tiny, batch, clone):
    model = tiny(attention_bias=True)
    ln.add_lora(model, ln.LoraConfig(**OPTIONS["biases"]))
    expected = logits(train_a_step(model, batch), batch)
    other = clone(model)
    train_a_step(other, batch)
    ln.set_adapter(other, None)
    assert torch.equal(logits(model, batch), expected)


BAD_OPTIONS = {
    "nothing matches": ({"target_modules": ["query"]}, r"match no linear module. Candidates: .*q_proj"),
    "one name matches nothing": ({"target_modules": ["q_proj", "c_attn"]}, r"\['c_attn'\] match no linear module. Candidates: "),
    "regex matches nothing": ({"target_modules": "(q|k)_proj"}, "Candidates: "),
    "bad regex": ({"target_modules": "(("}, "not a valid regular expression"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "match no linear module"),
    "no such layer": ({"layers_to_transform": [7]}, r"in layers \[7\]"),
    "regex with layers": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "Put the layers into the regex"),
    "rank_pattern": ({"rank_pattern": {"kqv": 2}}, "rank_pattern 'kqv' matches no targeted module"),
    "alpha_pattern": ({"alpha_pattern": {"kqv": 2}}, "alpha_pattern 'kqv' matches no targeted module"),
    "modules_to_save": ({"modules_to_save": ["classifier"]}, "modules_to_save 'classifier' matches no module"),
    "module without parameters": ({"modules_to_save": ["act_fn"]}, "has no parameters"),
    "everything saved": ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, "match no linear module"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_leave_the_model_alone(tiny, case):
    model = tiny(attention_bias=True)
    before = state(model)
    options, message = BAD_OPTIONS[case]
    with pytest.raises(TargetError, match=message):
        ln.add_lora(model, ln.LoraConfig(**options))
    assert same(before, state(model))
    assert not any(isinstance(m, LoraLinear) for m in model.modules())


@pytest.mark.parametrize("others", [False, True])
def test_an_initialisation_that_fails_leaves_the_model_alone(tiny, monkeypatch, others):
    def fails_at_the_third(adapter, start):
        seen.append(start.path)
        if len(seen) == 3:
            raise TargetError("no")

    seen: list[str] = []
    monkeypatch.setitem(INITS._entries, "failing", fails_at_the_third)
    model = tiny()
    if others:
        ln.add_lora(model, ln.LoraConfig(target_modules=["q_proj"]), name="first")
    before = state(model)
    with pytest.raises(TargetError, match="no"):
        ln.add_lora(model, ln.LoraConfig(init_lora_weights="failing"), name="second")
    assert same(before, state(model))
    assert all(module.active == "first" for module in model.modules() if isinstance(module, LoraLinear))


def test_an_initialisation_cannot_change_the_base_of_other_adapters(write, monkeypatch):
    monkeypatch.setitem(INITS._entries, "replacing", lambda adapter, start: start.packed)
    model, _ = ln.load(str(write("llama")), quant="nf4")
    ln.add_lora(model, ln.LoraConfig(), name="first")
    with pytest.raises(TargetError, match=r"'model\.layers\.0\..*', which other adapters were trained on"):
        ln.add_lora(model, ln.LoraConfig(init_lora_weights="replacing"), name="second")


@pytest.mark.parametrize("name", ["", "a.b", "keys", "default", "training"])
def test_bad_names(tiny, name):
    model = ln.add_lora(tiny(), ln.LoraConfig())
    before = state(model)
    with pytest.raises(TargetError, match=r"already|cannot be called"):
        ln.add_lora(model, ln.LoraConfig(), name=name)
    assert same(before, state(model))


def test_names_that_are_not_there(tiny, tmp_path):
    model = ln.add_lora(tiny(), ln.LoraConfig())
    for call in (ln.set_adapter, remove_adapter):
        with pytest.raises(TargetError, match=r"no adapter 'other'. It has: default"):
            call(model, "other")
    with pytest.raises(AdapterError, match=r"no adapter 'other' to save"):
        ln.save_adapter(model, tmp_path, name="other")


def test_only_one_adapter_trains_biases(tiny):
    model = ln.add_lora(tiny(attention_bias=True), ln.LoraConfig(bias="all"), name="one")
    with pytest.raises(TargetError, match="Adapter 'one' trains biases already"):
        ln.add_lora(model, ln.LoraConfig(bias="lora_only"), name="two")


def test_quantised_modules_cannot_be_copied(tiny):
    model = tiny()
    model.model.layers[0].mlp.up_proj = ln.QuantLinear.from_linear(model.model.layers[0].mlp.up_proj)
    with pytest.raises(TargetError, match=r"modules_to_save 'model.layers.0.mlp' is quantised"):
        ln.add_lora(model, ln.LoraConfig(modules_to_save=["mlp"]))


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path):
    model = ln.add_lora(tiny(), ln.LoraConfig())
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN or infinite"):
        ln.save_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def edit_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v is not ...}))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    save_file(change(dict(sorted(tensors.items()))), folder / WEIGHTS)


def without_first(tensors):
    return dict(list(tensors.items())[1:])


def with_extra(tensors):
    return tensors | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}


def with_other(new):
    return lambda tensors: {k: new if "0.self_attn.q_proj.lora_B" in k else v for k, v in tensors.items()}


DAMAGE = {
    "no folder": (shutil.rmtree, "holds no adapter: adapter_config.json is missing"),
    "no config": (lambda f: (f / CONFIG).unlink(), "holds no adapter: adapter_config.json is missing"),
    "config cut short": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:40]), "Cannot read"),
    "config of another kind": (lambda f: (f / CONFIG).write_text("[1]"), "not a JSON object"),
    "config is binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00\x80"), "Cannot read"),
    "config without rank": (lambda f: edit_config(f, r=...), "does not say r. Save the adapter again"),
    "rank of zero": (lambda f: edit_config(f, r=0), "'r' of LoraConfig must be an integer >= 1. Got 0"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "lacks '.*lora_magnitude_vector'"),
    "LoRA bias": (lambda f: edit_config(f, lora_bias=True), "uses lora_bias = True, which Lownibble does not implement"),
    "other method": (lambda f: edit_config(f, peft_type="IA3"), "uses peft_type = 'IA3'"),
    "unknown option": (lambda f: edit_config(f, new_thing={"a": 1}), "uses new_thing"),
    "PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "changes the base weights"),
    "other targets": (lambda f: edit_config(f, target_modules=["c_attn"]), "does not fit this model: .*Candidates: "),
    "copy of nothing": (lambda f: edit_config(f, modules_to_save=["score"]), "does not fit this model: .*'score'"),
    "pickle only": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "Only safetensors adapters are read"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "is damaged: .*save it again"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "is damaged"),
    "tensor missing": (lambda f: edit_weights(f, without_first), "lacks 'base_model.model.*lora_A.weight'"),
    "tensor extra": (lambda f: edit_weights(f, with_extra), r"has no place for 'base_model.*layers\.9"),
    "wrong shape": (lambda f: edit_weights(f, with_other(torch.zeros(31, 4))), r"has shape \(31, 4\), not \(32, 4\)"),
    "wrong rank": (lambda f: edit_weights(f, with_other(torch.zeros(32, 5))), r"has shape \(32, 5\), not \(32, 4\)"),
    "wrong dimensions": (lambda f: edit_weights(f, with_other(torch.zeros(128))), r"has shape \(128,\), not \(32, 4\)"),
    "changed base": (
        lambda f: edit_weights(f, lambda t: t | {"base_model.model.lm_head.weight": torch.ones(96, 32)}),
        "has no place for 'base_model.model.lm_head.weight'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_leave_the_model_alone(tiny, batch, clone, case, held, tmp_path):
    base = tiny()
    folder = ln.save_adapter(ln.add_lora(clone(base), ln.LoraConfig(r=4)), tmp_path / "adapter")
    model = ln.add_lora(base, ln.LoraConfig(r=2, init_lora_weights=False), name="held") if held else base
    before, expected = state(model), logits(model, batch)
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(AdapterError, match=message):
        ln.load_adapter(model, folder)
    assert same(before, state(model))
    assert torch.equal(logits(model, batch), expected)
    ln.add_lora(model, ln.LoraConfig())


FAILURES = {
    "safetensors": (
        SafetensorError("cut short"),
        AdapterError,
        "adapter_model.safetensors' is damaged: cut short. Copy or save it",
    ),
    "disk": (OSError("no such device"), OSError, "no such device"),
    "stopped": (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
}


@pytest.mark.parametrize("good_reads", [0, 20])
@pytest.mark.parametrize("held", [0, 2])
@pytest.mark.parametrize("case", FAILURES)
def test_reads_that_fail_leave_the_model_alone(tiny, batch, clone, case, held, good_reads, tmp_path, monkeypatch):
    """Also which of other adapters is active, what trains, and biases that the file's trained in place."""
    base = tiny(attention_bias=True)
    other = ln.add_lora(clone(base), ln.LoraConfig(r=4, bias="all", modules_to_save=["norm"]))
    with torch.no_grad():
        for path, parameter in other.named_parameters():
            if path.endswith("bias"):
                parameter.add_(1)
    folder = ln.save_adapter(other, tmp_path / "adapter")
    model = base
    for seed in range(held):
        model = ln.add_lora(model, ln.LoraConfig(r=2, init_lora_weights=False), name=f"held {seed}", seed=seed)
    before, expected = state(model), logits(model, batch)
    raised, seen, message = FAILURES[case]
    read, keys = AdapterFile.read, []

    def failing(file, key):
        keys.append(key)
        if len(keys) > good_reads:
            raise raised
        return read(file, key)

    monkeypatch.setattr(AdapterFile, "read", failing)
    with pytest.raises(seen, match=message):
        ln.load_adapter(model, folder)
    monkeypatch.undo()
    assert len(keys) > good_reads
    assert same(before, state(model))
    assert torch.equal(logits(model, batch), expected)
    assert logits(ln.load_adapter(model, folder), batch).sub(expected).abs().max() > 1e-3


def test_a_base_of_another_size(tiny, tmp_path):
    ln.save_adapter(ln.add_lora(tiny(), ln.LoraConfig(r=4)), tmp_path)
    with pytest.raises(AdapterError, match=r"does not fit this model: .*and \d+ more. Load it on the base it was trained on"):
        ln.load_adapter(tiny(hidden_size=64), tmp_path)
    with pytest.raises(AdapterError, match=r"layers\.1"):
        ln.load_adapter(tiny(num_hidden_layers=1), tmp_path)


def test_saving_over_an_adapter_leaves_whole_files(tiny, batch, clone, tmp_path):
    base = tiny()
    for seed in range(2):
        model = ln.add_lora(clone(base), ln.LoraConfig(init_lora_weights=False), seed=seed)
        ln.save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert torch.equal(logits(ln.load_adapter(base, tmp_path), batch), logits(model, batch))


def test_loaded_adapters_train_only_when_asked(tiny, clone, tmp_path):
    base = tiny(attention_bias=True)
    ln.save_adapter(ln.add_lora(clone(base), ln.LoraConfig(bias="all")), tmp_path)
    assert not any(p.requires_grad for p in ln.load_adapter(clone(base), tmp_path).parameters())
    model = ln.load_adapter(clone(base), tmp_path, trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= {"model.layers.0.self_attn.q_proj.base.bias"}
