"""Peak memory of merging. Oracle: the kernel's high-water mark of a process that does nothing else."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

import lownibble as ln
from lownibble.bench.merge import MEASURE, SIZES, write_large

MB = 2**20
SLACK = 14 * MB
"""Python objects of the skeleton and the allocator's rounding."""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("onto", "tokens"), [("dequantized", 0), ("original", 0), ("nf4", 0), ("dequantized", 512)])
def test_peak_is_a_shard_and_two_tensors(tmp_path, write, adapt, onto, tokens):
    """Of a checkpoint several times as large; measuring holds the states of its rows besides: five models' last and a layer's."""
    _, small = adapt(write(name="warm-up"), "nf4")
    large = write_large(tmp_path / "large")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large.adapter), str(tmp_path / "merged"), onto, str(tokens)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    allowed = large.shard_bytes + 2 * large.largest_bytes
    assert large.stored_bytes > 3 * allowed
    states = 4 * tokens * (5 * SIZES["hidden_size"] + 2 * SIZES["intermediate_size"])
    assert 0 < int(run.stdout.split()[-1]) <= allowed + states + SLACK


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("onto", ["dequantized", "original", "nf4"])
def test_peak_of_a_mixture_is_the_experts_of_one_layer(tmp_path, write, adapt, onto):
    """In float32: what a layer's `gate_up_proj` is stored as, becomes and is written as, and one expert at work. Tensors are
    mapped each on its own, as those of real sizes are."""
    _, small = adapt(write(name="warm-up"), "nf4")
    write_mixture(tmp_path / "large", 512, 1024, 6)
    arguments = [small, tmp_path / "large-adapter", tmp_path / "merged", onto, 0]
    (tmp_path / "rows.jsonl").write_text("")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    layer_bytes = 4 * 16 * 3 * 512 * 1024
    assert sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")) > 2.9 * layer_bytes
    assert 0 < int(run.stdout.split()[-1]) <= layer_bytes


def write_mixture(folder, hidden, width, layers):
    """A random Mixtral of 16 experts in bfloat16, and an adapter on all of its layers."""
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
        num_local_experts=16, vocab_size=96,
    )  # fmt: skip
    model = MixtralForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="60MB")
    ln.add_lora(model, ln.LoraConfig(r=4, init_lora_weights=False))
    ln.save_adapter(model, f"{folder}-adapter")
    file = folder.with_name(f"{folder.name}-adapter") / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})  # says nothing of its base: merged onto each
    values = json.loads(file.with_name("adapter_config.json").read_text())
    file.with_name("adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": str(folder)}))
