"""The four examples of docs/extending.md, as they stand there: each trains, resumes where that matters, does what it says.

Oracles: the dense weights for the codec's rounding, a singular value decomposition for the initialisation, torch.optim.SGD for
the optimiser, cross-entropy with smoothing for the objective.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lownibble as ln
from lownibble import registry
from lownibble.config import QuantConfig
from lownibble.errors import ConfigError, ModelError, QuantizationError
from lownibble.quant import layouts

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
pytestmark = pytest.mark.usefixtures("forked")
FILES = dict(re.findall(r"```python file=(\S+)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The example files, written out."""
    folder = tmp_path_factory.mktemp("examples")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _loaded(folder):
    registry.load_plugins(",".join(str(folder / name) for name in FILES))


def data_of(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 2} w{i + 3}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(tmp_path, model, name, *flags, steps=3):
    """Train through the command line, in a process of its own that is only told where the file is."""
    output = tmp_path / f"run-{name}"
    code = "import sys; from lownibble.cli.main import main; sys.exit(main())"
    command = [
        sys.executable, "-c", code, "train", "--model", str(model), "--data", str(data_of(tmp_path)), "--batch-size", "4",
        "--max-steps", str(steps), "--max-length", "16", "--lr-scheduler-type", "constant", "--warmup-ratio", "0",
        "--device", "cpu", "--output", str(output), "--json", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), output


def test_the_page_shows_all_four():
    assert set(FILES) == {"ternary.py", "residual.py", "momentum.py", "smoothed.py"}
    used = re.findall(r"LOWNIBBLE_PLUGINS=(\S+) lownibble train", PAGE.read_text())
    assert set(used) == set(FILES)


def test_the_codec_is_one_like_ours():
    weight = torch.randn(6, 33)
    packed = ln.quantize(weight, QuantConfig(quant_type="ternary"))
    scale = weight.abs().mean(1, keepdim=True)
    assert torch.equal(packed.dequantize(), (weight / scale).round().clamp(-1, 1) * scale)
    specs = layouts.layout(weight.shape, QuantConfig(quant_type="ternary"))
    assert packed.nbytes == sum(spec.n_bytes for spec in specs.values())
    assert 8 * packed.tensors()["codes"].numel() / weight.numel() < 1.8


@pytest.mark.parametrize("name", ["ternary", pytest.param("pattern", marks=pytest.mark.slow)])
def test_the_codec_trains_resumes_merges_and_plans(write, tmp_path, monkeypatch, folder, name):
    monkeypatch.setenv(registry.PLUGINS, str(folder / "ternary.py"))
    model = write("llama")
    flags = ["--quant-type", "ternary"] if name == "ternary" else ["--pattern", '{down_proj = {quant_type = "ternary"}}']
    record, output = train(tmp_path, model, name, *flags, "--save-steps", "1")
    assert all(step["loss"] > 0 for step in record["steps"])
    adapter = output / "adapter" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    for newest in sorted((output / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(newest)
    train(tmp_path, model, name, *flags, "--save-steps", "1", "--resume")
    assert adapter.read_bytes() == whole, "resumed to the same bytes"

    merged = ln.merge(output / "adapter", tmp_path / f"merged-{name}", onto="dequantized", measure_tokens=0)
    assert merged["onto"] == "dequantized"
    live, _ = ln.load(str(model), quant=QuantConfig(**record["config"]["quant"]), device="cpu")
    ln.load_adapter(live, output / "adapter")
    dense, _ = ln.load(str(tmp_path / f"merged-{name}"), device="cpu")
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(live.eval()(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    planned = record["memory"]["planned"]
    assert "unknown" not in planned


def test_the_codec_goes_through_transformers(write, tmp_path):
    transformers = pytest.importorskip("transformers")
    from lownibble.integrations.transformers import PackedConfig

    folder = write("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=PackedConfig(quant_type="ternary"))
    model.save_pretrained(tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "packed")
    ours, _ = ln.load(str(tmp_path / "packed"), device="cpu")
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
        assert torch.equal(model(ids).logits, ours(ids).logits)


def test_the_initialisation_starts_nearer_to_the_dense_model(write):
    folder = write("llama", hidden_size=64, intermediate_size=128)
    dense, _ = ln.load(str(folder), device="cpu")
    ids, distances = torch.arange(3, 20).unsqueeze(0), {}
    for init in (True, "residual"):
        model, _ = ln.load(str(folder), quant="int4", device="cpu")
        ln.add_lora(model, ln.LoraConfig(r=8, init_lora_weights=init))
        with torch.no_grad():
            distances[init] = float((model.eval()(ids).logits - dense(ids).logits).norm())
        layer = model.model.layers[0].mlp.down_proj
        if init == "residual":
            adapter = layer.adapter("default")
            lost = dense.model.layers[0].mlp.down_proj.weight - layer.weight.dequantize(torch.float32)
            U, S, V = torch.linalg.svd(lost)
            best = U[:, :8] @ torch.diag(S[:8]) @ V[:8]
            torch.testing.assert_close(adapter.scale * adapter.lora_B @ adapter.lora_A, best, rtol=1e-4, atol=1e-5)
    assert distances["residual"] < 0.9 * distances[True]


def test_the_initialisation_needs_the_dense_weight(write):
    folder = write("llama", hidden_size=64, intermediate_size=128)
    model, _ = ln.load(str(folder), quant="nf4", device="cpu")
    del model._lownibble_info
    with pytest.raises(ModelError, match=r"dense weight of '.*' is needed"):
        ln.add_lora(model, ln.LoraConfig(init_lora_weights="residual"))


@pytest.mark.slow
def test_the_optimiser_is_torchs(write, tmp_path, monkeypatch, folder):
    monkeypatch.setenv(registry.PLUGINS, str(folder / "momentum.py"))
    model = write("llama")
    record, output = train(tmp_path, model, "momentum", "--optim", "momentum", "--learning-rate", "0.01", "--save-steps", "1")
    trained = record["model"]["trainable_parameters"]
    assert record["memory"]["optimizer_state_bytes"] == pytest.approx(4 * trained, rel=0.01)
    adapter = output / "adapter" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    for newest in sorted((output / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(newest)
    train(tmp_path, model, "momentum", "--optim", "momentum", "--learning-rate", "0.01", "--save-steps", "1", "--resume")
    assert adapter.read_bytes() == whole, "momentum was restored"
    assert any(tensor.any() for key, tensor in load_file(adapter).items() if "lora_B" in key)


def test_the_objective_is_smoothed_cross_entropy(tiny, batch):
    from lownibble.data import Batch

    ids, mask, labels = batch()
    model = tiny()
    found = registry.OBJECTIVES["smoothed"].loss(model, Batch(ids, mask, labels), 7)
    logits = model(ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.1) / 7
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_the_objective_trains(write, tmp_path, monkeypatch, folder):
    monkeypatch.setenv(registry.PLUGINS, str(folder / "smoothed.py"))
    model = write("llama")
    smoothed, _ = train(tmp_path, model, "smoothed", "--objective", "smoothed", "--method", "lora")
    plain, _ = train(tmp_path, model, "plain", "--method", "lora")
    assert smoothed["steps"][0]["loss"] != plain["steps"][0]["loss"]
    assert smoothed["evaluations"][0]["loss"] == plain["evaluations"][0]["loss"], "evaluated by the plain loss"


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"There is a built-in codec 'nf4'\. Choose another name"):
        registry.CODECS.add("nf4", object())
    with pytest.raises(ConfigError, match=r"'quant_type' of QuantConfig must be one of 'nf4', .*'ternary'\. Got 'quaternary'"):
        QuantConfig(quant_type="quaternary")
    with pytest.raises(ConfigError, match=r"plug-in '.*absent\.py' \(LOWNIBBLE_PLUGINS\) is not there"):
        registry.load_plugins(str(tmp_path / "absent.py"))
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"broken\.py' \(LOWNIBBLE_PLUGINS\) cannot be imported: ZeroDivisionError"):
        registry.load_plugins(str(tmp_path / "broken.py"))


def test_plug_ins_of_one_name_are_both_loaded(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.py").write_text(f"import sys\nsys.modules['seen_{name}'] = sys")
    registry.load_plugins(f"{tmp_path / 'a' / 'same.py'},{tmp_path / 'b' / 'same.py'}")
    assert sys.modules.pop("seen_a") is sys.modules.pop("seen_b") is sys


def test_an_installed_plug_in_that_does_not_import_is_named(monkeypatch):
    broken = EntryPoint("mine", "no_such_module_of_mine", "lownibble")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    with pytest.raises(ConfigError, match=r"'mine' .*cannot be imported: ModuleNotFoundError"):
        registry.load_plugins.__wrapped__("")


def test_a_codec_that_lacks_something_is_named():
    class Half(ln.Codec):
        def layout(self, shape, config):
            return {}

    with pytest.raises(TypeError, match=r"abstract methods? .*quantize.*restore"):
        Half()

    class Liar(ln.Codec):
        def layout(self, shape, config):
            return {"codes": layouts.TensorSpec("uint8", tuple(shape)), "scale": layouts.TensorSpec("float32", ())}

        def quantize(self, tensor, config, statistics=None):
            return registry.CODECS["int8"].quantize(tensor, QuantConfig(quant_type="int8"))

        def restore(self, facts, tensors):
            raise NotImplementedError

    registry.CODECS.add("liar", Liar())
    with pytest.raises(QuantizationError, match=r"codec 'liar' .*'scale' .*at least one dimension"):
        ln.quantize(torch.randn(8, 64), "liar")
