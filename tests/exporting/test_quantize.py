"""`lownibble quantize`. Oracles: the model packed while it is loaded; GPTQ on the whole model in memory; transformers."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import WORDS, write_model, write_t5

import lownibble as ln
from lownibble.calibration import join_rows, walk
from lownibble.calibration.gptq import round_again
from lownibble.cli.main import main
from lownibble.config import DataConfig, QuantConfig, QuantizeConfig
from lownibble.data import encode, read
from lownibble.errors import ConfigError, DataError, ModelError, OutputError, QuantizationError
from lownibble.exporting import quantize as quantizing
from lownibble.lora import lora_layers
from lownibble.quant import QuantLinear, is_linear

QUANT = QuantConfig(quant_type="int3", block_size="row", double_quant=False)
OPTIONS = {"calibration_tokens": 600, "max_length": 32, "device": "cpu"}


@pytest.fixture
def base(tmp_path):
    return write_model(tmp_path / "base")


@pytest.fixture
def rows(tmp_path):
    """Texts of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(4)
    file = tmp_path / "rows.jsonl"
    drawn = torch.randint(0, len(WORDS), (60, 14), generator=generator)
    file.write_text("".join(json.dumps({"text": " ".join(WORDS[i] for i in row)}) + "\n" for row in drawn.tolist()))
    return file


def packed_layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, layer in ours.items():
        assert layer.weight.facts() == theirs[path].weight.facts()
        for name, tensor in layer.weight.tensors().items():
            assert torch.equal(tensor, theirs[path].weight.tensors()[name]), (path, name)


@pytest.mark.parametrize("quant", [QUANT, QuantConfig(block_size=32), QuantConfig(pattern={"q_proj": {"quant_type": "fp4"}})])
def test_rounded_to_nearest_it_is_what_loading_packs(base, tmp_path, quant):
    record = ln.quantize_model(str(base), tmp_path / "out", rounding="rtn", quant=quant)
    assert record["layers"] == 14
    equal(packed_layers(ln.load(str(tmp_path / "out"))[0]), packed_layers(ln.load(str(base), quant=quant)[0]))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_pattern_chooses_no_codec_beside_bits(tmp_path):
    options = {"output": str(tmp_path), "quant": QuantConfig(pattern={"down_proj": {"quant_type": "int8"}})}
    with pytest.raises(ConfigError, match=r"Got a pattern with quant_type for down_proj\. Leave quant_type out of it, or bits"):
        QuantizeConfig(bits=4.0, **options)
    QuantizeConfig(**options)
    QuantizeConfig(bits=4.0, output=str(tmp_path), quant=QuantConfig(pattern={"down_proj": {"block_size": 32}}))


def packed_in_memory(base, rows, quant, paths):
    """The layers at `paths` packed by GPTQ with the whole model in memory."""
    model, tokenizer = ln.load(str(base))
    data = DataConfig(path=str(rows))
    joined = join_rows([row.input_ids for row in encode(read(str(rows))[0], tokenizer, data, 600).examples], 600, 32)

    def visit(found):
        for path, moments in found.items():
            linear = model.get_submodule(path)
            W = linear.weight.data
            nearest = ln.quantize(W, quant, statistics=moments.diagonal)
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, QuantLinear(round_again(W, moments, nearest)))

    walk(model, joined, paths, visit)
    return packed_layers(model)


@pytest.mark.parametrize(
    "quant", [QUANT, QuantConfig(block_size=32), QuantConfig(quant_type="int8", block_size="row", double_quant=False)]
)
def test_by_gptq_it_is_what_the_whole_model_in_memory_gives(base, rows, tmp_path, quant):
    record = ln.quantize_model(str(base), tmp_path / "out", calibration=str(rows), quant=quant, **OPTIONS)
    paths = [path for path, module in ln.load(str(base))[0].named_modules() if is_linear(module) and path != "lm_head"]
    found, _ = ln.load(str(tmp_path / "out"))
    equal(packed_layers(found), packed_in_memory(base, rows, quant, paths))
    assert record["error_over_rtn_median"] < 1
    assert not record["rounded_to_nearest"]
    assert set(record["output_errors"]) == set(paths)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "out", "rows.jsonl"]


def test_transformers_loads_nf4_as_bitsandbytes(base, rows, tmp_path, bitsandbytes):
    from transformers import AutoModelForCausalLM

    ln.quantize_model(str(base), tmp_path / "out", calibration=str(rows), quant=QuantConfig(block_size=64), **OPTIONS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours, _ = ln.load(str(tmp_path / "out"), dtype="float32")
    for path, layer in packed_layers(ours).items():
        weight = theirs.get_submodule(path).weight
        assert torch.equal(weight.data.view(-1, 1), layer.weight.tensors()["codes"])


def test_it_trains_as_a_quantised_base(base, rows, tmp_path):
    ln.quantize_model(str(base), tmp_path / "out", calibration=str(rows), quant=QUANT, **OPTIONS)
    model, _ = ln.load(str(tmp_path / "out"))
    ln.add_lora(model, ln.LoraConfig(r=2))
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_starts_that_correct_it_read_the_dense_model(base, rows, tmp_path):
    ln.quantize_model(str(base), tmp_path / "out", calibration=str(rows), quant=QUANT, **OPTIONS)
    dense, _ = ln.load(str(base))
    weights = {path: module.weight.clone() for path, module in dense.named_modules() if is_linear(module)}
    model, _ = ln.load(str(tmp_path / "out"))
    ln.add_lora(model, ln.LoraConfig(r=8, init_lora_weights="loftq"))
    for path, layer in lora_layers(model, "default"):
        adapter, packed = layer.adapter("default"), layer.base.weight.dequantize(torch.float32)
        lost = weights[path] - packed
        assert (lost - adapter.scale * adapter.lora_B @ adapter.lora_A).norm() < 0.8 * lost.norm()
    ln.save_adapter(model, tmp_path / "adapter")
    ln.merge(tmp_path / "adapter", tmp_path / "merged", onto="dequantized", measure_tokens=0)
    assert "quantized_from" not in (tmp_path / "merged" / "config.json").read_text()
    other, _ = ln.load(str(tmp_path / "out"))
    change(base)
    with pytest.raises(ModelError, match=r"is not what '.*out' was made from: its weights are others"):
        ln.add_lora(other, ln.LoraConfig(init_lora_weights="loftq"))
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=r"cannot be read: There is no model .* Put them there, or use"):
        ln.add_lora(ln.load(str(tmp_path / "out"))[0], ln.LoraConfig(init_lora_weights="loftq"))


def change(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_model_is_never_in_memory_as_a_whole(base, rows, tmp_path, monkeypatch):
    held = []
    place = quantizing.place

    def watched(model, *rest):
        place(model, *rest)
        layers = {name.split(".")[2] for name, p in model.named_parameters() if "layers." in name and not p.is_meta}
        held.append(layers)

    monkeypatch.setattr(quantizing, "place", watched)
    ln.quantize_model(str(base), tmp_path / "out", calibration=str(rows), quant=QUANT, **OPTIONS)
    assert held == [set(), {"0"}, {"1"}]


def test_an_interrupted_run_keeps_the_layers_that_are_finished(base, rows, tmp_path, monkeypatch):
    options = {"calibration": str(rows), "quant": QUANT, **OPTIONS}
    ln.quantize_model(str(base), tmp_path / "whole", **options)
    calls, by_gptq = [], quantizing.round_again

    def counted(*arguments, stop=10**9):
        calls.append(arguments)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return by_gptq(*arguments)

    monkeypatch.setattr(quantizing, "round_again", partial(counted, stop=9))
    with pytest.raises(KeyboardInterrupt):
        ln.quantize_model(str(base), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    calls.clear()
    monkeypatch.setattr(quantizing, "round_again", counted)
    ln.quantize_model(str(base), tmp_path / "out", **options)
    assert len(calls) == 14 - 9
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    calls.clear()
    ln.quantize_model(str(base), tmp_path / "other", **{**options, "quant": QuantConfig(block_size=32)})
    assert len(calls) == 14


@pytest.mark.parametrize("damage", [b"", b"{}"])
def test_a_damaged_file_of_a_finished_layer_is_made_again(base, rows, tmp_path, monkeypatch, damage):
    """As a power cut may leave one."""
    options = {"calibration": str(rows), "quant": QUANT, **OPTIONS}
    ln.quantize_model(str(base), tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "write", full)
        with pytest.raises(OutputError, match="finished layers are kept"):
            ln.quantize_model(str(base), tmp_path / "out", **options)
    next(tmp_path.glob(".out.gptq/*.safetensors")).write_bytes(damage)
    synced = []
    monkeypatch.setattr("lownibble.exporting.merge.os.fsync", lambda number: synced.append(number))
    ln.quantize_model(str(base), tmp_path / "out", **options)
    assert len(synced) >= 2, "the layer's file and the checkpoint"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_layer_without_inputs_is_rounded_to_nearest(base, rows, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"].zero_()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    record = ln.quantize_model(str(base), tmp_path / "out", calibration=str(rows), quant=QUANT, **OPTIONS)
    dead = "model.layers.0.self_attn.o_proj"
    assert record["rounded_to_nearest"] == [dead]
    assert len(record["output_errors"]) == 13
    ours, nearest = ln.load(str(tmp_path / "out"))[0], ln.load(str(base), quant=QUANT)[0]
    equal({dead: ours.get_submodule(dead)}, {dead: nearest.get_submodule(dead)})


def test_a_checkpoint_that_names_the_tied_tensor_by_the_head(base, rows, tmp_path):
    ln.quantize_model(str(base), tmp_path / "usual", calibration=str(rows), quant=QUANT, **OPTIONS)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    ln.quantize_model(str(base), tmp_path / "out", calibration=str(rows), quant=QUANT, **OPTIONS)
    equal(*(packed_layers(ln.load(str(tmp_path / name))[0]) for name in ("out", "usual")))


def test_a_block_that_several_layers_share(tokenizer, tiny, tmp_path):
    """Zamba2's: its layers stay dense, and adapters of each use are layers of their own."""
    sizes = {
        "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_hidden_layers": 4, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"] * 2, "adapter_rank": 8, "attention_hidden_size": 128, "attention_head_dim": 32,
        "kv_channels": 16, "hidden_size": 64, "intermediate_size": 128,
    }  # fmt: skip
    drawn = torch.randint(0, 90, (60, 14), generator=torch.Generator().manual_seed(4)).tolist()
    rows, model = tmp_path / "rows.jsonl", tmp_path / "zamba"
    rows.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in drawn))
    tiny("zamba2", **sizes).save_pretrained(model)
    tokenizer.save_pretrained(model)
    quant = QuantConfig(quant_type="int4", block_size=32, double_quant=False)
    record = ln.quantize_model(str(model), tmp_path / "out", calibration=str(rows), quant=quant, format="lownibble", **OPTIONS)
    found = packed_layers(ln.load(str(tmp_path / "out"))[0])
    assert list(record["output_errors"]) == list(found)
    assert {"in_proj", "out_proj"} <= {path.rpartition(".")[2] for path in found}
    equal(found, packed_in_memory(model, rows, quant, list(found)))


def test_what_cannot_be_quantised_is_said(base, rows, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "few.jsonl").write_text('{"text": "good film"}\n' * 5)
    with pytest.raises(DataError, match="at least 256 are needed"):
        ln.quantize_model(str(base), out, calibration=str(tmp_path / "few.jsonl"), quant=QUANT, **OPTIONS)
    assert not out.exists()
    ln.export(str(base), str(tmp_path / "four"), format="bnb-4bit", quant=QuantConfig(block_size=32))
    with pytest.raises(ConfigError, match=r"is quantised already, as bitsandbytes. Give the dense checkpoint"):
        ln.quantize_model(str(tmp_path / "four"), tmp_path / "again")
    with pytest.raises(OutputError, match="holds something already"):
        ln.quantize_model(str(base), tmp_path / "four")


def test_rows_are_joined_before_they_are_cut(base, rows, tmp_path):
    """60 rows of 14 tokens; cut to 2 tokens first they would be 120 tokens, too few."""
    record = ln.quantize_model(
        str(base), tmp_path / "out", calibration=str(rows), quant=QUANT, max_length=2, calibration_tokens=600, device="cpu"
    )
    assert record["calibration"] == {"tokens": 600, "row_tokens": 2}


def test_of_preferences_the_chosen_answers_calibrate(base, tmp_path):
    """Oracle: the same texts as prompts and completions."""
    pairs = [{"prompt": " ".join(WORDS[n : n + 6]), "chosen": f" {WORDS[n]} film", "rejected": " bad"} for n in range(12)] * 6
    plain = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    for name, each in (("pairs", pairs), ("plain", plain)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
        ln.quantize_model(str(base), tmp_path / name, calibration=str(tmp_path / f"{name}.jsonl"), quant=QUANT, **OPTIONS)
    equal(*(packed_layers(ln.load(str(tmp_path / name))[0]) for name in ("pairs", "plain")))


def test_rows_are_no_longer_than_the_models_positions(base, rows, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    with pytest.warns(UserWarning, match="rows are of 24 tokens instead of 512: LlamaForCausalLM has no more positions"):
        record = ln.quantize_model(
            str(base), tmp_path / "out", calibration=str(rows), quant=QUANT, calibration_tokens=600, device="cpu"
        )
    assert record["calibration"]["row_tokens"] == 24


@pytest.mark.parametrize("more", [{}, {"rounding": "rtn", "bits": 4.5}])
def test_an_encoder_is_refused_with_a_remedy(tmp_path, more):
    folder = write_t5(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"t5' has an encoder: .* Use --method rtn, without --bits"):
        ln.quantize_model(str(folder), tmp_path / "out", quant=QUANT, **more)
    ln.quantize_model(str(folder), tmp_path / "out", quant=QUANT, rounding="rtn")


@pytest.mark.parametrize(
    "given", [{"calibration": "demo"}, {"calibration_tokens": 600}, {"max_length": 64}, {"seed": 1}, {"device": "cuda"}]
)
def test_what_rounding_to_nearest_does_not_use_is_refused(base, tmp_path, given):
    with pytest.raises(ConfigError, match=rf"Rounding to nearest .* Got {next(iter(given))}\. Leave that out"):
        QuantizeConfig(model=str(base), output=str(tmp_path / "out"), rounding="rtn", **given)
    QuantizeConfig(model=str(base), output=str(tmp_path / "out"), rounding="rtn", bits=4.0, **given)


def test_compute_is_no_option_of_the_command(base, tmp_path, capsys):
    assert main(["quantize", str(base), "--output", str(tmp_path / "out"), "--compute", "exact"]) == 2
    assert "--compute" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "kept"), [(QuantizationError("no"), False), (OSError("full"), True), (RuntimeError(), True)])
def test_finished_layers_are_kept_where_the_run_may_go_on(base, rows, tmp_path, monkeypatch, error, kept):
    calls, by_gptq = [], quantizing.round_again

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        return by_gptq(*arguments)

    monkeypatch.setattr(quantizing, "round_again", fails)
    with pytest.raises((QuantizationError, OutputError, RuntimeError)):
        ln.quantize_model(str(base), tmp_path / "out", calibration=str(rows), quant=QUANT, **OPTIONS)
    assert len(list(tmp_path.glob(".out.gptq/*.safetensors"))) == (2 if kept else 0)
    assert (tmp_path / ".out.gptq").exists() == kept


@pytest.mark.parametrize(("quant_type", "rounding"), [("int4", "gptq"), ("nf4", "rtn")])
def test_bits_give_each_layer_a_codec(base, rows, tmp_path, quant_type, rounding):
    """Blocks are rows, so that all layers of the tiny model suit every codec; one constant for 32 to 80 weights."""
    quant = QuantConfig(quant_type=quant_type, block_size=32 if quant_type == "nf4" else "row", double_quant=False)
    options = {"calibration": str(rows), "rounding": rounding, "quant": quant, **OPTIONS}
    record = ln.quantize_model(str(base), tmp_path / "out", bits=5.5, **options)
    model, _ = ln.load(str(tmp_path / "out"))
    found = packed_layers(model)
    assert {path: layer.quant_type for path, layer in found.items()} == record["mixed"]["codecs"]
    n_bytes = sum(layer.weight.nbytes for layer in found.values())
    if quant_type == "int4":  # in compressed-tensors' files, which have no facts beside
        stored = load_file(tmp_path / "out" / "model.safetensors")
        n_bytes = sum(tensor.nbytes for key, tensor in stored.items() if key.partition(".weight")[0] in found)
    bits = 8 * n_bytes / sum(layer.weight.numel() for layer in found.values())
    assert bits == pytest.approx(record["mixed"]["bits"])
    assert 4 < bits <= 5.5
    assert len(set(record["mixed"]["codecs"].values())) > 1
    with pytest.raises(ConfigError, match="No choice of codecs is that small"):
        ln.quantize_model(str(base), tmp_path / "small", bits=1.5, **options)
    assert not (tmp_path / "small").exists()


def test_the_command(base, rows, tmp_path, capsys):
    arguments = ["quantize", str(base), "--output", str(tmp_path / "out"), "--quant-type", "int4", "--block-size", "row"]
    arguments += ["--method", "gptq", "--calibration", str(rows), "--calibration-tokens", "600", "--max-length", "32", "--json"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    record = json.loads(told.out.splitlines()[-1])
    assert record["config"]["rounding"] == "gptq"
    assert "x that of rounding to nearest" in told.err
    assert packed_layers(ln.load(str(tmp_path / "out"))[0])["model.layers.1.mlp.up_proj"].quant_type == "int4"


@pytest.mark.slow
def test_killed_while_packing_it_ends_with_the_same_bytes(base, rows, tmp_path, forked):
    command = [sys.executable, "-m", "lownibble", "quantize", str(base), "--quant-type", "int3", "--block-size", "row"]
    command += ["--calibration", str(rows), "--calibration-tokens", "600", "--max-length", "32", "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    aside = tmp_path / ".out.gptq"
    while process.poll() is None and not list(aside.glob("*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
