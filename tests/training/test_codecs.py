"""int8, int4, nf3, mxfp4 and a mixture through the whole package: train, resume, plan, merge, load again.

Oracles: the uninterrupted run, bit for bit; the planner's bytes; the live model's logits for what was merged.
"""

import shutil

import pytest
import torch
from safetensors import safe_open

import lownibble as ln
from lownibble.config import RunConfig
from lownibble.errors import ConfigError, InputError, QuantizationError
from lownibble.quant import QuantLinear
from lownibble.training import run

QUANT = {
    "int8": {"quant_type": "int8"},
    "int8 by rows": {"quant_type": "int8", "block_size": "row", "double_quant": False},
    "int4": {"quant_type": "int4", "block_size": 32},
    "nf3": {"quant_type": "nf3"},
    "mxfp4": {"quant_type": "mxfp4"},
    "mixed": {"pattern": {"down_proj": {"quant_type": "int8"}, r"layers\.1\..*": {"quant_type": "fp4", "double_quant": False}}},
}  # fmt: skip


@pytest.fixture
def wide(widen):
    return widen()


def config_of(model, data, quant, output, **train):
    options = {"max_steps": 4, "batch_size": 4, "max_length": 32, "save_steps": 2, "output_dir": str(output), **train}
    return RunConfig(model=str(model), data=str(data), method="qlora", device="cpu", quant=quant, train=options)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANT)
def test_trains_resumes_plans_and_merges(wide, tiny_data, tmp_path, name):
    quant = QUANT[name]
    whole = run(config_of(wide, tiny_data, quant, tmp_path / "whole"))
    run(config_of(wide, tiny_data, quant, tmp_path / "cut", lr_scheduler_type="linear"))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    resumed = run(config_of(wide, tiny_data, quant, tmp_path / "cut", resume=True))
    assert resumed.losses == whole.losses
    adapters = [(tmp_path / each / "adapter" / "adapter_model.safetensors").read_bytes() for each in ("whole", "cut")]
    assert adapters[0] == adapters[1]

    planned, memory = whole.record["memory"]["planned"], whole.record["memory"]
    assert "unknown" not in planned
    kinds = planned["plan"]["kinds"]
    assert (kinds["codes"], kinds["constants"]) == (memory["codes_bytes"], memory["constants_bytes"])

    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        expected = whole.model.eval()(ids).logits
    for onto in ("dequantized", quant.get("quant_type", "nf4")):
        merged = ln.merge(tmp_path / "whole" / "adapter", tmp_path / onto, onto=onto, measure_tokens=0, force=True)
        assert merged["onto"] == onto
        model, _ = ln.load(str(tmp_path / onto), device="cpu")
        kinds = {module.codec for module in model.modules() if isinstance(module, QuantLinear)}
        with torch.no_grad():
            found = model(ids).logits
        if onto == "dequantized":
            assert not kinds
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        else:
            assert kinds == {module.codec for module in whole.model.modules() if isinstance(module, QuantLinear)}
            assert (found - expected).norm() < 0.5 * expected.norm()
    with safe_open(tmp_path / "whole" / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert '"quant_type"' in file.metadata()["lownibble_trained_on"]


@pytest.mark.parametrize(
    ("quant", "error", "words"),
    [
        (
            {"quant_type": "int4", "block_size": 128},
            QuantizationError,
            r"q_proj' cannot be packed: .*multiple of 128 long\. Got 64",
        ),
        ({"pattern": {"wrong": {"quant_type": "int8"}}}, ConfigError, r"pattern 'wrong' .* matches no layer"),
    ],
)
def test_bad_choices_are_named_before_anything_is_read(wide, tiny_data, tmp_path, quant, error, words):
    with pytest.raises(error, match=words):
        run(config_of(wide, tiny_data, quant, tmp_path / "out"))
    assert not (tmp_path / "out" / "record.json").exists()


def test_8_bit_products_are_refused_where_the_codec_has_none(wide, tiny_data, tmp_path):
    with pytest.raises(InputError, match=r"'int8' has exact products only"):
        run(config_of(wide, tiny_data, {"quant_type": "int8", "compute": "int8"}, tmp_path / "out"))
