"""Plans of objectives over preferences. Oracle: plans of the same sequences as rows of their own; forward passes by hand."""

import pytest

from lownibble.config import LoraConfig, QuantConfig, TrainConfig
from lownibble.planning import hardware
from lownibble.planning.memory import plan_memory
from lownibble.planning.models import find_shape
from lownibble.planning.plan import plan
from lownibble.planning.speed import forwards_without_gradients
from lownibble.planning.step import Batch

OPTIONS = {"gpu": "rtx-4090", "method": "qlora", "max_length": 128, "cuda_graphs": False}


def test_a_pair_is_two_sequences_in_bytes_and_time():
    (pairs,), (rows,) = (
        plan("llama-3-8b", **OPTIONS, **options).rows
        for options in ({"objective": "orpo", "batch_size": 2}, {"objective": "next-token", "batch_size": 4})
    )
    assert pairs.verdict.memory.kinds == rows.verdict.memory.kinds
    assert pairs.speed.step_s == pytest.approx(rows.speed.step_s)
    (reference,) = plan("llama-3-8b", **OPTIONS, objective="dpo", batch_size=2).rows
    assert reference.verdict.memory.kinds == rows.verdict.memory.kinds
    assert 1.2 < reference.speed.step_s.likely / rows.speed.step_s.likely < 1.6  # a forward pass is a third of a step and more


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"objective": "next-token"}, 0), ({"objective": "orpo"}, 0), ({"objective": "dpo"}, 1),
        ({"objective": "dpo", "num_train_epochs": 4.0}, 0.25),
        ({"objective": "dpo", "num_train_epochs": 4.0, "precompute_ref_log_probs": False}, 1), ({"objective": "kto"}, 3),
        ({"objective": "kto", "loss_type": "apo_zero_unpaired"}, 1),
    ],
)  # fmt: skip
def test_forward_passes_without_gradients(options, count):
    assert forwards_without_gradients(TrainConfig(**options)) == count


def test_attention_keeps_whole_sequences_on_cuda():
    """Queries, keys, values and the output of 3 tokens for every 2 that are computed, in 16 bits, and a sum of scores in 32."""
    tokens, shape = 512, find_shape("llama-3-8b")

    def activations(spread):
        plan = plan_memory(
            shape, hardware.device("rtx-4090"), "qlora", quant=QuantConfig(), lora=LoraConfig(),
            train=TrainConfig(objective="dpo", max_length=256), batch=Batch(1, tokens, 100, spread),
        )  # fmt: skip
        return plan.kinds["activations"]

    width, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    more = 2 * (0.5 * (width + 2 * keys) + 1.5 * width) + 4 * 0.5 * shape.heads
    assert activations(1.5) - activations(0.0) == pytest.approx(shape.layers * tokens * more, rel=0.05)
