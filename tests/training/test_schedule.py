"""Learning-rate schedules. Oracle: transformers' get_scheduler, step by step."""

import pytest
import torch
from transformers import get_scheduler

from lownibble.optim import SCHEDULES, learning_rate, warmup_steps


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (10, 0.0), (10, 0.3), (7, 1.0), (100, 0.03)])
def test_equals_transformers(kind, total, ratio):
    warmup = warmup_steps(total, ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert learning_rate(kind, 0.5, step, total, warmup) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
