"""Plans beside published peaks: what is stated in full is met, and what is far off is explained."""

import pytest

from lownibble.bench.published import bench_published
from lownibble.errors import ConfigError


@pytest.fixture(scope="module")
def found():
    return bench_published()


def test_where_the_settings_are_stated_the_plan_is_near(found):
    stated = [row for row in found["rows"] if not row["assumed"]]
    assert len(stated) >= 4
    assert max(abs(row["error"]) for row in stated) < 0.02


def test_every_row_has_a_source_and_every_large_error_a_reason(found):
    for row in found["rows"]:
        assert row["source"]
        assert row["why"] or abs(row["error"]) < 0.1, row
        assert f"{row['error']:+.1%}" == found["headlines"][f"{row['text']}, {row['figure']}"]


def test_nothing_runs():
    with pytest.raises(ConfigError, match="--peers"):
        bench_published(peers=True)
