"""`lownibble bench merge`: peak memory of merging, and the fine-tuning gain retained by each merge target.

Memory: a checkpoint of random weights in many shards, several times as large as one shard plus two of its largest tensors, is
merged in its own process, whose peak (VmHWM minus the resident set size at the start) is read afterwards: writing alone for each
target, and once preceded by the comparison of all targets on `MEASURED_TOKENS` tokens.

Quality: a QLoRA run on the embedded model and data; its adapter is merged as by `lownibble merge`, which compares each target
with the unmerged adapter.

Merge-aware training, for each codec of `AWARE`: the same run plain and merge-aware, their steps in turns in one process, with
exact products. Held-out losses of both, unmerged and packed; the gain of the packed merge-aware model as a share of the plain
adapter's unmerged gain; the ratio of step times within a pair; and the bytes of the packed weights of both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from lownibble.config import COMPARE_TRAIN, QuantConfig, RunConfig, TrainConfig
from lownibble.errors import ConfigError, TrainingError
from lownibble.exporting.merge import merge
from lownibble.exporting.weights import DENSE_TARGETS

SHARDS = 16
SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "vocab_size": 12_000, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip
_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_R = 8
MEASURED_TOKENS = 2048
AWARE = ("nf4", "int4", "int3")
WARM_UP_STEPS = 2

MEASURE = """
import sys, lownibble as ln
from pathlib import Path
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
warm_up, adapter, output, onto, tokens = sys.argv[1:]
options = {"onto": onto, "force": True, "measure_tokens": int(tokens)}
ln.merge(warm_up, output + "-warm-up", **options)  # imports, thread pools, tables
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before = kilobytes("VmRSS")
trained_on = "dense" if onto == "original" else "quantized"
rows = str(Path(adapter).parent / "rows.jsonl")
ln.merge(adapter, output, trained_on=trained_on, data={"path": rows, "eval_path": rows}, **options)
print((kilobytes("VmHWM") - before) * 1024)
"""
"""A program whose last word of output is the peak bytes of merging. The adapter is made by `write_large`."""


class Large(NamedTuple):
    """A checkpoint, an adapter for it, and the sizes in bytes of the checkpoint, its largest shard and its largest tensor."""

    folder: Path
    adapter: Path
    stored_bytes: int
    shard_bytes: int
    largest_bytes: int


def write_large(folder: Path) -> Large:
    """Write random bfloat16 weights in `SHARDS` shards, an adapter for every linear layer, and text rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, tie_word_embeddings=True, dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(max(shape.numel() for shape in shapes.values()), generator=generator).bfloat16()
    file_of = {name: f"model-{i % SHARDS:05d}.safetensors" for i, name in enumerate(shapes)}
    sizes = []
    for file in sorted(set(file_of.values())):
        held = {name: noise[: shapes[name].numel()].view(shapes[name]).clone() for name in shapes if file_of[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
        sizes.append([tensor.nbytes for tensor in held.values()])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    _write_tokenizer(folder)
    words = " ".join(f"w{number}" for number in range(MEASURED_TOKENS // 8 - 1))
    (folder.parent / "rows.jsonl").write_text(8 * (json.dumps({"text": words}) + "\n"))
    adapter = folder.parent / f"{folder.name}-adapter"
    adapter.mkdir()
    tensors = {}
    for path in (f"model.layers.{i}.{linear}" for i in range(config.num_hidden_layers) for linear in _LINEARS):
        out_features, in_features = shapes[f"{path}.weight"]
        for name, shape in (("lora_A", (_R, in_features)), ("lora_B", (out_features, _R))):
            tensors[f"base_model.model.{path}.{name}.weight"] = 0.01 * torch.randn(shape, generator=generator)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    values = {
        "peft_type": "LORA", "r": _R, "lora_alpha": 16, "base_model_name_or_path": str(folder),
        "target_modules": sorted({linear.rpartition(".")[2] for linear in _LINEARS}),
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    return Large(folder, adapter, sum(map(sum, sizes)), max(map(sum, sizes)), max(size for shard in sizes for size in shard))


def _write_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer with the model's vocabulary size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<eos>", *(f"w{number}" for number in range(SIZES["vocab_size"] - 1))))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<eos>").save_pretrained(folder)


def bench_merge(*, peers: bool = False, repeats: int = 1) -> dict[str, Any]:
    """Measure merging memory on a large checkpoint, and merge quality on a trained adapter.

    Args:
        repeats: memory measurements per target; the largest counts.
    Raises:
        ConfigError: `peers` is given; the comparison is with the unmerged adapter.
        TrainingError: a process failed.
    """
    if peers:
        raise ConfigError("'bench merge' has no peers: it compares merges with the live adapter. Leave --peers out.")
    with tempfile.TemporaryDirectory(prefix="lownibble-merge-") as scratch:
        tune = _tune(Path(scratch))
        memory = _memory(Path(scratch), Path(scratch) / "run" / "adapter", repeats)
        aware = {quant_type: _aware(Path(scratch), QuantConfig(quant_type=quant_type, compute="exact")) for quant_type in AWARE}
    allowed = memory["allowed_bytes"]
    headlines = {f"{onto}: peak / (shard + 2 tensors)": peak / allowed for onto, peak in memory["peak_bytes"].items()}
    headlines["with measuring: peak / (shard + 2 tensors)"] = memory["measuring_peak_bytes"] / allowed
    headlines |= {
        f"{name}: fine-tuning gain retained": figures["kept"] for name, figures in tune["models"].items() if "kept" in figures
    }
    headlines |= {f"merge-aware {name}: gain, packed / plain live": found["gain_packed"] for name, found in aware.items()}
    headlines |= {f"merge-aware {name}: step / plain step": found["step_ratio"] for name, found in aware.items()}
    return {"memory": memory, "tune": tune, "merge_aware": aware, "headlines": headlines}


def _memory(scratch: Path, small: Path, repeats: int) -> dict[str, Any]:
    large = write_large(scratch / "large")

    def peak(onto: str, tokens: int) -> int:
        found = []
        for number in range(repeats):
            output = scratch / f"{onto}-{tokens}-{number}"
            command = [sys.executable, "-c", MEASURE, str(small), str(large.adapter), str(output), onto, str(tokens)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise TrainingError(f"Merging for the measurement failed: {run.stderr.strip().splitlines()[-1]}")
            found.append(int(run.stdout.split()[-1]))
        return max(found)

    return {
        "stored_bytes": large.stored_bytes, "shards": SHARDS, "shard_bytes": large.shard_bytes,
        "largest_tensor_bytes": large.largest_bytes, "allowed_bytes": large.shard_bytes + 2 * large.largest_bytes,
        "peak_bytes": {onto: peak(onto, 0) for onto in (*DENSE_TARGETS, "nf4")},
        "measured_tokens": MEASURED_TOKENS, "measuring_peak_bytes": peak("dequantized", MEASURED_TOKENS),
    }  # fmt: skip


def _tune(scratch: Path) -> dict[str, Any]:
    from lownibble.training import run

    config = RunConfig(method="qlora", train=COMPARE_TRAIN.with_options(output_dir=str(scratch / "run")))
    run(config)
    merged = merge(scratch / "run" / "adapter", scratch / "merged")
    measured: dict[str, Any] = merged["measured"]
    return {"run": config.to_dict(), "onto": merged["onto"], "advice": merged["advice"], **measured}


def _aware(scratch: Path, quant: QuantConfig, train: TrainConfig = COMPARE_TRAIN, **subject: Any) -> dict[str, Any]:
    """Figures of the same run plain and merge-aware with one codec. `subject`: other options of `RunConfig` (model, data)."""
    from lownibble.lora import save_adapter
    from lownibble.training.making import prepare

    subject["train"] = train.with_options(torch_compile=False)
    ways = {"plain": RunConfig(quant=quant, **subject), "aware": RunConfig(quant=quant, merge_aware=True, **subject)}
    trainers = {way: prepare(config)[0] for way, config in ways.items()}
    losses: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way, trainer in trainers.items():
        trainer.set_up()
        losses[way] = {"before": trainer.evaluate(0).loss}
    for step, rows in enumerate(trainers["plain"].micro.steps()):
        if step == trainers["plain"].total_steps:
            break
        for way, trainer in trainers.items():
            seconds[way].append(trainer.step(step, rows).seconds)
    for way, trainer in trainers.items():
        losses[way]["live"] = trainer.evaluate(trainer.total_steps).loss
        adapter, merged = (scratch / f"{quant.quant_type}-{way}-{what}" for what in ("adapter", "merged"))
        save_adapter(trainer.model, adapter)
        merge(adapter, merged, onto=quant.quant_type, measure_tokens=0, force=True)
        losses[way]["packed"] = prepare(RunConfig(**{**subject, "model": str(merged)}))[0].evaluate(0).loss
    before, live = losses["plain"]["before"], losses["plain"]["live"]
    pairs = list(zip(seconds["aware"], seconds["plain"], strict=True))[WARM_UP_STEPS:]
    return {
        "losses": losses, "gain_packed": (before - losses["aware"]["packed"]) / (before - live),
        "step_ratio": statistics.median(aware / plain for aware, plain in pairs), "step_s": seconds,
        "packed_bytes": {way: t.kinds["codes"] + t.kinds["constants"] for way, t in trainers.items()},
    }  # fmt: skip
