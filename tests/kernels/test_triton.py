"""When the Triton kernels are used, what is said when they cannot be, and a model's step on them.

Oracles: the reference kernels on the same device (the same bits, since decoded weights are), and the CPU for what runs on CUDA.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import lownibble as ln
from lownibble.errors import BackendError
from lownibble.kernels import ops, plain
from lownibble.kernels.decoded import release_scratch, scratch
from lownibble.quant import QuantLinear
from lownibble.quant.codebook import codebook
from lownibble.training.loss import label_loss

CUDA = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-5}
"""CUDA against CPU, relative to the largest value: float32 sums in another order over two layers; bfloat16 rounds each of some
ten steps to 2^-8, and a changed sum moves one rounding in a few."""


@pytest.fixture
def nothing_loaded(monkeypatch):
    """As in a new process: no backend has been tried. Without the interpreter."""
    monkeypatch.setattr(ops, "_loaded", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return monkeypatch


def test_absent_triton_gives_its_reason(nothing_loaded):
    find = importlib.util.find_spec
    nothing_loaded.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert ops.backend_status()["triton"] == "triton is not installed. Run: pip install triton"
    assert ops.active_backend("cuda") == "reference"
    with pytest.raises(BackendError, match="pip install triton"), ln.use_backend("triton"):
        pass


@needs_triton
def test_absent_cuda_gives_its_reason(nothing_loaded):
    nothing_loaded.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(BackendError, match=r"no CUDA device here\. Use the 'cpu' or 'reference' backend"),
        ln.use_backend("triton"),
    ):
        pass
    assert ops.active_backend("cpu") != "triton"


@needs_triton
def test_status_without_importing_triton_and_the_interpreter_chosen_too_late():
    """Importing triton takes a second, and memory that a run would be charged for; what it is imported as stays."""
    code = (
        "import os, sys, torch; torch.cuda.is_available = lambda: False; from lownibble.kernels import ops; "
        "print('ok' in ops.backend_status()['triton'], 'triton' in sys.modules); "
        "import triton; os.environ['TRITON_INTERPRET'] = '1'; ops._loaded.clear(); print(ops.backend_status()['triton'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    unasked, too_late = done.stdout.splitlines()
    assert unasked == "False False"
    assert "after triton had been imported. Set it before Python starts" in too_late


@needs_triton
def test_cuda_tensors_use_triton_and_cpu_tensors_do_not():
    assert ops.active_backend("cuda") == ops.active_backend(torch.device("cuda", 1)) == "triton"
    assert ops.active_backend("cpu") != "triton"
    with ln.use_backend("triton"):
        assert ops.active_backend("cpu") == "triton"


@needs_triton
def test_compiled_kernels_refuse_cpu_tensors(monkeypatch):
    monkeypatch.setattr(ops.backend("triton"), "device_types", ("cuda",))  # as without the interpreter
    table = codebook("nf4")
    with (
        ln.use_backend("triton"),
        pytest.raises(BackendError, match=r"cannot run on a tensor on 'cpu', only on cuda\. .*use the '(cpu|reference)' backend"),
    ):
        ops.quantize_4bit(torch.ones(64), table.bounds, table.order, 64)


def _qlora_step(tiny, ids_mask_labels, backend, device, dtype):
    """Loss and adapter gradients of one step of a tiny 4-bit model."""
    ids, mask, labels = (t.to(device) for t in ids_mask_labels)
    model = tiny(dtype=dtype, attn_implementation="eager")
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, QuantLinear.from_linear(module))
    ln.add_lora(model, ln.LoraConfig(r=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.to(device)
    with ln.use_backend(backend):
        loss = label_loss(model, ids, mask, labels)
        loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_models_step_is_the_references_bit_for_bit(tiny, batch, monkeypatch, dtype):
    """But for the loss, whose kernel takes the device's exponentials (`test_cross_entropy.py`)."""
    monkeypatch.setattr(ops.backend("triton"), "cross_entropy", plain.cross_entropy)
    ours = _qlora_step(tiny, batch(), "triton", DEVICE, dtype)
    theirs = _qlora_step(tiny, batch(), "reference", DEVICE, dtype)
    assert len(ours) == 1 + 2 * 2 * 7
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert bool(value.isfinite().all()), name
        assert torch.equal(value, theirs[name]), name


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_models_step_on_cuda_is_the_cpus(tiny, batch, dtype):
    ours = _qlora_step(tiny, batch(), "triton", "cuda", dtype)
    theirs = _qlora_step(tiny, batch(), "reference", "cpu", dtype)
    for name, value in ours.items():
        expected = theirs[name]
        torch.testing.assert_close(value.cpu(), expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_moved_layer_decodes_into_one_buffer_on_the_gpu(dtype):
    torch.manual_seed(0)
    layer = QuantLinear.from_linear(nn.Linear(96, 33).to(dtype))
    on_cpu = layer.weight.dequantize()
    layer.to("cuda")
    assert layer.codes.is_cuda
    assert ops.active_backend(layer.codes.device) == "triton"
    assert torch.equal(layer.weight.dequantize().cpu(), on_cpu)
    release_scratch()
    x = torch.randn(70, 96, device="cuda", dtype=dtype)
    first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    buffer = scratch(torch.Size((33, 96)), dtype, x.device)
    assert torch.equal(buffer, layer.weight.dequantize()), "the product read its weight from the shared buffer"
    assert release_scratch() == buffer.nbytes


@pytest.mark.gpu
@needs_triton
def test_quantising_on_cuda_gives_the_cpus_bytes():
    """Without double quantisation; with it, torch's mean of the constants sums in another order on each device."""
    weight = torch.randn(130, 77)
    config = ln.QuantConfig(double_quant=False)
    there, here = ln.quantize(weight.cuda(), config), ln.quantize(weight, config)
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.absmax.cpu(), here.absmax)
    doubly = ln.quantize(weight.cuda())
    assert torch.equal(doubly.codes.cpu(), here.codes)
    torch.testing.assert_close(doubly.dequantize().cpu(), ln.quantize(weight).dequantize(), rtol=0.01, atol=1e-3)
