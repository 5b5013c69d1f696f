"""Peak memory of `lownibble quantize`. Oracle: the kernel's high-water mark of a process that does nothing else."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_folders import WORDS, write_model
from transformers import LlamaConfig, LlamaForCausalLM

MB = 2**20
SLACK = 14 * MB
"""Python objects of the skeleton and the allocator's rounding, as for merges."""

HIDDEN, WIDE, LAYERS, TOKENS = 512, 768, 16, 512

MEASURE = """
import sys, lownibble as ln
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
warm_up, large, rows, output, tokens = sys.argv[1:]
how = {"quant": ln.QuantConfig(quant_type="int4", block_size=32), "calibration": rows, "max_length": 32, "device": "cpu"}
ln.quantize_model(warm_up, output + "-warm-up", **{**how, "quant": ln.QuantConfig(quant_type="int4", block_size="row")},
                  calibration_tokens=600)  # imports, thread pools, tables
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
before = kilobytes("VmRSS")
ln.quantize_model(large, output, calibration_tokens=int(tokens), **how)
print((kilobytes("VmHWM") - before) * 1024)
"""


def write_large(folder):
    """A random bfloat16 model of small vocabulary, each decoder layer in a shard; returns bytes of the model in float32."""
    write_model(folder)
    (folder / "model.safetensors").unlink()
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=len(WORDS) + 3, tie_word_embeddings=True, dtype="bfloat16", eos_token_id=1, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    generator, file_of = torch.Generator().manual_seed(0), {}
    for layer in [*(f"layers.{i}." for i in range(LAYERS)), ""]:
        names = [name for name in shapes if layer in name and name not in file_of]
        file_of |= dict.fromkeys(names, f"model-{len(set(file_of.values())):05d}.safetensors")
        held = {name: 0.05 * torch.randn(shapes[name], generator=generator).bfloat16() for name in names}
        save_file(held, folder / file_of[names[0]], metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return 4 * sum(shape.numel() for shape in shapes.values())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_is_a_decoder_layer_and_the_states_of_the_rows(tmp_path):
    """A decoder layer in float32, dense and packed; the moments of its four inputs; what rounding one matrix takes (the weight
    that is left, its copies, and the factors of its moments); the states of all rows, before and after; a layer's activations."""
    generator = torch.Generator().manual_seed(4)
    drawn = torch.randint(0, len(WORDS), (100, 14), generator=generator)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": " ".join(WORDS[i] for i in row)}) + "\n" for row in drawn.tolist()))
    model = write_large(tmp_path / "large")
    arguments = [str(write_model(tmp_path / "small")), str(tmp_path / "large"), str(rows), str(tmp_path / "out"), str(TOKENS)]
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    layer = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * WIDE)
    moments = 4 * (3 * HIDDEN**2 + WIDE**2)
    rounding = 4 * (4 * HIDDEN * WIDE + 4 * WIDE**2)
    states = 4 * TOKENS * (2 * HIDDEN + 4 * HIDDEN + 3 * WIDE)
    allowed = 2 * layer + moments + rounding + states
    assert model > 2.5 * allowed
    assert 0 < int(run.stdout.split()[-1]) <= allowed + SLACK
