"""Models that cannot be loaded: each gets one `ModelError` (or `QuantizationError`) that says what to do. Oracle: the message."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import lownibble as ln
from lownibble.errors import ModelError, QuantizationError
from lownibble.models import resolve

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def cut(file: Path, size: int):
    file.write_bytes(file.read_bytes()[:size])


def to_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


REMEDY = "do not belong together"
GPTQ = {"quant_method": "gptq", "bits": 4}
BNB_8BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
DAMAGE = {
    "tensor missing": (lambda f: edit_weights(f, lambda t: t.pop(NORM)), rf"lacks 1 tensor: {NORM}\. The weights .*{REMEDY}"),
    "tensors missing": (lambda f: edit_config(f, num_hidden_layers=3), r"lacks 9 tensors: model\.layers\.2.* and 6 more\. "),
    "tensor extra": (lambda f: edit_weights(f, lambda t: t.update(odd=torch.ones(1))), rf"unknown 1 tensor: odd\. .*{REMEDY}"),
    "tensors extra": (lambda f: edit_config(f, num_hidden_layers=1), r"has unknown 9 tensors: model\.layers\.1.* and 6 more"),
    "tensor renamed": (
        lambda f: edit_weights(f, lambda t: t.update(odd=t.pop(NORM))),
        rf"lacks 1 tensor: {NORM}; it has unknown 1 tensor: odd\. .*do not belong together",
    ),
    "other shape": (lambda f: edit_weights(f, lambda t: t.update({NORM: torch.ones(31)})), rf"{NORM}' has shape \(31,\)"),
    "cut short": (lambda f: cut(f / WEIGHTS, 20_000), r"damaged or cut short .*Download it again"),
    "cut in the header": (lambda f: cut(f / WEIGHTS, 100), r"damaged or cut short .*Download it again"),
    "empty": (lambda f: cut(f / WEIGHTS, 0), r"damaged or cut short .*Download it again"),
    "pickle only": (to_pickle, r"holds no \*\.safetensors file\. Convert its weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "not a model folder: config.json is missing. Point to"),
    "config cut short": (lambda f: cut(f / "config.json", 30), "config.json cannot be used: "),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be used: "),
    "config of another type": (lambda f: edit_config(f, hidden_size="many"), "config.json cannot be used: .*hidden_size"),
    "impossible config": (lambda f: edit_config(f, num_hidden_layers=-1), "has unknown 18 tensors|cannot be used"),
    "heads that do not divide": (lambda f: edit_config(f, num_attention_heads=5, head_dim=...), "config.json .*not a multiple"),
    "no model_type": (lambda f: edit_config(f, model_type=...), "config.json cannot be used: "),
    "unknown model_type": (lambda f: edit_config(f, model_type="llamoid"), "config.json cannot be used: .*llamoid"),
    "not a language model": (lambda f: edit_config(f, model_type="vit", architectures=["ViT"]), "not a language model"),
    "remote code": (
        lambda f: edit_config(f, model_type="odd", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}),
        "config.json cannot be used: .*",
    ),
    "GPTQ": (lambda f: edit_config(f, quantization_config=GPTQ), "says that it is stored as GPTQ, 4 bits .* no tensor of"),
    "Quanto": (lambda f: edit_config(f, quantization_config={"quant_method": "quanto"}), "with quanto. .* loaded: auto-round"),
    "8 bits": (lambda f: edit_config(f, quantization_config=BNB_8BIT), "stored as bitsandbytes, 8 bits .* no tensor of"),
    "generation config cut short": (lambda f: cut(f / "generation_config.json", 9), "generation_config.json cannot be used: "),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has no usable tokenizer: "),
    "tokenizer cut short": (lambda f: cut(f / "tokenizer.json", 200), "has no usable tokenizer: "),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders(write, case, monkeypatch):
    folder = write()
    damage, message = DAMAGE[case]
    damage(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(ModelError, match=message) as caught:
        ln.load(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


SHARD_DAMAGE = {
    "shard missing": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), r"shard model-00002-.* is missing\. Download"),
    "shard cut short": (lambda f: cut(sorted(f.glob("*.safetensors"))[1], 5000), r"model-00002-.*damaged or cut short"),
    "shard empty": (lambda f: cut(sorted(f.glob("*.safetensors"))[0], 0), r"model-00001-.*damaged or cut short"),
    "index cut short": (lambda f: cut(f / INDEX, 300), r"index\.json.* damaged.*Download"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), r"index\.json.* damaged.*Download"),
    "index of a smaller model": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {NORM: sorted(f.glob("*.safetensors"))[0].name}})),
        r"lacks \d+ tensors",
    ),
}


@pytest.mark.parametrize("case", SHARD_DAMAGE)
def test_damaged_shards(write, case):
    folder = write(shards=True)
    damage, message = SHARD_DAMAGE[case]
    damage(folder)
    with pytest.raises(ModelError, match=message):
        ln.load(str(folder))


@pytest.mark.parametrize("key", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_nan_is_named(write, key):
    folder = write()
    edit_weights(folder, lambda tensors: tensors[key].view(-1)[5:7].fill_(float("nan")))
    with pytest.raises(QuantizationError, match=rf"Cannot quantise '{key}': 2 of its \d+ values are NaN"):
        ln.load(str(folder), quant="nf4")


@pytest.mark.parametrize("name", ["nothing", "./nothing", "/nothing/here", "~/nothing", "a/b/c", "demo2", ""])
def test_unknown_names(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=r"There is no model '.*'\. Give 'demo', a model folder, a \.gguf file or a hub id"):
        resolve(name)


def test_unknown_gguf():
    with pytest.raises(ModelError, match=r"There is no file 'nothing\.gguf'\. Check the path"):
        resolve("nothing.gguf")


class _Response:
    headers, request, status_code, text, url = {}, None, 404, "", ""


HUB = {
    "unreachable": (hub_errors.LocalEntryNotFoundError("offline"), r"the hub cannot be reached \(offline\)\. Check the name"),
    "network down": (ConnectionError("no route"), "the hub cannot be reached"),
    "no such repository": (hub_errors.RepositoryNotFoundError("404", response=_Response()), "no such model on the hub: .*404"),
    "no such revision": (hub_errors.RevisionNotFoundError("404", response=_Response()), "no such model on the hub: .*404"),
    "gated": (hub_errors.GatedRepoError("403", response=_Response()), "is gated.*log in"),
    "bad name": (hub_errors.HFValidationError("bad"), "no such model on the hub: bad"),
}


@pytest.mark.parametrize("case", HUB)
def test_hub_errors(monkeypatch, case):
    error, message = HUB[case]

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        ln.load("owner/name")


def test_hub_download_asks_for_safetensors_and_the_revision(monkeypatch, write):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kw: asked.update(repo=repo, **kw) or str(write()))
    model, _ = ln.load("owner/name", revision="v2")
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v2")
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".py")) for pattern in asked["allow_patterns"])
    assert model.config._name_or_path == "owner/name"
    files = [f"{name}.safetensors" for name in ("model", "original/model", "consolidated", "original/consolidated.00", "a/b/c")]
    patterns = {name: asked[f"{name}_patterns"] for name in ("allow", "ignore")}
    fetched = filter_repo_objects(files, allow_patterns=patterns["allow"], ignore_patterns=patterns["ignore"])
    assert list(fetched) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "toaster"}, "no device 'toaster'"),
        ({"device": "cuda:0"}, "torch sees 0 CUDA devices"),
        ({"device": "mps"}, "Give auto, cpu"),
    ],
)
def test_devices(write, options, message):
    if options["device"] == "cuda:0" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ModelError, match=message):
        ln.load(str(write()), **options)


def test_a_folder_that_vanishes(write):
    folder = write()
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match="There is no model"):
        ln.load(str(folder))
