"""Four gloo ranks train as one process does, ddp and fsdp."""

import pytest
from ranks import Workers
from safetensors.torch import load_file

from lownibble.config import RunConfig
from lownibble.training import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def four():
    workers = Workers(4)
    yield workers
    workers.close()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_four_ranks_train_as_one_process(four, tiny_model, tiny_data, tmp_path, mode):
    def options(folder, **train):
        return {
            "model": str(tiny_model), "data": {"path": str(tiny_data)}, "method": "qlora", "device": "cpu", "lora": {"r": 6},
            "train": {
                "num_train_epochs": 1, "batch_size": 20, "learning_rate": 1e-2, "max_length": 32, "torch_compile": False,
                "output_dir": str(tmp_path / folder), **train,
            },
        }  # fmt: skip

    one = run(RunConfig.model_validate(options("one")))  # 72 rows: the last batch has 12; r = 6 is 2, 2, 2 and 0 rows of A
    answers = four.train(options("four", parallel=mode))
    assert all("error" not in answer for answer in answers), answers[0]
    assert all(answer["losses"] == answers[0]["losses"] for answer in answers)
    assert answers[0]["losses"] == pytest.approx(one.losses, abs=2e-6)
    assert answers[0]["evaluations"] == pytest.approx([each["loss"] for each in one.record["evaluations"]], abs=2e-6)
    adapter = "adapter/adapter_model.safetensors"
    found, expected = (load_file(tmp_path / name / adapter) for name in ("four", "one"))
    assert found.keys() == expected.keys()
    assert max(float((found[key] - value).abs().max()) for key, value in expected.items()) < 1e-5
