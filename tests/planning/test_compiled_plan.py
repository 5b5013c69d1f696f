"""Plans of compiled layers. Oracles: the compiled step traced on fake tensors; peaks measured on one H100."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from lownibble.arch import read_shape
from lownibble.config import LoraConfig, QuantConfig, TrainConfig
from lownibble.planning import hardware, page
from lownibble.planning.linear import Method, Runtime
from lownibble.planning.memory import PAYS_AFTER_FLOPS, compiles, packed_layers, plan_memory
from lownibble.planning.models import find_config, find_shape
from lownibble.planning.plan import plan
from lownibble.planning.show import beside
from lownibble.planning.step import Batch, run_step
from lownibble.rehearsal import trace
from lownibble.rehearsal.plan import plan as any_plan
from lownibble.rehearsal.trace import trace_step

LAYERS = 3
SMALL = {
    "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4000,
}  # fmt: skip
CONFIGS = {
    "llama-3-8b": find_config("llama-3-8b"),
    "qwen3-8b": AutoConfig.for_model(
        "qwen3", hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        vocab_size=151936, tie_word_embeddings=False,
    ).to_dict(),
    "small llama": AutoConfig.for_model("llama", **SMALL).to_dict(),
    "qwen2": AutoConfig.for_model("qwen2", **SMALL).to_dict(),
    "gemma": AutoConfig.for_model("gemma", **SMALL).to_dict(),
    "gemma2": AutoConfig.for_model("gemma2", **SMALL, layer_types=["full_attention"] * LAYERS).to_dict(),
    "gemma3": AutoConfig.for_model("gemma3_text", **SMALL, layer_types=["full_attention"] * LAYERS).to_dict(),
    "phi": AutoConfig.for_model("phi", **SMALL).to_dict(),
}  # fmt: skip
RUN = Runtime(
    2, fused=False, kernel_attention=False, decode_buffers=1, round_to=512, cuda=True, chunk_bytes=1 << 28, compiled=True
)  # fmt: skip
TOLERANCE = {"phi": 0.02, "gemma2": 0.02, "small llama": 0.025, "gemma3 in full": 0.05}
"""Share of the saved bytes and of backward's peak, if not 0.005. Copies of attention's output or query are not all planned, and a
recomputed layer that is trained in full is planned with one tensor too many. The trace of Gemma 3 in full frees inputs of fused
operations that Inductor's code holds: 68.4 MB, 71.3 planned, 73.4 traced when they are held (docs/plan.md)."""


def peak(tape, phase):
    """The highest bytes in a phase."""
    names = [name for name, _, _ in tape.marks]
    begin, end = (tape.marks[names.index(phase) + i][1] for i in (-1, 0))
    used = [0]
    for _, n in tape.events[:end]:
        used.append(used[-1] + n)
    return max(used[begin:])


QUICK = (("qwen3-8b", "qlora", (4, 1024), False), ("small llama", "full", (2, 512), True))
MORE = (
    ("gemma3", "qlora", (4, 512), False), ("llama-3-8b", "qlora", (4, 1024), False), ("llama-3-8b", "lora", (16, 1024), False),
    ("qwen3-8b", "lora", (2, 4096), False), ("qwen3-8b", "lora", (2, 1024), "offload"), ("qwen2", "qlora", (2, 512), False),
    ("gemma", "lora", (8, 1024), False), ("gemma3", "full", (2, 512), False), ("phi", "lora", (4, 512), False),
    ("gemma2", "lora", (2, 256), False), ("llama-3-8b", "dora", (2, 1024), False),
)  # fmt: skip
"""(configuration, method, rows and tokens a row, gradient checkpointing)."""


@pytest.mark.parametrize(
    ("name", "method", "batch", "checkpointing"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_what_compiled_layers_save_and_the_peak_of_their_backward_are_those_of_the_trace(name, method, batch, checkpointing):
    """Three layers each."""
    config = {**CONFIGS[name], "num_hidden_layers": LAYERS}
    if len(config.get("layer_types") or []) != LAYERS:
        config.pop("layer_types", None)
    run, batch = replace(RUN, itemsize=4 if method == "full" else 2), Batch(*batch, batch[0] * batch[1])
    lora = LoraConfig(r=16, use_dora=method == "dora")
    method = "lora" if method == "dora" else method
    traced = trace_step(config, method, run, batch, quant=QuantConfig(), lora=lora, checkpointing=checkpointing)
    shape = read_shape(config)
    ranks = {f"model.layers.{i}.{linear.name}": 16 for i in range(LAYERS) for linear in shape.linears if method != "full"}
    ways = Method(
        method == "full", packed_layers(shape, QuantConfig()) if method == "qlora" else {}, (), ranks, dora=lora.use_dora
    )
    planned = run_step(shape, ways, run, batch, checkpointing=checkpointing)
    assert traced.compiled
    assert planned.compiled
    saved, ours = (next(used for mark, _, used in tape.marks if mark == "loss") for tape in (traced, planned))
    tolerance = TOLERANCE.get(f"{name} in {method}", TOLERANCE.get(name, 0.005))
    assert ours == pytest.approx(saved, rel=tolerance)
    if torch.__version__ < "2.12" and (name, method) == ("small llama", "full"):
        tolerance = 0.05  # 4% more than what torch 2.11 compiles backward to
    assert peak(planned, "backward") == pytest.approx(peak(traced, "backward"), rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch", "method"), [("llama-3-8b", (4, 1024), "qlora"), ("qwen3-8b", (1, 2048), "lora")], ids=str
)
def test_peaks_of_whole_models_are_within_2_percent_of_the_trace(name, batch, method):
    run, batch = replace(RUN, decode_buffers=2), Batch(*batch, batch[0] * batch[1])
    traced = trace_step(CONFIGS[name], method, run, batch, quant=QuantConfig(), lora=LoraConfig(r=16))
    train = TrainConfig(batch_size=batch.rows, max_length=batch.length, cuda_graphs=False)  # whose gradients are kept: not traced
    plan = plan_memory(
        read_shape(CONFIGS[name]), hardware.device("h100"), method, quant=QuantConfig(), lora=LoraConfig(r=16), train=train,
        batch=batch, compiled=True,
    )  # fmt: skip
    states = 8 * plan.trained_parameters
    assert plan.compiled
    assert plan.allocated.likely == pytest.approx(max(peak(traced, "loss"), peak(traced, "backward")) + states, rel=0.02)


@pytest.mark.parametrize(("method", "measured"), [("qlora", 19_999_194_624), ("lora", 30_122_357_760)])
def test_peaks_measured_on_an_h100(method, measured):
    """`bench train` with default flags on one H100 (train-cuda-uncaptured.json): 8B, 4 x 1024, full rows, labels at all tokens,
    r 16 on all linear layers. Plans are 0.07 GB less, as for eager steps: two workspaces of cuBLAS, which are no tensors of the
    step. The code of that run still held float32 logits and the last chunk's gradient; it had no CUDA graphs, and did not round
    adapters once a pass."""
    plan = plan_memory(
        find_shape("llama-3-8b"), hardware.device("h100"), method, quant=QuantConfig(), lora=LoraConfig(r=16),
        train=TrainConfig(batch_size=4, max_length=1024, cuda_graphs=False), batch=Batch(4, 1024, 4096), compiled=True,
    )  # fmt: skip
    chunk, rounded = 512 * 128256 * (4 + 2), 2 * plan.trained_parameters
    assert plan.allocated.likely == pytest.approx(measured - chunk + rounded, rel=0.01)
    with_graphs = plan_memory(
        find_shape("llama-3-8b"), hardware.device("h100"), method, quant=QuantConfig(), lora=LoraConfig(r=16),
        train=TrainConfig(batch_size=4, max_length=1024), batch=Batch(4, 1024, 4096), compiled=True,
    )  # fmt: skip
    assert with_graphs.allocated.likely - plan.allocated.likely == pytest.approx(4 * plan.trained_parameters, rel=0.01)


def test_what_a_long_run_on_cuda_does_is_planned():
    """As `training/compiling.choose`, by device, option and length of the run."""
    shape, card, train = find_shape("llama-3-8b"), hardware.device("h100"), TrainConfig()
    enough = int(PAYS_AFTER_FLOPS["cuda"] / 6 / shape.parameters) + 1
    assert compiles(shape, card, train)
    assert compiles(shape, card, train, tokens=enough)
    assert not compiles(shape, card, train, tokens=enough - 2)
    assert compiles(shape, card, train.with_options(torch_compile=True), tokens=1)
    assert not compiles(shape, card, train.with_options(torch_compile=False))
    assert not compiles(shape, card, train, merge_aware=True)
    assert not compiles(find_shape("t5-base"), card, train)
    assert not compiles(shape, hardware.device("cpu"), train.with_options(torch_compile=True))


def memory_of(made):
    return made.to_dict()["rows"][0]["memory"]


def test_a_plan_says_what_is_compiled():
    options = {"gpu": "h100", "method": "qlora", "batch_size": 4, "max_length": 1024}
    compiled, eager, short = (
        plan("llama-3-8b", **options, **more) for more in ({}, {"torch_compile": False}, {"tokens": 4096 * 10})
    )
    assert [memory_of(made)["compiled"] for made in (compiled, eager, short)] == [True, False, False]
    assert memory_of(compiled)["allocated_bytes"]["likely"] < 0.7 * memory_of(eager)["allocated_bytes"]["likely"]
    assert memory_of(eager) == memory_of(short)


def test_the_page_is_of_compiled_layers_too(monkeypatch):
    monkeypatch.setattr(page, "BATCHES", (1,))
    monkeypatch.setattr(page, "LENGTHS", (64,))
    made = plan("smollm2-135m", gpu="h100", method="qlora", batch_size=4, max_length=1024)
    cell = page._data(made)["grid"]["qlora"][0][1][1]
    assert memory_of(made)["compiled"]
    assert cell["kinds"] == {kind: n for kind, n in memory_of(made)["kinds"].items() if n}


def test_steps_in_tiles_are_not_compiled():
    options = {"gpu": "h100", "method": "qlora", "batch_size": 1, "max_length": 32768, "gradient_checkpointing": True}
    long, off = (plan("llama-3-8b", **options, torch_compile=option) for option in ("auto", False))
    assert memory_of(long) == memory_of(off)
    assert not memory_of(long)["compiled"]


def test_traced_plans_are_compiled_where_the_run_is(tmp_path):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    options = {"gpu": "h100", "method": "lora", "batch_size": 2, "max_length": 256}
    for option in ("auto", False):
        traced, own = (any_plan(str(tmp_path), exact=exact, **options, torch_compile=option) for exact in (True, False))
        assert memory_of(traced)["compiled"] is memory_of(own)["compiled"] is (option == "auto")
        likely = [memory_of(each)["allocated_bytes"]["likely"] for each in (traced, own)]
        assert likely[0] == pytest.approx(likely[1], rel=0.02)


def test_layers_that_cannot_be_compiled_are_traced_as_they_are(monkeypatch):
    def broken(graph, example_inputs):
        raise ValueError("no luck")

    monkeypatch.setattr(trace, "backend_of", lambda recorder, join: broken)
    tapes = [
        trace_step(CONFIGS["small llama"], "lora", run, Batch(1, 32, 32), quant=QuantConfig(), lora=LoraConfig())
        for run in (RUN, replace(RUN, compiled=False))
    ]
    assert [tape.compiled for tape in tapes] == [False, False]
    assert tapes[0].marks == tapes[1].marks
    assert [peak(tapes[0], phase) for phase in ("loss", "backward")] == [peak(tapes[1], phase) for phase in ("loss", "backward")]


def test_the_line_beside_a_run_says_what_is_not_planned():
    run = {"planned_bytes": {"low": 1, "likely": 2, "high": 3}, "measured_bytes": 2, "error": 0.0}
    said = [beside({**run, "compiled": True, "plan": {"compiled": planned}}) for planned in (False, True)]
    assert ["for layers not compiled" in line for line in said] == [True, False]
