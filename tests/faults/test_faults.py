"""A few of each kind of fault; `make faults` does them all and records them."""

import pytest
from faults import harness


@pytest.fixture(scope="module")
def who(tmp_path_factory):
    harness._processes.set_forkserver_preload(["lownibble.cli.main", "lownibble.training"])
    folder = tmp_path_factory.mktemp("subjects")
    subjects = harness.subjects(folder)
    return {key: (subjects[key], harness.reference(subjects[key], folder / key)) for key in ("lora", "full")}


@pytest.mark.parametrize(
    ("do", "subject", "count"),
    [
        (harness.kills, "lora", 1),
        pytest.param(harness.kills, "lora", 4, marks=pytest.mark.slow),
        (harness.stops, "full", 1),
        pytest.param(harness.corruptions, "lora", 2, marks=pytest.mark.slow),
        (harness.poisons, "lora", 3),
        (harness.doubles, "lora", 1),
    ],
)
def test_a_fault_ends_well(who, tmp_path, do, subject, count):
    fault = harness.Fault("a fault", do, subject, count)
    outcomes = harness.inflict(fault, *who[subject], tmp_path / "trial", count)
    assert outcomes.total() == count
    assert not [outcome for outcome in outcomes if outcome.startswith("WRONG")]
