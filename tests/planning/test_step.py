"""The step on a tape. Oracle: the real step of a small model, every allocation of it as torch's profiler sees them."""

from contextlib import nullcontext

import pytest
import torch
from pairwise import pairwise
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from lownibble.arch import all_paths, paths, read_shape
from lownibble.config import LoraConfig, QuantConfig
from lownibble.kernels import ops
from lownibble.kernels.decoded import release_scratch
from lownibble.lora import add_lora
from lownibble.models import experts
from lownibble.models.attention import kernel_obstacle, segment_attention
from lownibble.models.info import compute_again
from lownibble.models.load import quantizable
from lownibble.planning.linear import Method, Runtime
from lownibble.planning.memory import packed_layers
from lownibble.planning.step import Batch, run_step
from lownibble.quant import QuantLinear
from lownibble.quant.codecs import quantize_experts
from lownibble.quant.experts import Ends, QuantExperts
from lownibble.training.loss import loss_at

SIZES = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": 1000, "head_dim": 32,
}  # fmt: skip
MORE = {
    "phi3": {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "sliding_window": None},
    "gemma3_text": {"layer_types": ["full_attention"] * 3}, "mistral": {"sliding_window": None},
}  # fmt: skip
EXACT = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "phi3")
DORA = {"dora": "lora", "qdora": "qlora"}
"""Methods of these tests with DoRA's adapters -> the method."""

TOLERANCE = 0.005
"""Of the highest bytes; what is left are scalars and the sums of a reduction's threads."""

needs_kernel = pytest.mark.skipif(
    not getattr(ops.current("cpu"), "has_attention", lambda _: False)(32), reason="the attention kernel needs AVX-512"
)


def model_of(config, method, attention="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    return as_trained(model, method)


def as_trained(model, method):
    if DORA.get(method, method) == "qlora":
        for path, how in quantizable(model, QuantConfig()).items():
            parent, _, name = path.rpartition(".")
            owner = model.get_submodule(parent)
            held = getattr(owner, name)
            if isinstance(held, torch.nn.Parameter):
                experts.place(owner, name, QuantExperts(quantize_experts(held, how)))
            else:
                setattr(owner, name, QuantLinear.from_linear(held))
    if method == "full":
        return model
    return add_lora(model, LoraConfig(use_dora=method in DORA, target_experts=method != "lora, not on experts"))


def assert_planned(config, model, method, batch, checkpointing, tolerance):
    """The planner's weights and highest bytes are those of the real step."""
    if checkpointing:
        compute_again(model)
    weights, peak = measured(model, batch, 1)
    our_weights, ours = planned(read_shape(config.to_dict()), method, batch, 1, checkpointing)
    assert our_weights == pytest.approx(weights, abs=1000)
    assert ours == pytest.approx(peak, rel=tolerance)


def measured(model, batch, passes):
    """(bytes of weights, then the highest bytes of a step above them)."""
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
    places, labels = torch.arange(batch.labels), torch.zeros(batch.labels, dtype=torch.int64)
    attention = nullcontext() if kernel_obstacle(model) else segment_attention(model)
    release_scratch()  # what an earlier step of this process left
    with attention, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(passes):
            total = loss_at(model, ids, None, places, labels)
            total.backward()
            del total
    return sum(storages.values()), peak_of_events(profiler)


def peak_of_events(profiler):
    """The highest sum of what was allocated and not yet released."""
    used = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


def evenly(expert_of_row, n_experts):
    """`Ends.of` where each expert has as many rows, which the planner assumes; these rows are all alike, and one has all."""
    n_rows = len(expert_of_row)
    return Ends(torch.tensor([n_rows * (expert + 1) // n_experts for expert in range(n_experts)], dtype=torch.int32), n_rows)


def packed(shape, method):
    """Codes and constants of each linear, and which have products that decode inside the kernel; for qlora."""
    if DORA.get(method, method) != "qlora":
        return {}, ()
    found = packed_layers(shape, QuantConfig())
    return found, set(found)


def planned(shape, method, batch, passes, checkpointing):
    linears = paths(shape) if method == "lora, not on experts" else all_paths(shape).items()
    ranks = {} if method == "full" else {path: 16 for path, _ in linears}
    run = Runtime(4, fused=True, kernel_attention=True, decode_buffers=1)
    tape = run_step(
        shape,
        Method(method == "full", *packed(shape, method), ranks, dora=method in DORA),
        run,
        batch,
        checkpointing=checkpointing,
        passes=passes,
    )
    _, begin, weights = tape.marks[0]
    used = peak = 0
    for _, n in tape.events[begin : tape.marks[-1][1]]:
        used += n
        peak = max(peak, used)
    return weights, peak


@needs_kernel
@pytest.mark.parametrize(
    ("model_type", "method", "checkpointing"), pairwise(EXACT, ["full", "lora", "qlora", *DORA], [False, True])
)
def test_equals_the_real_step(model_type, method, checkpointing):
    config = AutoConfig.for_model(model_type, **{**SIZES, **MORE.get(model_type, {})})
    model, batch = model_of(config, method), Batch(2, 64, 100)
    assert_planned(config, model, method, batch, checkpointing, TOLERANCE)


@needs_kernel
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", ["full", "lora", "lora, not on experts", "qlora"])
@pytest.mark.parametrize(
    ("model_type", "sizes", "tolerance"),
    [
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}, TOLERANCE),
        ("qwen3_moe", {"num_experts": 16, "moe_intermediate_size": 96, "num_experts_per_tok": 4}, 0.01),
    ],
)
def test_mixtures_of_experts(model_type, sizes, tolerance, method, checkpointing, monkeypatch):
    monkeypatch.setattr(Ends, "of", evenly)
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes})
    model, batch = model_of(config, method), Batch(2, 64, 100)
    assert_planned(config, model, method, batch, checkpointing, tolerance)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("model_type", "sizes", "tolerance"),
    [
        ("mistral", {"sliding_window": 32}, 0.02),
        ("gemma2", {"sliding_window": 32}, 0.07),  # its plain attention, of which the planner's is a little short with LoRA
    ],
)
def test_windows_and_caps(model_type, sizes, tolerance, method, checkpointing, monkeypatch):
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes})
    model, batch = model_of(config, method, "eager" if model_type == "gemma2" else "sdpa"), Batch(2, 64, 100)
    monkeypatch.setitem(globals(), "segment_attention", nullcontext)  # as a run does where `check_rows` finds an obstacle
    assert_planned(config, model, method, batch, checkpointing, tolerance)


@needs_kernel
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("batch", [Batch(1, 96, 5), Batch(4, 33, 128), Batch(2, 128, 254)], ids=str)
def test_other_batches_and_accumulation(method, batch):
    config = AutoConfig.for_model("llama", **{**SIZES, "tie_word_embeddings": True})
    _, peak = measured(model_of(config, method), batch, 2)
    _, ours = planned(read_shape(config.to_dict()), method, batch, 2, False)
    assert ours == pytest.approx(peak, rel=TOLERANCE)
