"""Regional compilation. Oracles: the same run without it; torch's own check of custom operators; the same run again."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mixtures import build, quiet
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lownibble as ln
from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.errors import BackendError, ConfigError, OutputError, TrainingError
from lownibble.kernels import cpu
from lownibble.lora.layer import LoraLinear
from lownibble.lora.product import lora_matmul
from lownibble.models.linears import on_own_kernels
from lownibble.quant import QuantLinear, eightbit
from lownibble.quant.linear import frozen_matmul
from lownibble.training import compiling, run

DATA = {"prompt_template": "review : {text} sentiment :", "completion_template": " {label}"}
CPU = torch.device("cpu")

try:
    HAS_INT8 = cpu.has_int8()
except BackendError:
    HAS_INT8 = False
needs_vnni = pytest.mark.skipif(not HAS_INT8, reason="no compiled kernels, or no AVX-512 VNNI")


@pytest.fixture(scope="module")
def wide_model(widen):
    """The tiny model with three layers and biases in attention, as wide as the kernels want."""
    return widen(num_hidden_layers=3, attention_bias=True)


def train(model, data, output, compiled, *, method="qlora", compute="exact", lora=None, **options):
    config = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "max_length": 32, "output_dir": str(output)} | options
    return run(RunConfig(
        model=str(model), method=method, data=DataConfig(path=str(data), **DATA), quant=QuantConfig(compute=compute),
        lora=LoraConfig(**{"r": 4, "lora_alpha": 8} | (lora or {})), train=TrainConfig(torch_compile=compiled, **config),
    ))  # fmt: skip


CASES = {
    "some layers without adapters, checkpointing": {
        "lora": {"target_modules": ["q_proj", "down_proj"]}, "gradient_checkpointing": True, "eval_steps": 3,
    },
    "packing, biases": {"lora": {"bias": "lora_only"}, "packing": True},
    "dense": {"method": "lora", "gradient_accumulation_steps": 2},
    "dora": {"lora": {"use_dora": True, "bias": "lora_only"}, "gradient_checkpointing": True},
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == "packing, biases" else pytest.mark.slow) for c in CASES])
def test_a_compiled_run_is_the_plain_one_but_for_rounding(case, wide_model, tiny_data, tmp_path):
    plain = train(wide_model, tiny_data, tmp_path / "plain", False, **CASES[case])
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = train(wide_model, tiny_data, tmp_path / "compiled", True, **CASES[case])
    if case == "dense":  # both kinds of batch, with and without padding, and one graph of each for two layers
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs in (1, 2)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-3)
    assert compiled.eval_loss == pytest.approx(plain.eval_loss, rel=1e-3)
    assert compiled.losses[-1] < compiled.losses[0]
    for result, expected in ((plain, False), (compiled, True)):
        assert result.record["speed"]["compiled"] is expected
        assert (result.record["speed"]["compile_seconds"] > 0) is expected
        assert all("forward" not in vars(module) for module in result.model.modules()), "the model is as it came"
    assert compiled.record["memory"]["saved_activation_bytes"] > 0
    started = json.loads((tmp_path / "compiled" / "events.jsonl").read_text().splitlines()[0])
    assert started["compiled"]
    assert started["compile_reason"] == "torch_compile is on"


@pytest.mark.slow
@needs_vnni
def test_8bit_products_and_dropout_repeat_and_resume_bit_for_bit(wide_model, tiny_data, tmp_path):
    options = {"compute": "int8", "lora": {"lora_dropout": 0.2}, "save_steps": 3}
    whole = train(wide_model, tiny_data, tmp_path / "whole", True, **options)
    plain = train(wide_model, tiny_data, tmp_path / "plain", False, **options | {"lora": {"lora_dropout": 0.0}})
    assert whole.losses == pytest.approx(plain.losses, rel=0.2)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1])
    resumed = train(wide_model, tiny_data, tmp_path / "cut", True, **options, resume=True)
    assert resumed.losses == whole.losses
    shutil.rmtree(sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1])
    with pytest.raises(OutputError, match="compiled: True -> False"):
        train(wide_model, tiny_data, tmp_path / "cut", False, **options, resume=True)
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


@pytest.mark.slow
def test_fp8_products_compile_too(wide_model, tiny_data, tmp_path):
    """On the reference kernels. A rounding elsewhere may become a step of float8, 2^-3 of one value of many in a sum."""
    with ln.use_backend("reference"):
        runs = [train(wide_model, tiny_data, tmp_path / str(c), c, compute="fp8", max_steps=2) for c in (False, True)]
    plain, compiled = runs
    assert compiled.record["speed"]["compiled"]
    assert compiled.record["model"]["compute"] == ["fp8"]
    assert compiled.losses == pytest.approx(plain.losses, rel=0.02)


def layer(quantized, compute="exact", dropout=0.0, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=bias).requires_grad_(False)
    base = QuantLinear.from_linear(linear, QuantConfig(compute=compute)) if quantized else linear
    adapted = LoraLinear(base)
    adapted.add("a", r=4, alpha=8, dropout=dropout, use_rslora=False)
    nn.init.normal_(adapted.adapters["a"].lora_A)
    nn.init.normal_(adapted.adapters["a"].lora_B)
    return adapted


# torch 2.15's check copies its inputs, so that they are no leaves; what torch then asks of them it hides, but not as an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["dense", "nf4", pytest.param("int8", marks=needs_vnni), "fp8"])
def test_the_operator_keeps_torchs_rules(kind, dropout):
    """Schema, shapes under fake tensors, autograd registration, and tracing, by torch's own check.

    The schema's multiplies arguments on the CPU, which torch cannot do with float8; it is the same schema with int8.
    """
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = checks if kind == "fp8" else ("test_schema", *checks)
    code_type, seed = eightbit.CODE_TYPES.get(kind), torch.tensor(7) if dropout else None
    with ln.use_backend("reference") if kind == "fp8" else nullcontext():
        adapted = layer(kind != "dense", "exact" if code_type is None else kind)
        adapter, x = adapted.adapters["a"], torch.randn(2, 13, 64, requires_grad=True)
        weight, codec = ([adapted.base.weight], "") if kind == "dense" else (adapted.base.flat, adapted.base.spec)
        rows = eightbit.rows_of(x, code_type)
        A, B = adapter.lora_A, adapter.lora_B
        some = (torch.arange(26) % 3 == 0).unsqueeze(1)
        for rounded, active in (([], None), ([A.detach().clone(), B.detach().clone()], some)):
            given = (x, weight, codec, adapted.bias, A, B, 0.5, dropout, seed, rows, rounded, active)
            torch.library.opcheck(lora_matmul, given, test_utils=checks)
        if kind != "dense" and not dropout:
            flat = x.detach().view(-1, 64).requires_grad_()
            torch.library.opcheck(frozen_matmul, (flat, weight, codec, 96, eightbit.rows_of(flat, code_type)), test_utils=checks)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nf4", pytest.param("int8", marks=needs_vnni)])
def test_batches_of_other_lengths_take_the_same_graphs(kind, adapted):
    torch._dynamo.reset()
    made = layer(kind != "dense", "int8" if kind == "int8" else "exact")
    counter, frames = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile((made if adapted else made.base).forward, backend=counter, dynamic=True)
    with on_own_kernels(made):
        for T in (9, 10, 13):
            compiled(torch.randn(2, T, 64, requires_grad=True)).sum().backward()
            frames.append(counter.frame_count)
    assert frames == [frames[0]] * 3


def test_when_it_is_chosen(wide_model):
    model, _ = ln.load(str(wide_model), quant=None)
    parameters = sum(p.numel() for p in model.parameters())
    enough = int(compiling.PAYS_AFTER_FLOPS["cpu"] / 6 / parameters) + 1
    assert compiling.choose(False, model, CPU, enough) == (False, "torch_compile is off")
    assert compiling.choose(True, model, CPU, 1) == (True, "torch_compile is on")
    assert compiling.choose("auto", model, CPU, enough)[0]
    chosen, why = compiling.choose("auto", model, CPU, enough // 2)
    assert not chosen
    assert "compiling pays from 1e+14" in why
    chosen, why = compiling.choose("auto", model, torch.device("cuda"), enough)
    assert not chosen
    assert "compiling pays from 5e+15" in why
    assert compiling.choose("auto", model, torch.device("cuda"), 50 * enough)[0], (
        "by default on CUDA, in runs of more than a minute"
    )


@pytest.mark.parametrize("missing", ["compiler", "headers", "layers"])
def test_what_is_missing_is_said(missing, wide_model, monkeypatch, tmp_path):
    model, _ = ln.load(str(wide_model), quant=None)
    words = {"compiler": "no C\\+\\+ compiler", "headers": "headers", "layers": "not known"}[missing]
    if missing == "compiler":
        monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "/nonexistent/g++")
    elif missing == "headers":
        monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    else:
        model._no_split_modules = None
    chosen, why = compiling.choose("auto", model, CPU, 10**15)
    assert not chosen
    assert why.startswith(compiling.IMPOSSIBLE)
    with pytest.raises(ConfigError, match=f"{words}.*torch_compile=False"):
        compiling.choose(True, model, CPU, 1)


@pytest.mark.parametrize("option", ["auto", True])
def test_auto_goes_on_where_compiling_fails_and_true_does_not(option, wide_model, tiny_data, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(compiling.PAYS_AFTER_FLOPS, "cpu", 1.0)

    def broken(*_, **__):
        return lambda *a, **k: (_ for _ in ()).throw(torch._dynamo.exc.InternalTorchDynamoError("no luck"))

    monkeypatch.setattr(compiling.torch, "compile", broken)
    if option is True:
        with pytest.raises(TrainingError, match="could not be compiled: no luck"):
            train(wide_model, tiny_data, tmp_path / "out", option, max_steps=1)
        return
    result = train(wide_model, tiny_data, tmp_path / "out", option, max_steps=1)
    speed = result.record["speed"]
    assert not speed["compiled"]
    assert speed["compile_reason"].startswith("not possible here: A decoder layer could not be compiled: no luck")


@pytest.mark.slow
def test_too_many_graphs_are_an_error_not_a_slow_path(wide_model, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "GRAPHS", 1)
    model, _ = ln.load(str(wide_model), quant="nf4")
    ln.add_lora(model, LoraConfig(r=5, rank_pattern={"layers.1.mlp.up_proj": 6, "layers.2.mlp.up_proj": 7}))
    compiled, ids = compiling.Compiled(model.train()), torch.arange(8).view(2, 4)
    with (
        compiling.torchs_own_warnings_off(),
        pytest.raises(TrainingError, match=r"more than 1 graphs.*--torch-compile false"),
        compiled(),
    ):
        model(ids)


def test_hooks_on_a_layer_stay(wide_model):
    model, _ = ln.load(str(wide_model), quant=None)
    layer, calls = model.base_model.layers[1], []
    plain = layer.forward

    def hooked(*arguments, **options):
        calls.append(1)
        return plain(*arguments, **options)

    layer.forward = hooked
    with compiling.Compiled(model)():
        assert layer.forward is not hooked
    assert layer.forward is hooked


def test_graphs_of_other_versions_are_not_used(tmp_path, monkeypatch):
    """torch's cache on disk knows an operator by its name; the digest of the code behind it is part of the key."""
    rooms = tmp_path / "lownibble"
    for room in ("kernels", "quant", "lora", "models"):
        shutil.copytree(Path(ln.__file__).parent / room, rooms / room, ignore=shutil.ignore_patterns("*.so", "native"))
    tags = [compiling._operators.__wrapped__()]
    monkeypatch.setattr(ln, "__file__", str(rooms / "__init__.py"))
    tags.append(compiling._operators.__wrapped__())
    with (rooms / "lora" / "product.py").open("a") as file:
        file.write("# another version\n")
    tags.append(compiling._operators.__wrapped__())
    assert tags[0] == tags[1] != tags[2]


def test_a_layer_that_cannot_be_compiled_is_a_clear_error(wide_model):
    model, _ = ln.load(str(wide_model), quant=None)
    compiled = compiling.Compiled(model)

    def broken(*_, **__):
        raise torch._dynamo.exc.InternalTorchDynamoError("no luck")

    compiled.forwards = [(layer, broken) for layer, _ in compiled.forwards]
    with pytest.raises(TrainingError, match=r"could not be compiled.*--torch-compile false"), compiled():
        model(torch.tensor([[1, 2, 3]]))
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_mixture_that_goes_by_expert_is_not_compiled():
    with quiet():
        model = build("mixtral", 96)
        assert "experts" not in compiling.obstacle_to(model, torch.device("meta"))
        ln.add_lora(model, LoraConfig(r=4))
    assert compiling.choose("auto", model, CPU, 10**15) == (
        False,
        compiling.IMPOSSIBLE
        + "packed or adapted experts have a pass of their own, at whose products a compiled graph would end, which does not pay",
    )
    with pytest.raises(ConfigError, match="torch_compile=True cannot be done: packed or adapted experts"):
        compiling.choose(True, model, CPU, 10**15)
