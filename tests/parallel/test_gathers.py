"""When sharded layers are gathered. Oracle: torch's own records of a run on two ranks."""

import pytest
from test_parity import in_ranks, options  # noqa: F401

NAMES = {"all_gather": "gather", "post_forward": "ran", "post_backward_reshard": "back"}


def passes(records):
    """Of each training pass: what was gathered and what had run, in order, by the layer's number; -1: the rest is gathered."""
    found = []
    for record in records:
        what, _, path = record.removeprefix("FSDP::").partition(" ")
        step = NAMES.get(what), int(path.strip("()").rpartition(".")[2] or -1)
        if step == ("gather", -1):
            found.append([])
        if step[0] and found and step != ("back", -1):
            found[-1].append(step)
    return [each for each in found if ("back", 0) in each]


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"fsdp_cpu_offload": True},
        pytest.param({"torch_compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_the_next_layer_is_gathered_while_a_layer_runs(two, wider_model, options, tmp_path, changes):  # noqa: F811
    wanted = in_ranks({**options("qlora", batch_size=2, max_steps=2), "model": str(wider_model)}, "fsdp", tmp_path, **changes)
    answers = two.train({**wanted, "traced": True})
    forward = [("gather", -1), ("gather", 0), ("gather", 1), ("ran", 0), ("gather", 2), ("ran", 1), ("gather", 3), ("ran", 2)]
    backward = [("gather", 3), ("gather", 2), ("back", 3), ("gather", 1), ("back", 2), ("gather", 0), ("back", 1)]
    for answer in answers:
        assert "error" not in answer, answer
        found = passes(answer["records"])
        assert len(found) >= 2
        for each in found:
            assert each == [*forward, ("ran", 3), *backward, ("back", 0)]
