"""Compiled steps traced on fake tensors. Oracles: what autograd saves in real ones; the formula of what is computed again."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lownibble as ln
from lownibble.config import LoraConfig, QuantConfig
from lownibble.data import label_places
from lownibble.memory import usage
from lownibble.models.info import info
from lownibble.planning.linear import Runtime
from lownibble.planning.models import find_config
from lownibble.planning.step import Batch
from lownibble.quant import QuantLinear
from lownibble.rehearsal.trace import trace_step
from lownibble.training.compiling import Compiled, torchs_own_warnings_off
from lownibble.training.loss import loss_at

SIZES = {
    "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": 512, "head_dim": 16,
}  # fmt: skip
ROWS, LENGTH = 2, 64
PER_TOKEN = 2 * SIZES["hidden_size"] + SIZES["intermediate_size"]
"""Elements a token and layer: outputs of both norms, and silu(gate) * up."""


def runtime(cuda, compiled=True):
    return Runtime(2, fused=False, kernel_attention=False, decode_buffers=2, cuda=cuda, compiled=compiled)


def saved_bytes(recompute):
    """Bytes that autograd saves in a real step of compiled layers in bfloat16."""
    torch._dynamo.reset()  # a layer's code keeps its graph, whatever the options
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).bfloat16()
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, QuantLinear.from_linear(module))
    ln.add_lora(model.requires_grad_(False), LoraConfig(r=8)).train()
    info(model).needs_mask = False
    layers, ids = Compiled(model, recompute=recompute), torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    for _ in range(2):  # the first compiles
        with layers(), torchs_own_warnings_off():
            watch = usage.SavedActivations()
            with watch.watch(model):
                loss = loss_at(model, ids, None, *label_places(ids))
            loss.backward()
    return watch.bytes


@pytest.mark.slow
def test_elementwise_results_are_computed_again_in_real_steps_and_in_traces():
    real = {recompute: saved_bytes(recompute) for recompute in (False, True)}
    config = AutoConfig.for_model("llama", **SIZES).to_dict()
    traced = {}
    for cuda in (False, True):
        tape = trace_step(
            config, "qlora", runtime(cuda), Batch(ROWS, LENGTH, ROWS * LENGTH), quant=QuantConfig(), lora=LoraConfig(r=8),
        )  # fmt: skip
        assert tape.compiled
        traced[cuda] = next(used for name, _, used in tape.marks if name == "loss")
    compiled_layers = SIZES["num_hidden_layers"] - 1  # the first is not: its input needs no gradient
    spared = compiled_layers * PER_TOKEN * ROWS * LENGTH * 2
    assert real[False] - real[True] == spared
    logits, weight = ROWS * LENGTH * SIZES["vocab_size"], SIZES["hidden_size"] * SIZES["intermediate_size"]
    kept = 2 * (logits - weight)  # by which the buffer of decoded weights grows on a CPU, where logits are in it
    assert traced[False] - traced[True] == spared + kept


def peak(tape):
    used = highest = 0
    for place, (_, n) in enumerate(tape.events):
        used += n
        if place >= tape.marks[0][1]:
            highest = max(highest, used)
    return highest


@pytest.mark.slow
def test_8b_takes_less_than_20_gb_by_default():
    """4 rows of 1024 tokens, adapters of rank 16 on all linear layers, on a card of 80 GB; with two moments a parameter."""
    peaks = {}
    for compiled in (False, True):
        tape = trace_step(
            find_config("llama-3-8b"), "qlora", replace(runtime(True, compiled), round_to=512, chunk_bytes=1 << 28),
            Batch(4, 1024, 4096), quant=QuantConfig(), lora=LoraConfig(r=16),
        )  # fmt: skip
        peaks[compiled] = peak(tape) + 2 * 4 * 41_943_040
    assert peaks[True] < 20e9 < 30e9 < peaks[False]
