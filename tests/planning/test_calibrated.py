"""Plans of calibration passes. Oracle: torch's profiler over the real pass."""

import gc

import pytest
from pairwise import pairwise
from test_step import SIZES, model_of, needs_kernel, packed, peak_of_events
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from lownibble.arch import read_shape
from lownibble.calibration import join_rows
from lownibble.config import LoraConfig, QuantConfig
from lownibble.errors import ConfigError
from lownibble.kernels.decoded import release_scratch
from lownibble.lora import add_lora
from lownibble.models.info import info
from lownibble.models.load import quantizable
from lownibble.planning import plan
from lownibble.planning.calibrated import rows_of, run_calibration
from lownibble.planning.linear import Method, Runtime
from lownibble.quant import QuantLinear, is_linear

RANK = 8
TOLERANCE = 0.03
"""Of the highest bytes of the pass, above the model's weights."""


def measured(model_type, init, quant, targets, n_tokens, length):
    config = AutoConfig.for_model(model_type, **SIZES)
    model = model_of(config, "full")
    dense = {path: module.weight.data.clone() for path, module in model.named_modules() if is_linear(module)}
    if quant:
        for path in quantizable(model, QuantConfig()):
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, name, QuantLinear.from_linear(getattr(owner, name)))
        info(model).read_dense = lambda path: dense[path].clone()
    rows = join_rows([list(range(1, 900))] * 20, n_tokens, length)
    assert tuple(rows.shape) == rows_of(n_tokens, length)
    release_scratch()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        add_lora(model, LoraConfig(r=RANK, init_lora_weights=init, target_modules=targets), calibration=rows)
    return read_shape(config.to_dict()), peak_of_events(profiler)


@needs_kernel
@pytest.mark.parametrize(("start", "targets", "tokens"), pairwise(
    [("eva", False), ("eva", True), ("qera", True), ("qera_approx", True)], ["all-linear", ["q_proj", "v_proj"]],
    [(9000, 250), (600, 50)],
), ids=str)  # fmt: skip
def test_a_pass_has_the_bytes_of_the_real_one(start, targets, tokens):
    """Of many tokens the hidden states decide, of few the closed form."""
    (init, quant), (n_tokens, length) = start, tokens
    shape, peak = measured("llama", init, quant, targets, n_tokens, length)
    names = {linear.name.rpartition(".")[2] for linear in shape.linears} if targets == "all-linear" else set(targets)
    ranks = {
        f"model.layers.{i}.{linear.name}": RANK
        for i in range(3) for linear in shape.linears if linear.name.rpartition(".")[2] in names
    }  # fmt: skip
    run = Runtime(4, fused=True, kernel_attention=True, decode_buffers=1)
    tape = run_calibration(
        shape, Method(False, *packed(shape, "qlora" if quant else "lora"), ranks), run, rows_of(n_tokens, length), init
    )
    used = highest = 0
    for _, n in tape.events[tape.marks[0][1] : tape.marks[-1][1]]:
        used += n
        highest = max(highest, used)
    adapters = 4 * sum(RANK * (x.in_features + x.out_features) * 3 for x in shape.linears if x.name.rpartition(".")[2] in names)
    assert highest + adapters == pytest.approx(peak, rel=TOLERANCE)


def test_it_is_an_instant_of_its_own_and_may_be_the_peak():
    options = {"gpu": "rtx-4090", "method": "qlora", "batch_size": 1, "max_length": 64}
    plain = plan.plan("llama-2-7b", **options).rows[0].verdict.memory
    for init in ("eva", "qera", "qera_approx"):
        found = plan.plan("llama-2-7b", init_lora_weights=init, **options).rows[0].verdict.memory
        assert {**plain.instants, "calibration": found.instants["calibration"]} == found.instants
        assert found.allocated.likely == max(found.instants.values()) == sum(found.kinds.values())
        assert (found.worst == "calibration") == (found.instants["calibration"] > plain.allocated.likely)
    assert plan.plan("llama-2-7b", init_lora_weights="eva", **options).rows[0].verdict.memory.worst == "calibration"


def test_more_rows_take_more():
    options = {"gpu": "a100-80gb", "method": "lora", "init_lora_weights": "eva", "max_length": 512}
    few, many = (
        plan.plan("llama-2-7b", calibration_tokens=n, **options).rows[0].verdict.memory.instants["calibration"]
        for n in (4096, 4096 + 2**16)
    )
    assert many - few == pytest.approx(2 * 2**16 * 4096 * 2, rel=0.01)  # states in 16 bits: as embedded, and into the last layer


def test_the_last_layer_with_adapters_is_counted():
    options = {"gpu": "a100-80gb", "method": "lora", "init_lora_weights": "eva"}
    found = [
        plan.plan("llama-2-7b", layers_to_transform=layers, **options).rows[0].verdict.memory.instants["calibration"]
        for layers in ([3], [31])
    ]
    assert found[0] == found[1]


def test_on_a_dense_base_nothing_is_corrected():
    found = plan.plan("llama-2-7b", gpu="a100-80gb", method="lora", init_lora_weights="qera").rows[0].verdict.memory
    assert "calibration" not in found.instants


@pytest.mark.parametrize("options", [{"model": "t5-small"}, {"target_modules": ["q_proj", "lm_head"]}])
def test_passes_that_are_not_known_are_refused(options):
    model = options.pop("model", "llama-2-7b")
    with pytest.raises(ConfigError, match="The planner knows the calibration pass of init_lora_weights='eva' for decoders"):
        plan.plan(model, gpu="a100-80gb", method="lora", init_lora_weights="eva", **options)
