"""`bench merge`'s comparison of merge-aware with plain runs, on a tiny model. Oracle: what must be equal by construction."""

import pytest
from tiny_folders import tiny_data, tiny_model  # noqa: F401

from lownibble.bench.merge import _aware
from lownibble.config import QuantConfig, TrainConfig


@pytest.mark.parametrize(("quant_type", "block_size"), [("nf4", 32), ("int4", "row")])
def test_the_comparison_of_merge_aware_runs(tiny_model, tiny_data, tmp_path, quant_type, block_size):  # noqa: F811
    quant = QuantConfig(quant_type=quant_type, block_size=block_size)
    train = TrainConfig(max_steps=4, batch_size=4, max_length=32, learning_rate=0.01)
    found = _aware(tmp_path, quant, train, model=str(tiny_model), data={"path": str(tiny_data), "max_eval_rows": 16})
    losses = found["losses"]
    assert losses["aware"]["packed"] == pytest.approx(losses["aware"]["live"], rel=1e-6)
    assert losses["plain"]["packed"] != losses["plain"]["live"]
    gain = (losses["plain"]["before"] - losses["aware"]["packed"]) / (losses["plain"]["before"] - losses["plain"]["live"])
    assert found["gain_packed"] == gain
    assert len(found["step_s"]["plain"]) == len(found["step_s"]["aware"]) == 4
    assert found["packed_bytes"]["aware"] > found["packed_bytes"]["plain"]
