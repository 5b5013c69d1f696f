"""What a run is resumed on. Oracles: the run that was not interrupted; a change of the base, which must not go unnoticed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lownibble.config import DataConfig, LoraConfig, QuantConfig, RunConfig, TrainConfig
from lownibble.errors import OutputError
from lownibble.training import run
from lownibble.training.checkpoint import _own_digest

CHANGED = {
    "double_quant": ({"double_quant": False}, "double_quant: True -> False"),
    "layers": ({"skip_modules": ["lm_head", "down_proj"]}, r"skip_modules: \['lm_head'\] -> \['down_proj', 'lm_head'\]"),
    "pattern": ({"pattern": {"down_proj": {"block_size": 64}}}, "pattern: "),
}
SINCE = ("weights", "dtype", "double_quant", "skip_modules", "pattern")
"""What checkpoints did not record at first."""


@pytest.fixture(scope="module")
def begun(tiny_model, tiny_data, tmp_path_factory):
    """`begun(method, folder)`: the configuration that resumes a run from its second step, and its losses if it is not cut."""
    made = {}

    def make(method, folder):
        if method not in made:
            root = tmp_path_factory.mktemp(method)
            config = RunConfig(
                model=str(shutil.copytree(tiny_model, root / "model")), method=method, data=DataConfig(path=str(tiny_data)),
                lora=LoraConfig(r=4, init_lora_weights=True), quant=QuantConfig(block_size=32), device="cpu",
                train=TrainConfig(
                    max_steps=4, save_steps=2, batch_size=4, max_length=24, eval_steps=None, lr_scheduler_type="constant",
                    output_dir=str(root / "out"),
                ),
            )  # fmt: skip
            made[method] = config, run(config).losses
            shutil.rmtree(root / "out" / "checkpoints" / "step-000004")
        config, losses = made[method]
        shutil.copytree(config.train.output_dir, folder)
        return config.with_options(train=config.train.with_options(resume=True, output_dir=str(folder))), losses

    return make


def as_before(folder):
    """Take from a checkpoint what was not recorded at first."""
    path = folder / "checkpoints" / "step-000002" / "state.json"
    state = json.loads(path.read_text())
    del state["self"]
    assert all(state["config"].pop(key) is not None for key in SINCE)
    path.write_text(json.dumps({**state, "self": _own_digest(state)}))


@pytest.mark.parametrize("case", CHANGED)
def test_a_base_that_is_packed_otherwise_is_refused(begun, tmp_path, case):
    config, _ = begun("qlora", tmp_path / "out")
    changes, said = CHANGED[case]
    with pytest.raises(OutputError, match=f"made with other options .*{said}"):
        run(config.with_options(quant=config.quant.with_options(**changes)))


def test_other_weights_under_the_same_name_are_refused(begun, tmp_path):
    config, losses = begun("lora", tmp_path / "out")
    weights = f"{config.model}/model.safetensors"
    assert run(config).losses == losses
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000004")
    kept = load_file(weights)
    save_file({name: torch.rand_like(value) for name, value in kept.items()}, weights, {"format": "pt"})
    with pytest.raises(OutputError, match=r"made with other options .*weights: "):
        run(config)
    save_file(kept, weights, {"format": "pt"})


def test_another_dtype_is_told(begun, tmp_path):
    config, losses = begun("qlora", tmp_path / "out")
    found = run(config.with_options(dtype="bfloat16"))
    assert [m for m in found.record["warnings"] if m == "the run started with the model in 'float32' and resumes with 'bfloat16'"]
    assert found.losses[:2] == losses[:2]


def test_a_run_of_before_this_was_recorded_resumes(begun, tmp_path):
    config, losses = begun("qlora", tmp_path / "out")
    as_before(tmp_path / "out")
    found = run(config)
    assert found.losses == losses
    assert not [m for m in found.record["warnings"] if "run started with" in m]
